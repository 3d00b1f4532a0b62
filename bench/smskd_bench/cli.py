"""The command line: a translator. Each command reads its options and calls one function.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import atexit
import io
import shlex
import signal
import sys
from collections.abc import Callable
from gc import freeze
from pathlib import Path
from typing import Any

import click

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)

store_option = click.option(
    "--store", type=_FOLDER, envvar="SMSKD_STORE", default=Path("runs"), show_default=True,
    show_envvar=True, help="Folder of all results.",
)  # fmt: skip
data_option = click.option(
    "--data-root", type=_FOLDER, envvar="SMSKD_DATA", show_envvar=True,
    help="Folder with the data sets that are not embedded.",
)  # fmt: skip
matrix_option = click.option(
    "--matrix", type=_FILE, required=True, help="Matrix file, e.g. leaderboards/quickstart.yaml."
)
only_option = click.option(
    "--only", metavar="PATTERN",
    help="Only cells whose name contains PATTERN; * matches anything.",
)  # fmt: skip
margin_option = click.option(
    "--margin", type=click.FloatRange(min=0.0, min_open=True), metavar="POINTS", default=0.3,
    show_default=True, help="Points of accuracy that are practically no difference.",
)  # fmt: skip


class _Group(click.Group):
    """Turns the project's errors into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as told:
            number = getattr(told, "number", signal.SIGINT)
            click.echo("\nstopped; the same command goes on from the last checkpoint:", err=True)
            click.echo(f"  {shlex.join(['smskd-bench', *sys.argv[1:]])}", err=True)
            sys.exit(128 + number)
        except click.ClickException as error:
            _say(error)
            sys.exit(error.exit_code)
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from smskd.errors import SmskdError

            if not isinstance(error, SmskdError):
                raise
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)


def _say(error: click.ClickException) -> None:
    """As click says it, but that nothing in it can steer a terminal."""
    from smskd.printable import printable

    said = io.StringIO()
    error.show(said)
    click.echo(printable(said.getvalue()), err=True, nl=False)


def _workers(ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number from 1", ctx, param)
    return int(value)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="smskd-bench", prog_name="smskd-bench")
