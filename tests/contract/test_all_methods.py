"""What every registered method keeps to, alone and with standardised logits, on real small networks."""

import copy
import importlib
import re
from dataclasses import MISSING, fields, is_dataclass, replace

import pytest
import torch
from torch import nn

from smskd.methods import METHODS, MODIFIERS, PairShapes, Signals
from smskd.methods.base import total
from smskd.methods.objective import Objective, Part
from smskd.taps import MAPS, POOLED, Outputs, Shapes, TappedModel, Taps, probe

NUM_CLASSES = 5
IMAGE = torch.zeros(1, 3, 16, 16)
ROLES = (MAPS, POOLED)
KINDS = {"none", "response", "feature", "relation"}


class ToyNet(nn.Module):
    """Stem and three blocks with batch norm, 16x16 images: maps of 16, s1, s2, s3 pixels a side."""

    taps = Taps(maps=("stem", "block1", "block2", "block3"), pooled="fc:input", classifier="fc")

    def __init__(self, width, strides):
        super().__init__()
        self.stem = self.block(3, width, 1)
        self.block1 = self.block(width, width, strides[0])
        self.block2 = self.block(width, 2 * width, strides[1])
        self.block3 = self.block(2 * width, 2 * width, strides[2])
        self.fc = nn.Linear(2 * width, NUM_CLASSES)
        nn.init.normal_(self.fc.weight, std=2.0)  # logits spread like those of a trained network

    @staticmethod
    def block(c_in, c_out, stride):
        conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class Pair:
    """A student, a teacher of other widths and map sizes, and a method between them."""

    def __init__(self, method, modifiers=(), seed=0):
        torch.manual_seed(seed)
        self.student = ToyNet(4, (1, 2, 2))
        self.teacher = ToyNet(6, (2, 2, 1)).eval().requires_grad_(False)
        self.objective = Objective(
            [Part(method, modifiers)], pair_shapes(self.student, self.teacher)
        )

    def signals(self, batch=6, seed=1, images=None):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(batch, 3, 16, 16, generator=generator) if images is None else images
        labels = torch.arange(len(images)) % NUM_CLASSES
        with TappedModel(self.student, ToyNet.taps, frozenset(ROLES)) as student:
            said = student(images)
        with TappedModel(self.teacher, ToyNet.taps, frozenset(ROLES)) as teacher, torch.no_grad():
            taught = teacher(images)
        return Signals(said, (taught,), labels, torch.arange(len(images)), epoch=1, epochs=240)

    def loss(self, signals):
        return total(*self.objective(signals))


def pair_shapes(student, teacher):
    return PairShapes(
        probe(student, ToyNet.taps, ROLES, IMAGE), (probe(teacher, ToyNet.taps, ROLES, IMAGE),), 100
    )


def gradients(pair):
    return [p.grad for p in (*pair.student.parameters(), *pair.objective.parameters())]


def assert_good_gradients(pair, somewhere=True):
    grads = [g for g in gradients(pair) if g is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)
    if somewhere:
        assert any(g.abs().max() > 0 for g in grads)


def mapped(outputs, change):
    """The same outputs with ``change`` applied to every tensor."""
    return replace(
        outputs,
        logits=change(outputs.logits),
        maps=tuple(change(m) for m in outputs.maps),
        pooled=change(outputs.pooled),
    )


ALONE = [pytest.param(cls, (), id=name) for name, cls in METHODS.items()]
MODIFIED = [
    pytest.param(cls, (modifier(),), id=f"{name}+{modified}")
    for name, cls in METHODS.items()
    for modified, modifier in MODIFIERS.items()
]
every_method = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
every_part = pytest.mark.parametrize(("cls", "modifiers"), ALONE + MODIFIED)


# ---- the class ----------------------------------------------------------------------------------


@pytest.mark.parametrize("registry", [METHODS, MODIFIERS], ids=["methods", "modifiers"])
def test_registry_keys_are_the_names(registry):
    assert {name: cls.name for name, cls in registry.items()} == {name: name for name in registry}


@pytest.mark.parametrize("cls", [*METHODS.values(), *MODIFIERS.values()])
def test_class_is_a_frozen_dataclass_with_defaults(cls):
    assert is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(cls))
    assert cls() == cls()
    assert hash(cls()) == hash(cls())
    assert isinstance(cls.version, int)


@pytest.mark.parametrize("cls", [*METHODS.values(), *MODIFIERS.values()])
def test_module_names_its_paper_and_class_its_settings(cls):
    text = importlib.import_module(cls.__module__).__doc__
    if cls.name != "scratch":
        assert re.search(r"arXiv \d{4}\.\d{4,5}", text)
    own = [f.name for f in fields(cls) if f.name != "ce_weight"]
    assert all(re.search(rf"^ +{name}: ", cls.__doc__, re.MULTILINE) for name in own)


@every_method
def test_kind_is_known_and_label_weight_is_one_except_for_kd(cls):
    assert cls.kind in KINDS
    assert cls().ce_weight == (0.1 if cls.name == "kd" else 1.0)


# ---- the loss -----------------------------------------------------------------------------------


