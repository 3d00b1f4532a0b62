"""Feature methods with trained adapters, against implementations written from the formulas.

SRRL, SemCKD, ReviewKD, SimKD, MGD and CAT-KD. The slow side computes with scalars in float64, has
its own convolution, batch norm, pooling and resizing, and shares no line with the package. Values
and gradients, those of the modules' parameters included, must agree to 1e-10.
"""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from golden_tools import SEEDS, assert_same, loss_of, random, signals

from smskd.errors import IncompatibleError
from smskd.methods.base import Networks, PairShapes
from smskd.methods.catkd import CATKD
from smskd.methods.mgd import MGD
from smskd.methods.reviewkd import ReviewKD
from smskd.methods.semckd import SemCKD
from smskd.methods.simkd import SimKD
from smskd.methods.srrl import SRRL, AnyBatchNorm2d
from smskd.models import build_model, taps_of
from smskd.taps import FEATURES, Network, Outputs, Shapes, Taps, probe

# ---- the slow side ------------------------------------------------------------------------------
# A batch of maps is nested lists [b][c][i][j] of scalar tensors.


def lists(x):
    """Nested lists of the scalars of a tensor."""
    flat = iter(x.reshape(-1).unbind())

    def nest(shape):
        return [nest(shape[1:]) for _ in range(shape[0])] if shape else next(flat)

    return nest(x.shape)


def dims(x):
    return len(x), len(x[0]), len(x[0][0]), len(x[0][0][0])


def slow_conv(x, weight, bias=None):
    """Odd kernel, stride 1, zeros around, so that height and width stay."""
    batch, channels, height, width = dims(x)
    outputs, _, k, _ = dims(weight)

    def at(b, o, i, j):
        value = bias[o] if bias is not None else 0.0
        for c, u, v in product(range(channels), range(k), range(k)):
            r, s = i + u - k // 2, j + v - k // 2
            if 0 <= r < height and 0 <= s < width:
                value = value + x[b][c][r][s] * weight[o][c][u][v]
        return value

    return [
        [[[at(b, o, i, j) for j in range(width)] for i in range(height)] for o in range(outputs)]
        for b in range(batch)
    ]


def each(x, change):
    """The same nested lists with ``change(value, channel)`` of each value."""
    return [
        [[[change(v, c) for v in row] for row in image] for c, image in enumerate(sample)]
        for sample in x
    ]


def slow_norm(x, scale, shift):
    """Batch norm in training mode: statistics over batch and positions, biased variance."""
    batch, channels, height, width = dims(x)
    places = list(product(range(batch), range(height), range(width)))
    mean = [sum(x[b][c][i][j] for b, i, j in places) / len(places) for c in range(channels)]
    variance = [
        sum((x[b][c][i][j] - mean[c]) ** 2 for b, i, j in places) / len(places)
        for c in range(channels)
    ]
    return each(
        x, lambda v, c: (v - mean[c]) / torch.sqrt(variance[c] + 1e-5) * scale[c] + shift[c]
    )


def slow_relu(x):
    return each(x, lambda v, _: v if v > 0 else 0.0 * v)


