"""What a measurement is worth: each doubt is raised exactly when it should be, and nothing is clipped."""

import dataclasses
import json

import numpy as np
import pytest
from device_results import (
    KEY,
    make_manifest,
    make_measurement,
    make_probe,
    make_row,
    true_classes,
)
from smskd_export.judging import JUDGED, judge, read_judged, write_judged
from smskd_export.measurement import read_measurement

from smskd.errors import StoreError

STEADY = np.full(2000, 1_000_000) + np.arange(2000) % 7


def judged_of(tmp_path, rows=None, *, manifest=None, labels=True, **changes):
    files = {}
    made = rows(tmp_path, files) if rows else [make_row(tmp_path, files, STEADY)]
    found = make_measurement(tmp_path, made, files, **changes)
    classes = true_classes().copy()
    classes[190:] = (classes[190:] + 1) % 10
    return judge(
        manifest or make_manifest(), found, tmp_path, "local", true_classes() if labels else None, classes
    )  # fmt: skip


def codes(judged):
    return [flag.code for flag in judged.rows[0].flags]


def test_a_quiet_measurement_has_no_doubts_and_ranks(tmp_path):
    judged = judged_of(tmp_path)
    (row,) = judged.rows
    assert codes(judged) == []
    assert judged.rankable
    assert judged.key == KEY
    assert (row.host.n, row.host.max_ns) == (2000, 1_000_006)
    assert row.samples_per_s == pytest.approx(1e9 / STEADY.mean())
    assert row.size_mb == 1.5
    assert row.change.difference == pytest.approx(-5.0)  # 180 right against 190
    assert (row.change.gained, row.change.lost) == (0, 10)
    assert row.change.p == pytest.approx(2 * 0.5**10)


def test_an_outlier_is_kept(tmp_path):
    slow = STEADY.copy()
    slow[7] = 50_000_000
    judged = judged_of(tmp_path, lambda folder, files: [make_row(folder, files, slow)])
    assert judged.rows[0].host.max_ns == 50_000_000
    assert "cv_gt_2p5" in codes(judged)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("quick", {"protocol": "quick"}),
        ("emulated", {"before": make_probe(emulated=True)}),
        ("aborted", {"aborted": "95 C"}),
        ("power_mode_waived", {"allowed": ("power_mode",)}),
    ],
)
def test_what_never_ranks(tmp_path, code, changes):
    judged = judged_of(tmp_path, **changes)
    assert codes(judged) == [code]
    assert not judged.rankable


@pytest.mark.parametrize(
    ("code", "before", "after"),
    [
        ("thermal", {}, {"throttle_counts": {"cpu0": 4}}),
        ("busy", {"load_1min": 2.0}, {}),
        ("foreign_process", {}, {"gpu_processes": ("12 game",)}),
        ("power_mode_mismatch", {"power_mode": "15W"}, {"power_mode": "7W"}),
    ],
)
def test_doubts_of_the_machine(tmp_path, code, before, after):
    judged = judged_of(tmp_path, before=make_probe(**before), after=make_probe(**after))
    assert codes(judged) == [code]
    assert judged.rankable
    assert all(flag.remedy for flag in judged.rows[0].flags)


@pytest.mark.parametrize(("khz", "expected"), [(1019, []), (1021, ["clock_drift"])])
def test_clocks_matter_where_they_must_be_locked(tmp_path, khz, expected):
    after = make_probe(clocks_khz={"gpu": khz})
    assert codes(judged_of(tmp_path, after=after)) == []
    manifest = make_manifest("jetson-thor")

    def rows(folder, files):
        return [make_row(folder, files, STEADY)]

    assert codes(judged_of(tmp_path, rows, manifest=manifest, after=after)) == expected


@pytest.mark.parametrize(("enqueue", "expected"), [(790, []), (810, ["enqueue_bound"])])
def test_a_launch_bound_network_is_named(tmp_path, enqueue, expected):
    def rows(folder, files):
        times = {"gpu_ns": np.full(2000, 1000), "enqueue_ns": np.full(2000, enqueue)}
        return [make_row(folder, files, STEADY, **times)]

    judged = judged_of(tmp_path, rows)
    assert codes(judged) == expected
    assert judged.rows[0].gpu.p50_ns == 1000


@pytest.mark.parametrize(("timer", "expected"), [(9_000, []), (11_000, ["timer"])])
def test_a_clock_that_costs_too_much(tmp_path, timer, expected):
    judged = judged_of(tmp_path, lambda f, files: [make_row(f, files, STEADY, timer=timer)])
    assert codes(judged) == expected


def test_too_few_samples_and_no_test_set(tmp_path):
    def rows(folder, files):
        row = make_row(folder, files, STEADY[:600])
        return [dataclasses.replace(row, accuracy=None)]

    judged = judged_of(tmp_path, rows, labels=False)
    assert codes(judged) == ["too_few_samples", "no_accuracy"]
    assert judged.rows[0].host.p99_bound_ns is None
    assert judged.rows[0].change is None


def test_a_failed_gate_has_no_times(tmp_path):
    judged = judged_of(
        tmp_path, lambda folder, files: [make_row(folder, files, [], "int8", status="gate_failed")]
    )
    (row,) = judged.rows
    assert (row.status, row.host, row.flags) == ("gate_failed", None, ())
    assert "limit 90 %" in row.reason


def test_the_verdict_is_read_back_as_it_was(tmp_path):
    judged = judged_of(tmp_path)
    assert read_judged(tmp_path) is None
    write_judged(tmp_path, judged)
    assert read_judged(tmp_path) == judged
    record = json.loads((tmp_path / JUDGED).read_text())
    (tmp_path / JUDGED).write_text(json.dumps({**record, "schema": 99}))
    with pytest.raises(StoreError, match="has schema 99"):
        read_judged(tmp_path)
    for text in ("", "[]", "{}", "[" * 100_000):
        (tmp_path / JUDGED).write_text(text)
        with pytest.raises(StoreError, match="is damaged"):
            read_judged(tmp_path)


def test_changed_samples_and_strange_rows_are_refused(tmp_path):
    judged_of(tmp_path)
    assert read_measurement(tmp_path).rows[0].id == "fp32-b1"
    name = "fp32-b1-host_ns.npy"
    np.save(tmp_path / name, STEADY - 1)
    with pytest.raises(StoreError, match="not the file that was measured"):
        read_measurement(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(StoreError, match="is missing"):
        read_measurement(tmp_path)
    with pytest.raises(StoreError, match="knows nothing of"):
        judged_of(tmp_path, lambda folder, files: [make_row(folder, files, STEADY, "fp8")])


def test_a_file_name_from_a_device_is_not_followed(tmp_path):
    judged_of(tmp_path)
    record = json.loads((tmp_path / "result.json").read_text())
    record["files"] = {"../secret": "0"}
    (tmp_path / "result.json").write_text(json.dumps(record))
    with pytest.raises(StoreError, match="no plain file name"):
        read_measurement(tmp_path)


def test_a_file_that_is_none_of_the_measurement_is_not_read(tmp_path):
    judged_of(tmp_path)
    record = json.loads((tmp_path / "result.json").read_text())
    record["rows"][0]["samples"]["host_file"] = "../secret.npy"
    (tmp_path / "result.json").write_text(json.dumps(record))
    with pytest.raises(StoreError, match="none of its files"):
        read_measurement(tmp_path)
