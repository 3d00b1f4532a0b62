"""The store: complete or absent at any instant, locked by the kernel, clear when damaged."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from matrices import plan_of, specs
from smskd_bench.status import state_of
from smskd_bench.store import (
    CHECKPOINT,
    FAILED,
    PREDICTIONS,
    RESULT,
    SPEC,
    WEIGHTS,
    Store,
    load_weights,
    save_weights,
)

from smskd.atomic import write_atomically, write_json
from smskd.errors import StoreError

ROOT = Path(__file__).parents[2]
TENSORS = {
    "conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "bn.running_mean": torch.zeros(2),
    "bn.num_batches_tracked": torch.tensor(7),
}  # fmt: skip
PREDICTED = torch.tensor([3, 1, 2, 9])


@pytest.fixture
def spec():
    return specs(plan_of(), "kd")[0]


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "runs")


def record(spec, top1=50.0):
    return {"key": spec.key, "test": {"top1": top1, "top5": 90.0, "loss": 1.0}, "kept": None}


def python(code, *words):
    """Start a Python process that can import the harness."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "bench", "export"))
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([paths, *filter(None, [os.environ.get("PYTHONPATH")])])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(process, word):
    line = process.stdout.readline()
    assert line.strip() == word, line + process.stderr.read()


def end(process):
    process.kill()
    process.communicate(timeout=30)


# ----------------------------------------------------------------------------------- atomic files


WRITER = """
    import sys
    from pathlib import Path
    from smskd.atomic import write_json
    path = Path(sys.argv[1])
    print("ready", flush=True)
    n = 0
    while True:
        write_json(path, {"n": n, "fill": [n] * 20000})
        n += 1
"""


def test_a_reader_never_sees_a_part_however_often_the_writer_is_killed(tmp_path):
    path, looks, last = tmp_path / "file.json", 0, -1
    write_json(path, {"n": 0, "fill": [0] * 20000})
    for pause_ms in (13, 29, 41, 57):
        writer = python(WRITER, path)
        wait_for(writer, "ready")
        until = time.monotonic() + 0.1 + pause_ms / 1000
        while time.monotonic() < until:
            value = json.loads(path.read_text())
            assert value["fill"] == [value["n"]] * 20000
            looks += 1
        end(writer)
        value = json.loads(path.read_text())
        assert value["fill"] == [value["n"]] * 20000
        last = max(last, value["n"])
    assert looks > 20
    assert last > 0
    for left in tmp_path.iterdir():
        assert left == path or (left.name.startswith(".file.json.") and left.name.endswith(".tmp"))


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_json_keeps_the_order_of_keys(tmp_path):
    write_json(tmp_path / "file.json", {"b": 1, "a": 2})
    assert list(json.loads((tmp_path / "file.json").read_text())) == ["b", "a"]


# ------------------------------------------------------------------------------------- stage runs


def test_a_stage_run_from_begin_to_end(store, spec):
    key = spec.key
    assert store.result(key) is None
    assert not store.is_done(key)
    folder = store.begin(spec)
    assert folder == store.folder(key) == store.root / "stages" / key[:2] / key
    assert json.loads((folder / SPEC).read_text())["key"] == key
    assert store.spec_document(key) == spec.document()
    assert state_of(store, key) == ("missing", "")
    store.save_checkpoint(key, {"epoch": 1, "w": torch.ones(2)})
    assert store.checkpoint(key)["epoch"] == 1
    assert state_of(store, key)[0] == "stopped"
    store.complete(key, record(spec), TENSORS, PREDICTED)
    assert store.is_done(key)
    result = store.result(key)
    assert result.pop("files").keys() == {WEIGHTS, PREDICTIONS}
    assert result == record(spec)
    assert state_of(store, key) == ("done", "")
    assert sorted(p.name for p in folder.iterdir()) == sorted([SPEC, WEIGHTS, PREDICTIONS, RESULT])
    assert list(store.stage_keys()) == [key]
    for name, tensor in store.weights(key).items():
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.dtype == TENSORS[name].dtype
    assert store.predictions(key).tolist() == PREDICTED.tolist()
    assert store.predictions(key).dtype == torch.int32


