"""``smskd-bench measure``: a bundle to a device and its numbers back, without the training stack.

Nothing here imports torch: an engineer who has only a bundle needs ONNX Runtime or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from smskd_export.archive import OpenedBundle, open_bundle
from smskd_export.arrays import read_array
from smskd_export.bundle import CLASSES
from smskd_export.judging import Judged, judge, write_judged
from smskd_export.manifest import bundle_id
from smskd_export.measuring import measure
from smskd_export.test_sets import LABELS

from smskd_bench.leases import LeaseBook
from smskd_bench.measurements import device_name, measurement_folder, new_folder
from smskd_bench.report.devices import table
from smskd_bench.terminal import Terminal
from smskd_bench.usage import in_use

GATE_FAILED = 3
STATUS_CHARS = 160


@dataclass(frozen=True)
class MeasureRequest:
    """How the user wants a bundle to be measured.

    Attributes:
        device: ``user@host``, or None for this machine.
        quick: Shorten the protocol; such numbers never rank.
        threads: CPU threads, or None for the target's.
        precisions: Only these; empty: all.
        allow: Codes of requirements that need not be met; the rows say so for ever.
        python: Interpreter that runs the runner; None: `python3` of a device, ours here.
        energy: Whether to make the energy pass where power can be read.
        resume: Fetch what a lost link left on the device, without measuring again.
    """

    device: str | None = None
    quick: bool = False
    threads: int | None = None
    precisions: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    python: str | None = None
    energy: bool = True
    resume: bool = False


def measure_file(
    path: Path, request: MeasureRequest, test_set: Path | None, out: Path | None, console: Console
) -> int:
    """Measure a bundle (directory, export folder or archive) and print its table.

    Returns:
        The exit code: 0, or 3 if a row failed its gate.

    Raises:
        SmskdError: the bundle is damaged, the device refuses, or the link is lost.
    """
    opened = open_bundle(path, Path("measurements") / "bundles")
    parent = out or _parent(path, opened)
    with _in_use(parent):
        folder, judged = measure_opened(opened, request, test_set, parent, console)
    print_measurement(judged, console)
    console.print(Text(f"raw samples, verdict: {folder}"), soft_wrap=True)
    return exit_code(judged)


def measure_opened(
    opened: OpenedBundle,
    request: MeasureRequest,
    test_set: Path | None,
    parent: Path,
    console: Console,
) -> tuple[Path, Judged]:
    """Measure a bundle that was checked, into a new folder below ``parent``.

    Raises:
        SmskdError: the device refuses, or the link is lost.
    """
    images = test_set or opened.test_set
    out = new_folder(parent, request.device)
    with _progress(console) as on_event:
        found = measure(
            opened.bundle,
            out,
            test_set=images,
            device=request.device,
            quick=request.quick,
            threads=request.threads,
            affinity=(),
            precisions=request.precisions,
            allow=request.allow,
            energy=request.energy,
            python=request.python,
            resume=request.resume,
            on_event=on_event,
        )
    labels = None if images is None else read_array(images / LABELS)
    classes = read_array(opened.bundle / CLASSES)
    device = device_name(request.device)
    judged = judge(opened.manifest, found, out, device, labels, classes)
    write_judged(out, judged)
    return out, judged


def exit_code(judged: Judged) -> int:
    """0, or 3 if a precision failed its gate: a script must notice."""
    return GATE_FAILED if any(row.status != "ok" for row in judged.rows) else 0


def print_measurement(judged: Judged, console: Console) -> None:
    """Print the table; a console that is no terminal gets wide lines."""
    if not console.is_terminal:
        console = Terminal(file=console.file, width=200)
    console.print(table(judged))


def _parent(path: Path, opened: OpenedBundle) -> Path:
    """Where the measurement belongs: the store that the bundle lies in, else the working folder."""
    export = opened.bundle.absolute().parent
    root = export.parents[2] if len(export.parents) > 2 else export
    if export.parents[1].name == "exports" and (root / "store.json").exists():
        return measurement_folder(root, export.parent.name, export.name)
    return Path("measurements") / bundle_id(opened.bundle)[:16]


@contextmanager
def _in_use(parent: Path) -> Iterator[None]:
    """Keep the export that measurements in ``parent`` are of, if that lies in a store."""
    root = parent.parents[2] if len(parent.parents) > 2 else parent
    if not (root / "store.json").exists() or parent.parents[1].name != "measurements":
        yield
        return
    with ExitStack() as used:
        with suppress(OSError):  # cannot be written: nobody can remove anything either
            used.enter_context(in_use(root, [parent.parent.name], LeaseBook()))
        yield


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show what the device is doing: a moving line on a terminal, nothing in a file."""
    if not console.is_terminal:
        yield lambda event: None
        return
    with console.status("waiting for the device") as status:
        yield lambda event: status.update(Text(_status_text(event)))


def _status_text(event: dict[str, Any]) -> str:
    """One line for an event, which comes from another machine and is not trusted."""
    words = [str(event.get("event", ""))]
    for name in ("precision", "batch", "number", "of", "done", "total", "p50_ms", "seconds"):
        if name in event:
            words.append(f"{name} {event[name]}")
    text = " ".join(words)
    return "".join(c if c.isprintable() else " " for c in text)[:STATUS_CHARS]
