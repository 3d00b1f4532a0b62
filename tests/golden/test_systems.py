"""Losses of the related systems against a second implementation, written from the formulas.

As in test_methods.py: float64, scalars, Python loops, no torch.nn.functional, no line shared with
the package. Where an algorithm is compared (Sinkhorn), its held parts are plain Python floats.
"""

import math
from dataclasses import replace
from itertools import product

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
)
from torch import nn

from smskd.errors import IncompatibleError
from smskd.methods import PairShapes, Signals
from smskd.methods.base import Networks
from smskd.methods.cmkd import CMKD
from smskd.methods.info_flow import InfoFlow
from smskd.methods.mixed_views import mixed
from smskd.methods.mt_pkdot import MTPKDOT
from smskd.methods.pkdot import PKDOT
from smskd.methods.r2kd import R2KD, Pruned
from smskd.methods.sinkhorn import sinkhorn_divergence
from smskd.methods.soft_rank import hard_ranks, soft_ranks
from smskd.taps import Network, Outputs, Shapes

NOTHING = nn.Module()

# ---- the slow side: correlation and ranks ---------------------------------------------------------


def number(value):
    return value.item() if isinstance(value, torch.Tensor) else value


def slow_softmax(row, tau=1.0):
    exps = [torch.exp(z / tau) for z in row]
    return [e / sum(exps) for e in exps]


def slow_dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_cosine(a, b):
    return slow_dot(a, b) / torch.sqrt(slow_dot(a, a) * slow_dot(b, b))


def slow_pearson(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return slow_cosine([x - mean_a for x in a], [x - mean_b for x in b])


def slow_soft_ranks(row, temperature):
    return [
        1
        + sum(
            1 / (1 + torch.exp((z - other) / temperature)) for j, other in enumerate(row) if j != c
        )
        for c, z in enumerate(row)
    ]


def slow_hard_ranks(row):
    """Places after sorting, from the largest; equal values share the mean of theirs."""
    places = {}
    for place, value in enumerate(sorted(row, reverse=True), start=1):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in row]


def slow_standardise(row):
    mean = sum(row) / len(row)
    deviation = torch.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - 1))
    return [(v - mean) / (deviation + 1e-7) for v in row]


def slow_entropy(row):
    return -sum(p * torch.log(p) for p in slow_softmax(row))


def slow_cmkd(z_s, z_t, method, weights):
    total = 0.0
    for row_s, row_t, weight in zip(z_s, z_t, weights, strict=True):
        by = {"teacher_entropy": row_t, "student_entropy": row_s.detach(), "none": None}
        by = by[method.difficulty]
        d = 0.5 if by is None else slow_entropy(by) / math.log(len(by))
        a, b = slow_standardise(row_s), slow_standardise(row_t)
        values = slow_pearson(
            slow_softmax(a, method.temperature), slow_softmax(b, method.temperature)
        )
        r = method.rank_temperature
        ranks = slow_pearson(slow_soft_ranks(a, r), slow_soft_ranks(b, r))
        total = total + weight * method.pearson_weight * (1 - d) * (1 - values)
        total = total + weight * method.spearman_weight * d * (1 - ranks)
    return total / len(z_s)


# ---- the slow side: optimal transport -------------------------------------------------------------


def slow_cost(x, y):
    return [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 2 for q in y] for p in x]


def held(rows):
    return [[number(v) for v in row] for row in rows]