def test_the_result_is_written_last(store, spec):
    store.begin(spec)
    store.complete(spec.key, record(spec), TENSORS, PREDICTED)
    times = {p.name: p.stat().st_mtime_ns for p in store.folder(spec.key).iterdir()}
    assert times[RESULT] >= max(times.values())


def test_a_result_that_cannot_be_written_leaves_the_run_visibly_open(store, spec):
    store.begin(spec)
    store.save_checkpoint(spec.key, {"epoch": 3})
    with pytest.raises(ValueError, match="JSON"):
        store.complete(spec.key, {"x": float("nan")}, TENSORS, PREDICTED)
    assert not store.is_done(spec.key)
    assert store.checkpoint(spec.key) == {"epoch": 3}


def test_failures(store, spec):
    key = spec.key
    store.begin(spec)
    store.save_checkpoint(key, {"epoch": 2})
    store.fail(key, "diverged", "a loss became NaN", 2)
    failure = store.failure(key)
    assert {k: failure[k] for k in ("status", "reason", "epoch")} == {
        "status": "diverged", "reason": "a loss became NaN", "epoch": 2,
    }  # fmt: skip
    assert abs(failure["time"] - time.time()) < 60
    assert state_of(store, key) == ("diverged", ": a loss became NaN")
    assert store.checkpoint(key) == {"epoch": 2}
    assert not store.is_done(key)
    store.forget_failure(key)
    store.forget_failure(key)
    assert store.failure(key) is None
    store.fail(key, "failed", "again", 0)
    store.complete(key, record(spec), TENSORS, PREDICTED)
    assert store.failure(key) is None


def test_beginning_twice_changes_nothing(store, spec):
    before = (store.begin(spec) / SPEC).read_bytes()
    assert (store.begin(spec) / SPEC).read_bytes() == before


def test_an_unknown_stage_run(store):
    assert store.result("a" * 64) is None
    assert store.failure("a" * 64) is None
    assert store.checkpoint("a" * 64) is None
    assert not store.is_running("a" * 64)
    with pytest.raises(StoreError, match="no stage run aaa"):
        store.spec_document("a" * 64)
    with pytest.raises(StoreError, match="cannot be read"):
        store.weights("a" * 64)


# -------------------------------------------------------------------------------------- the bytes


def test_weights_have_the_same_bytes_whatever_their_layout(tmp_path):
    other = {
        "bn.num_batches_tracked": TENSORS["bn.num_batches_tracked"].clone(),
        "conv.weight": TENSORS["conv.weight"]
        .to(memory_format=torch.channels_last)
        .requires_grad_(),
        "bn.running_mean": torch.zeros(4)[::2],
    }
    save_weights(tmp_path / "a", TENSORS, {"key": "k"})
    save_weights(tmp_path / "b", other, {"key": "k"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    base = torch.arange(4.0)
    save_weights(tmp_path / "a", {"x": base, "y": base, "z": base[:2]}, {})
    assert {k: v.tolist() for k, v in load_weights(tmp_path / "a").items()} == {
        "x": [0, 1, 2, 3], "y": [0, 1, 2, 3], "z": [0, 1],
    }  # fmt: skip


# -------------------------------------------------------------------------------------- damage


CUTS = [0, 1, 4, 8, 9, 50, -100, -9, -1]


def cut(path, at):
    data = path.read_bytes()
    path.write_bytes(data[:at])


@pytest.fixture
def finished(store, spec):
    store.begin(spec)
    store.save_checkpoint(
        spec.key, {"epoch": 3, "w": torch.ones(500), "rng": torch.get_rng_state()}
    )
    checkpoint = (store.folder(spec.key) / CHECKPOINT).read_bytes()
    store.complete(spec.key, record(spec), TENSORS, PREDICTED)
    (store.folder(spec.key) / CHECKPOINT).write_bytes(checkpoint)
    return store


def one_message(act, *words):
    with pytest.raises(StoreError) as caught:
        act()
    assert caught.value.exit_code == 3
    assert caught.value.hint
    text = str(caught.value)
    assert len(text.splitlines()) <= 4, text
    for word in words:
        assert word in text
    return text


@pytest.mark.parametrize("at", CUTS)
def test_weights_that_were_cut(finished, spec, at):
    for name in (WEIGHTS, PREDICTIONS):
        cut(finished.folder(spec.key) / name, at)
    one_message(lambda: finished.weights(spec.key), WEIGHTS)
    one_message(lambda: finished.predictions(spec.key), PREDICTIONS)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 200,
        b"\0" * 200,
        b"x",
        b"PK\x03\x04" + b"0" * 60,
        b"\x08" + b"\0" * 7 + b"{}      ",
    ],
)
def test_weights_that_are_something_else(finished, spec, data):
    for name in (WEIGHTS, PREDICTIONS):
        (finished.folder(spec.key) / name).write_bytes(data)
    one_message(lambda: finished.weights(spec.key), WEIGHTS)
    one_message(lambda: finished.predictions(spec.key), PREDICTIONS)


