"""Trains one tiny stage in several processes and hands the outcome of each back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny import TAPS, tiny_data, tiny_net, trained_teacher

from smskd.data import ResidentBatches
from smskd.methods import METHODS
from smskd.ranks import Ranks
from smskd.settings import Reference, Training
from smskd.sharded import Sharded
from smskd.stages import Network, Stage, prepare
from smskd.train import Alone, train_group

EPOCHS, BATCH = 2, 20  # of 48 samples: batches of 20, 20 and 8; 3 processes divide none of them


def wide(model):
    return model.double()


def trained(method, second=False, ranks=None):
    """State and history after a stage, all in float64; with ``second`` a reference holds it."""
    images, labels = tiny_data(48)
    batches = ResidentBatches(images.double(), labels, batch_size=BATCH)
    settings = {"hint_layer": 1} if method == "fitnet" else {}
    stage = Stage(METHODS[method](**settings), EPOCHS, Reference() if second else None)
    previous = wide(tiny_net(3)) if second else None
    run = prepare(
        Network(wide(tiny_net()), TAPS), [Network(wide(trained_teacher(epochs=5)), TAPS)], stage,
        Training(EPOCHS, batch_size=BATCH), images[:1].double(), previous=previous,
        num_train=48, train_labels=labels,
    )  # fmt: skip
    run.objective.double()
    for entry in run.optimizer.state.values():  # made before that
        entry["momentum_buffer"] = entry["momentum_buffer"].double()
    group = Alone(run) if ranks is None else Sharded(run, ranks)
    train_group(group, [batches], lambda run: None)
    state = {**run.student.model.state_dict(), **run.objective.state_dict(prefix="objective.")}
    timed = ("seconds", "images_per_s")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in run.history]
    run.close()
    return {name: value.clone() for name, value in state.items()}, rows


def process(rank, size, folder, jobs):
    """One of the processes: carry out all jobs, and leave what came of them in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found = {job: trained(*job, ranks=Ranks.here()) for job in jobs}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
