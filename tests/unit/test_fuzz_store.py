"""Whatever the files of a store hold: a row, a line, or one message that can be printed."""

import io
import random
import shutil
import zipfile

import pytest
import torch
from device_results import make_manifest, make_measurement, make_row, true_classes
from matrices import plan_of
from mutations import damaged_json, is_clean, mutate_bytes
from smskd_bench import status
from smskd_bench.measurements import measurement_folder
from smskd_bench.report.devices import board_markdown, board_table, table
from smskd_bench.report.rows import leaderboard_rows
from smskd_bench.report.tables import print_table, render
from smskd_bench.sealed import seal
from smskd_bench.store import CHECKPOINT, Store
from smskd_bench.terminal import Terminal
from smskd_bench.worker import RunOptions, Worker
from smskd_export.judging import judge, read_judged, write_judged
from smskd_export.measurement import read_measurement
from smskd_export.paired import PairedChange
from smskd_export.parity import Parity
from smskd_export.report import ExportReport, HostCheck, Machine, write_report
from smskd_export.targets import load_target

from smskd.entry_file import EntryFile
from smskd.errors import SmskdError

SESSION = {"device": "cpu", "threads": 1, "from_epoch": 0, "wall_seconds": 1.0, "folded": 1}


def state(epoch):
    return {
        "student": {"w": torch.arange(60.0)}, "optimizer": {"state": {}}, "epoch": epoch, "steps": 0,
        "history": [{"loss": 1.0}], "rng": torch.arange(9, dtype=torch.uint8), "sessions": [SESSION],
    }  # fmt: skip


def made_store(root):
    """A store with one of everything; returns the plan that it belongs to."""
    plan, store = plan_of(rows=[["kd"], ["dkd"], ["sp"]]), Store.open(root)
    keys = list(plan.nodes)
    for key in keys[:-2]:
        store.begin(plan.nodes[key])
        kept = {"same": 50.0, "kept": 80.0, "gained": 3.0}
        record = {"key": key, "test": {"top1": 75.0, "top5": 99.0, "loss": 1.0}, "kept": kept}
        record |= {"deployed": {"parameters": 10, "macs": 20}, "fast_paths": {"teacher": "live"}}
        weights = {"w": torch.arange(60.0), "n": torch.tensor(3)}
        store.complete(key, record, weights, torch.arange(20), {"m": torch.ones(2)})
    stopped, failed = keys[-2:]
    for key in (stopped, failed):
        store.begin(plan.nodes[key])
        for epoch in (1, 2):
            store.save_checkpoint(key, state(epoch))
    store.fail(failed, "diverged", "loss term [sp] became NaN\nin epoch 3", 2)
    for name in ("lock", "lease.json"):  # of another machine, a moment ago
        lease = '{"host": "h b", "name": "h", "pid": 3, "token": "t", "beat": 7}'
        (store.folder(stopped) / name).write_text(lease)
    (root / "calibration.json").write_text('{"format": 1, "measured": []}')
    entries = EntryFile(root / "entries", (40, 3, 5), "float32")
    entries.write(
        torch.arange(9).numpy(), torch.zeros(9, dtype=int).numpy(), torch.ones(9, 5).numpy()
    )
    entries.save()
    export(store, plan.cells[0].stages[-1], measured=True)
    export(store, plan.cells[1].stages[-1], measured=False)
    return plan


def export(store, key, measured):
    where = store.export_folder(key, "cpu")
    where.mkdir(parents=True)
    parity = Parity(
        797, 76.0, 76.5, PairedChange(797, 4, 0, 0.5, 0.1, 1.0, 0.125), 100.0, 1e-6, 1e-7, 1.0, True, "equal",
    )  # fmt: skip
    report = ExportReport(
        schema=2, name="x", created_utc="2025-01-01T00:00:00Z", seconds=1.0, bundle_id="0" * 64, target=load_target("cpu"),
        image_shape=(1, 8, 8), num_classes=10, parameters=10, macs=20, torch_top1=76.0,
        checks=(HostCheck("fp32", 123_456, parity, None),), left_out={},
        machine=Machine("cpu", "x86_64", 2, 2, "Linux", "3.11", None), versions={}, provenance={},
    )  # fmt: skip
    write_report(where, report)
    if measured:
        folder = measurement_folder(store.root, key, "cpu") / "local-1"
        folder.mkdir(parents=True)
        files = {}
        times = torch.arange(1_000_000, 1_000_400).numpy()
        found = make_measurement(folder, [make_row(folder, files, times)], files)
        judged = judge(make_manifest(), found, folder, "local", true_classes(), true_classes())
        write_judged(folder, judged)


