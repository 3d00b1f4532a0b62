"""Which frozen networks are worth a table of their outputs, and how large that table is.

A frozen network (a teacher, or the student of the stage before as the reference) says the same
about the same view of an image every time. Views are drawn by seed and epoch alone
(:mod:`smskd.views`), so stage runs of one seed see the same ones in the same epochs, and a network
that several stage runs read is asked the same thing again and again. A table asks once.

Pure: the decision depends on the plan alone, not on what is done nor on the machine, so that every
run of a matrix decides alike. Shapes: N samples, V views, K classes, D width of the pooled feature.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Literal

from smskd.datasets import dataset_info
from smskd.methods import MODIFIERS
from smskd.methods.base import Needs
from smskd.output_table import DTYPES, LOGITS, Storage
from smskd.settings import Precision
from smskd.taps import CLASSIFIER, POOLED
from smskd.views import Augmentation
from smskd_bench.cost import network_cost, num_train, pooled_width
from smskd_bench.plan import Plan
from smskd_bench.spec import DataSpec, StageSpec

Role = Literal["teacher", "reference"]
TableKey = tuple[str, Precision]
"""Key of the network, and the precision under which its readers would run it."""


WORTH_IT = 1.25
"""Forwards without a table, over forwards with one, from which a table is made.

Below it the saving is not worth the disk; a look-up and the filling cost something too.
"""

RESERVE_BYTES = 2 * 2**30
"""Disk space that tables leave free, for checkpoints and results."""


@dataclass(frozen=True)
class FrozenUse:
    """One frozen network that a stage run asks about every image of every epoch.

    Attributes:
        network: Key of the stage run that trained it.
        role: What the stage run takes it for.
        pooled: Whether its pooled feature is read besides its logits.
        why_live: Why it has to be run; empty if a table would do.
    """

    network: str
    role: Role
    pooled: bool = False
    why_live: str = ""


@dataclass(frozen=True)
class TablePlan:
    """One table that could be made.

    Attributes:
        network: Key of the stage run that trained the frozen network.
        precision: Under which it is run.
        roles: What is kept of it: "logits", and "pooled" if some user reads that.
        users: Keys of the stage runs that would read the table, in the plan's order.
        epochs_live: Forwards of each training image if the users run the network.
        passing: Whether only references are read from it: nobody will want it after its users.
        epochs_built: Expected forwards of each training image with a table: its distinct views.
        num_bytes: Size with an entry for every view of every image.
        macs_saved: Multiply-accumulates that the table saves.
        why_not: Why it is not worth making; empty if it is.
    """

    network: str
    precision: Precision
    roles: frozenset[str]
    users: tuple[str, ...]
    epochs_live: int
    epochs_built: float
    passing: bool
    num_bytes: int
    macs_saved: int
    why_not: str = ""

    @property
    def pays(self) -> bool:
        """Whether the table is to be made."""
        return not self.why_not

    @property
    def pooled(self) -> bool:
        """Whether the pooled feature is kept."""
        return POOLED in self.roles


def plan_tables(plan: Plan, dtype: Storage = "fp16") -> dict[TableKey, TablePlan]:
    """Decide for every teacher, and every parent that serves as reference, in the plan's order.

    Args:
        plan: Of the whole matrix: a part of it (``--only``) may decide otherwise.
        dtype: Type of the stored numbers.
    """
    readers: dict[TableKey, _Readers] = {}
    for key, spec in plan.nodes.items():
        for use in frozen_uses(spec, plan):
            place = use.network, spec.training.precision
            readers.setdefault(place, _Readers()).add(key, use)
    return {place: _decide(place, found, plan, dtype) for place, found in readers.items()}


def frozen_uses(spec: StageSpec, plan: Plan) -> list[FrozenUse]:
    """The frozen networks that one stage run reads, whether from a table or live."""
    roles = _needs(spec, plan).teacher_roles
    others = sorted(roles - {POOLED, CLASSIFIER})
    why = f"its {' and '.join(others)} are read, which no table holds" if others else ""
    uses = [FrozenUse(key, "teacher", POOLED in roles, why) for key in spec.teachers]
    if spec.reference is not None and spec.parent is not None:
        features = spec.reference.space == "features"
        why = "the reference compares feature maps, which no table holds" if features else ""
        uses.append(FrozenUse(spec.parent, "reference", why_live=why))
    return uses


def num_views(data: DataSpec) -> int:
    """How many different images one training image can become (V)."""
    info = dataset_info(data.name)
    return Augmentation(info.pad, info.flip).num_views


def expected_views(views: int, draws: int) -> float:
    """Expected number of different views among ``draws`` uniform, independent ones of ``views``."""
    return float(views * (1.0 - (1.0 - 1.0 / views) ** draws))


def draws_of(users: Iterable[str], plan: Plan) -> int:
    """How often stage runs draw a view of each image, what they draw in common counted once."""
    specs = (plan.nodes[key] for key in users)
    spans = {(spec.seed, spec.first_epoch + 1, spec.training.epochs) for spec in specs}
    drawn: dict[int, set[int]] = {}
    for seed, first, epochs in spans:  # few, however many users there are
        drawn.setdefault(seed, set()).update(range(first, first + epochs))
    return sum(map(len, drawn.values()))


def views_to_fill(table: TablePlan, plan: Plan, done: Collection[str] = ()) -> float:
    """Expected forwards of each image that a table still needs when users in ``done`` had theirs.

    It is assumed that the table was kept since.
    """
    views = num_views(plan.nodes[table.network].dataset)
    before = draws_of([key for key in table.users if key in done], plan)
    return table.epochs_built - expected_views(views, before)


def room_for(table_bytes: int, folder: Path) -> str | None:
    """Why a table does not fit on the disk of ``folder``, or None if it does.

    Args:
        table_bytes: What is still to be written.
        folder: Need not be there yet.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return f"the free space on {folder} cannot be read: {error.strerror or error}"
    if table_bytes + RESERVE_BYTES <= free:
        return None
    return (
        f"needs {size_text(table_bytes)}, free {size_text(free)} on {folder} "
        f"({size_text(RESERVE_BYTES)} of it stay free)"
    )


