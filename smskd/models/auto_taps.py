"""Find the taps of any network by running it once.

What a network is made of cannot be told from its modules' names, but from what they say: the
classifier is the linear layer whose output is the logits; a stage ends with the last module that
gives maps of one resolution; what is pooled is the map whose mean over positions is the
classifier's input. Nothing is drawn and nothing is guessed from values, so the same network gives
the same taps.

Three layouts of maps are known: ``(B, C, H, W)``, ``(B, H, W, C)`` and tokens ``(B, N, C)``.

Shapes: B batch, K classes, C channels, H and W height and width, D width of the pooled feature,
N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from smskd.modes import eval_mode, fixed_statistics
from smskd.taps import TappedModel, Taps, as_map

LAYOUTS = ("", "nhwc", "tokens")
"""How a tap ends that reads maps of each layout."""

DEPTHS = 4
"""Maps that are read of a network whose blocks all have one resolution."""

MOST_EXTRA_TOKENS = 8
"""Class, distillation and register tokens that may stand before the map's."""

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish,
)  # fmt: skip

Size = tuple[int, int]
"""Height and width of a map."""


def auto_taps(model: nn.Module, images: Tensor) -> Taps:
    """Find where the features of ``model`` are.

    Args:
        model: Maps images to logits ``(B, K)``; in any mode, and left as it was. Its activations
            should not work in place (:func:`not_in_place`), or fewer places can be read.
        images: ``(B, C, H, W)``, one is enough: real ones or noise, not a constant, and large
            enough that the last maps have more than one position.

    Returns:
        What could be found. ``maps``: the last map of each resolution, in the order of execution;
        where all blocks have one resolution, the maps at 1/4, 2/4, 3/4 and 4/4 of the depth.
        ``preact``: what enters the activations that end them, if all of them end in one.
        ``classifier`` and ``pooled``: the linear layer whose output is the logits, and what enters
        it. ``spatial``: the last map whose mean over positions is the pooled feature.

    Raises:
        ConfigError: the model does not give logits ``(B, K)``.
    """
    run = _dry_run(model, images)
    head = _head(run)
    maps = _maps(run)
    return Taps(
        maps=tuple(_tap(call, layout) for call, layout in maps),
        preact=_preact(run, [call for call, _ in maps]),
        pooled=f"{head.name}:input" if head else None,
        classifier=head.name if head and run.is_logits(head.output) else None,
        spatial=_spatial(run, head) if head else None,
    )


def not_in_place(model: nn.Module) -> nn.Module:
    """Switch activations that work in place to working beside, so that every place can be read."""
    for module in model.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
    return model


@dataclass
class _Call:
    """One module's last run: when, on what, and what came out."""

    name: str
    module: nn.Module
    started: int
    ended: int
    input: Tensor | None
    output: Tensor
    version: int

    @property
    def unchanged(self) -> bool:
        """Whether no later module worked in place on the output."""
        return self.output._version == self.version

    def inside(self, other: _Call) -> bool:
        """Whether this module is a part of the other."""
        return self.name.startswith(f"{other.name}.")


@dataclass
class _Run:
    """A dry run: calls in the order in which they ended, and what the network said."""

    image: Size
    calls: list[_Call] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def size(self, value: Tensor | None, layout: str) -> Size | None:
        """Height and width of a tensor if it can be a map of this layout."""
        if value is None:
            return None
        if layout == "tokens":
            return _grid(value.shape[1]) if value.dim() == 3 else None
        if value.dim() != 4:
            return None
        first, last = _sides(value, ""), _sides(value, "nhwc")
        if layout == "":
            return first if self._is_reduced(first) else None
        return last if self._is_reduced(last) and not self._is_reduced(first) else None

    def is_logits(self, value: Tensor) -> bool:
        """Whether a tensor is what the network said."""
        return torch.equal(value.to(self.logits.dtype), self.logits)

    def _is_reduced(self, size: Size) -> bool:
        """Whether a map of this size has the image's aspect, within a pixel if it is not square."""
        (height, width), (rows, columns) = self.image, size
        slack = 0 if height == width else max(height, width)
        return abs(rows * width - columns * height) <= slack


def _dry_run(model: nn.Module, images: Tensor) -> _Run:
    # Two images, because batch norm cannot normalise a single position by one.
    images = images if len(images) > 1 else torch.cat([images, images.flip(3)])
    run = _Run((images.shape[2], images.shape[3]))
    with _batch_normalised(model), _recorded(model, run), TappedModel(model, Taps()) as tapped:
        run.logits = tapped(images).logits
    run.calls = sorted((c for c in run.calls if c.name), key=lambda call: call.ended)
    return run


