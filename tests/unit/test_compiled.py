"""Compiled networks: the same training but for rounding, and one compilation for all seeds."""

from contextlib import closing

import pytest
import torch
from tiny import TAPS, tiny_data, tiny_net, trained_teacher

from smskd.compiled import compile_networks
from smskd.data import ResidentBatches
from smskd.methods.fitnet import FitNet
from smskd.methods.kd import KD
from smskd.settings import Optimizer, Reference, Training
from smskd.stages import Stage, prepare
from smskd.taps import Network
from smskd.train import train

pytestmark = pytest.mark.slow  # compiling takes half a minute
TEACHER = trained_teacher()


def run_of(seed, method, previous):
    training = Training(2, batch_size=64, optimizer=Optimizer(lr=1e-3))
    return prepare(
        Network(tiny_net(seed), TAPS), [Network(TEACHER, TAPS)], Stage(method, 2, Reference()),
        training, tiny_data(1)[0], previous=previous, number=2, seed=seed,
    )  # fmt: skip


def no(run):
    pass


def trained(seed, method, data, prepare):
    run = run_of(seed, method, tiny_net(9))
    prepare(run)
    with closing(run):  # hooks that stay would be compiled anew
        train(run, data, lambda run: None)
    return run


@pytest.mark.parametrize(
    "method", [KD(), [KD(), FitNet(weight=1.0, hint_layer=1)]], ids=["kd", "joint"]
)
def test_compiled_training_equals_eager(method):
    from torch._dynamo.utils import counters

    graphs = []
    for seed in (0, 1):
        data = ResidentBatches(*tiny_data(148), batch_size=64, seed=seed)
        eager, compiled = (
            trained(seed, method, data, prepare) for prepare in (no, compile_networks)
        )
        ours, theirs = compiled.student.model.state_dict(), eager.student.model.state_dict()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]  # nothing was compiled again for the second seed
    assert not counters["graph_break"]
