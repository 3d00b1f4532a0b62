"""Several gloo processes train one stage as one process does, to rounding."""

import pytest
import sharded_steps
import torch
from cases import daily
from sharded_steps import trained
from tiny import TAPS, tiny_data, tiny_net

from smskd.methods import METHODS
from smskd.ranks import Ranks
from smskd.settings import Training
from smskd.sharded import why_not_sharded
from smskd.stages import Network, Stage, prepare

JOBS = [
    ("scratch", False),
    ("kd", False),
    ("kd", True),  # a second stage, held by a reference
    ("fitnet", False),  # has a module of its own
    ("sp", False),  # relates the samples of a batch to each other
    ("dist", False),
]


@pytest.fixture(scope="module", params=daily([2, 3]))
def several(request, tmp_path_factory):
    """What each process came to, for every job."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(
        sharded_steps.process, (request.param, str(folder), JOBS), nprocs=request.param
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job[0]}-{job[1]}")
def test_as_one_process_to_rounding(several, job):
    alone, rows = trained(*job)
    for found in several:
        state, history = found[job]
        assert state.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-11, msg=name)
        for ours, theirs in zip(history, rows, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job[0]}-{job[1]}")
def test_all_processes_have_the_same_bits(several, job):
    first, rows = several[0][job]
    for found in several[1:]:
        state, history = found[job]
        assert all(torch.equal(state[name], first[name]) for name in first)
        assert history == rows


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_parts_make_up_a_batch(count):
    whole = list(range(count))
    parts = [whole[Ranks(rank, 3).part(count)] for rank in range(3)]
    assert [sample for part in parts for sample in part] == whole
    assert [len(part) for part in parts] == Ranks(0, 3).shares(count)


def why_not(method, **sizes):
    images, labels = tiny_data(8)
    student, teacher = Network(tiny_net(**sizes), TAPS), Network(tiny_net(1), TAPS)
    run = prepare(
        student, [teacher], Stage(METHODS[method](), 1), Training(1), images[:1], num_train=8,
        train_labels=labels,
    )  # fmt: skip
    run.close()
    return why_not_sharded(run)


def test_what_cannot_be_divided():
    assert why_not("kd") is None
    assert "dropout" in why_not("kd", dropout=0.5)
    assert "random numbers" in why_not("crd")
