"""What a transport does: let a bundle's runner run on some machine and bring its results here.

``local`` runs it on this machine, ``ssh`` on another one. Whatever a runner prints comes from
another machine: it is read as untrusted text, never as anything else.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from smskd.errors import RunError

Event = dict[str, Any]
OnEvent = Callable[[Event], None]

OK, REFUSED, STOPPED, ROW_FAILED = 0, 3, 4, 5
"""Exit status of a runner."""

_KEPT_LINES, _KEPT_WIDTH, _DEEPEST = 20, 300, 20


class LinkLostError(RunError):
    """The link to a device broke; what the device keeps, it keeps."""


@dataclass(frozen=True)
class Job:
    """What a runner shall do.

    Attributes:
        bundle: Folder of the bundle on this machine.
        bundle_id: Its id.
        test_set: Folder of the test set on this machine; None: accuracy is not measured.
        test_set_id: Its hash; empty without one.
        options: Options of the runner that name no place, e.g. ``("--quick",)``.
        python: Interpreter on the machine that measures; empty: the transport's own choice.
    """

    bundle: Path
    bundle_id: str
    test_set: Path | None
    test_set_id: str
    options: tuple[str, ...] = ()
    python: str = ""

    @property
    def key(self) -> str:
        """Short name of this request: the same request has the same one."""
        request = [self.bundle_id, self.test_set_id, *self.options, self.python]
        return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Refusal:
    """One requirement that the machine does not meet.

    Attributes:
        code: Of the requirement.
        message: What is wrong.
        remedy: What to do.
        offers: What the machine has instead.
    """

    code: str
    message: str
    remedy: str
    offers: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.message}"]
        offers = ", ".join(filter(None, self.offers))
        lines += [f"the device has: {offers}"] if offers else []
        lines += [f"-> {self.remedy}"] if self.remedy else []
        return "\n    ".join(lines)


@dataclass
class Ended:
    """How a runner ended, and what it said on the way.

    Attributes:
        code: Exit status; below 0: killed by this signal.
        refusals: All of them.
        probe: The first probe, unchecked; None: there was none.
        reason: Why it stopped early, in its own words.
        complaints: The last lines that were no events.
    """

    code: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    probe: Event | None = None
    reason: str = ""
    complaints: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))

    def take(self, raw: bytes, on_event: OnEvent) -> None:
        """Sort one line of the runner's output: remember what matters, hand on what is an event."""
        event = parse_event(raw)
        if event is None:
            self.complain(raw)
            return
        name = event["event"]
        if name == "refused":
            self.refusals.append(_refusal(event))
        elif name == "probe" and self.probe is None and isinstance(event.get("probe"), dict):
            self.probe = event["probe"]
        elif name == "end":
            self.reason = str(event.get("reason") or event.get("message") or "")
        on_event(event)

    @property
    def may_have_results(self) -> bool:
        """Whether it got so far that it may have written some."""
        return self.code in (OK, STOPPED, ROW_FAILED)

    def complain(self, raw: bytes) -> None:
        """Remember a line that is no event."""
        text = plain(raw.decode("utf-8", "replace")).strip()
        if text:
            self.complaints.append(text[:_KEPT_WIDTH])


@dataclass(frozen=True)
class Step:
    """What is being done on a device, for the message when the link breaks.

    Attributes:
        doing: "... was lost while" it.
        remedy: What is left then, and what to do.
    """

    doing: str
    remedy: str


class Transport(Protocol):
    """A way to a machine that measures.

    Attributes:
        where: How messages call the machine.
    """

    where: str

    def probe(self, job: Job, on_event: OnEvent) -> Ended:
        """Ask whether the machine can do the job; nothing is measured."""

    def measure(self, job: Job, scratch: Path, on_event: OnEvent) -> tuple[Ended, Path]:
        """Do the job; its results, if there are any, lie in the returned folder below scratch.

        Raises:
            LinkLostError: the link broke; the message says what is left and what to do.
        """

    def resume(self, job: Job, scratch: Path, on_event: OnEvent) -> Path:
        """Bring the results of an earlier ``measure`` whose link broke, without measuring again.

        Raises:
            RefusedError: there are none.
            LinkLostError: as in ``measure``.
        """

    def forget(self, job: Job, on_event: OnEvent) -> None:
        """Remove from the machine what has been brought here."""


def parse_event(raw: bytes) -> Event | None:
    """One line as an event: a JSON object that names its event. None: it is something else.

    Every text in it is without control characters afterwards.
    """
    try:
        found = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("event"), str):
        return None
    cleaned = _clean(found, _DEEPEST)
    return cleaned if isinstance(cleaned, dict) else None


def plain(text: str) -> str:
    """The text with every character gone that could steer a terminal; line ends become spaces."""
    return "".join(c if c.isprintable() else " " * c.isspace() for c in text)


def _clean(value: Any, depth: int) -> Any:
    if depth == 0:
        return None
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [_clean(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {plain(name): _clean(item, depth - 1) for name, item in value.items()}
    return value


def _refusal(event: Event) -> Refusal:
    code, message, remedy = (str(event.get(name) or "") for name in ("code", "message", "remedy"))
    offers = event.get("offers")
    shown = tuple(map(str, offers)) if isinstance(offers, list) else ()
    return Refusal(code or "unknown", message, remedy, shown)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