@every_part
def test_loss_is_finite_and_its_gradient_reaches_the_student_only(cls, modifiers):
    pair = Pair(cls(), modifiers)
    before = copy.deepcopy(pair.teacher.state_dict())
    signals = pair.signals()
    teacher = mapped(signals.teacher, torch.clone)
    task, distill = pair.objective(signals)
    for term in (*task.values(), *distill.values()):
        assert term.shape == ()
        assert torch.isfinite(term)
    total(task, distill).backward()
    assert_good_gradients(pair)
    assert all(p.grad is not None for p in pair.objective.parameters())
    assert all(p.grad is None for p in pair.teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in pair.teacher.state_dict().items())
    assert torch.equal(signals.teacher.logits, teacher.logits), "changed in place"
    assert torch.equal(signals.teacher.pooled, teacher.pooled), "changed in place"
    assert all(map(torch.equal, signals.teacher.maps, teacher.maps)), "changed in place"


@pytest.mark.parametrize("cls", [cls for cls in METHODS.values() if cls.needs.teacher])
def test_distillation_alone_moves_the_student(cls):
    pair = Pair(cls())
    _, distill = pair.objective(pair.signals())
    total(distill).backward()
    moved = [p for p in pair.student.parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert moved
    assert min(term.item() for term in distill.values()) > 0


@every_method
def test_declared_needs_are_enough(cls):
    """With only the declared features the loss is what it is with all of them."""
    pair = Pair(cls())
    signals = pair.signals()
    whole = pair.loss(signals)
    needs = pair.objective.needs

    def only(outputs, roles):
        maps = outputs.maps if MAPS in roles else ()
        return Outputs(outputs.logits, maps, (), outputs.pooled if POOLED in roles else None)

    teachers = (only(signals.teacher, needs.teacher_roles),) if needs.teacher else ()
    least = replace(signals, student=only(signals.student, needs.student_roles), teachers=teachers)
    assert torch.equal(pair.loss(least), whole)


@every_part
def test_deterministic(cls, modifiers):
    runs = []
    for _ in range(2):
        pair = Pair(cls(), modifiers, seed=3)
        loss = pair.loss(pair.signals())
        loss.backward()
        runs.append([loss.detach(), *(g for g in gradients(pair) if g is not None)])
    assert all(map(torch.equal, *runs))


@every_method
def test_check_leaves_the_random_numbers_alone(cls):
    shapes = pair_shapes(ToyNet(4, (1, 2, 2)), ToyNet(6, (2, 2, 1)))
    before = torch.get_rng_state()
    assert cls().check(shapes) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("cls", "modifiers"),
    [part for part in ALONE + MODIFIED if part.values[0].kind in ("none", "response")],
)
def test_order_of_the_classes_does_not_matter(cls, modifiers):
    pair = Pair(cls(), modifiers)
    signals = pair.signals()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = signals.with_logits(
        signals.student.logits[:, order], [t.logits[:, order] for t in signals.teachers]
    )
    permuted = replace(permuted, labels=order.argsort()[signals.labels])
    torch.testing.assert_close(pair.loss(permuted), pair.loss(signals), rtol=1e-5, atol=1e-6)


@every_part
def test_order_of_the_samples_does_not_matter(cls, modifiers):
    pair = Pair(cls(), modifiers)
    signals = pair.signals()
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    shuffled = replace(
        signals,
        student=mapped(signals.student, lambda x: x[order]),
        teachers=(mapped(signals.teacher, lambda x: x[order]),),
        labels=signals.labels[order],
        index=signals.index[order],
    )
    torch.testing.assert_close(pair.loss(shuffled), pair.loss(signals), rtol=1e-4, atol=1e-5)


# ---- numbers that are hard ----------------------------------------------------------------------


@every_part
def test_float32_is_close_to_float64(cls, modifiers):
    pair = Pair(cls(), modifiers)
    signals = pair.signals()
    narrow = pair.loss(signals)
    pair.objective.double()
    wide = pair.loss(
        replace(
            signals,
            student=mapped(signals.student, torch.Tensor.double),
            teachers=(mapped(signals.teacher, torch.Tensor.double),),
        )
    )
    assert narrow.dtype == torch.float32
    assert wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)


@every_part
def test_bfloat16_features_that_were_widened(cls, modifiers):
    pair = Pair(cls(), modifiers)
    signals = pair.signals()
    exact = pair.loss(signals)

    def rounded(x):
        return x.bfloat16().float()

    coarse = pair.loss(
        replace(
            signals,
            student=mapped(signals.student, rounded),
            teachers=(mapped(signals.teacher, rounded),),
        )
    )
    coarse.backward()
    assert_good_gradients(pair)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, exact, rtol=0.1, atol=0.05)


@every_part
@pytest.mark.parametrize("who", ["student", "teacher", "both", "opposed"])
def test_extreme_logits_stay_finite(cls, modifiers, who):
    pair = Pair(cls(), modifiers)
    signals = pair.signals()
    scale_s = 1e4 if who in ("student", "both", "opposed") else 1.0
    scale_t = {"teacher": 1e4, "both": 1e4, "opposed": -1e4}.get(who, 1.0)
    extreme = signals.with_logits(
        scale_s * signals.student.logits, [scale_t * signals.teacher.logits]
    )
    loss = pair.loss(extreme)
    loss.backward()
    assert torch.isfinite(loss)
    assert_good_gradients(pair)


