"""Benchmarks of our own step: what is counted, percentages, which ones there are; small real loops."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import all as run_everything
from benchmarks import expected, registry
from benchmarks.cost_group import CostGroup, Extra, cost_table, costs
from benchmarks.counts import (
    Floor,
    Kernel,
    Layer,
    Peaks,
    backward,
    descend,
    floor_of,
    forward,
    layers_of,
    step_kernels,
)
from benchmarks.floor_group import FloorGroup, floor_table
from benchmarks.interleave import Clock, Rounds, Sample
from benchmarks.record import Group, document, group_table, table
from benchmarks.reference_cost import bounds
from smskd.cost import model_cost
from smskd.errors import ConfigError
from smskd.models import build_model
from smskd.precision import why_not


class Tiny(nn.Module):
    """A convolution 3>4 on 5x5, a depthwise one, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, stride=2, groups=4, bias=False)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.depthwise(self.norm(self.conv(x)).relu()).mean((2, 3)))


BY_HAND = [
    Layer(inputs=75, outputs=100, weights=108, macs=100 * 27),
    Layer(inputs=100, outputs=16, weights=36, macs=16 * 9),
    Layer(inputs=4, outputs=2, weights=10, macs=8),
]
IMAGE = torch.zeros(1, 3, 5, 5)


def test_layers_are_counted_as_by_hand():
    model = Tiny()
    assert layers_of(model, IMAGE) == BY_HAND
    assert model.training
    assert not model.norm.num_batches_tracked


@pytest.mark.parametrize("name", ["resnet8", "MobileNetV2", "ShuffleV1"])
def test_multiply_accumulates_are_those_of_the_cost_report(name):
    model = build_model(name, 100)
    total = sum(layer.macs for layer in layers_of(model, torch.zeros(1, 3, 32, 32)))
    assert total == model_cost(model, (3, 32, 32)).macs


def test_kernels_are_counted_as_by_hand():
    ahead = forward(BY_HAND, batch_size=10, width=2)
    assert ahead[0] == Kernel(27000, 2 * (10 * 175 + 108))
    back = backward(BY_HAND, batch_size=10, width=2)
    # No gradient of the images; gradients of weights are float32.
    assert back[:2] == ahead[1:]
    assert back[2] == Kernel(27000, 2 * 10 * 175 + 4 * 108)
    assert len(back) == 5
    assert descend(100) == Kernel(0, 100 * 4 * 5)


def test_a_step_is_three_passes_of_the_student_less_one_and_one_of_a_live_teacher():
    one_pass = sum(layer.macs for layer in BY_HAND)
    looked_up = step_kernels(Tiny(), None, IMAGE, 10, "fp32")
    assert sum(k.macs for k in looked_up) == 10 * (3 * one_pass - BY_HAND[0].macs)
    live = step_kernels(Tiny(), Tiny(), IMAGE, 10, "fp32")
    assert sum(k.macs for k in live) == 10 * (4 * one_pass - BY_HAND[0].macs)
    assert looked_up[-1] == descend(108 + 8 + 36 + 10)
    narrow = step_kernels(Tiny(), None, IMAGE, 10, "bf16")
    assert narrow[0].bytes * 2 == looked_up[0].bytes


def test_each_kernel_is_bound_by_arithmetic_or_by_memory():
    kernels = [Kernel(100, 10), Kernel(10, 100)]
    assert floor_of(kernels, Peaks(10.0, 20.0)) == Floor(110, 110, 15.0, 10.0)


def samples(*seconds):
    return [Sample(10, s, s) for s in seconds]


def test_costs_are_taken_within_rounds():
    # The machine is three times slower in round 2; the cost does not notice.
    assert costs(samples(1.1, 3.3), samples(1.0, 3.0)) == pytest.approx([10.0, 10.0])
    assert costs(samples(0.5), samples(1.0)) == pytest.approx([-50.0])