def test_weights_that_are_a_folder(finished, spec):
    path = finished.folder(spec.key) / WEIGHTS
    path.unlink()
    path.mkdir()
    one_message(lambda: finished.weights(spec.key), WEIGHTS)


@pytest.mark.parametrize("at", [0, 1, 20, -2])
def test_json_that_was_cut(finished, spec, at):
    for name in (RESULT, SPEC):
        cut(finished.folder(spec.key) / name, at - 2 if at < 0 else at)
    finished.fail(spec.key, "failed", "x", 0)
    cut(finished.folder(spec.key) / FAILED, at - 2 if at < 0 else at)
    one_message(lambda: finished.result(spec.key), RESULT, "is damaged")
    one_message(lambda: finished.spec_document(spec.key), SPEC, "is damaged")
    one_message(lambda: finished.failure(spec.key), FAILED, "is damaged")


@pytest.mark.parametrize("data", [b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"{]"])
def test_json_that_is_something_else(finished, spec, data):
    (finished.folder(spec.key) / RESULT).write_bytes(data)
    one_message(lambda: finished.result(spec.key), RESULT, "is damaged")


@pytest.mark.parametrize("at", [*CUTS, 300, 600])
def test_a_checkpoint_that_was_cut_is_a_fresh_start(finished, spec, at):
    assert finished.checkpoint(spec.key)["epoch"] == 3
    cut(finished.folder(spec.key) / CHECKPOINT, at)
    assert finished.checkpoint(spec.key) is None


