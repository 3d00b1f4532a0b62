"""What mirroring to Weights & Biases costs the training, when W&B is well and when it is not.

    python -m benchmarks.tracking_cost

A small matrix is run again and again, in turns: not mirrored, offline, and online against a server
on this machine that is well, slow (every answer takes seconds), full (it refuses everything), that
logs us out, or that is not there. What is compared is the time inside epochs, which the mirror must
not touch; what the whole command takes longer is told beside it, as the end waits for the mirror.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import yaml

from tests.wandb_server import Handler, wandb_server

ROOT = Path(__file__).parents[1]
MATRIX = {
    "schema": 1,
    "name": "tracking",
    "dataset": {"name": "digits"},
    "pairs": [{"teacher": "resnet8_half", "student": "resnet8_quarter"}],
    "seeds": [0],
    "recipe": {"epochs": [12], "batch_size": 64},
    "teacher": {"epochs": 12},
    "rows": [["scratch"], ["kd"], ["dkd"]],
}
SLOW_S = 3.0
KEY = "0" * 40


class Slow(Handler):
    """Takes its time."""

    def do_POST(self) -> None:
        """Answer late."""
        time.sleep(SLOW_S)
        super().do_POST()


class Refusing(Handler):
    """Refuses everything."""

    status = 507

    def do_POST(self) -> None:
        """Read the request and refuse it."""
        self._body()
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_PUT = do_POST


class LoggedOut(Refusing):
    """Knows nobody."""

    status = 401


SERVERS: dict[str, type[Handler]] = {
    "online, well": Handler,
    "online, slow": Slow,
    "online, full": Refusing,
    "online, logged out": LoggedOut,
}
CONDITIONS = ("not mirrored", "offline", *SERVERS, "online, nobody there")


@contextmanager
def environment(condition: str) -> Iterator[dict[str, str]]:
    """What the command is told of W&B."""
    online = {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "10"}
    if condition == "online, nobody there":
        yield {**online, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    elif condition in SERVERS:
        with wandb_server() as server:
            server.RequestHandlerClass = SERVERS[condition]
            yield {**online, "WANDB_BASE_URL": server.url}
    else:
        yield {"WANDB_MODE": "offline"}


def run_once(condition: str, folder: Path) -> tuple[float, float]:
    """Seconds inside epochs, and of the whole command."""
    store = Path(tempfile.mkdtemp(dir=folder))
    matrix = folder / "matrix.yaml"
    matrix.write_text(yaml.safe_dump(MATRIX), encoding="utf-8")
    kind = "none" if condition == "not mirrored" else "wandb"
    command = [
        sys.executable, "-m", "smskd_bench.cli", "run", "--matrix", str(matrix), "--store",
        str(store), "--threads", "1", "--workers", "1", "--fold-seeds", "off", "--tracking", kind,
    ]  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    with environment(condition) as told:
        started = time.perf_counter()
        subprocess.run(command, check=True, cwd=ROOT, env={**kept, **told}, capture_output=True)
        whole = time.perf_counter() - started
    results = [json.loads(p.read_text()) for p in store.glob("stages/*/*/result.json")]
    return sum(result["train_seconds"] for result in results), whole


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Run all conditions in turns and print their ratios to the first."""
    samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for condition in CONDITIONS:
                samples[condition].append(run_once(condition, Path(folder)))
    plain = samples[CONDITIONS[0]]
    click.echo("| W&B | time inside epochs, ratio (range) | the whole command, s more |")
    click.echo("| --- | --- | --- |")
    for condition in CONDITIONS:
        pairs = list(zip(samples[condition], plain, strict=True))
        ratios = sorted(mine[0] / theirs[0] for mine, theirs in pairs)
        more = statistics.median(mine[1] - theirs[1] for mine, theirs in pairs)
        click.echo(
            f"| {condition} | {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}) | {more:+.1f} |"
        )


if __name__ == "__main__":
    main()
