"""Relation and contrast losses against second implementations that are written from the formulas.

As in test_methods.py, the slow side is scalar Python loops in float64, and its gradient autograd's
through them. Random draws (negatives, dropout) are drawn again from the same state.
"""

import copy
import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from golden_tools import SEEDS, assert_same, logit_signals, loss_of, map_signals, random, signals

from smskd.errors import ConfigError, IncompatibleError
from smskd.methods import METHODS, PairShapes
from smskd.methods.base import Networks
from smskd.methods.cc import CC, taylor_kernel
from smskd.methods.crd import CRD
from smskd.methods.ickd import ICKD
from smskd.methods.kd import KD
from smskd.methods.pkt import PKT
from smskd.methods.rdd import RDD
from smskd.methods.sp import SP
from smskd.methods.ssd import SSD
from smskd.taps import Outputs, Shapes

# ---- what both sides share ----------------------------------------------------------------------


def feature_signals(h_s, h_t, index=None):
    z = torch.zeros(len(h_s), 3, dtype=torch.float64)
    given = signals(Outputs(z, pooled=h_s), Outputs(z, pooled=h_t))
    return given if index is None else replace(given, index=index)


def pooled_shapes(width_s, width_t, **more):
    return PairShapes(Shapes(3, pooled=width_s), (Shapes(3, pooled=width_t),), **more)


class Fixed(torch.nn.Module):
    """A module with other values in place of its parameters."""

    def __init__(self, module, values):
        super().__init__()
        names = [name for name, _ in module.named_parameters()]
        self.module, self.values = [module], dict(zip(names, values, strict=True))

    def forward(self, *inputs):
        return torch.func.functional_call(self.module[0], self.values, inputs)


def random_parameters(module, seed):
    return [random(seed + i, *p.shape) for i, p in enumerate(module.parameters())]


# ---- the slow side ------------------------------------------------------------------------------


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(row):
    length = torch.sqrt(dot(row, row))
    return [x / length for x in row]


def linear(row, weight, bias):
    return [dot(row, w) + b for w, b in zip(weight, bias, strict=True)]


def softmax(row):
    exps = [torch.exp(z) for z in row]
    return [e / sum(exps) for e in exps]


def kl(p, q):
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def slow_pkt(h_s, h_t, eps=1e-7):
    n, both = len(h_s), []
    for h in (h_s, h_t):
        units = [unit(row) for row in h]
        near = [[(dot(a, b) + 1) / 2 for b in units] for a in units]
        both.append([[x / sum(row) for x in row] for row in near])
    p_s, p_t = both
    return (
        sum(
            p_t[i][j] * torch.log((p_t[i][j] + eps) / (p_s[i][j] + eps))
            for i in range(n)
            for j in range(n)
        )
        / n**2
    )


def slow_cc(h_s, h_t, weights, pairs):
    e_s = [linear(row, weights[0], weights[1]) for row in h_s]
    e_t = [linear(row, weights[2], weights[3]) for row in h_t]
    gaps = [[abs(a - b) for a, b in zip(x, y, strict=True)] for x, y in zip(e_s, e_t, strict=True)]
    if not pairs:
        return 0.0 * sum(gaps[0])
    return sum(dot(gaps[i], gaps[j]) for i, j in pairs) / len(pairs)


def slow_cc_paper(h_s, h_t, weights, gamma, order):
    n, kernels = len(h_s), []
    for h, weight, bias in ((h_s, *weights[:2]), (h_t, *weights[2:])):
        units = [unit(linear(row, weight, bias)) for row in h]
        kernels.append(
            [
                [
                    sum(
                        math.exp(-2 * gamma) * (2 * gamma * dot(a, b)) ** p / math.factorial(p)
                        for p in range(order + 1)
                    )
                    for b in units
                ]
                for a in units
            ]
        )
    k_s, k_t = kernels
    return sum((k_s[i][j] - k_t[i][j]) ** 2 for i in range(n) for j in range(n)) / n**2


