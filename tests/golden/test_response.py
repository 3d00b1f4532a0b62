"""Losses on logits, and the modifiers CTKD and SDD, against slow second implementations.

As in test_methods.py, the slow side is scalars in Python loops, written from the formulas.
"""

from dataclasses import replace
from itertools import product
from math import cos, exp, pi

import numpy as np
import pytest
import torch
from golden_tools import SEEDS, assert_same, logit_signals, loss_of, random, signals

from smskd.methods.base import Networks
from smskd.methods.ctkd import CTKD
from smskd.methods.dist import DIST, correlation_distance
from smskd.methods.dkd import DKD
from smskd.methods.kd import KD
from smskd.methods.label_smoothing import LabelSmoothing
from smskd.methods.mlld import MLLD
from smskd.methods.nkd import NKD
from smskd.methods.scratch import Scratch
from smskd.methods.sdd import SDD
from smskd.methods.strong_view import CHANGES, MOVEMENTS, move, strong_view
from smskd.methods.tfkd_reg import TfKDReg
from smskd.methods.tfkd_self import TfKDSelf
from smskd.methods.ttm import TTM
from smskd.methods.wttm import WTTM, smoothness
from smskd.taps import Outputs

NOTHING = torch.nn.Module()
SIZES = [(1, 3), (4, 5)]  # batch, classes

# ---- the slow side ------------------------------------------------------------------------------


def slow_softmax(row, tau=1.0):
    exps = [torch.exp(z / tau) for z in row]
    return [e / sum(exps) for e in exps]


def slow_cross(p, q):
    return -sum(a * torch.log(b) for a, b in zip(p, q, strict=True))


def slow_kl(p, q):
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def slow_mean(values, weights=None):
    """Mean of the samples' losses, each times its weight."""
    values = list(values)
    weights = [1.0] * len(values) if weights is None else weights
    return sum(w * v for w, v in zip(weights, values, strict=True)) / len(values)


def slow_kd_rows(z_s, z_t, tau):
    rows = zip(z_s, z_t, strict=True)
    return [tau**2 * slow_kl(slow_softmax(t, tau), slow_softmax(s, tau)) for s, t in rows]


def slow_nkd_rows(z_s, z_t, labels, gamma, tau, with_target):
    rows = []
    for row_s, row_t, y in zip(z_s, z_t, labels.tolist(), strict=True):
        target = -slow_softmax(row_t)[y] * torch.log(slow_softmax(row_s)[y])
        kept = [c for c in range(len(row_s)) if with_target or c != y]
        q_s, q_t = ([row[c] for c in kept] for row in (row_s, row_t))
        others = slow_cross(slow_softmax(q_t, tau), slow_softmax(q_s, tau))
        rows.append(target + gamma * tau**2 * others)
    return rows


def slow_correlation(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    a, b = [v - mean_a for v in a], [v - mean_b for v in b]
    norms = [torch.sqrt(sum(v * v for v in row)) for row in (a, b)]
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norms[0] * norms[1])


def slow_dist(z_s, z_t, beta, gamma, tau):
    p_s, p_t = ([slow_softmax(row, tau) for row in z] for z in (z_s, z_t))
    inter = slow_mean(1 - slow_correlation(a, b) for a, b in zip(p_s, p_t, strict=True))
    intra = 0.0
    if len(z_s) > 1:
        columns = zip(zip(*p_s, strict=True), zip(*p_t, strict=True), strict=True)
        intra = slow_mean(1 - slow_correlation(a, b) for a, b in columns)
    return tau**2 * (beta * inter + gamma * intra)


def slow_powers(row, gamma):
    powers = [p**gamma for p in slow_softmax(row)]
    return sum(powers), [p / sum(powers) for p in powers]


def slow_ttm_rows(z_s, z_t, gamma, weighted):
    rows = []
    for row_s, row_t in zip(z_s, z_t, strict=True):
        size, q = slow_powers(row_t, gamma)
        rows.append((size if weighted else 1.0) * slow_kl(q, slow_softmax(row_s)))
    return rows


