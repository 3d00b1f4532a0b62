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
    """Every kind of row, each stage run of a tenth of a second. Read only."""
    bench = Bench(tmp_path_factory.mktemp("finished"))
    matrix, store = bench.matrix(tiny(*ROWS)), bench.folder / "store"
    done = bench.run(matrix, store, "--tracking", "wandb", WANDB_MODE="disabled")
    return Finished(matrix, store, done)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """About two seconds of training in 19 epochs, long enough to be killed. Read only."""
    document = tiny(["fitnet", "kd"], evaluate_every=1, teacher={"epochs": 6})
    document["dataset"] |= {"train_size": 850, "dev_size": 100}
    document["recipe"] |= {"epochs": [5, 8], "carry": "best_on_dev"}
    bench = Bench(tmp_path_factory.mktemp("undisturbed"))
    matrix, store = bench.matrix(document), bench.folder / "store"
    return Finished(matrix, store, bench.run(matrix, store))


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished store."""
    return Path(shutil.copytree(finished.store, tmp_path / "copied"))
