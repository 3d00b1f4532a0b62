"""Published checkpoints: every layout loads by key, nothing in them runs, what does not fit says so."""

import argparse
import json
import os
import pickle
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from matrices import plan_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from smskd_bench.importing import ImportRequest, check_imports, import_file, read_weights
from smskd_bench.store import Store
from smskd_bench.worker import RunOptions, Worker

from smskd.checkpoints import NAMED, fitted, read_checkpoint, weights_in
from smskd.errors import ConfigError, UnknownNameError
from smskd.models import build_model

PUBLISHED = ["resnet8", "resnet8x4", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ResNet18"]


def network(name="resnet8", num_classes=10, in_channels=3, seed=0):
    torch.manual_seed(seed)
    return build_model(name, num_classes, in_channels)


def state_of(*arguments, **settings):
    return network(*arguments, **settings).state_dict()


def optimizer_state(model):
    """As it is after a step: with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def options():
    return argparse.Namespace(
        lr=0.05,
        lr_decay_epochs=[150, 180, 210],
        model="resnet8",
        trial="0",
        cosine=False,
        path=None,
    )


LAYOUTS = {
    "crd": lambda m: {
        "epoch": 240, "model": m.state_dict(), "accuracy": torch.tensor(72.5),
        "optimizer": optimizer_state(network()),
    },
    "crd_last": lambda m: {"opt": options(), "model": m.state_dict()},
    "dkd": lambda m: {"model": m.state_dict(), "best_acc": 72.5, "epoch": 240},
    "dkd_teacher": lambda m: {"model": m.state_dict()},
    "bare": lambda m: m.state_dict(),
    "plain_dict": lambda m: dict(m.state_dict()),
    "parallel": lambda m: torch.nn.DataParallel(m).state_dict(),
    "parallel_inside": lambda m: {"state_dict": torch.nn.DataParallel(m).state_dict()},
    "compiled": lambda m: {"net": {f"_orig_mod.{k}": v for k, v in m.state_dict().items()}},
    "student": lambda m: {"student": m.state_dict(), "criterion": {"embed": torch.ones(3)}},
    "twice": lambda m: {"model": {"state_dict": m.state_dict(), "arch": "resnet8"}},
    "half": lambda m: {"model": {k: v.half() if v.is_floating_point() else v for k, v in m.state_dict().items()}},
}  # fmt: skip


def same(state, other):
    return list(state) == list(other) and all(
        torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype
        for key in other
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(layout, zipped, tmp_path):
    path, model = tmp_path / "c.pth", network()
    torch.save(LAYOUTS[layout](model), path, _use_new_zipfile_serialization=zipped)
    found = fitted(read_checkpoint(path), "resnet8", 10)
    expected = model.state_dict()
    if layout == "half":
        expected = {
            k: v.half().float() if v.is_floating_point() else v for k, v in expected.items()
        }
    assert same(found, expected)
    network(seed=1).load_state_dict(found)


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_of_the_family_come_back(name, tmp_path):
    model, path = network(name, 100), tmp_path / "ckpt_epoch_240.pth"
    torch.save({"model": model.state_dict()}, path)
    assert same(fitted(read_checkpoint(path), name, 100), model.state_dict())


def test_weights_come_in_the_order_of_the_network(tmp_path):
    state = state_of()
    backwards = dict(reversed(state.items()))
    assert same(fitted(backwards, "resnet8", 10), state)


def test_counters_that_old_files_lack_are_zero():
    state = {k: v for k, v in state_of().items() if not k.endswith("num_batches_tracked")}
    found = fitted(state, "resnet8", 10)
    assert same(found, state_of())  # of a fresh network they are zero too


def test_a_checkpoint_from_a_gpu_opens_without_one(tmp_path):
    # The place is written beside the values; here a device that is not there either.
    torch.save(state_of(), tmp_path / "c.pth")
    data = (tmp_path / "c.pth").read_bytes()
    assert all(v.device.type == "cpu" for v in read_checkpoint(tmp_path / "c.pth").values())
    assert b"cpu" in data


# --------------------------------------------------------------------------------- what is refused


def one_message(act, *words, error=ConfigError):
    with pytest.raises(error) as caught:
        act()
    assert caught.value.exit_code == 2
    assert caught.value.hint
    text = str(caught.value)
    assert len(text.splitlines()) == 2, text
    for word in words:
        assert word in text, text
    return text


class Evil:
    """Makes a file when it is read by a reader that runs what a pickle says."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


class Rich:
    """Harmless, but nobody can know."""


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["pickle", "zip", "legacy", "in_options", "in_optimizer"])
def test_code_in_a_checkpoint_does_not_run(form, protocol, tmp_path):
    made, path = tmp_path / "made", tmp_path / "evil.pth"
    content = {"model": state_of(), "more": Evil(made)}
    if form == "in_options":
        content["more"] = argparse.Namespace(lr=0.1, evil=Evil(made))
    elif form == "in_optimizer":
        content["more"] = {"state": {0: {"momentum_buffer": Evil(made)}}}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        zipped = form != "legacy"
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    one_message(lambda: read_checkpoint(path), "evil.pth is refused", "could run code")
    assert not made.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert made.exists()  # the pickle is a real one