@pytest.mark.parametrize(("at_most", "met"), [(11.0, "met"), (9.0, "not met"), (None, "")])
def test_a_cost_is_met_if_it_is_small(at_most, met):
    timed = {"without": samples(1.0, 1.0, 1.0), "with": samples(1.05, 1.1, 1.15)}
    group = CostGroup(
        "a>b", ("without", "with", "absent"),
        {"with": Extra("without", at_most), "absent": Extra("without", 5.0)},
        {"with": 33.3333}, Rounds({}, timed),
    )  # fmt: skip
    made = json.loads(json.dumps(group.document()))
    goal = "-" if at_most is None else f"{at_most:g}"
    text = cost_table(made)
    assert f"| with | 9 | 10.0 (7.5-12.5) | 33.3 | {goal} | {met} |" in text
    assert "| without | 10 | - | - | - |  |" in text
    assert "| absent | not measured | - | - | 5 | it was not run |" in text
    assert text == group_table(made)


def test_a_floor_is_set_beside_the_step():
    rounds = Rounds({}, {"fp32 live": samples(0.4, 0.4, 0.8)})
    group = FloorGroup(
        "a>b", ("fp32 live", "other"), 2, {"fp32 live": Floor(3 * 10**9, 10**7, 0.1, 0.08)}, rounds,
        remarks=["Measured peaks: some."],
    )  # fmt: skip
    made = json.loads(json.dumps(group.document()))
    text = floor_table(made)
    assert (
        "| fp32 live | 3.00 | 10 | 100 | 80% | 200.00 (200.00-300.00) | 0.50 (0.38-0.50) |" in text
    )
    assert "| other | not measured | - | - | - | - | - | it was not run |" in text
    assert text.endswith("\n\nMeasured peaks: some.")


def test_the_footer_explains_each_kind_of_table_once():
    groups = [Group("r", (), ()), CostGroup("c", (), {}), FloorGroup("f", ()), Group("s", (), ())]
    text = table(document("ablation", "cpu", groups, {}, ["nothing"]))
    for said in ("Ratio: median", "Cost: median", "Step and fraction"):
        assert text.count(said) == 1


def test_arithmetic_of_the_reference():
    found = bounds(student_macs=10, teacher_macs=170)
    assert found[expected.cost_name("live", expected.TCP)] == pytest.approx(5.0)
    assert found[expected.cost_name("table", expected.CONSTANT)] == pytest.approx(100 / 3)
    assert found[expected.cost_name("table", expected.TCP_TABLE)] == 0.0
    group = expected.cost_group("a>b")
    assert set(found) == set(group.extras) < set(group.expected)
    assert {extra.over for extra in group.extras.values()} | set(found) == set(group.expected)


def test_the_weighting_is_compared_with_constant_weights():
    from benchmarks.reference_cost import weighting_costs

    times = {expected.CONSTANT: 1.0, expected.TCP: 1.25}
    timed = {
        expected.cost_name(source, kind): samples(*[t] * 3)
        for source in expected.SOURCES
        for kind, t in times.items()
    }
    found = weighting_costs(Rounds({}, timed))
    assert {source: cost.median for source, cost in found.items()} == {"live": 25.0, "table": 25.0}


def test_tables_of_one_result_have_titles_of_their_own():
    for _, _, groups in expected.expected_tables():
        titles = [group.title for group in groups]
        assert len(titles) == len(set(titles))
        assert all(len(g.expected) == len(set(g.expected)) for g in groups)


