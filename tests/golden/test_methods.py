"""Every loss against a second implementation that is written from the formulas.

The second implementation is slow on purpose: float64, scalars, Python loops, no torch.nn.functional,
no line shared with the package. Its gradient is autograd's through those scalar loops. Values and
gradients must agree to 1e-10 (relative to their size where that is above 1).
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from golden_tools import (
    SEEDS,
    assert_same,
    logit_signals,
    loss_of,
    map_signals,
    pooled_signals,
    random,
    signals,
)

from smskd.methods import METHODS, PairShapes
from smskd.methods.at import AT
from smskd.methods.dkd import DKD
from smskd.methods.fitnet import FitNet
from smskd.methods.kd import KD
from smskd.methods.logit_standardisation import LogitStandardisation
from smskd.methods.rkd import RKD
from smskd.methods.scratch import Scratch
from smskd.methods.sp import SP
from smskd.taps import Outputs, Shapes

# ---- the slow side ------------------------------------------------------------------------------


def slow_softmax(row, tau=1.0):
    exps = [torch.exp(z / tau) for z in row]
    return [e / sum(exps) for e in exps]


def slow_kl(p, q):
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def slow_kd(z_s, z_t, tau):
    rows = zip(z_s, z_t, strict=True)
    return sum(tau**2 * slow_kl(slow_softmax(t, tau), slow_softmax(s, tau)) for s, t in rows) / len(
        z_s
    )


def slow_ce(z, labels):
    return sum(
        -torch.log(slow_softmax(row)[y]) for row, y in zip(z, labels.tolist(), strict=True)
    ) / len(z)


def slow_dkd(z_s, z_t, labels, alpha, beta, tau, ramp):
    total = 0.0
    for row_s, row_t, y in zip(z_s, z_t, labels.tolist(), strict=True):
        split = []
        for row in (row_t, row_s):
            p = slow_softmax(row, tau)
            rest = sum(p[c] for c in range(len(p)) if c != y)
            split.append(([p[y], rest], [p[c] / rest for c in range(len(p)) if c != y]))
        (b_t, q_t), (b_s, q_s) = split
        total = total + tau**2 * (alpha * slow_kl(b_t, b_s) + beta * slow_kl(q_t, q_s))
    return ramp * total / len(z_s)


def slow_standardise(z):
    rows = []
    for row in z:
        mean = sum(row) / len(row)
        deviation = torch.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - 1))
        rows.append(torch.stack([(v - mean) / (deviation + 1e-7) for v in row]))
    return rows


def slow_pool(image, height, width):
    """One (H, W) image, windows from floor(i H / h) to ceil((i + 1) H / h)."""
    out = []
    for i, j in product(range(height), range(width)):
        rows = range(i * len(image) // height, -(-(i + 1) * len(image) // height))
        columns = range(j * len(image[0]) // width, -(-(j + 1) * len(image[0]) // width))
        cell = [image[r][c] for r in rows for c in columns]
        out.append(sum(cell) / len(cell))
    return out


def slow_attention(sample, height, width, p):
    """(C, H, W) to a list of h * w values with unit norm."""
    channels = [slow_pool(image, height, width) for image in sample]
    mean = [sum(abs(v) ** p for v in at) / len(channels) for at in zip(*channels, strict=True)]
    norm = torch.sqrt(sum(v * v for v in mean))
    return [v / norm for v in mean]


def slow_at(maps_s, maps_t, p):
    total = 0.0
    for f_s, f_t in list(zip(maps_s, maps_t, strict=False))[1:]:
        h, w = min(f_s.shape[2], f_t.shape[2]), min(f_s.shape[3], f_t.shape[3])
        gaps = [
            (a - b) ** 2
            for one_s, one_t in zip(f_s, f_t, strict=True)
            for a, b in zip(
                slow_attention(one_s, h, w, p), slow_attention(one_t, h, w, p), strict=True
            )
        ]
        total = total + sum(gaps) / len(gaps)
    return total


def slow_dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_sp(f_s, f_t):
    n, grams = len(f_s), []
    for f in (f_s, f_t):
        flat = [list(sample.reshape(-1)) for sample in f]
        gram = [[slow_dot(a, b) for b in flat] for a in flat]
        grams.append([[v / torch.sqrt(slow_dot(row, row)) for v in row] for row in gram])
    return sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(n) for j in range(n)) / n**2


def slow_huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def slow_direction(a, b):
    gap = [x - y for x, y in zip(a, b, strict=True)]
    length = torch.sqrt(slow_dot(gap, gap)) if any(v != 0 for v in gap) else None
    return (0.0, [0.0] * len(gap)) if length is None else (length, [v / length for v in gap])


def slow_relations(h):
    n = len(h)
    pairs = {(i, j): slow_direction(h[j], h[i]) for i in range(n) for j in range(n)}
    positive = [d for d, _ in pairs.values() if d > 0]
    mean = sum(positive) / len(positive) if positive else 1.0
    distance = {ij: d / mean for ij, (d, _) in pairs.items()}
    angle = {
        (i, j, k): slow_dot(pairs[i, j][1], pairs[i, k][1])
        for i, j, k in product(range(n), repeat=3)
    }
    return distance, angle


def slow_rkd(h_s, h_t, distance_weight, angle_weight):
    (d_s, a_s), (d_t, a_t) = slow_relations(h_s), slow_relations(h_t)
    distance = sum(slow_huber(d_s[ij] - d_t[ij]) for ij in d_s) / len(d_s)
    angle = sum(slow_huber(a_s[ijk] - a_t[ijk]) for ijk in a_s) / len(a_s)
    return distance_weight * distance + angle_weight * angle + 0.0 * h_s.sum()


def slow_conv(x, weight, bias, stride, padding):
    """(B, C, H, W) with (O, C, k, m) as nested lists [b][o][i][j]."""
    (batch, channels, height, width), (outputs, _, k, m) = x.shape, weight.shape
    h_out, w_out = (height + 2 * padding - k) // stride + 1, (width + 2 * padding - m) // stride + 1

    def at(b, o, i, j):
        value = bias[o]
        for c, u, v in product(range(channels), range(k), range(m)):
            r, s = i * stride + u - padding, j * stride + v - padding
            if 0 <= r < height and 0 <= s < width:
                value = value + x[b, c, r, s] * weight[o, c, u, v]
        return value

    return [
        [[[at(b, o, i, j) for j in range(w_out)] for i in range(h_out)] for o in range(outputs)]
        for b in range(batch)
    ]


def slow_transposed_conv(x, weight, bias, stride, padding):
    """(B, C, H, W) with (C, O, k, m); each input pixel adds a patch to the output."""
    (batch, channels, height, width), (_, outputs, k, m) = x.shape, weight.shape
    h_out, w_out = (height - 1) * stride - 2 * padding + k, (width - 1) * stride - 2 * padding + m
    out = [
        [[[bias[o]] * w_out for _ in range(h_out)] for o in range(outputs)] for _ in range(batch)
    ]
    for b, c, i, j, o, u, v in product(
        *map(range, (batch, channels, height, width, outputs, k, m))
    ):
        r, s = i * stride + u - padding, j * stride + v - padding
        if 0 <= r < h_out and 0 <= s < w_out:
            out[b][o][r][s] = out[b][o][r][s] + x[b, c, i, j] * weight[c, o, u, v]
    return out


def slow_norm_relu(x, scale, shift, eps=1e-5):
    """Batch norm in training mode, over batch and positions with the biased variance, then ReLU."""
    batch, channels, height, width = len(x), len(x[0]), len(x[0][0]), len(x[0][0][0])
    for c in range(channels):
        places = list(product(range(batch), range(height), range(width)))
        mean = sum(x[b][c][i][j] for b, i, j in places) / len(places)
        variance = sum((x[b][c][i][j] - mean) ** 2 for b, i, j in places) / len(places)
        for b, i, j in places:
            y = (x[b][c][i][j] - mean) / torch.sqrt(variance + eps) * scale[c] + shift[c]
            x[b][c][i][j] = y if y > 0 else 0.0 * y
    return x


def slow_hint(f_s, f_t, weights, stride, padding, transposed):
    conv = slow_transposed_conv if transposed else slow_conv
    r = slow_norm_relu(conv(f_s, weights[0], weights[1], stride, padding), weights[2], weights[3])
    places = list(product(*map(range, f_t.shape)))
    return sum((r[b][c][i][j] - f_t[b, c, i, j]) ** 2 for b, c, i, j in places) / len(places)


# ---- comparisons --------------------------------------------------------------------------------


def with_logits(given, z):
    return given.with_logits(z, [t.logits for t in given.teachers])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes", "tau"), [(1, 3, 4.0), (3, 2, 1.0), (4, 7, 2.5)])
def test_kd(seed, batch, classes, tau):
    given = logit_signals(seed, batch, classes)
    method = KD(weight=0.7, temperature=tau)
    assert_same(
        lambda z: loss_of(method, with_logits(given, z)),
        lambda z: 0.7 * slow_kd(z, given.teacher.logits, tau),
        [given.student.logits],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", [Scratch(), KD(), DKD(ce_weight=0.3)])
def test_label_loss(seed, method):
    given = logit_signals(seed, 4, 5)
    assert_same(
        lambda z: sum(method.task(with_logits(given, z)).values()),
        lambda z: method.ce_weight * slow_ce(z, given.labels),
        [given.student.logits],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), [(1, 3), (2, 4), (5, 8)])
@pytest.mark.parametrize(
    ("method", "epoch", "ramp"),
    [
        (DKD(), 1, 1 / 20),
        (DKD(alpha=0.5, beta=2.0, temperature=1.0), 7, 7 / 20),
        (DKD(temperature=2.0), 20, 1.0),
        (DKD(), 21, 1.0),
        (DKD(warmup_epochs=0, alpha=3.0), 1, 1.0),
    ],
)
def test_dkd(seed, batch, classes, method, epoch, ramp):
    given = logit_signals(seed, batch, classes, epoch=epoch)
    settings = (method.alpha, method.beta, method.temperature, ramp)
    assert_same(
        lambda z: loss_of(method, with_logits(given, z)),
        lambda z: slow_dkd(z, given.teacher.logits, given.labels, *settings),
        [given.student.logits],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (3, 3), (4, 10)])
def test_logit_standardisation_of_kd(seed, batch, classes):
    given = logit_signals(seed, batch, classes, scale=5.0)
    modifier, method = LogitStandardisation(), KD(weight=9.0, temperature=2.0)
    nothing = torch.nn.Module()
    slow_teacher = slow_standardise(given.teacher.logits)
    assert_same(
        lambda z: loss_of(method, modifier.modify(with_logits(given, z), nothing)),
        lambda z: 9.0 * slow_kd(slow_standardise(z), slow_teacher, 2.0),
        [given.student.logits],
    )


AT_CASES = {
    "same sizes": ([(2, 4, 4), (2, 4, 4), (3, 2, 2)], [(4, 4, 4), (3, 4, 4), (5, 2, 2)]),
    "student larger": ([(1, 4, 4), (2, 6, 6)], [(1, 4, 4), (3, 3, 3)]),
    "teacher larger": ([(1, 4, 4), (2, 2, 2)], [(1, 4, 4), (2, 4, 4)]),
    "no whole ratio": ([(1, 4, 4), (2, 5, 5)], [(1, 4, 4), (2, 3, 3)]),
    "not square, crossed": ([(1, 4, 4), (2, 4, 3)], [(1, 4, 4), (2, 2, 6)]),
    "teacher has one more": ([(1, 3, 3), (2, 3, 3)], [(1, 3, 3), (2, 3, 3), (2, 2, 2)]),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", AT_CASES)
@pytest.mark.parametrize(("batch", "p"), [(1, 2.0), (2, 2.0), (3, 1.0), (2, 3.0)])
def test_at(seed, case, batch, p):
    shapes_s, shapes_t = AT_CASES[case]
    maps_s = [random(seed + i, batch, *shape) for i, shape in enumerate(shapes_s)]
    maps_t = [random(seed + 50 + i, batch, *shape) for i, shape in enumerate(shapes_t)]
    assert_same(
        lambda *maps: loss_of(AT(p=p), map_signals(maps, maps_t)),
        lambda *maps: 1000.0 * slow_at(maps, maps_t, p),
        maps_s,
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_sp(seed, batch):
    first = random(seed, batch, 1, 2, 2)
    last_s, last_t = random(seed, batch, 3, 2, 2), random(seed + 9, batch, 2, 3, 3)
    assert_same(
        lambda f: loss_of(SP(), map_signals([first, f], [first, last_t])),
        lambda f: 3000.0 * slow_sp(f, last_t),
        [last_s],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("twins", [(), (0, 1)])
def test_rkd(seed, batch, twins):
    h_s, h_t = random(seed, batch, 4), random(seed + 9, batch, 6, scale=3.0)
    for h in (h_s, h_t):
        if twins and batch > 1:
            h[twins[1]] = h[twins[0]]
    method = RKD(weight=0.5)
    assert_same(
        lambda h: loss_of(method, pooled_signals(h, h_t)),
        lambda h: 0.5 * slow_rkd(h, h_t, 25.0, 50.0),
        [h_s],
    )


FITNET_CASES = {  # student map, teacher map, stride, padding, transposed
    "half": ((2, 4, 4), (3, 2, 2), 2, 1, False),
    "half, not square": ((2, 4, 2), (1, 2, 1), 2, 1, False),
    "double": ((2, 2, 2), (3, 4, 4), 2, 1, True),
    "equal": ((2, 3, 3), (4, 3, 3), 1, 0, False),
    "crop": ((2, 5, 4), (2, 3, 3), 1, 0, False),
    "half in height only": ((1, 4, 3), (2, 2, 3), 1, 0, False),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", FITNET_CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_fitnet(seed, case, batch):
    shape_s, shape_t, stride, padding, transposed = FITNET_CASES[case]
    hint_s, hint_t = random(seed, batch, *shape_s), random(seed + 7, batch, *shape_t)
    method = FitNet(hint_layer=1)
    regressor = method.build(
        PairShapes(Shapes(3, maps=((1, 1, 1), shape_s)), (Shapes(3, maps=((1, 1, 1), shape_t)),))
    ).double()
    names = [name for name, _ in regressor.named_parameters()]
    weights = [random(seed + 20 + i, *p.shape) for i, p in enumerate(regressor.parameters())]
    assert names == ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]

    class Fixed(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = dict(zip(names, values, strict=True))

        def forward(self, x):
            return torch.func.functional_call(regressor, self.values, (x,))

    stem = torch.zeros(batch, 1, 1, 1, dtype=torch.float64)
    assert_same(
        lambda f, *w: loss_of(method, map_signals([stem, f], [stem, hint_t]), Fixed(w)),
        lambda f, *w: 100.0 * slow_hint(f, hint_t, w, stride, padding, transposed),
        [hint_s, *weights],
    )


# ---- published identities -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_dkd_with_beta_of_the_decomposition_is_kd(seed, tau):
    # arXiv 2203.08679: KD = TCKD + (1 - p_t of the target) * NCKD, for each sample.
    given = logit_signals(seed, 6, 5)
    for i in range(6):
        one = signals(
            Outputs(given.student.logits[i : i + 1]),
            Outputs(given.teacher.logits[i : i + 1]),
            given.labels[i : i + 1],
        )
        p_t = torch.softmax(one.teacher.logits[0] / tau, 0)[one.labels[0]].item()
        dkd = DKD(alpha=1.0, beta=1 - p_t, temperature=tau, warmup_epochs=0)
        torch.testing.assert_close(
            loss_of(dkd, one), loss_of(KD(weight=1.0, temperature=tau), one), rtol=1e-12, atol=1e-12
        )


RESPONSE = ["kd", "dkd"]


@pytest.mark.parametrize("name", RESPONSE)
def test_response_losses_vanish_with_their_gradient_at_the_teacher(name):
    given = logit_signals(1, 4, 6)
    z = given.teacher.logits.clone().requires_grad_()
    loss = loss_of(METHODS[name](), with_logits(given, z))
    loss.backward()
    assert abs(loss.item()) < 1e-13
    assert z.grad.abs().max() < 1e-13


@pytest.mark.parametrize("name", RESPONSE)
def test_response_losses_ignore_a_shift_of_the_logits(name):
    given = logit_signals(2, 4, 6)
    shift = random(5, 4, 1, scale=10.0)
    shifted = given.with_logits(given.student.logits + shift, [given.teacher.logits - 3 * shift])
    method = METHODS[name]()
    torch.testing.assert_close(
        loss_of(method, given), loss_of(method, shifted), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("name", RESPONSE)
def test_response_losses_are_not_negative(name):
    for seed in range(20):
        assert loss_of(METHODS[name](), logit_signals(seed, 3, 4)) >= 0


def test_feature_losses_vanish_for_equal_features():
    maps = [random(i, 3, 2, 4, 4) for i in range(3)]
    assert loss_of(AT(), map_signals(maps, maps)) == 0
    assert loss_of(SP(), map_signals(maps, maps)) == 0
    h = random(3, 5, 4)
    assert loss_of(RKD(), pooled_signals(h, h)) == 0


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e3])
def test_scale_of_the_student_is_ignored(factor):
    maps_s, maps_t = [random(1, 4, 2, 4, 4)] * 2, [random(2, 4, 3, 4, 4)] * 2
    scaled = [factor * m for m in maps_s]
    for method in (SP(), AT()):
        torch.testing.assert_close(
            loss_of(method, map_signals(maps_s, maps_t)),
            loss_of(method, map_signals(scaled, maps_t)),
            rtol=1e-11,
            atol=0,
        )
    h_s, h_t = random(3, 5, 4), random(4, 5, 6)
    torch.testing.assert_close(
        loss_of(RKD(), pooled_signals(h_s, h_t)),
        loss_of(RKD(), pooled_signals(factor * h_s, h_t)),
        rtol=1e-11,
        atol=0,
    )


def test_rkd_ignores_rotation_and_shift():
    h_s, h_t = random(3, 5, 4), random(4, 5, 6)
    rotation, _ = torch.linalg.qr(random(5, 4, 4))
    torch.testing.assert_close(
        loss_of(RKD(), pooled_signals(h_s, h_t)),
        loss_of(RKD(), pooled_signals(h_s @ rotation + 3.0, h_t)),
        rtol=1e-11,
        atol=0,
    )


@pytest.mark.parametrize("name", RESPONSE)
def test_logit_standardisation_ignores_affine_changes_of_the_logits(name):
    given = logit_signals(4, 4, 6)
    scale, shift = random(6, 4, 1).abs() + 0.5, random(7, 4, 1, scale=10.0)
    changed = given.with_logits(
        scale * given.student.logits + shift, [5 * given.teacher.logits - shift]
    )
    modifier, method, nothing = LogitStandardisation(), METHODS[name](), torch.nn.Module()
    torch.testing.assert_close(
        loss_of(method, modifier.modify(given, nothing)),
        loss_of(method, modifier.modify(changed, nothing)),
        rtol=1e-5,  # the 1e-7 beside the deviation is not scaled
        atol=0,
    )


def test_logit_standardisation_gives_unit_unbiased_deviation():
    given = LogitStandardisation().modify(logit_signals(5, 4, 6, scale=20.0), torch.nn.Module())
    for z in (given.student.logits, given.teacher.logits):
        np.testing.assert_allclose(z.numpy().mean(1), 0, atol=1e-12)
        np.testing.assert_allclose(z.numpy().std(1, ddof=1), 1, rtol=1e-7)


def test_dkd_is_exact_where_probabilities_underflow():
    # exp(-2000) is 0 in float64; the divergence is a difference of logits and stays exact.
    z_t = torch.tensor([[2000.0, 0.0, 0.0]], dtype=torch.float64)
    z_s = torch.tensor([[0.0, 2000.0, 0.0]], dtype=torch.float64)
    given = signals(Outputs(z_s), Outputs(z_t))
    method = DKD(temperature=1.0, warmup_epochs=0)
    terms = method.distill(given, torch.nn.Module())
    assert terms["tckd"].item() == pytest.approx(2000.0, rel=1e-15)
    # Over the classes 1 and 2: teacher (1/2, 1/2), student (1, exp(-2000)).
    assert terms["nckd"].item() == pytest.approx(8 * (1000 - np.log(2)), rel=1e-15)
    reversed_labels = replace(given, labels=torch.tensor([1]))
    assert np.isfinite(loss_of(method, reversed_labels).item())
