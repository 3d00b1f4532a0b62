"""One finished store that the tests share; those that change it work on a copy."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import Bench, Done, tiny

ROWS = (
    ["scratch"],
    {"stages": ["kd"], "controls": ["scratch"]},
    {"stages": ["fitnet", "kd"], "controls": ["kd", "fitnet+kd"]},
    {"stages": [["fitnet", "kd"]], "epochs": 5},
    {"stages": ["kd", "fitnet"], "name": "swapped"},
    {"stages": ["fitnet", "kd", "dkd"], "name": "three"},
)


@dataclass(frozen=True)
class Finished:
    """A matrix that was run, and its store."""

    matrix: Path
    store: Path
    done: Done


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Read only."""
    folder = tmp_path_factory.mktemp("finished")
    bench = Bench(folder)
    matrix = bench.matrix(tiny(*ROWS))
    return Finished(matrix, folder / "store", bench.run(matrix, folder / "store"))


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished store."""
    return Path(shutil.copytree(finished.store, tmp_path / "copied"))