def slow_virtual(label, classes, confidence):
    share = (1 - confidence) / (classes - 1)
    return [
        torch.tensor(confidence if c == label else share, dtype=torch.float64)
        for c in range(classes)
    ]


def slow_gram(rows):
    return [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]


def slow_square_gap(a, b):
    return sum((x - y) ** 2 for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True))


def slow_levels(z_s, z_t, tau):
    """Averaged (instance, batch, class) of one view at one temperature."""
    p_s, p_t = ([slow_softmax(row, tau) for row in z] for z in (z_s, z_t))
    columns_s, columns_t = list(zip(*p_s, strict=True)), list(zip(*p_t, strict=True))
    return (
        slow_mean(slow_kd_rows(z_s, z_t, tau)),
        slow_square_gap(slow_gram(p_s), slow_gram(p_t)) / len(p_s),
        slow_square_gap(slow_gram(columns_s), slow_gram(columns_t)) / len(columns_s),
    )


def slow_share(values):
    """Part of the values that are not above their median."""
    ordered, middle = sorted(values), (len(values) - 1) / 2
    median = (ordered[int(middle)] + ordered[int(middle + 0.5)]) / 2
    return sum(int(v <= median) for v in values) / len(values)


def slow_regions(maps, weight, bias, scales):
    """Region logits [r][b] of (B, D, H, W); windows from floor(i H / m) to ceil((i + 1) H / m)."""
    _, depth, height, width = maps.shape
    regions = []
    for m in scales:
        for i, j in product(range(m), range(m)):
            rows = range(i * height // m, -(-(i + 1) * height // m))
            columns = range(j * width // m, -(-(j + 1) * width // m))
            cells = list(product(rows, columns))
            pooled = [
                [sum(one[d, r, c] for r, c in cells) / len(cells) for d in range(depth)]
                for one in maps
            ]
            regions.append(
                [
                    torch.stack([sum(map(torch.mul, w, h)) + b for w, b in zip(weight, bias)])  # noqa: B905
                    for h in pooled
                ]
            )
    return regions


def slow_sdd(rows_of, regions_s, regions_t, z_t, labels, weights, extra):
    """Mean over regions of the weighted mean of the losses that ``rows_of`` gives for a region."""
    whole = [max(range(len(z)), key=lambda c, z=z: z[c]) == y for z, y in zip(z_t, labels.tolist())]  # noqa: B905
    total = 0.0
    for z_s, z in zip(regions_s, regions_t, strict=True):
        right = [int(torch.stack(list(row)).argmax()) == y for row, y in zip(z, labels.tolist())]  # noqa: B905
        factors = [(extra if a != b else 1.0) for a, b in zip(right, whole, strict=True)]
        factors = [f * w for f, w in zip(factors, weights, strict=True)]
        total = total + slow_mean(rows_of(z_s, z), factors)
    return total / len(regions_s)


# ---- methods ------------------------------------------------------------------------------------


def with_logits(given, z):
    return given.with_logits(z, [t.logits for t in given.teachers])


def weighted(given, seed):
    return replace(given, weights=random(seed + 70, len(given.labels)).abs() + 0.5)


def assert_rows(method, given, scale, rows_of):
    """The method is ``scale`` times the mean of the slow rows, with weights on samples too."""
    for one in (given, weighted(given, 0)):
        weights = None if one.weights is None else list(one.weights)
        assert_same(
            lambda z, one=one: loss_of(method, with_logits(one, z)),
            lambda z, one=one, weights=weights: (
                scale * slow_mean(rows_of(z, one.teacher.logits), weights)
            ),
            [given.student.logits],
        )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize(
    "method", [NKD(), NKD(gamma=1.5, temperature=1.0), NKD(temperature=4.0, compat="sdd")]
)
def test_nkd(seed, batch, classes, method):
    given = logit_signals(seed, batch, classes)
    settings = (method.gamma, method.temperature, method.compat == "sdd")
    assert_rows(method, given, 1.0, lambda s, t: slow_nkd_rows(s, t, given.labels, *settings))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), [*SIZES, (3, 2)])
