"""Rules that hold over all packages: who imports whom, documentation, the public surface, sizes."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import smskd

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "smskd": ROOT / "smskd",
    "smskd_export": ROOT / "export" / "smskd_export",
    "smskd_bench": ROOT / "bench" / "smskd_bench",
}
MAY_IMPORT = {
    "smskd": {"smskd"},
    "smskd_export": {"smskd", "smskd_export"},
    "smskd_bench": {"smskd", "smskd_export", "smskd_bench"},
}
LIBRARY_NEEDS = {"torch", "numpy", "sklearn"}
LONGEST_FUNCTION = 60
"""Lines of one function, its docstring not counted."""

PUBLIC = [
    "Agreement", "Augmentation", "Batch", "Batches", "Evaluation", "FixedSet", "LoaderBatches",
    "Method", "Modifier", "Needs", "Normalisation", "Optimizer", "Outputs", "PairShapes", "Part",
    "Reference", "ResidentBatches", "Schedule", "Shapes", "Signals", "SmskdError", "Stage",
    "StageReport", "Taps", "Terms", "Weighting", "__version__", "distill",
]  # fmt: skip
"""Changing this list changes the interface that users' code relies on."""

FILES = [
    pytest.param(package, path, id=path.relative_to(ROOT).as_posix())
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
]
every_file = pytest.mark.parametrize(("package", "path"), FILES)


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    """Top-level names of all imported packages; relative imports as '.'."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0] if node.level == 0 else ".")
    return names


def imported_on_import(tree):
    """Like imported(), but only what importing the file itself runs."""
    names, todo = set(), list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= imported(ast.Module([node], []))
        todo += list(ast.iter_child_nodes(node))
    return names


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def code_lines(function):
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        text = function.body[0]
        lines -= text.end_lineno - text.lineno + 1
    return lines


@every_file
def test_imports_go_one_way(package, path):
    names = imported(parsed(path))
    assert "." not in names, "write imports in full"
    assert names & set(PACKAGES) <= MAY_IMPORT[package]


@every_file
def test_optional_packages_stay_behind_their_doors(package, path):
    names = imported(parsed(path))
    if path != PACKAGES["smskd"] / "torchvision_bridge.py":
        assert "torchvision" not in names
    if not (package == "smskd_bench" and path.name.startswith("wandb")):
        assert "wandb" not in names
    assert not {"tensorrt", "ray"} & imported_on_import(parsed(path))
    if not (package == "smskd_bench" and path.name.startswith("ray_")):
        assert "ray" not in names


@every_file
def test_no_module_is_a_drawer(package, path):
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}


@every_file
def test_functions_are_short(package, path):
    long = {
        f.name: code_lines(f) for f in functions(parsed(path)) if code_lines(f) > LONGEST_FUNCTION
    }
    assert not long


@every_file
def test_library_needs_little(package, path):
    if package == "smskd":
        known = LIBRARY_NEEDS | {"smskd"} | sys.stdlib_module_names
        assert imported(parsed(path)) <= known


def undocumented(body, where=""):
    """Public functions, methods and classes without a docstring."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield f"{where}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{node.name}.")


@every_file
def test_everything_public_is_documented(package, path):
    tree = parsed(path)
    assert ast.get_docstring(tree), "the module has no docstring"
    assert list(undocumented(tree.body)) == []


def test_public_surface():
    assert smskd.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(smskd) == PUBLIC
    for name in PUBLIC:
        assert not hasattr(getattr(smskd, name), "__path__"), f"{name} is a package"
        assert type(getattr(smskd, name)).__name__ != "module", f"{name} is a module"


def test_public_names_are_no_submodules():
    # Python would put the submodule in the name's place as soon as it is imported.
    submodules = {path.stem for path in PACKAGES["smskd"].iterdir()}
    assert not submodules & set(PUBLIC)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = smskd.nothing


@pytest.mark.parametrize("module", ["smskd", "smskd.errors", "smskd.settings", "smskd.schedule"])
def test_light_modules_do_not_load_torch(module):
    importlib.import_module(module)
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
