"""Tables and pictures of students on devices: the right numbers in the right places."""

import numpy as np
import pytest
from device_results import KEY, make_manifest, make_measurement, make_row, true_classes
from rich.console import Console
from smskd_bench.measurements import (
    device_name,
    found,
    latest,
    measurement_folder,
    new_folder,
)
from smskd_bench.report.devices import flag_lines, markdown, table
from smskd_bench.report.exported import exported_numbers
from smskd_bench.report.picture import Point, draw, mark_front, short_names
from smskd_export.judging import judge, write_judged

from smskd.errors import ConfigError, StoreError

STEADY = np.full(2000, 1_000_000) + np.arange(2000) % 7


def measured(folder, **changes):
    folder.mkdir(parents=True)
    files = {}
    rows = [
        make_row(folder, files, STEADY, energy=True),
        make_row(folder, files, STEADY // 2, "int8", right=179),
        make_row(folder, files, [], "int8", 8, status="gate_failed"),
    ]
    result = make_measurement(folder, rows, files, **changes)
    device = changes.get("device", device_name(None))
    judged = judge(make_manifest(), result, folder, device, true_classes(), true_classes())
    write_judged(folder, judged)
    return judged


def printed(renderable):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


def test_a_row_shows_accuracy_beside_speed(tmp_path):
    judged = measured(tmp_path / "m")
    text = printed(table(judged))
    line = next(line for line in text.splitlines() if "fp32 b1" in line)
    for cell in ("90.00", "-10.00 [", "1.000", "1,000", "2.5", "1.50"):
        assert cell in line
    assert "gate failed" in text
    assert "int8 b8: agreement 80 % (limit 90 %)" in text
    assert "not measured" not in text
    lines = markdown([judged]).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_doubts_are_said_once_for_all_their_rows(tmp_path):
    judged = measured(tmp_path / "m", protocol="quick")
    assert flag_lines(judged.rows) == [
        "quick (all rows): the protocol was shortened; measure without --quick before comparing"
    ]


def test_the_newest_measurement_of_this_bundle_and_device_counts(tmp_path):
    parent = measurement_folder(tmp_path, KEY, "cpu-1")
    first = new_folder(parent, None)
    measured(first)
    second = new_folder(parent, None)
    assert first.name.removesuffix("-1") == second.name.removesuffix("-2")
    newer = measured(second, ended_utc="2026-01-02T00:00:00+00:00")
    measured(new_folder(parent, None), protocol="quick", ended_utc="2026-01-03T00:00:00+00:00")
    (parent / "local-unfinished-9").mkdir()
    assert len(list(found(parent))) == 3
    assert latest(parent, "2" * 64, None, quick=False, threads=1) == newer
    assert latest(parent, "9" * 64, None, quick=False, threads=1) is None
    assert latest(parent, "2" * 64, "user@host", quick=False, threads=1) is None
    assert latest(parent, "2" * 64, None, quick=False, threads=4) is None


def test_hostile_device_names_make_plain_folders(tmp_path):
    names = {new_folder(tmp_path, name).name for name in ("a@b", "a b", "a/../b", "a\nb", None)}
    assert len(names) == 5
    assert not any(c in name for name in names for c in "/ \n@")


def test_exports_of_a_leaderboard(tmp_path):
    (tmp_path / "exports" / KEY / "cpu-1").mkdir(parents=True)
    (tmp_path / "exports" / KEY / "cpu-1" / "report.json").write_text("{}")  # not read: measured
    measured(new_folder(measurement_folder(tmp_path, KEY, "cpu-1"), None))
    numbers = exported_numbers(tmp_path, [KEY, "other"])
    assert [(e.label, e.status) for e in numbers] == [
        ("fp32 b1", "ok"),
        ("int8 b1", "ok"),
        ("int8 b8", "gate_failed"),
    ]
    assert (numbers[0].p50_ms, numbers[0].gross_mj) == (pytest.approx(1.000003), 2.5)
    assert numbers[1].p50_ms == pytest.approx(0.5, abs=1e-3)


def test_the_front_is_what_nobody_beats():
    where = [
        ("a", 1.0, 50.0),
        ("a", 2.0, 60.0),
        ("a", 2.0, 59.0),
        ("a", 3.0, 60.0),
        ("b", 9.0, 1.0),
    ]
    marked = mark_front([Point(w, f"{x}/{y}", x, y) for w, x, y in where])
    assert [p.front for p in marked] == [True, True, False, False, True]
    twins = mark_front([Point("a", "x", 1.0, 50.0), Point("a", "y", 1.0, 50.0)])
    assert all(p.front for p in twins)


def test_points_are_named_by_what_tells_them_apart():
    def names(*labels):
        return list(short_names([Point("w", label, 1.0, 1.0) for label in labels]).values())

    assert names("a>b / kd / fp32 b1", "a>c / kd / fp32 b1") == ["b", "c"]
    assert names("a>b / kd / fp32 b1", "a>b / dkd / int8 b1") == ["kd fp32 b1", "dkd int8 b1"]
    assert names("a>b / kd / fp32 b1") == ["fp32 b1"]


@pytest.mark.parametrize("ending", [".png", ".svg", ".html"])
def test_pictures_are_drawn_and_need_no_network(tmp_path, ending):
    where, labels = "cpu on <b>", ["a>b / kd / fp32 b1", "a>b / $x$ / fp32 b1"]
    some = mark_front([Point(where, labels[0], 1.0, 50.0), Point(where, labels[1], 2.0, 40.0)])
    path = tmp_path / "sub" / f"pareto{ending}"
    draw(some, path, "title <i>")
    data = path.read_bytes()
    if ending == ".html":
        text = data.decode()
        assert 'src="http' not in text
        assert "Pareto front" in text
        assert "<i>" not in text.split("Plotly.newPlot", 1)[1]
    draw(some, path, "title <i>")
    assert path.read_bytes() == data


def test_what_cannot_be_drawn_is_said(tmp_path):
    point = [Point("a", "x", 1.0, 50.0)]
    with pytest.raises(ConfigError, match="a picture ends in"):
        draw(point, tmp_path / "a.jpg", "t")
    with pytest.raises(ConfigError, match="no exported student was measured"):
        draw([], tmp_path / "a.png", "t")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        draw(point, tmp_path / "file" / "a.png", "t")
