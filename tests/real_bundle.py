"""Bundles that a device can really measure: one made in no time, one of a student that learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from runner_bundle import CLASSES, PROTOCOL, SHAPE, make_bundle, make_test_set
from smskd_export.bundle import seal_bundle
from smskd_export.manifest import SCHEMA, GraphInfo, Manifest, TestSet
from smskd_export.student_export import export_student
from smskd_export.targets import load_target
from torch import Tensor, nn

from smskd.datasets.digits import load_digits
from smskd.models import build_model

LONG = replace(PROTOCOL, name="long", min_duration_s=0.2, windows=200)
"""Its first window comes soon, its last one late: long enough to be broken off."""


def make_real_bundle(folder: Path, **options: Any) -> tuple[Path, Path]:
    """A bundle and its test set, in the new ``folder``; options as of ``make_bundle``."""
    test_set = make_test_set(folder / "test_set")
    bundle = make_bundle(folder / "bundle", test_set, protocol=LONG, **options)
    spec = json.loads((bundle / "protocol.json").read_text())
    graphs = tuple(
        GraphInfo(
            **entry, bytes=(bundle / entry["path"]).stat().st_size, opset=17, ir_version=8,
            input_shape=(entry["batch"], *SHAPE), output_shape=(entry["batch"], CLASSES),
            operators={},
        )
        for entry in spec["graphs"]
    )  # fmt: skip
    manifest = Manifest(
        schema=SCHEMA, name="small", dataset="random", image_shape=SHAPE, num_classes=CLASSES,
        mean=(0.0,), std=(1.0,), parameters=1, macs=1, torch_top1=spec["torch_top1"],
        target=load_target("cpu"), graphs=graphs, left_out={}, test_set=TestSet(**spec["test_set"]),
        versions={}, provenance={}, files={},
    )  # fmt: skip
    seal_bundle(bundle, manifest)
    return bundle, test_set


def export_digit_reader(folder: Path) -> tuple[Path, Path]:
    """Bundle and test set of a student that reads digits, exported for CPUs as every student is."""
    digits = load_digits()
    mean, std = digits.info.mean, digits.info.std
    inputs = (torch.from_numpy(digits.train.images).float() / 255 - mean[0]) / std[0]
    export_student(
        _trained(inputs, torch.from_numpy(digits.train.labels)),
        name="digits", dataset="digits", image_shape=(1, 8, 8), num_classes=10, mean=mean, std=std,
        train_images=digits.train.images, test_images=digits.test.images,
        test_labels=digits.test.labels, target=load_target("cpu"), out_dir=folder, provenance={},
    )  # fmt: skip
    return folder / "bundle", folder / "test_set"


def _trained(inputs: Tensor, labels: Tensor) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("resnet8_half", 10, in_channels=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(8):
            for chosen in torch.randperm(len(inputs)).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
                optimizer.step()
    return model.eval()
