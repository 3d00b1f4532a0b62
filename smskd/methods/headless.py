"""A student whose classifier is replaced: its last map goes through modules that a method trained.

What methods with extra inference modules (SimKD) return from ``inference_model``: a plain module
of images in and logits out, which can be copied, moved, saved and exported like any model.
Shapes: B batch, C channels, H and W height and width, D width of the pooled feature, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from smskd.taps import SPATIAL, TappedModel, Taps


class Headless(nn.Module):
    """Runs a student for its map before pooling, and a head on that map for the logits.

    The hook that reads the map is there during a call only, so the student is left as it was.

    Args:
        student: Any network.
        taps: Its taps; ``spatial`` is read.
        head: Maps the map ``(B, D, H, W)`` and the images ``(B, C, H, W)`` to logits ``(B, K)``.
    """

    def __init__(self, student: nn.Module, taps: Taps, head: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.taps = taps
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K)``.

        Raises:
            ConfigError: the taps do not say where the map is.
        """
        with TappedModel(self.student, self.taps, frozenset({SPATIAL})) as tapped:
            spatial = tapped.run(images).spatial
        logits: Tensor = self.head(spatial, images)
        return logits
