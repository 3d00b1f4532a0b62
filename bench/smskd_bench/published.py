"""Accuracies that papers report, as data: ``leaderboards/published/cifar100.csv``.

The file belongs to the repository, not to the package. Its README names the sources and says what
the labels of the protocols mean.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from smskd.errors import MissingDataError

STANDARD = "crd-240"
"""Label of the recipe that most of them, and our CIFAR-100 boards, use."""

_FILE = Path("leaderboards/published/cifar100.csv")
_SOURCES = Path("leaderboards/published/sources.csv")


@dataclass(frozen=True)
class Published:
    """One number of one table.

    Attributes:
        pair: ``teacher>student``, in our names of models.
        method: Its usual name in papers.
        top1: Test accuracy in percent.
        std: Over runs, in percent points; None where the source gives none.
        source: Whose table.
        protocol: Label of how it was trained; numbers of different labels do not compare.
        ours: Our row or method for it; empty if there is none.
    """

    pair: str
    method: str
    top1: float
    std: float | None
    source: str
    protocol: str
    ours: str


@dataclass(frozen=True)
class Source:
    """Where numbers come from.

    Attributes:
        name: As in :attr:`Published.source`.
        place: Repository or paper.
        epoch: Whose test accuracy it reports: ``last``, ``best`` of all on the test set, or
            ``not said``.
    """

    name: str
    place: str
    epoch: str


@cache
def load_sources() -> dict[str, Source]:
    """Sources by name.

    Raises:
        MissingDataError: the program is installed without the repository.
    """
    with repository_file(_SOURCES).open(encoding="utf-8", newline="") as stream:
        rows = [Source(row["source"], row["from"], row["epoch"]) for row in csv.DictReader(stream)]
    return {source.name: source for source in rows}


@cache
def load_published() -> tuple[Published, ...]:
    """All published numbers, in the order of the file.

    Raises:
        MissingDataError: the program is installed without the repository.
    """
    with _file().open(encoding="utf-8", newline="") as stream:
        return tuple(_read(row) for row in csv.DictReader(stream))


def numbers(pair: str, protocol: str = STANDARD) -> tuple[Published, ...]:
    """The numbers of one pair under one protocol; several sources may give the same method."""
    return tuple(n for n in load_published() if (n.pair, n.protocol) == (pair, protocol))


def _read(row: dict[str, str]) -> Published:
    top1, std = float(row["top1"]), float(row["std"]) if row["std"] else None
    return Published(
        row["pair"], row["method"], top1, std, row["source"], row["protocol"], row["ours"]
    )


def _file() -> Path:
    return repository_file(_FILE)


def repository_file(file: Path) -> Path:
    """A file of the checkout this module is part of, else of the current folder.

    Raises:
        MissingDataError: the program is installed without the repository.
    """
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (folder / file).is_file():
            return folder / file
    raise MissingDataError(
        f"the published numbers and claims are not there: {file} is part of the repository, not "
        "of the installed package",
        "run this from a checkout of the repository",
    )
