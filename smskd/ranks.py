"""What the processes that train one stage run together say to each other.

Gradients pass through: what is summed over the processes sends its gradient back to all of them,
and what is gathered sends each process the gradient of its own part. Shapes: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes of torch's default group, which must have been set up.

    Attributes:
        rank: This process, from 0.
        size: How many there are.
    """

    rank: int
    size: int

    @classmethod
    def here(cls) -> Ranks:
        """Those of this process."""
        return cls(dist.get_rank(), dist.get_world_size())

    def shares(self, count: int) -> list[int]:
        """How many of a batch's samples each process takes, the first ones one more."""
        each, rest = divmod(count, self.size)
        return [each + (rank < rest) for rank in range(self.size)]

    def part(self, count: int) -> slice:
        """Which of a batch's samples this process takes."""
        shares = self.shares(count)
        start = sum(shares[: self.rank])
        return slice(start, start + shares[self.rank])

    def gather(self, own: Tensor, count: int) -> Tensor:
        """The whole batch ``(B, ...)`` from everybody's part, in the batch's order."""
        whole: Tensor = _Gathered.apply(own, self, count)  # type: ignore[no-untyped-call]
        return whole

    def add_up(self, own: Tensor) -> Tensor:
        """The sum over all processes."""
        total: Tensor = _AddedUp.apply(own)  # type: ignore[no-untyped-call]
        return total

    def any(self, *mine: bool) -> tuple[bool, ...]:
        """For each of these, whether it holds in some process; all must ask at the same place."""
        flags = torch.tensor(mine, dtype=torch.int32)
        if dist.get_backend() == "nccl":
            flags = flags.cuda()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in flags.tolist())


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks, count: int) -> Tensor:
        ctx.part = ranks.part(count)
        shares = ranks.shares(count)
        # Everybody sends the same number of rows; who has one less sends a row of zeros.
        padded = own.new_zeros((max(shares), *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        return torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.part], None, None


class _AddedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