def main() -> None:
    """Train, compare, export and time distilled students."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without a sign must not stop a run
            stream.reconfigure(errors="replace")
    atexit.register(freeze)  # nothing that torch loaded need be collected at the end (0.7 s)


@main.command()
@matrix_option
@store_option
@data_option
@only_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--threads", type=click.IntRange(min=1),
    help="CPU threads of each worker; without it the cores are shared out.",
)  # fmt: skip
@click.option(
    "--workers", metavar="auto|N", callback=_workers, default="auto", show_default=True,
    envvar="SMSKD_WORKERS", show_envvar=True,
    help="Stage runs at once; 1: in this process, one after another.",
)  # fmt: skip
@click.option(
    "--executor", type=click.Choice(["local", "slurm", "ray"]), default="local",
    show_default=True,
    help="This machine, jobs of a SLURM cluster (docs/slurm.md), or a Ray cluster "
    "(docs/cluster.md).",
)  # fmt: skip
@click.option(
    "--slurm-jobs", type=click.IntRange(min=1), default=4, show_default=True,
    help="SLURM jobs at once, each with one stage run at a time.",
)  # fmt: skip
@click.option(
    "--slurm-option", metavar="KEY=VALUE", multiple=True,
    help="Option for sbatch, e.g. partition=gpu, gres=gpu:1, time=8:00:00; repeatable.",
)  # fmt: skip
@click.option(
    "--address", metavar="HOST:PORT",
    help="Ray cluster to join, auto for one that runs here; default: RAY_ADDRESS, or a Ray of "
    "its own on this machine.",
)  # fmt: skip
@click.option(
    "--gpus-per-stage-run", type=click.FloatRange(min=0, min_open=True, max=1),
    help="With Ray: share of a GPU for each; default: a whole one.",
)  # fmt: skip
@click.option(
    "--store-mode", type=click.Choice(["shared", "fetch"]), default="shared", show_default=True,
    help="With Ray: all nodes see --store, or results are fetched from them.",
)  # fmt: skip
@click.option(
    "--node-store", type=_FOLDER,
    help="With --store-mode fetch: where nodes work; default: their folder for temporary files.",
)  # fmt: skip
@click.option(
    "--teacher-table", type=click.Choice(["auto", "off", "fp16", "fp32"]), default="auto",
    show_default=True, help="Look frozen networks up instead of running them, where that pays.",
)  # fmt: skip
@click.option(
    "--fold-seeds", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
    help="Train the seeds of a cell as one network; auto: where it is measured to be faster.",
)  # fmt: skip
@click.option("--compile", is_flag=True, help="Compile the networks; costs a minute for each.")
@click.option(
    "--exact", is_flag=True,
    help="No shortcut that changes a bit: live teachers, seeds apart, one worker.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the plan, its cost and its time; run nothing.")
@click.option(
    "--tracking", type=click.Choice(["wandb", "none"]), default="wandb", show_default=True,
    help="Mirror to Weights & Biases (offline without a login), or not.",
)  # fmt: skip
@click.option(
    "--project", default="smskd-bench", show_default=True, envvar="WANDB_PROJECT",
    help="Weights & Biases project.",
)  # fmt: skip
@click.option("--retry-failed", is_flag=True, help="Try stage runs again that diverged.")
@click.option("--download", is_flag=True, help="Download missing data into --data-root.")
def run(dry_run: bool, **options: Any) -> None:
    """Train what is missing of a matrix, then show its table."""
    from smskd_bench import running
    from smskd_bench.terminal import Terminal

    request = running.request(**options)
    if dry_run:
        from smskd_bench.dry_run import dry_run as show

        show(request, Terminal(), Terminal(stderr=True))
    else:
        sys.exit(running.run(request, Terminal()))


@main.command()
@store_option
@click.option("--matrix", type=_FILE, help="Only the stage runs of this matrix.")
@only_option
def status(store: Path, matrix: Path | None, only: str | None) -> None:
    """Show what a store holds: done, running, stopped, failed."""
    from smskd_bench import status as status_command
    from smskd_bench.terminal import Terminal

    status_command.report(store, matrix, only, Terminal())


@main.command()
@matrix_option
@store_option
@only_option
@click.option(
    "--format", "form", type=click.Choice(["table", "markdown", "csv", "json", "latex"]),
    default="table", show_default=True,
)  # fmt: skip
@click.option("--devices", is_flag=True, help="Every precision on every device instead.")
@click.option(
    "--picture", type=_FILE, help="Draw accuracy against latency: a .png, .svg or .html file."
)
@click.option("--pair", metavar="PATTERN", help="Only pairs whose name contains PATTERN.")
@click.option("--method", metavar="NAME", help="Only rows with this method in a stage.")
@click.option(
    "--sort", default="accuracy", show_default=True,
    type=click.Choice(
        ["accuracy", "difference", "spread", "latency", "parameters", "macs", "epochs", "name"]
    ),
    help="Order within a pair; # stays the rank by accuracy.",
)  # fmt: skip
@click.option(
    "--against", metavar="ROW|CELL", help="Compare all rows with this one, not their controls."
)
@margin_option
@click.option("--watch", is_flag=True, help="Show it again until the run is over; Ctrl-C ends.")
@click.option("--out", type=_FILE, help="Write the text of --format to this file.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.option(
    "--publish", type=click.Choice(["wandb"]),
    help="Send the whole board to Weights & Biases instead (docs/wandb.md).",
)  # fmt: skip
@click.option(
    "--project", default="smskd-bench", show_default=True, envvar="WANDB_PROJECT",
    help="With --publish: Weights & Biases project.",
)  # fmt: skip
@click.option(
    "--entity", envvar="WANDB_ENTITY", show_envvar=True,
    help="With --publish: person or team; default: that of the login.",
)  # fmt: skip
@click.option("--offline", is_flag=True, help="With --publish: record on disk, to send later.")
@click.option("--weights", is_flag=True, help="With --publish: weights and bundles go along.")
@click.pass_context
def leaderboard(ctx: click.Context, /, publish: str | None, **options: Any) -> None:
    """Rank the rows of a matrix from what the store holds."""
    from smskd_bench.terminal import Terminal

    sending = {name: options.pop(name) for name in ("project", "entity", "offline", "weights")}
    if publish:
        from smskd_bench.publishing import command

        _only_with_publish(ctx)
        same = {name: options[name] for name in ("matrix", "store", "margin")}
        command.publish(command.PublishRequest(**same, **sending), Terminal())
        return
    from smskd_bench.report import board

    _not_without_publish(ctx)
    board.show(board.BoardRequest(**options), Terminal())


def _typed(ctx: click.Context, names: tuple[str, ...]) -> list[str]:
    """Options of these names that are on the command line."""
    given = click.core.ParameterSource.COMMANDLINE
    return [f"--{n}" for n in names if ctx.get_parameter_source(n) is given]


def _only_with_publish(ctx: click.Context) -> None:
    """A board is published whole, so that no row is ranked among some of the others."""
    names = ("only", "form", "devices", "picture", "pair", "method", "sort", "against", "watch",
             "out", "force")  # fmt: skip
    if typed := _typed(ctx, names):
        named = ", ".join("--format" if name == "--form" else name for name in typed)
        raise click.UsageError(f"--publish sends the whole board; leave out: {named}")


def _not_without_publish(ctx: click.Context) -> None:
    if typed := _typed(ctx, ("project", "entity", "offline", "weights")):
        raise click.UsageError(f"only with --publish wandb: {', '.join(typed)}")


@main.command()
@click.option(
    "--html", type=_FOLDER, required=True, help="Folder to write; its index.html opens from disk."
)
@click.option(
    "--matrix", "matrices", type=_FILE, multiple=True,
    default=[Path("leaderboards/quickstart.yaml")], show_default="leaderboards/quickstart.yaml",
    help="Matrix file; may be repeated, for a site of several boards.",
)  # fmt: skip
@store_option
@margin_option
@click.option("--force", is_flag=True, help="Replace a site that is there.")
def report(**options: Any) -> None:
    """Write a web page of boards, rows, claims and pictures, from the store alone."""
    from smskd_bench.site import command
    from smskd_bench.terminal import Terminal

    command.build(command.SiteRequest(**options), Terminal(), Terminal(stderr=True))


@main.command()
@click.argument("cell")
@matrix_option
@store_option
@data_option
@click.option("--stage", type=click.IntRange(min=1), help="Train this stage; default: the last.")
@click.option("--all-stages", is_flag=True, help="Train everything again, teachers included.")
@click.option(
    "--scratch", type=_FOLDER,
    help="Work there and keep it, so that a stopped one goes on; default: in the store.",
)  # fmt: skip
def verify(**options: Any) -> None:
    """Train CELL (pair/row/s0; pair/row: all seeds) again from its record, and compare."""
    from smskd_bench import verifying
    from smskd_bench.terminal import Terminal

    sys.exit(verifying.verify(verifying.VerifyRequest(**options), Terminal()))


@main.command()
@click.option(
    "--matrix", "matrices", multiple=True, type=_FILE,
    help="Keep what this file refers to; may be repeated. Without: only leftovers.",
)  # fmt: skip
@store_option
@click.option("--delete", is_flag=True, help="Delete what is listed, instead of listing only.")
def gc(**options: Any) -> None:
    """List, or delete, what no matrix refers to and what killed processes left."""
    from smskd_bench import tidying
    from smskd_bench.terminal import Terminal

    tidying.tidy(tidying.TidyRequest(**options), Terminal())


@main.command()
@store_option
def migrate(store: Path) -> None:
    """Bring a store of an older version to the format of this one."""
    from smskd_bench import migrating
    from smskd_bench.terminal import Terminal

    migrating.migrate(store, Terminal())


@main.command()
@matrix_option
@store_option
@only_option
@click.option(
    "--difference", type=click.FloatRange(min=0.0, min_open=True), metavar="POINTS", required=True,
    help="Size of the difference that is to be shown.",
)  # fmt: skip
@click.option(
    "--power", type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True), default=0.8,
    show_default=True, help="Chance that it is shown if it is there.",
)  # fmt: skip
@click.option("--pair", metavar="PATTERN", help="Only pairs whose name contains PATTERN.")
@click.option(
    "--format", "form", type=click.Choice(["table", "markdown", "json"]), default="table",
    show_default=True,
)  # fmt: skip
def seeds(**options: Any) -> None:
    """Tell how many seeds a claim needs, from the spread seen so far."""
    from smskd_bench.report import seed_plan
    from smskd_bench.terminal import Terminal

    seed_plan.show(seed_plan.SeedsRequest(**options), Terminal())


@main.command()
@matrix_option
@store_option
@click.option("--published", is_flag=True, help="Our numbers beside published ones instead.")
@click.option(
    "--claims", "ledger", type=_FILE, help="Another file of claims than the repository's."
)
@margin_option
@click.option(
    "--format", "form", type=click.Choice(["table", "markdown", "json"]), default="table",
    show_default=True,
)  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="Also what was not run.")
def claims(**options: Any) -> None:
    """Show what the store says about each claim of SMSKD, or about published numbers."""
    from smskd_bench.report import claim_board
    from smskd_bench.terminal import Terminal

    claim_board.show(claim_board.ClaimsRequest(**options), Terminal())


@main.command("list")
@click.argument(
    "kind", type=click.Choice(["methods", "models", "datasets", "targets", "published"])
)
def list_names(kind: str) -> None:
    """List what a matrix or an export can name; published: what papers report."""
    from smskd_bench.listing import lines

    for line in lines(kind):
        click.echo(line)


@main.command("import")
@click.argument("file", type=_FILE)
@click.option("--model", required=True, help="A name from `list models`.")
@click.option(
    "--classes", type=click.IntRange(min=1), required=True, help="Classes it tells apart."
)
@click.option("--out", type=_FILE, required=True, help="File to write, e.g. teacher.safetensors.")
@click.option(
    "--channels", type=click.IntRange(min=1), default=3, show_default=True,
    help="Channels of its images.",
)  # fmt: skip
@click.option(
    "--image-size", type=click.IntRange(min=1),
    help="Side of its images, for models that are made for one size.",
)  # fmt: skip
def import_weights(**options: Any) -> None:
    """Turn a published checkpoint into weights that a matrix can name; no code in it is run."""
    from smskd.printable import printable
    from smskd_bench import importing

    for line in importing.import_file(importing.ImportRequest(**options)):
        click.echo(printable(line))


@main.command()
@click.argument("dataset")
@data_option
def fetch(dataset: str, data_root: Path | None) -> None:
    """Download a data set into --data-root, unless it is there; check it either way."""
    from smskd.datasets import load_dataset

    data = load_dataset(dataset, data_root, download=True)
    click.echo(
        f"{dataset}: {len(data.train.labels):,} training and {len(data.test.labels):,} test images"
    )


@main.command()
@store_option
@data_option
def doctor(store: Path, data_root: Path | None) -> None:
    """Check versions, devices, data and login; say what is missing and how to get it."""
    from smskd_bench import doctor as doctor_command
    from smskd_bench.terminal import Terminal

    sys.exit(doctor_command.report(store, data_root, Terminal()))


_DEVICE_OPTIONS = (
    click.option(
        "--device", metavar="USER@HOST",
        help="Measure there, through the system's OpenSSH; default: this machine.",
    ),
    click.option("--quick", is_flag=True, help="Shorten the measurement; such numbers never rank."),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; else the target's."),
    click.option("--precision", "precisions", multiple=True, help="Only this; may be repeated."),
    click.option(
        "--allow", multiple=True, metavar="REQUIREMENT",
        help="Measure although this is not met, e.g. power_mode; the rows say so and never rank.",
    ),
    click.option("--python", help="Interpreter there; default: python3, and ours here."),
    click.option("--energy/--no-energy", default=True, help="Read power where the device can."),
    click.option("--resume", is_flag=True, help="Fetch what a lost link left, no more."),
)  # fmt: skip


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of everything that measures."""
    for option in reversed(_DEVICE_OPTIONS):
        command = option(command)
    return command


