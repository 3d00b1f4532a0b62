"""Which batch norm of a network feeds each of its pre-activation taps.

A residual block's pre-activation is the sum of a normalised branch and a shortcut that may be
normalised too; the norm that counts is the one with more layers behind it, at the branch's end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm

from smskd.modes import eval_mode
from smskd.taps import PREACT, Network, TappedModel

SUM = "AddBackward0"


def feeding_norms(network: Network, image: tuple[int, ...]) -> list[_BatchNorm | None]:
    """Find the batch norm in front of each pre-activation, by running the network once.

    Args:
        network: Its mode, statistics and gradients are left as they were.
        image: ``(C, H, W)``.

    Returns:
        One for each tap: the batch norm whose output it is, or which is added to give it; None if
        there is none, or not one of as many channels.
    """
    made: dict[Node | None, _BatchNorm] = {}

    def remember(norm: nn.Module, _inputs: object, output: Tensor) -> None:
        assert isinstance(norm, _BatchNorm)
        made[output.grad_fn] = norm

    norms = [module for module in network.model.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_hook(remember) for norm in norms]
    try:
        maps = _run(network, image)
        found = [_feeding(preact.grad_fn, made) for preact in maps]
    finally:
        for hook in hooks:
            hook.remove()
    widths = [preact.shape[1] for preact in maps]
    return [
        norm if norm is not None and norm.num_features == width else None
        for norm, width in zip(found, widths, strict=True)
    ]


def _run(network: Network, image: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Pre-activations of an image, with the graph of how they came about."""
    like = next(network.model.parameters(), torch.zeros(()))
    blank = torch.zeros(1, *image, dtype=like.dtype, device=like.device, requires_grad=True)
    tapped = TappedModel(network.model, network.taps, frozenset({PREACT}))
    with tapped, eval_mode(network.model), torch.enable_grad():
        return tapped.run(blank).preact


def _feeding(node: Node | None, made: dict[Node | None, _BatchNorm]) -> _BatchNorm | None:
    candidates, waiting = [], [node]
    while waiting:
        node = waiting.pop()
        if node in made:
            candidates.append(node)
        elif node is not None and node.name() == SUM:
            waiting += _before(node)
    return made[max(candidates, key=_num_behind)] if candidates else None


def _num_behind(node: Node | None) -> int:
    """How many operations a result depends on."""
    seen, waiting = {node}, [node]
    while waiting:
        new = [n for n in _before(waiting.pop()) if n not in seen]
        seen.update(new)
        waiting += new
    return len(seen)


def _before(node: Node | None) -> list[Node | None]:
    return [] if node is None else [one for one, _ in node.next_functions if one is not None]
