"""distill(): what a stage starts from, what holds it, what it reports, and what it refuses."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hardware import EVERY_PRECISION, needs_bf16
from tiny import TAPS, Silent, same_state, snapshot, tiny_data, tiny_net, trained_teacher
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import smskd.stages as stages_module
from smskd import FixedSet, Normalisation, ResidentBatches
from smskd.errors import ConfigError, DataError, DivergedError, IncompatibleError
from smskd.evaluate import agreement, evaluate
from smskd.methods import METHODS, Method
from smskd.methods.fitnet import FitNet
from smskd.methods.kd import KD
from smskd.methods.scratch import Scratch
from smskd.settings import LATER_STAGES, Optimizer, Reference, Schedule, Weighting
from smskd.stages import BestOnDev, Network, Stage, distill, prepare
from smskd.taps import Taps

HINT = FitNet(hint_layer=1, weight=1.0)
CONSTANT = Reference(weighting=Weighting("constant"))
FLAT = Schedule(kind="constant")
WILD = Schedule(milestones=(5 / 6,), gamma=100.0)
"""Of 6 epochs, the last at a rate that undoes what was learned."""
TEST = tiny_data(40, seed=1)
DEV = tiny_data(24, seed=2)


def run(stages, student=None, teacher="trained", data=None, **options):
    """distill() on tiny networks; returns (student, reports, runs as on_epoch saw them)."""
    student = student if student is not None else tiny_net()
    teacher = trained_teacher() if teacher == "trained" else teacher
    taps = {"student_taps": TAPS, "teacher_taps": TAPS, "batch_size": 16}
    seen = []
    options.setdefault("on_epoch", seen.append)
    reports = distill(student, teacher, stages, data or tiny_data(), **(taps | options))
    return student, reports, seen


def state_after(*stages, **options):
    return snapshot(run(stages, **options)[0])


# ---------------------------------------------------------------------------- what a stage starts from


def says_the_same(anchor, state):
    """Whether the reference is the network with these weights, but for rounding."""
    images = tiny_data(20)[0]
    model = tiny_net()
    model.load_state_dict(state)
    with torch.no_grad():
        expected = model.eval()(images)
        ours = anchor.network.network(images).logits
    return torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_stage_2_starts_where_stage_1_ended():
    end_of_first = state_after(Stage(KD(), 2))
    still = Optimizer(lr=0.0, weight_decay=0.0)
    student = tiny_net()
    student.load_state_dict(end_of_first)
    starts = []
    run(
        [Stage(KD(), 2), Stage(HINT, 1)],
        on_epoch=lambda r: starts.append((r.anchor, snapshot(r.student.model))),
    )
    anchors = [anchor for anchor, _ in starts]
    assert anchors[:2] == [None, None]
    assert says_the_same(anchors[2], end_of_first)
    assert same_state(starts[1][1], end_of_first)
    # A stage 2 that cannot move its weights ends with those of stage 1.
    frozen = prepare_second(end_of_first, still)
    assert same_state(
        dict(frozen.student.model.named_parameters()), dict(student.named_parameters())
    )


def prepare_second(weights, optimizer):
    student = tiny_net()
    student.load_state_dict(weights)
    training = stages_module.Training(1, optimizer)
    return prepare(
        Network(student, TAPS), [Network(trained_teacher(), TAPS)], Stage(KD(), 1), training,
        tiny_data(1)[0], previous=copy.deepcopy(student), number=2,
    )  # fmt: skip


def test_later_stages_equal_a_second_call_on_the_first_ones_student():
    # Without a reference, two stages are one stage after the other, apart from their draws.
    data = ResidentBatches(*tiny_data(), batch_size=16)

    class Later:
        num_samples = 48

        def epoch(self, epoch):
            return data.epoch(epoch + 2)

    both = state_after(Stage(KD(), 2), Stage(KD(), 2, reference=None), data=data)
    student, _, _ = run([Stage(KD(), 2)], data=data)
    run([Stage(KD(), 2, schedule=LATER_STAGES)], student, data=Later())
    assert same_state(both, snapshot(student))


def test_reinit_goes_back_to_the_first_weights():
    # A second stage at rate 0 shows the weights that it started from.
    still = Schedule(kind="constant", start=0.0)
    parameters = dict(tiny_net().named_parameters())
    warm, _, _ = run([Stage(KD(), 2), Stage(KD(), 1, schedule=still)])
    fresh, _, _ = run([Stage(KD(), 2), Stage(KD(), 1, schedule=still, init="reinit")])
    assert same_state(dict(fresh.named_parameters()), parameters)
    assert not same_state(dict(warm.named_parameters()), parameters)
    tracked = [int(net.body[1].num_batches_tracked) for net in (warm, fresh)]
    assert tracked == [9, 3]


def test_reinit_keeps_the_reference():
    _, _, seen = run([Stage(KD(), 2), Stage(KD(), 1, init="reinit")])
    assert says_the_same(seen[2].anchor, state_after(Stage(KD(), 2)))
    with_reference = state_after(Stage(KD(), 2), Stage(KD(), 1, init="reinit"))
    without = state_after(Stage(KD(), 2), Stage(KD(), 1, reference=None, init="reinit"))
    assert not same_state(with_reference, without)


def test_adapters_and_optimiser_state_are_new_in_each_stage():
    _, _, seen = run([Stage(HINT, 1), Stage(HINT, 1), Stage(KD(), 1)])
    first, second, third = seen
    assert len({id(r.optimizer) for r in seen}) == 3
    assert not list(third.objective.parameters())
    built = [
        snapshot(
            prepare(
                Network(tiny_net(), TAPS), [Network(trained_teacher(), TAPS)], Stage(HINT, 1),
                stages_module.Training(1), tiny_data(1)[0], number=number,
            ).objective
        )
        for number in (1, 2, 2)
    ]  # fmt: skip
    assert not same_state(built[0], built[1])
    assert same_state(built[1], built[2])
    steps = 3
    for r in (first, second):
        assert all("momentum_buffer" in state for state in r.optimizer.state.values())
        assert len(list(r.objective.parameters())) > 0
        assert int(r.objective.method_modules[0].norm.num_batches_tracked) == steps


# ---------------------------------------------------------------------------- reference


def test_reference_is_there_from_stage_2_on():
    _, reports, seen = run([Stage(KD(), 1), Stage(HINT, 1), Stage(KD(), 1)])
    assert [r.anchor is not None for r in seen] == [False, True, True]
    assert ["loss/reference" in report.history[0] for report in reports] == [False, True, True]


def test_reference_is_the_latest_student_only():
    _, _, seen = run([Stage(KD(), 1), Stage(HINT, 1), Stage(KD(), 1)])
    after_two = state_after(Stage(KD(), 1), Stage(HINT, 1))
    assert says_the_same(seen[2].anchor, after_two)


@pytest.mark.parametrize("off", [None, Reference(weight=0.0)])
def test_weight_0_and_none_switch_it_off(off):
    student, reports, seen = run([Stage(KD(), 1), Stage(HINT, 2, reference=off)], test=TEST)
    assert seen[-1].anchor is None
    assert "loss/reference" not in reports[1].history[0]
    assert reports[1].kept is not None  # compared all the same: it shows what a reference is for
    assert not same_state(snapshot(student), state_after(Stage(KD(), 1), Stage(HINT, 2)))


def test_strong_reference_holds_the_student_back():
    def moved(weight):
        held = Reference(weight, weighting=Weighting("constant"))
        stages = [Stage(KD(), 4, schedule=FLAT), Stage(KD(), 4, held, FLAT)]
        return (
            run(stages, optimizer=Optimizer(lr=0.01))[1][1].history[-1]["loss/reference"] / weight
        )

    assert moved(3.0) < 0.7 * moved(0.01)


def test_feature_reference_reads_maps_for_a_method_that_needs_none():
    _, reports, seen = run([Stage(KD(), 1), Stage(KD(), 1, Reference(space="features"))])
    assert seen[1].student.roles == {"maps"}
    assert reports[1].history[0]["loss/reference"] >= 0


def test_teacher_runs_only_where_something_asks_for_it():
    run([Stage(Scratch(), 1), Stage(Scratch(), 1, CONSTANT)], teacher=Silent())
    _, reports, seen = run([Stage(Scratch(), 1), Stage(Scratch(), 1)])
    assert [len(r.teachers) for r in seen] == [0, 1]
    assert "tcp/mean" in reports[1].history[0]


# ---------------------------------------------------------------------------- draws and determinism


class Recorder:
    """A training set that notes which epochs are asked for, and what was drawn."""

    num_samples = 48

    def __init__(self):
        self.inner, self.epochs, self.draws = ResidentBatches(*tiny_data(), batch_size=16), [], []

    def epoch(self, epoch):
        self.epochs.append(epoch)
        for batch in self.inner.epoch(epoch):
            self.draws.append(batch.index.tolist())
            yield batch


def test_stages_draw_on_where_the_last_one_stopped():
    staged, long = Recorder(), Recorder()
    run([Stage(KD(), 2), Stage(HINT, 3)], data=staged)
    run([Stage(KD(), 5)], data=long)
    # The first pass only looks at the shape of an image.
    assert staged.epochs == long.epochs == [1, 1, 2, 3, 4, 5]
    assert staged.draws == long.draws


def test_order_of_stages_matters():
    assert not same_state(
        state_after(Stage(KD(), 1), Stage(HINT, 1)), state_after(Stage(HINT, 1), Stage(KD(), 1))
    )


def test_same_method_twice():
    _, reports, seen = run([Stage(KD(), 2), Stage(KD(), 2)], test=TEST)
    assert [len(report.history) for report in reports] == [2, 2]
    assert seen[2].anchor is not None
    assert [r.first_epoch for r in (seen[0], seen[2])] == [0, 2]


@pytest.mark.parametrize("precision", EVERY_PRECISION)
def test_two_calls_give_the_same_bits(precision):
    stages = [Stage(HINT, 1), Stage(KD(), 1)]
    assert same_state(
        state_after(*stages, precision=precision), state_after(*stages, precision=precision)
    )
    assert not same_state(state_after(*stages, seed=1), state_after(*stages))


def test_global_random_state_is_not_touched():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run([Stage(HINT, 1), Stage(KD(), 1)], test=TEST, dev=DEV)
    assert torch.equal(torch.get_rng_state(), before)


@needs_bf16
def test_bf16_stays_close_to_fp32():
    stages = [Stage(HINT, 2), Stage(KD(), 2)]
    exact, rough = (run(stages, precision=p)[1] for p in ("fp32", "bf16"))
    for a, b in zip(exact, rough, strict=True):
        assert b.history[-1]["loss"] == pytest.approx(a.history[-1]["loss"], rel=0.05)


def test_schedules_and_weights_of_stages():
    _, reports, _ = run([Stage(KD(), 2), Stage(KD(), 3), Stage(KD(), 1, schedule=FLAT)])
    rates = [[row["lr"] for row in report.history] for report in reports]
    assert rates[0] == pytest.approx([0.05, 0.005])
    assert rates[1] == pytest.approx([0.005, 0.0005, 0.00005])
    assert rates[2] == pytest.approx([0.05])
    plain, scaled = (
        run([Stage(KD(), 1, method_weight=w, ce_weight=c)], optimizer=Optimizer(lr=0.0))[1][
            0
        ].history[0]
        for w, c in [(1.0, None), (3.0, 0.5)]
    )
    assert scaled["loss/kd"] == pytest.approx(3 * plain["loss/kd"], rel=1e-5)
    assert scaled["loss/ce"] == pytest.approx(5 * plain["loss/ce"], rel=1e-5)


def test_joint_stage_sums_its_methods():
    _, reports, _ = run([Stage([KD(), HINT], 1)])
    row = reports[0].history[0]
    assert row["loss"] == pytest.approx(row["loss/ce"] + row["loss/kd"] + row["loss/hint"])


@pytest.mark.parametrize(
    "name", ["at", "crd", "dkd", "dml", "fitnet", "kd", "rkd", "scratch", "sp"]
)
def test_methods_run_as_a_second_stage(name):  # the contract suite does so with every method
    method = HINT if name == "fitnet" else METHODS[name]()
    rows = run([Stage(Scratch(), 1), Stage(method, 1)])[1][1].history
    assert rows[0]["loss/reference"] >= 0


# ---------------------------------------------------------------------------- reports


def test_report_equals_an_evaluation_of_the_student():
    student, reports, _ = run([Stage(KD(), 3), Stage(HINT, 2)], test=TEST)
    result = evaluate(student, FixedSet(*TEST))
    assert (reports[1].test.top1, reports[1].test.loss) == (result.top1, result.loss)
    assert torch.equal(reports[1].test.predictions, result.predictions)
    by_hand = 100 * (student(TEST[0]).argmax(1) == TEST[1]).double().mean().item()
    assert result.top1 == pytest.approx(by_hand)
    assert result.top5 == 100.0
    assert result.loss == pytest.approx(
        nn.functional.cross_entropy(student(TEST[0]), TEST[1]).item(), rel=1e-5
    )


def test_kept_compares_with_the_previous_stage():
    _, reports, _ = run([Stage(KD(), 3), Stage(HINT, 3, schedule=FLAT)], test=TEST)
    assert reports[0].kept is None
    before, after = reports[0].test.predictions, reports[1].test.predictions
    assert reports[1].kept == agreement(after, before, TEST[1])


def test_agreement_by_hand():
    labels = torch.tensor([0, 1, 2, 3, 0])
    reference = torch.tensor([0, 1, 0, 0, 1])
    student = torch.tensor([0, 2, 2, 0, 1])
    got = agreement(student, reference, labels)
    assert (got.same, got.kept) == (pytest.approx(60), pytest.approx(50))
    assert got.gained == pytest.approx(100 / 3)
    assert agreement(labels, labels, labels).gained == 0.0


def test_evaluation_does_not_depend_on_its_batches_and_leaves_the_mode():
    model, data = tiny_net(), FixedSet(*TEST)
    model.body.eval()
    modes = [m.training for m in model.modules()]
    small, large = evaluate(model, replace(data, batch_size=7)), evaluate(model, data)
    assert small.loss == pytest.approx(large.loss, rel=1e-6)
    assert torch.equal(small.predictions, large.predictions)
    assert [m.training for m in model.modules()] == modes


def test_fixed_set_normalises_bytes():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    norm = Normalisation((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert torch.equal(FixedSet(images, torch.zeros(4), norm).batch(1, 2), norm(images[1:3]))
    with pytest.raises(DataError, match="without a normalisation"):
        FixedSet(images, torch.zeros(4))
    with pytest.raises(DataError, match="4 images but 3 labels"):
        FixedSet(images, torch.zeros(3), norm)


def test_networks_are_left_ready_and_without_hooks():
    teacher = trained_teacher()
    student, _, _ = run([Stage(HINT, 1), Stage(KD(), 1)], teacher=teacher)
    for model in (student, teacher):
        assert not any(m.training for m in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in student.parameters())


def test_hooks_come_off_after_divergence():
    student, teacher = tiny_net(), trained_teacher()
    with pytest.raises(DivergedError):
        run([Stage(HINT, 3)], student, teacher, optimizer=Optimizer(lr=1e30))
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---------------------------------------------------------------------------- carry


def test_best_on_dev_hands_on_the_best_weights_and_last_the_last():
    states, dev = [], FixedSet(*DEV)

    def after(r):
        states.append((r.history[-1]["dev_top1"], snapshot(r.student.model)))

    best, _, _ = run([Stage(KD(), 6, carry="best_on_dev", schedule=WILD)], on_epoch=after, dev=DEV)
    scores = [top1 for top1, _ in states]
    assert max(scores) > scores[-1]
    assert same_state(snapshot(best), states[scores.index(max(scores))][1])
    assert evaluate(best, dev).top1 == max(scores)
    last, _, _ = run([Stage(KD(), 6, schedule=WILD)], dev=DEV)
    assert same_state(snapshot(last), states[-1][1])


def test_best_weights_become_the_reference():
    first = Stage(KD(), 6, carry="best_on_dev", schedule=WILD)
    best, _, _ = run([first], dev=DEV)
    _, _, seen = run([first, Stage(KD(), 1)], dev=DEV)
    assert says_the_same(seen[-1].anchor, snapshot(best))


def test_ties_keep_the_earlier_epoch():
    _, _, seen = run([Stage(KD(), 2)])
    best = BestOnDev(FixedSet(*DEV))
    best.observe(seen[0])
    seen[0].epoch += 1
    best.observe(seen[0])
    assert best.epoch == seen[0].epoch - 1


# ---------------------------------------------------------------------------- data and refusals


def test_loader_and_tensors_give_a_report_each():
    loader = DataLoader(TensorDataset(*tiny_data()), batch_size=16)
    student, reports, _ = run([Stage(KD(), 2)], data=loader, test=FixedSet(*TEST))
    assert reports[0].test.top1 == evaluate(student, FixedSet(*TEST)).top1


@dataclass(frozen=True)
class OwnOptimiser(KD):
    name: ClassVar[str] = "own"
    groups: ClassVar[list] = []

    def make_optimizer(self, groups):
        self.groups.append({k: v for k, v in groups[0].items() if k != "params"})
        return torch.optim.SGD(groups)


def test_methods_own_optimiser_gets_the_recipe():
    _, _, seen = run([Stage(OwnOptimiser(), 1)], optimizer=Optimizer(lr=0.2, weight_decay=0.1))
    assert OwnOptimiser.groups == [
        {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.1, "nesterov": False}
    ]
    assert seen[0].optimizer.param_groups[0]["momentum"] == 0.9
    # The recipe's own optimiser would have ended in the same weights.
    ours = snapshot(seen[0].student.model)
    plain = state_after(Stage(KD(), 1), optimizer=Optimizer(lr=0.2, weight_decay=0.1))
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)


def refused(stages, said, error=ConfigError, **options):
    """Expect a refusal before any training."""
    student = tiny_net()
    with pytest.raises(error, match=said) as caught:
        run(stages, student, **options)
    assert same_state(snapshot(student), snapshot(tiny_net()))
    assert caught.value.hint
    return caught.value


def test_refusals_come_before_the_first_stage():
    first = Stage(Scratch(), 1)
    refused([], "there are no stages")
    refused([first, Stage(KD(), 0)], "stage 2 has 0 epochs")
    refused([first, Stage(KD(), 1)], "stage 2 needs a teacher", teacher=None)
    refused([first, first], "stage 2 needs a teacher", teacher=None)
    refused([first, Stage(KD(), 1, carry="best_on_dev")], "needs a development set")
    refused([first, Stage([], 1)], "a stage has no method")
    refused([first, Stage(KD(), 1, init="cold")], "init is 'cold'")
    refused([first], "precision is 'fp16'", precision="fp16")
    refused([first, Stage(FitNet(hint_layer=9), 1)], "fitnet cannot work", IncompatibleError)


def test_missing_taps_say_whose():
    first, features = Stage(Scratch(), 1), Reference(space="features")
    refused([first, Stage(HINT, 1)], "student: the model has no tap for maps", student_taps=Taps())
    refused([first, Stage(HINT, 1)], "teacher: the model has no tap for maps", teacher_taps=None)
    refused([first, Stage(KD(), 1, features)], "student: the model has no tap", student_taps=None)


def test_teacher_of_other_classes_is_refused_for_logits_and_tcp_but_not_hints():
    teacher = tiny_net(3, width=8, classes=3)
    first = Stage(Scratch(), 1)
    refused([first, Stage(KD(), 1, CONSTANT)], "kd cannot work", IncompatibleError, teacher=teacher)
    said = "need a teacher of the student's 4 classes, but it has 3"
    refused([first, Stage(HINT, 1)], said, IncompatibleError, teacher=teacher)
    run([first, Stage(HINT, 1, CONSTANT)], teacher=teacher)


def test_one_object_cannot_be_both():
    student = tiny_net()
    with pytest.raises(ConfigError, match="same object"):
        run([Stage(KD(), 1)], student, student)
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2)), "without a normalisation"),
        ([], "give no batches"),
        (iter([tiny_data()]), "ends after one pass"),
    ],
)
def test_unusable_data_are_refused(data, said):
    with pytest.raises(DataError, match=said):
        distill(tiny_net(), None, [Stage(Scratch(), 1)], data)


def test_methods_are_not_sequences():
    assert not any(hasattr(cls, "__len__") for cls in METHODS.values())
    assert [p.method for p in Stage(KD(), 1).parts] == [KD()]
    assert all(isinstance(p.method, Method) for p in Stage([KD(), HINT], 1).parts)


def test_a_teacher_is_looked_up_where_a_folder_for_tables_is_given(tmp_path):
    def train_student(tables):
        student = tiny_net()
        data = ResidentBatches(*tiny_data(), batch_size=20)
        stages = [Stage(KD(), 2), Stage(HINT, 1), Stage(KD(), 1)]
        distill(
            student, trained_teacher(), stages, data,
            student_taps=TAPS, teacher_taps=TAPS, tables=tables,
        )  # fmt: skip
        return snapshot(student)

    live, looked_up = train_student(None), train_student(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    for name, value in live.items():
        torch.testing.assert_close(looked_up[name], value, rtol=1e-2, atol=1e-3)
    loader = [tiny_data(20)]
    with pytest.raises(ConfigError, match="which view"):
        distill(tiny_net(), trained_teacher(), [Stage(KD(), 1)], loader, tables=tmp_path)


def test_a_teacher_whose_table_cannot_be_made_is_run(tmp_path):
    teacher = trained_teacher()
    with torch.no_grad():
        teacher.head.bias += 1e6  # too large for half precision
    data, student = ResidentBatches(*tiny_data(), batch_size=20), tiny_net()
    with pytest.warns(UserWarning, match="run live instead"):
        reports = distill(student, teacher, [Stage(KD(), 1)], data, tables=tmp_path)
    assert len(reports[0].history) == 1
