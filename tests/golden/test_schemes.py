"""The training schemes against a second, deliberately naive implementation in float64.

The naive side uses scalars and Python loops, written from the formulas, and no code of the package.
Where a method trains modules, their parameters are leaves on both sides.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from golden_tools import SEEDS, assert_same, logit_signals, loss_of, random
from torch import nn

from smskd.cost import shapes_on_meta
from smskd.errors import ConfigError, IncompatibleError
from smskd.methods import ofa_branches
from smskd.methods.base import Networks, PairShapes, Signals, total
from smskd.methods.byot import BYOT
from smskd.methods.dml import DML
from smskd.methods.dot import DOT
from smskd.methods.headless import Headless
from smskd.methods.kd import KD, softened_kl
from smskd.methods.objective import Objective, Part
from smskd.methods.ofa import OFA, enhanced
from smskd.methods.reskd import ResKD
from smskd.methods.scratch import Scratch
from smskd.taps import Network, Outputs, Shapes, Taps

torch.set_num_threads(1)

# ---- naive pieces -------------------------------------------------------------------------------


def slow_log_p(z, tau=1.0):
    scaled = [v / tau for v in z]
    top = max(v.item() for v in scaled)
    log_sum = torch.log(sum(torch.exp(v - top) for v in scaled)) + top
    return [v - log_sum for v in scaled]


def slow_kl(z_s, z_t, tau=1.0):
    """KL(p_t || p_s) of one sample; the target is a constant."""
    log_s, log_t = slow_log_p(z_s, tau), slow_log_p(z_t.detach(), tau)
    return sum(torch.exp(t) * (t - s) for s, t in zip(log_s, log_t, strict=True))


def slow_ce(z, label):
    return -slow_log_p(z)[label]


def lists(x):
    """A tensor as nested lists of scalars."""
    return list(x) if x.dim() == 1 else [lists(row) for row in x]


def slow_conv(x, weight, bias=None, stride=(1, 1), padding=0, groups=1):
    """[b][c][i][j] with a (O, C / groups, k, m) tensor."""
    outputs, per_group, k, m = weight.shape
    w, height, width = lists(weight), len(x[0][0]), len(x[0][0][0])
    h_out = (height + 2 * padding - k) // stride[0] + 1
    w_out = (width + 2 * padding - m) // stride[1] + 1

    def at(sample, o, i, j):
        first = o // (outputs // groups) * per_group
        value = bias[o] if bias is not None else 0.0
        for c, u, v in product(range(per_group), range(k), range(m)):
            r, s = i * stride[0] + u - padding, j * stride[1] + v - padding
            if 0 <= r < height and 0 <= s < width:
                value = value + sample[first + c][r][s] * w[o][c][u][v]
        return value

    return [
        [[[at(b, o, i, j) for j in range(w_out)] for i in range(h_out)] for o in range(outputs)]
        for b in x
    ]


def slow_norm(x, scale, shift, eps=1e-5):
    """Batch norm in training mode: over batch and positions, with the biased variance."""
    out = [[[[None] * len(row) for row in channel] for channel in sample] for sample in x]
    for c in range(len(x[0])):
        places = list(product(range(len(x)), range(len(x[0][c])), range(len(x[0][c][0]))))
        mean = sum(x[b][c][i][j] for b, i, j in places) / len(places)
        variance = sum((x[b][c][i][j] - mean) ** 2 for b, i, j in places) / len(places)
        for b, i, j in places:
            centred = (x[b][c][i][j] - mean) / torch.sqrt(variance + eps)
            out[b][c][i][j] = centred * scale[c] + shift[c]
    return out


def slow_relu(x):
    return [[[[v if v > 0 else 0.0 * v for v in row] for row in c] for c in sample] for sample in x]


def slow_mean(x):
    """Mean over positions, [b][c]."""
    return [[sum(map(sum, c)) / (len(c) * len(c[0])) for c in sample] for sample in x]


def slow_linear(vector, weight, bias=None):
    return [
        sum(w * v for w, v in zip(row, vector, strict=True)) + (0.0 if bias is None else bias[o])
        for o, row in enumerate(lists(weight))
    ]


def slow_separable(x, next_value):
    """Two depthwise separable convolutions, the first with stride 2."""
    for stride in (2, 1):
        depthwise, pointwise = next_value(), next_value()
        channels = len(x[0])
        x = slow_conv(x, depthwise, None, (stride, stride), 1, groups=channels)
        x = slow_relu(slow_norm(slow_conv(x, pointwise), next_value(), next_value()))
    return x


# ---- running a method with given parameters -----------------------------------------------------


class Loss(nn.Module):
    def __init__(self, method, built):
        super().__init__()
        self.method, self.built = method, built

    def forward(self, given):
        return loss_of(self.method, given, self.built)


def drawn(built, seed):
    """Random values of all parameters, the scales of norms around 1."""
    values = []
    for i, (name, p) in enumerate(built.named_parameters()):
        value = 0.5 * random(seed + 100 + i, *p.shape)
        values.append(1 + value if "norm" in name or p.dim() == 1 else value)
    return values


def with_values(method, built, given, values):
    names = [f"built.{name}" for name, _ in built.named_parameters()]
    values = dict(zip(names, values, strict=True))
    return torch.func.functional_call(Loss(method, built), values, (given,))


def labels_of(seed, batch, classes):
    return torch.tensor([(seed + 2 * i) % classes for i in range(batch)])


def given_of(student, teachers=(), labels=None, images=None):
    networks = None if images is None else Networks(images, student=lambda x: student)
    index = torch.arange(len(labels))
    return Signals(student, tuple(teachers), labels, index, 1, 240, networks)


# ---- DML ----------------------------------------------------------------------------------------


class Says(nn.Module):
    """A peer that says what it is given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


