"""The learning benchmark: paired statistics with hand values, every way of training, really small."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import learning
from benchmarks.conventional import ConventionalLoop
from benchmarks.expected_sheets import (
    COMPILED,
    CONVENTIONAL,
    FOLDED,
    LEARNING_MODES,
    LIVE,
    TABLE,
    learning_sheet,
)
from benchmarks.learning_report import filled_sheet
from benchmarks.paired import MAX_SEEDS, T_975, paired
from benchmarks.record import document, table
from smskd.errors import ConfigError, RefusedError


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_paired_statistics_by_hand():
    found = paired([11.0, 12.0, 13.0, 14.0], [10.0, 10.0, 10.0, 10.0])
    assert (found.n, found.mean, found.differences) == (4, 2.5, (1.0, 2.0, 3.0, 4.0))
    assert found.error == pytest.approx((5 / 3) ** 0.5 / 2)
    assert found.low == pytest.approx(2.5 - 3.182 * 0.6454972)
    assert found.high == pytest.approx(2.5 + 3.182 * 0.6454972)
    assert found.verdict == "higher"


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([1.0, 2.0, 1.5], "higher"),
        ([-1.0, -2.0, -1.5], "lower"),
        ([1.0, -1.0, 0.5], "no difference seen"),
        ([0.0, 0.0, 0.0], "no difference seen"),
        ([0.5, 0.5], "higher"),
        ([0.5], "one seed: no interval"),
    ],
)
def test_verdict_is_whether_the_interval_excludes_zero(ours, verdict):
    assert paired(ours, [0.0] * len(ours)).verdict == verdict


def test_one_seed_has_no_interval_and_too_many_are_refused():
    found = paired([2.0], [1.0])
    assert (found.mean, found.error, found.low, found.high) == (1.0, None, None, None)
    assert paired([1.0] * MAX_SEEDS, [0.0] * MAX_SEEDS).n == 31
    for n in (0, MAX_SEEDS + 1):
        with pytest.raises(ConfigError, match="cannot be compared"):
            paired([1.0] * n, [0.0] * n)


def test_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    assert [round(float(stats.t.ppf(0.975, n)), 3) for n in range(1, 31)] == list(T_975)
    ours, theirs = [28.1, 27.4, 29.9, 28.8, 27.7], [27.9, 27.9, 29.0, 28.1, 27.9]
    found = paired(ours, theirs)
    said = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((said.low, said.high), abs=1e-3)


def lessons(**top1):
    def one(accuracy):
        return {
            "top1": accuracy, "initial": "a", "trained": "b", "seconds": 1.0,
            "seconds_compare": False, "seeds_at_once": [0], "code": {"revision": "c" * 40},
        }  # fmt: skip

    return {name: dict(enumerate(map(one, values))) for name, values in top1.items()}


def test_table_holds_differences_and_what_was_not_trained():
    learnt = lessons(conventional=[20.0, 21.0, 22.0], ours=[20.5, 21.5, 22.5])
    sheet = learning_sheet("a>b", ("conventional", "ours", "absent"))
    made = filled_sheet(sheet, learnt, (0, 1, 2), {"absent": "no such processor"})
    text = table(document("learning", "cpu", [made], {"seeds": 3}, (), "How to read it."))
    assert "| conventional | 21.00 | 3 | - | - | - | - |" in text
    assert "| ours | 21.50 | 3 | +0.50 (+0.50 to +0.50) | higher | - | - |" in text
    assert "| absent | not measured | - | - | - | - | no such processor |" in text
    assert "How to read it. Settings: seeds 3." in text
    assert "Not in the times" not in text
    (row,) = [r for r in made.document()["rows"] if r["name"] == "ours"]
    assert row["top1"] == {"0": 20.5, "1": 21.5, "2": 22.5}
    assert row["against"]["conventional"]["differences"] == (0.5, 0.5, 0.5)


@pytest.fixture
def few_images(monkeypatch):
    from benchmarks import images

    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8, generator=generator)
    made = images.TrainImages(pixels, torch.arange(300) % 100, "random uint8")
    monkeypatch.setattr(images, "_random_images", lambda: made)


def tiny(**changes):
    from benchmarks.learning_setting import Setting

    given = {
        "pair": "resnet14_half>resnet8_quarter", "data_root": None, "train_size": 100,
        "test_size": 50, "epochs": 2, "teacher_epochs": 1, "batch_size": 64, "device": "cpu",
        "threads": 1,
    }  # fmt: skip
    return Setting(**(given | changes))


def school(folder, setting=None, jobs=1):
    from benchmarks.learning_runs import School

    said = []
    return School(setting or tiny(), folder, jobs, said.append), said


def test_what_is_done_is_not_done_again(few_images, tmp_path):
    first, _ = school(tmp_path)
    learnt = first.learn((LIVE, FOLDED), (0, 1))
    again, said = school(tmp_path)
    assert again.learn((LIVE, FOLDED), (0, 1)) == learnt
    assert len(said) == 1  # about the teacher
    more, said = school(tmp_path)
    assert more.learn((LIVE, FOLDED), (0, 1, 2))[LIVE].keys() == {0, 1, 2}
    trained = [line.split(":")[0] for line in said[1:]]  # the longest first
    assert trained == [f"{FOLDED}, seed 0, 1, 2", f"{LIVE}, seed 2"]
    assert {one["initial"] for one in learnt[LIVE].values()} == {
        one["initial"] for one in learnt[FOLDED].values()
    }


def test_another_setting_is_kept_apart(few_images, tmp_path):
    school(tmp_path)[0].learn((LIVE,), (0,))
    _, said = other = school(tmp_path, tiny(epochs=1))
    other[0].learn((LIVE,), (0,))
    assert len(said) == 2


def test_our_way_is_the_librarys_to_the_bit(few_images, tmp_path):
    from benchmarks.learning_runs import School, _teacher
    from benchmarks.learning_setting import images_of, state_sha256
    from smskd import Stage, distill
    from smskd.methods import METHODS

    setting = tiny()
    made = School(setting, tmp_path, 1, lambda text: None)
    (learnt,) = made.learn((LIVE,), (3,))[LIVE].values()
    from smskd_bench.worker import to_device

    student = to_device(setting.student(3), "cpu")
    teacher = to_device(_teacher(setting, made.folder), "cpu")
    assert state_sha256(student) == learnt["initial"]
    images = images_of(setting)
    stages = [Stage(METHODS["kd"](), epochs=2)]
    torch.set_num_threads(1)
    (report,) = distill(
        student, teacher, stages, images.resident(setting, 3), test=images.test, seed=3
    )
    assert state_sha256(student) == learnt["trained"]
    assert report.test.top1 == learnt["top1"]


def test_conventional_way_takes_every_epoch_at_our_rate(few_images, monkeypatch, tmp_path):
    pytest.importorskip("PIL", reason="torchvision is not installed")
    from benchmarks.learning_modes import Lesson, teach
    from benchmarks.learning_setting import images_of
    from smskd.settings import Schedule

    setting = tiny(epochs=8)
    rates, sizes = [], []

    def step(self, images, labels):
        rates.append(self.optimizer.param_groups[0]["lr"])
        sizes.append(len(labels))
        return 0.0

    monkeypatch.setattr(ConventionalLoop, "step", step)
    net = setting.student(0)
    teach(CONVENTIONAL, Lesson(setting, images_of(setting), net, [net], [0], tmp_path))
    assert sizes == [64, 36] * 8
    assert rates == [0.05 * Schedule().factor(e, 8) for e in range(1, 9) for _ in range(2)]


def test_other_initial_weights_are_refused():
    from benchmarks.learning_runs import check_same_start

    learnt = lessons(a=[1.0, 2.0], b=[1.0, 2.0])
    check_same_start(learnt)
    learnt["b"][1]["initial"] = "other"
    with pytest.raises(RefusedError, match="seed 1 did not begin"):
        check_same_start(learnt)


def test_folded_seeds_know_their_company(tmp_path):
    from benchmarks.learning_runs import Task, _file

    names = {
        _file(tmp_path, Task(FOLDED, (0, 1)), 0).name,
        _file(tmp_path, Task(FOLDED, (0, 2)), 0).name,
        _file(tmp_path, Task(LIVE, (0,)), 0).name,
    }
    assert len(names) == 3


def test_identity_is_of_everything_but_the_folder():
    setting = tiny(data_root=Path("a"))
    assert setting.identity == dataclasses.replace(setting, data_root=Path("b")).identity
    for change in ({"epochs": 3}, {"train_size": 200}, {"threads": 2}, {"data_root": None}):
        assert dataclasses.replace(setting, **change).identity != setting.identity


@pytest.mark.slow
def test_smoke_run_trains_every_way(few_images, tmp_path):
    pytest.importorskip("PIL", reason="torchvision is not installed")
    words = ["--smoke", "--seeds", "0,1", "--output", str(tmp_path)]
    done = CliRunner().invoke(learning.main, words, catch_exceptions=False)
    assert done.exit_code == 0
    made = json.loads((tmp_path / "learning-cpu.json").read_text())
    (group,) = made["groups"]
    rows = {row["name"]: row for row in group["rows"]}
    assert tuple(rows) == LEARNING_MODES["cpu"]
    measured = [row for row in rows.values() if "not_measured" not in row]
    assert {CONVENTIONAL, LIVE, TABLE, FOLDED} <= {row["name"] for row in measured}
    assert len({json.dumps(row["initial_sha256"]) for row in measured}) == 1
    # Different arithmetic, so different bits; the conventional loop sees other crops too.
    assert len({row["trained_sha256"]["0"] for row in measured}) == len(measured)
    assert made["settings"]["images"] == "random uint8"
    assert COMPILED not in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--smoke"], "add --output"), ([], "add --data-root")],
)
def test_what_makes_no_sense_is_refused(words, said):
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(learning.main, words, catch_exceptions=False)
    assert said in caught.value.hint


@pytest.mark.parametrize("seeds", ["a", "1,1", "-1", ",".join(map(str, range(32)))])
def test_bad_seeds_are_refused(seeds):
    done = CliRunner().invoke(learning.main, ["--seeds", seeds])
    assert done.exit_code == 2