def slow_pool(x, height, width):
    """Windows from floor(i H / h) to ceil((i + 1) H / h) - 1, so also to larger sizes."""
    _, _, full_h, full_w = dims(x)

    def cell(image, i, j):
        rows = range(i * full_h // height, -(-(i + 1) * full_h // height))
        columns = range(j * full_w // width, -(-(j + 1) * full_w // width))
        values = [image[r][c] for r in rows for c in columns]
        return sum(values) / len(values)

    return [
        [[[cell(image, i, j) for j in range(width)] for i in range(height)] for image in sample]
        for sample in x
    ]


def slow_nearest(x, height, width):
    _, _, full_h, full_w = dims(x)
    return [
        [
            [[image[i * full_h // height][j * full_w // width] for j in range(width)]
             for i in range(height)]
            for image in sample
        ]
        for sample in x
    ]  # fmt: skip


def slow_gap(x, y):
    """Mean squared difference of each sample."""
    flat = [[[v for image in s for row in image for v in row] for s in z] for z in (x, y)]
    return [
        sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one)
        for one, other in zip(*flat, strict=True)
    ]


def slow_linear(rows, weight, bias=None):
    return [
        [
            sum(a * b for a, b in zip(row, weight[o], strict=True)) + (bias[o] if bias else 0.0)
            for o in range(len(weight))
        ]
        for row in rows
    ]


def flat(x):
    return [[v for image in sample for row in image for v in row] for sample in x]


def mean(values):
    return sum(values) / len(values)


# ---- help for the comparisons -------------------------------------------------------------------


def shapes_of(student, teacher, width_t=None, classes=3, batch_size=0):
    """PairShapes of two Outputs in float64, and a teacher whose classifier is random."""

    def sizes(outputs):
        return Shapes(
            classes,
            tuple(tuple(m.shape[1:]) for m in outputs.maps),
            tuple(tuple(m.shape[1:]) for m in outputs.preact),
            0 if outputs.pooled is None else outputs.pooled.shape[1],
            () if outputs.spatial is None else tuple(outputs.spatial.shape[1:]),
        )

    networks = (classifier_only(width_t, classes),) if width_t else ()
    return PairShapes(
        sizes(student), (sizes(teacher),), teacher_networks=networks, batch_size=batch_size
    )


def classifier_only(width, classes):
    linear = torch.nn.Linear(width, classes).double()
    with torch.no_grad():
        linear.weight.copy_(random(91, classes, width))
        linear.bias.copy_(random(92, classes))
    return Network(torch.nn.Sequential(linear), Taps(pooled="0:input", classifier="0"))


def parameters_of(module, seed):
    """Names of a module's parameters, and random values for them."""
    names = [name for name, _ in module.named_parameters()]
    values = [random(seed + i, *p.shape) for i, p in enumerate(module.parameters())]
    return names, values


def with_values(module, names, values):
    """A copy of a module whose parameters are these tensors, which may be part of a graph."""
    module = copy.deepcopy(module).double()
    for name, value in zip(names, values, strict=True):
        parent, _, last = name.rpartition(".")
        owner = module.get_submodule(parent)
        del owner._parameters[last]
        setattr(owner, last, value)
    return module


def zeros(batch, classes=3):
    return torch.zeros(batch, classes, dtype=torch.float64)


# ---- SRRL ---------------------------------------------------------------------------------------


def slow_srrl(spatial, feature_t, classifier, parameters, pool_first):
    conv, scale, shift = map(lists, parameters)
    weight, bias = lists(classifier.weight.detach()), lists(classifier.bias.detach())
    x = lists(spatial)
    x = slow_pool(x, 1, 1) if pool_first else x
    x = slow_pool(slow_relu(slow_norm(slow_conv(x, conv), scale, shift)), 1, 1)
    feature, target = flat(x), lists(feature_t)
    logits, aim = slow_linear(feature, weight, bias), slow_linear(target, weight, bias)
    return [
        mean(
            [
                (a - b) ** 2
                for r, t in zip(one, other, strict=True)
                for a, b in zip(r, t, strict=True)
            ]
        )
        for one, other in ((feature, target), (logits, aim))
    ]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("compat", "batch", "size"),
    [("none", 1, (2, 2)), ("none", 3, (3, 2)), ("simkd", 2, (3, 2)), ("simkd", 4, (2, 2))],
)
def test_srrl(seed, compat, batch, size):
    spatial, feature_t = random(seed, batch, 3, *size), random(seed + 5, batch, 4)
    teacher = Outputs(zeros(batch), pooled=feature_t)
    shapes = shapes_of(Outputs(zeros(batch), spatial=spatial), teacher, width_t=4)
    method = SRRL(weight=0.7, classifier_weight=5.0, compat=compat)
    module = method.build(shapes)
    names, values = parameters_of(module, seed + 20)
    assert names == ["transfer.0.conv.weight", "transfer.0.norm.weight", "transfer.0.norm.bias"]
    classifier = shapes.teacher_networks[0].classifier

    def slow(f, *w):
        feature, logits = slow_srrl(f, feature_t, classifier, w, compat == "simkd")
        return 0.7 * feature + 5.0 * logits

    assert_same(
        lambda f, *w: loss_of(
            method,
            signals(Outputs(zeros(batch), spatial=f), teacher),
            with_values(module, names, w),
        ),
        slow,
        [spatial, *values],
    )


def test_srrl_makes_its_copy_of_the_classifier_anew_and_draws_he_weights():
    shapes = PairShapes(
        Shapes(3, spatial=(400, 2, 2)),
        (Shapes(3, pooled=100),),
        teacher_networks=(classifier_only(100, 3),),
    )
    module = SRRL().build(shapes)
    assert not any(name.startswith("classifier") for name in module.state_dict())
    conv = module.get_parameter("transfer.0.conv.weight")
    assert conv.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.02)  # fan out, not fan in
    with pytest.raises(IncompatibleError, match="classifier"):
        SRRL().build(replace(shapes, teacher_networks=()))


# ---- SemCKD -------------------------------------------------------------------------------------


def slow_kd(z_s, z_t, tau):
    def soft(row):
        exps = [torch.exp(v / tau) for v in row]
        return [e / sum(exps) for e in exps]

    def kl(p, q):
        return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))

    return mean(
        [tau**2 * kl(soft(t), soft(s)) for s, t in zip(lists(z_s), lists(z_t), strict=True)]
    )


