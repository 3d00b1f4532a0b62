"""Students on this CPU: every precision, an independent clock beside ours, and where the time goes.

    smskd-bench run --matrix benchmarks/matrices/edge-small.yaml --data-root DIR
    python -m benchmarks.edge --data-root DIR --markdown docs/edge.md

Each student of the matrix is exported for the target and measured (or taken from the store). Then,
for every graph of one image, in turns in one process: the runner's timing of a session, and the
standard library's ``timeit`` of the very same session; their ratio shows whether our clock tells
the truth. Last, ONNX Runtime's profile says how much of an inference each operator takes, which
explains what int8 gains.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import timeit
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.command import run
from benchmarks.edge_page import render
from benchmarks.measured_students import MeasuredStudent, measured_students
from benchmarks.report import filled

ROUNDS = 21
BLOCK_S = 0.1
PROFILED_RUNS = 200
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp")


@dataclass(frozen=True)
class Clocks:
    """One graph timed by both.

    Attributes:
        ours_ms: Median over rounds of the runner's median.
        theirs_ms: Median over rounds of timeit's mean of a block.
        ratio: Median over rounds of ours by theirs.
        low: Lower quartile of the ratio.
        high: Upper quartile.
    """

    ours_ms: float
    theirs_ms: float
    ratio: float
    low: float
    high: float


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option(
    "--matrix", type=click.Path(path_type=Path), default=Path("benchmarks/matrices/edge-small.yaml")
)
@click.option("--store", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--quick", is_flag=True, help="Short measurements, to try it out.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Page whose tables to replace.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the record here (JSON).")
def main(
    matrix: Path, store: Path, data_root: Path | None, target: str, quick: bool,
    markdown: Path | None, output: Path | None,
) -> None:  # fmt: skip
    """Measure every student of the matrix and write the tables."""
    found = measured_students(matrix, store, data_root, target, quick)
    students = [look_into(student) for student in found]
    record = {
        "benchmark": "edge", "device": "cpu", "target": target, "machine": machine_line(),
        "rounds": ROUNDS, "students": students,
    }  # fmt: skip
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    tables = render(record)
    if markdown is not None:
        page = filled(markdown.read_text(encoding="utf-8"), tables)
        markdown.write_text(page, encoding="utf-8")
    click.echo(tables)


def look_into(student: MeasuredStudent) -> dict[str, Any]:
    """What was measured of a student, and what its graphs say when looked at from outside."""
    graphs = sorted((student.export / "bundle" / "model").glob("*-b1.onnx"))
    threads = student.report.target.threads
    return {
        "student": student.name,
        "judged": asdict(student.judged),
        "left_out": student.report.left_out,
        "clocks": {g.stem: asdict(both_clocks(g, threads)) for g in graphs},
        "operators": {g.stem: operator_shares(g, threads) for g in graphs},
    }


def both_clocks(graph: Path, threads: int) -> Clocks:
    """The runner's clock and timeit, in turns, on one session."""
    from smskd_export.runner import run as runner

    backend = runner.OnnxRuntimeBackend(runner.load_runtime("onnxruntime"), threads)
    shape = graph_input(graph)
    backend.build(graph, shape[0], "", shape[1:])
    images = np.random.default_rng(0).random((16, *shape[1:]), dtype=np.float32)
    backend.set_inputs(images)
    session, name = backend._session, backend._input
    feeds = [{name: images[i : i + 1]} for i in range(len(images))]
    turn = iter(range(1 << 62))

    def theirs() -> None:
        session.run(None, feeds[next(turn) % len(feeds)])

    timer = timeit.Timer(theirs)
    count = max(10, round(BLOCK_S / (timer.timeit(50) / 50)))
    pairs = []
    for _ in range(ROUNDS):
        ours = statistics.fmean(backend.time_one(i % len(images))[0] for i in range(count)) / 1e6
        pairs.append((ours, 1e3 * timer.timeit(count) / count))
    ratios = [ours / other for ours, other in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return Clocks(medians[0], medians[1], middle, low, high)


def graph_input(graph: Path) -> tuple[int, ...]:
    """Shape of a graph's input ``(B, C, H, W)``."""
    import onnx

    dims = onnx.load(graph).graph.input[0].type.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims)


def operator_shares(graph: Path, threads: int) -> dict[str, float]:
    """Share of the time of an inference by operator, from ONNX Runtime's profile."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(graph, options, ["CPUExecutionProvider"])
        images = np.zeros(graph_input(graph), np.float32)
        for _ in range(PROFILED_RUNS):
            session.run(None, {session.get_inputs()[0].name: images})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    total: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            total[event["args"]["op_name"]] += event["dur"]
    everything = sum(total.values()) or 1.0
    ordered = sorted(total.items(), key=lambda item: -item[1])
    return {name: value / everything for name, value in ordered}


def machine_line() -> str:
    """What ran."""
    import platform

    import onnxruntime
    import torch
    from smskd_bench.environment import processor_name

    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
    sets = [name for name in INSTRUCTIONS if name in flags]
    return (
        f"{processor_name()} ({', '.join(sets) or 'no vector sets known'}), Python "
        f"{platform.python_version()}, ONNX Runtime {onnxruntime.__version__}, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    run(main)
