"""Stores that are filled by hand: real files, no training."""

import torch
from smskd_bench.store import Store


def fill(store, plan, key, top1, **more):
    """A finished stage run with a test accuracy, in percent."""
    store.begin(plan.nodes[key])
    record = {"key": key, "test": {"top1": top1, "top5": 99.0, "loss": 1.0}, "kept": None, **more}
    store.complete(key, record, {"w": torch.zeros(1)}, torch.zeros(3))


def filled(folder, plan, scores, **more):
    """A store with the last stage of cells: accuracies by row, in the order of the seeds.

    ``scores`` may also be keyed by pair and row.
    """
    store = Store.open(folder)
    seeds = list(plan.matrix.seeds)
    for cell in plan.cells:
        numbers = scores.get((cell.pair, cell.row), scores.get(cell.row, []))
        place = seeds.index(cell.seed)
        if place < len(numbers):
            fill(store, plan, cell.stages[-1], numbers[place], **more)
    return store
