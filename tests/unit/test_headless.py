"""A student with a new head: its hook comes and goes, it can be rebuilt, saved and exported."""

import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from matrices import plan_of
from smskd_bench.cost import network_cost
from smskd_bench.store import Store
from smskd_bench.worker import RunOptions, Worker
from smskd_export.cpu_session import CpuSession
from smskd_export.onnx_graph import export_onnx
from smskd_export.reference import session_logits, torch_logits
from smskd_export.targets import load_target
from tiny import same_state
from torch import nn

from smskd.errors import ConfigError
from smskd.evaluate import evaluate
from smskd.methods.base import PairShapes
from smskd.methods.headless import Headless
from smskd.methods.objective import Objective, Part
from smskd.methods.simkd import SimKD
from smskd.taps import Network, Taps, probe

SHAPE, CLASSES = (3, 16, 16), 5
TAPS = Taps(spatial="body", pooled="fc:input", classifier="fc")


class Net(nn.Module):
    """One convolution of stride 2 and a linear layer."""

    def __init__(self, width):
        super().__init__()
        conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.body = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.body(x)
        return self.fc(F.avg_pool2d(x, x.shape[2]).flatten(1))


class Head(nn.Module):
    def forward(self, spatial, images):
        return spatial.mean((2, 3)) + images.mean()


def images(num=4):
    return torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(0))


def objective(student, teacher):
    image = images(1)
    shapes = PairShapes(
        probe(student, TAPS, ("spatial", "classifier"), image),
        (probe(teacher, TAPS, ("spatial", "classifier"), image),),
        student_taps=TAPS,
        teacher_networks=(Network(teacher, TAPS),),
    )
    return Objective([Part(SimKD())], shapes)


def simkd(seed=0):
    """Student, teacher and objective, with statistics that are not the trivial ones."""
    torch.manual_seed(seed)
    student, teacher = Net(6), Net(8).eval().requires_grad_(False)
    made = objective(student, teacher)
    with torch.no_grad():
        for _ in range(3):
            made.inference_model(student)(torch.randn(8, *SHAPE) * 2 + 1)
    return student, teacher, made


def test_head_gets_the_map_and_the_images():
    student, x = Net(6).eval(), images()
    model = Headless(student, TAPS, Head())
    torch.testing.assert_close(model(x), student.body(x).mean((2, 3)) + x.mean())


def test_student_is_left_without_hooks_even_if_the_head_fails():
    class Broken(nn.Module):
        def forward(self, spatial, images):
            raise ValueError("no")

    student = Net(6)
    with pytest.raises(ValueError, match="no"):
        Headless(student, TAPS, Broken())(images())
    Headless(student, TAPS, Head())(images())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in student.modules())


def test_student_without_a_map_is_refused():
    with pytest.raises(ConfigError, match="no tap for spatial"):
        Headless(Net(6), Taps(), Head())(images())


def test_wrapper_is_one_module():
    student, _, made = simkd()
    model = made.inference_model(student)
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"student", "head"}
    modes = {m.training for m in model.eval().modules()}
    assert modes == {False}
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))


def test_saved_modules_are_enough_to_rebuild_it():
    # The teacher's classifier is among them: another teacher of the same sizes does for building.
    student, _, made = simkd()
    rebuilt = objective(student, Net(8))
    rebuilt.load_state_dict(copy.deepcopy(made.state_dict()))
    x = images()
    one, two = (m.inference_model(student).eval()(x) for m in (made, rebuilt))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["cpu", "jetson"])
def test_wrapper_exports_without_the_students_classifier(tmp_path, name):
    student, _, made = simkd()
    model, target, path = (
        made.inference_model(student).eval(),
        load_target(name),
        tmp_path / "x.onnx",
    )
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    info = export_onnx(model, SHAPE, mean, std, opset=target.opset, path=path)
    assert info.operators["Conv"] == 4  # the student's and the projector's three
    assert info.operators["Gemm"] == 1
    shapes = {tuple(w.dims) for w in onnx.load(path).graph.initializer}
    assert (CLASSES, 8) in shapes or (8, CLASSES) in shapes  # the teacher's classifier
    assert not {(CLASSES, 6), (6, CLASSES)} & shapes  # the student's
    pictures = np.random.default_rng(1).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    got = session_logits(CpuSession(path), pictures)
    np.testing.assert_allclose(got, torch_logits(model, pictures, mean, std), atol=1e-5)


def test_worker_stores_and_rebuilds_what_it_evaluated(tmp_path):
    plan = plan_of(
        pairs=[{"teacher": "resnet8_half", "student": "resnet8_quarter"}], rows=[["simkd", "kd"]],
        recipe={"epochs": [1, 1]}, teacher={"epochs": 1},
        dataset={"name": "digits", "train_size": 100}, reference={"weight": 1.0},
    )  # fmt: skip
    worker = Worker(Store.open(tmp_path), RunOptions(threads=1))
    cell = plan.cells[0]
    for key in (*cell.teachers, *cell.stages):
        worker.run(plan.nodes[key], lambda spec, row: None)
    spec = plan.nodes[cell.stages[0]]
    model = worker.deployed(spec)
    assert isinstance(model, Headless)
    assert same_state(model.student.state_dict(), worker.store.weights(spec.key))
    test = evaluate(model, worker.data(spec.dataset).test)
    assert test.top1 == pytest.approx(worker.store.result(spec.key)["test"]["top1"])
    assert not isinstance(worker.deployed(plan.nodes[cell.stages[1]]), Headless)
    costs = worker.store.result(spec.key)["deployed"]
    bare = network_cost(spec.model, spec.dataset.name)
    assert costs["parameters"] == sum(p.numel() for p in model.parameters())
    assert costs["macs"] > bare.macs
    assert "deployed" not in worker.store.result(cell.stages[1])