def transposed(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def softmin(eps, cost, potential):
    """Of floats: -eps log mean_j exp((potential_j - cost_ij) / eps)."""
    result = []
    for row in cost:
        exponents = [(g - c) / eps for g, c in zip(potential, row, strict=True)]
        top = max(exponents)
        mean = sum(math.exp(e - top) for e in exponents) / len(row)
        result.append(-eps * (top + math.log(mean)))
    return result


def slow_last_softmin(eps, cost, potential):
    """The same once more, of tensors, with the gradient through the cost."""
    result = []
    for row in cost:
        exponents = [(g - c) / eps for g, c in zip(potential, row, strict=True)]
        top = max(number(e) for e in exponents)
        mean = sum(torch.exp(e - top) for e in exponents) / len(row)
        result.append(-eps * (top + torch.log(mean)))
    return result


def mean_of(one, other):
    return [(a + b) / 2 for a, b in zip(one, other, strict=True)]


def slow_sinkhorn(x, y, blur):
    """x and y as lists of points; 16 averaged updates, the blur halved from the diameter on."""
    x_held, y_held = held(x), held(y)
    pairs = ((x_held, y_held), (x_held, x_held), (y_held, y_held))
    xy, xx, yy = (slow_cost(*pair) for pair in pairs)
    yx = transposed(xy)
    diameter = 2 * max(c for cost in (xy, xx, yy) for row in cost for c in row)
    zeros = [0.0] * len(x)
    f, g, p, q = (softmin(max(diameter, blur**2), cost, zeros) for cost in (xy, yx, xx, yy))
    for step in range(16):
        eps = max(diameter / 4**step, blur**2)
        new_f, new_g = mean_of(f, softmin(eps, xy, g)), mean_of(g, softmin(eps, yx, f))
        p, q = mean_of(p, softmin(eps, xx, p)), mean_of(q, softmin(eps, yy, q))
        f, g = new_f, new_g
    total = 0.0
    for cloud, other, to_other, to_self in ((x, y_held, g, p), (y, x_held, f, q)):
        across = slow_last_softmin(blur**2, slow_cost(cloud, other), to_other)
        within = slow_last_softmin(blur**2, slow_cost(cloud, held(cloud)), to_self)
        total = total + sum(a - b for a, b in zip(across, within, strict=True)) / len(cloud)
    return total


def slow_cosines(h):
    return [[slow_cosine(a, b) for b in h] for a in h]


def slow_transport(similar_s, similar_t, k, anchor, blur):
    clouds = []
    lowest = [min(v for row in s for v in row) for s in (similar_s, similar_t)]
    for similar, low in ((similar_t, lowest[1]), (similar_s, lowest[0])):
        rows = []
        for i, row in enumerate(similar):
            order = sorted(
                range(len(row)),
                key=lambda j, i=i: (number(similar_t[i][j]), number(similar_s[i][j])),
                reverse=anchor == "highest",
            )
            rows.append([row[j] - low for j in order[:k]])
        clouds.append(rows)
    return slow_sinkhorn(clouds[0], clouds[1], blur)


def slow_ce(row, label):
    return -torch.log(slow_softmax(row)[label])


def slow_mt_pkdot(h_s, teachers, labels, method):
    similar_s = slow_cosines(h_s)
    similar = [slow_cosines(t.pooled) for t in teachers]
    losses = [
        [slow_ce(row, y) for row, y in zip(t.logits, labels.tolist(), strict=True)]
        for t in teachers
    ]
    if method.select == "batch":
        means = [sum(of_one) / len(of_one) for of_one in losses]
        similar = [similar[means.index(min(means))]]
    elif method.select == "sample":
        best = [column.index(min(column)) for column in transposed(losses)]
        similar = [[similar[t][i] for i, t in enumerate(best)]]
    total = 0.0
    for s in similar:
        ot = slow_transport(similar_s, s, method.columns, method.anchor, method.blur)
        n = len(s)
        gaps = [sum(s[i][j] - similar_s[i][j] for i in range(n)) / n for j in range(n)]
        centroid = torch.sqrt(slow_dot(gaps, gaps)) if method.centroid_weight else 0.0
        total = total + method.weight * ot + method.centroid_weight * centroid
    return total / len(similar)


# ---- the slow side: information flow --------------------------------------------------------------


def slow_flow(f_s, f_t):
    """Of two lists of flat features."""
    n, total = len(f_s), 0.0
    kernels = []
    for f in (f_s, f_t):
        cosine = [[(1 + c) / 2 for c in row] for row in slow_cosines(f)]
        student_t = [
            [
                1 / (1 + torch.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) + 1e-6))
                for b in f
            ]
            for a in f
        ]
        kernels.append((cosine, student_t))
    for q, p in zip(*kernels, strict=True):
        for i, j in product(range(n), repeat=2):
            q_ij, p_ij = q[i][j] / sum(q[i]), p[i][j] / sum(p[i])
            total = total + (p_ij - q_ij) * (torch.log(p_ij) - torch.log(q_ij))
    return total / n**2


