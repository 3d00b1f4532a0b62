"""Sites of filled stores: real pages, no training."""

import io
import math

import torch
import yaml
from rich.console import Console
from smskd_bench.config import load_matrix
from smskd_bench.plan import make_plan
from smskd_bench.site.command import SiteRequest, build
from smskd_bench.store import Store

ENVIRONMENT = {
    "code": {"revision": "0" * 40, "dirty": False},
    "packages": {"torch": "2.13.0", "timm": None},
    "device": "A processor",
    "threads": 1,
}

DOCUMENT = {
    "schema": 1,
    "name": "made",
    "description": "A board that was filled by hand",
    "dataset": {"name": "digits"},
    "pairs": [
        {"teacher": "resnet14", "student": "resnet8_quarter"},
        {"teacher": "resnet14", "student": "resnet8_half"},
    ],
    "seeds": [0, 1, 2],
    "recipe": {"epochs": [12, 6]},
    "teacher": {"epochs": 4},
    "reference": {"weight": 1.0, "weighting": {"map": "one_minus_tcp"}},
    "rows": [
        {"name": "student", "stages": ["scratch"]},
        {"stages": ["kd"]},
        {"stages": ["fitnet", "kd"], "controls": ["fitnet>kd no-ref", "kd>kd no-ref"]},
        {"stages": ["kd", "fitnet"], "controls": ["kd>kd no-ref"]},
        {"name": "kd>kd no-ref", "stages": ["kd", "kd"], "reference": None},
        {
            "name": "fitnet>kd no-ref",
            "stages": ["fitnet", "kd"],
            "reference": None,
            "controls": ["kd>kd no-ref"],
        },
        {
            "name": "fitnet>kd constant",
            "stages": ["fitnet", "kd"],
            "reference": {"weighting": {"map": "constant"}},
            "controls": ["fitnet>kd no-ref"],
        },
    ],
}
"""Two pairs, seven rows: plain, single, staged, with and without reference, one ablation."""

SCORES = {"scratch": 88.0, "kd": 91.0, "fitnet": 90.0}


def write_matrix(folder, document):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def history(spec, top1):
    """An entry an epoch, with every kind of number that a page draws."""
    names = [method.name for method in spec.methods]
    rows = []
    for epoch in range(1, spec.training.epochs + 1):
        far = math.exp(-epoch / 4)
        row = {"epoch": epoch, "lr": 0.05, "loss": 2 * far + 0.1, "train_top1": top1 - 40 * far}
        row |= {f"loss/{name}": far + 0.05 for name in names}
        row |= {"tcp/mean": 0.9, "tcp/q0.05": 0.4, "tcp/q0.25": 0.8}
        row |= {"tcp/q0.75": 0.95, "tcp/q0.95": 0.99}
        if spec.reference:
            row["reference/mean_weight"] = 0.1 + 0.1 * far
        if epoch % 4 == 0:
            row["test_top1"] = top1 - 10 * far
        rows.append(row)
    return rows


def top1_of(spec, number):
    """Accuracies that differ between rows, and a little between seeds."""
    mean = sum(SCORES[m.name] for m in spec.methods) / len(spec.methods)
    staged = 1.5 * (spec.number - 1) + (0.8 if spec.reference else 0.0)
    return mean + staged + 0.1 * spec.seed + 0.001 * (number % 7)


def fill(store, plan, keys=None, **more):
    """Results for stage runs, all of them unless named."""
    for number, (key, spec) in enumerate(plan.nodes.items()):
        if keys is not None and key not in keys:
            continue
        top1 = top1_of(spec, number)
        kept = {"same": 95.0, "kept": 97.0, "gained": 40.0} if spec.parent else None
        record = {
            "key": key,
            "test": {"top1": top1, "top5": 99.0, "loss": 0.5},
            "kept": kept,
            "history": history(spec, top1),
            "train_seconds": 60.0,
            "fast_paths": {"teacher": "live", "folded": 1},
            "environment": ENVIRONMENT,
            **more,
        }
        store.begin(spec)
        store.complete(key, record, {"w": torch.zeros(1)}, torch.zeros(3))


def made_store(folder, document=DOCUMENT, leave_out=()):
    """Matrix file, plan, and a store that holds all but the rows to leave out."""
    matrix = write_matrix(folder, document)
    plan = make_plan(load_matrix(matrix))
    store = Store.open(folder / "store")
    wanted = {key for cell in plan.cells if cell.row not in leave_out for key in cell.everything}
    fill(store, plan, wanted)
    return matrix, plan, store


def make_site(folder, matrix, store, force=False):
    """Build a site; what the command printed."""
    out = io.StringIO()
    console, errors = Console(file=out, width=200), Console(file=io.StringIO())
    build(SiteRequest(folder, (matrix,), store.root, force=force), console, errors)
    return out.getvalue()