def slow_unit(row):
    norm = torch.sqrt(sum(v * v for v in row))
    return [v / norm for v in row]


def slow_embedding(x, parameters, order, length):
    """One unit vector a sample from its inner products with the samples in order."""
    w1, b1, w2, b2 = map(lists, parameters)
    rows = flat(x)
    products = [
        [sum(a * b for a, b in zip(one, rows[o], strict=True)) for o in order] for one in rows
    ]
    filled = [(row + [0.0] * length)[:length] for row in products]
    hidden = [[v if v > 0 else 0.0 * v for v in row] for row in slow_linear(filled, w1, b1)]
    return [slow_unit(row) for row in slow_linear(hidden, w2, b2)]


def slow_projector(x, parameters):
    conv1, scale1, shift1, conv2, scale2, shift2, conv3 = map(lists, parameters)
    x = slow_relu(slow_norm(slow_conv(x, conv1), scale1, shift1))
    x = slow_relu(slow_norm(slow_conv(x, conv2), scale2, shift2))
    return slow_conv(x, conv3)


def slow_semckd(maps_s, maps_t, parameters, length, in_batch_order):
    maps_s, maps_t = [lists(m) for m in maps_s[1:]], [lists(m) for m in maps_t[1:]]
    batch, (n_s, n_t) = len(maps_s[0]), (len(maps_s), len(maps_t))
    power = [sum(v * v for m in maps_t for v in flat(m)[b]) for b in range(batch)]
    order = range(batch) if in_batch_order else sorted(range(batch), key=lambda b: -power[b])
    parts = [parameters[4 * i : 4 * i + 4] for i in range(n_s + n_t)]
    queries = [slow_embedding(m, p, order, length) for m, p in zip(maps_s, parts, strict=False)]
    keys = [slow_embedding(m, p, order, length) for m, p in zip(maps_t, parts[n_s:], strict=True)]
    rest = parameters[4 * (n_s + n_t) :]
    gaps = {}
    for number, (s, t) in enumerate(product(range(n_s), range(n_t))):
        size = [min(dims(maps_s[s])[d], dims(maps_t[t])[d]) for d in (2, 3)]
        projected = slow_projector(slow_pool(maps_s[s], *size), rest[7 * number : 7 * number + 7])
        gaps[s, t] = slow_gap(projected, slow_pool(maps_t[t], *size))
    total = 0.0
    for b, s in product(range(batch), range(n_s)):
        energy = [
            torch.exp(sum(x * y for x, y in zip(queries[s][b], keys[t][b], strict=True)))
            for t in range(n_t)
        ]
        total = total + sum(e / sum(energy) * gaps[s, t][b] for t, e in enumerate(energy))
    return total / (batch * n_s)


