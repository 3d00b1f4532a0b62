"""The training loop: the recipe to the last digit, what it logs, and how it fails."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hardware import EVERY_PRECISION, needs_bf16
from tiny import TAPS, Silent, same_state, snapshot, tiny_data, tiny_net, trained_teacher
from torch import nn

from smskd.data import LoaderBatches, ResidentBatches
from smskd.errors import DataError, DivergedError
from smskd.meter import TCP_QUANTILES
from smskd.methods.fitnet import FitNet
from smskd.methods.kd import KD
from smskd.methods.scratch import Scratch
from smskd.reference import true_class_probability
from smskd.settings import Optimizer, Reference, Schedule, Training, Weighting
from smskd.stages import Network, Stage, prepare
from smskd.train import train

BATCH = 20


def batches(num=48, seed=0):
    return ResidentBatches(*tiny_data(num), batch_size=BATCH, seed=seed)


def prepared(
    student, teacher=None, method=None, epochs=2, previous=None, reference=None, **training
):
    stage = Stage(method or Scratch(), epochs, reference)
    teachers = [Network(teacher, TAPS)] if teacher is not None else []
    settings = Training(epochs, **training)
    image = tiny_data(1)[0]
    return prepare(Network(student, TAPS), teachers, stage, settings, image, previous=previous)


def trained(run, data=None, on_epoch=lambda run: None):
    train(run, data or batches(), on_epoch)
    return run


def by_hand(student, loss_of, extra=(), epochs=2, schedule=None, settings=None):
    """The recipe as a plain loop with plain momentum SGD, one parameter at a time."""
    settings, schedule = settings or Optimizer(), schedule or Schedule()
    parameters = [*student.parameters(), *extra]
    velocity = [torch.zeros_like(p) for p in parameters]
    for epoch in range(1, epochs + 1):
        student.train()
        rate = settings.lr * schedule.factor(epoch, epochs)
        for batch in batches().epoch(epoch):
            gradients = torch.autograd.grad(loss_of(batch), parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients, strict=True):
                    v.mul_(settings.momentum).add_(g + settings.weight_decay * p)
                    p.sub_(rate * v)


def assert_close(one, other):
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        (Optimizer(), Schedule()),
        (Optimizer(lr=0.1, momentum=0.5, weight_decay=0.1), Schedule(milestones=(0.5,), start=0.5)),
    ],
)
def test_scratch_equals_a_loop_written_by_hand(settings, schedule):
    ours, plain = tiny_net(), tiny_net()
    trained(prepared(ours, optimizer=settings, schedule=schedule))
    by_hand(plain, lambda b: F.cross_entropy(plain(b.images), b.labels), (), 2, schedule, settings)
    assert_close(snapshot(ours), snapshot(plain))
    assert not same_state(snapshot(ours), snapshot(tiny_net()))


def test_kd_equals_a_loop_written_by_hand():
    ours, plain, teacher = tiny_net(), tiny_net(), trained_teacher()
    trained(prepared(ours, copy.deepcopy(teacher), KD()))

    def loss(batch):
        z_s = plain(batch.images)
        with torch.no_grad():
            p_t = F.softmax(teacher(batch.images) / 4, 1)
        kl = (p_t * (p_t.log() - F.log_softmax(z_s / 4, 1))).sum(1).mean()
        return 0.1 * F.cross_entropy(z_s, batch.labels) + 0.9 * 16 * kl

    by_hand(plain, loss)
    assert_close(snapshot(ours), snapshot(plain))


def test_adapters_are_trained_and_decayed_like_the_student():
    ours, plain, teacher = tiny_net(), tiny_net(), trained_teacher()
    run = prepared(ours, copy.deepcopy(teacher), FitNet(hint_layer=1, weight=2.0))
    regressor = copy.deepcopy(run.objective.method_modules[0])
    trained(run)

    def loss(batch):
        body = plain.body(plain.stem(batch.images))
        with torch.no_grad():
            hint = teacher.body(teacher.stem(batch.images))
        ce = F.cross_entropy(plain.head(body.mean((2, 3))), batch.labels)
        return ce + 2.0 * F.mse_loss(regressor(body), hint)

    by_hand(plain, loss, list(regressor.parameters()))
    assert_close(snapshot(ours), snapshot(plain))
    assert_close(snapshot(run.objective.method_modules[0]), snapshot(regressor))


def test_each_epoch_starts_in_training_mode():
    run = prepared(tiny_net(), trained_teacher(), FitNet(hint_layer=1), epochs=3)

    def to_evaluation(run):
        run.student.model.eval()
        run.objective.eval()

    to_evaluation(run)
    trained(run, on_epoch=to_evaluation)
    assert int(run.student.model.body[1].num_batches_tracked) == 9
    assert int(run.objective.method_modules[0].norm.num_batches_tracked) == 9


def test_frozen_parts_of_the_student_stay():
    student = tiny_net()
    student.stem.requires_grad_(False)
    before = snapshot(student.stem)
    trained(prepared(student))
    assert same_state(before, snapshot(student.stem))


def test_loss_falls_and_accuracy_rises():
    run = trained(prepared(tiny_net(), trained_teacher(), KD(ce_weight=1.0), epochs=12))
    first, last = run.history[0], run.history[-1]
    assert last["loss"] < 0.7 * first["loss"]
    assert last["train_top1"] > first["train_top1"]


def test_rows_hold_every_term_and_the_rate():
    run = trained(prepared(tiny_net(), trained_teacher(), KD(), epochs=8))
    assert [row["epoch"] for row in run.history] == list(range(1, 9))
    assert [row["lr"] for row in run.history] == pytest.approx(
        [0.05] * 5 + [0.005, 0.0005, 0.00005]
    )
    for row in run.history:
        assert row["loss"] == pytest.approx(row["loss/ce"] + row["loss/kd"])
        assert 0 <= row["train_top1"] <= 100
        assert row["images_per_s"] == pytest.approx(48 / row["seconds"])
        assert all(isinstance(value, (int, float)) for value in row.values())


def test_row_is_the_mean_over_samples_not_batches():
    student = tiny_net()
    run = trained(prepared(student, epochs=1, optimizer=Optimizer(lr=0.0, weight_decay=0.0)))
    fresh, losses = tiny_net().train(), []
    for batch in batches().epoch(1):
        losses.append(F.cross_entropy(fresh(batch.images), batch.labels, reduction="none").detach())
    assert run.history[0]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_tcp_and_mean_weight_are_those_of_the_training_set():
    teacher = trained_teacher()
    images, labels = tiny_data(48)
    tcp = true_class_probability(teacher(images), labels)
    for weighting, expected in [
        (Weighting(), (1 - tcp).mean().item()),
        (Weighting("tcp"), tcp.mean().item()),
        (Weighting(normalise="batch_mean"), 1.0),
    ]:
        reference = Reference(weighting=weighting)
        row = trained(
            prepared(tiny_net(), teacher, KD(), 1, previous=tiny_net(1), reference=reference)
        ).history[0]
        assert row["reference/mean_weight"] == pytest.approx(expected, rel=1e-4)
        assert row["loss"] == pytest.approx(row["loss/ce"] + row["loss/kd"] + row["loss/reference"])
    assert row["tcp/mean"] == pytest.approx(tcp.mean().item(), rel=1e-4)
    for q in TCP_QUANTILES:
        assert row[f"tcp/q{q:.2f}"] == pytest.approx(
            torch.quantile(tcp, q).item(), rel=1e-3, abs=1e-6
        )


def test_teacher_stays_untouched_and_in_evaluation_mode():
    teacher = trained_teacher()
    before = snapshot(teacher)
    teacher.train()
    trained(prepared(tiny_net(), teacher, KD()))
    assert same_state(before, snapshot(teacher))
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_scratch_runs_no_teacher():
    row = trained(prepared(tiny_net(), Silent(), Scratch())).history[0]
    assert not any(name.startswith("tcp/") for name in row)


def test_teacher_of_other_classes_can_be_a_hint():
    # Its softmax says nothing about these labels, so no TCP is logged.
    teacher = tiny_net(3, width=8, classes=2)
    row = trained(prepared(tiny_net(), teacher, FitNet(hint_layer=1))).history[0]
    assert not any(name.startswith("tcp/") for name in row)


@pytest.mark.parametrize("precision", EVERY_PRECISION)
def test_two_runs_give_the_same_bits(precision):
    states, rows = [], []
    for _ in range(2):
        student = tiny_net()
        run = trained(
            prepared(student, trained_teacher(), FitNet(hint_layer=1), precision=precision)
        )
        states.append(snapshot(student))
        rows.append([row["loss"] for row in run.history])
    assert same_state(*states)
    assert rows[0] == rows[1]


@needs_bf16
def test_bf16_runs_the_networks_in_bf16_and_the_losses_in_float32():
    student, seen = tiny_net(), []
    student.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run = trained(prepared(student, trained_teacher(), KD(), precision="bf16"))
    assert set(seen[1:]) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in student.parameters())
    exact = trained(prepared(tiny_net(), trained_teacher(), KD()))
    assert run.history[-1]["loss"] == pytest.approx(exact.history[-1]["loss"], rel=0.03)


class TurnsBad(nn.Module):
    """A network whose answer is multiplied by a factor that the test changes."""

    def __init__(self):
        super().__init__()
        self.net, self.factor = tiny_net(), 1.0

    def forward(self, images):
        return self.net(images) * self.factor


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_divergence_names_the_term_and_the_epoch(factor):
    model, seen = TurnsBad(), []

    def after(run):
        seen.append(run.epoch)
        model.factor = factor if run.epoch == 2 else 1.0

    run = prepare(Network(model), [], Stage(Scratch(), 4), Training(4), tiny_data(1)[0])
    with pytest.raises(DivergedError, match="loss term ce is no longer finite in epoch 3"):
        train(run, batches(), after)
    assert seen == [1, 2]
    assert run.epoch == len(run.history) == 2


def test_divergence_names_only_the_broken_term():
    teacher = TurnsBad()
    teacher.factor = float("nan")
    teacher.head = teacher.net.head
    run = prepare(
        Network(tiny_net()), [Network(teacher)], Stage(KD(), 1), Training(1), tiny_data(1)[0]
    )
    one_step = ResidentBatches(*tiny_data(8), batch_size=8)
    with pytest.raises(DivergedError, match="loss term kd is no longer finite in epoch 1"):
        train(run, one_step, lambda run: None)


def test_weights_broken_by_the_last_step_are_not_handed_on():
    images, labels = tiny_data(8)
    run = prepared(tiny_net(), epochs=1, optimizer=Optimizer(lr=float("inf"), weight_decay=0.0))
    seen = []
    with pytest.raises(DivergedError, match="weights are no longer finite after epoch 1"):
        train(run, ResidentBatches(images, labels, batch_size=8), seen.append)
    assert seen == run.history == []


def test_data_without_batches_are_refused():
    with pytest.raises(DataError, match="no batches in epoch 1"):
        train(prepared(tiny_net()), LoaderBatches([]), lambda run: None)


def test_training_continues_where_a_run_stands():
    whole, halves = tiny_net(), tiny_net()
    trained(prepared(whole, epochs=4))
    run = prepared(halves, epochs=4)

    class Stop(Exception):
        pass

    def stop_once(run):
        if run.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        train(run, batches(), stop_once)
    trained(run)
    assert same_state(snapshot(whole), snapshot(halves))
    assert [row["epoch"] for row in run.history] == [1, 2, 3, 4]
