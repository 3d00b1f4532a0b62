"""Speeds of the device: measured by really training, kept, and measured anew when damaged."""

import json
from dataclasses import replace

import pytest
import torch
from hardware import EVERY_PRECISION
from smskd_bench import calibration, speed
from smskd_bench.calibration import FILE, calibrate
from smskd_bench.speed import Workload, as_measured, measure
from smskd_bench.store import Store
from smskd_bench.worker_trial import WorkerTrial, _best, measured_workers

TRAIN = Workload("resnet8_quarter", "digits", 32, "fp32", 1, "train")
FORWARD = replace(TRAIN, role="forward")
BOTH = [TRAIN, FORWARD]


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store")


def quick(wanted=BOTH, store=None, **options):
    return calibrate(wanted, "cpu", store, each_s=0.01, **options)


@pytest.mark.parametrize("precision", EVERY_PRECISION)
def test_real_speeds(precision):
    before, state = torch.get_num_threads(), torch.get_rng_state()
    works = [replace(work, precision=precision) for work in BOTH]
    train, forward = (measure(work, "cpu", 0.05) for work in works)
    assert 0.0 < forward < train < 100.0
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cpu_measures_large_networks_on_fewer_images():
    large = Workload("resnet32x4", "cifar100", 64, "fp32", 1, "train")
    assert as_measured(large, "cpu").batch_size == speed.LEAST_IMAGES
    assert as_measured(large, "cuda") == large
    assert as_measured(TRAIN, "cpu") == TRAIN
    forward = [replace(large, role="forward", batch_size=size) for size in (64, 1000)]
    assert len({as_measured(work, "cpu") for work in forward}) == 1


def test_measured_once(store):
    told = []
    first = quick(store=store, progress=lambda *what: told.append(what))
    assert told == [(0, 2, "resnet8_quarter train 32"), (1, 2, "resnet8_quarter forward 32")]
    assert first.seconds > 0.0
    told.clear()
    second = quick(store=store, progress=lambda *what: told.append(what))
    assert (told, second.seconds) == ([], 0.0)
    for work in BOTH:
        assert second.ms_per_image(work) == pytest.approx(first.ms_per_image(work), rel=1e-3)


def test_nothing_is_written_without_a_store(tmp_path):
    quick([FORWARD], Store.peek(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_other_devices_and_versions_are_kept_and_not_used(store):
    quick([FORWARD], store)
    document = json.loads((store.root / FILE).read_text())
    (entry,) = document["measured"]
    foreign = [{**entry, "device": "Some GPU"}, {**entry, "torch": "1.0"}]
    (store.root / FILE).write_text(json.dumps({**document, "measured": foreign}))
    assert quick([FORWARD], store).seconds > 0.0
    kept = json.loads((store.root / FILE).read_text())["measured"]
    assert [e["device"] for e in kept][:2] == ["Some GPU", entry["device"]]
    assert len(kept) == 3


ENTRY = {"device": "d", "torch": "t", "ms_per_image": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
        '{"format": 99, "measured": []}',
        '{"format": 1}',
        '{"format": 1, "measured": 3}',
        json.dumps({"format": 1, "measured": [{**ENTRY, "work": {"model": 3}}]}),
        json.dumps({"format": 1, "measured": [{**ENTRY, "work": None}]}),
    ],
)
def test_a_damaged_file_is_measured_anew(store, text):
    (store.root / FILE).write_text(text)
    assert quick([FORWARD], store).seconds > 0.0
    assert quick([FORWARD], store).seconds == 0.0


@pytest.mark.parametrize("value", ["NaN", "-1.0", "0", "null", '"fast"'])
def test_impossible_speeds_are_measured_anew(store, value):
    quick([FORWARD], store)
    document = json.loads((store.root / FILE).read_text())
    document["measured"][0]["ms_per_image"] = "here"
    (store.root / FILE).write_text(json.dumps(document).replace('"here"', value))
    assert quick([FORWARD], store).ms_per_image(FORWARD) > 0.0


def test_a_file_that_cannot_be_read_or_written_is_no_error(store):
    (store.root / FILE).mkdir()
    assert quick([FORWARD], store).ms_per_image(FORWARD) > 0.0


def test_a_network_that_cannot_be_measured_is_said_so(store):
    huge = replace(FORWARD, batch_size=10**13)  # images that no memory holds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "CPU_STEP_MACS", 1e30)
        found = quick([huge, FORWARD], store)
        assert found.ms_per_image(huge) is None
        assert "memory" in found.failed[huge] or "alloc" in found.failed[huge]
        assert found.ms_per_image(FORWARD) > 0.0


def test_what_there_is_no_time_for_is_estimated(store, monkeypatch):
    wide = replace(FORWARD, model="resnet8_half")
    quick([FORWARD], store)
    monkeypatch.setattr(calibration, "BUDGET_S", -1.0)
    found = quick([FORWARD, wide], store)
    assert list(found.estimated) == [wide]
    rate = found.ms_per_image(FORWARD) / FORWARD.macs
    assert found.ms_per_image(wide) == pytest.approx(rate * wide.macs)
    monkeypatch.undo()
    assert quick([FORWARD, wide], store).estimated == {}


@pytest.mark.slow
def test_one_and_two_processes_really_train():
    found = measured_workers(TRAIN, "cpu", "resnet8_half", candidates=(1, 2), trial_s=0.2)
    assert found.stopped == ""
    assert set(found.images_per_s) == {1, 2}
    assert all(speed > 0.0 for speed in found.images_per_s.values())
    assert found.workers in (1, 2)
    assert found.speedup >= 1.0


def test_processes_that_cannot_train_leave_one():
    huge = replace(TRAIN, batch_size=10**13)
    found = measured_workers(huge, "cpu", candidates=(1, 2), trial_s=0.1)
    assert (found.workers, found.speedup) == (1, 1.0)
    assert found.stopped


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ({1: 100.0}, 1),
        ({1: 100.0, 2: 104.0}, 1),
        ({1: 100.0, 2: 190.0, 4: 195.0}, 2),
        ({1: 100.0, 2: 190.0, 4: 300.0, 8: 200.0}, 4),
    ],
)
def test_ties_go_to_fewer(speeds, best):
    assert _best(speeds) == best
    assert WorkerTrial(best, speeds).speedup == speeds[best] / 100.0
