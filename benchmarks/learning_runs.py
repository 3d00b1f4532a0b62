"""The teacher and the students of the learning benchmark: trained once, kept, read again."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from smskd_bench.environment import code_revision
from smskd_bench.store import load_weights, save_weights
from smskd_bench.worker import to_device
from torch import nn

from benchmarks.expected_sheets import COMPILED
from benchmarks.learning_modes import ALL_SEEDS_AT_ONCE, Lesson, teach
from benchmarks.learning_setting import Images, Setting, images_of, state_sha256
from benchmarks.pair import Pair
from smskd.atomic import write_json
from smskd.errors import DataError, RefusedError, RunError
from smskd.evaluate import evaluate
from smskd.methods import METHODS
from smskd.precision import why_not
from smskd.settings import Precision
from smskd.stages import Stage, distill

Learnt = dict[str, Any]
"""Of one way and seed: top1, seconds, hashes of the initial and the trained weights, revision."""

TEACHER = "teacher"
TEACHER_SEED = 0
PRECISIONS: dict[str, Precision] = {"ours bf16 live": "bf16", "ours tf32 live": "tf32"}


@dataclass(frozen=True)
class Task:
    """Training by one way; several seeds if the way folds them."""

    way: str
    seeds: tuple[int, ...]


class School:
    """Trains what is asked for and not there yet.

    Args:
        setting: The same for all.
        work: Folder of teacher, tables and results; what it holds of another setting is kept apart.
        jobs: Tasks at once.
        say: Told what is going on.
    """

    def __init__(self, setting: Setting, work: Path, jobs: int, say: Callable[[str], None]) -> None:
        self.setting, self.jobs, self.say = setting, jobs, say
        self.folder = work / setting.identity[:16]
        self.images = _images(setting).train.source
        self.teacher = trained_teacher(setting, self.folder, jobs * setting.threads)
        say(f"teacher: {self.teacher['top1']:.2f} %")

    def missing(self, device: str, compiled: bool) -> dict[str, str]:
        """Ways that cannot or should not be trained, and why."""
        place = torch.device(device)
        found = {way: why_not(precision, place) for way, precision in PRECISIONS.items()}
        if not compiled:
            found[COMPILED] = "--compile was not given"
        return {way: reason for way, reason in found.items() if reason is not None}

    def learn(self, ways: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[int, Learnt]]:
        """What every way and seed has learnt; what is not there is trained and written at once.

        Raises:
            RefusedError: the ways did not begin with the same weights at equal seed.
            SmskdError: a training went wrong; what is done is kept.
        """
        able = [w for w in ways if w not in self.missing(self.setting.device, True)]
        tasks = [task for way in able for task in _tasks(way, tuple(seeds))]
        left = [task for task in tasks if not self._is_done(task)]
        self._train(sorted(left, key=lambda task: -len(task.seeds)))  # the longest first
        learnt: dict[str, dict[int, Learnt]] = {}
        for task in tasks:
            learnt.setdefault(task.way, {}).update(
                {seed: self._read(task, seed) for seed in task.seeds}
            )
        check_same_start(learnt)
        return learnt

    def _train(self, tasks: Sequence[Task]) -> None:
        if self.jobs == 1:
            for task in tasks:
                self.say(train_task(self.setting, self.folder, task, self.jobs))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.jobs, context) as pool:
            begun = [
                pool.submit(train_task, self.setting, self.folder, task, self.jobs)
                for task in tasks
            ]
            try:
                for ended in as_completed(begun):
                    self.say(ended.result())
            except BrokenProcessPool:
                raise RunError(
                    "a training process died", "run the command again; what is done is kept"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

    def _is_done(self, task: Task) -> bool:
        return all(_file(self.folder, task, seed).exists() for seed in task.seeds)

    def _read(self, task: Task, seed: int) -> Learnt:
        path = _file(self.folder, task, seed)
        try:
            learnt: Learnt = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}", "delete it and run again") from None
        return learnt


def trained_teacher(setting: Setting, folder: Path, threads: int) -> dict[str, Any]:
    """Train the teacher with the recipe, unless it is there; its test ``top1`` and ``sha256``."""
    record = folder / f"{TEACHER}.json"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(threads)
        model = setting.build(Pair.parse(setting.pair).teacher, TEACHER_SEED)
        images = _images(setting)
        (report,) = distill(
            to_device(model, setting.device),
            None,
            [Stage(METHODS["scratch"](), epochs=setting.teacher_epochs)],
            images.resident(setting, TEACHER_SEED),
            test=images.test.to(torch.device(setting.device)),
            seed=TEACHER_SEED,
        )
        assert report.test is not None
        sha256 = save_weights(folder / f"{TEACHER}.safetensors", model.state_dict(), {})
        write_json(record, {"top1": report.test.top1, "sha256": sha256})
    teacher: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return teacher


def train_task(setting: Setting, folder: Path, task: Task, jobs: int) -> str:
    """Train, evaluate and write the results of one task; returns a line about it."""
    torch.set_num_threads(setting.threads)
    images = _images(setting)
    students = [setting.student(seed) for seed in task.seeds]
    initial = [state_sha256(student) for student in students]
    lesson = Lesson(
        setting, images, _teacher(setting, folder), students, task.seeds, folder / "tables"
    )
    started = time.perf_counter()
    teach(task.way, lesson)
    seconds = time.perf_counter() - started
    test = images.test.to(torch.device(setting.device))
    top1 = [evaluate(student, test).top1 for student in students]
    trained = [state_sha256(student) for student in students]
    for seed, accuracy, start, end in zip(task.seeds, top1, initial, trained, strict=True):
        learnt: Learnt = {
            "top1": accuracy,
            "initial": start,
            "trained": end,
            "seconds": seconds / len(task.seeds),
            "seconds_compare": jobs == 1,
            "seeds_at_once": list(task.seeds) if task.way in ALL_SEEDS_AT_ONCE else [seed],
            "code": code_revision(),
        }
        path = _file(folder, task, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, learnt)
    said = ", ".join(f"{accuracy:.2f}" for accuracy in top1)
    return f"{task.way}, seed {', '.join(map(str, task.seeds))}: {said} % in {seconds:.0f} s"


def check_same_start(learnt: dict[str, dict[int, Learnt]]) -> None:
    """Refuse to compare ways that did not begin alike.

    Raises:
        RefusedError: with the seed.
    """
    starts: dict[int, set[str]] = {}
    for by_seed in learnt.values():
        for seed, result in by_seed.items():
            starts.setdefault(seed, set()).add(result["initial"])
    if different := [seed for seed, found in starts.items() if len(found) > 1]:
        raise RefusedError(
            f"students of seed {different[0]} did not begin with the same weights",
            "use a new --work folder",
        )


def _tasks(way: str, seeds: tuple[int, ...]) -> list[Task]:
    if way in ALL_SEEDS_AT_ONCE:
        return [Task(way, seeds)]
    return [Task(way, (seed,)) for seed in seeds]


def _file(folder: Path, task: Task, seed: int) -> Path:
    """Of folded seeds the company is part of what was done, as rounding may depend on it."""
    name = task.way.replace(",", "").replace(" ", "_")
    company = f"of_{'_'.join(map(str, task.seeds))}-" if task.way in ALL_SEEDS_AT_ONCE else ""
    return folder / "learnt" / f"{name}-{company}s{seed}.json"


def _teacher(setting: Setting, folder: Path) -> nn.Module:
    model = setting.build(Pair.parse(setting.pair).teacher, TEACHER_SEED)
    model.load_state_dict(load_weights(folder / f"{TEACHER}.safetensors"))
    return model.eval()


@lru_cache(maxsize=1)
def _images(setting: Setting) -> Images:
    return images_of(setting)
