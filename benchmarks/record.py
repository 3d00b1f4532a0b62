"""Result files of benchmarks: what they hold, how they are written, and their table.

A document has ``groups`` (one a pair of networks, say) of ``rows`` (one a contestant). Every timed
and every warm-up sample is in it, so each number of the table can be computed again.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from benchmarks import cost_group, floor_group
from benchmarks.cells import (
    NOT_MEASURED,
    NOT_RUN,
    VERDICTS,
    Document,
    Row,
    grid,
    measured,
    quartiles,
)
from benchmarks.interleave import Rounds, Spread, cpu_ratios, ratios, spread
from benchmarks.sheet import SHEET, sheet_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RIVAL_PACKAGES = ("torchvision", "torchdistill", "pillow")
PLACES = {"--data-root": "DIR", "--output": "DIR", "--work": "DIR", "--matrix": "FILE"}
"""Options that name something on this machine, and what is recorded in its place."""

LEGEND = "Ratio: median of the ratios within each round (quartiles)."


@dataclass(frozen=True)
class Goal:
    """The least ratio wanted.

    Attributes:
        ratio: Times as fast.
        against: Contestants it must hold against, each one; those not measured are left out.
    """

    ratio: float
    against: tuple[str, ...]


class Table(Protocol):
    """One table of a result, of any kind."""

    @property
    def title(self) -> str:
        """What the work was; unique in its result."""

    @property
    def expected(self) -> Sequence[str]:
        """Names of the rows."""

    def document(self) -> Document:
        """As it is stored."""


@dataclass
class Group:
    """One table of ratios: contestants that did the same work.

    Attributes:
        title: What the work was.
        expected: Contestants in the table's order.
        baselines: Contestants that the others are compared with.
        goals: By contestant.
        rounds: What was measured; None if nothing was.
        missing: By contestant, why it was not measured.
        notes: What was checked before the measurement.
        remarks: Sentences below the table.
    """

    title: str
    expected: Sequence[str]
    baselines: Sequence[str]
    goals: Mapping[str, Goal] = field(default_factory=dict)
    rounds: Rounds | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    def document(self) -> Document:
        """As it is stored."""
        return {
            "title": self.title,
            "baselines": list(self.baselines),
            "rounds": self.rounds.count if self.rounds else 0,
            "notes": dict(self.notes),
            "remarks": list(self.remarks),
            "rows": [self._row(name) for name in self.expected],
        }

    def _row(self, name: str) -> Row:
        goal = self.goals.get(name)
        row: Row = {"name": name, "goal": asdict(goal) if goal else None}
        samples = self.rounds.timed.get(name) if self.rounds else None
        if not samples or self.rounds is None:
            return row | {"not_measured": self.missing.get(name, NOT_RUN)}
        others = {b: self.rounds.timed[b] for b in self.baselines if b in self.rounds.timed}
        compared = {b: spread(ratios(samples, other)) for b, other in others.items() if b != name}
        by_cpu = {b: spread(cpu_ratios(samples, other)) for b, other in others.items() if b != name}
        return row | {
            **measured(name, self.rounds),
            "images_per_cpu_s": asdict(spread([s.images_per_cpu_s for s in samples])),
            "ratio": {b: asdict(s) for b, s in compared.items()},
            "cpu_ratio": {b: asdict(s) for b, s in by_cpu.items()},
            "met": _met(goal, compared) if goal else None,
        }


def document(
    name: str,
    device: str,
    groups: Sequence[Table],
    settings: Mapping[str, Any],
    excluded: Sequence[str],
    reading: str = "",
) -> Document:
    """Everything about one run of a benchmark.

    Args:
        name: The benchmark's module name.
        device: torch device type, ``cpu`` or ``cuda``.
        groups: Its tables.
        settings: Batch size, workers, what the images were, and the like.
        excluded: What a user waits for that the times do not hold, in words.
        reading: How sheets are read; of the other kinds of tables it is said without being given.
    """
    return {
        "benchmark": name,
        "device": device,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *_public(sys.argv[1:])]),
        "settings": dict(settings),
        "excluded": list(excluded),
        "reading": reading,
        "environment": environment(device),
        "sample_fields": ["images", "wall_s", "cpu_s"],
        "groups": [group.document() for group in groups],
    }


def environment(device: str) -> Document:
    """Machine, device, versions, commit, threads, load and date of this run."""
    import torch
    from smskd_bench.environment import code_revision, device_name, machine, package_versions

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "code": {**code_revision(), "benchmarks_dirty": _scripts_changed()},
        "machine": machine(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "packages": {**package_versions(), **{name: _version(name) for name in RIVAL_PACKAGES}},
        "cuda": torch.version.cuda,
    }


def write(result: Document, folder: Path = RESULTS) -> Path:
    """Write ``<benchmark>-<device>.json``, complete or not at all; an older one is replaced."""
    from smskd.atomic import write_json

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{result['device']}.json"
    write_json(path, result)
    return path


def table(result: Document) -> str:
    """Markdown tables of one result, with the machine below; the same text for the same result."""
    parts = [group_table(group) for group in result["groups"]]
    return "\n\n".join([*parts, footer(result)]) + "\n"


def group_table(group: Document) -> str:
    """One group as a Markdown table under its title."""
    return TABLES[_kind(group)](group)


def ratio_table(group: Document) -> str:
    """One group of ratios as a Markdown table."""
    baselines = group["baselines"]
    titles = ["contestant", "images/s", "images per CPU s", *(f"against {b}" for b in baselines)]
    lines = [_cells(row, baselines) for row in group["rows"]]
    return grid(group, [*titles, "goal", ""], lines)


def footer(result: Document) -> str:
    """What was run, when, on what, and what the times leave out."""
    env, settings = result["environment"], result["settings"]
    machine, packages = env["machine"], env["packages"]
    revision = env["code"]["revision"]
    changed = env["code"]["dirty"] or env["code"]["benchmarks_dirty"]
    commit = (revision[:7] if revision else "unknown") + (" with changes" if changed else "")
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", *RIVAL_PACKAGES) if packages.get(name)
    )
    excluded = [f"Not in the times: {'; '.join(result['excluded'])}.", ""]
    return "\n".join(
        [
            f"{_reading(result)} {_settings_text(settings)}",
            "",
            *(excluded if result["excluded"] else []),
            f"{env['device']}; {machine['processor']}, {machine['cores']} cores, "
            f"{machine['memory_gib']} GiB; {env['threads']} threads; load at the end "
            f"{env['load_average'][0]}; Python {machine['python']}, {versions}; {env['date']}; "
            f"revision {commit}. `{result['command']}`",
        ]
    )


TABLES: Mapping[str, Callable[[Document], str]] = {
    "ratio": ratio_table,
    "cost": cost_group.cost_table,
    "floor": floor_group.floor_table,
    SHEET: sheet_table,
}
LEGENDS = {"ratio": LEGEND, "cost": cost_group.LEGEND, "floor": floor_group.LEGEND}
"""What the numbers of a kind of table are, for the footer."""


def _reading(result: Document) -> str:
    """How the numbers of a result are read."""
    kinds = [_kind(group) for group in result["groups"]]
    if SHEET in kinds:
        said: str = result["reading"]
        return said
    legends = dict.fromkeys(LEGENDS[kind] for kind in kinds)
    rounds = ", ".join(str(group["rounds"]) for group in result["groups"])
    return f"{' '.join(legends)} Rounds: {rounds}."


def _kind(group: Document) -> str:
    kind: str = group.get("kind", "ratio")
    return kind


def _cells(row: Row, baselines: Sequence[str]) -> list[str]:
    goal = row["goal"]
    wanted = f"{goal['ratio']:g}" if goal else "-"
    if "not_measured" in row:
        lacking = ["-"] * (1 + len(baselines))
        return [row["name"], NOT_MEASURED, *lacking, wanted, row["not_measured"]]
    compared = [_ratio(row["ratio"].get(b), b == row["name"]) for b in baselines]
    speeds = [f"{row[key]['median']:,.0f}" for key in ("images_per_s", "images_per_cpu_s")]
    return [row["name"], *speeds, *compared, wanted, VERDICTS[row["met"]]]


def _ratio(value: Mapping[str, float] | None, itself: bool) -> str:
    if value is None:
        return "1" if itself else "-"
    return quartiles(value)


def _met(goal: Goal, compared: Mapping[str, Spread]) -> bool | None:
    medians = [compared[name].median for name in goal.against if name in compared]
    return min(medians) >= goal.ratio if medians else None


def _settings_text(settings: Mapping[str, Any]) -> str:
    said = [f"{name.replace('_', ' ')} {value}" for name, value in settings.items()]
    return f"Settings: {', '.join(said)}."


def _public(words: Sequence[str]) -> list[str]:
    """A command line without this machine's folders and files."""
    shown, previous = [], ""
    for word in words:
        option, equals, _ = word.partition("=")
        if previous in PLACES:
            word = PLACES[previous]
        elif option in PLACES and equals:
            word = f"{option}={PLACES[option]}"
        shown.append(word)
        previous = option if not equals else ""
    return shown


def _scripts_changed() -> bool | None:
    """Whether these scripts differ from the commit; None if git cannot tell."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--", "benchmarks/*.py"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return bool(done.stdout.strip())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