def test_the_class_that_is_refused_is_named(tmp_path):
    torch.save({"model": state_of(), "why": Rich()}, tmp_path / "c.pth")
    one_message(lambda: read_checkpoint(tmp_path / "c.pth"), "Rich", "save the weights alone")
    torch.save(network(), tmp_path / "c.pth")  # the whole network, as many tutorials do
    one_message(lambda: read_checkpoint(tmp_path / "c.pth"), "smskd.models.resnet_cifar.ResNet")


def test_only_that_one_class_is_allowed_and_only_here(tmp_path):
    torch.save({"opt": options(), "model": state_of()}, tmp_path / "c.pth")
    read_checkpoint(tmp_path / "c.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "c.pth", weights_only=True)
    torch.save({"opt": SimpleNamespace(lr=1), "model": state_of()}, tmp_path / "c.pth")
    one_message(lambda: read_checkpoint(tmp_path / "c.pth"), "is refused")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("at", [0, 1, 3, 8, 100, 0.3, 0.9, -100, -1])
def test_cut_files(at, zipped, tmp_path):
    path = tmp_path / "cut.pth"
    torch.save({"model": state_of()}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(at * len(data)) if isinstance(at, float) else at])
    one_message(lambda: read_checkpoint(path), "cut.pth")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html>\n<html><title>404</title></html>", "it is a web page"),
        (b"<html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "does not begin as"),
        (bytes(range(200)), "does not begin as"),
        (b"PK\x03\x04" + b"0" * 100, "damaged"),
        (b"\x80\x02" + bytes(range(100)), "c.pth is refused"),
        (b"\x80\x02}.", "c.pth"),
    ],
)
def test_files_that_are_something_else(data, word, tmp_path):
    (tmp_path / "c.pth").write_bytes(data)
    one_message(lambda: read_checkpoint(tmp_path / "c.pth"), word)


def test_files_that_are_not_there(tmp_path):
    one_message(lambda: read_checkpoint(tmp_path / "none.pth"), "none.pth cannot be read")
    one_message(lambda: read_checkpoint(tmp_path), "cannot be read")
    one_message(lambda: read_weights(tmp_path / "none.safetensors"), "cannot be read")


@pytest.mark.parametrize(
    "content",
    [[], {}, 3, None, torch.ones(3), {"model": {}}, {"model": {"a": 1}}, {"epoch": 3}, {1: torch.ones(1)}],
)  # fmt: skip
def test_checkpoints_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "c.pth")
    one_message(lambda: read_checkpoint(tmp_path / "c.pth"), "no weights by name")


def test_a_section_is_looked_into_only_if_it_may_hold_weights():
    weights = {"model": torch.ones(2), "net": torch.ones(3)}  # layers may be called so
    assert weights_in(weights, "it") == weights


# ------------------------------------------------------------------------------- what does not fit


def misfit(state, *words, model="resnet8", classes=10, **sizes):
    return one_message(lambda: fitted(state, model, classes, where="c.pth", **sizes), *words)


def test_another_number_of_classes():
    misfit(
        state_of("resnet8", 100),
        "c.pth does not hold weights of resnet8 for 10 classes: they are for 100 classes",
        "say 100",
    )


def test_another_model_is_named():
    text = misfit(state_of("resnet14", 100), "they fit resnet14 for 100 classes")
    assert "unknown: layer1.1.conv1.weight, " in text
    misfit(state_of("vgg8"), "they fit vgg8 for 10 classes")
    misfit(state_of("wrn_16_2"), "they fit wrn_16_2 for 10 classes", model="wrn_16_1")


def test_another_width_and_other_channels():
    misfit(state_of("resnet8x4"), "of another size: conv1.weight", "they fit resnet8x4")
    misfit(state_of("resnet8", 10, 1), "of another size: conv1.weight", "1-channel images")
    assert fitted(state_of("resnet8", 10, 1), "resnet8", 10, 1)


