"""The reference loss against a loop in plain Python floats, written from its formula alone.

L_ref = sum_i w_i * tau_r^2 * KL(softmax(z_r / tau_r) || softmax(z_s / tau_r)) / denominator
"""

import itertools
import math

import pytest
import torch

from smskd.methods.base import Signals
from smskd.reference import Anchor, sample_weights, true_class_probability
from smskd.settings import Reference, Weighting
from smskd.taps import Outputs, TappedModel, Taps

B, K = 5, 4
LABELS = [0, 3, 1, 1, 2]
MAPS = {
    "one_minus_tcp": lambda t: 1 - t,
    "tcp": lambda t: t,
    "constant": lambda t: 1.0,
    "exp_minus_tcp": lambda t: math.exp(-t),
    "two_minus_tcp": lambda t: 2 - t,
}


def logits(seed, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(B, K, dtype=torch.float64, generator=generator)


def naive_softmax(row, tau):
    powers = [math.exp(z / tau) for z in row]
    return [p / sum(powers) for p in powers]


def naive_weights(teacher, weighting):
    tcp = [naive_softmax(z, weighting.temperature)[y] for z, y in zip(teacher, LABELS, strict=True)]
    weights = [MAPS[weighting.map](t) for t in tcp]
    divisor = {"none": 1.0, "batch_mean": sum(weights) / B, "batch_sum": sum(weights)}
    return [w / divisor[weighting.normalise] for w in weights]


def naive_loss_and_gradient(student, teacher, reference, settings):
    """The loss, and its derivative by each student logit: w * tau * (p_s - p_r) / denominator."""
    weights, tau = naive_weights(teacher, settings.weighting), settings.temperature
    denominator = B if settings.weighting.denominator == "batch" else sum(weights)
    loss, gradient = 0.0, []
    for z_s, z_r, w in zip(student, reference, weights, strict=True):
        p_s, p_r = naive_softmax(z_s, tau), naive_softmax(z_r, tau)
        kl = sum(r * (math.log(r) - math.log(s)) for r, s in zip(p_r, p_s, strict=True))
        loss += w * tau**2 * kl / denominator
        gradient.append(
            [
                settings.weight * w * tau * (s - r) / denominator
                for s, r in zip(p_s, p_r, strict=True)
            ]
        )
    return settings.weight * loss, gradient


def ours(student, teacher, reference, settings):
    student = student.clone().requires_grad_()
    signals = Signals(Outputs(student), (Outputs(teacher),), torch.tensor(LABELS), torch.arange(B))
    anchor = Anchor(TappedModel(torch.nn.Identity(), Taps()), settings)
    terms, weights = anchor.terms(signals, Outputs(reference))
    assert list(terms) == ["reference"]
    terms["reference"].backward()
    return terms["reference"].item(), student.grad, weights


@pytest.mark.parametrize(
    ("map_", "normalise", "denominator"),
    list(itertools.product(MAPS, ("none", "batch_mean", "batch_sum"), ("batch", "weights"))),
)
def test_logit_reference_equals_the_naive_loop(map_, normalise, denominator):
    student, teacher, reference = logits(1), logits(2), logits(3)
    for tau, tau_tcp, weight in [(4.0, 1.0, 1.0), (1.0, 2.5, 0.3)]:
        settings = Reference(
            weight, tau, "logits", Weighting(map_, tau_tcp, normalise, denominator)
        )
        loss, gradient = naive_loss_and_gradient(
            student.tolist(), teacher.tolist(), reference.tolist(), settings
        )
        got, got_gradient, weights = ours(student, teacher, reference, settings)
        assert got == pytest.approx(loss, abs=1e-10)
        torch.testing.assert_close(
            got_gradient, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-10
        )
        assert weights.tolist() == pytest.approx(
            naive_weights(teacher.tolist(), settings.weighting), abs=1e-12
        )


def test_feature_reference_equals_the_naive_loop():
    generator = torch.Generator().manual_seed(4)
    f_s, f_r = torch.randn(2, B, 3, 2, 2, dtype=torch.float64, generator=generator)
    f_s.requires_grad_()
    settings = Reference(0.7, space="features", weighting=Weighting(normalise="batch_mean"))
    teacher = logits(2)
    signals = Signals(
        Outputs(logits(1), (torch.zeros(1), f_s)), (Outputs(teacher),), torch.tensor(LABELS),
        torch.arange(B),
    )  # fmt: skip
    anchor = Anchor(TappedModel(torch.nn.Identity(), Taps()), settings)
    terms, _ = anchor.terms(signals, Outputs(logits(3), (torch.ones(1), f_r)))
    terms["reference"].backward()
    weights = naive_weights(teacher.tolist(), settings.weighting)
    loss = 0.0
    for i in range(B):
        s, r = f_s[i].flatten().tolist(), f_r[i].flatten().tolist()
        loss += 0.7 * weights[i] * sum((a - b) ** 2 for a, b in zip(s, r, strict=True)) / 12 / B
        expected = [0.7 * weights[i] * 2 * (a - b) / 12 / B for a, b in zip(s, r, strict=True)]
        assert f_s.grad[i].flatten().tolist() == pytest.approx(expected, abs=1e-10)
    assert terms["reference"].item() == pytest.approx(loss, abs=1e-10)


def test_frozen_numbers():
    # From the formula by hand: softmax([2, 0]) = (0.880797..., 0.119203...).
    tcp = true_class_probability(
        torch.tensor([[2.0, 0.0], [2.0, 0.0]]).double(), torch.tensor([0, 1])
    )
    assert tcp.tolist() == pytest.approx([0.8807970779778823, 0.11920292202211755], abs=1e-15)
    weights = sample_weights(tcp, Weighting("one_minus_tcp", normalise="batch_mean"))
    assert weights.tolist() == pytest.approx([0.2384058440442351, 1.7615941559557649], abs=1e-14)