def read_all(root, plan, damaged):
    """What a command would read of a damaged file; yields the name of each reader and the call."""
    store = Store(root)
    worker = Worker(store, RunOptions())
    out = io.StringIO()
    yield "peek", lambda: Store.peek(root)
    yield "status", lambda: status.report(root, None, None, Terminal(file=out, width=200))
    yield "rows", lambda: show(leaderboard_rows(plan, Store.peek(root)), out)
    for key in [key for key in plan.nodes if key in damaged.parts or damaged == root]:
        yield "state", lambda key=key: status.state_of(store, key)
        yield "spec", lambda key=key: worker.spec(key)
        if store.is_done(key):
            yield "weights", lambda key=key: store.weights(key)
            yield "predictions", lambda key=key: store.predictions(key)
            yield "inference", lambda key=key: store.inference_weights(key)
        yield "checkpoint", lambda key=key: store.checkpoint(key)
    yield "lease", lambda: [store.is_running(key) for key in plan.nodes]
    measured = sorted((root / "measurements").glob("*/*/*"))
    for folder in [path for path in measured if damaged in (root, *path.glob("*"))]:
        yield "measurement", lambda folder=folder: judge_again(folder)
        yield "judged", lambda folder=folder: show_judged(folder, out)
    if damaged == root or damaged.name.startswith("entries"):
        yield "entries", lambda: EntryFile(root / "entries", (40, 3, 5), "float32")
    yield "printed", lambda: out.getvalue()


def show(rows, out):
    for form in ("markdown", "csv", "json"):
        assert isinstance(render(rows, form), str)
    print_table(rows, Terminal(file=out, width=200))
    Terminal(file=out, width=200).print(board_table(rows))
    board_markdown(rows)


def judge_again(folder):
    found = read_measurement(folder)
    if found is not None:
        judge(make_manifest(), found, folder, "local", true_classes(), true_classes())


def show_judged(folder, out):
    judged = read_judged(folder)
    if judged is not None:
        Terminal(file=out, width=200).print(table(judged))


def damage(draw, path):
    data = path.read_bytes()
    if path.suffix == ".json" and path.stat().st_size:
        return damaged_json(draw, data)
    return mutate_bytes(draw, data)