@pytest.mark.parametrize("method", [DIST(), DIST(weight=1.0, beta=0.5, gamma=2.0, temperature=1.0)])
def test_dist(seed, batch, classes, method):
    given = logit_signals(seed, batch, classes)
    settings = (method.beta, method.gamma, method.temperature)
    assert_same(
        lambda z: loss_of(method, with_logits(given, z)),
        lambda z: method.weight * slow_dist(z, given.teacher.logits, *settings),
        [given.student.logits],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize(
    "method", [TTM(), TTM(weight=1.0, gamma=1.5), WTTM(), WTTM(weight=2.0, gamma=0.7)]
)
def test_ttm_and_wttm(seed, batch, classes, method):
    given = logit_signals(seed, batch, classes)
    is_weighted = isinstance(method, WTTM)
    assert_rows(
        method, given, method.weight, lambda s, t: slow_ttm_rows(s, t, method.gamma, is_weighted)
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize("method", [TfKDSelf(), TfKDSelf(weight=0.4, temperature=20.0)])
def test_tfkd_self(seed, batch, classes, method):
    given = logit_signals(seed, batch, classes)
    scale = method.weight * method.multiplier / classes
    assert_rows(method, given, scale, lambda s, t: slow_kd_rows(s, t, method.temperature))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), [*SIZES, (2, 2)])
@pytest.mark.parametrize(
    "method", [TfKDReg(), TfKDReg(confidence=0.9, temperature=0.2, student_temperature=2.0)]
)
def test_tfkd_reg(seed, batch, classes, method):
    given = logit_signals(seed, batch, classes)

    def rows(z_s, _z_t):
        for z, y in zip(z_s, given.labels.tolist(), strict=True):
            u = slow_softmax(slow_virtual(y, classes, method.confidence), method.temperature)
            yield slow_kl(u, slow_softmax(z, method.student_temperature))

    assert_rows(method, given, method.weight * method.multiplier / classes, rows)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize("method", [LabelSmoothing(), LabelSmoothing(0.5, 0.3), TfKDSelf()])
def test_label_loss(seed, batch, classes, method):
    given = logit_signals(seed, batch, classes)
    smoothing = getattr(method, "smoothing", 0.0)

    def rows(z_s):
        for z, y in zip(z_s, given.labels.tolist(), strict=True):
            t = [(1 - smoothing) * (c == y) + smoothing / classes for c in range(classes)]
            yield slow_cross(t, slow_softmax(z))

    assert_same(
        lambda z: sum(method.task(with_logits(given, z)).values()),
        lambda z: method.ce_weight * slow_mean(rows(z)),
        [given.student.logits],
    )


def two_views(given, strong_s, strong_t):
    """Signals whose networks say the given logits of any images."""
    images = torch.randn(len(given.labels), 3, 4, 4, dtype=torch.float64)
    student, teacher = Outputs(strong_s), Outputs(strong_t)
    return replace(
        given, networks=Networks(images, lambda _images: student, (lambda _images: teacher,))
    )


def slow_mlld(z_s, z_t, strong_s, strong_t, temperatures):
    views = [(z_s, z_t), (strong_s, strong_t)]
    return sum(sum(slow_levels(s, t, tau)) for tau in temperatures for s, t in views)


