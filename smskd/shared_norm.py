"""Batch norms whose statistics are those of the whole batch, though each process has a part.

torch has ``SyncBatchNorm`` for this, but on CUDA devices only. Shapes: B batch, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smskd.ranks import Ranks


class SharedNorm(_BatchNorm):
    """A batch norm over the batches of all processes; parameters and buffers as of a plain one."""

    ranks: Ranks

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)``, in training by mean and variance of the whole batch."""
        if not self.training:
            return super().forward(images)
        wide = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        dims = [dim for dim in range(wide.dim()) if dim != 1]
        shape = [1, -1, *[1] * (wide.dim() - 2)]
        count = self.ranks.add_up(wide.new_tensor([wide.numel() / wide.shape[1]]))
        mean = self.ranks.add_up(wide.sum(dims)) / count
        centred = wide - mean.view(shape)
        variance = self.ranks.add_up(centred.square().sum(dims)) / count
        if self.track_running_stats:
            self._remember(mean.detach(), variance.detach() * count / (count - 1.0))
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(images.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = self.momentum
        if factor is None:  # the mean over all batches so far
            factor = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


def share_norms(model: nn.Module, ranks: Ranks) -> None:
    """Turn a network's batch norms into shared ones in place; its state's names stay."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SharedNorm
            module.ranks = ranks  # type: ignore[assignment]