def slow_dml(logits, labels, weight, peer_weight):
    batch, loss = len(labels), 0.0
    for i, b in product(range(len(logits)), range(batch)):
        others = [z for j, z in enumerate(logits) if j != i]
        loss = (
            loss + weight * sum(slow_kl(logits[i][b], z[b]) for z in others) / len(others) / batch
        )
        if i > 0:
            loss = loss + peer_weight * slow_ce(logits[i][b], labels[b]) / batch
    return loss


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "classes", "peers"), [(1, 3, 1), (3, 5, 1), (2, 4, 3)])
def test_dml(seed, batch, classes, peers):
    logits = [random(seed + i, batch, classes, scale=3.0) for i in range(peers + 1)]
    labels, images = labels_of(seed, batch, classes), torch.zeros(batch, 3, 2, 2)
    method = DML(weight=0.7, peer_ce_weight=0.4, peers=peers)

    def fast(z, *others):
        given = given_of(Outputs(z), labels=labels, images=images)
        return loss_of(method, given, nn.ModuleList(map(Says, others)))

    assert_same(fast, lambda *z: slow_dml(z, labels, 0.7, 0.4), logits)


def small_student(classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, classes)
    )


def test_dml_trains_untrained_peers_whose_statistics_move_once_a_step():
    torch.manual_seed(0)
    peers = DML(peers=2).build(PairShapes(Shapes(4), new_student=small_student))
    student = small_student()
    assert not torch.equal(peers[0][0].weight, peers[1][0].weight)
    assert len(list(peers.parameters())) == 2 * len(list(student.parameters()))
    images = torch.randn(6, 3, 8, 8)
    given = given_of(Outputs(student(images)), labels=torch.arange(6) % 4, images=images)
    terms = DML(peers=2).distill(given, peers)
    total(terms).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student[4].parameters())
    assert all(p.grad is not None for p in peers.parameters())
    assert [peer[1].num_batches_tracked.item() for peer in peers] == [1, 1]


def test_dml_students_term_leaves_peers_alone_and_theirs_leave_the_student_alone():
    z = [random(i, 3, 4).requires_grad_() for i in range(2)]
    given = given_of(Outputs(z[0]), labels=torch.arange(3), images=torch.zeros(3, 3, 2, 2))
    for name, (moved, still) in {"dml": (z[0], z[1]), "peers": (z[1], z[0])}.items():
        terms = DML().distill(given, nn.ModuleList([Says(z[1])]))
        found = torch.autograd.grad(terms[name], [moved, still], allow_unused=True)
        assert found[0].abs().max() > 0
        assert found[1] is None


def test_dml_says_why_it_cannot_be_built():
    with pytest.raises(IncompatibleError, match="expected"):
        DML().build(PairShapes(Shapes(4)))
    assert "expected" in DML(peers=0).check(PairShapes(Shapes(4)))
    assert DML().check(PairShapes(Shapes(4))) is None


# ---- BYOT ---------------------------------------------------------------------------------------


def slow_branch(x, strides, values):
    """Logits and feature of each sample."""
    for stride in ((1, 1), strides, (1, 1)):
        conv = slow_conv(x, next(values), next(values), stride)
        x = slow_relu(slow_norm(conv, next(values), next(values)))
    features, weight, bias = slow_mean(x), next(values), next(values)
    return [slow_linear(f, weight, bias) for f in features], features