def slow_mlkd(z_s, z_t, strong_s, strong_t, temperatures):
    p_t = [slow_softmax(row) for row in z_t]
    samples = slow_share([max(row) for row in p_t])
    classes = slow_share([sum(column) for column in zip(*p_t, strict=True)])
    total = 0.0
    for tau in temperatures:
        instance, batch, of_classes = slow_levels(z_s, z_t, tau)
        strong = (z_s, z_t) if tau in (2.0, 6.0) else (strong_s, strong_t)
        total = total + samples * (instance + batch) + classes * of_classes
        total = total + slow_mean(slow_kd_rows(*strong, tau))
    return total


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), [(1, 3), (3, 4)])
@pytest.mark.parametrize("compat", ["none", "mlkd"])
def test_mlld(seed, batch, classes, compat):
    given = logit_signals(seed, batch, classes)
    strong_s, strong_t = random(seed + 5, batch, classes), random(seed + 6, batch, classes)
    method = MLLD(weight=0.8, temperatures=(2.0, 3.0, 6.0), compat=compat)
    slow = {"none": slow_mlld, "mlkd": slow_mlkd}[compat]

    def slow_loss(z, strong):
        ce = slow_mean(
            -torch.log(slow_softmax(row)[y])
            for row, y in zip(strong, given.labels.tolist(), strict=True)
        )
        levels = slow(z, given.teacher.logits, strong, strong_t, method.temperatures)
        return 0.8 * levels + 0.1 * ce

    assert_same(
        lambda z, strong: loss_of(method, two_views(with_logits(given, z), strong, strong_t)),
        slow_loss,
        [given.student.logits, strong_s],
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_mlld_of_one_view(seed):
    given = weighted(logit_signals(seed, 3, 4), seed)
    z_t, method = given.teacher.logits, MLLD(strong=False)

    def slow_loss(z):
        total = 0.0
        for tau in method.temperatures:
            p_s, p_t = ([slow_softmax(row, tau) for row in x] for x in (z, z_t))
            grams = zip(slow_gram(p_s), slow_gram(p_t), strict=True)
            relations = [slow_square_gap([a], [b]) for a, b in grams]
            rows = map(torch.add, slow_kd_rows(z, z_t, tau), relations)
            total = total + slow_mean(rows, list(given.weights)) + slow_levels(z, z_t, tau)[2]
        return 0.9 * total

    assert_same(lambda z: loss_of(method, with_logits(given, z)), slow_loss, [given.student.logits])


# ---- modifiers ----------------------------------------------------------------------------------


def modified(modifier, method, given, modules=NOTHING):
    """Sum of the terms of a method behind a modifier."""
    terms = modifier.around(lambda one: method.distill(one, NOTHING), given, modules)
    return sum(terms.values())


class Theta(torch.nn.Module):
    """A module whose theta is a leaf of the comparison."""

    def __init__(self, theta):
        super().__init__()
        self.theta = theta

    def get_parameter(self, target):
        assert target == "theta"
        return self.theta


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("epoch", [1, 5, 10, 200])
@pytest.mark.parametrize("modifier", [CTKD(), CTKD(2.0, 5.0, 20)])
def test_ctkd(seed, epoch, modifier):
    given = logit_signals(seed, 3, 5, epoch=epoch)
    theta = random(seed + 3, 1)[0]
    progress = min(epoch, modifier.curriculum_epochs) / modifier.curriculum_epochs
    strength = -(1 - cos(pi * progress)) / 2

    def slow_loss(z, leaf):
        reversed_leaf = strength * leaf + float(theta) * (1 - strength)
        tau = modifier.temperature_range / (1 + torch.exp(-reversed_leaf))
        tau = modifier.lowest_temperature + tau
        return 0.9 * slow_mean(slow_kd_rows(z, given.teacher.logits, tau))

    assert_same(
        lambda z, leaf: modified(modifier, KD(temperature=1.0), with_logits(given, z), Theta(leaf)),
        slow_loss,
        [given.student.logits, theta],
    )


def spatial_signals(seed, labels, map_s, map_t, heads):
    """Signals whose logits are the classifiers' on the maps' means."""
    student, teacher = (lambda x, w=w, b=b: x @ w.T + b for w, b in heads)
    outputs = [
        Outputs(head(m.mean((2, 3))), spatial=m) for head, m in ((student, map_s), (teacher, map_t))
    ]
    networks = Networks(map_s, None, (), student, (teacher,))
    return replace(signals(*outputs, labels, epoch=5), networks=networks)


SDD_CASES = {  # student map, teacher map, scales
    "equal": ((2, 4, 4), (3, 4, 4), (1, 2)),
    "a MobileNet's 2 x 2": ((2, 2, 2), (1, 4, 4), (4,)),
    "no whole ratio": ((2, 3, 5), (2, 5, 4), (2, 3)),
    "one cell": ((2, 1, 1), (2, 2, 2), (1, 2)),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", SDD_CASES)
@pytest.mark.parametrize("method", [KD(), DKD(), NKD()])
def test_sdd(seed, case, method):
    shape_s, shape_t, scales = SDD_CASES[case]
    batch, classes = 2, 3
    labels = torch.tensor(np.random.default_rng(seed).integers(classes, size=batch))
    map_s, map_t = random(seed, batch, *shape_s), random(seed + 1, batch, *shape_t, scale=3.0)
    head_s, head_t = (
        (random(seed + i, classes, depth), random(seed + i, classes))
        for i, depth in ((2, shape_s[0]), (4, shape_t[0]))
    )
    weights = random(seed + 8, batch).abs()
    regions_t = slow_regions(map_t, *head_t, scales)
    z_t = [[v.item() for v in row] for row in slow_regions(map_t, *head_t, (1,))[0]]

    def rows_of(z_s, z):
        if method.name == "kd":
            return [0.9 * row for row in slow_kd_rows(z_s, z, 4.0)]
        if method.name == "nkd":
            return slow_nkd_rows(z_s, z, labels, 3.5, 3.0, False)
        return slow_dkd_rows(z_s, z, labels)

    def fast(m, w, b):
        given = spatial_signals(seed, labels, m, map_t, [(w, b), head_t])
        return modified(SDD(scales, 3.0), method, replace(given, weights=weights))

    def slow(m, w, b):
        regions_s = slow_regions(m, w, b, scales)
        return slow_sdd(rows_of, regions_s, regions_t, z_t, labels, list(weights), 3.0)

    assert_same(fast, slow, [map_s, *head_s])


def slow_dkd_rows(z_s, z_t, labels):
    """DKD of default settings in epoch 5 of 20 of its warm-up."""
    rows = []
    for row_s, row_t, y in zip(z_s, z_t, labels.tolist(), strict=True):
        split = []
        for row in (row_t, row_s):
            p = slow_softmax(row, 4.0)
            rest = sum(p[c] for c in range(len(p)) if c != y)
            split.append(([p[y], rest], [p[c] / rest for c in range(len(p)) if c != y]))
        (b_t, q_t), (b_s, q_s) = split
        rows.append(0.25 * 16 * (slow_kl(b_t, b_s) + 8 * slow_kl(q_t, q_s)))
    return rows


# ---- facts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_power_of_one_is_kd_of_temperature_one(seed):
    given = logit_signals(seed, 4, 6)
    kd = loss_of(KD(weight=2.0, temperature=1.0), given)
    for method in (TTM(weight=2.0, gamma=1.0), WTTM(weight=2.0, gamma=1.0)):
        torch.testing.assert_close(loss_of(method, given), kd, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "method", [NKD(), DIST(), TTM(), WTTM(), TfKDSelf(), TfKDReg(), MLLD(strong=False)]
)
def test_a_shift_of_the_logits_changes_nothing(method):
    given = logit_signals(2, 4, 6)
    shift = random(5, 4, 1, scale=10.0)
    shifted = given.with_logits(given.student.logits + shift, [given.teacher.logits - 3 * shift])
    torch.testing.assert_close(
        loss_of(method, given), loss_of(method, shifted), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
def test_smoothness_lies_between_a_sure_and_a_clueless_teacher(gamma):
    sure, clueless = torch.tensor([[300.0, 0, 0, 0]]).double(), torch.zeros(1, 4).double()
    values = [smoothness(signals(Outputs(z), Outputs(z)), gamma) for z in (sure, clueless)]
    assert values[0].item() == pytest.approx(1.0, abs=1e-12)
    assert values[1].item() == pytest.approx(4 ** (1 - gamma))
    given = logit_signals(1, 50, 4)
    assert (smoothness(given, gamma) >= values[0]).all()
    assert (smoothness(given, gamma) <= values[1]).all()


@pytest.mark.parametrize("classes", [2, 10])
def test_tfkd_self_is_kd_of_another_weight(classes):
    given = logit_signals(2, 3, classes)
    kd = KD(weight=0.95 * 50 / classes, temperature=6.0)
    torch.testing.assert_close(loss_of(TfKDSelf(), given), loss_of(kd, given), rtol=1e-12, atol=0)


def test_the_virtual_teacher_of_100_classes_is_nearly_uniform():
    # The best student says softmax(v / 20): 5 % more for the true class, as the module says.
    z = torch.zeros(1, 100, dtype=torch.float64)
    z[0, 7] = (0.99 - 0.01 / 99) / 20
    given = signals(Outputs(z), Outputs(z), torch.tensor([7]))
    assert loss_of(TfKDReg(), given).abs() < 1e-15
    assert exp(z[0, 7].item()) == pytest.approx(1.05, abs=1e-3)


def test_label_smoothing_of_zero_is_plain_and_without_weight_nothing():
    given = logit_signals(3, 4, 5)
    assert LabelSmoothing(smoothing=0.0).task(given) == Scratch().task(given)
    assert LabelSmoothing(ce_weight=0.0).task(given) == {}
    assert LabelSmoothing().distill(given, NOTHING) == {}


def test_dist_vanishes_with_its_gradient_at_the_teacher():
    given = logit_signals(1, 4, 6)
    z = given.teacher.logits.clone().requires_grad_()
    loss = loss_of(DIST(), with_logits(given, z))
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert z.grad.abs().max() < 1e-12


def test_dist_finds_no_relation_between_the_samples_of_a_batch_of_one():
    assert DIST().distill(logit_signals(1, 1, 6), NOTHING)["intra"] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_correlation_ignores_scale_and_offset(seed):
    rows = random(seed, 5, 6).abs()
    scale, offset = random(seed + 1, 5, 1).abs() + 0.5, random(seed + 2, 5, 1).abs() + 20.0
    for sign, distance in ((1, 0.0), (-1, 2.0)):
        changed = (sign * scale * rows + offset).log()
        assert (correlation_distance(changed, rows.log()) - distance).abs().max() < 1e-12


def test_correlation_knows_probabilities_that_underflow():
    log_t = torch.tensor([[-200.0, -202.0, -201.0]])  # exp of them is 0 in float32
    log_s = (log_t * 1.1).requires_grad_()
    distance = correlation_distance(log_s, log_t)
    distance.backward()
    p = np.exp(log_s.detach().double().numpy()[0]), np.exp(log_t.double().numpy()[0])
    assert distance.item() == pytest.approx(1 - np.corrcoef(*p)[0, 1], abs=1e-5)
    assert log_s.grad.isfinite().all()
    assert log_s.grad.abs().max() > 1e-3


def test_constant_rows_have_no_gradient():
    student = torch.full((3, 100), 0.01).log().requires_grad_()  # not exact in float32
    teacher = torch.rand(3, 100).log()
    distance = correlation_distance(student, teacher)
    distance.sum().backward()
    assert torch.equal(distance, torch.ones(3))
    assert student.grad.abs().max() == 0
    assert torch.equal(correlation_distance(teacher, student.detach()), torch.ones(3))
    assert torch.equal(correlation_distance(teacher[:, :1], teacher[:, 1:2]), torch.zeros(3))


def test_nkd_without_the_quirk_has_a_term_that_is_least_at_the_teacher():
    given = logit_signals(1, 4, 6)
    z = given.teacher.logits.clone().requires_grad_()
    NKD().distill(with_logits(given, z), NOTHING)["others"].backward()
    assert z.grad.abs().max() < 1e-13
    raised = z.detach().clone()
    raised[range(4), given.labels] += 5.0
    same, other = (with_logits(given, x) for x in (z.detach(), raised))
    for compat, moved in (("none", False), ("sdd", True)):
        method = NKD(compat=compat)
        values = [method.distill(one, NOTHING)["others"] for one in (same, other)]
        assert bool((values[0] - values[1]).abs() > 1e-9) == moved


def test_nkd_is_exact_where_probabilities_underflow():
    # exp(-2000) is 0 in float64; the cross-entropies are differences of logits and stay exact.
    z_t = torch.tensor([[2000.0, 0.0, 0.0]], dtype=torch.float64)
    z_s = torch.tensor([[0.0, 2000.0, 0.0]], dtype=torch.float64)
    terms = NKD(gamma=1.0, temperature=1.0).distill(signals(Outputs(z_s), Outputs(z_t)), NOTHING)
    assert terms["target"].item() == pytest.approx(2000.0, rel=1e-15)
    assert terms["others"].item() == pytest.approx(1000.0, rel=1e-15)


def test_mlkd_scales_the_plain_view_by_a_half():
    given = logit_signals(4, 6, 8)
    whole, halved = (MLLD(strong=False, compat=c).distill(given, NOTHING) for c in ("none", "mlkd"))
    for name, term in whole.items():
        torch.testing.assert_close(halved[name], term / 2, rtol=1e-12, atol=0)


def test_mlld_says_where_the_label_loss_of_the_strong_view_is():
    given = logit_signals(4, 6, 8)
    both = two_views(given, random(1, 6, 8), random(2, 6, 8))
    assert set(MLLD().distill(both, NOTHING)) == {"instance", "batch", "class", "ce_strong"}
    assert "ce_strong" not in MLLD(ce_weight=0.0).distill(both, NOTHING)


def test_ctkd_starts_at_the_published_temperature_and_turns_the_gradient_round():
    modifier, given = CTKD(), logit_signals(1, 3, 5)
    modules = modifier.build(None)
    assert [name for name, _ in modules.named_parameters()] == ["theta"]
    seen = []
    modifier.around(lambda one: seen.append(one) or {}, given, modules)
    tau = (given.student.logits / seen[0].student.logits).mean().item()
    assert tau == pytest.approx(15.6, abs=0.03)
    strengths = [modifier.strength(epoch) for epoch in range(1, 15)]
    assert strengths[0] == pytest.approx(-0.0245, abs=1e-4)
    assert strengths[4] == pytest.approx(-0.5)
    assert strengths[9:] == [-1.0] * 5
    assert strengths == sorted(strengths, reverse=True)
    assert CTKD(curriculum_epochs=0).strength(1) == -1.0


@pytest.mark.parametrize("method", [KD(), DKD(), NKD(), DIST(), TTM(), WTTM()])
def test_sdd_of_the_whole_image_is_the_method(method):
    labels = torch.tensor([0, 1, 2, 1])
    head = (random(1, 5, 3), random(2, 5))
    maps = random(3, 4, 3, 4, 4), random(4, 4, 3, 2, 2)
    given = spatial_signals(0, labels, *maps, [head, head])
    torch.testing.assert_close(
        modified(SDD(scales=(1,)), method, given), loss_of(method, given), rtol=1e-10, atol=1e-12
    )


def test_sdd_counts_contradictions_twice():
    # Two regions at scale 2 x 2: the teacher sees class 1 in one corner, class 0 on the whole.
    corner = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    corner[0, 0] = 1.0
    corner[0, :, 1, 1] = torch.tensor([0.0, 2.0])
    head = (torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    for label, expected in ((0, [1.0, 1.0, 1.0, 2.0]), (1, [1.0, 1.0, 1.0, 2.0])):
        given = spatial_signals(0, torch.tensor([label]), corner, corner, [head, head])
        seen = []
        SDD(scales=(2,)).around(lambda one, seen=seen: seen.append(one) or {}, given, NOTHING)
        assert [one.weights.item() for one in seen] == expected


# ---- the strong view ----------------------------------------------------------------------------

FLAT = {change.__name__: change for change in CHANGES}


def slow_change(name, image, u):
    """One (C, H, W) image of plain numbers under one operation of strength u."""
    channels, height, width = image.shape
    places = list(product(range(height), range(width)))
    v, out = 0.05 + 0.9 * u, image.copy()
    grey = image.sum(0) / channels
    for c, (i, j) in product(range(channels), places):
        x, values = image[c, i, j], [image[c, r, s] for r, s in places]
        if name == "stretch":
            new = (x - min(values)) / (max(values) - min(values))
        elif name == "equalise":
            lowest = values.count(min(values))
            new = (sum(y <= x for y in values) - lowest) / (len(values) - lowest)
        elif name == "darken":
            new = v * x
        elif name == "bleach":
            new = v * x + (1 - v) * grey[i, j]
        elif name == "flatten_contrast":
            new = v * x + (1 - v) * grey.sum() / len(places)
        elif name == "blur":
            near = [image[c, r, s] for r, s in places if abs(r - i) <= 1 and abs(s - j) <= 1]
            new = v * x + (1 - v) * (9 * sum(near) / len(near) + 4 * x) / 13
        elif name == "posterise":
            step = 2 ** (8 - int(4 + 4 * u))
            new = int(255 * x / step) * step / 255
        else:
            new = {"keep": x, "solarise": 1 - x if x >= u else x}[name]
        out[c, i, j] = new
    return out


@pytest.mark.parametrize("name", FLAT)
def test_changes_of_colour(name):
    images = torch.rand(3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    images[1, 0] = images[1, 0].round(decimals=1)  # ties
    strength = torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64).view(3, 1, 1, 1)
    fast = FLAT[name](images, strength)
    for one, image, u in zip(fast, images, strength.flatten().tolist(), strict=True):
        np.testing.assert_allclose(one, slow_change(name, image.numpy(), u), atol=1e-12)


def slow_move(image, which, u):
    _, height, width = image.shape
    s, out = 2 * u - 1, np.zeros_like(image)
    angle = s * pi / 6
    for i, j in product(range(height), range(width)):
        y, x = i - (height - 1) / 2, j - (width - 1) / 2
        source = {
            0: (x * cos(angle) - y * np.sin(angle), y * cos(angle) + x * np.sin(angle)),
            1: (x + 0.3 * s * y, y),
            2: (x, y + 0.3 * s * x),
            3: (x + 0.3 * s * width, y),
            4: (x, y + 0.3 * s * height),
        }.get(which, (x, y))
        c, r = round(source[0] + (width - 1) / 2), round(source[1] + (height - 1) / 2)
        if 0 <= r < height and 0 <= c < width:
            out[:, i, j] = image[:, r, c]
    return out


@pytest.mark.parametrize("which", [-1, 0, 1, 2, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 9)])
def test_movements(which, height, width):
    images = random(1, 3, 2, height, width)
    strength = torch.tensor([0.13, 0.5, 0.91], dtype=torch.float64)
    fast = move(images, torch.full((3,), which), strength)
    for one, image, u in zip(fast, images, strength.tolist(), strict=True):
        np.testing.assert_array_equal(one, slow_move(image.numpy(), which, u))


def test_a_seed_decides_the_strong_view():
    images = random(1, 6, 3, 8, 8).float()
    before = images.clone()
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(strong_view(images))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert torch.equal(images, before)
    assert views[0].shape == images.shape
    assert views[0].dtype == torch.float32


def test_a_strong_view_stays_in_range_and_differs_from_image_to_image():
    images = random(1, 1, 3, 8, 8).repeat(40, 1, 1, 1)
    torch.manual_seed(3)
    view = strong_view(images)
    assert view.max() <= images.max() + 1e-9
    assert view.min() >= images.min() - 1e-9
    assert len({tuple(one.flatten().tolist()) for one in view}) > 35
    assert len(CHANGES) + MOVEMENTS == 14


def test_a_strong_view_without_operations_only_has_a_hole():
    images = random(1, 50, 3, 8, 8)
    torch.manual_seed(4)
    view = strong_view(images, distortions=0)
    hole = view == 0
    torch.testing.assert_close(view[~hole], images[~hole], rtol=1e-12, atol=1e-12)
    assert torch.equal(hole[:, 0], hole[:, 2])
    sizes = hole[:, 0].sum((1, 2))
    assert sizes.max() <= 25  # half the width is 4 pixels and the one it ends on
    for one in hole[:, 0]:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns[None, :])


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_strong_view_of_flat_images_is_finite(value):
    assert strong_view(torch.full((9, 3, 4, 4), value)).isfinite().all()
