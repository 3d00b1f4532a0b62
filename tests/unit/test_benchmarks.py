"""The speed benchmarks: statistics with clocks that tell what they are told, real small loops."""

import json
from itertools import repeat
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import report
from benchmarks.conventional import ConventionalLoop, accuracy, kd_loss
from benchmarks.expected import GOALS, OURS, RIVALS, data_group, expected_tables, step_group
from benchmarks.interleave import (
    MIN_ROUNDS,
    Clock,
    Contestant,
    Rounds,
    Sample,
    cpu_ratios,
    cpu_seconds,
    interleave,
    ratios,
    spread,
)
from benchmarks.record import Goal, Group, _public, document, table, write
from smskd.errors import ConfigError, DataError, MissingDataError, RefusedError
from smskd.methods.kd import softened_kl


class FakeTime:
    """A machine on which only contestants take time."""

    def __init__(self):
        self.now = self.busy = 0.0
        self.waits = 0
        self.log = []

    def clock(self):
        return Clock(lambda: self.now, lambda: self.busy, self.wait)

    def wait(self):
        self.waits += 1

    def contestant(self, name, seconds, images=10, cores=2.0):
        times = iter(seconds) if isinstance(seconds, list) else repeat(seconds)

        def work():
            self.log.append(name)
            spent = next(times)
            self.now += spent
            self.busy += cores * spent
            return images

        return Contestant(name, work)


def test_contestants_take_turns_and_warm_up_is_kept_apart():
    fake = FakeTime()
    turns = [fake.contestant("a", [9.0, 1.0, 2.0]), fake.contestant("b", [9.0, 2.0, 1.0])]
    rounds = interleave(turns, rounds=2, budget_s=1e9, clock=fake.clock())
    assert fake.log == ["a", "b"] * 3
    assert rounds.warmup == {"a": [Sample(10, 9.0, 18.0)], "b": [Sample(10, 9.0, 18.0)]}
    assert rounds.timed["a"] == [Sample(10, 1.0, 2.0), Sample(10, 2.0, 4.0)]
    assert rounds.timed["b"] == [Sample(10, 2.0, 4.0), Sample(10, 1.0, 2.0)]
    assert rounds.count == 2


def test_the_device_is_waited_for_at_both_ends_and_hooks_are_not_timed():
    fake = FakeTime()

    def slow():
        fake.now += 100.0
        fake.log.append("hook")

    worker = fake.contestant("a", 1.0)
    turn = Contestant("a", worker.work, before=slow, after=slow)
    rounds = interleave([turn], rounds=1, budget_s=0, warmup_rounds=0, clock=fake.clock())
    assert rounds.timed["a"] == [Sample(10, 1.0, 2.0)]
    assert fake.log == ["hook", "a", "hook"]
    assert fake.waits == 2


@pytest.mark.parametrize(("budget", "done"), [(0.0, MIN_ROUNDS), (5.5, 4), (5.0, 4), (1e9, 7)])
def test_no_round_is_begun_that_would_end_after_the_budget(budget, done):
    fake = FakeTime()
    turns = [fake.contestant("a", 0.5), fake.contestant("b", 0.5)]
    rounds = interleave(turns, rounds=7, budget_s=budget, clock=fake.clock())
    assert rounds.count == done
    assert len(rounds.timed["a"]) == len(rounds.timed["b"])


def test_spread_is_median_and_inclusive_quartiles():
    s = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (s.median, s.low, s.high, s.min, s.max) == (3.0, 2.0, 4.0, 1.0, 5.0)
    assert spread([1.0, 2.0]).median == 1.5
    one = spread([7.0])
    assert (one.low, one.median, one.high) == (7.0, 7.0, 7.0)


def test_ratios_are_taken_within_rounds():
    # The machine is three times slower in round 2; the ratio does not notice.
    ours = [Sample(20, 1.0, 1.0), Sample(20, 3.0, 1.0)]
    theirs = [Sample(10, 1.0, 2.0), Sample(10, 3.0, 2.0)]
    assert ratios(ours, theirs) == pytest.approx([2.0, 2.0])
    assert cpu_ratios(ours, theirs) == pytest.approx([4.0, 4.0])
    with pytest.raises(ValueError, match="zip"):
        ratios(ours, theirs[:1])