def slow_byot(method, z, f, maps, labels, strides, values):
    values, batch, loss = iter(values), len(labels), 0.0
    z, f = z.detach(), f.detach()
    for feature_map, stride in zip(maps, strides, strict=True):
        logits, features = slow_branch(lists(feature_map), stride, values)
        for b in range(batch):
            own = torch.stack(logits[b])
            tau = method.temperature
            loss = loss + (1 - method.alpha) * slow_ce(own, labels[b]) / batch
            loss = loss + method.alpha * tau**2 * slow_kl(own, z[b], tau) / batch
            gap = sum((u - v) ** 2 for u, v in zip(features[b], f[b], strict=True))
            loss = loss + method.beta * gap / batch
    assert not list(values), "parameters that this side does not use"
    return loss


BYOT_CASES = {  # maps, strides of the branches
    "halving": ([(1, 4, 4), (2, 4, 4), (3, 2, 2), (4, 1, 1)], [(4, 4), (2, 2)]),
    "one branch": ([(1, 4, 4), (2, 4, 4), (4, 2, 2)], [(2, 2)]),
    "equal sizes": ([(1, 2, 2), (3, 2, 2), (4, 2, 2)], [(1, 1)]),
    "no whole ratio, not square": ([(1, 5, 4), (2, 5, 4), (4, 2, 3)], [(2, 1)]),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", BYOT_CASES)
def test_byot(seed, case):
    shapes, strides = BYOT_CASES[case]
    batch, classes, width = 3, 3, 8
    method = BYOT(alpha=0.3, temperature=2.0, beta=0.5)
    built = method.build(PairShapes(Shapes(classes, tuple(shapes), pooled=width))).double()
    values, labels = drawn(built, seed), labels_of(seed, batch, classes)
    maps = [random(seed + i, batch, *shape) for i, shape in enumerate(shapes)]
    z, f = random(seed, batch, classes, scale=3.0), random(seed + 1, batch, width)

    def fast(z, f, *leaves):
        seen = (maps[0], *leaves[: len(maps) - 2], maps[-1])
        given = given_of(Outputs(z, seen, pooled=f), labels=labels)
        return with_values(method, built, given, leaves[len(maps) - 2 :])

    def slow(z, f, *leaves):
        inner, own = leaves[: len(maps) - 2], leaves[len(maps) - 2 :]
        return slow_byot(method, z, f, inner, labels, strides, own)

    assert_same(fast, slow, [z, f, *maps[1:-1], *values])


STUDENTS = ["resnet20", "wrn_16_2", "resnet8x4", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"]
FITS = [(method, name) for method in (BYOT(), OFA()) for name in STUDENTS]
FITS += [(OFA(branch="attention"), "vgg8"), (OFA(branch="attention"), "MobileNetV2")]


@pytest.mark.parametrize(("method", "name"), FITS, ids=lambda x: getattr(x, "name", x))
def test_branches_fit_every_student_of_the_standard_pairs(method, name):
    shapes = PairShapes(shapes_on_meta(name, 100, (3, 32, 32)), (Shapes(100),))
    assert method.check(shapes) is None
    branches = method.build(shapes)
    taken = shapes.student.maps[1:-1] if method.name == "byot" else shapes.student.maps[1:]
    for branch, shape in zip(branches, taken, strict=True):
        said = branch(torch.randn(2, *shape))
        if method.name == "byot":
            assert said[1].shape == (2, shapes.student.pooled)
            said = said[0]
        assert said.shape == (2, 100)


def test_byot_refuses_what_has_no_shallow_map():
    good = Shapes(3, ((1, 4, 4), (2, 4, 4), (4, 2, 2)), pooled=4)
    assert BYOT().check(PairShapes(good)) is None
    for bad in ({"maps": good.maps[:2]}, {"pooled": 0}, {"maps": ((17, 8),) * 3}):
        assert "expected" in BYOT().check(PairShapes(replace(good, **bad)))
    assert "expected" in BYOT(alpha=1.5).check(PairShapes(good))


# ---- OFA-KD -------------------------------------------------------------------------------------


def slow_ofa_loss(z, z_t, label, gamma, tau):
    log_s, log_t = slow_log_p(z, tau), slow_log_p(z_t.detach(), tau)
    loss = 0.0
    for c in range(len(z)):
        true = 1.0 if c == label else 0.0
        loss = loss - ((torch.exp(log_t[c]) + true) ** gamma - true) * log_s[c]
    return loss


def slow_conv_branch(x, halvings, next_value):
    for _ in range(halvings):
        x = slow_separable(x, next_value)
    if halvings == 0:
        x = slow_conv(x, next_value(), next_value())
    weight, bias = next_value(), next_value()
    return [slow_linear(f, weight, bias) for f in slow_mean(x)]


def slow_layer_norm(x, scale, shift, eps=1e-5):
    mean = sum(x) / len(x)
    spread = torch.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + eps)
    return [(v - mean) / spread * g + h for v, g, h in zip(x, scale, shift, strict=True)]


def slow_gelu(x):
    return [0.5 * v * (1 + torch.erf(v / math.sqrt(2))) for v in x]


def slow_attention(tokens, qkv):
    """One sample [n][d], 4 heads."""
    width = len(tokens[0])
    size = width // 4
    rows = [slow_linear(t, qkv) for t in tokens]
    out = [[] for _ in tokens]
    for h, n in product(range(4), range(len(tokens))):
        part = [
            [row[width * k + h * size : width * k + (h + 1) * size] for row in rows]
            for k in range(3)
        ]
        query, keys, values = part[0][n], part[1], part[2]
        scores = [sum(q * k for q, k in zip(query, key, strict=True)) for key in keys]
        shares = [torch.exp(s) for s in slow_log_p([s / math.sqrt(size) for s in scores])]
        out[n] += [sum(a * v[d] for a, v in zip(shares, values, strict=True)) for d in range(size)]
    return out


def slow_block(tokens, value):
    """One transformer block on [n][d]; ``value`` gives its parameters by name."""
    normed = [slow_layer_norm(t, value("norm1.weight"), value("norm1.bias")) for t in tokens]
    mixed = slow_attention(normed, value("qkv.weight"))
    moved = [slow_linear(t, value("projection.weight"), value("projection.bias")) for t in mixed]
    tokens = [
        [a + b for a, b in zip(*pair, strict=True)] for pair in zip(tokens, moved, strict=True)
    ]
    normed = [slow_layer_norm(t, value("norm2.weight"), value("norm2.bias")) for t in tokens]
    for i, act in ((0, slow_gelu), (2, list)):
        weight, bias = value(f"mlp.{i}.weight"), value(f"mlp.{i}.bias")
        normed = [act(slow_linear(t, weight, bias)) for t in normed]
    return [
        [a + b for a, b in zip(*pair, strict=True)] for pair in zip(tokens, normed, strict=True)
    ]


def slow_merge(grid, value):
    """2x2 patches of [i][j][c] joined: rows within a patch first, then columns."""
    out = []
    for i in range(0, len(grid), 2):
        out.append([])
        for j in range(0, len(grid[0]), 2):
            joined = [*grid[i][j], *grid[i][j + 1], *grid[i + 1][j], *grid[i + 1][j + 1]]
            joined = slow_layer_norm(joined, value("norm.weight"), value("norm.bias"))
            out[-1].append(slow_gelu(slow_linear(joined, value("reduction.weight"))))
    return out


def slow_attention_branch(x, merges, projects, depth, values):
    """Logits of each sample; ``values`` are the parameters by name."""
    logits = []
    for sample in x:
        height, width = len(sample[0]), len(sample[0][0])
        grid = [[[c[i][j] for c in sample] for j in range(width)] for i in range(height)]
        for m in range(merges):
            grid = slow_merge(grid, lambda name, m=m: values[f"merging.{m}.{name}"])
        tokens = [t for row in grid for t in row]
        if projects:
            weight, bias = values["merging.0.weight"], values["merging.0.bias"]
            tokens = [slow_linear(t, weight, bias) for t in tokens]
        for d in range(depth):
            tokens = slow_block(tokens, lambda name, d=d: values[f"blocks.{d}.{name}"])
        mean = [sum(column) / len(tokens) for column in zip(*tokens, strict=True)]
        logits.append(slow_linear(mean, values["classifier.weight"], values["classifier.bias"]))
    return logits


def slow_ofa(method, z, z_t, branch_logits, labels):
    batch, loss = len(labels), 0.0
    for b in range(batch):
        settings = (z_t[b], labels[b], method.gamma, method.temperature)
        loss = loss + method.weight * slow_ofa_loss(z[b], *settings) / batch
        for logits in branch_logits:
            loss = loss + method.branch_weight * slow_ofa_loss(logits[b], *settings) / batch
    return loss


OFA_SETTINGS = [
    OFA(),
    OFA(gamma=1.5, weight=0.7, branch_weight=0.3),
    OFA(gamma=0.5, temperature=2.0),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", OFA_SETTINGS, ids=str)
@pytest.mark.parametrize("shapes", [[(1, 4, 4), (2, 4, 3), (3, 2, 2)], [(1, 1, 1), (2, 2, 2)]])
def test_ofa_with_convolutions(seed, method, shapes):
    batch, classes, halvings = 2, 3, [len(shapes) - 1 - i for i in range(1, len(shapes))]
    teacher = Network(nn.Sequential(nn.Linear(5, classes)), Taps(classifier="0"))
    pair = PairShapes(
        Shapes(classes, tuple(shapes)), (Shapes(classes),), teacher_networks=(teacher,)
    )
    built = method.build(pair).double()
    assert all(branch.classifier.in_features == 5 for branch in built)
    values, labels = drawn(built, seed), labels_of(seed, batch, classes)
    maps = [random(seed + i, batch, *shape) for i, shape in enumerate(shapes[1:])]
    z, z_t = random(seed, batch, classes, scale=3.0), random(seed + 9, batch, classes, scale=3.0)
    stem = random(seed, batch, *shapes[0])

    def fast(z, *leaves):
        seen = (stem, *leaves[: len(maps)])
        given = given_of(Outputs(z, seen), [Outputs(z_t)], labels)
        return with_values(method, built, given, leaves[len(maps) :])

    def slow(z, *leaves):
        own = iter(leaves[len(maps) :])
        branches = [
            [torch.stack(v) for v in slow_conv_branch(lists(m), n, own.__next__)]
            for m, n in zip(leaves, halvings, strict=False)
        ]
        assert not list(own), "parameters that this side does not use"
        return slow_ofa(method, z, z_t, branches, labels)

    assert_same(fast, slow, [z, *maps, *values])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("shape", "merges", "projects"),
    [((2, 4, 4), 2, False), ((8, 2, 1), 0, False), ((3, 1, 2), 0, True), ((2, 2, 2), 1, False)],
)
def test_attention_branch(seed, shape, merges, projects, monkeypatch):
    monkeypatch.setattr(ofa_branches, "GRID", 1)  # small maps are merged, too
    branch = ofa_branches.AttentionBranch(shape, width=8, depth=2, classes=3).double()
    names, values = [n for n, _ in branch.named_parameters()], drawn(branch, seed)
    x, upstream = random(seed, 2, *shape), random(seed + 1, 2, 3)

    def fast(x, *leaves):
        logits = torch.func.functional_call(branch, dict(zip(names, leaves, strict=True)), (x,))
        return (logits * upstream).sum()

    def slow(x, *leaves):
        values = dict(zip(names, leaves, strict=True))
        logits = slow_attention_branch(lists(x), merges, projects, 2, values)
        return sum(logits[b][k] * upstream[b, k] for b, k in product(range(2), range(3)))

    assert_same(fast, slow, [x, *values])


def test_attention_branches_are_as_deep_as_halvings_would_be():
    shapes = Shapes(3, ((4, 8, 8), (8, 28, 28), (8, 15, 15), (8, 14, 14), (16, 8, 8)))
    built = OFA(branch="attention").build(PairShapes(shapes, (Shapes(3),)))
    assert [len(branch.blocks) for branch in built] == [3, 2, 1, 1]
    merges = [[type(m).__name__ for m in branch.merging] for branch in built]
    assert merges == [["PatchMerging"] * 2, ["Linear"], ["PatchMerging"], []]
    assert all(branch.classifier.in_features == 16 for branch in built)


@pytest.mark.parametrize("seed", SEEDS)
def test_ofa_with_gamma_1_is_kd_but_for_the_teachers_entropy(seed):
    given = logit_signals(seed, 5, 7)
    z = given.student.logits.clone().requires_grad_()
    with_z = given.with_logits(z, [given.teacher.logits])
    stem = torch.zeros(5, 1, 1, 1, dtype=torch.float64)
    with_z = replace(with_z, student=replace(with_z.student, maps=(stem, stem)))
    built = OFA().build(PairShapes(Shapes(7, ((1, 1, 1),) * 2), (Shapes(7),))).double()
    ofa = OFA().distill(with_z, built)["ofa"]
    kd = softened_kl(z, given.teacher.logits, 1.0).mean()
    log_p = torch.log_softmax(given.teacher.logits, 1)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    torch.testing.assert_close(ofa, kd + entropy, rtol=1e-12, atol=1e-12)
    (of_ofa,), (of_kd,) = torch.autograd.grad(ofa, z), torch.autograd.grad(kd, z)
    torch.testing.assert_close(of_ofa, of_kd, rtol=1e-12, atol=1e-12)


def test_gamma_raises_the_true_class_more_the_surer_the_teacher_is():
    z = torch.tensor([[4.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    p = z.softmax(1)
    torch.testing.assert_close(enhanced(z, labels, 1.0), p, rtol=1e-12, atol=1e-15)
    raised = enhanced(z, labels, 1.5)
    gain = raised[:, 0] - p[:, 0]
    assert gain[0] > gain[1] > 0
    assert (raised[:, 1:] < p[:, 1:]).all()


def test_ofa_refuses_what_has_no_stages():
    good = Shapes(3, ((1, 4, 4), (4, 2, 2)))
    pair = PairShapes(good, (Shapes(3),))
    assert OFA().check(pair) is OFA(branch="attention").check(pair) is None
    assert "expected" in OFA().check(replace(pair, student=replace(good, maps=good.maps[:1])))
    assert "expected" in OFA().check(replace(pair, student=replace(good, maps=((17, 8),) * 3)))
    assert "expected" in OFA(gamma=0.0).check(pair)
    odd = replace(pair, student=replace(good, maps=((1, 4, 4), (6, 2, 2))))
    assert "expected" in OFA(branch="attention").check(odd)
    with pytest.raises(ConfigError, match="branch"):
        OFA(branch="mlp")


# ---- residual KD --------------------------------------------------------------------------------


def slow_pool(x, height, width):
    """Mean over equal windows of [b][c][i][j]."""
    rows, columns = len(x[0][0]) // height, len(x[0][0][0]) // width

    def at(c, i, j):
        window = product(range(i * rows, (i + 1) * rows), range(j * columns, (j + 1) * columns))
        return sum(c[r][s] for r, s in window) / (rows * columns)

    return [[[[at(c, i, j) for j in range(width)] for i in range(height)] for c in s] for s in x]


def slow_reskd(method, f_s, f_t, images, labels, size, halvings, lifts, next_value):
    mimic = slow_pool(lists(f_s), *size)
    if lifts:
        mimic = slow_norm(slow_conv(mimic, next_value()), next_value(), next_value())
    x = slow_conv(lists(images), next_value(), padding=1)
    x = slow_relu(slow_norm(x, next_value(), next_value()))
    for _ in range(halvings):
        x = slow_separable(x, next_value)
    residual = slow_pool(slow_conv(x, next_value(), next_value()), *size)
    target, weight, bias = slow_pool(lists(f_t), *size), next_value(), next_value()
    batch, channels, loss = len(labels), len(target[0]), 0.0
    places = list(product(range(channels), range(size[0]), range(size[1])))
    for b in range(batch):
        for c, i, j in places:
            lack = target[b][c][i][j] - mimic[b][c][i][j]
            error = lack.detach() - residual[b][c][i][j]
            both = method.weight * lack**2 + method.residual_weight * error**2
            loss = loss + both / (batch * len(places))
        both = [
            sum(mimic[b][c][i][j] + residual[b][c][i][j] for i, j in product(*map(range, size)))
            / (size[0] * size[1])
            for c in range(channels)
        ]
        logits = torch.stack(slow_linear(both, weight, bias))
        loss = loss + method.combined_weight * slow_ce(logits, labels[b]) / batch
    return loss


RESKD_CASES = {  # student's and teacher's map, image, common size, halvings of the assistant
    "other width": ((2, 2, 2), (3, 2, 2), (1, 4, 4), (2, 2), 1),
    "same width, teacher larger": ((3, 1, 2), (3, 2, 4), (1, 4, 4), (1, 2), 1),
    "student larger": ((1, 4, 4), (2, 2, 2), (2, 4, 4), (2, 2), 1),
    "no halving": ((1, 3, 3), (2, 3, 3), (1, 3, 3), (3, 3), 0),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", RESKD_CASES)
def test_reskd(seed, case):
    shape_s, shape_t, image, size, halvings = RESKD_CASES[case]
    batch, classes = 2, 3
    method = ResKD(weight=0.7, residual_weight=0.4, combined_weight=0.3, assistant_width=2)
    pair = PairShapes(
        Shapes(classes, spatial=shape_s), (Shapes(classes, spatial=shape_t),), image=image
    )
    assert method.check(pair) is None
    built = method.build(pair).double()
    values, labels = drawn(built, seed), labels_of(seed, batch, classes)
    f_s, f_t = random(seed, batch, *shape_s), random(seed + 5, batch, *shape_t)
    images, z = random(seed + 6, batch, *image), torch.zeros(batch, classes, dtype=torch.float64)

    def fast(f_s, *leaves):
        teacher = Outputs(z, spatial=f_t)
        given = given_of(Outputs(z, spatial=f_s), [teacher], labels, images)
        return with_values(method, built, given, leaves)

    def slow(f_s, *leaves):
        own = iter(leaves)
        lifts = shape_s[0] != shape_t[0]
        settings = (labels, size, halvings, lifts, own.__next__)
        loss = slow_reskd(method, f_s, f_t, images, *settings)
        assert not list(own), "parameters that this side does not use"
        return loss

    assert_same(fast, slow, [f_s, *values])


class TinyStudent(nn.Module):
    taps = Taps(spatial="body", classifier="head")

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def reskd_on(student, image=(3, 8, 8), **settings):
    shapes = PairShapes(
        Shapes(5, spatial=(4, 4, 4)),
        (Shapes(5, spatial=(6, 4, 4)),),
        student_taps=TinyStudent.taps,
        image=image,
    )
    method = ResKD(**settings)
    return method, method.build(shapes)


def test_reskd_deploys_what_its_combined_term_trains():
    torch.manual_seed(0)
    student = TinyStudent().eval()
    method, built = reskd_on(student, weight=0.0, residual_weight=0.0)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    deployed = method.inference_model(student, built.eval())
    assert isinstance(deployed, Headless)
    logits = deployed(images)
    assert logits.shape == (6, 5)
    said = Outputs(student(images), spatial=student.body(images))
    teacher = Outputs(torch.zeros(6, 5), spatial=torch.randn(6, 6, 4, 4))
    loss = loss_of(method, given_of(said, [teacher], labels, images), built)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels))
    assert not student.body._forward_hooks
    # Where its classifier ignores everything but a bias, so do student and assistant.
    with torch.no_grad():
        built.classifier.weight.zero_()
    assert torch.equal(deployed(images), built.classifier.bias.expand(6, 5))


def test_reskd_terms_train_what_they_are_for():
    torch.manual_seed(0)
    student = TinyStudent()
    method, built = reskd_on(student)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    said = Outputs(student(images), spatial=student.body(images))
    teacher = Outputs(torch.zeros(6, 5), spatial=torch.randn(6, 6, 4, 4))
    terms = method.distill(given_of(said, [teacher], labels, images), built)
    parts = {
        "student": student.body[0].weight,
        "own head": student.head.weight,
        "lift": built.lift[0].weight,
        "assistant": built.assistant.layers[0].weight,
        "classifier": built.classifier.weight,
    }
    reached = {}
    for name, term in terms.items():
        found = torch.autograd.grad(term, parts.values(), retain_graph=True, allow_unused=True)
        reached[name] = {p for p, g in zip(parts, found, strict=True) if g is not None}
    assert reached == {
        "mimic": {"student", "lift"},
        "residual": {"assistant"},
        "combined": {"student", "lift", "assistant", "classifier"},
    }


def test_reskd_of_a_perfect_student_asks_nothing_of_the_assistant():
    shapes = PairShapes(
        Shapes(5, spatial=(4, 4, 4)), (Shapes(5, spatial=(4, 4, 4)),), image=(3, 8, 8)
    )
    built = ResKD().build(shapes)
    with torch.no_grad():
        for p in built.assistant.parameters():
            p.zero_()
    spatial, z = torch.randn(3, 4, 4, 4), torch.zeros(3, 5)
    both = Outputs(z, spatial=spatial)
    given = given_of(both, [both], torch.arange(3), torch.randn(3, 3, 8, 8))
    terms = ResKD().distill(given, built)
    assert terms["mimic"] == terms["residual"] == 0


def test_reskd_says_why_it_cannot():
    pair = PairShapes(Shapes(5, spatial=(4, 4, 4)), (Shapes(5, spatial=(6, 4, 4)),))
    assert ResKD().check(pair) is None
    with pytest.raises(IncompatibleError, match="expected"):
        ResKD().build(pair)
    for bad in (replace(pair, student=Shapes(5)), replace(pair, teachers=(Shapes(5),))):
        assert "expected" in ResKD().check(bad)
    assert "expected" in ResKD(assistant_width=0).check(pair)


# ---- DOT ----------------------------------------------------------------------------------------

REACHED = {"both": (1.0, 1.0), "task only": (1.0, 0.0), "distill only": (0.0, 1.0)}
STEPS = [  # rate, whether there is a label loss, whether there is a distillation loss
    (0.1, True, True),
    (0.1, True, True),
    (0.05, True, False),
    (0.05, False, True),
    (0.02, True, True),
]


def recipe(weights, **settings):
    group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": False, **settings}
    return [{"params": weights, **group}]


def terms_of(weights, step):
    """Label and distillation loss, each quadratic in the weights that it reaches."""
    _, has_task, has_distill = STEPS[step]
    losses = []
    for kind, (scale, centre) in enumerate([(1.0, 0.3), (2.0, -0.2)]):
        reached = [w for w, r in zip(weights, REACHED.values(), strict=True) if r[kind]]
        losses.append(sum(scale * ((w - centre - 0.1 * step) ** 2).sum() for w in reached))
    return {"ce": losses[0]} if has_task else {}, {"kd": losses[1]} if has_distill else {}


def new_weights():
    return [torch.tensor([0.7, -1.1], dtype=torch.float64).requires_grad_() for _ in REACHED]


def dot_run(delta, steps, weights, optimizer=None, **settings):
    optimizer = optimizer or DOT(delta).make_optimizer(recipe(weights, **settings))
    for step in steps:
        optimizer.param_groups[0]["lr"] = STEPS[step][0]
        DOT(delta).descend(*terms_of(weights, step), optimizer)
    return optimizer


def slow_dot(start, reach, delta, nesterov, momentum=0.9, decay=0.01):
    """One scalar weight through all steps, in Python's own numbers."""
    w, buffers = start, {}
    for step, (rate, *there) in enumerate(STEPS):
        slopes = {
            kind: 2 * scale * (w - centre - 0.1 * step)
            for kind, (scale, centre) in enumerate([(1.0, 0.3), (2.0, -0.2)])
            if there[kind] and reach[kind]
        }
        if not slopes:
            continue
        kinds = sorted({*slopes, *buffers})
        move = 0.0
        for kind in kinds:
            own = momentum if len(kinds) == 1 else momentum + (delta if kind else -delta)
            slope = slopes.get(kind, 0.0) + (decay * w if kind == kinds[0] else 0.0)
            buffers[kind] = own * buffers.get(kind, 0.0) + slope
            move += slope + own * buffers[kind] if nesterov else buffers[kind]
        w -= rate * move
    return w


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("delta", [0.0, 0.075, 0.09, -0.05])
def test_dot_is_the_scalar_recurrence(delta, nesterov):
    weights = new_weights()
    dot_run(delta, range(len(STEPS)), weights, nesterov=nesterov)
    for weight, reach in zip(weights, REACHED.values(), strict=True):
        expected = [slow_dot(start, reach, delta, nesterov) for start in (0.7, -1.1)]
        assert weight.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_dot_without_delta_is_sgd(nesterov, decay):
    ours, theirs = new_weights(), new_weights()
    dot_run(0.0, range(len(STEPS)), ours, nesterov=nesterov, weight_decay=decay)
    sgd = torch.optim.SGD(recipe(theirs, nesterov=nesterov, weight_decay=decay))
    for step, (rate, *_) in enumerate(STEPS):
        sgd.param_groups[0]["lr"] = rate
        sgd.zero_grad(set_to_none=True)
        total(*terms_of(theirs, step)).backward()
        sgd.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dot_with_one_loss_is_sgd_whatever_delta_is():
    ours, theirs = new_weights()[:1], new_weights()[:1]
    optimizer = DOT(0.09).make_optimizer(recipe(ours))
    sgd = torch.optim.SGD(recipe(theirs))
    for step in range(4):
        loss = {"kd": ((ours[0] - step) ** 2).sum()}
        DOT(0.09).descend({}, loss, optimizer)
        sgd.zero_grad()
        ((theirs[0] - step) ** 2).sum().backward()
        sgd.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)


def test_dot_resumes_to_the_bit():
    whole, halves = new_weights(), new_weights()
    dot_run(0.075, range(5), whole)
    saved = dot_run(0.075, range(2), halves).state_dict()
    resumed = [w.detach().clone().requires_grad_() for w in halves]
    optimizer = DOT(0.075).make_optimizer(recipe(resumed))
    optimizer.load_state_dict(saved)
    dot_run(0.075, range(2, 5), resumed, optimizer)
    assert all(map(torch.equal, whole, resumed))


def test_dot_speeds_up_distillation_only():
    """After many equal gradients a buffer is gradient / (1 - momentum)."""
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = DOT(0.075).make_optimizer(recipe([weight], lr=0.0, weight_decay=0.0))
    for _ in range(700):  # 0.975^700 is 2e-8
        DOT(0.075).descend({"ce": weight.sum()}, {"kd": weight.sum()}, optimizer)
    buffers = {name: value.item() for name, value in optimizer.state[weight].items()}
    assert buffers == pytest.approx({"task_momentum": 1 / 0.175, "distill_momentum": 1 / 0.025})


@pytest.mark.parametrize(("delta", "momentum"), [(0.1, 0.9), (0.3, 0.2), (-0.2, 0.9), (0.0, 1.0)])
def test_dot_refuses_momenta_that_are_none(delta, momentum):
    with pytest.raises(ConfigError, match="momenta"):
        DOT(delta).make_optimizer(recipe(new_weights(), momentum=momentum))


@pytest.mark.parametrize("method", [KD(), Scratch()])
def test_dot_drives_a_stage_and_leaves_the_losses_alone(method):
    given = logit_signals(0, 4, 5)
    plain, driven = (
        Objective([Part(method, modifiers)], PairShapes(Shapes(5), (Shapes(5),)))
        for modifiers in ((), (DOT(),))
    )
    z = nn.Parameter(given.student.logits.clone())
    given = given.with_logits(z, [given.teacher.logits])
    assert total(*plain(given)) == total(*driven(given))
    optimizer = driven.make_optimizer(recipe([z]))
    before = total(*driven(given)).item()
    for _ in range(3):
        driven.descend(*driven(given), optimizer)
    assert total(*driven(given)).item() < before
    assert set(optimizer.state[z]) <= {"task_momentum", "distill_momentum"}
