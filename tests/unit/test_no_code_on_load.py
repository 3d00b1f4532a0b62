"""Nothing that is loaded runs: no dangerous call in the source, and real pickles run nothing."""

import ast
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from matrices import plan_of
from smskd_bench.importing import ImportRequest, import_file, read_weights
from smskd_bench.store import CHECKPOINT, PREDICTIONS, WEIGHTS, Store
from smskd_export.arrays import read_array

from smskd.errors import SmskdError

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("smskd", "bench", "export", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
NEVER = {
    "eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.loads", "shelve.open", "dill.load", "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "torch.hub.load", "subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive",
    "pty.spawn", "runpy.run_path",
}  # fmt: skip
UNPACKS = {"extractall", "extract"}
"""Methods of tar and zip files; ours copy one member at a time to places of their own choice."""

ALLOWED = {
    # CIFAR's python form is a pickle; its Unpickler subclass knows arrays and plain values only.
    ("smskd/datasets/cifar.py", "pickle.Unpickler"),
}


def name_of(node):
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def dangers(tree):
    """Calls, and base classes, that could run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (name for base in node.bases if (name := name_of(base)) in NEVER)
        if not isinstance(node, ast.Call):
            continue
        name, words = name_of(node.func), {k.arg: k.value for k in node.keywords}
        if name in NEVER or name.rpartition(".")[2] in UNPACKS:
            yield name
        if name in ("torch.load", "load") and "weights_only" not in words and name == "torch.load":
            yield "torch.load"
        for option in ("shell", "allow_pickle", "weights_only"):
            value = words.get(option)
            safe = option == "weights_only"
            if value is not None and not (isinstance(value, ast.Constant) and value.value is safe):
                yield f"{option}={ast.unparse(value)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_dangerous_call(path):
    where = path.relative_to(ROOT).as_posix()
    found = {(where, name) for name in dangers(ast.parse(path.read_text(encoding="utf-8")))}
    assert found <= ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')", "os.system(x)", "pickle.loads(x)", "torch.load(x)", "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)", "run(x, shell=True)", "run(x, shell=y)", "tar.extractall(x)",
        "yaml.load(x, L)", "class A(pickle.Unpickler): pass",
    ],
)  # fmt: skip
def test_the_search_finds_them(code):
    assert list(dangers(ast.parse(code)))


class Evil:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


FORMS = {
    "a pickle": lambda evil, path: path.write_bytes(pickle.dumps(evil, protocol=2)),
    "a new pickle": lambda evil, path: path.write_bytes(pickle.dumps({"w": evil}, protocol=5)),
    "a file of torch.save": lambda evil, path: torch.save({"epoch": 1, "student": evil}, path),
    "an old file of torch.save": lambda evil, path: torch.save(
        {"epoch": 1, "student": evil}, path, _use_new_zipfile_serialization=False
    ),
    "an array of objects": lambda evil, path: path.write_bytes(array_of(evil, path)),
}
forms = pytest.mark.parametrize("form", FORMS)


def array_of(evil, path):
    beside = path.with_name("array.npy")
    np.save(beside, np.array([evil], dtype=object), allow_pickle=True)
    return beside.read_bytes()


def refused(act):
    with pytest.raises(SmskdError) as caught:
        act()
    assert len(str(caught.value).splitlines()) <= 3


@forms
def test_a_hostile_file_in_the_place_of_any_other(form, tmp_path):
    made, write, evil = tmp_path / "made", FORMS[form], Evil(tmp_path / "made")
    store, plan = Store.open(tmp_path / "runs"), plan_of()
    (key, *_) = plan.nodes
    folder = store.begin(plan.nodes[key])
    for name in (CHECKPOINT, WEIGHTS, PREDICTIONS, "result.json", "failed.json", "spec.json"):
        write(evil, folder / name)
    assert store.checkpoint(key) is None
    for read in (store.weights, store.predictions, store.result, store.failure):
        refused(lambda read=read: read(key))
    refused(lambda: store.spec_document(key))
    for name in ("teacher.pth", "teacher.safetensors", "classes.npy", "classes.npz"):
        write(evil, tmp_path / name)
        refused(lambda name=name: read_array(tmp_path / name))
        refused(lambda name=name: read_weights(tmp_path / name))
    request = ImportRequest(tmp_path / "teacher.pth", "resnet8", 10, tmp_path / "out.safetensors")
    refused(lambda: import_file(request))
    assert not made.exists()
    assert not (tmp_path / "out.safetensors").exists()


@forms
def test_the_hostile_files_are_real(form, tmp_path):
    """Read without care they make a folder; so the test above tests something."""
    path = tmp_path / "x"
    FORMS[form](Evil(tmp_path / "made"), path)
    if "array" in form:
        np.load(path, allow_pickle=True)
    elif "torch" in form:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert (tmp_path / "made").is_dir()
