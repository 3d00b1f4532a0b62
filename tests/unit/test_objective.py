"""One stage's objective: sums, weights, names, modules, refusals; and methods from other packages."""

import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import smskd.methods as methods
from smskd.errors import ConfigError, IncompatibleError, UnknownNameError
from smskd.methods import (
    Method,
    Modifier,
    Needs,
    PairShapes,
    Signals,
    load_plugins,
    method_class,
    modifier_class,
)
from smskd.methods.at import AT
from smskd.methods.base import total
from smskd.methods.dkd import DKD
from smskd.methods.fitnet import FitNet
from smskd.methods.kd import KD
from smskd.methods.logit_standardisation import LogitStandardisation
from smskd.methods.objective import Objective, Part
from smskd.methods.rkd import RKD
from smskd.methods.scratch import Scratch
from smskd.methods.sp import SP
from smskd.taps import Outputs, Shapes

MAP_SHAPES = ((4, 8, 8), (4, 8, 8), (8, 4, 4), (8, 2, 2))
SHAPES = Shapes(5, maps=MAP_SHAPES, pooled=8)
PAIR = PairShapes(SHAPES, (SHAPES,), 100)


def outputs(seed, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(6, *shape, generator=generator).requires_grad_(requires_grad)

    return Outputs(random(5), tuple(random(*s) for s in MAP_SHAPES), (), random(8))


def signals(epoch=20):
    labels = torch.arange(6) % 5
    return Signals(outputs(1, True), (outputs(2),), labels, torch.arange(6), epoch, 240)


def alone(method, given):
    """A method's terms without an Objective around it."""
    torch.manual_seed(0)
    return method.task(given), method.distill(given, method.build(PAIR))


def joint(*chosen, **settings):
    torch.manual_seed(0)
    parts = [part if isinstance(part, Part) else Part(part) for part in chosen]
    return Objective(parts, PAIR, **settings)


# ---- sums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Scratch(), KD(), FitNet(), AT(), SP(), RKD(), DKD()])
def test_one_method_is_passed_through(method):
    given = signals()
    task, distill = joint(method)(given)
    expected_task, expected_distill = alone(method, given)
    assert task.keys() == expected_task.keys()
    assert distill.keys() == expected_distill.keys()
    for name, term in {**expected_task, **expected_distill}.items():
        torch.testing.assert_close({**task, **distill}[name], term, rtol=0, atol=0)


def test_joint_loss_is_the_sum_of_the_losses():
    given = signals()
    chosen = [KD(), AT(), SP(weight=7.0), RKD(), DKD(), Scratch()]
    expected = sum(total(*alone(method, given)) for method in chosen)
    task, distill = joint(*chosen)(given)
    torch.testing.assert_close(total(task, distill), expected)
    assert task.keys() == {"ce"}
    assert distill.keys() == {"kd", "at", "sp", "distance", "angle", "tckd", "nckd"}
    ce = nn.functional.cross_entropy(given.student.logits, given.labels)
    torch.testing.assert_close(task["ce"], 5.1 * ce)


def test_method_weight_scales_the_distillation_only():
    given = signals()
    task, distill = joint(KD(), RKD())(given)
    task_3, distill_3 = joint(KD(), RKD(), method_weight=3.0)(given)
    torch.testing.assert_close(task_3, task)
    torch.testing.assert_close(distill_3, {name: 3 * term for name, term in distill.items()})


@pytest.mark.parametrize("chosen", [[KD()], [KD(), AT()], [AT(), KD(), SP()]])
@pytest.mark.parametrize("ce_weight", [0.0, 0.25, 1.0])
def test_ce_weight_replaces_all_of_them(chosen, ce_weight):
    given = signals()
    _, distill = joint(*chosen)(given)
    task, distill_too = joint(*chosen, ce_weight=ce_weight)(given)
    ce = nn.functional.cross_entropy(given.student.logits, given.labels)
    assert sum(task.values()) == ce_weight * ce
    torch.testing.assert_close(distill_too, distill, rtol=0, atol=0)


def test_names_that_collide_get_the_method_in_front():
    given = signals()
    _, distill = joint(KD(), KD(temperature=1.0), DKD())(given)
    assert list(distill) == ["kd.kd", "kd2.kd", "tckd", "nckd"]
    assert distill["kd.kd"] == alone(KD(), given)[1]["kd"]
    assert distill["kd2.kd"] == alone(KD(temperature=1.0), given)[1]["kd"]
    _, distill = joint(FitNet(), KD(), FitNet(hint_layer=3))(given)
    assert list(distill) == ["fitnet.hint", "kd", "fitnet2.hint"]


def test_needs_are_the_union():
    assert joint(Scratch()).needs == Needs(teacher=False)
    assert joint(KD()).needs == Needs()
    both = frozenset({"maps", "pooled"})
    assert joint(Scratch(), AT(), RKD()).needs == Needs(True, both, both)


# ---- modules ------------------------------------------------------------------------------------


def test_adapters_are_trained_and_checkpointed():
    objective = joint(KD(), FitNet(), FitNet(hint_layer=3))
    assert len(list(objective.parameters())) == 8
    total(*objective(signals())).backward()
    assert all(p.grad.abs().max() > 0 for n, p in objective.named_parameters() if "bias" not in n)
    other = Objective(objective.parts, PAIR)
    assert not torch.equal(total(*other(signals())), total(*objective(signals())))
    other.load_state_dict(objective.state_dict(), strict=True)
    assert torch.equal(total(*other(signals())), total(*objective(signals())))


def test_objective_without_modules_has_nothing_to_train():
    assert not joint(KD(), AT(), SP(), RKD(), DKD()).state_dict()


# ---- modifiers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale(Modifier):
    name: ClassVar[str] = "scale"
    factor: float = 2.0

    def build(self, shapes):
        module = nn.Module()
        module.log_factor = nn.Parameter(torch.tensor(self.factor).log())
        return module

    def modify(self, signals, modules):
        z = signals.student.logits * modules.log_factor.exp()
        return signals.with_logits(z, [t.logits for t in signals.teachers])


@dataclass(frozen=True)
class Shear(Modifier):
    name: ClassVar[str] = "shear"

    def modify(self, signals, modules):
        z = signals.student.logits + torch.arange(5.0)
        return signals.with_logits(z, [t.logits for t in signals.teachers])


def test_modifiers_apply_in_order_to_their_part_only():
    given = signals()
    z = given.student.logits
    ladder = torch.arange(5.0)
    for order, logits in {
        (Scale(), Shear()): 2 * z + ladder,
        (Shear(), Scale()): 2 * (z + ladder),
    }.items():
        task, distill = joint(Part(KD(), order), KD())(given)
        changed = given.with_logits(logits, [given.teacher.logits])
        torch.testing.assert_close(distill["kd.kd"], alone(KD(), changed)[1]["kd"])
        torch.testing.assert_close(distill["kd2.kd"], alone(KD(), given)[1]["kd"])
        torch.testing.assert_close(task["ce"], 2 * alone(KD(), given)[0]["ce"])


def test_modifiers_parameters_are_trained():
    objective = joint(Part(KD(), (Shear(), Scale())), Part(RKD(), (Scale(3.0),)))
    assert [p.item() for p in objective.parameters()] == pytest.approx([0.6931472, 1.0986123])
    total(*objective(signals())).backward()
    assert next(objective.parameters()).grad != 0


# ---- optimiser and inference --------------------------------------------------------------------


@dataclass(frozen=True)
class OwnSteps(KD):
    """Brings an optimiser whose steps it takes in its own way: both gradients, one by one."""

    name: ClassVar[str] = "own_steps"

    def make_optimizer(self, groups):
        return torch.optim.Adam(groups, lr=0.01)

    def descend(self, task, distill, optimizer):
        for terms in (task, distill):
            optimizer.zero_grad()
            total(terms).backward(retain_graph=True)
            optimizer.step()


@dataclass(frozen=True)
class Wrapped(KD):
    name: ClassVar[str] = "wrapped"

    def build(self, shapes):
        return nn.Linear(5, 5)

    def inference_model(self, student, modules):
        return nn.Sequential(student, modules)


def test_the_usual_step_lowers_the_loss_of_student_and_adapters():
    objective, given = joint(KD(), FitNet()), signals()
    leaves = [given.student.logits, *given.student.maps]
    optimizer = torch.optim.SGD([*leaves, *objective.parameters()], lr=0.01)
    assert objective.make_optimizer([]) is None
    before = [p.detach().clone() for p in (*leaves, *objective.parameters())]
    first = objective(given)
    objective.descend(*first, optimizer)
    assert total(*objective(given)) < total(*first)
    used = (given.student.logits, given.student.maps[2], *objective.parameters())
    after = [p.detach() for p in (*leaves, *objective.parameters())]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) == len(used)


