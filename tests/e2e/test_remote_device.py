"""A real ssh server stands for the device; links break, disks fill up, keys are wrong."""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from real_bundle import make_real_bundle
from smskd_export.measurement import load_samples
from smskd_export.measuring import measure, probe
from smskd_export.remote_shell import Session, new_mark
from smskd_export.transport import LinkLostError, Step
from sshd import SERVER, Cut, Sshd, free_port, make_key, processes_with, wait_until, write_script
from standin_bundle import make_bundle, make_test_set

from smskd.errors import RefusedError, RunError, UsageError

pytestmark = pytest.mark.skipif(
    SERVER is None or shutil.which("ssh") is None, reason="no OpenSSH server and client here"
)
NEEDED = ("sh", "tar", "tail", "df", "mkdir", "mv", "rm")
LARGE = 3_000_000


@pytest.fixture(scope="module")
def server():
    folder = Path(tempfile.mkdtemp(prefix="smskd-"))  # short: a socket's path is limited
    made = Sshd(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


@pytest.fixture
def device(server, monkeypatch):
    """The server with an empty home folder, an ordinary login, and one shared connection."""
    shutil.rmtree(server.home)
    server.home.mkdir()
    server.before.write_text("")
    server.know(server.folder / "host.pub")
    server.trust(server.folder / "user")
    monkeypatch.setenv("SMSKD_SSH", server.client(shared=True))
    yield server
    assert wait_until(lambda: not processes_with(str(server.home))), "something is left running"


@pytest.fixture
def test_set(tmp_path):
    return make_test_set(tmp_path / "test_set")


@pytest.fixture
def bundle(tmp_path, test_set):
    return make_bundle(tmp_path / "bundle", test_set)


def behave(device, *words):
    (device.home / "behave").write_text(" ".join(map(str, words)))


def runs(device):
    """How often something was measured."""
    path = device.home / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


def is_idle(device):
    """Whether no runner is left and its lock is free."""
    if processes_with("run.py objects"):
        return False
    with (device.cache / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def left(device, where):
    return sorted(path.name for path in (device.cache / where).iterdir())


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def failure(kind, bundle, out, **options):
    """The message of a measurement that must fail; nothing is published."""
    with pytest.raises(kind) as caught:
        measure(bundle, out, device="device", **options)
    assert not out.exists()
    print(f"\n{caught.value}")
    return str(caught.value)


# What works.


def test_a_bundle_travels_once_and_its_results_come_back_whole(device, bundle, test_set, tmp_path):
    tools = device.home / "tools"
    tools.mkdir()
    for name in NEEDED:
        (tools / name).symlink_to(Path(shutil.which(name)).resolve())
    device.before.write_text(f"PATH={device.bin}:{tools}")  # this is all that it needs
    events = []
    found = measure(bundle, tmp_path / "out", test_set=test_set, device="device",
                    on_event=events.append)  # fmt: skip
    assert [e["event"] for e in events] == [
        "send", "start", "probe", "row", "end", "fetch"
    ]  # fmt: skip
    assert len(load_bytes(tmp_path / "out", found)) == 2
    assert left(device, "results") == []
    assert len(left(device, "objects")) == 2
    again = []
    measure(bundle, tmp_path / "again", test_set=test_set, device="device",
            on_event=again.append)  # fmt: skip
    assert "send" not in [e["event"] for e in again]
    assert runs(device) == 2
    assert hidden(tmp_path) == []


def load_bytes(folder, found):
    return {name: (folder / name).read_bytes() for name in found.files}


def test_a_probe_says_what_the_device_is_and_refuses(device, bundle):
    found, refusals = probe(bundle, "device")
    assert (found.board, refusals) == ("stand-in", ())
    behave(device, "refuse")
    _, refusals = probe(bundle, "device")
    assert [(r.code, r.remedy, r.offers) for r in refusals] == [
        ("power_mode", "mend [31mit", ("0=15W",))
    ]
    assert probe(bundle, "device", allow=["power_mode"])[1] == ()
    assert runs(device) == 0


def test_hostile_names_are_only_names(device, test_set, tmp_path):
    folder = tmp_path / 'it\'s "$(touch owned)" `touch owned`\n; touch owned & -x'
    bundle = make_bundle(folder / "a b", test_set)
    images = shutil.copytree(test_set, folder / "images $HOME")
    measure(bundle, folder / "out 'put", test_set=images, device="device")
    assert not list(device.home.rglob("owned"))
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    "name", ["-oProxyCommand=touch owned", "a b", "a\nb", "", "x;y", "me:pw@x"]
)
def test_what_is_no_device_is_refused(bundle, tmp_path, name):
    with pytest.raises(UsageError, match="is no name of a device"):
        measure(bundle, tmp_path / "out", device=name)


def test_noise_of_a_login_is_told_from_events(device, bundle, test_set, tmp_path):
    device.before.write_text(
        'echo "Welcome"; echo \'{"event": "end", "status": "ok"}\'; echo oops >&2; '
        "printf 'no line end'; trap 'echo good bye' 0\n"
        # Keep the trap: run the command without exec.
        'sh -c "$SSH_ORIGINAL_COMMAND"; exit $?'
    )
    events = []
    measure(bundle, tmp_path / "out", test_set=test_set, device="device", on_event=events.append)
    assert [e["event"] for e in events][1:] == ["start", "probe", "row", "end", "fetch"]


@pytest.mark.parametrize("login", ["sh", "bash", "dash", "zsh", "fish", "tcsh", "ksh", "busybox"])
def test_any_login_shell_passes_commands_on(device, login):
    path = shutil.which(login)
    if path is None:
        pytest.skip(f"{login} is not here")
    if login == "busybox":
        path = device.home / "sh"
        path.symlink_to(shutil.which("busybox"))
    device.before.write_text(f"login={path}")
    words = [
        "",
        "a b",
        "it's",
        '"',
        "$(id)",
        "`id`",
        "\\n",
        "*",
        "~",
        "#",
        "{a,b}",
        "-n",
        "a;b&|<>",
    ]
    script = 'for a in "$@"; do printf "%s" "$m <$a>"; echo; done'
    with Session("device", script, words, new_mark()) as session:
        said = [line.decode() for line in session.lines(())]
        assert session.finish(Step("", "")) == 0
    assert [s.removeprefix(session.mark + " ") for s in said if s] == [f"<{w}>" for w in words]


def test_another_interpreter_can_be_named(device, bundle, tmp_path):
    own = device.home / "my python"
    write_script(own, 'printf x >> "$HOME/used"; exec python3 "$@"')
    measure(bundle, tmp_path / "out", device="device", python=str(own))
    assert (device.home / "used").read_text() == "x"


# Who is not let in.


def test_an_unknown_host(device, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("SMSKD_SSH", device.client())
    (device.folder / "known_hosts").write_text("")
    said = failure(RefusedError, bundle, tmp_path / "out")
    assert "the host key of device is not known here" in said
    assert "StrictHostKeyChecking" not in said


def test_another_host_key(device, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("SMSKD_SSH", device.client())
    make_key(tmp_path / "other")
    device.know(tmp_path / "other.pub")
    said = failure(RefusedError, bundle, tmp_path / "out")
    assert "another host key than the one that is known" in said
    assert "StrictHostKeyChecking" not in said


def test_a_key_that_the_device_does_not_know(device, bundle, tmp_path, monkeypatch):
    make_key(tmp_path / "stranger")
    device.trust(tmp_path / "stranger")
    monkeypatch.setenv("SMSKD_SSH", device.client())
    said = failure(RefusedError, bundle, tmp_path / "out")
    assert "does not let you in without a password" in said
    assert "ssh-copy-id device" in said


def test_nobody_listens(device, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("SMSKD_SSH", device.client(free_port()))
    said = failure(RefusedError, bundle, tmp_path / "out")
    assert "no ssh server answers at device" in said
    assert "Connection refused" in said


@pytest.mark.slow
def test_a_device_that_does_not_answer(device, bundle, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("SMSKD_SSH", device.client(mute.getsockname()[1]))
        said = failure(RefusedError, bundle, tmp_path / "out")
    assert "device does not answer" in said


@pytest.mark.slow
def test_a_link_that_falls_silent(device, bundle, tmp_path):
    """As when a cable is pulled: nobody says good-bye, and only keepalives tell."""
    behave(device, "slow")
    frozen = []

    def freeze(event):
        if event["event"] == "window" and not frozen:
            frozen.extend(device.sessions())
            for pid in frozen:
                os.kill(pid, signal.SIGSTOP)

    said = failure(LinkLostError, bundle, tmp_path / "out", on_event=freeze)
    assert "was lost while it measured" in said
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    assert wait_until(lambda: is_idle(device))


def test_no_ssh_program(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("SMSKD_SSH", "/nowhere/ssh -F x")
    assert "cannot start /nowhere/ssh" in failure(RunError, bundle, tmp_path / "out")


def test_a_login_that_runs_nothing(device, bundle, tmp_path):
    device.before.write_text("echo This account is not available.; exit 1")
    said = failure(RunError, bundle, tmp_path / "out")
    assert "the login on device runs no commands: This account is not available." in said


def test_no_python(device, bundle, tmp_path):
    said = failure(RefusedError, bundle, tmp_path / "out", python="python9.9")
    assert "device has no Python interpreter python9.9" in said
    assert "--python" in said
    assert left(device, "objects") == []


# Links that break.


def test_a_link_lost_while_measuring_leaves_nothing_running(device, bundle, test_set, tmp_path):
    behave(device, "slow")

    def break_it(event):
        if event["event"] == "window":
            device.kill_sessions()

    out = tmp_path / "out"
    said = failure(LinkLostError, bundle, out, test_set=test_set, on_event=break_it)
    assert "the link to device was lost while it measured" in said
    assert wait_until(lambda: is_idle(device))
    behave(device)
    with pytest.raises(RefusedError, match="keeps no finished results"):
        measure(bundle, out, test_set=test_set, device="device", resume=True)
    measure(bundle, out, test_set=test_set, device="device")
    assert runs(device) == 2
    assert left(device, "results") == []
    assert hidden(tmp_path) == []


def test_a_fetch_that_breaks_is_resumed_and_nothing_is_measured_again(
    device, bundle, tmp_path, monkeypatch
):
    behave(device, "bytes", LARGE)
    monkeypatch.setenv("SMSKD_SSH", device.client())
    probe(bundle, "device")  # so the bundle is there
    out, first, second = tmp_path / "out", Cut(device.port, down=LARGE // 2), Cut(device.port)
    try:
        monkeypatch.setenv("SMSKD_SSH", device.client(first.port))
        said = failure(LinkLostError, bundle, out)
        assert "lost while the results were fetched" in said
        assert "--resume" in said
        (kept,) = tmp_path.glob(".fetching-*/*/fp32-b1-host_ns.npy")
        part = kept.stat().st_size
        assert 100_000 < part < LARGE
        monkeypatch.setenv("SMSKD_SSH", device.client(second.port))
        found = measure(bundle, out, device="device", resume=True)
    finally:
        first.close()
        second.close()
    assert len(load_bytes(out, found)["fp32-b1-host_ns.npy"]) == LARGE
    assert second.passed["down"] < LARGE - part + 100_000  # the rest, and nothing twice
    assert runs(device) == 1
    assert left(device, "results") == []
    assert hidden(tmp_path) == []


def test_a_half_upload_is_never_taken_for_whole(device, test_set, tmp_path, monkeypatch):
    bundle = make_bundle(tmp_path / "bundle", test_set, filling=os.urandom(LARGE))
    link = Cut(device.port, up=LARGE // 2)
    monkeypatch.setenv("SMSKD_SSH", device.client(link.port))
    try:
        said = failure(LinkLostError, bundle, tmp_path / "out")
    finally:
        link.close()
    assert "the link to device was lost while bundle was sent" in said
    assert wait_until(lambda: left(device, "objects") == [])
    monkeypatch.setenv("SMSKD_SSH", device.client(shared=True))
    measure(bundle, tmp_path / "out", device="device")
    assert len(left(device, "objects")) == 1


def test_what_a_device_that_was_switched_off_left_is_removed(device, bundle, tmp_path):
    measure(bundle, tmp_path / "first", device="device")
    (name,) = left(device, "objects")
    objects, results = device.cache / "objects", device.cache / "results"
    (objects / name).rename(objects / f".part-{name}-99999999")  # a process that is no more
    shutil.copytree(objects / f".part-{name}-99999999", objects / f".part-{name}-{os.getpid()}")
    (results / "unfinished-1").mkdir()
    (results / "unfinished-1" / "fp32-b1-host_ns.npy").touch()
    measure(bundle, tmp_path / "second", device="device")
    assert left(device, "objects") == [f".part-{name}-{os.getpid()}", name]
    assert left(device, "results") == []


def test_a_copy_that_rotted_on_the_device_is_sent_again(device, bundle, tmp_path):
    probe(bundle, "device")
    (name,) = left(device, "objects")
    (device.cache / "objects" / name / "model" / "fp32-b1.onnx").write_bytes(b"rotten")
    measure(bundle, tmp_path / "out", device="device")
    assert runs(device) == 1


def test_ctrl_c_and_a_second_measurement_at_once(device, bundle, tmp_path):
    behave(device, "slow")
    said = []

    def interrupt(event):
        if event["event"] == "window":
            said.append(failure(RefusedError, bundle, tmp_path / "other", threads=2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(bundle, tmp_path / "out", device="device", on_event=interrupt)
    assert "busy: another measurement runs here" in said[0]
    assert wait_until(lambda: is_idle(device))
    assert runs(device) == 1


# Devices in trouble.


@contextmanager
def small_disk(folder, size):
    """A real file system of that size, or a skip where none may be mounted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(device, test_set, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", test_set, filling=os.urandom(LARGE))
    with small_disk(device.cache, "6m") as disk:
        said = failure(RefusedError, bundle, tmp_path / "out")
        assert "not enough room on device: 7 MiB are needed in" in said
        assert "6 MiB are free" in said
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)

        def fill(event):
            if event["event"] == "send":
                with suppress(OSError):
                    (disk / "other").write_bytes(bytes(9_000_000))

        said = failure(RefusedError, bundle, tmp_path / "out", on_event=fill)
        assert "not enough room on device" in said
        assert "No space left on device" in said
        assert left(device, "objects") == []
        (disk / "other").unlink()
        measure(bundle, tmp_path / "out", device="device")


def test_a_killed_runner(device, bundle, tmp_path):
    behave(device, "killed")
    said = failure(RunError, bundle, tmp_path / "out")
    assert "the runner on device was killed; nothing was measured" in said
    assert is_idle(device)


def test_a_runner_that_crashes(device, bundle, tmp_path):
    behave(device, "crash")
    said = failure(RunError, bundle, tmp_path / "out")
    assert "the runner on device stopped with exit status 1" in said
    assert "RuntimeError: out of ideas" in said


@pytest.mark.parametrize(("word", "aborted"), [("gate", ""), ("aborted", "too hot")])
def test_failed_rows_and_a_stop_are_results_too(device, bundle, tmp_path, word, aborted):
    behave(device, word)
    assert measure(bundle, tmp_path / "out", device="device").aborted == aborted
    assert runs(device) == 1


def test_results_of_something_else(device, bundle, tmp_path):
    behave(device, "other")
    said = failure(RunError, bundle, tmp_path / "out")
    assert "device brought results of something else" in said
    assert hidden(tmp_path) == []


# The project's own runner.


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make_real_bundle(tmp_path_factory.mktemp("real"))


def test_the_real_runner_over_the_link_and_here(device, real, tmp_path, monkeypatch):
    bundle, test_set = real
    options = {"test_set": test_set, "quick": True, "precisions": ["fp32"]}
    there = measure(bundle, tmp_path / "there", device="device", **options)
    monkeypatch.setenv("HOME", str(tmp_path))
    here = measure(bundle, tmp_path / "here", **options)
    for ours, theirs in zip(there.rows, here.rows, strict=True):
        assert ours.status == theirs.status == "ok"
        assert (ours.parity, ours.accuracy) == (theirs.parity, theirs.accuracy)
        samples = load_samples(tmp_path / "there", ours.samples.host_file)
        assert len(samples) == sum(ours.samples.window_sizes)
    assert (tmp_path / "there" / "events.jsonl").stat().st_size > 0
    assert left(device, "results") == []


def test_the_real_runner_ends_with_its_link_and_can_be_killed(device, real, tmp_path):
    bundle, _ = real
    pids = []

    def at_the_first_window(action):
        def watch(event):
            if event["event"] == "start":
                pids.append(event["pid"])
            if event["event"] == "window":
                action()

        return watch

    lost = at_the_first_window(device.kill_sessions)
    said = failure(LinkLostError, bundle, tmp_path / "out", on_event=lost)
    assert "was lost while it measured" in said
    assert wait_until(lambda: is_idle(device) and left(device, "results") == [])

    killed = at_the_first_window(lambda: os.kill(pids[-1], signal.SIGKILL))
    said = failure(RunError, bundle, tmp_path / "out", on_event=killed)
    assert "the runner on device was killed" in said
    assert is_idle(device)
    assert len(left(device, "results")) == 1  # what it could not remove

    def busy():
        said.append(failure(RefusedError, bundle, tmp_path / "other", quick=True))
        raise KeyboardInterrupt

    said = []
    with pytest.raises(KeyboardInterrupt):
        measure(bundle, tmp_path / "out", device="device", on_event=at_the_first_window(busy))
    assert f"busy: another measurement runs on this device (pid {pids[-1]} since " in said[0]
    assert wait_until(lambda: is_idle(device))
    found = measure(bundle, tmp_path / "out", device="device", quick=True, precisions=["fp32"])
    assert found.quick
    assert left(device, "results") == []


def test_the_real_runner_says_all_that_does_not_fit(device, tmp_path):
    unmet = {"board": "Orin", "runtime_max": "1.2", "power_mode": "15W"}
    bundle, _ = make_real_bundle(tmp_path / "real", requires=unmet)
    said = failure(RefusedError, bundle, tmp_path / "out")
    codes = [line.split(":")[0].strip() for line in said.splitlines() if line.startswith("  ")]
    assert [code for code in codes if code.isidentifier()] == [
        "runtime_version", "board", "power_mode"
    ]  # fmt: skip
    assert left(device, "results") == []
