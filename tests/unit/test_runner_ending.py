"""However a run of the device runner ends: no process, no lock, no half results stay."""

import contextlib
import fcntl
import gc
import json
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from runner_bundle import change_spec, events_of, make_bundle, make_test_set, named
from smskd_export.runner import run


@pytest.fixture(autouse=True, scope="module")
def light_collector():
    """The runner collects garbage before every window; not what the rest of the tests holds."""
    gc.freeze()
    yield
    gc.unfreeze()


LONG = {"min_duration_s": 60.0, "windows": 50}


@pytest.fixture
def bundle(tmp_path):
    made = make_bundle(tmp_path / "bundle", make_test_set(tmp_path / "tests"), batches=(1,))
    lengthen(made, **LONG)
    return made


def lengthen(bundle, **fields):
    spec = json.loads((bundle / "protocol.json").read_text())
    change_spec(bundle, protocol={**spec["protocol"], **fields})


def command(bundle, tmp_path, *words):
    return [
        sys.executable, str(bundle / "run.py"), str(bundle), "--out", str(tmp_path / "out"),
        "--cache", str(tmp_path / "cache"), *words,
    ]  # fmt: skip


@pytest.fixture
def start(bundle, tmp_path):
    """Starts the runner and waits for an event; everything is gone afterwards."""
    started = []

    def begin(until, *words, folder=bundle, **options):
        process = subprocess.Popen(
            command(folder, tmp_path, *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
        started.append(process)
        for line in process.stdout:
            if json.loads(line)["event"] == until:
                return process
        raise AssertionError(f"it ended before {until}: {process.stderr.read()}")

    yield begin
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def ended(process):
    """Exit status and the last events; communicate would close standard input."""
    process.wait(timeout=30)
    return process.returncode, events_of(process.stdout.read()), process.stderr.read()


def nothing_left(tmp_path):
    assert not (tmp_path / "out").exists()
    with (tmp_path / "cache/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_nothing(start, tmp_path, number):
    process = start("warmup")
    process.send_signal(number)
    status, events, errors = ended(process)
    assert (status, errors) == (4, "")
    assert events[-1]["status"] == "aborted"
    assert number.name in events[-1]["reason"]
    nothing_left(tmp_path)


def test_the_end_of_standard_input_stops_it(start, tmp_path):
    process = start("warmup", "--stop-with-stdin")
    process.stdin.write("some noise\n")
    process.stdin.flush()
    time.sleep(0.2)
    assert process.poll() is None
    process.stdin.close()
    status, events, _ = ended(process)
    assert status == 4
    assert "link" in events[-1]["reason"]
    nothing_left(tmp_path)


def test_without_that_option_standard_input_does_not_matter(start):
    process = start("warmup")
    process.stdin.close()
    time.sleep(0.3)
    assert process.poll() is None


def test_standard_input_that_ended_before_the_start(bundle, tmp_path):
    words = command(bundle, tmp_path, "--stop-with-stdin")
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 4
    assert not (tmp_path / "out").exists()


def test_a_reader_that_went_away_ends_it(start, tmp_path, bundle):
    lengthen(bundle, min_duration_s=0.3)
    process = start("warmup")
    process.stdout.close()
    process.wait(timeout=30)
    assert process.returncode == 4
    assert process.stderr.read() == ""
    nothing_left(tmp_path)


def test_a_reader_that_stalls_does_not_keep_it_alive(start, bundle, tmp_path):
    lengthen(bundle, min_duration_s=0.0, min_samples=1, windows=100_000)
    process = start("warmup", "--stop-with-stdin")
    time.sleep(2.0)  # it fills the pipe and stands
    assert process.poll() is None
    process.stdin.close()
    process.wait(timeout=30)
    assert process.returncode == 4
    nothing_left(tmp_path)


def test_busy_names_who_holds_the_lock(start, bundle, tmp_path):
    process = start("warmup")
    words = [*command(bundle, tmp_path)[:-4], "--out", str(tmp_path / "other")]
    words += ["--cache", str(tmp_path / "cache")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    refusal = named(events_of(done.stdout), "refused")[0]
    assert done.returncode == 3
    assert refusal["code"] == "busy"
    assert f"pid {process.pid} since 20" in refusal["message"]
    assert not (tmp_path / "other").exists()
    assert process.poll() is None
    probe = [*words, "--probe"]
    assert subprocess.run(probe, capture_output=True, timeout=60, check=False).returncode == 0


def test_a_killed_run_frees_the_lock_and_leaves_no_record(start, bundle, tmp_path):
    process = start("warmup")
    process.kill()
    process.wait(timeout=30)
    assert not (tmp_path / "out/result.json").exists()
    with (tmp_path / "cache/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_signal_during_a_long_call_ends_it_at_once(tmp_path):
    """A build of an engine is one call of minutes that gives Python no chance to look."""
    code = (
        "import hashlib, sys\n"
        f"sys.path.insert(0, {str(run.__file__.rpartition('/')[0])!r})\n"
        "import run\n"
        "arguments = run.parse_arguments(['nothing', '--probe'])\n"
        "it = run.Run(arguments, run.Machine(), None, None)\n"
        "run.watch(it, False)\n"
        "print('ready', flush=True)\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 400_000_000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "ready\n"
        begun = time.monotonic()
        process.terminate()
        process.wait(timeout=30)
        assert time.monotonic() - begun < 20
        assert process.returncode == 4


def hwmon(root):
    """A power monitor that always reads 5 V and 0.4 A."""
    folder = root / "sys/class/hwmon/hwmon3"
    folder.mkdir(parents=True)
    for name, text in (
        ("name", "ina3221"), ("in1_label", "VDD_IN"), ("in1_input", "5000"), ("curr1_input", "400"),
    ):  # fmt: skip
        (folder / name).write_text(text + "\n")
    return root


def processes():
    """Command lines of all processes by number."""
    found = {}
    for path in run.Machine().glob("/proc/[0-9]*"):
        found[int(path.name)] = run.Machine().text(path / "cmdline").replace("\0", " ")
    return found


def test_the_sampler_of_power_does_not_outlive_it(tmp_path):
    root = hwmon(tmp_path / "root")
    bundle = make_bundle(tmp_path / "bundle", make_test_set(tmp_path / "tests"), batches=(1,))
    lengthen(bundle, energy_idle_s=0.1, energy_active_s=60.0)
    code = (
        f"import sys; sys.path.insert(0, {str(bundle)!r})\n"
        "import run\n"
        f"sys.exit(run.main(sys.argv[1:], root={str(root)!r}, alone=True))\n"
    )
    # Compiled, run.py would leave a file in the bundle that does not belong there.
    words = [sys.executable, "-B", "-c", code, *command(bundle, tmp_path)[2:]]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    with process:
        said = []
        for line in process.stdout:
            said.append(json.loads(line))
            if said[-1].get("part") == "active":
                break
        assert said[-1].get("part") == "active", said
        samplers = [
            p
            for p, line in processes().items()
            if "--sample-power" in line and str(tmp_path) in line
        ]
        assert len(samplers) == 1
        process.kill()  # not even a chance to clean up
        process.wait(timeout=30)
    deadline = time.monotonic() + 20
    while samplers[0] in processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    left = processes().get(samplers[0], "")
    assert "--sample-power" not in left


class Hot(run.Machine):
    """Its sensor is cool until the first window, then hot."""

    degrees = 40_000

    def glob(self, pattern):
        return [self.path("zone")] if "thermal_zone" in pattern else []

    def number(self, name):
        return self.degrees if str(name).endswith("zone/temp") else None

    def text(self, name):
        return "tj-thermal" if str(name).endswith("zone/type") else ""


def hot_run(tmp_path, monkeypatch, *words, **fields):
    monkeypatch.setattr(run, "Machine", Hot)
    tests = make_test_set(tmp_path / "tests")
    bundle = make_bundle(tmp_path / "bundle", tests, names=("fp32", "int8+fp32"), batches=(1,))
    lengthen(bundle, **fields)
    words = [
        str(bundle),
        "--out",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path / "cache"),
        *words,
    ]
    status = run.main(words)
    record = tmp_path / "out/result.json"
    return status, json.loads(record.read_text()) if record.exists() else None


def test_too_hot_between_windows_keeps_the_finished_rows(tmp_path, monkeypatch, capsys):
    seen = []

    def window(*arguments, **keywords):
        times = original(*arguments, **keywords)
        seen.append(1)
        if len(seen) == 6:  # the second window of the second row
            monkeypatch.setattr(Hot, "degrees", 96_000)
        return times

    original = run.time_window
    monkeypatch.setattr(run, "time_window", window)
    status, record = hot_run(tmp_path, monkeypatch, abort_above_c=95.0)
    assert status == 4
    assert [row["id"] for row in record["rows"]] == ["fp32-b1"]
    assert record["rows"][0]["status"] == "ok"
    assert "tj-thermal is at 96.0 C" in record["aborted"]
    last = events_of(capsys.readouterr().out)[-1]
    assert (last["event"], last["status"]) == ("end", "aborted")


def test_heat_can_be_waived_and_is_then_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(Hot, "degrees", 96_000)
    status, record = hot_run(tmp_path, monkeypatch, "--allow", "thermal", abort_above_c=95.0)
    assert status == 0
    assert record["allowed"] == ["thermal"]


def test_a_device_that_stays_warm_is_not_timed(tmp_path, monkeypatch, capsys):
    fields = {"start_below_c": 30.0, "settle_s": 0.02}
    status, record = hot_run(tmp_path, monkeypatch, **fields)
    assert status == 5
    assert {row["status"] for row in record["rows"]} == {"failed"}
    assert "still at 40.0 C" in record["rows"][0]["reason"]
    settled = named(events_of(capsys.readouterr().out), "settle")
    assert all(event["s"] >= 0.1 for event in settled)
    assert settled[0]["hottest_c"] == 40.0


def test_waiting_ends_when_it_is_cool(tmp_path, monkeypatch):
    monkeypatch.setattr(Hot, "degrees", 60_000)
    timer = threading.Timer(0.3, lambda: setattr(Hot, "degrees", 20_000))
    original = run.Run._settle

    def settle(self, row):
        if not timer.ident:
            timer.start()
        original(self, row)

    monkeypatch.setattr(run.Run, "_settle", settle)
    status, record = hot_run(tmp_path, monkeypatch, start_below_c=30.0, settle_s=1.0)
    timer.join()
    assert status == 0
    assert {row["status"] for row in record["rows"]} == {"ok"}


@pytest.mark.parametrize("limit", [2000, 6000])
def test_a_disk_that_takes_no_more_is_one_reason_and_leaves_nothing(bundle, tmp_path, limit):
    lengthen(bundle, min_duration_s=0.01, windows=30)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = command(bundle, tmp_path)
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, preexec_fn=small_files, check=False
    )
    assert (done.returncode, done.stderr) == (4, "")
    assert "File too large" in events_of(done.stdout)[-1]["reason"]
    nothing_left(tmp_path)


def test_a_signal_after_the_record_was_written_changes_nothing(tmp_path):
    made = tmp_path / "out"
    made.mkdir()
    it = run.Run(run.parse_arguments(["nothing", "--probe"]), run.Machine(), None, None)
    it._made, it._finished = made, True
    it.die("too late")
    it.clean()
    assert made.exists()
