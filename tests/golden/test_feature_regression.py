"""NST, VID, AB, FT, OFD, FSP and KDSVD against second implementations from the formulas.

The second implementation is slow on purpose: float64, scalars, Python loops, no torch.nn.functional,
no line shared with the package. The one exception is KDSVD's decomposition, which there is torch's
SVD of each sample's matrix, with torch's gradient, and here eigenvectors of a Gram matrix with a
gradient of its own.
"""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from golden_tools import SEEDS, assert_same, loss_of, map_signals, random, signals
from torch import nn

from smskd.errors import IncompatibleError
from smskd.methods import PairShapes
from smskd.methods.ab import AB
from smskd.methods.feeding_norms import feeding_norms
from smskd.methods.fsp import FSP
from smskd.methods.ft import FT
from smskd.methods.kdsvd import KDSVD, right_singular
from smskd.methods.nst import NST
from smskd.methods.objective import Objective, Part
from smskd.methods.ofd import OFD, norm_margin
from smskd.methods.vid import VID
from smskd.models import build_model, taps_of
from smskd.taps import Network, Outputs, Shapes

METHODS = [NST(), VID(), AB(), FT(), OFD(), FSP(), KDSVD(), KDSVD(compat="mdistiller")]
INIT, AFTER = 30, 31  # the last epoch of an eighth of 240, and the one after it


# ---- the slow side ------------------------------------------------------------------------------


def places(x):
    return product(*map(range, x.shape))


def build(shape, value):
    """A tensor whose entry at each place is ``value(*place)``."""
    flat = [value(*place) for place in product(*map(range, shape))]
    return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in flat]).reshape(shape)


