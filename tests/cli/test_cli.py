"""The command line as a user meets it: real processes, exit codes, one message and no traceback."""

import csv
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import click
import pytest
from command import PATHS, ROOT, Bench, Done, finish, results, tiny
from smskd_bench.cli import main
from smskd_bench.store import Store
from smskd_export import list_targets

from smskd.datasets import DATASETS
from smskd.methods import METHODS, MODIFIERS
from smskd.models import MODELS

COMMANDS = [
    "run",
    "status",
    "leaderboard",
    "report",
    "verify",
    "gc",
    "migrate",
    "seeds",
    "claims",
    "list",
    "import",
    "fetch",
    "doctor",
    "export",
    "measure",
]
HEAVY = [
    "torch",
    "numpy",
    "wandb",
    "tensorrt",
    "onnx",
    "onnxruntime",
    "pydantic",
    "rich",
    "yaml",
    "sklearn",
    "submitit",
    "jinja2",
    "plotly",
    "matplotlib",
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def matrix(bench):
    rows = [["scratch"], ["kd"], {"stages": ["fitnet", "kd"], "controls": ["kd"]}]
    return bench.matrix(tiny(*rows))


@pytest.fixture(scope="module")
def here(bench):
    """The command line inside this process, which has torch already; for what starts nothing."""

    def call(*words, expect=0, **env):
        out, err, began = io.StringIO(), io.StringIO(), time.perf_counter()
        with (
            mock.patch.dict(os.environ, bench.environment(**env), clear=True),
            redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended,
        ):  # fmt: skip
            main([str(word) for word in words], prog_name="smskd-bench")
        done = Done(
            ended.value.code or 0, out.getvalue(), err.getvalue(), time.perf_counter() - began
        )
        assert done.code == expect, done.text
        return done

    return call


def refused(done, *words):
    """One message on standard error, nothing on standard output."""
    assert done.err.startswith("error: ") or "Error: " in done.err, done.err
    assert len(done.err.splitlines()) <= 5, done.err
    for word in words:
        assert word in done.err, done.err


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(bench, command, capsys):
    began = time.perf_counter()
    done = finish(bench.start(*([command] if command else []), "--help"))
    seconds = time.perf_counter() - began
    with capsys.disabled():
        print(f"\n{command or 'smskd-bench'} --help: {seconds:.2f} s", end="")
    assert done.out.startswith("Usage:")
    assert not done.err
    assert max(map(len, done.out.splitlines())) <= 80
    if not command:
        assert all(f"  {name} " in done.out for name in COMMANDS)


LOADED = f"""
import sys
from smskd_bench.cli import main
for words in {[[], *([c] for c in COMMANDS)]!r}:
    try:
        main([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0
try:
    main(["--version"])
except SystemExit:
    pass
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""


def test_help_and_version_load_nothing_heavy(bench):
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        env=bench.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_version(bench):
    from smskd._version import __version__

    assert finish(bench.start("--version")).out == f"smskd-bench, version {__version__}\n"


def test_short_help_and_no_command(here):
    assert here("-h").out == here("--help").out
    assert "Usage:" in here(expect=2).text


MEASURING = [
    ("--device", None, None), ("--quick", None, False), ("--threads", None, None), ("--precision", None, None),
    ("--allow", None, None), ("--python", None, None), ("--energy", None, True), ("--resume", None, False),
]  # fmt: skip
PROJECT = ("--project", "WANDB_PROJECT", "smskd-bench")
STORE = ("--store", "SMSKD_STORE", "runs")
DATA = ("--data-root", "SMSKD_DATA", None)
FORMAT = ("--format", None, "table")
MATRIX, ONLY = ("--matrix", None, "required"), ("--only", None, None)
FROZEN = {
    "run": [
        MATRIX, STORE, DATA, ONLY, ("--device", None, "auto"), ("--threads", None, None), ("--workers", "SMSKD_WORKERS", "auto"),
        ("--executor", None, "local"), ("--slurm-jobs", None, None), ("--slurm-option", None, None),
        ("--address", None, None), ("--gpus-per-stage-run", None, None),
        ("--store-mode", None, "shared"), ("--node-store", None, None),
        ("--teacher-table", None, "auto"), ("--fold-seeds", None, "auto"), ("--compile", None, False), ("--exact", None, False), ("--dry-run", None, False),
        ("--tracking", None, "wandb"), ("--project", "WANDB_PROJECT", "smskd-bench"), ("--retry-failed", None, False),
        ("--download", None, False),
    ],
    "status": [STORE, ("--matrix", None, None), ONLY],
    "verify": [
        ("cell", None, "required"), MATRIX, STORE, DATA, ("--stage", None, None), ("--all-stages", None, False), ("--scratch", None, None),
    ],
    "gc": [("--matrix", None, None), STORE, ("--delete", None, False)],
    "migrate": [STORE],
    "leaderboard": [
        MATRIX, STORE, ONLY, FORMAT, ("--devices", None, False), ("--picture", None, None), ("--pair", None, None), ("--method", None, None),
        ("--sort", None, "accuracy"), ("--against", None, None), ("--margin", None, None), ("--watch", None, False), ("--out", None, None),
        ("--force", None, False), ("--publish", None, None), PROJECT, ("--entity", "WANDB_ENTITY", None), ("--offline", None, False),
        ("--weights", None, False),
    ],
    "report": [("--html", None, "required"), ("--matrix", None, None), STORE, ("--margin", None, None), ("--force", None, False)],
    "seeds": [MATRIX, STORE, ONLY, ("--difference", None, "required"), ("--power", None, None), ("--pair", None, None), FORMAT],
    "claims": [MATRIX, STORE, ("--published", None, False), ("--claims", None, None), ("--margin", None, None), FORMAT, ("--all", None, False)],
    "list": [("kind", None, "required")],
    "import": [
        ("file", None, "required"), ("--model", None, "required"), ("--classes", None, "required"), ("--out", None, "required"),
        ("--channels", None, None), ("--image-size", None, None),
    ],
    "fetch": [("dataset", None, "required"), DATA],
    "doctor": [STORE, DATA],
    "export": [
        ("--matrix", None, "leaderboards/quickstart.yaml"), ("--target", None, "required"), STORE, DATA, ("--cell", None, None), *MEASURING,
        ("--again", None, False), ("--archive", None, None), ("--tracking", None, "wandb"), PROJECT,
    ],
    "measure": [("bundle", None, "required"), *MEASURING, ("--test-set", None, None), ("--out", None, None)],
}  # fmt: skip


def option(parameter):
    default = parameter.default
    if parameter.required:
        value = "required"
    elif getattr(parameter, "is_flag", False):
        value = default is True
    else:  # click has marked "no default" in several ways
        value = str(default) if isinstance(default, str | Path) else None
    return (parameter.opts[0], parameter.envvar, value)


def test_options_of_a_cluster_go_together(here, tmp_path):
    run = ("run", "--matrix", tmp_path / "none.yaml")
    refused(
        here(*run, "--address", "h:1", expect=2),
        "--address is for a Ray cluster",
        "add --executor ray",
    )
    apart = (*run, "--executor", "ray", "--node-store", tmp_path)
    refused(here(*apart, expect=2), "--node-store", "--store-mode fetch")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_ray_that_is_missing_gives_one_message(bench, tmp_path):
    run = (
        "run",
        "--matrix",
        bench.matrix(tiny(["scratch"])),
        "--store",
        tmp_path / "store",
        "--executor",
        "ray",
    )
    refused(
        bench(*run, expect=2),
        "--executor ray needs the package ray",
        "pip install 'smskd-bench[ray]'",
    )


def test_the_options_are_frozen():
    # A change here is a change that users see: CHANGELOG, and keep the old spelling working.
    context = click.Context(main)
    found = {
        name: [option(p) for p in main.get_command(context, name).params]
        for name in main.list_commands(context)
    }
    assert found == {name: FROZEN[name] for name in sorted(FROZEN)}


# ------------------------------------------------------------------------------------------- list


KINDS = {
    "methods": [*METHODS, *MODIFIERS],
    "models": list(MODELS),
    "datasets": list(DATASETS),
    "targets": list_targets(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_list(here, kind):
    out = here("list", kind).out
    for name in KINDS[kind]:
        assert any(line.split()[:1] == [name] for line in out.splitlines()), name
    assert max(map(len, out.splitlines())) <= 140


def test_list_of_nothing_known(here):
    refused(here("list", "modles", expect=2), "'modles' is not one of", "models")


# ----------------------------------------------------------------------------------------- doctor


def test_doctor_without_data(here, bench):
    done = here("doctor", "--store", bench.folder / "none")
    for word in (
        "machine",
        "torch",
        "onnxruntime",
        "devices",
        "data digits",
        "data cifar10",
        "data cifar100",
        "tracking",
        "store",
    ):
        assert word in done.out
    assert "smskd-bench fetch cifar100 --data-root DIR" in done.out
    assert "not logged in" in done.out
    assert "PROBLEM" not in done.out
    assert not (bench.folder / "none").exists()


def test_doctor_with_broken_data_and_a_newer_store(bench):
    data, store = bench.folder / "data", bench.folder / "newer"
    (data / "cifar-100-binary").mkdir(parents=True)
    for name in ("train.bin", "test.bin"):
        (data / "cifar-100-binary" / name).write_bytes(b"short")
    store.mkdir()
    (store / "store.json").write_text('{"format": 99}')
    done = bench("doctor", SMSKD_DATA=str(data), SMSKD_STORE=str(store), expect=3)
    line = next(line for line in done.out.splitlines() if "data cifar100" in line)
    assert "train.bin" in line or "test.bin" in line
    assert line.startswith("PROBLEM")
    assert "PROBLEM store" in done.out
    assert "has format 99" in done.out


def test_fetch_checks_what_is_there(here):
    assert "1,000 training and 797 test images" in here("fetch", "digits").out
    refused(here("fetch", "digts", expect=2), "unknown dataset 'digts'", "did you mean 'digits'")


def test_a_data_folder_that_is_a_file(here, matrix):
    refused(here("doctor", SMSKD_DATA=str(matrix), expect=2), "SMSKD_DATA", "is a file")


# ------------------------------------------------------------------------- an empty or missing store


def test_status_of_a_store_that_is_not_there(here, bench, matrix):
    store = bench.folder / "missing"
    assert "nothing yet (0 stage runs)" in bench("status", "--store", store).out
    out = here("status", "--store", store, "--matrix", matrix).out.splitlines()
    assert out == ["tiny: 0 of 3 cells done", f"{store}: 5 missing (5 stage runs)"]
    assert not store.exists()


def test_status_of_a_store_with_odd_folders(here, bench):
    """Killed before the specification was written; of another form; damaged."""
    store = Store.open(bench.folder / "odd")
    for key, text in (("a" * 64, None), ("b" * 64, '{"key": "x", "schema": 9}'), ("c" * 64, "{")):
        store.folder(key).mkdir(parents=True)
        (store.folder(key) / "failed.json").write_text(
            '{"status": "failed", "reason": "why [not]", "epoch": 0}'
        )
        if text:
            (store.folder(key) / "spec.json").write_text(text)
    out = here("status", "--store", store.root).out
    assert "2 failed (2 stage runs)" in out
    assert out.count("(no readable spec.json): failed: why [not]") == 2


def test_leaderboard_of_an_empty_store_in_all_formats(here, bench, matrix):
    store = bench.folder / "missing"
    rows = ["scratch", "kd", "fitnet>kd"]
    words = ("leaderboard", "--matrix", matrix, "--store", store)
    table = here(*words).out
    assert all(row in table for row in rows)
    assert "not trained yet" in table
    markdown = here(*words, "--format", "markdown").out
    assert "| 1 | scratch | student | - |" in markdown
    found = list(csv.DictReader(io.StringIO(here(*words, "--format", "csv").out)))
    assert [line["row"] for line in found] == rows
    assert {line["status"] for line in found} == {"missing"}
    (found,) = json.loads(here(*words, "--format", "json", "--only", "fitnet").out)
    assert (found["row"], found["mean"], found["versus"]) == ("fitnet>kd", None, None)
    assert not store.exists()


def test_leaderboard_options_that_are_wrong(here, bench, matrix):
    words = ("leaderboard", "--matrix", matrix, "--store", bench.folder / "missing")
    refused(here(*words, "--method", "fitnett", expect=2), "did you mean 'fitnet'")
    refused(here(*words, "--pair", "vgg", expect=2), "no row has the pair 'vgg'")
    refused(here(*words, "--against", "kdd", expect=2), "no row or cell is named 'kdd'", "'kd'")
    refused(here(*words, "--sort", "luck", expect=2), "'luck' is not one of")
    refused(here(*words, "--margin", "0", expect=2), "--margin")
    refused(here(*words, "--watch", "--devices", expect=2), "--watch shows the table only")
    refused(here(*words, "--out", bench.folder / "x.md", expect=2), "add --format")
    mine = bench.folder / "mine.csv"
    mine.write_text("mine")
    words = (*words, "--format", "csv", "--out", mine)
    refused(here(*words, expect=3), "is there already", "--force")
    assert mine.read_text() == "mine"
    assert here(*words, "--force").out == f"written: {mine}\n"
    assert mine.read_text().startswith("pair,row,")


def test_claims_and_seeds_of_an_empty_store(here, bench, matrix):
    board, store = ROOT / "leaderboards" / "quickstart.yaml", bench.folder / "missing"
    out = here("claims", "--matrix", board, "--store", store).out
    assert "The frozen student of the stage before, as a reference, helps" in out
    assert "not run" in out
    words = ("--matrix", matrix, "--store", store)
    refused(here("claims", *words, expect=2), "no claim names rows of the matrix tiny")
    refused(
        here("claims", *words, "--published", expect=2), "no published number", "list published"
    )
    refused(here("claims", *words, "--claims", bench.folder / "no.yaml", expect=2), "no such file")
    refused(here("seeds", *words, "--difference", "0.3", expect=3), "no spread is known", "run")
    refused(here("seeds", *words, expect=2), "Missing option '--difference'")
    assert not store.exists()


def test_dry_run(here, bench, matrix):
    store = bench.folder / "missing"
    done = here("run", "--matrix", matrix, "--store", store, "--dry-run")
    assert "cells       3" in done.out
    assert "stage runs  5 (of 7 if every cell ran alone)" in done.out
    assert "left        5 stage runs, 15 epochs" in done.out
    assert "predicted   " in done.out
    assert "+ reference tables" in done.out
    assert done.err.startswith("measuring the speed of this device")
    assert not store.exists()


def test_dry_run_of_the_quickstart(here, bench):
    board = ROOT / "leaderboards" / "quickstart.yaml"
    out = here("run", "--matrix", board, "--store", bench.folder / "missing", "--dry-run").out
    assert "cells       48\n" in out
    assert "stage runs  55 (of 135 if every cell ran alone)\n" in out
    assert "tables      10 of 10 frozen networks are worth one" in out


# --------------------------------------------------------------------------------------- refusals


def test_wrong_requests_are_status_2(here, bench, matrix):
    store = bench.folder / "untouched"
    run = ("run", "--matrix", matrix, "--store", store, "--tracking", "none")
    refused(here("run", expect=2), "Missing option '--matrix'")
    refused(
        here("run", "--matrix", bench.folder / "matrx.yaml", expect=2), "no such file", str(matrix)
    )
    refused(here("run", "--matrix", bench.folder, expect=2), "is a directory")
    refused(
        here(*run, "--only", "resnet8_half>resnet8_quarter/fitnt>kd/s0", expect=2),
        "no cell matches",
        "did you mean",
        "fitnet>kd/s0",
    )
    refused(here(*run, "--device", "cudda", expect=2), "'cudda' is no device", "cuda:N")
    refused(here(*run, "--device", "mps", expect=2), "'mps' is not supported")
    refused(here(*run, "--device", "", expect=2), "'' is no device")
    refused(here(*run, "--threads", "0", expect=2), "--threads")
    for number in ("0", "-1", "two", ""):
        refused(here(*run, "--workers", number, expect=2), "--workers", "neither auto nor a number")
    refused(here(*run, "--trackng", "none", expect=2), "--tracking")
    refused(
        here("export", "--matrix", matrix, "--target", "cpuu", "--store", store, expect=2),
        "did you mean 'cpu'",
    )
    assert not (store / "stages").exists() or not list((store / "stages").iterdir())


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="somebody chose devices")
def test_cuda_without_cuda(here, bench, matrix):
    # An empty list of devices is a machine without a GPU, also where there is one.
    words = ("run", "--matrix", matrix, "--store", bench.folder / "untouched")
    done = here(*words, "--device", "cuda", expect=2, CUDA_VISIBLE_DEVICES="")
    refused(done, "no CUDA device", "--device cpu")


def test_a_bad_matrix_is_status_2_and_lists_everything(here, bench):
    file = bench.matrix(tiny(["kdd"], ["kd"], name=3, seeds=[]), "bad")
    done = here("run", "--matrix", file, expect=2)
    refused(done, "3 problems", "name: input", "seeds: is empty", "did you mean 'kd'")
    assert f"{file}:2: name: input" in done.err


def test_refused_requests_are_status_3(here, bench, matrix):
    blocked = matrix / "runs"
    done = bench.run(matrix, blocked, expect=3)
    refused(done, str(blocked), "--store DIR")
    done = here(
        "export", "--matrix", matrix, "--target", "cpu", "--store", bench.folder / "empty", expect=3
    )
    refused(done, "no student of tiny is trained yet", "smskd-bench run --matrix")
    cifar = bench.matrix(tiny(["kd"], dataset={"name": "cifar100"}), "cifar")
    store = bench.folder / "no data"
    done = here(
        "run", "--matrix", cifar, "--store", store, "--data-root", bench.folder / "home", expect=3
    )
    refused(done, "cifar100", "--data-root DIR or SMSKD_DATA")
    assert not list(store.glob("stages/*"))


def test_a_store_that_is_a_file_is_status_2(here, matrix):
    refused(here("run", "--matrix", matrix, "--store", matrix, expect=2), "--store", "is a file")


# ----------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_and_on(here, bench):
    file = bench.matrix(tiny(["kd"], teacher={"epochs": 80}), "interrupted")
    store = bench.folder / "interrupted"
    process = bench.start_run(file, store)
    until = time.monotonic() + 60
    while not list(store.glob("stages/*/*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    done = finish(process, expect=130)
    said, command = done.err.strip().splitlines()
    assert said == "stopped; the same command goes on from the last checkpoint:"
    assert f"smskd-bench run --matrix {file} --store {store}" in command
    assert not list(store.glob("stages/*/*/result.json"))
    assert not list(store.rglob("*.tmp"))
    assert not list(store.rglob("failed.json"))
    assert "1 stopped" in here("status", "--store", store).out
    done = bench.run(file, store)
    assert "2 stage runs trained, 0 already there, 0 failed" in done.out
    assert all(line in done.out for line in ("resnet8_half scratch s0", "resnet8_quarter kd s0"))
    sessions = results(store)["resnet8_half/scratch/s0"]["sessions"]
    assert [s["from_epoch"] > 0 for s in sessions] == [False, True]
    assert "2 done (2 stage runs)" in here("status", "--store", store).out
    assert (
        "0 stage runs trained, 2 already there, 0 failed"
        in here("run", "--matrix", file, "--store", store, "--tracking", "none").out
    )


def test_a_closed_pipe_is_no_traceback(bench):
    command = f"{sys.executable} -m smskd_bench.cli list methods | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], env=bench.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("name ")
    assert "Traceback" not in done.stderr


def test_a_terminal_that_knows_ascii_only(bench, matrix):
    store = bench.folder / "missing"
    done = bench("leaderboard", "--matrix", matrix, "--store", store, PYTHONIOENCODING="ascii")
    assert "fitnet>kd" in done.out


def test_the_installed_program_is_this_one():
    assert (ROOT / "pyproject.toml").read_text().count('smskd-bench = "smskd_bench.cli:main"') == 1
    assert all(str(ROOT) in path for path in PATHS)
