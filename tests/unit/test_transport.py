"""How a bundle and its results travel: text from strangers, processes, streams that break."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from smskd_export.child import MAX_LINE, Child, split_lines
from smskd_export.pulling import Stream, damaged
from smskd_export.remote_shell import checked_device
from smskd_export.sending import WHOLE, Payload
from smskd_export.ssh_errors import connection_error
from smskd_export.transport import Ended, Job, parse_event, plain

from smskd.errors import RunError, StoreError, UsageError

ROOT = Path(__file__).parents[2]
JOB = Job(Path("b"), "id", Path("t"), "set")


# Text from another machine.


@pytest.mark.parametrize(
    "line",
    [
        b"", b"Welcome to the device", b"[1]", b"1", b'"start"', b"{}", b'{"event": 1}',
        b'{"event": "x"', b'{"event": "x", "t": NaN}', b'{"event": "x", "t": -Infinity}',
        b"\xff\xfe", b"[" * 100_000, b'{"event":' * 50_000, b'{"event": "x"} trailing',
        b'{"event": "x", "n": ' + b"9" * 10_000 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_event(line):
    assert parse_event(line) is None


def test_events_hold_no_control_characters():
    nasty = "a\x1b[2J\x00\x07\r\nb\u202ec\u2028d\x9b"
    line = json.dumps({"event": "row", "x": {nasty: [nasty, {"y": nasty}]}, nasty: 1, "n": None})
    found = parse_event(line.encode())
    cleaned = "a[2J  bc d"
    assert found == {
        "event": "row", "x": {cleaned: [cleaned, {"y": cleaned}]}, cleaned: 1, "n": None
    }  # fmt: skip


@given(st.text())
def test_plain_text_cannot_steer_a_terminal(text):
    assert plain(text).isprintable()


def test_deep_events_are_cut():
    line = '{"event": "x", "y": ' + "[" * 400 + "]" * 400 + "}"
    found = parse_event(line.encode())
    assert len(json.dumps(found)) < 200


@given(st.lists(st.binary(max_size=9)), st.lists(st.integers(1, 9)))
def test_lines_do_not_depend_on_how_they_arrive(parts, sizes):
    data = b"\n".join(parts)
    chunks, rest = [], data
    for length in sizes:
        chunks, rest = [*chunks, rest[:length]], rest[length:]
    expected = data.split(b"\n")
    expected = expected if expected[-1] else expected[:-1]
    assert list(split_lines([*chunks, rest])) == expected


def test_endless_lines_are_dropped_without_being_kept():
    def chunks():
        yield b"first\n"
        for _ in range(64):
            yield bytes(1 << 16)
        yield b"rest of it\nlast\n" + b"x" * (MAX_LINE + 1) + b"\nend"

    assert list(split_lines(chunks())) == [b"first", b"last", b"end"]


def test_how_a_runner_ended_is_read_from_its_lines():
    ended, events = Ended(), []
    lines = [
        '{"event": "probe", "probe": {"arch": "x"}}',
        '{"event": "probe", "probe": {"arch": "later"}}',
        "warning: \x1b[1mloud\x1b[0m " + "x" * 1000,
        '{"event": "refused", "code": "board", "message": "m", "remedy": "r", "offers": ["a", 1]}',
        '{"event": "refused", "offers": "none"}',
        '{"event": "end", "status": "aborted", "reason": "too hot"}',
    ]
    for line in lines:
        ended.take(line.encode(), events.append)
    assert [e["event"] for e in events] == ["probe", "probe", "refused", "refused", "end"]
    assert ended.probe == {"arch": "x"}
    assert ended.reason == "too hot"
    first, second = ended.refusals
    assert (first.offers, second.code, second.offers) == (("a", "1"), "unknown", ())
    assert str(first).splitlines() == ["board: m", "    the device has: a, 1", "    -> r"]
    (complaint,) = ended.complaints
    assert complaint.startswith("warning: [1mloud[0m xxx")
    assert len(complaint) == 300


def test_the_same_request_has_the_same_name():
    same = Job(Path("elsewhere"), "id", Path("other"), "set")
    assert same.key == JOB.key
    others = [
        Job(Path("b"), "id2", Path("t"), "set"), Job(Path("b"), "id", None, ""),
        Job(Path("b"), "id", Path("t"), "set", ("--quick",)),
        Job(Path("b"), "id", Path("t"), "set", (), "python3.8"),
    ]  # fmt: skip
    assert len({JOB.key, *(job.key for job in others)}) == 5


# Names of devices, and why they cannot be reached.


@pytest.mark.parametrize(
    "name",
    [
        "orin",
        "me@orin",
        "a.b-c_d@10.0.0.7",
        "me@fe80::1%eth0",
        "ssh://me@orin:2222",
        "ssh://[::1]:22",
    ],
)
def test_names_of_devices(name):
    assert checked_device(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "-v", "-oProxyCommand=x", "me@-oX", "-x@host", "a b", "a\tb", "a\n", "\x1b[31m", "me:secret@host",
     "ssh://me:secret@host", "a;b", "$(id)", "`id`", "a'b", "a/b", "a@b@c"],
)  # fmt: skip
def test_what_is_no_name_of_a_device(name):
    with pytest.raises(UsageError) as caught:
        checked_device(name)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["@@@", "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", "Host key verification failed."],
         "another host key"),
        (["Host key verification failed."], "not known here"),
        (["me@d: Permission denied (publickey,password)."], "without a password"),
        (["Received disconnect from 1.1.1.1: 2: Too many authentication failures"], "password"),
        (["ssh: connect to host d port 22: Connection refused"], "no ssh server answers"),
        (["ssh: connect to host d port 22: Connection timed out"], "does not answer"),
        (["Timeout, server d not responding."], "does not answer"),
        (["ssh: Could not resolve hostname d: Name or service not known"], "the name of d"),
        (["ssh: connect to host d port 22: No route to host"], "no way to d"),
        (["/root/.ssh/config: line 1: Bad configuration option: x"], "does not accept"),
    ],
)  # fmt: skip
def test_complaints_of_ssh_become_causes_and_remedies(said, message):
    error = connection_error("d", said)
    assert message in error.message
    assert error.hint
    assert "StrictHostKeyChecking" not in str(error)
    assert "BatchMode" not in str(error)


def test_other_complaints_of_ssh_have_no_known_cause():
    assert connection_error("d", ["client_loop: send disconnect: Broken pipe"]) is None
    assert connection_error("d", []) is None


# Processes.


def python(code):
    return Child([sys.executable, "-c", code])


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_output_complaints_and_exit_status_are_kept_apart():
    with python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(5)") as child:
        assert list(child.lines()) == [b"out"]
        assert child.end() == 5
        assert child.complaints == [b"err"]


def test_a_command_that_prints_much_on_all_sides_does_not_block():
    code = (
        "import sys; n = 0\n"
        "while data := sys.stdin.buffer.read(65536):\n"
        "    n += len(data); sys.stdout.write('o' * 9999 + '\\n'); sys.stderr.write('e' * 99999)\n"
        "print(n)"
    )
    with python(code) as child:
        lines = list(child.lines(bytes(100_000) for _ in range(30)))
        assert child.end() == 0
    assert int(lines[-1]) == 3_000_000
    assert 0 < len(child.complaints[-1]) <= 1 << 14


def test_a_command_that_reads_nothing_is_no_error():
    with python("print('no, thanks')") as child:
        assert list(child.lines(bytes(100_000) for _ in range(30))) == [b"no, thanks"]
        assert child.end() == 0


def test_leaving_the_block_ends_even_who_ignores_everything(monkeypatch):
    monkeypatch.setattr("smskd_export.child._GRACE_S", 0.2)
    code = (
        "import signal, subprocess, sys, time\n"
        "[signal.signal(n, signal.SIG_IGN) for n in (15, 2, 1, 13)]\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with python(code) as child:
        second = int(next(iter(child.lines())))
        assert alive(second)
    assert gone(child.pid)
    assert gone(second)


def test_someone_who_keeps_the_pipe_open_is_not_waited_for():
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])\n"
        "print(p.pid, flush=True)"
    )
    started = time.monotonic()
    with python(code) as child:
        other = int(next(iter(child.lines())))
        assert list(child.lines()) == []
        assert child.end() == 0
    os.kill(other, signal.SIGKILL)
    assert time.monotonic() - started < 10


def test_a_killed_parent_leaves_no_child():
    code = (
        "import os, sys\n"
        "from smskd_export.child import Child\n"
        "program = 'import os; print(os.getpid(), flush=True)\\nwhile os.read(0, 9): pass'\n"
        "child = Child([sys.executable, '-c', program])\n"
        "print(next(iter(child.lines())).decode(), flush=True)\n"
        "while True: pass"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
    assert gone(child)


# Folders as streams.


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "folder"
    (made / "model").mkdir(parents=True)
    (made / "model" / "a.onnx").write_bytes(os.urandom(70_000))
    (made / "empty").touch()
    (made / "run.py").write_text("print()\n")
    (made / "link").symlink_to("/etc/passwd")
    return made


def test_a_packed_folder_is_a_tar_of_its_plain_files(folder, tmp_path):
    stream = b"".join(Payload(folder).packed())
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / "out", filter="data")
    assert names == ["empty", "model/a.onnx", "run.py", WHOLE]
    for name in names[:-1]:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    some = b"".join(Payload(folder, ("run.py",)).packed())
    with tarfile.open(fileobj=io.BytesIO(some)) as tar:
        assert tar.getnames() == ["run.py", WHOLE]
    assert stream == b"".join(Payload(folder).packed())
    assert Payload(folder).size() == 70_008
    assert Payload(folder).kilobytes() == 76


def test_a_cut_stream_never_holds_the_last_file(folder, tmp_path):
    stream = b"".join(Payload(folder).packed())
    whole = stream.rindex(WHOLE.encode())
    out = tmp_path / "out"
    out.mkdir()
    for length in (0, 511, 512, 1024, 70_000, whole - 512, whole):
        unpack = ["tar", "-xof", "-", "-C", str(out)]
        subprocess.run(unpack, input=stream[:length], capture_output=True, check=False)
        assert not (out / WHOLE).exists()


def test_a_file_that_shrinks_while_it_is_sent(folder):
    stream = Payload(folder).packed()
    next(stream)
    (folder / "model" / "a.onnx").write_bytes(bytes(70_000))
    for _ in range(2):
        next(stream)
    with (folder / "model" / "a.onnx").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(StoreError, match="became shorter"):
        list(stream)


# Results as streams.

MARK = "smskd-0123"


def sent(files, offsets=None):
    """What a device sends."""
    parts = [b"motd without an end", f"\n{MARK} begin\n".encode()]
    for name, data in files.items():
        parts.append(f"{MARK} file {name}\n".encode() + data[(offsets or {}).get(name, 0) :])
        parts.append(f"\n{MARK} end\n".encode())
    return b"".join([*parts, f"\n{MARK} exit 0\n".encode(), b"bye"])


def results(**files):
    made = {name.replace("_", "-"): data for name, data in files.items()}
    record = {"files": {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}}
    return {**made, "result.json": json.dumps(record).encode()}


FILES = results(
    a=b"", b=b"\n", c=b"x\n\nsmskd-0123 e", d=f"\n{MARK} file x".encode(), e=bytes(range(256)) * 3
)


def receive(folder, data, chunk=7):
    stream = Stream(folder, MARK)
    list(stream.take(data[i : i + chunk] for i in range(0, len(data), chunk)))
    return stream


def test_a_stream_cut_anywhere_goes_on_where_it_was_cut(tmp_path):
    whole = sent(FILES)
    for cut in range(0, len(whole), 7):
        folder = tmp_path / str(cut)
        folder.mkdir()
        receive(folder, whole[:cut])
        for path in folder.iterdir():  # what came is never more than the file
            assert FILES[path.name].startswith(path.read_bytes())
        asked = Stream(folder, MARK).offsets().split()
        offsets = {k: int(v) - 1 for k, v in (part.split("=") for part in asked)}
        stream = receive(folder, sent(FILES, offsets))
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
        assert damaged(folder) == []
        assert stream.received == sum(map(len, FILES.values())) - sum(offsets.values())


@pytest.mark.parametrize("chunk", [1, 2, 64, 100_000])
def test_a_stream_does_not_depend_on_how_it_arrives(tmp_path, chunk):
    stream = receive(tmp_path, sent(FILES), chunk)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == FILES
    assert f"{MARK} exit 0".encode() in stream.others


@pytest.mark.parametrize("name", ["../x", "/etc/x", ".hidden", "a b", "", "x\x1b", "x/y", ".."])
def test_names_that_no_measurement_has_are_refused(tmp_path, name):
    with pytest.raises(RunError, match="which no measurement has") as caught:
        receive(tmp_path, sent({name: b"data"}))
    assert caught.value.message.isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_sends_without_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("smskd_export.pulling.LARGEST", 1000)
    with pytest.raises(RunError, match="more than"):
        receive(tmp_path, sent({"a": bytes(2000)}), 300)


def test_damage_is_found(tmp_path):
    receive(tmp_path, sent(FILES))
    (tmp_path / "e").write_bytes(b"other")
    (tmp_path / "b").unlink()
    assert sorted(damaged(tmp_path)) == ["b", "e"]
    for text in ("", "[]", '{"files": 3}', '{"files": {"../e": "0"}}'):
        (tmp_path / "result.json").write_text(text)
        assert damaged(tmp_path) in (["result.json"], ["../e"])