def size_text(num_bytes: float) -> str:
    """Bytes for a person: 1.51 GiB, 4.2 MiB."""
    gib = num_bytes / 2**30
    return f"{gib:,.2f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:.1f} MiB"


@dataclass
class _Readers:
    """Who reads one network."""

    tabled: list[tuple[str, FrozenUse]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, key: str, use: FrozenUse) -> None:
        if use.why_live:
            self.reasons.append(use.why_live)
        else:
            self.tabled.append((key, use))


def _decide(place: TableKey, readers: _Readers, plan: Plan, dtype: Storage) -> TablePlan:
    network, precision = place
    spec = plan.nodes[network]
    users = tuple(dict.fromkeys(key for key, _ in readers.tabled))
    pooled = any(use.pooled for _, use in readers.tabled)
    views = num_views(spec.dataset)
    live = sum(plan.nodes[key].training.epochs for key, _ in readers.tabled)
    built = expected_views(views, draws_of(users, plan))
    macs = network_cost(spec.model, spec.dataset.name).macs
    return TablePlan(
        network=network,
        precision=precision,
        roles=frozenset({LOGITS, POOLED} if pooled else {LOGITS}),
        users=users,
        epochs_live=live,
        epochs_built=built,
        passing=all(use.role == "reference" for _, use in readers.tabled),
        num_bytes=num_train(spec) * views * _width(spec, pooled) * DTYPES[dtype].itemsize,
        macs_saved=round((live - built) * num_train(spec) * macs),
        why_not=_why_not(live, built, views, readers.reasons),
    )


def _width(spec: StageSpec, pooled: bool) -> int:
    """Numbers an entry: K, and D if the pooled feature is kept."""
    classes = dataset_info(spec.dataset.name).num_classes
    return classes + (pooled_width(spec.model, spec.dataset.name) if pooled else 0)


def _why_not(live: int, built: float, views: int, reasons: list[str]) -> str:
    if not live:
        return "; ".join(sorted(set(reasons)))
    if live >= WORTH_IT * built:
        return ""
    return (
        f"{live} epochs show {built:.1f} of an image's {views} views: a table makes the forwards "
        f"{live / built:.2f} times fewer, and is worth it from {WORTH_IT}"
    )


def _needs(spec: StageSpec, plan: Plan) -> Needs:
    methods = plan.loaded.methods
    needs = [methods[method.name].needs for method in spec.methods]
    needs += [MODIFIERS[named.name].needs for method in spec.methods for named in method.modifiers]
    return reduce(or_, needs)
