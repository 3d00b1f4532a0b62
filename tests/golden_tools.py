"""What golden tests share: random signals, and the comparison of two implementations of one loss.

The naive side is written in each test file anew, from the formulas, and shares nothing with the
package.
"""

import numpy as np
import torch

from smskd.methods import Signals
from smskd.taps import Outputs

SEEDS = range(3)
TOLERANCE = 1e-10


def random(seed, *shape, scale=1.0):
    values = np.random.default_rng([seed, *shape]).normal(scale=scale, size=shape)
    return torch.tensor(values, dtype=torch.float64)


def signals(student, teacher, labels=None, epoch=1):
    labels = torch.zeros(len(student.logits), dtype=torch.long) if labels is None else labels
    return Signals(student, (teacher,), labels, torch.arange(len(labels)), epoch, 240)


def logit_signals(seed, batch, classes, scale=3.0, epoch=1):
    labels = np.random.default_rng([seed, batch]).integers(classes, size=batch)
    z_s, z_t = (
        random(seed, batch, classes, scale=scale),
        random(seed + 99, batch, classes, scale=scale),
    )
    return signals(Outputs(z_s), Outputs(z_t), torch.tensor(labels), epoch)


def map_signals(maps_s, maps_t):
    z = torch.zeros(len(maps_s[0]), 3, dtype=torch.float64)
    return signals(Outputs(z, maps=tuple(maps_s)), Outputs(z, maps=tuple(maps_t)))


def pooled_signals(h_s, h_t):
    z = torch.zeros(len(h_s), 3, dtype=torch.float64)
    return signals(Outputs(z, pooled=h_s), Outputs(z, pooled=h_t))


def loss_of(method, given, modules=None):
    terms = method.distill(given, modules if modules is not None else torch.nn.Module())
    return sum(terms.values())


def assert_same(fast, slow, inputs):
    """Value and gradient of two closures, with respect to the same leaf tensors."""
    results = []
    for closure in (fast, slow):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = closure(*leaves)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        grads = [
            torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)
        ]
        results.append([value.detach(), *grads])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == torch.float64
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
