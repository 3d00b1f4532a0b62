"""The pooled features of a pair: for the methods that compare nothing else."""

from __future__ import annotations

from torch import Tensor

from smskd.methods.base import PairShapes, Signals


def pooled_pair(signals: Signals) -> tuple[Tensor, Tensor]:
    """The pooled features ``(B, D)`` of the student and of the first teacher."""
    feature_s, feature_t = signals.student.pooled, signals.teacher.pooled
    assert feature_s is not None  # asked for in needs
    assert feature_t is not None
    return feature_s, feature_t


def lacks_pooled(shapes: PairShapes) -> str | None:
    """Who of student and first teacher has no pooled feature, as a reason for ``check``."""
    return no_pooled("student", shapes.student.pooled) or no_pooled(
        "teacher", shapes.teacher.pooled
    )


def no_pooled(who: str, width: int) -> str | None:
    """Why a pooled feature of this width will not do, or None."""
    return None if width else f"the {who} has no pooled feature; expected a width of at least 1"