@contextmanager
def _batch_normalised(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, but batch norms normalise by the batch.

    Untrained running statistics would let the features of deep networks fade to nothing.
    """
    with torch.no_grad(), eval_mode(model):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.training = True
        with fixed_statistics(model):
            yield


@contextmanager
def _recorded(model: nn.Module, run: _Run) -> Iterator[None]:
    """Note every call; of a module that runs several times, the last counts."""
    clock = count()
    started: dict[nn.Module, int] = {}
    last: dict[nn.Module, tuple[int, int, Tensor | None, Tensor, int]] = {}

    def begin(module: nn.Module, _inputs: tuple[object, ...]) -> None:
        started[module] = next(clock)

    def end(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor):
            first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            last[module] = (started[module], next(clock), first, output, output._version)

    names = {module: name for name, module in model.named_modules()}
    handles = [m.register_forward_pre_hook(begin) for m in names]
    handles += [m.register_forward_hook(end) for m in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    run.calls = [_Call(names[module], module, *call) for module, call in last.items()]


def _head(run: _Run) -> _Call | None:
    """The linear layer that gives the logits; if none does alone, the last one of their shape."""
    linear = [
        call
        for call in run.calls
        if isinstance(call.module, nn.Linear)
        and call.output.shape == run.logits.shape
        and call.input is not None
    ]
    exact = [call for call in linear if run.is_logits(call.output)]
    found = exact or linear
    return found[-1] if found else None


def _maps(run: _Run) -> list[tuple[_Call, str]]:
    """Calls that give the maps, with their layout."""
    stages = {layout: _stage_ends(run, layout) for layout in ("", "nhwc")}
    layout = max(stages, key=lambda layout: len(stages[layout]))  # of equals, the first
    if len(stages[layout]) < 2:
        for isotropic in ("tokens", "nhwc", ""):
            if blocks := _blocks(run, isotropic):
                return [(call, isotropic) for call in blocks]
    return [(call, layout) for call in stages[layout]]


def _stage_ends(run: _Run, layout: str) -> list[_Call]:
    """The last map of each resolution above 1x1."""
    pooled = _made_by_pools(run)
    of_size: dict[Size, list[_Call]] = {}
    for call in run.calls:
        size = run.size(call.output, layout)
        if size is not None and size != (1, 1):
            of_size.setdefault(size, []).append(call)
    ends = []
    for size, calls in of_size.items():
        transitions = _transitions(run, size, layout, calls)
        good = [
            call
            for call in calls
            if id(call.output) not in pooled
            and _says_something(call)
            and not any(call.inside(t) for t in transitions)
        ]
        ends += good[-1:]
    return sorted(ends, key=lambda call: call.ended)


def _transitions(run: _Run, size: Size, layout: str, calls: Sequence[_Call]) -> list[_Call]:
    """Modules that turn maps of ``size`` into others: what is inside belongs to the next stage.

    A module that holds maps of more resolutions is a part of the network, not a transition; so is
    one before which there were no maps of ``size``.
    """
    found = []
    for call in run.calls:
        out = run.size(call.output, layout)
        if out in (None, size) or run.size(call.input, layout) != size:
            continue
        inner = {run.size(c.output, layout) for c in run.calls if c.inside(call)}
        if inner <= {size, out, (1, 1), None} and any(c.ended < call.started for c in calls):
            found.append(call)
    return found


def _blocks(run: _Run, layout: str) -> list[_Call]:
    """Of the longest row of like blocks with one shape of output, those at 1/4 ... 4/4 of it."""
    rows: dict[tuple[object, ...], list[_Call]] = {}
    for call in run.calls:
        size = run.size(call.output, layout)
        if size in (None, (1, 1)) or not call.unchanged or not _is_block(call.module):
            continue
        parent = call.name.rpartition(".")[0]
        rows.setdefault((parent, type(call.module), call.output.shape), []).append(call)
    longest = max(rows.values(), key=len, default=[])  # of equals, the first
    if len(longest) < 2:
        return []
    places = [math.ceil(len(longest) * i / DEPTHS) - 1 for i in range(1, DEPTHS + 1)]
    return [longest[place] for place in dict.fromkeys(places)]


def _preact(run: _Run, maps: Sequence[_Call]) -> tuple[str, ...]:
    """What enters the activation that made each map; empty if one was not made by an activation."""
    found = []
    for call in maps:
        made = [
            c
            for c in run.calls
            if c.output is call.output
            and isinstance(c.module, _ACTIVATIONS)
            and c.input is not None
        ]
        if not made or made[-1].input is made[-1].output:
            return ()
        found.append(f"{made[-1].name}:input")
    return tuple(found)


def _spatial(run: _Run, head: _Call) -> str | None:
    """The last map whose mean over positions is what enters the classifier."""
    assert head.input is not None
    pooled, pools = head.input.float(), _made_by_pools(run)
    found = [
        (call, layout)
        for call in run.calls
        if _says_something(call) and id(call.output) not in pools
        for layout in LAYOUTS
        if run.size(call.output, layout) is not None
        and _mean_is(as_map(call.output, _tap(call, layout)), pooled)
    ]
    # A single position counts only where it was made of several: behind a pool all maps have one.
    single = [one for one in found if run.size(one[0].input, one[1]) not in (None, (1, 1))]
    larger = [one for one in found if run.size(one[0].output, one[1]) != (1, 1)]
    best = larger or single
    return _tap(*best[-1]) if best else None


def _mean_is(maps: Tensor, pooled: Tensor) -> bool:
    means = maps.float().mean((2, 3))
    if means.shape != pooled.shape:
        return False
    scale = float(pooled.abs().max())
    return scale > 0.0 and torch.allclose(means, pooled, rtol=1e-4, atol=1e-5 * scale)


def _made_by_pools(run: _Run) -> set[int]:
    """Identities of the tensors that are a pool's output, also where a container hands them on."""
    return {id(c.output) for c in run.calls if "pool" in type(c.module).__name__.lower()}


def _says_something(call: _Call) -> bool:
    """Whether a call's output can be read, and is not just its input again."""
    idle = isinstance(call.module, (nn.Identity, _DropoutNd, nn.Softmax))
    return call.unchanged and not idle


def _is_block(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _tap(call: _Call, layout: str) -> str:
    return f"{call.name}:{layout}" if layout else call.name


def _grid(tokens: int) -> Size | None:
    """Side of the square that tokens make, a few extra ones left out."""
    side = math.isqrt(tokens)
    return (side, side) if tokens - side * side <= MOST_EXTRA_TOKENS else None


def _sides(value: Tensor, layout: str) -> Size:
    first = 1 if layout == "nhwc" else 2
    return value.shape[first], value.shape[first + 1]
