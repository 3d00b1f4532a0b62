"""How long a plan takes: images of each kind of work, times what each was measured to take.

Counted are training steps, frozen networks that are run live, the filling of tables, evaluations,
and a fixed cost of each stage run and epoch. Not counted are the losses of the methods themselves,
which are small beside the networks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from smskd.datasets import dataset_info
from smskd.output_table import CHUNK
from smskd.settings import Precision
from smskd_bench.calibration import Calibration
from smskd_bench.cost import network_cost, num_train
from smskd_bench.plan import Plan
from smskd_bench.spec import StageSpec
from smskd_bench.speed import Workload
from smskd_bench.tables import TableKey, TablePlan, frozen_uses, views_to_fill
from smskd_bench.threads import step_threads, threads_for

STAGE_RUN_S = 0.1
"""Building, loading, saving and comparing of one stage run; measured on a CPU."""

EPOCH_S = 0.02
"""Checkpoint and bookkeeping of one epoch; measured on a local disk."""

Tables = Mapping[TableKey, TablePlan]


@dataclass(frozen=True)
class Machine:
    """Where a plan is to run.

    Attributes:
        device: torch device string.
        available: CPU threads that torch has.
        threads: CPU threads the user asked for; None leaves them to the worker's rule.
    """

    device: str
    available: int
    threads: int | None = None


@dataclass
class Bill:
    """What has to be done.

    Attributes:
        images: Images by kind of work.
        stage_runs: Number of stage runs.
        epochs: Their epochs.
    """

    images: Counter[Workload] = field(default_factory=Counter)
    stage_runs: int = 0
    epochs: int = 0

    def add(self, other: Bill, times: int = 1) -> None:
        """Add another bill to this one, so many times."""
        for work, images in other.images.items():
            self.images[work] += times * images
        self.stage_runs += times * other.stage_runs
        self.epochs += times * other.epochs

    def seconds(self, speeds: Calibration) -> float:
        """Predicted time; work that could not be measured counts nothing."""
        fixed = self.stage_runs * STAGE_RUN_S + self.epochs * EPOCH_S
        images = self.images.items()
        return fixed + sum(n * (speeds.ms_per_image(w) or 0.0) / 1000.0 for w, n in images)


@dataclass(frozen=True)
class _Kind:
    """Stage runs of equal number cost the same, if the same of their networks have tables.

    Attributes:
        number: Of the kind.
        networks: The frozen networks of this stage run, as tables name them.
    """

    number: int
    networks: tuple[TableKey, ...]


@dataclass(frozen=True)
class Predictor:
    """Makes the bills of one plan on one machine; large plans hold few kinds of stage runs."""

    plan: Plan
    machine: Machine
    _kinds: dict[str, _Kind] = field(default_factory=dict, init=False, repr=False, compare=False)
    _numbers: dict[object, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def bill(
        self,
        keys: Iterable[str],
        tables: Tables | None = None,
        done: Collection[str] = (),
        folds: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Bill:
        """What the stage runs ``keys`` cost, each as often as it is named.

        Args:
            keys: Stage runs.
            tables: Tables that are made; their filling is part of the bill.
            done: Stage runs that have had their share of the tables.
            folds: Stage runs that are trained as one network, by key.
        """
        tables, folds, total, used = tables or {}, folds or {}, Bill(), set()
        read = _places_by_reader(tables)
        alike: Counter[tuple[int, tuple[bool, ...], int]] = Counter()
        example: dict[tuple[int, tuple[bool, ...], int], str] = {}
        for key, times in Counter(iter(keys)).items():
            kind, folded = self._kind(key), len(folds.get(key, (key,)))
            same = kind.number, tuple(network in tables for network in kind.networks), folded
            alike[same] += times
            example.setdefault(same, key)
            used |= read.get(key, set())
        for same, times in alike.items():
            total.add(self.stage(self.plan.nodes[example[same]], tables, same[2]), times)
        for place in used:
            total.add(self.filling(tables[place], done))
        return total

    def _kind(self, key: str) -> _Kind:
        """What the bill of a stage run depends on, seeds and keys aside."""
        if (kind := self._kinds.get(key)) is None:
            spec, nodes = self.plan.nodes[key], self.plan.nodes
            frozen = [(use, nodes[use.network].model) for use in frozen_uses(spec, self.plan)]
            same = (
                spec.model, spec.dataset, spec.training, spec.parent is None,
                tuple(nodes[teacher].model for teacher in spec.teachers),
                tuple((model, bool(use.why_live)) for use, model in frozen), num_train(spec),
            )  # fmt: skip
            number = self._numbers.setdefault(same, len(self._numbers))
            networks = tuple((use.network, spec.training.precision) for use, _ in frozen)
            kind = self._kinds[key] = _Kind(number, networks)
        return kind

    def stage(self, spec: StageSpec, tables: Tables | None = None, folded: int = 1) -> Bill:
        """One stage run, one of ``folded`` in a network, without the filling of tables."""
        tables, epochs, precision = tables or {}, spec.training.epochs, spec.training.precision
        total = Bill(stage_runs=1, epochs=epochs)
        threads = self._threads(spec)
        images = epochs * num_train(spec)
        if images:
            step = Workload.of(spec, spec.model, "train", threads)
            total.images[replace(step, folded=folded)] += images
            for use in frozen_uses(spec, self.plan):
                table = tables.get((use.network, precision))
                if table is None or use.why_live:
                    model = self.plan.nodes[use.network].model
                    total.images[Workload.of(spec, model, "forward", threads)] += images
        total.images[self._large(spec, "fp32")] += self.evaluated(spec)
        return total

    def filling(self, table: TablePlan, done: Collection[str] = ()) -> Bill:
        """The forwards that fill a table, but for what users in ``done`` have filled."""
        spec = self.plan.nodes[table.network]
        images = round(views_to_fill(table, self.plan, done) * num_train(spec))
        return Bill(Counter({self._large(spec, table.precision): images}))

    def evaluated(self, spec: StageSpec) -> int:
        """Images that one stage run is evaluated on: test set at its end, curves, development set.

        The student of the stage before is evaluated too, to compare the two.
        """
        every, epochs = self.plan.matrix.evaluate_every, spec.training.epochs
        curve = max(0, epochs - 1) // every if every else 0
        tests = 1 + curve + (1 if spec.parent else 0)
        return tests * dataset_info(spec.dataset.name).num_test + epochs * spec.dataset.dev_size

    def longest_chain_s(self, keys: Iterable[str], tables: Tables, speeds: Calibration) -> float:
        """Time of the longest chain of stage runs that wait for each other."""
        wanted, ends = set(keys), dict[str, float]()
        costs: dict[tuple[int, tuple[bool, ...]], float] = {}
        for key, spec in self.plan.nodes.items():  # in dependency order
            before = max((ends[k] for k in spec.depends_on), default=0.0)
            kind = self._kind(key)
            same = kind.number, tuple(network in tables for network in kind.networks)
            if key in wanted and same not in costs:
                costs[same] = self.stage(spec, tables).seconds(speeds)
            ends[key] = before + (costs[same] if key in wanted else 0.0)
        return max(ends.values(), default=0.0)

    def _threads(self, spec: StageSpec) -> int:
        teachers = [self.plan.nodes[key] for key in spec.teachers]
        return self.machine.threads or step_threads(spec, teachers, self.machine.available)

    def _large(self, spec: StageSpec, precision: Precision) -> Workload:
        size = CHUNK[torch.device(self.machine.device).type]
        macs = network_cost(spec.model, spec.dataset.name).macs
        threads = self.machine.threads or threads_for(macs * size, self.machine.available)
        return Workload(spec.model, spec.dataset.name, size, precision, threads, "forward")


def _places_by_reader(tables: Tables) -> dict[str, set[TableKey]]:
    """For each stage run, the tables that it reads."""
    read: dict[str, set[TableKey]] = {}
    for place, table in tables.items():
        for key in table.users:
            read.setdefault(key, set()).add(place)
    return read


@dataclass(frozen=True)
class Parallel:
    """What the savings beyond sharing and tables bring, as far as it is known.

    Attributes:
        folds: Stage runs that are trained as one network, by key.
        workers: Processes at once.
        worker_speedup: How many times the work of one they do together; None takes their number.
    """

    folds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    workers: int = 1
    worker_speedup: float | None = None

    def shared_out(self, seconds: float, chain_s: float) -> float:
        """Time with all workers: at least the longest chain, at most that of one worker."""
        if self.workers == 1:
            return seconds
        return max(seconds / (self.worker_speedup or self.workers), min(chain_s, seconds))


@dataclass(frozen=True)
class Saving:
    """What a matrix takes with one more saving than the line before.

    Attributes:
        name: Of the saving.
        seconds: Predicted time of the whole matrix.
    """

    name: str
    seconds: float


def savings(
    predictor: Predictor, tables: Tables, speeds: Calibration, parallel: Parallel
) -> list[Saving]:
    """The whole matrix, finished stage runs included, with one saving after the other."""
    plan = predictor.plan
    everything = list(plan.nodes)
    teachers = {key for spec in plan.nodes.values() for key in spec.teachers}
    of_teachers = {place: t for place, t in tables.items() if t.network in teachers}

    def line(name: str, keys: list[str], used: Tables) -> Saving:
        return Saving(name, predictor.bill(keys, used).seconds(speeds))

    lines = [
        line("every cell alone", plan.run_alone(), {}),
        line("+ prefixes shared", everything, {}),
        line("+ teacher tables", everything, of_teachers),
        line("+ reference tables", everything, tables),
    ]
    folded = predictor.bill(everything, tables, folds=parallel.folds).seconds(speeds)
    if parallel.folds:
        lines.append(Saving("+ folded seeds", folded))
    if parallel.workers > 1:
        chain_s = predictor.longest_chain_s(everything, tables, speeds)
        seconds = parallel.shared_out(folded, chain_s)
        lines.append(Saving(f"+ {parallel.workers} workers", seconds))
    return lines


def left_s(
    predictor: Predictor,
    tables: Tables,
    done: Collection[str],
    speeds: Calibration,
    parallel: Parallel,
) -> float:
    """Predicted time of the stage runs that are not ``done``, with every saving."""
    keys = [key for key in predictor.plan.nodes if key not in done]
    seconds = predictor.bill(keys, tables, done, parallel.folds).seconds(speeds)
    return parallel.shared_out(seconds, predictor.longest_chain_s(keys, tables, speeds))
