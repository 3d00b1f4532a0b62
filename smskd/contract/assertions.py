"""What checks raise: AssertionError with a sentence, whatever Python's flags are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from smskd.methods.base import Terms


def require(holds: bool, sentence: str) -> None:
    """Raise AssertionError with the sentence unless it holds."""
    if not holds:
        raise AssertionError(sentence)


def require_finite(task: Terms, distill: Terms, parameters: Iterable[nn.Parameter]) -> None:
    """Terms are finite scalars, and so are the gradients that there are."""
    for name, term in {**task, **distill}.items():
        require(term.shape == (), f"term {name!r} has shape {tuple(term.shape)}, expected a scalar")
        require(bool(term.isfinite()), f"term {name!r} is {term.item()}")
    broken = [p for p in parameters if p.grad is not None and not bool(p.grad.isfinite().all())]
    require(not broken, f"the gradients of {len(broken)} parameters are not finite")


def require_close(one: Terms, other: Terms, what: str, rtol: float, atol: float) -> None:
    """Both have the same terms with nearly the same values."""
    require(one.keys() == other.keys(), f"{what}: terms {sorted(one)} and {sorted(other)}")
    for name in one:
        a, b = one[name].item(), other[name].item()
        near = abs(a - b) <= atol + rtol * max(abs(a), abs(b))
        require(near, f"{what}: term {name!r} is {a:.8g} in one and {b:.8g} in the other")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names whose values are not equal to the last bit."""
    return [name for name in one if name not in other or not torch.equal(one[name], other[name])]