def test_processor_time_includes_child_processes_that_still_run():
    from torch.utils.data import DataLoader

    before = cpu_seconds()
    batches = iter(DataLoader(Spin(), batch_size=1, num_workers=1))
    next(batches)
    assert cpu_seconds() - before > 0.15
    spent = cpu_seconds()
    del batches
    assert cpu_seconds() >= spent - 0.01


class Spin(torch.utils.data.Dataset):
    """Keeps a worker's processor busy for a fifth of a second an item."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        import time

        began = time.process_time()
        while time.process_time() - began < 0.2:
            pass
        return index


def measured(goal=None, speeds=((1.0, 4.0), (2.0, 6.0))):
    """A group of a rival and ours with given seconds a round for ten images."""
    timed = {
        name: [Sample(10, 1 / s, 2 / s) for s in per_round]
        for name, per_round in zip(("rival", "ours"), zip(*speeds, strict=True), strict=True)
    }
    goals = {"ours": goal} if goal else {}
    names = ("rival", "ours", "absent")
    rounds = Rounds({}, timed)
    return Group("a>b", names, ("rival",), goals, rounds, {"absent": "nothing to run"})


def rows(group):
    return {row["name"]: row for row in group.document()["rows"]}


def test_a_row_holds_every_sample_and_what_follows_from_it():
    row = rows(measured())["ours"]
    assert row["samples"] == [(10, 0.25, 0.5), (10, 1 / 6, 1 / 3)]
    assert row["images_per_s"]["median"] == pytest.approx(50.0)
    assert row["images_per_cpu_s"]["median"] == pytest.approx(25.0)
    assert row["ratio"]["rival"]["median"] == pytest.approx(3.5)
    assert row["ratio"]["rival"]["max"] == pytest.approx(4.0)
    assert row["met"] is None
    assert rows(measured())["absent"]["not_measured"] == "nothing to run"


@pytest.mark.parametrize(
    ("ratio", "against", "met"),
    [
        (3.5, ("rival",), True),
        (3.6, ("rival",), False),
        (3.5, ("rival", "absent"), True),
        (1.0, ("absent",), None),
    ],
)
def test_a_goal_is_met_by_the_median_against_those_that_were_measured(ratio, against, met):
    assert rows(measured(Goal(ratio, against)))["ours"]["met"] is met


def result(group, name="kd_step", device="cpu"):
    return document(name, device, [group], {"batch": 64}, ["the first round"])


def test_a_result_survives_the_file_and_its_table_says_all(tmp_path):
    made = result(measured(Goal(3.6, ("rival",))))
    path = write(made, tmp_path / "results")
    assert path.name == "kd_step-cpu.json"
    read = json.loads(path.read_text())
    text = table(read)
    assert text == table(made)
    assert "| ours | 50 | 25 | 3.50 (3.25-3.75) | 3.6 | not met |" in text
    assert "| rival | 15 | 8 | 1 | - |  |" in text
    assert "| absent | not measured | - | - | - | nothing to run |" in text
    for said in ("Rounds: 2", "batch 64", "the first round", "torch ", "revision "):
        assert said in text, said
    assert {"machine", "device", "threads", "packages", "code", "date"} <= set(read["environment"])


def test_no_folder_of_this_machine_is_recorded():
    words = ["--data-root", "/home/me", "--output=/home/me", "--pair", "a>b"]
    assert _public(words) == ["--data-root", "DIR", "--output=DIR", "--pair", "a>b"]


def test_report_names_everything_that_was_not_measured():
    text = report.render({})
    assert text == report.render({})
    missing = list(report.missing_rows({}))
    wanted = [
        (benchmark, device, group.title, name)
        for benchmark, device, groups in expected_tables()
        for group in groups
        for name in group.expected
    ]
    assert missing == wanted
    assert text.count("| not measured |") == len(wanted)


def test_report_puts_results_in_their_place_in_any_order():
    steps = result(step_measured("resnet32x4>resnet8x4"))
    other = result(measured(), name="another")
    results = {("kd_step", "cpu"): steps, ("another", "cpu"): other}
    text = report.render(results)
    assert text == report.render(dict(reversed(results.items())))
    assert text.index(table(steps).strip()) < text.index("### `another` on a CPU")
    assert text.count("**resnet32x4>resnet8x4**") == 2  # the other one is the GPU's
    assert text.count("**resnet110>resnet20**") == 2
    left = {row[:3] for row in report.missing_rows(results)}
    assert ("kd_step", "cpu", "resnet32x4>resnet8x4") not in left
    assert ("kd_step", "cuda", "resnet32x4>resnet8x4") in left


def step_measured(pair):
    group = step_group(pair, "cpu")
    timed = {name: [Sample(64, 1.0, 1.0)] * 3 for name in (*RIVALS, *OURS)}
    return Group(pair, group.expected, group.baselines, group.goals, Rounds({}, timed))


def test_report_replaces_only_what_is_between_the_markers():
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.filled(page, "new")
    assert new == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.filled(new, "new") == new
    with pytest.raises(DataError, match="lacks"):
        report.filled("no markers", "new")


def test_report_refuses_a_file_that_is_no_result(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match=r"x\.json is no result file"):
        report.read_results(tmp_path)


def test_the_page_shows_the_results_that_are_here():
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == report.filled(page, report.render(report.read_results(report.RESULTS)))


def test_goals_are_of_contestants_that_exist():
    for device, pairs in GOALS.items():
        for pair in pairs:
            group = step_group(pair, device)
            assert set(group.goals) <= set(group.expected)
    assert set(data_group().goals) <= set(data_group().expected)


def tiny_images(num=300):
    from benchmarks.images import TrainImages

    generator = torch.Generator().manual_seed(1)
    shape = (num, 3, 32, 32)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return TrainImages(images, torch.arange(num) % 100, "random uint8")


def tiny_settings(**changes):
    from benchmarks.kd_step import Settings

    given = {
        "batch_size": 16,
        "workers": 0,
        "feed": "data",
        "steps": 1,
        "rounds": 3,
        "seconds": 0.0,
    }
    return Settings(torch.device("cpu"), **(given | changes))


@pytest.fixture
def contestants():
    pytest.importorskip("PIL", reason="torchvision is not installed")
    from benchmarks.contestants import Contestants
    from benchmarks.pair import Pair

    made = Contestants(Pair.parse("resnet14>resnet8_half"), tiny_images(), tiny_settings())
    yield made
    made.close()


def test_all_contestants_do_the_same_work_and_train(contestants):
    from benchmarks.same_work import check_same_work

    found = check_same_work(contestants.loops, *contestants.plain_batch())
    names = [loop.name for loop in contestants.loops]
    assert set(names) | set(contestants.missing) == {*RIVALS, *OURS}
    assert {"conventional", *OURS} - set(contestants.missing) <= set(found)
    for loop in contestants.loops:
        assert loop.train(2) == 32


def test_other_work_is_refused(contestants):
    from benchmarks.same_work import check_same_work

    ours = next(loop for loop in contestants.loops if loop.name == "ours fp32 live")
    ours.run.optimizer.param_groups[0]["weight_decay"] = 0.0
    with pytest.raises(RefusedError, match="after 2 steps their weight updates differ"):
        check_same_work(contestants.loops, *contestants.plain_batch())


def test_other_weights_are_refused(contestants):
    from benchmarks.same_work import check_same_work

    with torch.no_grad():
        contestants.loops[-1].student.fc.bias[0] += 1e-3
    with pytest.raises(RefusedError, match="start from different weights"):
        check_same_work(contestants.loops, *contestants.plain_batch())


def test_pil_batches_equal_ours_without_augmentation(contestants):
    from torchvision.transforms import functional

    from benchmarks.images import INFO
    from benchmarks.pil_loader import PilImages

    def plain(image):
        return functional.normalize(functional.to_tensor(image), INFO.mean, INFO.std)

    images, labels, index = contestants.plain_batch()
    theirs = PilImages(contestants.data, plain)
    assert torch.equal(torch.stack([theirs[i][0] for i in index.tolist()]), images)
    assert [theirs[i][1] for i in index.tolist()] == labels.tolist()


def test_conventional_loss_is_the_projects_formula():
    student, teacher = torch.randn(2, 8, 10, dtype=torch.float64)
    expected = softened_kl(student, teacher, 4.0).mean()
    torch.testing.assert_close(kd_loss(student, teacher), expected)


def test_accuracy_of_a_batch():
    logits = torch.eye(10)[:4]
    top1, top5 = accuracy(logits, torch.tensor([0, 1, 9, 3]))
    assert (top1.item(), top5.item()) == (75.0, 75.0)


def test_conventional_loop_takes_any_networks():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
    batch = (torch.randn(6, 3, 4, 4), torch.arange(6))
    loop = ConventionalLoop(net, other, torch.device("cpu"), repeat(batch))
    before = net[1].weight.clone()
    assert loop.train(3) == 18
    assert not torch.equal(net[1].weight, before)
    assert loop.losses.count == 18


def test_pairs_are_read_from_text():
    from benchmarks.pair import Pair

    assert str(Pair.parse("a>b")) == "a>b"
    assert "unknown model 'a'" in Pair.parse("a>b").unknown()
    assert Pair.parse("resnet14>resnet8").unknown() is None
    for text in ("a", "a>", ">b"):
        with pytest.raises(ConfigError, match="is no pair"):
            Pair.parse(text)


def test_wrong_data_folder_says_what_to_do(tmp_path):
    from benchmarks.images import load_images

    with pytest.raises(MissingDataError) as caught:
        load_images(tmp_path)
    assert "random images" in caught.value.hint


def test_data_path_command_measures_and_writes(tmp_path, monkeypatch):
    pytest.importorskip("PIL", reason="torchvision is not installed")
    from benchmarks import data_path, images

    monkeypatch.setattr(data_path, "PIL_BATCHES", 2)
    monkeypatch.setattr(data_path, "OUR_BATCHES", 4)
    monkeypatch.setattr(images, "_random_images", tiny_images)
    words = ["--rounds", "3", "--seconds", "1", "--output", str(tmp_path), "--batch-size", "8"]
    done = CliRunner().invoke(data_path.main, words, catch_exceptions=False)
    assert done.exit_code == 0
    made = json.loads(Path(tmp_path, "data_path-cpu.json").read_text())
    assert [row["name"] for row in made["groups"][0]["rows"]] == list(data_group().expected)
    assert all("not_measured" not in row for row in made["groups"][0]["rows"])
    assert "| goal |" in done.output


def test_an_unknown_pair_is_left_out_with_a_message(tmp_path, monkeypatch):
    from benchmarks import images, kd_step

    monkeypatch.setattr(images, "_random_images", tiny_images)
    words = ["--pair", "resnet14>none", "--output", str(tmp_path)]
    done = CliRunner().invoke(kd_step.main, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "unknown model 'none'" in done.output
    assert done.output.count("| not measured |") == len((*RIVALS, *OURS))


def test_batches_in_memory_are_in_each_ones_own_order():
    pytest.importorskip("PIL", reason="torchvision is not installed")
    from benchmarks.contestants import Contestants
    from benchmarks.pair import Pair

    settings = tiny_settings(feed="memory")
    made = Contestants(Pair.parse("resnet14>resnet8_half"), tiny_images(), settings)
    for loop in made.loops:
        seen = []
        loop.student.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        assert loop.train(2) == 32
        ours = loop.name in OURS
        assert all(x.is_contiguous(memory_format=torch.channels_last) == ours for x in seen)
        assert all(x.is_contiguous() != ours for x in seen)
        assert torch.equal(seen[0], seen[1])
    made.close()
