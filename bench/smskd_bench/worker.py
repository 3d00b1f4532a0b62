"""One stage run: build, resume if begun, train, evaluate, save.

The worker knows the store and the device; what it trains is :mod:`smskd.stages`' affair.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from smskd_export.records import adapter
from torch import nn

from smskd.compiled import compile_networks
from smskd.cost import model_cost
from smskd.data import ResidentBatches
from smskd.errors import ConfigError, DivergedError, IncompatibleError, StoreError
from smskd.evaluate import Evaluation, evaluate
from smskd.folded import Folded
from smskd.meter import Row
from smskd.methods import METHODS, MODIFIERS, Method
from smskd.methods.objective import Part
from smskd.models import build_model, taps_of
from smskd.seeding import derive, seeded
from smskd.stages import BestOnDev, Stage, StageReport, finish, prepare
from smskd.taps import Network
from smskd.train import Alone, Group, Pause, StageRun, train_group
from smskd_bench.environment import code_revision, device_name, machine, package_versions
from smskd_bench.importing import teacher_weights
from smskd_bench.loaded_data import LoadedData, load_split
from smskd_bench.pauses import Pauses
from smskd_bench.shortcuts import shortcuts_of, took_shortcuts
from smskd_bench.spec import DataSpec, MethodSpec, StageSpec
from smskd_bench.stopping import StopRequest
from smskd_bench.store import RETRAIN, SPEC, Place, Record, Store, place_of
from smskd_bench.table_shelf import TableChoice, TableShelf
from smskd_bench.tables import TableKey, TablePlan
from smskd_bench.threads import step_threads


@dataclass(frozen=True)
class RunOptions:
    """What cannot change a result beyond rounding, and so is in no key.

    Attributes:
        device: torch device string.
        data_root: Folder with the data sets that are not embedded.
        download: Whether missing data may be downloaded.
        evaluate_every: Test-set accuracy for the curves every so many epochs; 0 only at the end.
        threads: CPU threads; None leaves the choice to the worker.
        methods: Methods by name, plug-ins included.
        teacher_table: Whether frozen networks are looked up in tables, and how those are stored.
        tables: Networks that are worth a table (:mod:`smskd_bench.tables`).
        compile: Whether networks are compiled.
        exact: Whether what was begun with a shortcut is begun anew instead of gone on with.
    """

    device: str = "cpu"
    data_root: Path | None = None
    download: bool = False
    evaluate_every: int = 0
    threads: int | None = None
    methods: dict[str, type[Method]] = field(default_factory=lambda: dict(METHODS))
    teacher_table: TableChoice = "auto"
    tables: Mapping[TableKey, TablePlan] = field(default_factory=dict)
    compile: bool = False
    exact: bool = False


Progress = Callable[[StageSpec, Row], None]


@dataclass
class Begun:
    """One stage run taken up: built, and at the epoch of its checkpoint."""

    spec: StageSpec
    run: StageRun
    batches: ResidentBatches
    previous: nn.Module | None
    best: BestOnDev | None
    sessions: list[Record]

    @property
    def session(self) -> Record:
        """The record of this time of taking it up."""
        return self.sessions[-1]


class Worker:
    """Carries out stage runs one after another; keeps data and the last teacher in memory."""

    def __init__(self, store: Store, options: RunOptions, stop: StopRequest | None = None) -> None:
        self.store = store
        self.options = options
        self.stop = stop or StopRequest()
        self.available_threads = torch.get_num_threads()
        pin_numerics()
        self.shelf = TableShelf(store.root / "tables", options.tables, options.teacher_table)
        self._data: dict[DataSpec, LoadedData] = {}
        self._teachers: dict[str, Network] = {}
        self._saves_memory = False

    def save_memory(self) -> bool:
        """Give back what can be had again, and need less from now on; False if it does already."""
        if self._saves_memory:
            return False
        self._saves_memory = True
        self._teachers.clear()
        self.shelf.clear()
        self._data = {spec: data.in_small_batches() for spec, data in self._data.items()}
        gc.collect()
        if torch.device(self.options.device).type == "cuda":
            torch.cuda.empty_cache()
        return True

    def run(self, spec: StageSpec, progress: Progress, weights: Path | None = None) -> Record:
        """Carry one stage run to its result, from its checkpoint if it has one.

        Args:
            spec: What to do.
            progress: Called after each epoch.
            weights: File to import, if the specification says so.

        Raises:
            SmskdError: it cannot be done, or diverged; the checkpoint stays.
        """
        if not spec.imported:
            return self.run_together([spec], progress)[0]
        started = time.time()
        data = self.data(spec.dataset)
        self.store.begin(spec)
        model = self._import(spec, data, weights)
        test = evaluate(model, data.test)
        result = self._record(spec, StageReport([], test), test, [], started)
        self.store.complete(spec.key, result, model.state_dict(), test.predictions)
        return result

    def run_together(self, specs: Sequence[StageSpec], progress: Progress) -> list[Record]:
        """Carry stage runs that differ in their seed only to their results, as one network.

        Raises:
            SmskdError: one of them cannot be done, or diverged, or they cannot be folded; the
                checkpoints stay, and each can be gone on with alone.
        """
        started = time.time()
        torch.set_num_threads(self.options.threads or self._threads(specs[0]))
        for spec in specs:
            self.store.begin(spec)
        wanted = {key for spec in specs for key in spec.teachers}
        self._teachers = {key: self._teachers.get(key) or self._teacher(key) for key in wanted}
        place = self._common_place(specs)
        with ExitStack() as stack:
            begun: list[Begun] = []
            for spec in specs:
                begun.append(self._begin(spec, place, len(specs)))
                stack.callback(begun[-1].run.close)
            self._train(begun, progress)
        return [self._finish(b, started) for b in begun]

    def group(self, run: StageRun) -> Group:
        """How one stage run is trained: by this process alone."""
        return Alone(run)

    def pause(self, own: Pause) -> Pause:
        """When it is saved within an epoch."""
        return own

    def _common_place(self, specs: Sequence[StageSpec]) -> Place | None:
        """Where stage runs that are trained together go on; None means each where it is.

        A kill between two checkpoints leaves some one checkpoint behind: then all go back to it,
        for which the checkpoint before the last is kept.

        Raises:
            IncompatibleError: they are further apart, as they were not always trained together.
        """
        if len(specs) == 1:
            return None
        states = [self._usable_checkpoint(spec) for spec in specs]
        places = [place_of(state) if state else (0, 0) for state in states]
        first = min(places)
        if first == (0, 0):
            together = max(places) <= (1, 0)
        else:
            together = all(self._usable_checkpoint(spec, first) for spec in specs)
        if not together:
            epochs = ", ".join(str(epoch) for epoch, _ in places)
            raise IncompatibleError(f"they stand at epochs {epochs}")
        return first

    def _usable_checkpoint(self, spec: StageSpec, place: Place | None = None) -> Record | None:
        state = self.store.checkpoint(spec.key, place)
        if state and self.options.exact and took_shortcuts(state["sessions"]):
            return None
        return state

    def data(self, spec: DataSpec) -> LoadedData:
        """The data set, loaded and split once."""
        if spec not in self._data:
            o = self.options
            data = load_split(spec, o.device, o.data_root, o.download)
            self._data[spec] = data.in_small_batches() if self._saves_memory else data
        return self._data[spec]

    def student(self, spec: StageSpec) -> nn.Module:
        """The trained network of a finished stage run, on the device."""
        model = self._build(spec)
        model.load_state_dict(self.store.weights(spec.key))
        return model

    def deployed(self, spec: StageSpec) -> nn.Module:
        """What was evaluated and is exported: the student, in its method's wrapper if any."""
        student, extra = self.student(spec), self.store.inference_weights(spec.key)
        if extra is None:
            return student
        run = self._prepare(spec, self.data(spec.dataset), self._previous(spec))
        run.close()
        run.objective.load_state_dict(extra)
        return run.objective.inference_model(student).eval()

    def _previous(self, spec: StageSpec) -> nn.Module | None:
        return self.student(self.spec(spec.parent)) if spec.parent else None

    def _threads(self, spec: StageSpec) -> int:
        """CPU threads; a resumed run takes the number it began with."""
        teachers = [self.spec(key) for key in spec.teachers]
        return step_threads(spec, teachers, self.available_threads)

    def _build(self, spec: StageSpec) -> nn.Module:
        with seeded(spec.seed):
            return self._new(spec)

    def _new(self, spec: StageSpec) -> nn.Module:
        """An untrained network, its weights drawn from where torch's generator stands."""
        info = self.data(spec.dataset).dataset.info
        model = build_model(spec.model, info.num_classes, info.channels, info.size)
        return to_device(model, self.options.device)

    def _teacher(self, key: str) -> Network:
        if key not in self._teachers:
            spec = self.spec(key)
            self._teachers[key] = Network(self.student(spec), taps_of(spec.model))
        return self._teachers[key]

    def spec(self, key: str) -> StageSpec:
        """Read a specification back from the store.

        Raises:
            StoreError: it is missing, or not the one that was written.
        """
        document = self.store.spec_document(key)
        try:
            spec = StageSpec.from_document(document)
        except ValueError:
            spec = None
        if spec is None or spec.key != key:
            path = self.store.folder(key) / SPEC
            raise StoreError(f"{path} is damaged: it is not what its key stands for", RETRAIN)
        return spec

    def _begin(self, spec: StageSpec, place: Place | None = None, sharing: int = 1) -> Begun:
        """Build a stage run and bring it to where it stopped, or to an earlier ``place``."""
        data, previous = self.data(spec.dataset), self._previous(spec)
        run = self._prepare(spec, data, previous)
        best = BestOnDev(data.dev) if data.dev else None
        torch.manual_seed(derive(spec.seed, "train", spec.number))
        sessions = self._resume(spec, run, best, place, sharing)
        batches = data.batches.of_seed(spec.seed, spec.training.batch_size)
        before = sessions[-1] if sessions else {}
        sources = self.shelf.serve(spec, run, batches, before)
        session = {
            "device": device_name(self.options.device),
            "threads": torch.get_num_threads(),
            "from_epoch": run.epoch,
            "from_step": run.steps,
            "wall_seconds": 0.0,
            "folded": 1,
            "compiled": self.options.compile or bool(before.get("compiled")),
            **sources,
        }
        return Begun(spec, run, batches, previous, best, [*sessions, session])

    def _train(self, begun: Sequence[Begun], progress: Progress) -> None:
        runs = [b.run for b in begun]
        of_run = {id(b.run): b for b in begun}
        started = time.perf_counter()

        def save(run: StageRun) -> None:
            mine = of_run[id(run)]
            mine.session["wall_seconds"] = (time.perf_counter() - started) / len(runs)
            self.store.save_checkpoint(mine.spec.key, _checkpoint(run, mine.best, mine.sessions))

        def is_lost() -> bool:
            return any(self.store.is_lost(b.spec.key) for b in begun)

        pauses = Pauses(self.stop, save, is_lost)

        def after_epoch(run: StageRun) -> None:
            mine = of_run[id(run)]
            if mine.best:
                mine.best.observe(run)
            if self._wants_test(run):
                test = self.data(mine.spec.dataset).test
                run.history[-1]["test_top1"] = evaluate(run.deployed(), test).top1
            pauses.check_ours()
            save(run)
            pauses.saved()
            progress(mine.spec, run.history[-1])

        if runs[0].epoch == runs[0].training.epochs:
            return
        with self.stop.listening():
            self._train_group(begun, after_epoch, pauses)
        self.stop.check()

    def _train_group(
        self, begun: Sequence[Begun], after_epoch: Callable[[StageRun], None], pauses: Pauses
    ) -> None:
        runs = [b.run for b in begun]
        if len(runs) == 1:
            if begun[0].session["compiled"]:
                compile_networks(runs[0])
            train_group(self.group(runs[0]), [begun[0].batches], after_epoch, self.pause(pauses))
            return
        image = self.data(begun[0].spec.dataset).one_image()
        with closing(Folded(runs, image)) as group:
            for b in begun:
                b.session.update(folded=len(runs), compiled=False)
            train_group(group, [b.batches for b in begun], after_epoch, pauses)

    def _finish(self, begun: Begun, started: float) -> Record:
        spec, run = begun.spec, begun.run
        if begun.best and spec.training.carry == "best_on_dev":
            begun.best.restore(run)
        data = self.data(spec.dataset)
        _, report = finish(run, data.test, begun.previous)
        test = report.test or evaluate(run.deployed(), data.test)
        if not math.isfinite(test.loss):
            raise DivergedError(
                "the student's outputs on the test set are not finite", "lower the learning rate"
            )
        result = self._record(spec, report, test, begun.sessions, started)
        student, deployed = run.student.model, run.deployed()
        extra = None if deployed is student else run.objective.state_dict()
        if extra is not None:  # more than the student: say what it costs
            _, channels, height, width = data.one_image().shape
            result["deployed"] = asdict(model_cost(deployed, (channels, height, width)))
        self.store.complete(spec.key, result, student.state_dict(), test.predictions, extra)
        self.shelf.retire(self._is_over)
        return result

    def _is_over(self, key: str) -> bool:
        """Whether a stage run will read no table any more, for all that is known now."""
        return self.store.is_done(key) or self.store.failure(key) is not None

    def _wants_test(self, run: StageRun) -> bool:
        every = self.options.evaluate_every
        return every > 0 and run.epoch % every == 0 and run.epoch < run.training.epochs

    def _prepare(self, spec: StageSpec, data: LoadedData, previous: nn.Module | None) -> StageRun:
        model = self._build(spec)
        if previous is not None and spec.training.init == "warm":
            model.load_state_dict(previous.state_dict())
        return prepare(
            Network(model, taps_of(spec.model)),
            [self._teacher(key) for key in spec.teachers],
            stage_of(spec, self.options.methods),
            spec.training,
            data.one_image(),
            previous=previous,
            number=spec.number,
            first_epoch=spec.first_epoch,
            seed=spec.seed,
            num_train=len(data.train_labels),
            train_labels=data.train_labels,
            new_student=partial(self._new, spec),
        )

    def _resume(
        self,
        spec: StageSpec,
        run: StageRun,
        best: BestOnDev | None,
        place: Place | None,
        sharing: int,
    ) -> list[Record]:
        """Load the checkpoint into the run; returns the sessions so far."""
        state = self._usable_checkpoint(spec, place) if place != (0, 0) else None
        if state is None:
            if place and place != (0, 0):
                raise IncompatibleError(f"there is no checkpoint of epoch {place[0]} to go on from")
            return []
        self.store.go_back(spec.key, place_of(state))
        run.load_state(state, sharing)
        if best and state["best"]:
            best.top1, best.epoch, best.weights = state["best"]
        sessions: list[Record] = state["sessions"]
        if not self.options.threads:  # other threads would add up in another order
            torch.set_num_threads(sessions[-1]["threads"])
        return sessions

    def _import(self, spec: StageSpec, data: LoadedData, file: Path | None) -> nn.Module:
        if file is None:
            raise ConfigError(f"the weights of {spec.model} are not at hand", "name their file")
        model = self._build(spec)
        model.load_state_dict(teacher_weights(file, spec.model, data.dataset.info))
        return model

    def _record(
        self,
        spec: StageSpec,
        report: StageReport,
        test: Evaluation,
        sessions: list[Record],
        started: float,
    ) -> Record:
        history = report.history
        return {
            "key": spec.key,
            "spec": spec.document(),
            "test": {"top1": test.top1, "top5": test.top5, "loss": test.loss},
            "kept": asdict(report.kept) if report.kept else None,
            "history": history,
            "last": history[-1] if history else {},
            "train_seconds": sum(row["seconds"] for row in history),
            "images_per_s": _speed(history),
            "wall_seconds": sum(session["wall_seconds"] for session in sessions),
            "wall_seconds_last_session": time.time() - started,
            "finished": time.time(),
            "sessions": sessions,
            "fast_paths": shortcuts_of(sessions),
            "environment": {
                "code": code_revision(),
                "packages": package_versions(),
                "machine": machine(),
                "device": device_name(self.options.device),
                "threads": torch.get_num_threads(),
            },
            "data": {"name": spec.dataset.name, "fingerprint": spec.dataset.fingerprint},
        }