def test_missing_and_unknown_keys_are_named():
    state = state_of()
    del state["fc.bias"], state["bn1.weight"]
    state |= {f"embed.{i}": torch.ones(1) for i in range(5)}
    text = misfit(
        state, "missing: bn1.weight, fc.bias;", "unknown: embed.0, embed.1, embed.2 and 2 more"
    )
    assert "no model of the zoo" in text
    assert text.count("embed.") == NAMED


def test_weights_that_are_not_finite():
    state = OrderedDict(state_of())
    state["fc.weight"] = torch.full_like(state["fc.weight"], float("nan"))
    misfit(state, "values that are not finite: fc.weight")


def test_unknown_models():
    one_message(lambda: fitted(state_of(), "resnet9", 10), "unknown model", error=UnknownNameError)


# --------------------------------------------------------------------------------------- importing


def request(tmp_path, content, **changes):
    torch.save(content, tmp_path / "c.pth")
    out = tmp_path / "teacher.safetensors"
    fields = {"file": tmp_path / "c.pth", "model": "resnet8", "classes": 10, "out": out}
    return ImportRequest(**(fields | changes))


def test_what_is_written(tmp_path):
    model = network()
    asked = request(tmp_path, {"opt": options(), "model": model.half().state_dict()})
    lines = import_file(asked)
    state = {k: v.float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    assert same(dict(sorted(load_file(asked.out).items())), dict(sorted(state.items())))
    with safe_open(asked.out, "pt") as opened:
        (record,) = opened.metadata().values()
    assert json.loads(record) == {
        "source": "c.pth",
        "source_sha256": lines[1].rpartition(":")[2],
        "model": "resnet8",
        "classes": 10,
    }
    again = import_file(replace(asked, out=tmp_path / "again"))
    assert again[2].rpartition(":")[2] == lines[2].rpartition(":")[2]


def test_safetensors_files_are_checked_and_rewritten_too(tmp_path):
    save_file({f"module.{k}": v for k, v in state_of().items()}, tmp_path / "a.safetensors")
    asked = request(tmp_path, {}, file=tmp_path / "a.safetensors")
    one_message(lambda: import_file(asked), "unknown: module.")  # only torch files have wrappers
    save_file(state_of(), tmp_path / "b.bin")
    import_file(request(tmp_path, {}, file=tmp_path / "b.bin"))
    assert same(fitted(read_weights(asked.out), "resnet8", 10), state_of())


def test_results_that_cannot_be_written(tmp_path):
    asked = request(tmp_path, state_of(), out=tmp_path / "none" / "t.safetensors")
    one_message(lambda: import_file(asked), "cannot be written")
    asked = request(tmp_path, state_of(), out=tmp_path / "c.pth")
    one_message(lambda: import_file(asked), "is the file to import")
    assert read_checkpoint(tmp_path / "c.pth")


def test_nothing_is_written_of_what_does_not_fit(tmp_path):
    asked = request(tmp_path, state_of(), classes=100)
    one_message(lambda: import_file(asked), "they are for 10 classes")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


# ---------------------------------------------------------------------------------- in a matrix


def plan_with(file, tmp_path):
    return plan_of(
        pairs=[{"teacher": "resnet8_half", "student": "resnet8_quarter"}], rows=[["kd"]],
        teacher={"weights": {"resnet8_half": str(file)}},
        dataset={"name": "digits", "train_size": 100}, recipe={"epochs": [1]},
    )  # fmt: skip


def test_a_matrix_names_a_checkpoint_directly(tmp_path):
    model, file = network("resnet8_half", 10, 1), tmp_path / "t.pth"
    torch.save({"opt": options(), "model": model.state_dict()}, file)
    plan = plan_with(file, tmp_path)
    check_imports(plan, plan.nodes)
    worker = Worker(Store.open(tmp_path / "store"), RunOptions(threads=1))
    for key, spec in plan.nodes.items():
        worker.run(spec, lambda *_: None, plan.weights.get(key))
    stored = worker.store.weights(plan.cells[0].teacher)
    assert same(dict(sorted(stored.items())), dict(sorted(model.state_dict().items())))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"weights", "t.pth is no checkpoint"),
        (state_of("resnet8_half", 100, 1), "they are for 100 classes"),
        (state_of("resnet8_quarter", 10, 1), "they fit resnet8_quarter"),
        (state_of("resnet8_half", 10, 3), "3-channel images"),
    ],
)
def test_what_cannot_be_a_teacher_is_refused_before_anything_is_trained(content, word, tmp_path):
    file = tmp_path / "t.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    plan = plan_with(file, tmp_path)
    one_message(lambda: check_imports(plan, plan.nodes), word, "t.pth")
    trained = [key for key, spec in plan.nodes.items() if not spec.imported]
    check_imports(plan, trained)  # what is done already is not looked at