@every_part
def test_constant_logits_stay_finite(cls, modifiers):
    pair = Pair(cls(), modifiers)
    signals = pair.signals()
    flat = signals.with_logits(
        signals.student.logits * 0.0 + 2.0, [torch.zeros_like(signals.teacher.logits)]
    )
    loss = pair.loss(flat)
    loss.backward()
    assert torch.isfinite(loss)
    assert_good_gradients(pair, somewhere=False)


@every_part
@pytest.mark.parametrize("images", ["one twice", "all the same"])
def test_duplicates_in_a_batch_stay_finite(cls, modifiers, images):
    pair = Pair(cls(), modifiers)
    pair.student.eval()  # so that equal images have equal features, to the bit
    batch = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    batch[1] = batch[0]
    if images == "all the same":
        batch[:] = batch[0]
    loss = pair.loss(pair.signals(images=batch))
    loss.backward()
    assert torch.isfinite(loss)
    assert_good_gradients(pair)


@every_part
def test_dead_features_stay_finite(cls, modifiers):
    """A network whose last ReLU is dead for every sample, as early in training."""
    pair = Pair(cls(), modifiers)
    with torch.no_grad():
        pair.student.block3[1].weight.zero_()
        pair.student.block3[1].bias.fill_(-1.0)
    loss = pair.loss(pair.signals())
    loss.backward()
    assert torch.isfinite(loss)
    assert_good_gradients(pair)


@every_part
def test_batch_of_one(cls, modifiers):
    pair = Pair(cls(), modifiers)
    loss = pair.loss(pair.signals(batch=1))
    loss.backward()
    assert torch.isfinite(loss)
    assert_good_gradients(pair)


# ---- settings -----------------------------------------------------------------------------------


def other(value):
    return value - 1 if isinstance(value, int) else 1.5 * value


SETTINGS = [
    pytest.param(cls, f.name, id=f"{name}.{f.name}")
    for name, cls in METHODS.items()
    for f in fields(cls)
]


@pytest.mark.parametrize(("cls", "setting"), SETTINGS)
def test_no_setting_is_dead(cls, setting):
    value = getattr(cls(), setting)
    assert isinstance(value, (int, float)), "teach this test about other kinds of settings"
    losses = []
    for method in (cls(), replace(cls(), **{setting: other(value)})):
        pair = Pair(method)
        losses.append(pair.loss(pair.signals()).item())
    assert abs(losses[0] - losses[1]) > 1e-6 * abs(losses[0])


@pytest.mark.parametrize("modifier", MODIFIERS.values(), ids=MODIFIERS)
def test_modifiers_change_response_losses_and_leave_labels_alone(modifier):
    for cls in METHODS.values():
        task, distill = (Pair(cls()).objective)(Pair(cls()).signals())
        task_m, distill_m = Pair(cls(), (modifier(),)).objective(Pair(cls()).signals())
        assert all(torch.equal(task[k], task_m[k]) for k in task)
        if cls.kind == "response":
            assert not torch.allclose(total(distill), total(distill_m))


# ---- check --------------------------------------------------------------------------------------

GOOD = Shapes(NUM_CLASSES, maps=((4, 8, 8), (4, 8, 8), (8, 4, 4), (8, 2, 2)), pooled=8)
BAD = {
    "no features": replace(GOOD, maps=(), pooled=0),
    "one map": replace(GOOD, maps=GOOD.maps[:1]),
    "tokens": replace(GOOD, maps=((17, 8), (17, 8), (17, 8), (17, 8))),
    "maps four times as large": replace(
        GOOD, maps=tuple((c, 4 * h, 4 * w) for c, h, w in GOOD.maps)
    ),
    "two classes": replace(GOOD, num_classes=2),
    "one class": replace(GOOD, num_classes=1),
}
REFUSED = {
    "scratch": set(),
    "kd": set(),
    "fitnet": {"no features", "one map", "tokens", "maps four times as large"},
    "at": {"no features", "one map", "tokens"},
    "sp": {"no features"},
    "rkd": {"no features"},
    "dkd": {"two classes", "one class"},
}


@every_method
@pytest.mark.parametrize("bad", BAD)
def test_check_refuses_what_cannot_work_with_a_reason(cls, bad):
    student = replace(GOOD, num_classes=BAD[bad].num_classes)
    reason = cls().check(PairShapes(student, (BAD[bad],)))
    assert (reason is not None) == (bad in REFUSED[cls.name])
    if reason is not None:
        assert isinstance(reason, str)
        assert "expected" in reason


@pytest.mark.parametrize(
    ("name", "settings"),
    [("fitnet", {"hint_layer": 4}), ("fitnet", {"hint_layer": -1}), ("at", {"p": 0.5})],
)
def test_check_refuses_settings_that_cannot_work(name, settings):
    method = METHODS[name](**settings)
    assert "expected" in method.check(PairShapes(GOOD, (GOOD,)))