def pin_numerics() -> None:
    """Make a GPU compute fp32 as fp32, and the same way each time; no effect on a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def to_device(model: nn.Module, device: str) -> nn.Module:
    """Move a network, its convolutions in the channels-last order that is fastest everywhere."""
    moved: nn.Module = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def stage_of(spec: StageSpec, methods: dict[str, type[Method]]) -> Stage:
    """The library's stage that a specification describes."""
    return Stage(
        method=[_part(method, methods) for method in spec.methods],
        epochs=spec.training.epochs,
        reference=spec.reference,
        schedule=spec.training.schedule,
        method_weight=spec.method_weight,
        ce_weight=spec.ce_weight,
        init=spec.training.init,
        carry=spec.training.carry,
    )


def _part(spec: MethodSpec, methods: dict[str, type[Method]]) -> Part:
    method = adapter(methods[spec.name]).validate_python(spec.settings)
    modifiers = tuple(
        adapter(MODIFIERS[m.name]).validate_python(m.settings) for m in spec.modifiers
    )
    return Part(method, modifiers)


def _checkpoint(run: StageRun, best: BestOnDev | None, sessions: list[Record]) -> Record:
    kept = (best.top1, best.epoch, best.weights) if best else None
    return {**run.state(), "best": kept, "sessions": sessions}


def _speed(history: list[Row]) -> float:
    """Training images a second over the stage, from the time inside epochs."""
    seconds = sum(row["seconds"] for row in history)
    images = sum(row["seconds"] * row["images_per_s"] for row in history)
    return images / seconds if seconds else 0.0