@main.command()
@click.option(
    "--matrix", type=_FILE, default=Path("leaderboards/quickstart.yaml"), show_default=True,
    help="Matrix file whose students are exported.",
)  # fmt: skip
@click.option("--target", required=True, help="A name from `list targets`, or a profile file.")
@store_option
@data_option
@click.option("--cell", "cells", multiple=True, help="Cell to export; default: the best row's.")
@device_options
@click.option("--again", is_flag=True, help="Measure again what was measured already.")
@click.option("--archive", type=_FILE, help="Also write bundle and test set into one .tar file.")
@click.option(
    "--tracking", type=click.Choice(["wandb", "none"]), default="wandb", show_default=True,
    help="Mirror to Weights & Biases (offline without a login), or not.",
)  # fmt: skip
@click.option(
    "--project", default="smskd-bench", show_default=True, envvar="WANDB_PROJECT",
    help="Weights & Biases project.",
)  # fmt: skip
def export(**options: Any) -> None:
    """Export students to ONNX in every precision, check them, and measure them on a device."""
    from smskd_bench import exporting
    from smskd_bench.terminal import Terminal

    sys.exit(exporting.export(exporting.request(**options), Terminal()))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@device_options
@click.option("--test-set", type=_FOLDER, help="Test images, where the bundle has none beside it.")
@click.option("--out", type=_FOLDER, help="Folder of the measurements of this bundle.")
def measure(bundle: Path, test_set: Path | None, out: Path | None, **options: Any) -> None:
    """Measure an exported BUNDLE (folder or .tar) here or on a device; needs no torch."""
    from smskd_bench.device_runs import MeasureRequest, measure_file
    from smskd_bench.terminal import Terminal

    sys.exit(measure_file(bundle, MeasureRequest(**options), test_set, out, Terminal()))


if __name__ == "__main__":
    main()