def slow_adapter(f, conv, scale, shift, eps=1e-5):
    """1x1 convolution and batch norm in training mode: lists [b][c][position]."""
    places = [[list(channel.reshape(-1)) for channel in sample] for sample in f]
    size = range(len(places[0][0]))
    out = [
        [[sum(w[c] * sample[c][i] for c in range(len(sample))) for i in size]
         for w in conv.reshape(len(conv), -1)]
        for sample in places
    ]  # fmt: skip
    for c in range(len(conv)):
        values = [out[b][c][i] for b in range(len(out)) for i in size]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        for b in range(len(out)):
            out[b][c] = [
                (v - mean) / torch.sqrt(variance + eps) * scale[c] + shift[c] for v in out[b][c]
            ]
    return out


def slow_ickd(f_s, f_t, weights):
    adapted = slow_adapter(f_s, *weights)
    total = 0.0
    for one_s, one_t in zip(adapted, f_t, strict=True):
        flat_t = [list(channel.reshape(-1)) for channel in one_t]
        grams = [[unit([dot(a, b) for b in flat]) for a in flat] for flat in (one_s, flat_t)]
        total = total + sum(
            (a - b) ** 2
            for row_s, row_t in zip(*grams, strict=True)
            for a, b in zip(row_s, row_t, strict=True)
        )
    return total / (len(f_t) * f_t.shape[1])


def slow_ssd(h_s, h_t, keep, share, divisor, percentile):
    """``keep`` says what of the teacher's feature stays, ``(B, passes, D)``."""
    total = 0.0
    for one_s, one_t, masks in zip(h_s, h_t, keep, strict=True):
        noisy = [
            [x / (1 - share) if m else 0.0 * x for x, m in zip(one_t, mask, strict=True)]
            for mask in masks
        ]
        a = softmax([dot(one_s, row) / divisor for row in noisy])
        values = sorted(x.item() for x in a)
        place = percentile / 100 * (len(values) - 1)
        low = math.floor(place)
        high = min(low + 1, len(values) - 1)
        threshold = values[low] + (place - low) * (values[high] - values[low])
        chosen = [x.item() >= threshold for x in a]
        kept = sum(x for x, c in zip(a, chosen, strict=True) if c)
        target = [
            sum(x / kept * row[d] for x, c, row in zip(a, chosen, noisy, strict=True) if c)
            for d in range(len(one_t))
        ]
        total = total + sum((x - y) ** 2 for x, y in zip(one_s, target, strict=True)) / len(one_t)
    return total / len(h_s)


def slow_contrast(anchors, bank, index, drawn, temperature, log_z, eps=1e-7):
    """One direction of CRD: the mean loss, and log Z, estimated if it is None."""
    count, samples = len(drawn[0]), len(bank)
    exps = [
        [torch.exp(dot(v, bank[j]) / temperature) for j in (i, *negatives)]
        for v, i, negatives in zip(anchors, index, drawn, strict=True)
    ]
    if log_z is None:
        log_z = math.log(samples * sum(e.item() for row in exps for e in row)
                         / (len(exps) * (count + 1)))  # fmt: skip
    noise, total = count / samples, 0.0
    for positive, *negatives in exps:
        p = positive / math.exp(log_z)
        total = total - torch.log(p / (p + noise + eps))
        for negative in negatives:
            total = total - torch.log(noise / (negative / math.exp(log_z) + noise + eps))
    return total / len(exps), log_z


def slow_remember(bank, index, anchors, momentum):
    rows = [[x.item() for x in row] for row in bank]
    for i, v in zip(index, anchors, strict=True):
        mixed = [momentum * m + (1 - momentum) * x.item() for m, x in zip(rows[i], v, strict=True)]
        length = math.sqrt(sum(m * m for m in mixed))
        rows[i] = [m / length for m in mixed]
    return torch.tensor(rows, dtype=torch.float64)


def slow_weighed_ce(z_s, labels, weights):
    rows = zip(z_s, labels.tolist(), weights, strict=True)
    return sum(w * -torch.log(softmax(row)[y]) for row, y, w in rows)