SEMCKD_CASES = {  # student maps, teacher maps after the stem, batch, length of rows
    "full batch": ([(2, 4, 4), (2, 2, 2)], [(1, 4, 4), (2, 2, 2)], 3, 3),
    "last batch": ([(2, 2, 2)], [(1, 4, 4), (2, 2, 2), (1, 1, 1)], 2, 9),
    "batch of one": ([(1, 2, 3)], [(2, 4, 2)], 1, 8),
    "longer than rows": ([(2, 2, 2)], [(1, 2, 2), (1, 2, 2)], 4, 3),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", SEMCKD_CASES)
@pytest.mark.parametrize("compat", ["none", "semckd"])
def test_semckd(seed, case, compat):
    shapes_s, shapes_t, batch, length = SEMCKD_CASES[case]
    stem = torch.zeros(batch, 1, 1, 1, dtype=torch.float64)
    maps_s = [random(seed + i, batch, *shape) for i, shape in enumerate(shapes_s)]
    maps_t = [stem, *(random(seed + 50 + i, batch, *shape) for i, shape in enumerate(shapes_t))]
    z_s, z_t = random(seed + 7, batch, 3, scale=3.0), random(seed + 8, batch, 3, scale=3.0)
    teacher = Outputs(z_t, maps=tuple(maps_t))
    shapes = shapes_of(Outputs(z_s, maps=(stem, *maps_s)), teacher, batch_size=length)
    method = SemCKD(weight=40.0, kd_weight=0.5, temperature=2.0, compat=compat)
    module = method.build(shapes)
    names, values = parameters_of(module, seed + 100)

    def fast(z, *inputs):
        maps, w = inputs[: len(maps_s)], inputs[len(maps_s) :]
        given = signals(Outputs(z, maps=(stem, *maps)), teacher)
        return loss_of(method, given, with_values(module, names, w))

    def slow(z, *inputs):
        maps, w = inputs[: len(maps_s)], inputs[len(maps_s) :]
        gap = slow_semckd((stem, *maps), maps_t, w, length, compat == "semckd")
        return 40.0 * gap + 0.5 * slow_kd(z, z_t, 2.0)

    assert_same(fast, slow, [z_s, *maps_s, *values])


def test_semckd_of_one_teacher_map_is_the_plain_gap():
    # A softmax over one map is 1, so the similarities do not matter.
    stem, map_s, map_t = torch.zeros(3, 1, 1, 1), random(1, 3, 2, 2, 2), random(2, 3, 2, 2, 2)
    student, teacher = Outputs(zeros(3), maps=(stem, map_s)), Outputs(zeros(3), maps=(stem, map_t))
    method = SemCKD(weight=1.0, kd_weight=0.0)
    module = method.build(shapes_of(student, teacher, batch_size=3)).double()
    gap = (module.projectors[0](map_s) - map_t).square().mean()
    torch.testing.assert_close(
        loss_of(method, signals(student, teacher), module), gap, rtol=1e-12, atol=0
    )


def test_semckd_has_the_authors_sizes():
    shapes = tuple((c, 8, 8) for c in (16, 64, 128, 256))
    both = Shapes(100, maps=shapes)
    module = SemCKD().build(PairShapes(both, (both,), batch_size=64))
    sizes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert sizes["queries.0.0.weight"] == (32, 64)  # twice a quarter of the batch
    assert sizes["keys.2.2.weight"] == (16, 32)
    assert sizes["projectors.1.2.conv.weight"] == (256, 256, 3, 3)  # map 1 of 64 to map 2 of 128
    assert len(module.projectors) == 9


# ---- ReviewKD -----------------------------------------------------------------------------------


def slow_hcl(x, y):
    _, _, height, width = dims(x)
    total, norm, weight = slow_gap(x, y), 1.0, 1.0
    for level in (4, 2, 1):
        if level >= max(height, width):
            continue
        weight /= 2
        size = min(level, height), min(level, width)
        gaps = slow_gap(slow_pool(x, *size), slow_pool(y, *size))
        total = [a + weight * b for a, b in zip(total, gaps, strict=True)]
        norm += weight
    return [v / norm for v in total]


def slow_review(maps_s, maps_t, parameters):
    """Maps from the shallowest to the pooled feature; parameters of the modules in that order."""
    maps_s, maps_t = [lists(m) for m in maps_s], [lists(m) for m in maps_t]
    parameters = [lists(p) for p in parameters]
    deeper, total = None, 0.0
    for level in reversed(range(len(maps_s))):
        conv1, scale1, shift1, conv2, scale2, shift2 = parameters[8 * level : 8 * level + 6]
        _, _, height, width = dims(maps_s[level])
        x = slow_norm(slow_conv(maps_s[level], conv1), scale1, shift1)
        if deeper is not None:
            y = slow_nearest(deeper, height, width)
            both = [a + b for a, b in zip(x, y, strict=True)]  # side by side in the channels
            gates = slow_conv(both, *parameters[8 * level + 6 : 8 * level + 8])
            gates = each(gates, lambda v, _: 1 / (1 + torch.exp(-v)))
            x = [
                [
                    [
                        [
                            x[b][c][i][j] * gates[b][0][i][j] + y[b][c][i][j] * gates[b][1][i][j]
                            for j in range(width)
                        ]
                        for i in range(height)
                    ]
                    for c in range(len(x[b]))
                ]
                for b in range(len(x))
            ]
        deeper = slow_nearest(x, *dims(maps_t[level])[2:])
        result = slow_norm(slow_conv(deeper, conv2), scale2, shift2)
        total = total + mean(slow_hcl(result, maps_t[level]))
    return total


REVIEW_CASES = {  # maps after the stem of student and teacher, pooled widths, how many are paired
    "same sizes": ([(2, 6, 6), (2, 2, 2)], [(2, 6, 6), (1, 2, 2)], 3, 2, 2),
    "student smaller": ([(1, 3, 3), (2, 2, 2)], [(2, 5, 5), (2, 4, 4)], 2, 3, 2),
    "student larger": ([(2, 4, 4)], [(1, 2, 2)], 2, 2, 1),
    "not square": ([(1, 2, 4)], [(2, 4, 2)], 2, 1, 1),
    "teacher has one more": ([(2, 2, 2)], [(9, 4, 4), (2, 3, 3)], 2, 2, 1),
    "student has one more": ([(5, 4, 4), (1, 2, 2)], [(2, 2, 2)], 2, 2, 1),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", REVIEW_CASES)
def test_reviewkd(seed, case):
    shapes_s, shapes_t, pooled_s, pooled_t, paired = REVIEW_CASES[case]
    stem = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    maps_s = [random(seed + i, 2, *shape) for i, shape in enumerate(shapes_s)]
    maps_t = [random(seed + 50 + i, 2, *shape) for i, shape in enumerate(shapes_t)]
    h_s, h_t = random(seed + 7, 2, pooled_s), random(seed + 8, 2, pooled_t)
    teacher = Outputs(zeros(2), preact=(stem, *maps_t), pooled=h_t)
    student = Outputs(zeros(2), maps=(stem, *maps_s), pooled=h_s)
    method = ReviewKD(weight=3.0)
    module = method.build(shapes_of(student, teacher))
    names, values = parameters_of(module, seed + 100)
    used = slice(len(maps_s) - paired, None)

    def fast(h, *inputs):
        maps, w = inputs[: len(maps_s)], inputs[len(maps_s) :]
        given = signals(Outputs(zeros(2), maps=(stem, *maps), pooled=h), teacher, epoch=5)
        return loss_of(method, given, with_values(module, names, w))

    def slow(h, *inputs):
        maps, w = inputs[: len(maps_s)], inputs[len(maps_s) :]
        aims = [*maps_t[-paired:], h_t[:, :, None, None]]
        return 0.25 * 3.0 * slow_review([*maps[used], h[:, :, None, None]], aims, w)

    assert_same(fast, slow, [h_s, *maps_s, *values])


def test_reviewkd_weights_of_the_levels_add_up_to_one():
    # Maps that differ by a constant differ by it at every level, so HCL is its square.
    from smskd.methods.reviewkd import hierarchical_gap

    for size in (1, 2, 3, 4, 8):
        map_t = random(1, 2, 3, size, size)
        gap = hierarchical_gap(map_t + 0.5, map_t)
        torch.testing.assert_close(gap, torch.full_like(gap, 0.25), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("settings", "inner"),
    [
        ({}, 512),
        ({"max_inner_channels": 256}, 256),
        ({"max_inner_channels": 256, "compat": "mdistiller"}, 512),
        ({"max_inner_channels": 2048}, 1280),
    ],
)
def test_reviewkd_limits_what_is_passed_on(settings, inner):
    maps = ((32, 8, 8), (96, 8, 8), (160, 4, 4))
    student, teacher = Shapes(9, maps=maps, pooled=1280), Shapes(9, preact=maps, pooled=512)
    module = ReviewKD(**settings).build(PairShapes(student, (teacher,)))
    assert module.fusions[0].gate.in_channels == 2 * inner
    assert module.fusions[2].gate is None


def test_reviewkd_grows_over_its_warmup():
    maps = (random(1, 2, 1, 1, 1), random(2, 2, 2, 2, 2))
    both = Outputs(zeros(2), maps=maps, preact=maps, pooled=random(3, 2, 4))
    method = ReviewKD()
    module = method.build(shapes_of(both, both)).double()
    losses = [loss_of(method, signals(both, both, epoch=e), module).item() for e in (1, 10, 20, 99)]
    assert [loss / losses[2] for loss in losses] == pytest.approx([0.05, 0.5, 1.0, 1.0])
    assert loss_of(ReviewKD(warmup_epochs=0), signals(both, both), module).item() == losses[2]


# ---- SimKD --------------------------------------------------------------------------------------


def slow_simkd_projector(x, parameters):
    parameters = [lists(p) for p in parameters]
    for i in range(0, 9, 3):
        x = slow_relu(slow_norm(slow_conv(x, parameters[i]), *parameters[i + 1 : i + 3]))
    return x


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("shape_s", "shape_t", "size", "factor"),
    [
        ((3, 2, 2), (4, 2, 2), (2, 2), 2),
        ((2, 4, 4), (3, 2, 2), (2, 2), 1),
        ((2, 2, 2), (4, 4, 4), (2, 2), 4),
        ((1, 3, 2), (2, 2, 4), (2, 2), 2),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_simkd(seed, shape_s, shape_t, size, factor, batch):
    map_s, map_t = random(seed, batch, *shape_s), random(seed + 5, batch, *shape_t)
    teacher = Outputs(zeros(batch), spatial=map_t)
    shapes = shapes_of(Outputs(zeros(batch), spatial=map_s), teacher, width_t=shape_t[0])
    method = SimKD(weight=2.0, factor=factor)
    module = method.build(shapes)
    names, values = parameters_of(module, seed + 20)
    assert len(names) == 9
    assert method.task(signals(Outputs(zeros(batch)), teacher)) == {}  # labels have weight 0

    def slow(f, *w):
        projected = slow_simkd_projector(slow_pool(lists(f), *size), w)
        return 2.0 * mean(slow_gap(projected, slow_pool(lists(map_t), *size)))

    assert_same(
        lambda f, *w: loss_of(
            method,
            signals(Outputs(zeros(batch), spatial=f), teacher),
            with_values(module, names, w),
        ),
        slow,
        [map_s, *values],
    )


def test_simkd_is_classified_by_the_teacher():
    # A student that makes the teacher's map is classified as the teacher, bit for bit the logits.
    shapes = replace(
        PairShapes(Shapes(3, spatial=(4, 2, 2)), (Shapes(3, spatial=(4, 2, 2)),)),
        teacher_networks=(classifier_only(4, 3),),
        student_taps=Taps(spatial="0"),
    )
    method, map_t = SimKD(), random(1, 5, 4, 2, 2).abs()
    module = method.build(shapes).double()
    module.projector = torch.nn.Identity()
    student = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten())
    logits = method.inference_model(student, module)(map_t)
    classifier = shapes.teacher_networks[0].classifier
    torch.testing.assert_close(logits, classifier(map_t.mean((2, 3))), rtol=1e-12, atol=0)


# ---- MGD ----------------------------------------------------------------------------------------


def slow_resize(x, height, width):
    """Means over windows where smaller, repeated where larger."""
    _, _, full_h, full_w = dims(x)
    return slow_nearest(slow_pool(x, min(full_h, height), min(full_w, width)), height, width)


def slow_mgd(map_s, map_t, kept, parameters):
    parameters = [lists(p) for p in parameters]
    align, (conv1, bias1, conv2, bias2) = parameters[:-4], parameters[-4:]
    x = lists(map_s)
    x = slow_conv(x, *align) if align else x
    x = slow_resize(x, *map_t.shape[2:])
    x = [
        [[[v if keep else 0.0 * v for v in row] for row in image] for image, keep in pairs]
        for pairs in (zip(sample, kept[b], strict=True) for b, sample in enumerate(x))
    ]
    x = slow_conv(slow_relu(slow_conv(x, conv1, bias1)), conv2, bias2)
    pairs = zip(flat(x), flat(lists(map_t)), strict=True)
    return mean([sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) for pair in pairs])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("shape_s", "shape_t"),
    [
        ((3, 2, 2), (3, 2, 2)),
        ((2, 2, 2), (3, 4, 4)),
        ((1, 4, 4), (2, 2, 2)),
        ((2, 4, 2), (3, 2, 3)),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_mgd(seed, shape_s, shape_t, batch):
    map_s, map_t = random(seed, batch, *shape_s), random(seed + 5, batch, *shape_t)
    teacher = Outputs(zeros(batch), spatial=map_t)
    method = MGD(weight=0.3, mask_share=0.4)
    module = method.build(shapes_of(Outputs(zeros(batch), spatial=map_s), teacher))
    names, values = parameters_of(module, seed + 20)
    assert ("align.weight" in names) == (shape_s[0] != shape_t[0])
    torch.manual_seed(seed)
    kept = (torch.rand(batch, shape_t[0], 1, 1) >= 0.4)[:, :, 0, 0].tolist()

    def fast(f, *w):
        torch.manual_seed(seed)
        given = signals(Outputs(zeros(batch), spatial=f), teacher)
        return loss_of(method, given, with_values(module, names, w))

    assert_same(fast, lambda f, *w: 0.3 * slow_mgd(f, map_t, kept, w), [map_s, *values])


def test_mgd_masks_whole_channels_in_the_share_that_is_set():
    seen = []
    map_s = map_t = random(1, 64, 32, 2, 2)
    teacher = Outputs(zeros(64), spatial=map_t)
    method = MGD(mask_share=0.15)
    module = method.build(shapes_of(teacher, teacher)).double()
    module.generate.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    loss_of(method, signals(Outputs(zeros(64), spatial=map_s), teacher), module)
    masked = seen[0] == 0
    assert torch.equal(masked.all(dim=(2, 3)), masked.any(dim=(2, 3)))
    assert torch.equal(seen[0][~masked], map_s[~masked])  # not scaled up, unlike dropout
    assert masked.double().mean().item() == pytest.approx(0.15, abs=0.03)


def test_mgd_without_a_mask_does_not_depend_on_the_draw():
    map_s = random(1, 2, 3, 2, 2)
    both = Outputs(zeros(2), spatial=map_s)
    method = MGD(mask_share=0.0)
    module = method.build(shapes_of(both, both)).double()
    losses = {loss_of(method, signals(both, both), module).item() for _ in range(5)}
    assert len(losses) == 1
    assert "expected" in MGD(mask_share=1.0).check(shapes_of(both, both))


# ---- CAT-KD -------------------------------------------------------------------------------------


def slow_attention(x, weight, resolution, normalise):
    _, channels, height, width = dims(x)
    cams = [
        [
            [
                [sum(w[c] * sample[c][i][j] for c in range(channels)) for j in range(width)]
                for i in range(height)
            ]
            for w in weight
        ]
        for sample in x
    ]
    cams = slow_pool(cams, resolution, resolution)
    if not normalise:
        return cams
    return [
        [
            [[v / torch.sqrt(sum(u * u for r in cam for u in r)) for v in row] for row in cam]
            for cam in sample
        ]
        for sample in cams
    ]


def cat_signals(map_s, map_t, linear):
    networks = Networks(torch.zeros(len(map_s), 3, 1, 1), lambda _: None, (), linear)
    given = signals(
        Outputs(zeros(len(map_s)), spatial=map_s), Outputs(zeros(len(map_t)), spatial=map_t)
    )
    return replace(given, networks=networks)


class Linear:
    """The student's classifier, whose weight may be part of a graph."""

    def __init__(self, weight):
        self.weight = weight


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("shape_s", "shape_t", "resolution"),
    [((2, 4, 4), (3, 2, 2), 2), ((3, 3, 3), (1, 4, 2), 2), ((2, 2, 2), (2, 4, 4), 3),
     ((2, 3, 2), (3, 2, 2), 1)],
)  # fmt: skip
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_catkd(seed, shape_s, shape_t, resolution, normalise, batch):
    map_s, map_t = random(seed, batch, *shape_s), random(seed + 5, batch, *shape_t)
    weight_s = random(seed + 6, 3, shape_s[0])
    shapes = replace(
        PairShapes(Shapes(3, spatial=shape_s), (Shapes(3, spatial=shape_t),)),
        teacher_networks=(classifier_only(shape_t[0], 3),),
    )
    method = CATKD(weight=7.0, resolution=resolution, normalise=normalise)
    module = method.build(shapes)
    assert not list(module.parameters())
    assert not module.state_dict()
    weight_t = lists(shapes.teacher_networks[0].classifier.weight.detach())
    settings = (resolution, normalise)

    assert_same(
        lambda f, w: loss_of(method, cat_signals(f, map_t, Linear(w)), module),
        lambda f, w: (
            7.0
            * mean(
                slow_gap(
                    slow_attention(lists(f), lists(w), *settings),
                    slow_attention(lists(map_t), weight_t, *settings),
                )
            )
        ),
        [map_s, weight_s],
    )


def test_catkd_at_resolution_one_compares_logits_without_their_bias():
    # The mean of a class's activation map is its logit: what the paper's rebuilt networks rest on.
    map_s, map_t = random(1, 4, 5, 2, 2), random(2, 4, 6, 4, 4)
    student, teacher = classifier_only(5, 3).classifier, classifier_only(6, 3)
    shapes = replace(
        PairShapes(Shapes(3, spatial=(5, 2, 2)), (Shapes(3, spatial=(6, 4, 4)),)),
        teacher_networks=(teacher,),
    )
    method = CATKD(weight=1.0, resolution=1, normalise=False)
    logits_s = student(map_s.mean((2, 3))) - student.bias
    logits_t = teacher.classifier(map_t.mean((2, 3))) - teacher.classifier.bias
    torch.testing.assert_close(
        loss_of(method, cat_signals(map_s, map_t, student), method.build(shapes)),
        (logits_s - logits_t).square().mean(),
        rtol=1e-12,
        atol=0,
    )


def test_catkd_ignores_the_scale_of_normalised_maps_and_stands_maps_of_zeros():
    map_s, map_t = random(1, 4, 5, 2, 2), random(2, 4, 5, 2, 2)
    student, teacher = classifier_only(5, 3).classifier, classifier_only(5, 3)
    both = Shapes(3, spatial=(5, 2, 2))
    method = CATKD(weight=1.0)
    module = method.build(PairShapes(both, (both,), teacher_networks=(teacher,)))
    one, scaled = (
        loss_of(method, cat_signals(f * map_s, map_t, student), module) for f in (1.0, 1e-3)
    )
    torch.testing.assert_close(one, scaled, rtol=1e-11, atol=0)
    dead = torch.zeros_like(map_s, requires_grad=True)
    loss = loss_of(method, cat_signals(dead, map_t, student), module)
    loss.backward()
    assert loss.item() == pytest.approx(1 / 4)  # the teacher's unit maps, over 2x2 places
    assert 0 < dead.grad.abs().max() < 10


# ---- what they share ----------------------------------------------------------------------------


def test_batch_norm_of_one_value_a_channel_uses_and_keeps_running_statistics():
    norm = AnyBatchNorm2d(3).double()
    plain = torch.nn.BatchNorm2d(3).double()
    for batch in (random(1, 4, 3, 2, 2), random(2, 1, 3, 2, 2), random(3, 5, 3, 1, 1)):
        assert torch.equal(norm(batch), plain(batch))
    before = copy.deepcopy(norm.state_dict())
    one = random(4, 1, 3, 1, 1)
    assert torch.equal(norm(one), plain.eval()(one))
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


PAIRS = [
    ("wrn_40_2", "wrn_16_2"), ("wrn_40_2", "wrn_40_1"), ("resnet56", "resnet20"),
    ("resnet110", "resnet20"), ("resnet110", "resnet32"), ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"), ("vgg13", "MobileNetV2"), ("ResNet50", "MobileNetV2"),
    ("ResNet50", "vgg8"), ("resnet32x4", "ShuffleV1"), ("resnet32x4", "ShuffleV2"),
    ("wrn_40_2", "ShuffleV1"),
]  # fmt: skip
"""The 13 pairs of networks of the CRD paper, teacher first."""


@pytest.fixture(scope="module")
def zoo():
    """Sizes of the features of all networks of the pairs."""
    names, roles = {name for pair in PAIRS for name in pair}, sorted(FEATURES)
    image = torch.zeros(1, 3, 32, 32)
    return {name: probe(build_model(name, 100, 3), taps_of(name), roles, image) for name in names}


@pytest.mark.parametrize("method", [SRRL(), SemCKD(), ReviewKD(), SimKD(), MGD(), CATKD()])
def test_works_on_all_pairs(zoo, method):
    for teacher, student in PAIRS:
        assert method.check(PairShapes(zoo[student], (zoo[teacher],))) is None
