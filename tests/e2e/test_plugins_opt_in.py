"""A package that offers a method is imported where a matrix names it, and nowhere else."""

import os

import pytest
from command import PATHS, Bench, tiny

MODULE = """
import pathlib
from dataclasses import dataclass
from typing import ClassVar

pathlib.Path({made!r}).touch()
from smskd.methods.kd import KD


@dataclass(frozen=True)
class Uninvited(KD):
    name: ClassVar[str] = "uninvited"
"""


@pytest.fixture
def installed(tmp_path):
    """A distribution as pip leaves it, and the environment that has it."""
    site, made = tmp_path / "site", tmp_path / "made"
    info = site / "uninvited-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: uninvited\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[smskd.methods]\nuninvited = uninvited:Uninvited\n")
    (site / "uninvited.py").write_text(MODULE.format(made=str(made)))
    return {"PYTHONPATH": os.pathsep.join([*PATHS, str(site)])}, made


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path / "bench")
    yield made
    made.close()


@pytest.mark.slow
def test_plugins_are_imported_only_where_a_matrix_names_them(bench, installed):
    env, made = installed
    store = bench.folder / "store"
    plain = bench.matrix(tiny(["scratch"]), "plain")
    bench.run(plain, store, **env)
    for words in (
        ("list", "methods"), ("status", "--store", store), ("leaderboard", "--matrix", plain, "--store", store),
    ):  # fmt: skip
        bench(*words, **env)
    unnamed = bench.matrix(tiny(["uninvited"]), "unnamed")
    assert "unknown method 'uninvited'" in bench.run(unnamed, store, expect=2, **env).err
    misspelt = bench.matrix(tiny(["kd"], plugins=["uninvite"]), "misspelt")
    assert "did you mean 'uninvited'" in bench.run(misspelt, store, expect=2, **env).err
    assert not made.exists()
    named = bench.matrix(tiny(["uninvited"], plugins=["uninvited"]), "named")
    bench.run(named, store, **env)
    assert made.exists()
