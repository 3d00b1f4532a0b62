"""Makes the large site and times it in a browser."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chromium import browser
from benchmarks.made_store import make
from benchmarks.page_part import grid
from smskd.errors import RunError

# From an event to the frame that shows what it did.
ANSWER = """
async ([id, value]) => {
  const field = document.getElementById(id);
  const began = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - began;
}
"""
SORT = """
async (column) => {
  const button = document.querySelectorAll("#table thead button")[column];
  const began = performance.now();
  button.click();
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - began;
}
"""
FILTERS = (
    ("text", "q", "fitnet"),
    ("text, one more letter", "q", "fitnet d"),
    ("text, none left", "q", "zzz"),
    ("text, all again", "q", ""),
    ("pair", "pair", "vgg13>vgg8"),
    ("all pairs again", "pair", ""),
    ("method", "method", "rkd"),
    ("all methods again", "method", ""),
)
"""What is changed, which field, and to what."""
SORTED = (3, 1)
"""Columns that are sorted by: a number, a name."""

LOOK_AT = "place => document.getElementById(place).scrollIntoView({ behavior: 'instant' })"

PAUSE_MS = 700
"""Between two changes, as a reader makes them; pictures are drawn again 200 ms after one."""

GOALS = {"first paint": 2000.0, "table answers": None, "sort": 200.0}


@dataclass
class SiteTimes:
    """What was measured, in milliseconds where nothing else is said."""

    rows: int
    stage_runs: int
    epochs: int
    build_s: float
    build_cpu_s: float
    size_mb: float
    page_kb: float
    opened: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """One more time of a kind."""
        self.opened.setdefault(name, []).append(value)


def measure(folder: Path, seeds: int, epochs: int, rounds: int) -> SiteTimes:
    """Make the site and open it so often."""
    made = make(folder, seeds, epochs)
    site = folder / "site"
    words = ["report", "--html", str(site), "--matrix", str(made.matrix)]
    command = [sys.executable, "-m", "smskd_bench.cli", *words, "--store", str(made.store)]
    began, spent = time.perf_counter(), _children_s()
    done = subprocess.run([*command, "--force"], capture_output=True, text=True)
    seconds, cpu_s = time.perf_counter() - began, _children_s() - spent
    if done.returncode != 0:
        raise RunError("the site could not be made", done.stderr[-800:])
    files = [path.stat().st_size for path in site.rglob("*") if path.is_file()]
    page = (site / "index.html").stat().st_size / 1e3
    rows = len(list((site / "rows").iterdir()))
    times = SiteTimes(rows, made.stage_runs, epochs, seconds, cpu_s, sum(files) / 1e6, page)
    with browser() as started:
        for _ in range(rounds):
            _open(started, site / "index.html", times)
    return times


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _open(started: Any, page: Path, times: SiteTimes) -> None:
    context = started.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.goto(page.as_uri())
    opened.wait_for_selector("#table.ready")
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    times.add("first paint", opened.evaluate(paint))
    ready = "performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart"
    times.add("table answers", opened.evaluate(ready))
    for place in ("cost", "curves", "rows"):  # a reader who looked at the pictures first
        opened.evaluate(LOOK_AT, place)
        opened.wait_for_timeout(2500)
    for name, place, value in FILTERS:
        times.add(f"filter: {name}", opened.evaluate(ANSWER, [place, value]))
        opened.wait_for_timeout(PAUSE_MS)
    for column in SORTED:
        times.add("sort", opened.evaluate(SORT, column))
        opened.wait_for_timeout(PAUSE_MS)
    context.close()


def page(found: SiteTimes, environment: Mapping[str, Any]) -> str:
    """The table, with what it was measured on."""
    machine = environment["machine"]
    rows = [_row(name, values) for name, values in found.opened.items()]
    return "\n\n".join(
        [
            f"{found.rows:,} rows from {found.stage_runs:,} results with histories of "
            f"{found.epochs} epochs: made in {found.build_s:.0f} s ({found.build_cpu_s:.0f} s of "
            f"a processor), {found.size_mb:.0f} MB in all, "
            f"the board's page {found.page_kb:,.0f} kB. Milliseconds, median (least to most) of "
            f"{len(found.opened['first paint'])} times opened.",
            grid(("what", "ms", "goal", ""), rows),
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; load "
            f"at the end {environment['load_average'][0]}; headless Chromium; "
            f"{environment['date']}; revision {(environment['code']['revision'] or '?')[:7]}.",
        ]
    )


def _row(name: str, values: Sequence[float]) -> list[str]:
    goal = 200.0 if name.startswith("filter") else GOALS.get(name)
    spread = f"{median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
    if goal is None:
        return [name, spread, "-", ""]
    return [name, spread, f"{goal:.0f}", "met" if median(values) < goal else "not met"]
