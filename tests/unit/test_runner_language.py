"""The device runner is one file of Python 3.8 that needs numpy and nothing of this project."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runner_bundle import make_bundle, make_test_set, named, run_process
from smskd_export.runner import RUNNER

TREE = ast.parse(RUNNER.read_text(encoding="utf-8"), feature_version=(3, 8))
NEWER = {"removeprefix", "removesuffix", "file_digest", "readlink", "is_relative_to", "bit_count"}
"""Attributes that Python or its libraries have only after 3.8."""


def python38():
    """A real Python 3.8 of this machine, or None."""
    places = [os.environ.get("SMSKD_PYTHON38", ""), shutil.which("python3.8") or ""]
    places += map(str, sorted(Path.home().glob(".pyenv/versions/3.8*/bin/python")))
    for place in filter(None, places):
        done = subprocess.run([place, "--version"], capture_output=True, text=True, check=False)
        if done.stdout.startswith("Python 3.8"):
            return place
    return None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    return make_bundle(folder / "bundle", make_test_set(folder / "tests"))


def test_imports_are_the_standard_library_and_numpy():
    names = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    assert names - {"numpy"} <= sys.stdlib_module_names


def test_importing_it_loads_no_runtime():
    code = (
        f"import sys; sys.path.insert(0, {str(RUNNER.parent)!r}); import run; "
        "print(sorted(m for m in sys.modules if m in "
        "('onnxruntime', 'tensorrt', 'torch', 'onnx', 'smskd', 'smskd_export', 'pydantic')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_newer_than_python_3_8_is_used():
    used = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    assert not used & (NEWER - {"readlink"})
    links = [n for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and n.attr == "readlink"]
    assert all(isinstance(n.value, ast.Name) and n.value.id == "os" for n in links)
    assert not any(isinstance(node, ast.Match) for node in ast.walk(TREE))
    calls = [n for n in ast.walk(TREE) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    strict = [k for n in calls if n.func.id == "zip" for k in n.keywords]
    assert not strict


def test_annotations_are_never_evaluated():
    first = next(n for n in TREE.body if isinstance(n, ast.ImportFrom))
    assert first.module == "__future__"
    assert [alias.name for alias in first.names] == ["annotations"]


def test_it_is_ascii_and_names_no_version_of_tensorrt_in_a_condition():
    text = RUNNER.read_text(encoding="utf-8")
    assert text.isascii()
    conditions = [n.test for n in ast.walk(TREE) if isinstance(n, ast.If | ast.IfExp | ast.While)]
    assert not [c for c in conditions if "__version__" in ast.unparse(c)]


def test_real_python_3_8_compiles_it_and_without_numpy_it_says_so(bundle, tmp_path):
    python = python38()
    if python is None:
        pytest.skip("no Python 3.8 on this machine")
    probe = [python, "-c", "import numpy"]
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        pytest.skip("this Python 3.8 has numpy")
    status, events, errors = run_process(bundle, "--probe", python=python, cache=tmp_path)
    assert (status, errors) == (3, "")
    assert [event["event"] for event in events] == ["refused", "end"]
    assert events[0]["code"] == "runtime_missing"
    assert "numpy" in events[0]["message"]


@pytest.mark.slow
def test_real_python_3_8_measures(bundle, tmp_path):
    python = python38()
    if python is None:
        pytest.skip("no Python 3.8 on this machine")
    home = tmp_path / "venv"
    subprocess.run([python, "-m", "venv", home], check=True)
    install = [home / "bin/python", "-m", "pip", "install", "-q", "numpy", "onnxruntime==1.19.2"]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip("numpy and onnxruntime cannot be installed for Python 3.8 here")
    words = ["--out", tmp_path / "out", "--test-set", bundle.parent / "tests"]
    python = home / "bin/python"
    status, events, errors = run_process(bundle, *words, python=python, cache=tmp_path / "c")
    assert (status, errors) == (0, "")
    assert named(events, "probe")[0]["probe"]["python"].startswith("3.8.")
    assert [row["row"]["status"] for row in named(events, "row")] == ["ok", "ok"]