def test_every_registered_benchmark_is_a_command_with_tables():
    from importlib import import_module

    names = [entry.name for entry in registry.BENCHMARKS]
    assert {name for name, *_ in expected.expected_tables()} <= set(names)
    for entry in registry.BENCHMARKS:
        options = {o for p in import_module(f"benchmarks.{entry.name}").main.params for o in p.opts}
        assert {"--device", "--output"} <= options
        assert "--seconds" in options or not entry.setup_s  # those run by themselves
        assert {w for words in entry.options.values() for w in words if w[:2] == "--"} <= options
        assert entry.reads_images == ("--data-root" in options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_fills_the_time(device, monkeypatch):
    planned = registry.plan(device, 8)
    assert sum(p.total_s for p in planned) == pytest.approx(480)
    assert all(p.seconds > registry.LEAST_S for p in planned)
    assert all(p.seconds == registry.LEAST_S for p in registry.plan(device, 0.1))
    slow = registry.Entry("slow", 1.0, {"cpu": 1.0, "cuda": 1.0}, in_gpu_run=False)
    monkeypatch.setattr(registry, "BENCHMARKS", (*registry.BENCHMARKS, slow))
    names = [p.entry.name for p in registry.plan(device, 8)]
    assert ("slow" in names) == (device == "cpu")


def test_command_lines_name_device_time_and_folders(tmp_path):
    entry = registry.Entry("floor", 1.0, {"cuda": 1.0}, {"cuda": ("--no-compile",)})
    line = run_everything.words(registry.Planned(entry, 12.3, 13.3), "cuda", tmp_path, None)
    assert line == [
        *["floor", "--device", "cuda", "--seconds", "12", "--no-compile"],
        *["--data-root", str(tmp_path.resolve())],
    ]


def test_one_that_fails_or_hangs_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "breaks.py").write_text("raise SystemExit(3)")
    (package / "hangs.py").write_text("import time; time.sleep(60)")
    (package / "works.py").write_text("open('done', 'w').close()")
    monkeypatch.setattr(run_everything, "ROOT", tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    names = ("breaks", "hangs", "works")
    entries = [registry.Entry(name, 1.0, {}) for name in names]
    limits = {"hangs": 0.5}
    planned = [registry.Planned(e, 1.0, limits.get(e.name, 60.0)) for e in entries]
    failed = run_everything.run_all(planned, [[name] for name in names], minutes=1)
    assert failed == {"breaks": "exit status 3", "hangs": "it was ended after 1 s"}
    assert (tmp_path / "done").exists()
    assert set(run_everything.run_all(planned, [[n] for n in names], 0.0)) == set(names)


def test_all_ends_with_an_error_if_one_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(run_everything, "run_all", lambda *_: {"floor": "exit status 1"})
    done = CliRunner().invoke(run_everything.main, ["--output", str(tmp_path)])
    assert done.exit_code == 1
    assert "failed: floor: exit status 1" in done.output
    assert f"{len(registry.plan('cpu', 8)) - 1} of" in done.output


def test_help_loads_no_torch():
    import subprocess

    code = (
        "import sys; from benchmarks import ablation, all, floor, reference_cost; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=run_everything.ROOT).returncode == 0


def tiny_images():
    from benchmarks.images import TrainImages

    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return TrainImages(images, torch.arange(300) % 100, "random uint8")


@pytest.fixture
def bench():
    from benchmarks.bench_pair import BenchPair
    from benchmarks.pair import Pair

    pair = Pair.parse("resnet14>resnet8_half")
    with BenchPair(pair, tiny_images(), 16, torch.device("cpu")) as made:
        yield made


def test_each_switch_changes_one_thing_and_not_the_work(bench):
    from dataclasses import fields

    from benchmarks.ablation import switches
    from benchmarks.same_work import check_same_work

    ways = switches(bench.teacher_table(64), bench.device)
    for device in ("cpu", "cuda"):
        assert set(expected.techniques_group("a>b", device).expected) <= set(ways)
    off = ways[expected.ALL_OFF]
    for name in (*expected.SWITCHES, expected.TF32):
        changed = {
            f.name for f in fields(off) if getattr(off, f.name) != getattr(ways[name], f.name)
        }
        assert len(changed - {"title"}) == 1, name
    here = [way for way in ways.values() if why_not(way.precision, bench.device) is None]
    eager = [way for way in here if not way.compiled]
    loops = [bench.loop(way) for way in eager]
    batch = bench.plain_batch()
    check_same_work(loops, batch.images, batch.labels, batch.index)
    seen = {}
    for loop in loops:
        loop.student.register_forward_pre_hook(lambda _, x, n=loop.name: seen.update({n: x[0]}))
        assert loop.train(2) == 32
    assert seen[expected.ALL_OFF].is_contiguous()
    assert loops[0].student.conv1.weight.is_contiguous()
    assert seen["channels last"].is_contiguous(memory_format=torch.channels_last)
    assert not seen["channels last"].is_contiguous()


def test_stages_with_the_same_reference_do_the_same_live_or_looked_up(bench):
    from benchmarks.reference_cost import check_kinds, kinds

    loops = [bench.loop(options) for options in kinds(bench, 64, "fp32")]
    assert [loop.name for loop in loops] == list(expected.cost_group("a>b").expected)
    found = check_kinds(loops, bench.plain_batch())
    losses = {name: difference["loss"] for name, difference in found.items()}
    live = {k: losses[expected.cost_name("live", k)] for k in ("no reference", expected.CONSTANT)}
    assert live[expected.CONSTANT] > live["no reference"]
    assert all(loop.train(1) == 16 for loop in loops)


def test_folded_seeds_train_each_its_own_student(bench):
    from benchmarks.folded_loop import FoldedLoop
    from benchmarks.ours import Options

    teacher = bench.networks.teacher()
    loops = [bench.loop(Options(), seed, teacher) for seed in range(2)]
    folded = FoldedLoop(loops)
    assert not torch.equal(loops[0].student.conv1.weight, loops[1].student.conv1.weight)
    assert (loops[0].batches.views(1) != loops[1].batches.views(1)).any()
    assert folded.train(3) == 3 * 2 * 16
    folded.close()


@pytest.mark.slow
def test_processes_train_turn_after_turn(monkeypatch):
    from contextlib import ExitStack

    from benchmarks import crew_turns
    from benchmarks.interleave import interleave
    from benchmarks.pair import Pair

    monkeypatch.setattr(crew_turns, "TURN_S", 0.1)
    monkeypatch.setattr(crew_turns, "WORKERS", (2,))
    with ExitStack() as stack:
        pair = Pair.parse("resnet14>resnet8_quarter")
        turns, missing = crew_turns.crew_turns(pair, 8, "cpu", 1, stack)
        rounds = interleave(turns, 2, 0.0, warmup_rounds=0, clock=Clock())
    assert not missing
    assert set(rounds.timed) == {expected.ONE_WORKER, "2 processes"}
    assert all(sample.images > 0 for found in rounds.timed.values() for sample in found)


def test_an_unknown_pair_is_refused():
    from benchmarks.pair import known_pair

    with pytest.raises(ConfigError, match="unknown model 'none'"):
        known_pair("resnet14>none")


def test_floor_command_measures_and_writes(tmp_path, monkeypatch):
    from benchmarks import floor, images, peaks

    monkeypatch.setattr(images, "_random_images", tiny_images)
    monkeypatch.setattr(peaks, "SIDE", {"cpu": 64})
    monkeypatch.setattr(peaks, "COPIED_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(peaks, "FOR_S", 0.0)
    words = ["--pair", "resnet14>resnet8_quarter", "--batch-size", "16", "--rounds", "3"]
    words += ["--seconds", "1", "--output", str(tmp_path)]
    done = CliRunner().invoke(floor.main, words, catch_exceptions=False)
    assert done.exit_code == 0
    (group,) = json.loads(Path(tmp_path, "floor-cpu.json").read_text())["groups"]
    done_rows = {row["name"]: row for row in group["rows"] if "not_measured" not in row}
    assert {"fp32 live", "fp32 table"} <= set(done_rows)
    assert done_rows["fp32 live"]["macs"] > done_rows["fp32 table"]["macs"]
    assert "Measured peaks" in done.output
