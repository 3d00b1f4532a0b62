"""Whether the methods of a plan can work with its networks, found before anything is trained.

Every method says by sizes alone why it cannot work with a pair (``check`` in
:mod:`smskd.methods.base`). The sizes of a network's features are found once, by one image.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

from smskd.datasets import dataset_info
from smskd.errors import ConfigError, IncompatibleError
from smskd.methods.base import Method, PairShapes
from smskd.methods.objective import why_no_reference, why_not
from smskd.models import build_model, taps_of
from smskd.seeding import seeded
from smskd.stages import Stage, stage_needs
from smskd.taps import Shapes, probe
from smskd_bench.cost import num_train
from smskd_bench.plan import Plan
from smskd_bench.spec import MethodSpec, StageSpec
from smskd_bench.worker import stage_of


def check_plan(plan: Plan, keys: Iterable[str]) -> None:
    """Refuse stage runs that could only fail when their turn comes.

    Args:
        plan: Of the matrix.
        keys: Of the stage runs to look at.

    Raises:
        IncompatibleError: one line for each pair of networks and method that cannot work.
    """
    methods = {method.name: type(method) for method in plan.loaded.methods.values()}
    found: dict[str, None] = {}
    for spec in _different(plan, keys):
        found |= dict.fromkeys(_problems(spec, plan, methods))
    if found:
        raise IncompatibleError(
            f"{plan.loaded.file}: " + "\n".join(found),
            "take such rows out, limit them with 'only', or change their settings; nothing was run",
        )


def _different(plan: Plan, keys: Iterable[str]) -> list[StageSpec]:
    """One of all stage runs that cannot differ in the answer."""
    seen: dict[object, StageSpec] = {}
    texts: dict[int, str] = {}

    def text(methods: tuple[MethodSpec, ...]) -> str:
        # The planner gives all students of a stage the very same methods.
        if id(methods) not in texts:
            texts[id(methods)] = repr(methods)
        return texts[id(methods)]

    for key in keys:
        spec = plan.nodes[key]
        if not spec.imported:
            taught = [plan.nodes[key] for key in spec.teachers]
            teachers = tuple((node.model, text(node.methods)) for node in taught)
            methods = text(spec.methods)
            before = text(plan.nodes[spec.parent].methods) if spec.parent else ""
            size = spec.training.batch_size
            what = (spec.model, teachers, methods, repr(spec.reference), before, size)
            seen.setdefault(what, spec)
    return list(seen.values())


def _problems(spec: StageSpec, plan: Plan, methods: dict[str, type[Method]]) -> list[str]:
    teachers = [plan.nodes[key].model for key in spec.teachers]
    pair = f"{'+'.join(teachers)}>{spec.model}" if teachers else spec.model
    try:
        stage = stage_of(spec, methods)
        shapes = _pair_shapes(spec, teachers, stage)
    except ConfigError as error:
        return [f"{pair}: {error.message}"]
    found = [f"{pair}: {name}: {why}" for name, why in why_not(stage.parts, shapes).items()]
    for key in spec.teachers:
        taught = [methods[method.name] for method in plan.nodes[key].methods]
        if not any(method.trains_classifier for method in taught):
            names = "+".join(method.name for method in taught)
            found.append(
                f"{pair}: a student of {names} cannot teach, as its own logits are not trained "
                "(expected an assistant whose last stage trains them)"
            )
    if spec.parent:
        before = [methods[method.name]() for method in plan.nodes[spec.parent].methods]
        if (reason := why_no_reference(before, spec.reference)) is not None:
            found.append(f"{pair}: stage {spec.number}: {reason}")
    return found


def _pair_shapes(spec: StageSpec, teachers: list[str], stage: Stage) -> PairShapes:
    needs, data = stage_needs(stage, spec.reference), spec.dataset.name
    info = dataset_info(data)
    return PairShapes(
        student=_shapes(spec.model, data, needs.student_roles),
        teachers=tuple(_shapes(model, data, needs.teacher_roles) for model in teachers),
        num_train=num_train(spec),
        student_taps=taps_of(spec.model),
        batch_size=spec.training.batch_size,
        image=(info.channels, info.size, info.size),
    )


@cache
def _shapes(model: str, dataset: str, roles: frozenset[str]) -> Shapes:
    """Sizes of what is read of a network.

    Raises:
        ConfigError: the model has no tap for a role, or cannot be run on the data set's images.
    """
    info = dataset_info(dataset)
    try:
        taps_of(model).wanted(sorted(roles))
    except ConfigError as error:
        raise ConfigError(f"{model}: {error.message}", error.hint) from None
    with seeded(0):  # drawing its weights must not move the stream that training draws from
        network = build_model(model, info.num_classes, info.channels, info.size)
    image = torch.zeros(1, info.channels, info.size, info.size)
    try:
        return probe(network, taps_of(model), roles, image)
    except (RuntimeError, ValueError, AssertionError) as error:  # a network's own words
        shape = f"{info.channels}x{info.size}x{info.size}"
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{model} cannot be run on images of {shape}: {first}") from None
