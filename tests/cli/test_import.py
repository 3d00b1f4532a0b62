"""``smskd-bench import`` as a user meets it: a published checkpoint becomes a matrix's teacher."""

import argparse
import hashlib
import os
import pickle

import pytest
import torch
from command import Bench, results, tiny
from safetensors.torch import load_file

from smskd.models import build_model

TEACHER = "resnet8_half"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("import"))


@pytest.fixture(scope="module")
def checkpoint(bench):
    """As the CRD code saves one, of a network that this project trained on digits."""
    torch.manual_seed(0)
    model = build_model(TEACHER, 10, 1)
    path = bench.folder / "resnet8_half_last.pth"
    options = argparse.Namespace(lr=0.05, lr_decay_epochs=[150, 180, 210], model=TEACHER)
    torch.save({"opt": options, "model": torch.nn.DataParallel(model).state_dict()}, path)
    return path


def words(file, out, model=TEACHER, classes=10, channels=1):
    asked = ("--model", model, "--classes", classes, "--channels", channels, "--out", out)
    return [str(word) for word in ("import", file, *asked)]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_message(done, *parts):
    assert done.err.startswith("error: "), done.err
    assert len(done.err.splitlines()) == 2, done.err
    assert not done.out
    for part in parts:
        assert part in done.err, done.err


def test_a_published_checkpoint_teaches(bench, checkpoint):
    out = bench.folder / "teacher.safetensors"
    done = bench(*words(checkpoint, out))
    assert done.err == ""
    assert f"{TEACHER} for 10 classes" in done.out
    assert f"{checkpoint}  sha256:{sha256(checkpoint)}" in done.out
    assert f"{out}  sha256:{sha256(out)}" in done.out
    state = torch.load(checkpoint, weights_only=False)["model"]
    written = load_file(out)
    assert all(torch.equal(written[k.removeprefix("module.")], v) for k, v in state.items())
    tops = []
    for name, file in (("direct", checkpoint), ("imported", out)):
        teacher = {"weights": {TEACHER: file.name}}
        matrix = bench.matrix(tiny(["kd"], teacher=teacher), name)
        bench.run(matrix, bench.folder / name)
        found = results(bench.folder / name)
        tops.append({stage: r["test"] for stage, r in found.items()})
        assert len(found) == 2
    assert tops[0] == tops[1]


def test_what_is_refused(bench, checkpoint):
    out, made = bench.folder / "never.safetensors", bench.folder / "made"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(made),)

    evil, page, empty, cut = (bench.folder / f"{n}.pth" for n in ("evil", "page", "empty", "cut"))
    evil.write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    page.write_text("<!DOCTYPE html><html>not found</html>")
    empty.write_bytes(b"")
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    cases = [
        (words(evil, out), ["evil.pth is refused", "mkdir"]),
        (words(page, out), ["page.pth is no checkpoint", "web page"]),
        (words(empty, out), ["empty.pth is no checkpoint: it is empty"]),
        (words(cut, out), ["cut.pth cannot be read, it is damaged"]),
        (words(checkpoint, out, classes=100), ["for 100 classes: they are for 10 classes"]),
        (words(checkpoint, out, "resnet8"), ["they fit resnet8_half for 10 classes"]),
        (words(checkpoint, out, "resnet9"), ["unknown model 'resnet9'"]),
        (words(bench.folder / "none.pth", out), ["none.pth cannot be read"]),
    ]
    for line, parts in cases:
        one_message(bench(*line, expect=2), *parts)
        assert not out.exists()
    assert not made.exists()


def test_a_wrong_teacher_stops_a_run_before_it_trains(bench, checkpoint):
    teacher = {"weights": {"resnet8": checkpoint.name}}
    pair = {"teacher": "resnet8", "student": "resnet8_quarter"}
    matrix = bench.matrix(tiny(["scratch"], ["kd"], teacher=teacher, pairs=[pair]), "wrong")
    store = bench.folder / "wrong_store"
    for more in ([], ["--dry-run"]):
        done = bench.run(matrix, store, *more, expect=2)
        one_message(done, checkpoint.name, "does not hold weights of resnet8", "resnet8_half")
    assert results(store) == {}
