"""A frozen network with its batch norms folded into the convolutions before them.

In evaluation mode a batch norm is a scale and a shift by channel, which the convolution can do
itself: one pass over the map less for each. Only rounding differs.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from smskd.taps import CLASSIFIER, POOLED, Network, TappedModel


def fused(network: Network, roles: frozenset[str], image: Tensor) -> Network:
    """Fold what can be folded; ``network`` itself stays as it is.

    Args:
        network: In evaluation mode.
        roles: Features that will be read. Maps and pre-activations are read between the layers
            that would be folded, so a network that is asked for them is returned as it is.
        image: ``(1, C, H, W)``, on which both must agree; a network whose forward pass cannot be
            traced, or that comes out different, is returned as it is too.
    """
    if roles - {POOLED, CLASSIFIER}:
        return network
    try:
        traced = fx.symbolic_trace(network.model)
        _fold_norms(traced)
        folded = Network(traced.eval().requires_grad_(False), network.taps)
        return folded if _agree(network, folded, roles, image) else network
    except Exception:  # a forward that looks at its data fails in ways of its own
        return network


@torch.no_grad()
def _agree(one: Network, other: Network, roles: frozenset[str], image: Tensor) -> bool:
    with TappedModel(one.model, one.taps, roles) as tapped:
        said = tapped(image)
    with TappedModel(other.model, other.taps, roles) as tapped:
        again = tapped(image)
    scale = float(said.logits.abs().max()) + 1e-6
    same = torch.allclose(said.logits, again.logits, rtol=1e-3, atol=1e-4 * scale)
    if said.pooled is None or again.pooled is None:
        return same
    scale = float(said.pooled.abs().max()) + 1e-6
    return same and torch.allclose(said.pooled, again.pooled, rtol=1e-3, atol=1e-4 * scale)


def _fold_norms(traced: fx.GraphModule) -> None:
    modules = dict(traced.named_modules())
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        norm, conv = modules[str(node.target)], modules[str(before.target)]
        once = calls[str(node.target)] == calls[str(before.target)] == 1
        if once and type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            _replace(traced, str(before.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
