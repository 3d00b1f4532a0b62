"""A GPU that fails under a process: the rest of the matrix goes on in another one.

CUDA answers every later call of a process with the error of the first; so does this method.
"""

import os

import pytest
from cases import daily
from command import litter, outputs, results, tiny
from plugin_site import install

PLUGIN = """
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from smskd.methods import Method, Needs

BROKEN = []


@dataclass(frozen=True)
class Shattered(Method):
    "Breaks the device of the first process that comes to its second epoch, and the always ones'."
    name: ClassVar[str] = "shattered"
    kind: ClassVar[str] = "response"
    needs: ClassVar[Needs] = Needs()
    always: bool = False

    def distill(self, signals, modules):
        first = Path(os.environ["FIRST"])
        if signals.epoch == 2 and (self.always or not first.exists()):
            first.touch()
            BROKEN.append(True)
        if BROKEN:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return {"kd": 0.5 * (signals.student.logits - signals.teacher.logits).square().mean()}
"""


@pytest.fixture
def site(tmp_path):
    return install(tmp_path / "site", "smskd_shattered", PLUGIN, {"shattered": "Shattered"})


@pytest.mark.parametrize("workers", daily([1, 2]))
def test_a_broken_device_costs_no_stage_run(bench, site, tmp_path, workers):
    document = tiny(["shattered", "kd"], ["kd"], plugins=["shattered"])
    matrix, path = bench.matrix(document), [bench.environment()["PYTHONPATH"], str(site)]
    env = {"PYTHONPATH": os.pathsep.join(path), "FIRST": str(tmp_path / "first")}
    store, whole = tmp_path / "store", tmp_path / "whole"
    words = ("--workers", workers, "--threads", 1)
    done = bench.run(matrix, store, *words, **env)
    assert "the device failed: CUDA error: an illegal memory access was encountered" in done.out
    bench.run(matrix, whole, *words, **env)  # FIRST is there: it is broken no more
    assert outputs(store) == outputs(whole)
    broken = next(r for name, r in results(store).items() if "/shattered/" in name)
    assert [session["from_epoch"] for session in broken["sessions"]] == [0, 1]
    assert litter(store) == []


@pytest.mark.slow
def test_what_breaks_it_each_time_fails_alone(bench, site, tmp_path):
    variant = {"hopeless": {"method": "shattered", "settings": {"always": True}}}
    document = tiny(["hopeless"], ["kd"], plugins=["shattered"], methods=variant)
    path = os.pathsep.join([bench.environment()["PYTHONPATH"], str(site)])
    env = {"PYTHONPATH": path, "FIRST": str(tmp_path / "first")}
    store = tmp_path / "store"
    done = bench.run(bench.matrix(document), store, expect=4, **env)
    assert "2 stage runs trained, 0 already there, 1 failed" in done.out
    assert "failed: the device failed: CUDA error" in done.out
    assert litter(store) == []
