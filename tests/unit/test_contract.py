"""Each check of the contract suite fails on a method that breaks what it is about."""

import random
from dataclasses import dataclass
from typing import ClassVar
from unittest import SkipTest

import pytest
import torch
from torch import nn

from smskd.contract import CASES, CHECKS, CLASS_CHECKS, LONG, check_method, main_case
from smskd.contract.trial import trial
from smskd.methods import METHODS, Method, Needs
from smskd.methods.kd import KD
from smskd.methods.objective import Part

CASE = CASES["other sizes"]


@dataclass(frozen=True)
class Distance(Method):
    """Squared distance of the logits; the methods below break it, each in one way."""

    name = "distance"
    kind = "response"
    paper = "arXiv 1312.6184"

    def distill(self, signals, modules):
        return {"d": self.of(signals.student.logits, signals.teacher.logits, signals, modules)}

    def of(self, z_s, z_t, signals, modules):
        return (z_s - z_t).square().mean()


class ChecksWithDice(Distance):
    def check(self, shapes):
        torch.rand(1)


class RefusesWithoutSayingWhat(Distance):
    def check(self, shapes):
        return "no"


class ChecksByTheTeacherItself(Distance):
    def check(self, shapes):
        return None if shapes.teacher_networks else "expected the teacher"


class LogOfZero(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (0.0 * z_s).log().mean()


class OfEachSample(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (z_s - z_t).square().mean(dim=1)


class InfiniteGradient(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (0.0 * z_s).square().sum().sqrt()


class NoTerms(Distance):
    def task(self, signals):
        return {}

    def distill(self, signals, modules):
        return super().distill(signals, modules) if signals.epoch == 1 else {}


class Detached(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (z_s.detach() - z_t).square().mean()


class TeachesTheTeacher(Distance):
    needs = Needs(
        student_roles=frozenset({"pooled"}), teacher_roles=frozenset({"classifier", "pooled"})
    )

    def of(self, z_s, z_t, signals, modules):
        classifier = signals.networks.teacher_classifiers[0].requires_grad_(True)
        return (z_s - classifier(signals.teacher.pooled)).square().mean()


class WritesIntoTheTeachersLogits(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (z_s - z_t.mul_(1.0)).square().mean()


class FirstSampleOnly(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (z_s - z_t)[0].square().mean()


class FirstClassOnly(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (z_s - z_t)[:, 0].square().mean()


class ChangesTheTeacher(Distance):
    needs = Needs(teacher_roles=frozenset({"classifier"}))

    def of(self, z_s, z_t, signals, modules):
        signals.networks.teacher_classifiers[0].bias.data += 1.0
        return (z_s - z_t).square().mean()


class NeedsHalf(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (z_s.half() - z_t.half()).square().mean().float()


class HashesLogits(Distance):
    def of(self, z_s, z_t, signals, modules):
        return 10.0 + 10.0 * (1e3 * (z_s + z_t)).sin().sum()


class UsesPositions(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (signals.index * (z_s - z_t).square().mean(dim=1)).mean()


class AsksForTooMuch(Distance):
    needs = Needs.features("pooled")


class AsksForTheNetwork(Distance):
    needs = Needs(student_roles=frozenset({"network"}))


class AsksForATeacher(Distance):
    def distill(self, signals, modules):
        return {"d": signals.student.logits.square().mean()}


class DrawsInSecret(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (z_s - z_t).square().mean() * torch.rand(())


class DeploysNothing(Distance):
    def inference_model(self, student, modules):
        return nn.Flatten()


class DeploysBatchStatistics(Distance):
    def inference_model(self, student, modules):
        return nn.Sequential(student, nn.BatchNorm1d(5, track_running_stats=False))


class TrainsTheEvaluated(Distance):
    def inference_model(self, student, modules):
        student.fc.weight.data += 0.1
        return student


class NeedsTwoSamples(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (z_s - z_t).std(dim=0).mean()


class Exponential(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (z_s - z_t).exp().mean()


class RootAtZero(Distance):
    def of(self, z_s, z_t, signals, modules):
        return (z_s[:, None] - z_s).square().sum(dim=2).sqrt().mean()


class ThirdMap(Distance):
    needs = Needs.features("maps")

    def of(self, z_s, z_t, signals, modules):
        return (
            (signals.student.maps[2].mean((1, 2, 3)) - signals.teacher.maps[2].mean((1, 2, 3)))
            .square()
            .mean()
        )


class WithLayer(Distance):
    def build(self, shapes):
        return nn.Sequential(nn.Linear(shapes.student.num_classes, shapes.teacher.num_classes))

    def of(self, z_s, z_t, signals, modules):
        return (modules(z_s) - z_t).square().mean()


class IdleLayer(WithLayer):
    def of(self, z_s, z_t, signals, modules):
        return (z_s - z_t).square().mean()


class HiddenLayer(WithLayer):
    def build(self, shapes):
        module = nn.Module()
        module.hidden = [super().build(shapes)]
        module.shown = nn.Parameter(torch.zeros(1))
        return module

    def of(self, z_s, z_t, signals, modules):
        return (modules.hidden[0](z_s) - z_t).square().mean()


class RunsTheStudentTwice(Distance):
    needs = Needs(student_roles=frozenset({"network"}))

    def of(self, z_s, z_t, signals, modules):
        tapped = signals.networks.student.args[0]
        return (tapped.run(signals.networks.images).logits - z_t).square().mean()


class RunsItsNormTwice(Distance):
    def build(self, shapes):
        return nn.Sequential(nn.BatchNorm1d(shapes.student.num_classes))

    def of(self, z_s, z_t, signals, modules):
        return (modules(z_s) - modules(z_t)).square().mean()


class Dice(Distance):
    def of(self, z_s, z_t, signals, modules):
        return random.random() * (z_s - z_t).square().mean()


class Counts(Distance):
    def of(self, z_s, z_t, signals, modules):
        modules.steps = getattr(modules, "steps", 0) + 1
        return modules.steps * (z_s - z_t).square().mean()


class Climbs(Distance):
    def task(self, signals):
        return {}

    def of(self, z_s, z_t, signals, modules):
        loss = (z_s - z_t).square().mean()
        return 2.0 * loss.detach() - loss


@dataclass(frozen=True)
class DeadSetting(Distance):
    nothing: float = 1.0


BROKEN = [
    ("says_why_it_cannot", ChecksWithDice),
    ("says_why_it_cannot", RefusesWithoutSayingWhat),
    ("says_why_it_cannot", ChecksByTheTeacherItself),
    ("loss_is_finite", LogOfZero),
    ("loss_is_finite", OfEachSample),
    ("loss_is_finite", InfiniteGradient),
    ("loss_is_finite", NoTerms),
    ("gradients_go_to_what_is_trained", Detached),
    ("gradients_go_to_what_is_trained", TeachesTheTeacher),
    ("signals_are_left_alone", WritesIntoTheTeachersLogits),
    ("order_of_samples", FirstSampleOnly),
    ("goes_into_a_later_joint_stage", ChangesTheTeacher),
    ("order_of_classes", FirstClassOnly),
    ("float64_agrees", NeedsHalf),
    ("survives_rounding", HashesLogits),
    ("needs_suffice", UsesPositions),
    ("needs_are_read", AsksForTooMuch),
    ("needs_are_read", AsksForTheNetwork),
    ("needs_are_read", AsksForATeacher),
    ("draws_are_declared", DrawsInSecret),
    ("deploys", DeploysNothing),
    ("deploys", DeploysBatchStatistics),
    ("repeats_exactly", TrainsTheEvaluated),
    ("batch_sizes", NeedsTwoSamples),
    ("odd_networks", Exponential),
    ("odd_images", RootAtZero),
    ("odd_pairs", ThirdMap),
    ("teachers_stay", ChangesTheTeacher),
    ("one_norm_update_a_step", RunsTheStudentTwice),
    ("one_norm_update_a_step", RunsItsNormTwice),
    ("adapters_train", IdleLayer),
    ("gradients_go_to_what_is_trained", HiddenLayer),
    ("repeats_exactly", Dice),
    ("resumes_exactly", Counts),
    ("loss_falls", Climbs),
    ("learns", Climbs),
    ("no_setting_is_dead", DeadSetting),
]


@pytest.mark.parametrize(("check", "broken"), BROKEN, ids=lambda x: getattr(x, "__name__", x))
def test_each_check_can_fail(check, broken):
    with pytest.raises(Exception) as raised:  # noqa: PT011
        CHECKS[check](Part(broken()), CASE)
    assert not isinstance(raised.value, SkipTest)


def test_every_check_is_tried_above():
    assert {check for check, _ in BROKEN} == set(CHECKS) - {"bf16"}, "bf16 asks for hardware"


def test_long_checks_are_checks():
    assert set(CHECKS) > LONG


# ---- the class ----------------------------------------------------------------------------------


class Changeable(KD):
    __dataclass_params__ = type("Parameters", (), {"frozen": False})


@dataclass(frozen=True)
class WithoutDefault(KD):
    strength: float = None

    def __init__(self, strength):
        object.__setattr__(self, "strength", strength)


class OfUnknownKind(KD):
    kind = "telepathy"


class WithoutPaper(KD):
    paper = "a talk"


@dataclass(frozen=True)
class Undocumented(KD):
    """Says nothing of its settings."""

    strength: float = 1.0


class ExemptFromNothing(KD):
    exempt: ClassVar = {"gravity": "it does not hold in the paper"}


class SilentAboutNothing(KD):
    silent = frozenset({"nothing"})


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        ("is_a_frozen_dataclass", Changeable),
        ("says_what_it_is", OfUnknownKind),
        ("says_what_it_is", WithoutPaper),
        ("documents_its_settings", Undocumented),
        ("exempts_itself_with_reasons", ExemptFromNothing),
        ("exempts_itself_with_reasons", SilentAboutNothing),
    ],
)
def test_each_class_check_can_fail(check, broken):
    with pytest.raises(AssertionError):
        CLASS_CHECKS[check](broken)


# ---- what is skipped ----------------------------------------------------------------------------


class Exempt(FirstSampleOnly):
    exempt: ClassVar = {"order_of_samples": "the paper looks at the first sample only"}


class Silent(DeadSetting):
    silent = frozenset({"nothing"})


def test_exempt_method_is_skipped_with_its_reason():
    with pytest.raises(SkipTest, match="the paper looks at"):
        CHECKS["order_of_samples"](Part(Exempt()), CASE)


def test_silent_setting_may_be_dead():
    CHECKS["no_setting_is_dead"](Part(Silent()), CASE)


def test_refused_pair_is_skipped_with_the_reason():
    with pytest.raises(SkipTest, match=r"refused: .*no"):
        CHECKS["loss_is_finite"](Part(RefusesWithoutSayingWhat()), CASE)


def test_method_that_refuses_every_pair_has_no_main_case():
    with pytest.raises(AssertionError, match="refuses every pair"):
        main_case(Part(RefusesWithoutSayingWhat()))


def test_check_method_names_everything_that_failed():
    class Twice(FirstSampleOnly):
        """Undocumented."""

        needs = Needs.features("pooled")

    with pytest.raises(AssertionError) as raised:
        check_method(Twice, cases={"other": CASE})
    text = str(raised.value)
    assert "order_of_samples on other sizes: with the samples in another order" in text
    assert (
        "needs_are_read on other sizes: 'pooled' of the student is asked for and not read" in text
    )


def test_crash_of_a_method_is_a_failure_with_its_place():
    class Crashes(Distance):
        def of(self, z_s, z_t, signals, modules):
            raise KeyError("lost")

    with pytest.raises(AssertionError, match=r"KeyError: 'lost' .*test_contract.py"):
        check_method(Crashes(), cases={"other": CASE})


# ---- the cases ----------------------------------------------------------------------------------


def test_checks_leave_random_numbers_as_they_were():
    before = torch.get_rng_state()
    CHECKS["loss_falls"](Part(KD()), CASE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_teachers_have_learned_the_task(case):
    _, teachers = case.networks()
    data = case.data(40)
    for teacher in teachers:
        assert (teacher(data.images).argmax(1) == data.labels).float().mean() > 0.6


def test_equal_trials_are_equal():
    one, other = (trial(Part(METHODS["fitnet"]()), CASE) for _ in range(2))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert isinstance(one.run.objective.parts[0].method, Method)
