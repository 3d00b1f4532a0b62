"""The console that everything is printed on: text from files cannot steer a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from smskd.printable import printable


class Terminal(Console):
    """A console that escapes what cannot be seen in any text; its own colours stay.

    Rich takes only five control characters out of a text, and lets escape sequences through.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Segments of what is to be printed; called for every part of it."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)
