"""The same recipe in torchdistill, through its own distillation box.

The box is configured as its YAML files do (data loader, frozen teacher, SGD, ``KDLoss`` in a
``WeightedSumLoss``), and an epoch is walked as in its own example, ``image_classification.py``: its
``MetricLogger`` around the loader, ``forward_process``, ``post_forward_process``, the loss read in
each step. The networks are our zoo's, the teacher in evaluation mode, which the box leaves to the
caller. One call of :meth:`TorchdistillLoop.train` is an epoch of that many steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from benchmarks.conventional import (
    CE_WEIGHT,
    KD_WEIGHT,
    LEARNING_RATE,
    MOMENTUM,
    TEMPERATURE,
    WEIGHT_DECAY,
)
from benchmarks.images import TrainImages
from benchmarks.numerics import CONVENTIONAL
from benchmarks.pil_loader import Passes, PilImages, Steps, train_transform
from smskd.torchvision_bridge import import_torchvision

MISSING = "torchdistill is not installed: pip install 'torchdistill>=1.1.5'"
LOG_EVERY_STEPS = 100
"""As in its sample configurations."""


def why_missing() -> str | None:
    """Why torchdistill cannot be measured here, or None."""
    return None if find_spec("torchdistill") else MISSING


class TorchdistillLoop:
    """The loop.

    Args:
        student: Trained in place.
        teacher: Put into evaluation mode.
        device: Where to train.
        data: Its loader's images.
        batch_size: B.
        workers: Worker processes of its loader.
        memory: A batch ``(images, labels)`` on the device that replaces the loader's batches, to do
            steps only.
    """

    name = "torchdistill"
    precision = "fp32"
    numerics = CONVENTIONAL

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        device: torch.device,
        data: TrainImages,
        batch_size: int,
        workers: int,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        import_torchvision()  # torchdistill imports it by itself, without the bridge
        from torchdistill.core.distillation import get_distillation_box

        self.device = device
        self.student = student.to(device)
        self.box = get_distillation_box(
            teacher.to(device).eval(),
            self.student,
            {"train": PilImages(data, train_transform())},
            train_config(batch_size, workers),
            device,
            device_ids=None,
            distributed=False,
            lr_factor=1,
        )
        self._memory = memory
        self._passes = Passes(self.box.train_data_loader)
        self._epoch = 0

    def step_on(self, images: Tensor, labels: Tensor, index: Tensor) -> float:
        """As in :class:`benchmarks.loop.Loop`."""
        self.box.pre_epoch_process(epoch=0)
        return self._step(images.contiguous(), labels, {})

    def train(self, steps: int) -> int:
        """An epoch of so many steps; returns the number of images."""
        from torchdistill.misc.log import MetricLogger, SmoothedValue

        self.box.pre_epoch_process(epoch=self._epoch)
        meters = MetricLogger(delimiter="  ")
        meters.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
        meters.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
        header, batches = f"Epoch: [{self._epoch}]", Steps(self._source(), steps)
        count = 0
        for images, labels, extra in meters.log_every(batches, LOG_EVERY_STEPS, header):
            began = time.time()
            loss = self._step(images.to(self.device), labels.to(self.device), extra)
            meters.update(loss=loss, lr=self.box.optimizer.param_groups[0]["lr"])
            meters.meters["img/s"].update(len(labels) / (time.time() - began))
            count += len(labels)
        self.box.post_epoch_process()
        self._epoch += 1
        return count

    def close(self) -> None:
        """End the loader's workers and take the box's hooks off."""
        self._passes.close()
        self.box.clean_modules()

    def _source(self) -> Iterator[Any]:
        if self._memory is None:
            return self._passes
        images, labels = self._memory
        return iter(lambda: (images, labels, {}), None)

    def _step(self, images: Tensor, labels: Tensor, extra: dict[str, Any]) -> float:
        loss = self.box.forward_process(images, labels, extra)
        self.box.post_forward_process(loss=loss)
        value: float = loss.item()
        if torch.isnan(loss) or torch.isinf(loss):
            raise ValueError(f"torchdistill's loss is {value}")
        return value


def train_config(batch_size: int, workers: int) -> dict[str, Any]:
    """What a YAML file would say: the recipe in torchdistill's words."""
    kd_loss = {
        "student_module_path": ".",
        "student_module_io": "output",
        "teacher_module_path": ".",
        "teacher_module_io": "output",
        "temperature": TEMPERATURE,
        "alpha": CE_WEIGHT,
        "beta": KD_WEIGHT,
        "reduction": "batchmean",
    }
    return {
        "num_epochs": 240,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": batch_size, "num_workers": workers},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {
            "key": "SGD",
            "kwargs": {
                "lr": LEARNING_RATE,
                "momentum": MOMENTUM,
                "weight_decay": WEIGHT_DECAY,
            },
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {"criterion": {"key": "KDLoss", "kwargs": kd_loss}, "weight": 1.0}
                }
            },
        },
    }