@pytest.mark.parametrize("chosen", [[OwnSteps()], [AT(), OwnSteps(), SP()]])
def test_a_method_with_its_own_optimiser_takes_the_steps(chosen):
    objective, given = joint(*chosen), signals()
    z = given.student.logits
    optimizer = objective.make_optimizer([{"params": [z]}])
    assert isinstance(optimizer, torch.optim.Adam)
    objective.descend(*objective(given), optimizer)
    assert optimizer.state[z]["step"] == 2


def test_two_own_optimisers_are_refused():
    with pytest.raises(ConfigError, match="own_steps and own_steps each bring their own optimiser"):
        joint(OwnSteps(), KD(), OwnSteps(temperature=1.0))


def test_inference_models_are_folded():
    student = nn.Linear(3, 5)
    assert joint(KD(), FitNet()).inference_model(student) is student
    objective = joint(Wrapped(), KD(), Wrapped())
    model = objective.inference_model(student)
    first, second = objective.method_modules[0], objective.method_modules[2]
    x = torch.randn(2, 3)
    assert torch.equal(model(x), second(first(student(x))))


# ---- refusals -----------------------------------------------------------------------------------


def test_no_method():
    with pytest.raises(ConfigError, match="no method"):
        Objective([], PAIR)


def test_nothing_to_optimise():
    objective = joint(Scratch(ce_weight=0.0))
    terms = objective(signals())
    assert terms == ({}, {})
    with pytest.raises(ConfigError, match="nothing to optimise"):
        objective.descend(*terms, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def test_every_reason_is_listed():
    poor = replace(SHAPES, maps=((4, 8, 8), (4, 32, 32)), pooled=0, num_classes=4)
    with pytest.raises(IncompatibleError) as caught:
        Objective([Part(m) for m in (FitNet(), KD(), AT(), RKD())], PairShapes(SHAPES, (poor,)))
    assert str(caught.value).splitlines() == [
        "fitnet cannot work with this pair: hint_layer 2 asked for, but the teacher has 2 feature "
        "maps (expected 0 <= hint_layer < 2)",
        "kd cannot work with this pair: the student has 5 classes and the teacher 4 (expected the "
        "same number)",
        "rkd cannot work with this pair: the teacher has no pooled feature; expected a width of at "
        "least 1",
        "  -> choose another method, other networks or other taps",
    ]


def test_check_of_other_shapes():
    objective = joint(FitNet())
    assert objective.check(PAIR) is None
    large = replace(SHAPES, maps=tuple((c, 4 * h, 4 * w) for c, h, w in MAP_SHAPES))
    with pytest.raises(IncompatibleError, match="4x4 in the student and 16x16 in the teacher"):
        objective.check(PairShapes(SHAPES, (large,)))
    with pytest.raises(IncompatibleError, match="fitnet cannot work"):
        FitNet().build(PairShapes(SHAPES, (large,)))


def test_missing_teacher():
    with pytest.raises(IncompatibleError, match=r"kd cannot work .* no teacher"):
        Objective([Part(KD())], PairShapes(SHAPES))
    Objective([Part(Scratch())], PairShapes(SHAPES))


def test_standardisation_of_one_class():
    one = replace(SHAPES, num_classes=1)
    with pytest.raises(IncompatibleError, match="at least 2"):
        Objective([Part(KD(), (LogitStandardisation(),))], PairShapes(one, (one,)))


# ---- names and plug-ins -------------------------------------------------------------------------


def test_names_are_found_and_misspelt_ones_suggested():
    assert method_class("dkd") is DKD
    assert modifier_class("logit_standardisation") is LogitStandardisation
    with pytest.raises(
        UnknownNameError, match=r"unknown method 'fitnets'\n.*did you mean 'fitnet'"
    ):
        method_class("fitnets")
    with pytest.raises(UnknownNameError, match="did you mean 'logit_standardisation'"):
        modifier_class("logit_standardization")
    with pytest.raises(UnknownNameError, match="did you mean 'warmth'"):
        method_class("warmt", {"warmth": KD})


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

from smskd.methods import Method


@dataclass(frozen=True)
class Cosine(Method):
    name: ClassVar[str] = "cosine"
    kind: ClassVar[str] = "response"
    weight: float = 1.0

    def distill(self, signals, modules):
        z_s, z_t = signals.student.logits, signals.teacher.logits
        gap = 1 - (z_s * z_t).sum(1) / (z_s.norm(dim=1) * z_t.norm(dim=1))
        return {"cosine": self.weight * gap.mean()}


@dataclass(frozen=True)
class Unfinished(Method):
    name: ClassVar[str] = "unfinished"


class Impostor:
    name = "impostor"
"""

ENTRY_POINTS = """
[smskd.methods]
cosine = {module}:Cosine
other_name = {module}:Cosine
unfinished = {module}:Unfinished
impostor = {module}:Impostor
absent = {module}:Absent
explosive = {module}_explosive
kd = {module}:Cosine
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package installed the way an installer leaves it: modules and a dist-info directory."""
    name = "smskd_toy_plugin"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    (tmp_path / f"{name}_explosive.py").write_text("raise RuntimeError('boom')\n")
    info = tmp_path / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS.format(module=name))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def test_plugin_is_loaded_and_works(package):
    loaded = load_plugins(["cosine"])
    cls = method_class("cosine", loaded)
    assert issubclass(cls, Method)
    assert cls.__module__ == package
    task, distill = Objective([Part(cls(weight=2.0))], PAIR)(signals())
    assert task.keys() == {"ce"}
    assert 0 < distill["cosine"] < 4


def test_only_named_plugins_are_imported(package):
    assert load_plugins([]) == {}
    assert package not in sys.modules
    load_plugins(["cosine"])
    assert package in sys.modules
    assert f"{package}_explosive" not in sys.modules


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cosin", "no installed package offers the method plug-in 'cosin'.*did you mean 'cosine'"),
        ("impostor", "'impostor' .* is not a subclass of smskd.methods.Method"),
        ("unfinished", "'unfinished' .* is unfinished.*define distill"),
        ("other_name", "'other_name' .* calls itself 'cosine'"),
        ("absent", "'absent' .* cannot be imported: AttributeError"),
        ("explosive", "'explosive' .* cannot be imported: RuntimeError: boom"),
        ("kd", "'kd' has the name of a built-in method"),
    ],
)
def test_plugins_that_cannot_be_used(package, name, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        load_plugins([name])


def test_plugin_offered_twice(package, tmp_path):
    info = tmp_path / "second_toy_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: second-toy-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[smskd.methods]\ncosine = elsewhere:Cosine\n")
    with pytest.raises(
        ConfigError, match="more than once: elsewhere:Cosine, smskd_toy_plugin:Cosine"
    ):
        load_plugins(["cosine"])


def test_no_plugins_installed_at_all():
    with pytest.raises(ConfigError, match="no installed package offers"):
        load_plugins(["no_such_plugin"])


def test_public_names():
    assert sorted(methods.__all__) == sorted(set(methods.__all__))
    assert all(hasattr(methods, name) for name in methods.__all__)