def test_a_checkpoint_with_code_in_it_is_not_run(finished, spec, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = finished.folder(spec.key) / CHECKPOINT
    path.write_bytes(pickle.dumps(Bomb()))
    assert finished.checkpoint(spec.key) is None
    torch.save({"epoch": Bomb()}, path)
    assert finished.checkpoint(spec.key) is None
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------- the folder


def test_a_store_that_is_not_there_is_empty_and_looking_does_not_make_it(tmp_path):
    store = Store.peek(tmp_path / "none")
    assert list(store.stage_keys()) == []
    assert not (tmp_path / "none").exists()


def test_opening_makes_it_once(tmp_path):
    Store.open(tmp_path / "a" / "b")
    marker = tmp_path / "a" / "b" / "store.json"
    assert json.loads(marker.read_text()) == {"format": 1}
    before = marker.stat().st_mtime_ns
    Store.open(tmp_path / "a" / "b")
    assert marker.stat().st_mtime_ns == before


@pytest.mark.parametrize("text", ['{"format": 2}', '{"format": "1"}', "{}", '{"format": null}'])
def test_another_format_is_refused_and_nothing_is_changed(tmp_path, text):
    (tmp_path / "store.json").write_text(text)
    for look in (Store.open, Store.peek):
        one_message(
            lambda look=look: look(tmp_path),
            "has format",
            "this version reads format 1",
            "--store DIR",
        )
    assert [p.name for p in tmp_path.iterdir()] == ["store.json"]
    assert (tmp_path / "store.json").read_text() == text


@pytest.mark.parametrize("text", ["", "[]", "null", "1", "{"])
def test_a_damaged_marker_is_refused(tmp_path, text):
    (tmp_path / "store.json").write_text(text)
    one_message(lambda: Store.open(tmp_path), "store.json", "is damaged")
    assert [p.name for p in tmp_path.iterdir()] == ["store.json"]


def test_a_store_that_is_a_file_or_below_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for root in (file, file / "runs", file / "a" / "b"):
        for look in (Store.open, Store.peek):
            text = one_message(lambda look=look, root=root: look(root), str(root), "--store DIR")
            assert "delete" not in text
    assert file.read_text() == "mine"


def test_a_name_that_is_too_long(tmp_path):
    text = one_message(lambda: Store.open(tmp_path / ("x" * 300)), "too long")
    assert "delete" not in text


def test_a_store_that_turns_unwritable(store, spec):
    (store.root / "stages" / spec.key[:2]).write_text("in the way")
    for act in (
        lambda: store.begin(spec),
        lambda: store.save_checkpoint(spec.key, {}),
        lambda: store.fail(spec.key, "failed", "x", 0),
        lambda: store.complete(spec.key, record(spec), TENSORS, PREDICTED),
    ):
        one_message(act, str(store.root), "cannot be written")
    with pytest.raises(StoreError, match="cannot be written"), store.try_lock(spec.key):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_store(tmp_path):
    Store.open(tmp_path)
    for path in (tmp_path / "stages", tmp_path):
        path.chmod(0o555)
    try:
        one_message(lambda: Store.open(tmp_path), "cannot be written")
        Store.peek(tmp_path)
    finally:
        for path in (tmp_path, tmp_path / "stages"):
            path.chmod(0o755)


READ_ONLY = """
    import os, sys
    from pathlib import Path
    from smskd.errors import StoreError
    from smskd_bench.store import Store
    os.setgid(65534); os.setuid(65534)
    try:
        Store.open(Path(sys.argv[1]))
    except StoreError as error:
        print(error.message)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("made", [True, False])
def test_a_store_that_only_others_may_write(tmp_path, made):
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o005:
            folder.chmod(folder.stat().st_mode | 0o005)
    root = tmp_path / "runs"
    if made:
        Store.open(root)
    out, err = python(READ_ONLY, root).communicate(timeout=60)
    assert "cannot be written" in out, out + err


# -------------------------------------------------------------------------------------- the lock


HOLDER = """
    import sys, time
    from pathlib import Path
    from smskd_bench.store import Store
    store = Store(Path(sys.argv[1]))
    while True:
        with store.try_lock(sys.argv[2]) as held:
            print("held" if held else "waiting", flush=True)
            time.sleep(60 if held else 0.1)
"""


def test_two_processes_exclude_each_other_and_a_kill_frees_the_lock(store, spec):
    store.begin(spec)
    key = spec.key
    assert not store.is_running(key)
    first = python(HOLDER, store.root, key)
    try:
        wait_for(first, "held")
        assert store.is_running(key)
        assert state_of(store, key)[0] == "running"
        assert not store.is_running("0" * 64)
        second = python(HOLDER, store.root, key)
        try:
            wait_for(second, "waiting")
            os.kill(first.pid, signal.SIGKILL)
            wait_for(second, "held")
            assert store.is_running(key)
        finally:
            end(second)
    finally:
        end(first)
    assert not store.is_running(key)
    with store.try_lock(key) as held:
        assert held
        assert store.is_running(key)
    assert not store.is_running(key)


COUNTER = """
    import sys
    from pathlib import Path
    from smskd_bench.store import Store
    store, file = Store(Path(sys.argv[1])), Path(sys.argv[2])
    print("ready", flush=True)
    for _ in range(150):
        held = False
        while not held:
            with store.try_lock("k" * 64) as held:
                if held:
                    file.write_text(str(int(file.read_text()) + 1))
"""


def test_nothing_is_lost_between_processes_that_count(store, tmp_path):
    file = tmp_path / "count"
    file.write_text("0")
    processes = [python(COUNTER, store.root, file) for _ in range(3)]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert file.read_text() == "450"


def test_an_error_inside_frees_the_lock(store):
    with pytest.raises(RuntimeError, match="inside"), store.try_lock("b" * 64):
        raise RuntimeError("inside")
    assert not store.is_running("b" * 64)


def test_weights_that_changed_since_they_were_written_are_refused(store, tmp_path):
    key = "ab" * 32
    store.folder(key).mkdir(parents=True)
    found = {"key": key, "test": {"top1": 1.0}, "kept": None}
    store.complete(key, found, {"w": torch.zeros(4)}, torch.zeros(2))
    assert store.result(key)["files"].keys() == {"student.safetensors", "predictions.safetensors"}
    path = store.folder(key) / "student.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="SHA-256"):
        store.weights(key)