def slow_info_flow(h_s, h_t, maps_s, maps_t, method, epoch):
    loss = method.weight * slow_flow(list(h_s), list(h_t))
    for m_s, m_t in zip(maps_s[::-1], maps_t[::-1], strict=False):
        flat = [[list(sample.reshape(-1)) for sample in m] for m in (m_s, m_t)]
        loss = loss + method.map_weight * method.decay ** (epoch - 1) * slow_flow(*flat)
    return loss


# ---- the slow side: R2KD ---------------------------------------------------------------------------


def slow_values(z_s, z_t, tau, weights):
    p_s, p_t = [[slow_softmax(row, tau) for row in z] for z in (z_s, z_t)]
    by_sample = [1 - abs(slow_cosine(a, b)) for a, b in zip(p_s, p_t, strict=True)]
    columns = zip(transposed(p_s), transposed(p_t), strict=True)
    by_class = [1 - abs(slow_cosine(a, b)) for a, b in columns]
    by_class = sum(by_class) / len(by_class)
    rows = zip(weights, by_sample, strict=True)
    return tau**2 * sum(w * (a + by_class) for w, a in rows) / len(p_s)


def slow_rank_gap(z_s, z_t, method, weights):
    total = 0.0
    for row_s, row_t, weight in zip(z_s, z_t, weights, strict=True):
        if method.rank == "hard":
            a, b = (
                [torch.tensor(r).double() for r in slow_hard_ranks(row.tolist())]
                for row in (row_s, row_t)
            )
        else:
            a, b = (slow_soft_ranks(row, method.rank_temperature) for row in (row_s, row_t))
        total = total + weight * (1 - slow_pearson(a, b))
    return total / len(z_s)


def slow_linear(rows, weight, bias):
    return [[slow_dot(w, x) + b for w, b in zip(weight, bias, strict=True)] for x in rows]


def slow_pruned(weight, share):
    flat = sorted((abs(number(v)), i) for i, v in enumerate(weight.reshape(-1)))
    gone = {i for _, i in flat[: round(share * len(flat))]}
    kept = [0.0 if i in gone else number(v) for i, v in enumerate(weight.reshape(-1))]
    return torch.tensor(kept, dtype=torch.float64).reshape(weight.shape)


def slow_teacher(images, model, share):
    """Logits of a network Flatten, Linear, ReLU, Linear, whose layers lack their smallest weights."""
    rows = [list(sample.reshape(-1)) for sample in images]
    rows = slow_linear(rows, slow_pruned(model[1].weight, share), model[1].bias.tolist())
    rows = [[max(v, 0.0 * v) for v in row] for row in rows]
    rows = slow_linear(rows, slow_pruned(model[3].weight, share), model[3].bias.tolist())
    return torch.stack([torch.stack(row) for row in rows]).detach()


def slow_box(height, width, side):
    cy, cx = int(torch.randint(height, ())), int(torch.randint(width, ()))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    return {
        (y, x)
        for y in range(max(0, cy - half_y), min(height, cy + half_y))
        for x in range(max(0, cx - half_x), min(width, cx + half_x))
    }


