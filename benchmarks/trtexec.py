"""Our GPU times beside those of NVIDIA's own ``trtexec``, on the very same engines.

    python -m benchmarks.trtexec --matrix leaderboards/quickstart.yaml --store runs

On a machine with an NVIDIA GPU and TensorRT: every student of the matrix is exported for the target
and measured (engine build, parity, accuracy, latency), or taken from the store; then each engine is
loaded by ``trtexec`` and both medians of the GPU's time stand side by side. They should be within
5 %. Versions of ``trtexec`` have opposite defaults, so every switch is spelled out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from smskd_export.judging import JUDGED, read_judged
from smskd_export.measurement import DeviceRow, read_measurement

from benchmarks.command import run
from benchmarks.edge_page import markdown_table
from benchmarks.measured_students import MeasuredStudent, measured_students

TRTEXEC = Path("/usr/src/tensorrt/bin/trtexec")
"""Where JetPack and the Debian packages put it."""
LIMIT = 0.05
HEAD = ("student", "row", "ours ms", "trtexec ms", "ratio")
SWITCHES_CHANGED = 11
"""From this release on transfers are off and CUDA graphs and spinning on, unless told otherwise."""


@dataclass(frozen=True)
class Comparison:
    """One engine timed by both, medians of the time on the GPU."""

    student: str
    row: str
    ours_ms: float
    theirs_ms: float

    @property
    def ratio(self) -> float:
        """Ours by theirs."""
        return self.ours_ms / self.theirs_ms


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--matrix", type=click.Path(path_type=Path), required=True)
@click.option("--store", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path))
@click.option("--target", default="cuda", show_default=True)
@click.option("--quick", is_flag=True, help="Short measurements, to try it out.")
@click.option("--trtexec", "binary", type=click.Path(path_type=Path), help="Path of trtexec.")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("~/.cache/smskd-bench"),
    show_default=True, help="Where the runner keeps its engines.",
)  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="Write the record here (JSON).")
def main(
    matrix: Path, store: Path, data_root: Path | None, target: str, quick: bool,
    binary: Path | None, cache: Path, output: Path | None,
) -> None:  # fmt: skip
    """Measure, cross-check, print; exit status 1 if a pair differs by more than 5 %."""
    program = find_trtexec(binary)
    students = list(measured_students(matrix, store, data_root, target, quick))
    engines = engines_by_hash(cache.expanduser())  # by now all of them were built
    found = [c for student in students for c in compare(student, program, engines)]
    if output is not None:
        rows = [{**asdict(c), "ratio": c.ratio} for c in found]
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    cells = [
        [c.student, c.row, f"{c.ours_ms:.4f}", f"{c.theirs_ms:.4f}", f"{c.ratio:.3f}"]
        for c in found
    ]
    click.echo("\n".join(markdown_table(HEAD, cells)))
    off = [c for c in found if abs(c.ratio - 1) > LIMIT]
    click.echo(f"{len(found)} engines compared, {len(off)} differ by more than {LIMIT:.0%}")
    sys.exit(1 if off or not found else 0)


def find_trtexec(named: Path | None) -> Path:
    """The program.

    Raises:
        click.ClickException: it is not there.
    """
    path = named or (TRTEXEC if TRTEXEC.exists() else Path(shutil.which("trtexec") or ""))
    if not path.is_file():
        raise click.ClickException(
            f"there is no trtexec ({named or TRTEXEC}); it comes with TensorRT's Debian packages "
            "and JetPack, not with its wheels: name it with --trtexec"
        )
    return path


def engines_by_hash(cache: Path) -> dict[str, Path]:
    """Every engine that the runner keeps, by its SHA-256."""
    paths = sorted((cache / "engines").glob("*/engine"))
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in paths}


def compare(
    student: MeasuredStudent, program: Path, engines: dict[str, Path]
) -> Iterator[Comparison]:
    """Each row of the student's newest measurement that has an engine."""
    folder = next(
        path.parent
        for path in student.measurements.glob(f"*/{JUDGED}")
        if read_judged(path.parent) == student.judged
    )
    measurement = read_measurement(folder)
    assert measurement is not None
    version = int(measurement.before.runtime_version.partition(".")[0])
    judged = {(r.precision, r.batch, r.cuda_graph): r for r in student.judged.rows}
    for row in measurement.rows:
        gpu = judged[row.precision, row.batch, row.cuda_graph].gpu
        path = engines.get(row.build.engine_sha256) if row.build else None
        if gpu is not None and path is not None:
            theirs = run_trtexec(program, path, row, version)
            yield Comparison(student.name, row.id, gpu.p50_ns / 1e6, theirs)


def run_trtexec(program: Path, engine: Path, row: DeviceRow, version: int) -> float:
    """Median of the GPU's time of one inference by trtexec, in milliseconds.

    Raises:
        click.ClickException: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        command = [
            str(program), f"--loadEngine={engine}", f"--exportTimes={times}", "--warmUp=1000",
            "--duration=5", "--iterations=1000", "--avgRuns=1", "--infStreams=1",
            *switches(version, row.cuda_graph),
        ]  # fmt: skip
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode or not times.exists():
            lines = (ended.stderr or ended.stdout).strip().splitlines()
            raise click.ClickException(f"trtexec failed: {lines[-1] if lines else 'silently'}")
        trace = json.loads(times.read_text(encoding="utf-8"))
    return float(statistics.median(entry["computeMs"] for entry in trace))


def switches(version: int, cuda_graph: bool) -> list[str]:
    """The same work in every release: no transfers, spinning, a CUDA graph only if asked for."""
    if version >= SWITCHES_CHANGED:
        return [] if cuda_graph else ["--noCudaGraph"]
    return ["--noDataTransfers", "--useSpinWait", *(["--useCudaGraph"] if cuda_graph else [])]


if __name__ == "__main__":
    run(main)