def check_store(root, plan, count, start=0):
    """Damage one file at a time, read everything, mend it; returns how often it was noticed."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != "lock")
    noticed = 0
    for seed in range(start, start + count):
        draw = random.Random(seed)
        path = files[seed % len(files)]
        before = path.read_bytes()
        path.write_bytes(damage(draw, path))
        try:
            noticed += refusals(root, plan, path, f"seed {seed}") > 0
        finally:
            path.write_bytes(before)
    return noticed


def refusals(root, plan, damaged, where):
    where, count = f"{where}, {damaged.relative_to(root)}", 0
    for name, read in read_all(root, plan, damaged):
        try:
            said = read()
        except SmskdError as error:
            count += 1
            said = str(error)
        except Exception as error:
            raise AssertionError(f"{where}: {name}: {type(error).__name__}: {error}") from error
        assert not isinstance(said, str) or is_clean(said), f"{where}: {name}: {said!r}"
    return count


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "runs"
    return root, made_store(root)


def test_the_undamaged_store_reads_whole(made):
    root, plan = made
    assert refusals(root, plan, root, "undamaged") == 0
    assert leaderboard_rows(plan, Store(root))[0].mean == 75.0


def test_fuzz_store(made):
    assert 80 < check_store(*made, 200) < 200


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fuzz_store_ten_thousand_times(made):
    assert 5000 < check_store(*made, 10_000) < 10_000


# ------------------------------------------------------------------------------------- truncation


def cuts(path, most):
    """Every length of a file up to ``most``, and lengths a step apart beyond."""
    size = path.stat().st_size
    return [*range(min(size, most)), *range(most, size, max(1, (size - most) // most or 1))]


@pytest.fixture
def stopped(made, tmp_path):
    """A store of its own, and the key of a stage run with two checkpoints."""
    root, plan = made
    copy = shutil.copytree(root, tmp_path / "runs")
    return Store(copy), list(plan.nodes)[-2], next(iter(plan.nodes))


def truncate(store, key, name, most, read):
    path = store.folder(key) / name
    whole = path.read_bytes()
    for size in cuts(path, most):
        path.write_bytes(whole[:size])
        yield size, said_or_read(read, store, key)
    path.write_bytes(whole)


def said_or_read(read, store, key):
    try:
        return read(store, key)
    except SmskdError as error:
        return "refused" if is_clean(str(error)) else f"steers a terminal: {error!s}"


def newest(store, key):
    return store.checkpoint(key)["epoch"]


def check_truncations(stopped, most):
    store, begun, done = stopped
    assert newest(store, begun) == 2
    assert {found for _, found in truncate(store, begun, CHECKPOINT, most, newest)} == {1}
    for name, read in (
        ("student.safetensors", Store.weights), ("predictions.safetensors", Store.predictions),
    ):  # fmt: skip
        assert {f for _, f in truncate(store, done, name, most, read)} == {"refused"}
    for name, key, read in (
        ("result.json", done, Store.result), ("spec.json", done, Store.spec_document),
        ("failed.json", done, Store.failure),
    ):  # fmt: skip
        if name == "failed.json":
            store.fail(key, "failed", "why", 1)
        sizes = [size for size, f in truncate(store, key, name, most, read) if f != "refused"]
        whole = (store.folder(key) / name).stat().st_size
        assert set(sizes) <= {whole - 1}, name  # only the last line end may go
    # A lease that was cut belongs to nobody that can be named; the kernel's lock still counts.
    assert all(f is False for _, f in truncate(store, begun, "lease.json", most, Store.is_running))


def test_truncation(stopped):
    check_truncations(stopped, 120)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_truncation_at_every_byte(stopped):
    check_truncations(stopped, 6000)


def check_flips(stopped, step):
    """A flipped bit gives the state that was saved, or the one before; never another one."""
    store, key, _ = stopped
    path = store.folder(key) / CHECKPOINT
    whole, before = path.read_bytes(), 0
    for at in range(0, len(whole), step):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        found = store.checkpoint(key)
        wanted = state(found["epoch"])
        assert torch.equal(found["student"]["w"], wanted["student"]["w"]), at
        assert torch.equal(found["rng"], wanted["rng"]), at
        assert found["history"] == wanted["history"], at
        before += found["epoch"] == 1
    return before


def test_flipped_bits(stopped):
    assert check_flips(stopped, 23) > 50


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_flipped_bits_at_every_byte(stopped):
    assert check_flips(stopped, 1) > 2000


def test_a_checkpoint_of_before_is_read(stopped):
    """Nothing was added to the file: checkpoints from before the check have the checksums too."""
    store, key, _ = stopped
    torch.save(state(2), store.folder(key) / CHECKPOINT)
    assert newest(store, key) == 2


def test_a_compressed_checkpoint_is_refused_without_being_opened(stopped):
    store, key, _ = stopped
    path = store.folder(key) / CHECKPOINT
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10_000_000))
    assert newest(store, key) == 1


def test_a_checkpoint_with_another_end_is_not_sealed_twice():
    with pytest.raises(ValueError, match="comment"):
        seal(b"PK\5\6 and something else behind it")