def slow_pool(x, height, width):
    """Windows from floor(i H / h) to ceil((i + 1) H / h)."""

    def cell(b, c, i, j):
        rows = range(i * x.shape[2] // height, -(-(i + 1) * x.shape[2] // height))
        columns = range(j * x.shape[3] // width, -(-(j + 1) * x.shape[3] // width))
        inside = [x[b, c, u, v] for u in rows for v in columns]
        return sum(inside) / len(inside)

    return build((*x.shape[:2], height, width), cell)


def slow_same_size(a, b):
    height, width = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return slow_pool(a, height, width), slow_pool(b, height, width)


def slow_conv(x, weight, bias=None):
    """Stride 1, zeros around it so that the size stays."""
    margin = weight.shape[2] // 2

    def out(b, o, i, j):
        value = 0.0 if bias is None else bias[o]
        for c, u, v in product(*map(range, weight.shape[1:])):
            r, s = i + u - margin, j + v - margin
            if 0 <= r < x.shape[2] and 0 <= s < x.shape[3]:
                value = value + x[b, c, r, s] * weight[o, c, u, v]
        return value

    return build((len(x), len(weight), *x.shape[2:]), out)


def slow_transposed(x, weight, bias):
    """A 3x3 transposed convolution of stride 1 turns the kernel round."""
    return slow_conv(x, weight.transpose(0, 1).flip(2, 3), bias)


def slow_norm(x, scale, shift):
    """Batch norm in training mode, with the biased variance."""
    moments = []
    for c in range(x.shape[1]):
        values = [x[b, c, i, j] for b, _, i, j in places(x[:, :1])]
        mean = sum(values) / len(values)
        moments.append((mean, sum((v - mean) ** 2 for v in values) / len(values)))
    return build(
        x.shape,
        lambda b, c, i, j: (x[b, c, i, j] - moments[c][0]) / torch.sqrt(moments[c][1] + 1e-5)
        * scale[c] + shift[c],
    )  # fmt: skip


def slow_leaky(x, slope):
    return build(x.shape, lambda *at: x[at] if x[at] > 0 else slope * x[at])


def slow_connector(x, weights):
    return slow_norm(slow_conv(x, weights[0]), weights[1], weights[2])


def slow_dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_unit_rows(sample):
    rows = [list(channel.reshape(-1)) for channel in sample]
    return [[v / torch.sqrt(slow_dot(row, row)) for v in row] for row in rows]


def slow_nst(map_s, map_t):
    map_s, map_t = slow_same_size(map_s, map_t)
    total = 0.0
    for one_s, one_t in zip(map_s, map_t, strict=True):
        s, t = slow_unit_rows(one_s), slow_unit_rows(one_t)
        for a, b, sign in ((s, s, 1), (t, t, 1), (s, t, -2)):
            kernel = [slow_dot(x, y) ** 2 for x, y in product(a, b)]
            total = total + sign * sum(kernel) / len(kernel)
    return total / len(map_s)


def slow_vid(map_s, map_t, alpha, weights):
    map_s, map_t = slow_same_size(map_s, map_t)
    hidden = slow_leaky(slow_conv(map_s, weights[0]), 0.0)
    hidden = slow_leaky(slow_conv(hidden, weights[1]), 0.0)
    mean = slow_conv(hidden, weights[2])
    total = 0.0
    for b, c, i, j in places(mean):
        variance = torch.log(1.0 + torch.exp(alpha[c])) + 1e-5
        total = total + (mean[b, c, i, j] - map_t[b, c, i, j]) ** 2 / variance / 2
        total = total + torch.log(variance) / 2
    return total / mean.numel()


def slow_ab(s, t, margin):
    s, t = slow_same_size(s, t)
    total = 0.0
    for at in places(s):
        if s[at] > -margin and t[at] <= 0:
            total = total + (s[at] + margin) ** 2
        if s[at] <= margin and t[at] > 0:
            total = total + (s[at] - margin) ** 2
    return total / len(s)


def slow_factor(x, p1):
    flat = []
    for sample in x:
        mean = [
            sum(abs(sample[c, i, j]) ** p1 for c in range(len(sample))) / len(sample)
            for i, j in places(sample[0])
        ]
        flat.append([v / torch.sqrt(slow_dot(mean, mean)) for v in mean])
    return flat


def slow_encoder(x, weights):
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        x = slow_leaky(slow_conv(x, weight, bias), 0.1)
    return x


def slow_decoder(x, weights):
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        x = slow_leaky(slow_transposed(x, weight, bias), 0.1)
    return x


def slow_translator(x, weights):
    for i in range(0, len(weights), 4):
        weight, bias, scale, shift = weights[i : i + 4]
        x = slow_leaky(slow_norm(slow_conv(x, weight, bias), scale, shift), 0.1)
    return x


def slow_ft(factor_s, factor_t, p1, p2):
    rows = zip(*(slow_factor(x, p1) for x in slow_same_size(factor_s, factor_t)), strict=True)
    gaps = [abs(a - b) ** p2 for row in rows for a, b in zip(*row, strict=True)]
    return sum(gaps) / len(gaps)


def slow_batch_margin(t):
    margins = []
    for c in range(t.shape[1]):
        below = [v for v in t[:, c].reshape(-1) if v < 0]
        margins.append(sum(below) / len(below) if below else 0.0)
    return margins


def slow_ofd(s, t, margin=None):
    """The formula of the paper: three cases of a target and a student."""
    s, t = slow_same_size(s, t)
    margin = slow_batch_margin(t) if margin is None else margin
    total = 0.0
    for at in places(s):
        m = margin[at[1]]
        if t[at] > 0 or (m < t[at] and s[at] > t[at]):
            total = total + (s[at] - t[at]) ** 2
        elif t[at] <= m and s[at] > m:
            total = total + (s[at] - m) ** 2
    return total / len(s)


def slow_flow(below, above):
    below, above = slow_same_size(below, above)
    area = below.shape[2] * below.shape[3]
    return build(
        (len(below), below.shape[1], above.shape[1]),
        lambda b, c, d: slow_dot(below[b, c].reshape(-1), above[b, d].reshape(-1)) / area,
    )


def slow_fsp(maps_s, maps_t):
    total = 0.0
    for (a_s, b_s), (a_t, b_t) in zip(pairwise(maps_s), pairwise(maps_t), strict=True):
        flow_s, flow_t = slow_flow(a_s, b_s), slow_flow(a_t, b_t)
        total = (
            total + sum((flow_s[at] - flow_t[at]) ** 2 for at in places(flow_s)) / flow_s.numel()
        )
    return total


def slow_vectors(matrix_s, matrix_t, k):
    """The teacher's leading right singular vectors, and the closest ones of the student."""
    _, value, v_t = torch.linalg.svd(matrix_t, full_matrices=False)
    _, _, v_s = torch.linalg.svd(matrix_s, full_matrices=False)
    k = min(k, len(value))
    length = torch.sqrt(sum(v * v for v in value[:k]))
    pairs = []
    for i in range(k):
        one = v_t[i] if sum(v_t[i]) >= 0 else -v_t[i]
        cosines = [slow_dot(other, one) for other in v_s[: k_s(len(v_s), k)]]
        best = max(range(len(cosines)), key=lambda j: abs(cosines[j]))
        turned = v_s[best] if cosines[best] > 0 else -v_s[best]
        pairs.append((turned * value[i] / length, one * value[i] / length))
    return pairs


def k_s(available, k):
    return min(available, k + 3)


def slow_kdsvd(matrices_s, matrices_t, k):
    total, batch = 0.0, len(matrices_s[0])
    for b in range(batch):
        levels = [slow_vectors(s[b], t[b], k) for s, t in zip(matrices_s, matrices_t, strict=True)]
        for below, above in pairwise(levels):
            for (s, t), (s_below, t_below) in zip(above, below, strict=False):
                for c, d in product(range(len(s)), range(len(s_below))):
                    r_s = torch.exp(-((s[c] - s_below[d]) ** 2) / 8)
                    r_t = torch.exp(-((t[c] - t_below[d]) ** 2) / 8)
                    total = total + (r_s - r_t) ** 2
    return total / batch


# ---- comparisons --------------------------------------------------------------------------------


class Loss(nn.Module):
    """A method's loss as a module, so that its own modules' parameters can be given."""

    def __init__(self, method, modules):
        super().__init__()
        self.method, self.inner = method, modules

    def forward(self, given):
        return loss_of(self.method, given, self.inner)


def built(method, shapes_s, shapes_t):
    def shapes(maps):
        return Shapes(3, maps=tuple(maps), preact=tuple(maps))

    return method.build(PairShapes(shapes(shapes_s), (shapes(shapes_t),))).double()


def parameters(modules, seed):
    """Random values for each of a module's parameters, by name."""
    values = {}
    for place, (name, parameter) in enumerate(modules.named_parameters()):
        values[f"inner.{name}"] = random([seed, place], *parameter.shape)
    return values


def random_maps(seed, batch, shapes):
    return [random([seed, place], batch, *shape) for place, shape in enumerate(shapes)]


def preact_signals(maps_s, maps_t, epoch=1):
    z = torch.zeros(len(maps_s[0]), 3, dtype=torch.float64)
    return signals(Outputs(z, preact=tuple(maps_s)), Outputs(z, preact=tuple(maps_t)), epoch=epoch)


def compare(method, modules, make_signals, slow, maps_s, seed):
    """Value and gradient with respect to the student's maps and the modules' parameters."""
    loss, values = Loss(method, modules), parameters(modules, seed)
    n = len(maps_s)

    def fast(*leaves):
        given = make_signals(leaves[:n])
        named = dict(zip(values, leaves[n:], strict=True))
        return torch.func.functional_call(loss, named, (given,))

    assert_same(fast, lambda *leaves: slow(leaves[:n], leaves[n:]), [*maps_s, *values.values()])


NST_CASES = {
    "same sizes": ([(1, 1, 1), (2, 3, 2), (3, 2, 2)], [(2, 1, 1), (3, 3, 2), (3, 2, 2)]),
    "few positions": ([(1, 1, 1), (4, 2, 1)], [(1, 1, 1), (5, 2, 1)]),
    "student larger": ([(1, 1, 1), (2, 4, 4)], [(1, 1, 1), (3, 2, 2)]),
    "teacher larger, one more": ([(1, 1, 1), (2, 3, 2)], [(1, 1, 1), (2, 5, 4), (2, 2, 2)]),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", NST_CASES)
def test_nst(seed, case):
    shapes_s, shapes_t = NST_CASES[case]
    maps_s, maps_t = random_maps(seed, 2, shapes_s), random_maps(seed + 50, 2, shapes_t)
    assert_same(
        lambda *maps: loss_of(NST(), map_signals(maps, maps_t)),
        lambda *maps: (
            50.0 * sum(slow_nst(s, t) for s, t in list(zip(maps, maps_t, strict=False))[1:])
        ),
        maps_s,
    )


REGRESSED = {
    "same sizes": ([(1, 1, 1), (2, 3, 2), (2, 2, 2)], [(1, 1, 1), (3, 3, 2), (2, 2, 2)]),
    "student larger": ([(1, 1, 1), (2, 4, 2)], [(1, 1, 1), (3, 2, 2)]),
    "teacher larger, one more": ([(1, 1, 1), (2, 2, 2)], [(1, 1, 1), (2, 4, 3), (2, 2, 2)]),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", REGRESSED)
def test_vid(seed, case):
    shapes_s, shapes_t = REGRESSED[case]
    maps_s, maps_t = random_maps(seed, 2, shapes_s), random_maps(seed + 50, 2, shapes_t)

    def slow(maps, weights):
        pairs = list(zip(maps, maps_t, strict=False))[1:]
        groups = [weights[4 * i : 4 * i + 4] for i in range(len(pairs))]
        # Its own parameter comes before those of its layers.
        return 0.5 * sum(
            slow_vid(s, t, alpha, layers)
            for (s, t), (alpha, *layers) in zip(pairs, groups, strict=True)
        )

    method = VID(weight=0.5)
    modules = built(method, shapes_s, shapes_t)
    compare(method, modules, lambda maps: map_signals(maps, maps_t), slow, maps_s, seed)


def grouped(modules, weights):
    """A flat list of parameters, one group for each of a list's modules."""
    remaining = list(weights)
    return [[remaining.pop(0) for _ in module.parameters()] for module in modules.children()]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", REGRESSED)
def test_ab(seed, case):
    shapes_s, shapes_t = REGRESSED[case]
    maps_s, maps_t = random_maps(seed, 2, shapes_s), random_maps(seed + 50, 2, shapes_t)
    method = AB(weight=0.3, margin=0.7)
    modules = built(method, shapes_s, shapes_t)

    def slow(maps, weights):
        triples = list(zip(maps[1:], maps_t[1:], grouped(modules, weights), strict=False))
        losses = [slow_ab(slow_connector(s, w) if w else s, t, 0.7) for s, t, w in triples]
        return 0.3 * sum(2.0 ** (i + 1 - len(losses)) * loss for i, loss in enumerate(losses))

    compare(method, modules, lambda maps: preact_signals(maps, maps_t, INIT), slow, maps_s, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", REGRESSED)
@pytest.mark.parametrize("known", [True, False], ids=["margins of norms", "margins of batches"])
def test_ofd(seed, case, known):
    shapes_s, shapes_t = REGRESSED[case]
    maps_s, maps_t = random_maps(seed, 2, shapes_s), random_maps(seed + 50, 2, shapes_t)
    method = OFD(weight=0.3)
    modules = built(method, shapes_s, shapes_t)
    margins = [None for _ in modules]
    if known:
        margins = [-random([seed, i], shape[0]).abs() for i, shape in enumerate(shapes_t[1:])]
        for module, margin in zip(modules, margins, strict=False):
            module.margin = margin

    def slow(maps, weights):
        layers = zip(maps[1:], maps_t[1:], grouped(modules, weights), margins, strict=False)
        losses = [slow_ofd(slow_connector(s, w), t, margin) for s, t, w, margin in layers]
        return 0.3 * sum(2.0 ** (i + 1 - len(losses)) * loss for i, loss in enumerate(losses))

    compare(method, modules, lambda maps: preact_signals(maps, maps_t), slow, maps_s, seed)


FT_CASES = {  # last maps
    "same sizes": ((1, 3, 2), (3, 3, 2), 2.0, 1.0, 0.7),
    "student larger": ((1, 4, 2), (2, 2, 2), 1.0, 1.0, 1.0),
    "teacher larger": ((2, 2, 1), (2, 3, 2), 3.0, 2.0, 0.5),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", FT_CASES)
@pytest.mark.parametrize("epoch", [INIT, AFTER])
def test_ft(seed, case, epoch):
    shape_s, shape_t, p1, p2, rate = FT_CASES[case]
    (map_s,), (map_t,) = random_maps(seed, 2, [shape_s]), random_maps(seed + 50, 2, [shape_t])
    method = FT(weight=0.3, paraphrase_weight=0.7, p1=p1, p2=p2, rate=rate)
    modules = built(method, [shape_s], [shape_t])

    def slow(maps, weights):
        encoder, decoder, translator = grouped(modules, weights)
        if epoch == INIT:
            rebuilt = slow_decoder(slow_encoder(map_t, encoder), decoder)
            squares = [(rebuilt[at] - map_t[at]) ** 2 for at in places(map_t)]
            return 0.7 * sum(squares) / len(squares)
        factor_t = slow_encoder(map_t, [w.detach() for w in encoder])
        return 0.3 * slow_ft(slow_translator(maps[0], translator), factor_t, p1, p2)

    def given(maps):
        return replace(map_signals(maps, [map_t]), epoch=epoch)

    compare(method, modules, given, slow, [map_s], seed)


FSP_CASES = {
    "equal widths": ([(2, 4, 4), (3, 2, 2), (2, 3, 1)], [(2, 3, 3), (3, 3, 3), (2, 2, 2)]),
    "other widths": ([(1, 2, 2), (2, 2, 2), (3, 2, 1)], [(2, 2, 2), (2, 2, 1), (4, 3, 3)]),
    "few positions, one more": ([(5, 1, 1), (4, 1, 1)], [(5, 2, 1), (4, 2, 1), (2, 1, 1)]),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", FSP_CASES)
def test_fsp(seed, case):
    shapes_s, shapes_t = FSP_CASES[case]
    maps_s, maps_t = random_maps(seed, 2, shapes_s), random_maps(seed + 50, 2, shapes_t)
    method = FSP(weight=0.3)
    modules = built(method, shapes_s, shapes_t)

    def slow(maps, weights):
        groups = grouped(modules, weights)
        adapted = [slow_conv(x, *w) if w else x for x, w in zip(maps, groups, strict=True)]
        return 0.3 * slow_fsp(adapted, maps_t[: len(maps)])

    def given(maps):
        return replace(map_signals(maps, maps_t), epoch=INIT)

    compare(method, modules, given, slow, maps_s, seed)


KDSVD_CASES = {  # k, the student's maps, the teacher's
    "as usual": (1, [(1, 1, 1), (2, 3, 3), (3, 3, 2)], [(1, 1, 1), (2, 3, 3), (3, 3, 2)]),
    "three levels": (
        2,
        [(1, 1, 1), (4, 3, 3), (4, 2, 3), (4, 2, 2)],
        [(1, 1, 1), (4, 3, 3), (4, 2, 3), (4, 2, 2)],
    ),
    "more channels than positions": (
        1,
        [(1, 1, 1), (6, 2, 2), (7, 2, 1)],
        [(1, 1, 1), (6, 3, 2), (7, 1, 2)],
    ),
    "other widths": (1, [(1, 1, 1), (4, 3, 3), (3, 3, 2)], [(1, 1, 1), (3, 3, 3), (2, 2, 2)]),
    "k larger than a map": (
        3,
        [(1, 1, 1), (3, 4, 2), (2, 2, 2)],
        [(1, 1, 1), (3, 2, 4), (2, 2, 2), (1, 1, 1)],
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", KDSVD_CASES)
@pytest.mark.parametrize("compat", ["none", "mdistiller"])
def test_kdsvd(seed, case, compat):
    k, shapes_s, shapes_t = KDSVD_CASES[case]
    maps_s, maps_t = random_maps(seed, 2, shapes_s), random_maps(seed + 50, 2, shapes_t)
    method = KDSVD(weight=0.3, k=k, compat=compat)
    modules = built(method, shapes_s, shapes_t)

    def slow(maps, weights):
        pairs = list(zip(maps[1:], maps_t[1:], strict=False))
        if compat == "mdistiller":
            pairs = [slow_same_size(s, t) for s, t in pairs]
            matrices = [[x.reshape(len(x), -1, x.shape[3]) for x in pair] for pair in pairs]
        else:
            groups = grouped(modules, weights)
            adapted = [
                (slow_conv(s, *w) if w else s, t) for (s, t), w in zip(pairs, groups, strict=True)
            ]
            matrices = [
                [x.reshape(*x.shape[:2], -1).transpose(1, 2) for x in pair] for pair in adapted
            ]
        return 0.3 * slow_kdsvd([s for s, _ in matrices], [t for _, t in matrices], k)

    compare(method, modules, lambda maps: map_signals(maps, maps_t), slow, maps_s, seed)


# ---- NST ----------------------------------------------------------------------------------------


def test_nst_compares_distributions_of_channels():
    teacher = random(1, 3, 4, 5, 5)
    student = torch.cat([teacher.flip(1)] * 2, dim=1) * 7.0  # another order, twice, louder
    assert abs(loss_of(NST(), map_signals([student] * 2, [teacher] * 2))) < 1e-12


@pytest.mark.parametrize("size", [2, 16])
def test_nst_keeps_nothing_larger_than_a_map_or_a_pair_of_widths(size):
    maps_s, maps_t = [random(1, 2, 12, size, size)] * 2, [random(2, 2, 24, size, size)] * 2
    kept = []
    maps_s = [x.requires_grad_() for x in maps_s]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        loss_of(NST(), map_signals(maps_s, maps_t))
    assert max(kept) <= 2 * max(12 * 24, 24 * size * size)


# ---- VID ----------------------------------------------------------------------------------------


def test_vid_starts_with_the_variance_it_was_given():
    (layer,) = built(VID(), [(1, 1, 1), (2, 2, 2)], [(1, 1, 1), (3, 2, 2)])
    torch.testing.assert_close(
        torch.nn.functional.softplus(layer.alpha) + 1e-5, torch.full_like(layer.alpha, 5.0)
    )
    map_s = random(1, 2, 2, 2, 2)
    exact = layer.mean(map_s).detach()
    assert layer(map_s, exact).mean().item() == pytest.approx(np.log(5.0) / 2, rel=1e-6)


def test_vid_as_in_mdistiller_does_not_train_the_variance():
    shapes = [(1, 1, 1), (2, 2, 2)], [(1, 1, 1), (3, 2, 2)]
    for compat, trains in (("none", True), ("mdistiller", False)):
        (layer,) = built(VID(compat=compat), *shapes)
        assert [p.requires_grad for p in layer.parameters()] == [trains, True, True, True]


# ---- two phases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [AB(), FSP()])
def test_phases_of_ab_and_fsp_follow_each_other(method):
    maps = random_maps(1, 2, [(2, 3, 3)] * 3)
    given = preact_signals(maps, maps)
    given = replace(given, student=replace(given.student, maps=tuple(maps)))
    given = replace(given, teachers=(given.student,))
    modules = built(method, [(2, 3, 3)] * 3, [(2, 3, 3)] * 3)
    for epoch in (1, INIT):
        now = replace(given, epoch=epoch)
        assert method.task(now) == {}
        assert len(method.distill(now, modules)) == 1
    for epoch in (AFTER, 240):
        now = replace(given, epoch=epoch)
        assert list(method.task(now)) == ["ce"]
        assert method.distill(now, modules) == {}


def test_paraphraser_alone_learns_from_distillation_in_its_phase_and_never_after():
    modules = built(FT(), [(2, 3, 3)], [(4, 3, 3)])
    map_s, map_t = random(1, 2, 2, 3, 3).requires_grad_(), random(2, 2, 4, 3, 3)
    moved = {}
    for epoch in (INIT, AFTER):
        given = replace(map_signals([map_s], [map_t]), epoch=epoch)
        assert list(FT().task(given)) == ["ce"]
        modules.zero_grad()
        map_s.grad = None
        loss_of(FT(), given, modules).backward()
        moved[epoch] = {
            name for name, part in modules.named_children()
            if any(p.grad is not None for p in part.parameters())
        } | ({"student"} if map_s.grad is not None else set())  # fmt: skip
    assert moved == {INIT: {"encoder", "decoder"}, AFTER: {"translator", "student"}}


def test_ab_is_zero_beyond_the_margin_on_the_teachers_side():
    t = random(1, 2, 3, 2, 2)
    modules = built(AB(), [(3, 2, 2)] * 2, [(3, 2, 2)] * 2)
    assert loss_of(AB(), preact_signals([t, 1.5 * t.sign()], [t, t]), modules) == 0
    assert loss_of(AB(), preact_signals([t, 0.5 * t.sign()], [t, t]), modules) > 0


# ---- OFD ----------------------------------------------------------------------------------------


def test_margin_is_the_mean_of_the_negative_half_of_a_normal():
    norm = nn.BatchNorm2d(5)
    means, deviations = [0.0, 1.0, -2.0, 2.9, 9.0], [1.0, -2.0, 0.5, 1.0, 1.0]
    norm.weight.data, norm.bias.data = torch.tensor(deviations), torch.tensor(means)
    expected = []
    for mean, deviation in zip(means[:4], np.abs(deviations[:4]), strict=True):
        x = np.linspace(mean - 12 * deviation, 0.0, 400_001)
        density = np.exp(-(((x - mean) / deviation) ** 2) / 2)
        expected.append(np.trapezoid(x * density, x) / np.trapezoid(density, x))
    expected.append(-3.0)  # less than a thousandth of the last channel is negative
    np.testing.assert_allclose(norm_margin(norm).numpy(), expected, rtol=1e-5)


def test_margin_of_constant_channels_and_of_norms_without_scale():
    norm = nn.BatchNorm2d(2)
    norm.weight.data, norm.bias.data = torch.zeros(2), torch.tensor([-0.5, 0.5])
    assert norm_margin(norm).tolist() == [-0.5, 0.0]
    plain = norm_margin(nn.BatchNorm2d(3, affine=False))
    torch.testing.assert_close(plain, torch.full((3,), -np.sqrt(2 / np.pi)), check_dtype=False)


FEEDING = {
    "resnet8x4": ["bn1", "layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"],
    "resnet20": ["bn1", "layer1.2.bn2", "layer2.2.bn2", "layer3.2.bn2"],
    "ResNet50": ["bn1", "layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"],
    "wrn_16_2": [*(f"block{i}.layer.0.bn1" for i in (1, 2, 3)), "bn1"],
    "vgg13": [f"block{i}.4" for i in range(5)],
    "MobileNetV2": ["conv1.1", *(f"blocks.{i}.conv.7" for i in ("1.1", "2.2", "4.2", "6.0"))],
    "ShuffleV1": ["bn1", "layer1.3.bn3", "layer2.7.bn3", "layer3.3.bn3"],
    "ShuffleV2": ["bn1", None, None, None],  # half the channels pass by the batch norm
}


@pytest.mark.parametrize("name", FEEDING)
def test_norms_that_feed_the_pre_activations(name):
    """Those of the teachers are the ones that mdistiller lists by hand."""
    model = build_model(name, 10).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = feeding_norms(Network(model, taps_of(name)), (3, 16, 16))
    names = {module: path for path, module in model.named_modules()}
    assert [None if norm is None else names[norm] for norm in found] == FEEDING[name]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_ofd_takes_its_margins_from_the_teachers_norms():
    model = build_model("resnet8", 10)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    maps = tuple((c, 8, 8) for c in (16, 16, 32, 64))
    shapes = PairShapes(
        Shapes(10, preact=maps), (Shapes(10, preact=maps),),
        teacher_networks=(Network(model, taps_of("resnet8")),), image=(3, 8, 8),
    )  # fmt: skip
    modules = OFD().build(shapes)
    for i, module in enumerate(modules, start=1):
        norm = getattr(model, f"layer{i}")[0].bn2
        assert torch.equal(module.margin, norm_margin(norm))
    assert not any("margin" in name for name in modules.state_dict())


def test_ofd_leaves_a_student_alone_where_both_are_off():
    t = -random(1, 2, 3, 2, 2).abs() - 0.1
    (layer,) = built(OFD(), [(1, 1, 1), (3, 2, 2)], [(1, 1, 1), (3, 2, 2)])
    layer.connector = nn.Identity()
    assert layer(t.clamp(max=0) - 3.0, t).abs().max() == 0
    assert (layer(t.abs(), t) > 0).all()


# ---- KDSVD --------------------------------------------------------------------------------------


def odd_matrices():
    rank_one = torch.ones(1, 6, 1) * torch.arange(1.0, 5.0)
    return {
        "zero": torch.zeros(1, 6, 4),
        "zero, wide": torch.zeros(1, 3, 4),
        "rank one": rank_one,
        "rank one, wide": rank_one.mT,
        "equal values": torch.eye(4).unsqueeze(0),
        "equal values, wide": torch.eye(4, 6).unsqueeze(0),
        "nearly equal": torch.eye(4).unsqueeze(0) + 1e-7 * torch.rand(1, 4, 4),
        "huge": 1e25 * torch.rand(1, 6, 4),
        "tiny": 1e-25 * torch.rand(1, 6, 4),
        "one number": torch.ones(1, 1, 1),
    }


@pytest.mark.parametrize("what", odd_matrices())
def test_singular_vectors_of_odd_matrices_have_finite_gradients(what):
    matrix = odd_matrices()[what].requires_grad_()
    vectors, values = right_singular(matrix, 4)
    (vectors * torch.randn_like(vectors)).sum().backward()
    assert vectors.isfinite().all()
    assert values.isfinite().all()
    assert matrix.grad.isfinite().all()
    lengths = vectors.detach().norm(dim=1)
    assert torch.allclose(lengths * (lengths - 1.0), torch.zeros(()), atol=1e-4)  # 0 or 1


def test_gradient_between_nearly_equal_values_is_bounded():
    # Two values that differ by 1e-9: in theory a slope of 1e9.
    matrix = torch.diag(torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64)).unsqueeze(0)
    matrix.requires_grad_()
    vectors, _ = right_singular(matrix, 1)
    (vectors * torch.tensor([1.0, -1.0]).view(1, 2, 1)).sum().backward()
    assert matrix.grad.abs().max() < 1.0


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_gradient_of_singular_vectors(shape):
    matrix = random(3, 2, *shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: right_singular(x, 2)[0], matrix)


def test_kdsvd_shows_that_a_feature_is_not_finite():
    maps = [random(i, 2, 3, 4, 4) for i in range(3)]
    broken = [maps[0], maps[1].clone(), maps[2]]
    broken[1][0, 0, 0, 0] = float("nan")
    modules = built(KDSVD(), [(3, 4, 4)] * 3, [(3, 4, 4)] * 3)
    assert not loss_of(KDSVD(), map_signals(broken, maps), modules).isfinite()


@pytest.mark.parametrize("compat", ["none", "mdistiller"])
def test_kdsvd_ignores_scale_and_is_zero_for_equal_features(compat):
    maps_s, maps_t = random_maps(1, 3, [(3, 4, 4)] * 4), random_maps(2, 3, [(3, 4, 4)] * 4)
    method = KDSVD(k=2, compat=compat)
    modules = built(method, [(3, 4, 4)] * 4, [(3, 4, 4)] * 4)
    assert loss_of(method, map_signals(maps_t, maps_t), modules) < 1e-20
    torch.testing.assert_close(
        loss_of(method, map_signals([-1e3 * m for m in maps_s], maps_t), modules),
        loss_of(method, map_signals(maps_s, maps_t), modules),
        rtol=1e-10,
        atol=0,
    )


# ---- all ----------------------------------------------------------------------------------------

RESNET = [(32, 0), (32, 0), (16, 1), (8, 2)]
NETWORKS = {  # sizes of the maps, and powers of two of the widths, of the networks of the 13 pairs
    "resnet": RESNET,
    "ResNet50": [(32, 0), (32, 2), (16, 3), (8, 4), (4, 5)],
    "vgg": [(32, 0), (16, 1), (8, 2), (4, 3), (4, 3)],
    "MobileNetV2": [(16, 1), (16, 0), (8, 1), (4, 2), (2, 4)],
    "shuffle": [(32, 0), (16, 3), (8, 4), (4, 5)],
}
PAIRS = [
    ("resnet", "resnet", 1), ("resnet", "resnet", 2), ("vgg", "vgg", 1), ("vgg", "MobileNetV2", 2),
    ("ResNet50", "MobileNetV2", 2), ("ResNet50", "vgg", 1), ("resnet", "shuffle", 2),
    ("MobileNetV2", "ResNet50", 1), ("shuffle", "resnet", 1),
]  # fmt: skip


def case_maps(name, factor):
    return [(factor * 2**power, size, size) for size, power in NETWORKS[name]]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'compat', '')}")
@pytest.mark.parametrize(("teacher", "student", "factor"), PAIRS)
def test_all_usual_pairs_work(method, teacher, student, factor):
    """The 13 pairs have these combinations of map sizes and of equal and other widths."""
    maps_s, maps_t = case_maps(student, 1), case_maps(teacher, factor)
    shapes = PairShapes(
        Shapes(3, maps=tuple(maps_s), preact=tuple(maps_s)),
        (Shapes(3, maps=tuple(maps_t), preact=tuple(maps_t)),),
    )
    objective = Objective([Part(method)], shapes)
    random_s, random_t = random_maps(1, 2, maps_s), random_maps(2, 2, maps_t)
    leaves = tuple(x.float().requires_grad_() for x in random_s)
    teachers = tuple(x.float() for x in random_t)
    z = torch.zeros(2, 3)
    for epoch in (1, AFTER):
        _, distill = objective(
            signals(Outputs(z, leaves, leaves), Outputs(z, teachers, teachers), epoch=epoch)
        )
        for term in distill.values():
            assert term.isfinite()
            term.backward()
    grads = [x.grad for x in leaves if x.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("method", METHODS[:-1], ids=lambda m: m.name)
@pytest.mark.parametrize("which", ["no maps", "tokens"])
def test_what_is_no_map_is_refused(method, which):
    maps = {"no maps": (), "tokens": ((17, 8),) * 4}[which]
    good = ((4, 8, 8),) * 4
    for one, other in ((maps, good), (good, maps)):
        shapes = PairShapes(Shapes(3, maps=one, preact=one), (Shapes(3, maps=other, preact=other),))
        assert "expected" in method.check(shapes)
        with pytest.raises(IncompatibleError):
            Objective([Part(method)], shapes)


@pytest.mark.parametrize(
    "method",
    [
        AB(init_share=1.5), FSP(init_share=-0.1), FT(init_share=2.0), FT(p1=0.5), FT(p2=0.5),
        FT(rate=0.1), VID(initial_variance=1e-5), KDSVD(k=0),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(method):
    good = Shapes(3, maps=((4, 8, 8),) * 4, preact=((4, 8, 8),) * 4)
    assert "expected" in method.check(PairShapes(good, (good,)))