def slow_mixed(images, how):
    """The package's draws in the package's order, applied pixel by pixel."""
    batch, channels, height, width = images.shape
    out = images.clone()
    places = list(product(range(batch), range(channels), range(height), range(width)))
    if how in ("mixup", "cutmix", "cutmix_pick"):
        alpha = torch.tensor(0.2 if how == "mixup" else 1.0)
        share = torch.distributions.Beta(alpha, alpha).sample().double()
        partner = torch.randperm(batch).tolist()
    if how == "mixup":
        for b, c, y, x in places:
            out[b, c, y, x] = share * images[b, c, y, x] + (1 - share) * images[partner[b], c, y, x]
    elif how == "none":
        return out
    else:
        box = slow_box(height, width, 0.25 if how == "cutout" else math.sqrt(1 - share))
        for b, c, y, x in places:
            if (y, x) in box:
                out[b, c, y, x] = 0.0 if how == "cutout" else images[partner[b], c, y, x]
    return out


def slow_r2kd(z, weight, images, teacher, method, weights):
    """z is what the student says on the clean images; on others it is linear in the pixels."""

    def taught(pixels):
        full = slow_teacher(pixels, teacher, 0.0)
        share = method.pruned_weight
        return full, (1 - share) * full + share * slow_teacher(pixels, teacher, method.prune_share)

    views = [(list(z), taught(images)[1], weights)]
    if method.augment != "none":
        pixels = slow_mixed(images, method.augment)
        full, target = taught(pixels)
        keep = list(range(len(images)))
        if method.augment == "cutmix_pick":
            keep.sort(key=lambda i: -number(slow_entropy(full[i])))
            keep = keep[: (len(keep) + 1) // 2]
        rows = slow_linear([list(p.reshape(-1)) for p in pixels], weight, [0.0] * len(weight))
        said = [torch.stack(rows[i]) for i in keep]
        views.append((said, [target[i] for i in keep], [weights[i] for i in keep]))
    return sum(
        method.value_weight * slow_values(a, b, method.temperature, w)
        + method.rank_weight * slow_rank_gap(a, b, method, w)
        for a, b, w in views
    )


# ---- comparisons ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes"), [(1, 3), (3, 5), (4, 9)])
@pytest.mark.parametrize(
    "method",
    [
        CMKD(),
        CMKD(difficulty="student_entropy", temperature=1.0, rank_temperature=1.0),
        CMKD(difficulty="none", pearson_weight=0.5, spearman_weight=3.0),
    ],
)
def test_cmkd(seed, batch, classes, method):
    given = logit_signals(seed, batch, classes)
    weights = random(seed + 7, batch).abs()
    assert_same(
        lambda z: loss_of(
            method, replace(given.with_logits(z, [given.teacher.logits]), weights=weights)
        ),
        lambda z: slow_cmkd(z, given.teacher.logits, method, weights.tolist()),
        [given.student.logits],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n", "blur"), [(1, 0.1), (3, 0.1), (5, 0.5), (4, 9.0)])
def test_sinkhorn_divergence(seed, n, blur):
    x, y = random(seed, n, 3), random(seed + 9, n, 3)
    assert_same(
        lambda a, b: sinkhorn_divergence(a, b, blur),
        lambda a, b: slow_sinkhorn(list(a), list(b), blur),
        [x, y],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("batch", "method"),
    [
        (1, PKDOT()),
        (2, PKDOT()),
        (5, PKDOT()),
        (5, PKDOT(columns=2)),
        (6, PKDOT(columns=3, anchor="highest", weight=2.0)),
        (4, PKDOT(columns=4, blur=0.5)),
    ],
)
def test_pkdot(seed, batch, method):
    h_s, h_t = random(seed, batch, 4), random(seed + 9, batch, 6, scale=3.0)
    settings = (method.columns, method.anchor, method.blur)
    assert_same(
        lambda h: loss_of(method, pooled_signals(h, h_t)),
        lambda h: method.weight * slow_transport(slow_cosines(h), slow_cosines(h_t), *settings),
        [h_s],
    )


def teachers_signals(seed, batch, h_s, number=3):
    labels = torch.arange(batch) % 3
    teachers = tuple(
        Outputs(random(seed + 30 + i, batch, 3), pooled=random(seed + 60 + i, batch, 4 + i))
        for i in range(number)
    )
    student = Outputs(torch.zeros(batch, 3, dtype=torch.float64), pooled=h_s)
    return Signals(student, teachers, labels, torch.arange(batch), 1, 240)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("select", ["batch", "sample", "mean"])
@pytest.mark.parametrize(("batch", "columns", "centroid"), [(2, 30, 0.0), (5, 3, 0.0), (4, 2, 0.2)])
def test_mt_pkdot(seed, select, batch, columns, centroid):
    method = MTPKDOT(columns=columns, centroid_weight=centroid, select=select)
    h_s = random(seed, batch, 5)
    given = teachers_signals(seed, batch, h_s)
    assert_same(
        lambda h: loss_of(method, replace(given, student=replace(given.student, pooled=h))),
        lambda h: slow_mt_pkdot(h, given.teachers, given.labels, method),
        [h_s],
    )


def flow_signals(h_s, h_t, maps_s, maps_t, epoch):
    given = map_signals(maps_s, maps_t)
    student = replace(given.student, pooled=h_s)
    return replace(
        given, student=student, teachers=(replace(given.teacher, pooled=h_t),), epoch=epoch
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "epoch"), [(1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("surplus", [0, 1])
def test_info_flow(seed, batch, epoch, surplus):
    method = InfoFlow(map_weight=20.0, decay=0.6)
    maps_s = [random(seed, batch, 2, 3, 3), random(seed + 1, batch, 3, 2, 1)]
    maps_t = [random(seed + 2 + i, batch, 2, 2 + i, 2) for i in range(2 + surplus)]
    h_s, h_t = random(seed + 5, batch, 4), random(seed + 6, batch, 3, scale=2.0)
    assert_same(
        lambda h, *m: loss_of(method, flow_signals(h, h_t, m, maps_t, epoch)),
        lambda h, *m: slow_info_flow(h, h_t, m, maps_t, method, epoch),
        [h_s, *maps_s],
    )


def small_teacher(seed, classes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, classes)).double()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = random(seed + i, *parameter.shape)
    return model.eval().requires_grad_(False)


def r2kd_signals(z, weight, images, teacher, weights=None):
    def says(pixels):
        return Outputs(pixels.flatten(1) @ weight.T)

    def teaches(pixels):
        return Outputs(teacher(pixels))

    return Signals(
        Outputs(z), (teaches(images),), torch.zeros(len(z), dtype=torch.long),
        torch.arange(len(z)), 1, 240, Networks(images, says, (teaches,)), weights,
    )  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "method",
    [
        R2KD(augment="none", rank="hard"),
        R2KD(augment="mixup", pruned_weight=0.8, prune_share=0.5),
        R2KD(augment="cutmix", rank_temperature=0.3),
        R2KD(augment="cutout", value_weight=0.5, temperature=1.0),
        R2KD(augment="cutmix_pick", rank="hard", prune_share=0.0),
    ],
    ids=lambda method: method.augment,
)
def test_r2kd(seed, batch, method):
    images, teacher = random(seed, batch, 1, 4, 4), small_teacher(seed, 5)
    weights = random(seed + 3, batch).abs()
    modules = Pruned(teacher, method.prune_share)

    def fast(z, weight):
        torch.manual_seed(seed)
        return loss_of(method, r2kd_signals(z, weight, images, teacher, weights), modules)

    def slow(z, weight):
        torch.manual_seed(seed)
        return slow_r2kd(z, weight, images, teacher, method, weights.tolist())

    assert_same(fast, slow, [random(seed + 1, batch, 5, scale=3.0), random(seed + 2, 5, 16)])


# ---- ranks and correlation ------------------------------------------------------------------------


def test_soft_ranks_become_hard_ranks():
    z = random(0, 4, 7)
    torch.testing.assert_close(soft_ranks(z, 1e-4), hard_ranks(z), rtol=0, atol=1e-6)
    for ranks in (soft_ranks(z, 1.0), hard_ranks(z)):
        torch.testing.assert_close(ranks.sum(dim=1), torch.full((4,), 28.0).double())
    ties = torch.tensor([[1.0, 3.0, 1.0, 2.0]], requires_grad=True)
    assert hard_ranks(ties).tolist() == [[3.5, 1.0, 3.5, 2.0]]
    assert not hard_ranks(ties).requires_grad


def test_cmkd_follows_values_where_the_teacher_is_sure_and_ranks_where_it_is_not():
    given = logit_signals(0, 4, 5)
    sure, unsure = 1000 * given.teacher.logits, 1e-9 * given.teacher.logits
    terms = CMKD().distill(given.with_logits(given.student.logits, [sure]), NOTHING)
    assert terms["spearman"] < 1e-12 < terms["pearson"]
    terms = CMKD().distill(given.with_logits(given.student.logits, [unsure]), NOTHING)
    assert terms["pearson"] < 1e-12 < terms["spearman"]


def test_cmkd_is_at_most_the_sum_of_twice_its_weights():
    given = logit_signals(1, 3, 6)
    turned = CMKD().distill(
        given.with_logits(given.student.logits, [-given.student.logits]), NOTHING
    )
    assert 1.9 < sum(turned.values()) < 4.0


# ---- optimal transport ----------------------------------------------------------------------------


def test_sinkhorn_divergence_of_a_shifted_cloud_is_half_the_squared_shift():
    x, shift = random(0, 6, 3, scale=0.3), torch.tensor([0.3, -0.2, 0.1]).double()
    found = sinkhorn_divergence(x, x + shift, 0.1)
    torch.testing.assert_close(found, shift.square().sum() / 2, rtol=1e-3, atol=0)
    assert abs(sinkhorn_divergence(x, x, 0.1)) < 1e-15
    torch.testing.assert_close(
        sinkhorn_divergence(x, x * 2, 0.1), sinkhorn_divergence(x * 2, x, 0.1), rtol=1e-12, atol=0
    )


POINTS = [[0, 0], [1, 0], [0, 2], [2, 2]], [[0.5, 0.5], [1, 1], [2, 0], [0, 1]]
CONVERGED = {2.0: 0.1540120411312782, 1.0: 0.35191259151131, 0.7: 0.48789949237463}
"""By blur: the divergence of these points as POT's ``sinkhorn_log`` has it, at a tolerance of
1e-15."""


@pytest.mark.parametrize("blur", CONVERGED)
def test_sinkhorn_divergence_is_that_of_pot(blur):
    x, y = (torch.tensor(points, dtype=torch.float64) for points in POINTS)
    assert sinkhorn_divergence(x, y, blur).item() == pytest.approx(CONVERGED[blur], rel=1e-4)


def test_sinkhorn_divergence_has_the_gradient_of_the_optimal_plan():
    x, y, blur = random(1, 5, 3), random(2, 5, 3), 1.0

    def plan(a, b):
        """Of the textbook's alternating updates, at their limit."""
        cost = slow_cost(held(a), held(b))
        f, g = [0.0] * len(a), [0.0] * len(b)
        for _ in range(300):
            f = softmin(blur**2, cost, g)
            g = softmin(blur**2, transposed(cost), f)
        size = len(a) * len(b)
        return [
            [math.exp((f[i] + g[j] - c) / blur**2) / size for j, c in enumerate(row)]
            for i, row in enumerate(cost)
        ]

    across, within = plan(x, y), plan(x, x)
    pulls = [
        sum(across[i][j] * (x[i] - y[j]) - within[i][j] * (x[i] - x[j]) for j in range(5))
        for i in range(5)
    ]
    moved = x.clone().requires_grad_()
    sinkhorn_divergence(moved, y, blur).backward()
    torch.testing.assert_close(moved.grad, torch.stack(pulls), rtol=1e-2, atol=1e-3)


def test_sinkhorn_divergence_of_a_batch_of_clouds():
    x, y = random(3, 2, 4, 3), random(4, 2, 4, 3)
    together = sinkhorn_divergence(x, y, 0.2)
    alone = torch.stack([sinkhorn_divergence(a, b, 0.2) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [PKDOT(), PKDOT(columns=3, anchor="highest")])
def test_pkdot_ignores_scale_and_rotation_and_vanishes_for_the_same_structure(method):
    h_s, h_t = random(3, 6, 4), random(4, 6, 5)
    rotation, _ = torch.linalg.qr(random(5, 4, 4))
    turned = 7.0 * random(6, 6, 1).abs() * (h_s @ rotation)
    torch.testing.assert_close(
        loss_of(method, pooled_signals(turned, h_t)), loss_of(method, pooled_signals(h_s, h_t)),
        rtol=1e-10, atol=0,
    )  # fmt: skip
    assert abs(loss_of(method, pooled_signals(turned, h_s))) < 1e-12


def test_pkdot_of_a_batch_of_one_is_zero_and_refused_where_batches_are_known():
    h = random(0, 1, 4).requires_grad_()
    loss = loss_of(PKDOT(), pooled_signals(h, random(1, 1, 3)))
    loss.backward()
    assert loss == 0
    assert not h.grad.any()
    shapes = Shapes(3, pooled=4)
    assert "expected batches of at least 2" in PKDOT().check(
        PairShapes(shapes, (shapes,), batch_size=1)
    )
    for size in (0, 2, 64):
        assert PKDOT().check(PairShapes(shapes, (shapes,), batch_size=size)) is None


@pytest.mark.parametrize("select", ["batch", "sample", "mean"])
def test_mt_pkdot_with_one_teacher_is_pkdot(select):
    given = teachers_signals(0, 5, random(0, 5, 4), number=1)
    many, one = MTPKDOT(weight=0.6, select=select), PKDOT(weight=0.6)
    torch.testing.assert_close(loss_of(many, given), loss_of(one, given), rtol=1e-13, atol=0)


def test_mt_pkdot_takes_the_best_teacher_of_batch_or_sample():
    given = teachers_signals(0, 6, random(0, 6, 4))
    right = 5.0 * torch.eye(3, dtype=torch.float64)[given.labels]
    first_half = torch.arange(6).unsqueeze(1) < 3
    knows = [torch.zeros(6, 3).double(), right, right.where(first_half, -right)]
    teachers = tuple(replace(t, logits=z) for t, z in zip(given.teachers, knows, strict=True))
    given = replace(given, teachers=teachers)
    only_second = replace(given, teachers=teachers[1:2])
    alone = loss_of(MTPKDOT(), only_second)
    assert loss_of(MTPKDOT(), given) == alone
    assert loss_of(MTPKDOT(select="sample"), given) == alone  # ties go to the first
    assert loss_of(MTPKDOT(select="mean"), given) != alone
    swapped = replace(given, teachers=(teachers[0], teachers[2]))
    assert loss_of(MTPKDOT(select="sample"), swapped) != loss_of(MTPKDOT(), swapped)


def test_mt_pkdot_refuses_a_second_teacher_that_it_cannot_use():
    good, bare = Shapes(3, pooled=4), Shapes(3)
    assert "no pooled feature" in MTPKDOT().check(PairShapes(good, (good, bare)))
    other = Shapes(4, pooled=4)
    assert "expected the same number" in MTPKDOT().check(PairShapes(good, (good, other)))
    assert MTPKDOT(select="mean").check(PairShapes(good, (good, other))) is None


# ---- information flow -----------------------------------------------------------------------------


def test_info_flow_fades_the_maps_from_the_first_epoch_on():
    maps_s, maps_t = [random(0, 4, 2, 3, 3)], [random(1, 4, 2, 3, 3)]
    h_s, h_t = random(2, 4, 3), random(3, 4, 3)
    terms = [
        InfoFlow().distill(flow_signals(h_s, h_t, maps_s, maps_t, e), NOTHING) for e in (1, 2, 3)
    ]
    first = InfoFlow(map_weight=1.0).distill(flow_signals(h_s, h_t, maps_s, maps_t, 1), NOTHING)
    for term, weight in zip(terms, (100.0, 70.0, 49.0), strict=True):
        torch.testing.assert_close(term["maps"], weight * first["maps"])
        assert term["pooled"] == first["pooled"]
    last = InfoFlow(layers="last").distill(flow_signals(h_s, h_t, maps_s, maps_t, 1), NOTHING)
    assert last == {"pooled": first["pooled"]}


def test_info_flow_vanishes_for_equal_flow_and_needs_maps_only_where_it_compares_them():
    maps, h = [random(0, 4, 2, 3, 3), random(1, 4, 3, 2, 2)], random(2, 4, 3)
    assert loss_of(InfoFlow(), flow_signals(h, h, maps, maps, 1)) == 0
    no_maps = Shapes(3, pooled=4)
    assert "expected at least 1" in InfoFlow().check(PairShapes(no_maps, (no_maps,)))
    assert InfoFlow(layers="last").check(PairShapes(no_maps, (no_maps,))) is None


# ---- R2KD -----------------------------------------------------------------------------------------


def test_r2kd_with_hard_ranks_trains_the_values_only():
    images, teacher = random(0, 4, 1, 4, 4), small_teacher(0, 5)
    z = random(1, 4, 5).requires_grad_()
    grads = []
    for method in (R2KD(rank="hard"), R2KD(rank="hard", rank_weight=9.0), R2KD(rank="soft")):
        torch.manual_seed(0)
        given = r2kd_signals(z, random(2, 5, 16), images, teacher)
        grads.append(torch.autograd.grad(loss_of(method, given, Pruned(teacher, 0.1)), z)[0])
    assert torch.equal(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


def test_r2kd_vanishes_at_the_teacher():
    images, teacher = random(0, 4, 1, 4, 4), small_teacher(0, 5)
    method = R2KD(augment="none", pruned_weight=0.0)
    given = r2kd_signals(
        teacher(images).clone().requires_grad_(), random(2, 5, 16), images, teacher
    )
    loss = loss_of(method, given, Pruned(teacher, 0.1))
    loss.backward()
    assert abs(loss) < 1e-12
    assert given.student.logits.grad.abs().max() < 1e-12


def test_pruned_teacher_lacks_a_tenth_of_each_layer_and_is_no_part_of_the_stage():
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Flatten(), nn.Linear(360, 5)
    ).requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    shapes = Shapes(5)
    modules = R2KD().build(PairShapes(shapes, (shapes,), teacher_networks=(Network(teacher),)))
    pruned = modules.copy[0]
    assert (pruned[0].weight == 0).sum() == 27
    assert (pruned[3].weight == 0).sum() == 180
    kept = pruned[3].weight != 0
    assert torch.equal(pruned[3].weight[kept], teacher[3].weight[kept])
    assert teacher[3].weight[~kept].abs().max() <= teacher[3].weight[kept].abs().min()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert pruned.state_dict().keys() == before.keys()
    assert not list(modules.parameters())
    assert not modules.state_dict()
    modules.train()
    assert not any(module.training for module in pruned.modules())
    assert not any(parameter.requires_grad for parameter in pruned.parameters())
    with pytest.raises(IncompatibleError, match="expected"):
        R2KD().build(PairShapes(shapes, (shapes,)))


@pytest.mark.parametrize("how", ["none", "mixup", "cutmix", "cutmix_pick", "cutout"])
def test_mixed_views_follow_the_seed_and_leave_the_images(how):
    images = random(0, 6, 3, 32, 32).to(torch.float32)
    before = images.clone()
    views = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(mixed(images, how))
    assert torch.equal(images, before)
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2]) == (how == "none")
    assert views[0].shape == images.shape
    assert views[0].dtype == images.dtype


def test_cutout_takes_8_of_32_and_16_of_64_pixels():
    for size, square in ((32, 8), (64, 16)):
        lost = []
        for seed in range(30):
            torch.manual_seed(seed)
            lost.append(int((mixed(torch.ones(1, 1, size, size), "cutout") == 0).sum()))
        assert max(lost) == square**2
        assert min(lost) >= (square // 2) ** 2