# ---- comparisons --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "width_s", "width_t"), [(1, 3, 2), (3, 4, 4), (5, 2, 6)])
def test_pkt(seed, batch, width_s, width_t):
    h_s, h_t = random(seed, batch, width_s), random(seed + 9, batch, width_t, scale=3.0)
    assert_same(
        lambda h: loss_of(PKT(), feature_signals(h, h_t)),
        lambda h: 30000.0 * slow_pkt(h, h_t),
        [h_s],
    )


CC_CASES = {
    "pairs": (CC(dim=3), lambda n: [(i, j) for i in range(n) for j in range(n) if i != j]),
    "neighbours": (
        CC(dim=2, weight=0.5, compat="repdistiller"),
        lambda n: [(i, i + 1) for i in range(n - 1)],
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CC_CASES)
@pytest.mark.parametrize(("batch", "width_s", "width_t"), [(1, 3, 2), (2, 2, 2), (5, 2, 4)])
def test_cc(seed, case, batch, width_s, width_t):
    method, pairs = CC_CASES[case]
    h_s, h_t = random(seed, batch, width_s), random(seed + 9, batch, width_t)
    module = method.build(pooled_shapes(width_s, width_t)).double()
    assert_same(
        lambda h, *w: loss_of(method, feature_signals(h, h_t), Fixed(module, w)),
        lambda h, *w: method.weight * slow_cc(h, h_t, w, pairs(batch)),
        [h_s, *random_parameters(module, seed + 20)],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", [CC(form="paper", dim=3), CC(form="paper", gamma=1.1, order=4)])
@pytest.mark.parametrize("batch", [1, 4])
def test_cc_of_the_paper(seed, method, batch):
    method = replace(method, dim=3)
    h_s, h_t = random(seed, batch, 2), random(seed + 9, batch, 4)
    module = method.build(pooled_shapes(2, 4)).double()
    assert_same(
        lambda h, *w: loss_of(method, feature_signals(h, h_t), Fixed(module, w)),
        lambda h, *w: 0.02 * slow_cc_paper(h, h_t, w, method.gamma, method.order),
        [h_s, *random_parameters(module, seed + 20)],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("batch", "shape_s", "shape_t"),
    [(1, (2, 2, 2), (3, 3, 3)), (3, (3, 2, 2), (2, 1, 3)), (2, (1, 2, 1), (4, 2, 2))],
)
def test_ickd(seed, batch, shape_s, shape_t):
    f_s, f_t = random(seed, batch, *shape_s), random(seed + 7, batch, *shape_t)
    shapes = PairShapes(Shapes(3, maps=(shape_s,)), (Shapes(3, maps=(shape_t,)),))
    module = ICKD().build(shapes).double()
    assert [name for name, _ in module.named_parameters()] == [
        "conv.weight", "norm.weight", "norm.bias"
    ]  # fmt: skip
    assert_same(
        lambda f, *w: loss_of(ICKD(), map_signals([f], [f_t]), Fixed(module, w)),
        lambda f, *w: 2.5 * slow_ickd(f, f_t, w),
        [f_s, *random_parameters(module, seed + 20)],
    )


SSD_METHODS = [
    SSD(),
    SSD(passes=7, dropout=0.5, divisor=1.0, percentile=50.0, weight=2.0),
    SSD(passes=11, percentile=90.0),
    SSD(passes=4, percentile=0.0, dropout=0.3),
    SSD(passes=3, percentile=100.0),
    SSD(passes=1),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", SSD_METHODS)
@pytest.mark.parametrize(("batch", "width_s"), [(1, 4), (2, 6)])
def test_ssd(seed, method, batch, width_s):
    h_s, h_t = random(seed, batch, width_s), random(seed + 9, batch, 6, scale=2.0)
    module = method.build(pooled_shapes(width_s, 6)).double()
    weights = random_parameters(module, seed + 20)
    torch.manual_seed(seed)
    keep = torch.rand(batch, method.passes, 6) >= method.dropout

    def fast(h, *w):
        torch.manual_seed(seed)
        return loss_of(method, feature_signals(h, h_t), Fixed(module, w))

    def slow(h, *w):
        projected = [linear(row, *w) for row in h] if w else h
        settings = (method.dropout, method.divisor, method.percentile)
        return method.weight * slow_ssd(projected, h_t, keep, *settings)

    assert_same(fast, slow, [h_s, *weights])


CRD_METHODS = [CRD(dim=3, negatives=5), CRD(dim=2, negatives=3, temperature=0.5, momentum=0.9)]
CRD_LABELS = torch.tensor([0, 2, 1, 0, 1, 1, 2, 0, 0, 1, 3])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", CRD_METHODS)
@pytest.mark.parametrize("index", [[4], [9, 1, 3, 10]])
def test_crd_over_two_steps(seed, method, index):
    index, batch = torch.tensor(index), len(index)
    shapes = pooled_shapes(2, 4, num_train=len(CRD_LABELS), train_labels=CRD_LABELS)
    torch.manual_seed(seed)
    module = method.build(shapes).double()
    weights = random_parameters(module, seed + 20)
    bank_s, bank_t = module.bank_s.clone(), module.bank_t.clone()
    log_z = [None, None]
    for step in range(2):
        h_s, h_t = random(seed + step, batch, 2), random(seed + 9 + step, batch, 4)
        torch.manual_seed(seed + step)
        drawn = module.negatives(index).tolist()
        kept = []  # the module after the fast side's step; each closure starts from the same state

        def fast(h, *w, h_t=h_t, step=step, kept=kept, module=module):
            torch.manual_seed(seed + step)
            kept.append(copy.deepcopy(module))
            return loss_of(method, feature_signals(h, h_t, index), Fixed(kept[-1], w))

        def embedded(h, h_t, w):
            return [
                [unit(linear(row, *pair)) for row in rows]
                for rows, pair in ((h, w[:2]), (h_t, w[2:]))
            ]

        def slow(h, *w, h_t=h_t, banks=(bank_s, bank_t), drawn=drawn, log_z=tuple(log_z)):
            v_s, v_t = embedded(h, h_t, w)
            tau = method.temperature
            loss_s, _ = slow_contrast(v_s, banks[1], index.tolist(), drawn, tau, log_z[0])
            loss_t, _ = slow_contrast(v_t, banks[0], index.tolist(), drawn, tau, log_z[1])
            return 0.8 * (loss_s + loss_t)

        assert_same(fast, slow, [h_s, *weights])
        v_s, v_t = embedded(h_s, h_t, weights)
        tau = method.temperature
        log_z[0] = slow_contrast(v_s, bank_t, index.tolist(), drawn, tau, log_z[0])[1]
        log_z[1] = slow_contrast(v_t, bank_s, index.tolist(), drawn, tau, log_z[1])[1]
        bank_s = slow_remember(bank_s, index.tolist(), v_s, method.momentum)
        bank_t = slow_remember(bank_t, index.tolist(), v_t, method.momentum)
        module = kept[-1]
        torch.testing.assert_close(module.bank_s, bank_s, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(module.bank_t, bank_t, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            module.log_z, torch.tensor(log_z, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


def rdd_signals(seed, batch, classes, epoch=1, epochs=240):
    """Logits of both networks and those of the teacher's answer to the mirrored images."""
    given = replace(logit_signals(seed, batch, classes, epoch=epoch), epochs=epochs)
    images = random(seed, batch, 1, 2, 3)
    aux = given.teacher.logits + random(seed + 5, batch, classes)

    def teacher(shown):
        assert torch.equal(shown, images.flip(-1))
        return Outputs(aux)

    def student(_shown):
        raise AssertionError("the student is not run again")

    return replace(given, networks=Networks(images, student, (teacher,))), aux


def slow_rdd(z_s, given, aux, lam, threshold):
    labels, z_t = given.labels, given.teacher.logits
    total = 0.0
    if lam > 0:
        trust = [torch.exp(-kl(softmax(a), softmax(t))) for a, t in zip(aux, z_t, strict=True)]
        total = total + lam * slow_weighed_ce(z_s, labels, trust) / len(z_s)
    if lam < 1:
        hard = [
            [
                (softmax(row)[y] <= threshold).item()
                for row, y in zip(z, labels.tolist(), strict=True)
            ]
            for z in (z_s, z_t)
        ]
        differ = [float(a != b) for a, b in zip(*hard, strict=True)]
        total = total + (1 - lam) * slow_weighed_ce(z_s, labels, differ) / max(sum(differ), 1.0)
    return total


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), [(1, 3), (6, 4)])
@pytest.mark.parametrize(
    ("method", "epoch", "lam"),
    [
        (RDD(), 3, 1.0),
        (RDD(phase="student"), 3, 0.0),
        (RDD(phase="student", threshold=0.3, ce_weight=0.5), 3, 0.0),
        (RDD(phase="blend"), 1, 1.0),
        (RDD(phase="blend", threshold=0.5), 4, 0.4),
        (RDD(phase="blend"), 6, 0.0),
    ],
)
def test_rdd(seed, batch, classes, method, epoch, lam):
    given, aux = rdd_signals(seed, batch, classes, epoch, epochs=6)

    def fast(z):
        return sum(method.task(replace(given, student=Outputs(z))).values())

    assert_same(
        fast,
        lambda z: method.ce_weight * slow_rdd(z, given, aux, lam, method.threshold),
        [given.student.logits],
    )
    plain = replace(given, networks=None)
    kd = KD(weight=1.0, temperature=1.0)
    assert torch.equal(loss_of(method, plain), loss_of(kd, plain))


# ---- facts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [CC, PKT, CRD, ICKD, SSD, RDD])
def test_registered_under_its_name(cls):
    assert METHODS[cls.name] is cls


@pytest.mark.parametrize("factor", [1e-2, 1e3])
def test_pkt_ignores_the_scale_of_features(factor):
    h_s, h_t = random(3, 5, 4), random(4, 5, 6)
    torch.testing.assert_close(
        loss_of(PKT(), feature_signals(h_s, h_t)),
        loss_of(PKT(), feature_signals(factor * h_s, h_t / factor)),
        rtol=1e-10,
        atol=0,
    )
    assert loss_of(PKT(), feature_signals(h_t, h_t)) == 0


def test_pkt_of_a_mirrored_student_is_that_of_unlike_neighbours():
    # Two opposite samples: P is (1, 0) in each row; to a student whose samples agree, (1/2, 1/2).
    h_t, h_s = torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [3.0]])
    loss = loss_of(PKT(weight=1.0), feature_signals(h_s.double(), h_t.double()))
    assert loss.item() == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_cc_is_the_mean_over_all_orders_of_what_repdistiller_has():
    h_s, h_t = random(1, 4, 3), random(2, 4, 5)
    module = CC().build(pooled_shapes(3, 5)).double()
    compat = CC(compat="repdistiller")
    orders = [
        loss_of(compat, feature_signals(h_s[list(p)], h_t[list(p)]), module)
        for p in permutations(range(4))
    ]
    assert max(orders) > 1.01 * min(orders)
    torch.testing.assert_close(
        loss_of(CC(), feature_signals(h_s, h_t), module), sum(orders) / len(orders)
    )


def test_cc_kernel_tends_to_the_gaussian_one():
    x = random(1, 4, 3)
    u = x / x.norm(dim=1, keepdim=True)
    gauss = torch.exp(-0.4 * (u.unsqueeze(0) - u.unsqueeze(1)).square().sum(2))
    torch.testing.assert_close(taylor_kernel(x, 0.4, 20), gauss, rtol=1e-12, atol=1e-12)
    assert (taylor_kernel(x, 0.4, 2) - gauss).abs().max() > 1e-3


def test_cc_refuses_the_other_forms_compat():
    reason = CC(form="paper", compat="repdistiller").check(pooled_shapes(2, 2))
    assert "expected" in reason


def test_ickd_is_sp_with_channels_for_samples():
    # One image, identity for adapter: channels of an image take the place of samples of a batch.
    f_s, f_t = random(1, 1, 3, 2, 2), random(2, 1, 3, 2, 2)
    as_samples = [f.transpose(0, 1) for f in (f_s, f_t)]
    ours = loss_of(ICKD(weight=1.0), map_signals([f_s], [f_t]), torch.nn.Identity())
    theirs = loss_of(SP(weight=1.0), map_signals([as_samples[0]], [as_samples[1]]))
    torch.testing.assert_close(ours, 3 * theirs)  # per row, not per entry


def test_ickd_ignores_where_in_the_image_and_how_large():
    f_s, f_t = random(1, 2, 3, 2, 2), random(2, 2, 3, 2, 2)
    moved = 7.0 * f_t.flip(2)
    nothing = torch.nn.Identity()
    torch.testing.assert_close(
        loss_of(ICKD(), map_signals([f_s], [f_t]), nothing),
        loss_of(ICKD(), map_signals([f_s], [moved]), nothing),
    )


def test_ssd_without_dropout_is_the_squared_distance():
    h_s, h_t = random(1, 3, 4), random(2, 3, 4)
    loss = loss_of(SSD(dropout=0.0), feature_signals(h_s, h_t), torch.nn.Identity())
    torch.testing.assert_close(loss, 0.5 * (h_s - h_t).square().mean())


@pytest.mark.parametrize(("passes", "percentile", "chosen"),
                         [(30, 90.0, 3), (20, 90.0, 2), (11, 90.0, 2), (31, 90.0, 4),
                          (30, 0.0, 30), (30, 100.0, 1), (1, 90.0, 1), (101, 70.0, 31)])  # fmt: skip
def test_ssd_chooses_what_reaches_the_percentile(passes, percentile, chosen):
    assert SSD(passes=passes, percentile=percentile)._chosen == chosen
    scores = torch.arange(passes, dtype=torch.float64)
    reached = scores >= torch.quantile(scores, percentile / 100) - 1e-9
    assert reached.sum() == chosen


def test_ssd_can_add_the_kl_of_its_source():
    given = logit_signals(1, 3, 4)
    pooled = {"pooled": random(2, 3, 5)}
    given = replace(
        given,
        student=replace(given.student, **pooled),
        teachers=(replace(given.teacher, **pooled),),
    )
    terms = SSD(logit_weight=0.5).distill(given, torch.nn.Identity())
    assert torch.equal(terms["kd"], loss_of(KD(weight=0.5, temperature=2.0), given))
    other = PairShapes(Shapes(3, pooled=2), (Shapes(4, pooled=2),))
    assert SSD().check(other) is None
    assert "expected" in SSD(logit_weight=0.5).check(other)


def test_crd_negatives_are_of_other_classes_and_all_as_likely():
    method = CRD(negatives=5)
    shapes = pooled_shapes(2, 2, num_train=len(CRD_LABELS), train_labels=CRD_LABELS)
    draw = method.build(shapes).negatives
    torch.manual_seed(0)
    index = torch.arange(len(CRD_LABELS)).repeat(4000)
    drawn = draw(index)
    assert drawn.shape == (len(index), 5)
    for i, y in enumerate(CRD_LABELS.tolist()):
        counts = drawn[index == i].flatten().bincount(minlength=len(CRD_LABELS)).double()
        others = y != CRD_LABELS
        assert (counts[~others] == 0).all()
        expected = 20000 / others.sum()
        assert ((counts[others] - expected).abs() < 5 * expected.sqrt()).all()


def test_crd_without_classes_leaves_out_the_sample_only():
    draw = CRD(negatives=4).build(pooled_shapes(2, 2, num_train=6)).negatives
    torch.manual_seed(0)
    drawn = draw(torch.arange(6).repeat(200)).reshape(200, 6, 4)
    assert all(set(drawn[:, i].flatten().tolist()) == set(range(6)) - {i} for i in range(6))


def test_crd_takes_no_more_negatives_than_every_sample_has():
    def count(**more):
        return CRD().build(pooled_shapes(2, 2, **more)).negatives.count

    assert count(num_train=50) == 49
    assert count(num_train=11, train_labels=CRD_LABELS) == 7  # 4 of 11 are in the largest class
    assert count(num_train=50000) == 16384


def test_crd_refuses_samples_without_negatives():
    same = {"num_train": 3, "train_labels": torch.tensor([1, 1, 1])}
    for more in (same, {"num_train": 1}):
        assert "expected" in CRD().check(pooled_shapes(2, 2, **more))
        with pytest.raises(IncompatibleError):
            CRD().build(pooled_shapes(2, 2, **more))
    with pytest.raises(IncompatibleError):
        CRD().build(pooled_shapes(2, 2))


def test_crd_saves_its_state_and_not_its_tables():
    module = CRD(dim=2).build(pooled_shapes(2, 2, num_train=9))
    assert set(module.state_dict()) == {
        "bank_s", "bank_t", "log_z", "has_z",
        "embeddings.embed_s.weight", "embeddings.embed_s.bias",
        "embeddings.embed_t.weight", "embeddings.embed_t.bias",
    }  # fmt: skip
    assert not module.has_z.any()
    norms = CRD().build(pooled_shapes(2, 2, num_train=2000)).bank_s.norm(dim=1)
    assert norms.mean().item() == pytest.approx(1.0, abs=0.01)


def test_crd_of_a_good_student_is_lower():
    # Banks that know the samples: a student that matches the teacher beats one that does not.
    torch.manual_seed(0)
    method = CRD(dim=8, negatives=30)
    module = method.build(pooled_shapes(8, 8, num_train=40)).double()
    h = random(1, 40, 8)
    with torch.no_grad():
        for layer in (module.embeddings.embed_s, module.embeddings.embed_t):
            layer.weight.copy_(torch.eye(8))
            layer.bias.zero_()
        module.bank_s.copy_(h / h.norm(dim=1, keepdim=True))
        module.bank_t.copy_(module.bank_s)
    index = torch.arange(40)
    losses = [
        loss_of(method, feature_signals(x, h, index), copy.deepcopy(module)) for x in (h, h.flip(0))
    ]
    assert losses[0] < 0.7 * losses[1]


def test_rdd_trusts_a_teacher_that_agrees_with_itself():
    given, _ = rdd_signals(1, 4, 5)
    agreeing = Networks(given.networks.images, lambda _: None, (lambda _: given.teacher,))
    task = RDD().task(replace(given, networks=agreeing))
    plain = KD(ce_weight=1.0).task(given)
    torch.testing.assert_close(task["ce"], plain["ce"], rtol=1e-12, atol=0)


def test_rdd_of_a_student_as_good_as_its_teacher_has_no_label_loss():
    given, _ = rdd_signals(1, 4, 5)
    same = replace(given, student=given.teacher, networks=None)
    assert RDD(phase="student").task(same)["ce"] == 0
    assert RDD(ce_weight=0.0).task(same) == {}


@pytest.mark.parametrize("method", [PKT(), CC(), CC(form="paper"), ICKD(), SSD(), CRD()])
def test_refuses_networks_without_features(method):
    bare = Shapes(3)
    assert "expected" in method.check(PairShapes(bare, (bare,), num_train=9))


@pytest.mark.parametrize(
    "method",
    [CC(dim=0), CC(form="paper", order=0), CRD(negatives=0), CRD(momentum=1.5), SSD(passes=0),
     SSD(dropout=1.0), SSD(divisor=0.0), SSD(percentile=101.0)],
)  # fmt: skip
def test_refuses_settings_that_mean_nothing(method):
    assert "expected" in method.check(pooled_shapes(2, 2, num_train=9))


def test_refuses_misspelt_choices():
    with pytest.raises(ConfigError):
        CC(form="taylor")
    with pytest.raises(ConfigError):
        RDD(phase="both")
