"""The wheel holds what it should and nothing else, and runs where only it is installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from command import ROOT, Bench

NOT_SOURCE = (
    ".git", ".venv", "runs", "data", "build", "dist", "wandb", "*.egg-info", "__pycache__", ".*_cache",
)  # fmt: skip


def pip(*words, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, words)],
        cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    for module in ("pip", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed here; without it nothing can be built offline")
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    pip("wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, cwd=source)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_three_packages_and_their_data(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in files}
    (info,) = {name for name in tops if name.endswith(".dist-info")}
    assert tops - {info} == {"smskd", "smskd_bench", "smskd_export"}
    assert {f"{package}/py.typed" for package in tops - {info}} <= files
    folders = {
        "smskd": "smskd",
        "smskd_bench": "bench/smskd_bench",
        "smskd_export": "export/smskd_export",
    }
    for package, folder in folders.items():
        for suffix in ("py", "yaml", "js", "css", "txt", "j2"):
            ours = (ROOT / folder).rglob(f"*.{suffix}")
            wanted = {f"{package}/{path.relative_to(ROOT / folder).as_posix()}" for path in ours}
            assert wanted <= files, wanted - files
    assert f"{info}/licenses/LICENSE" in files


def test_the_installed_wheel_works_alone(wheel, tmp_path):
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    bench = Bench(tmp_path)
    environment = bench.environment(PYTHONPATH=str(target))
    where = "import smskd, smskd_bench, smskd_export as e; print(smskd.__file__, smskd_bench.__file__, e.__file__)"
    said = subprocess.run(
        [sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert [os.path.commonpath([target, path]) for path in said.stdout.split()] == [str(target)] * 3
    done = subprocess.run(
        [target / "bin" / "smskd-bench", "list", "targets"],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"cpu", "jetson"} <= {line.split()[0] for line in done.stdout.splitlines()}
