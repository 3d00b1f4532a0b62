"""On a CUDA device: the same batches as on the CPU, and training that agrees with it."""

import copy
import dataclasses

import pytest
import torch
from tiny import TAPS, same_state, snapshot, tiny_data, tiny_net, trained_teacher

from smskd import FixedSet, Normalisation, ResidentBatches, Stage, distill
from smskd.compiled import compile_networks
from smskd.evaluate import evaluate
from smskd.folded import Folded
from smskd.meter import Meter
from smskd.methods.fitnet import FitNet
from smskd.methods.kd import KD
from smskd.output_table import OutputTable, TableSettings, drawn
from smskd.seeding import seeded
from smskd.settings import Reference, Schedule, Training, Weighting
from smskd.stages import prepare
from smskd.taps import Network
from smskd.train import Alone, train, train_group
from smskd.views import Augmentation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NORM = Normalisation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
FLAT = Schedule(kind="constant")
STAGES = [
    Stage(FitNet(hint_layer=1, weight=1.0), 2, schedule=FLAT),
    Stage(KD(), 2, Reference(weighting=Weighting("tcp")), FLAT),
]


def pixel_batches(device):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(50) % 10
    return ResidentBatches(
        images.to(device), labels.to(device), 16, 3, NORM, Augmentation(pad=4, flip=True)
    )


@pytest.fixture
def exact():
    """float32 as on the CPU: no TF32, deterministic kernels."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
    torch.backends.cudnn.deterministic = deterministic


def trained_on(device, precision):
    student, teacher = tiny_net().to(device), trained_teacher().to(device)
    reports = distill(
        student, teacher, STAGES, tiny_data(), test=tiny_data(40, seed=1), dev=tiny_data(24, seed=2),
        student_taps=TAPS, teacher_taps=TAPS, batch_size=16, precision=precision,
    )  # fmt: skip
    return student, reports


def losses(reports):
    return [row["loss"] for report in reports for row in report.history]


def test_resident_batches_equal_the_cpus():
    for ours, cpu in zip(
        pixel_batches("cuda").epoch(2), pixel_batches("cpu").epoch(2), strict=True
    ):
        assert ours.images.is_cuda
        assert ours.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours.index.cpu(), cpu.index)
        assert torch.equal(ours.labels.cpu(), cpu.labels)
        torch.testing.assert_close(ours.images.cpu(), cpu.images, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("exact")
def test_two_stages_in_fp32_agree_with_the_cpu():
    (student, reports), (cpu_student, cpu_reports) = (
        trained_on("cuda", "fp32"),
        trained_on("cpu", "fp32"),
    )
    assert losses(reports) == pytest.approx(losses(cpu_reports), rel=1e-3)
    assert next(student.parameters()).is_cuda
    for name, value in snapshot(student).items():
        torch.testing.assert_close(value.cpu(), snapshot(cpu_student)[name], rtol=1e-2, atol=1e-3)
    assert reports[1].kept is not None


def test_two_stages_in_bf16_are_close():
    rough, cpu = losses(trained_on("cuda", "bf16")[1]), losses(trained_on("cpu", "fp32")[1])
    assert rough == pytest.approx(cpu, rel=0.1)


@pytest.mark.usefixtures("exact")
def test_two_runs_give_the_same_bits():
    assert same_state(*(snapshot(trained_on("cuda", "fp32")[0]) for _ in range(2)))


def test_evaluation_agrees_with_the_cpu():
    images, labels = tiny_data(40)
    model = tiny_net()
    cpu = evaluate(model, FixedSet(images, labels))
    ours = evaluate(copy.deepcopy(model).cuda(), FixedSet(images, labels).to(torch.device("cuda")))
    assert ours.loss == pytest.approx(cpu.loss, rel=1e-3)
    assert not ours.predictions.is_cuda


def test_seeded_leaves_the_devices_generator_alone():
    before = torch.cuda.get_rng_state()
    with seeded(1):
        torch.rand(2)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def table_on(device, folder, storage="fp32"):
    data = pixel_batches(device)
    settings = TableSettings(storage)
    table = OutputTable(folder, Network(tiny_net(width=8).to(device), TAPS), data, settings)
    table.fill(drawn(data, range(1, 4)))
    return table


@pytest.mark.usefixtures("exact")
def test_a_table_is_what_the_network_says(tmp_path):
    table = table_on("cuda", tmp_path)
    for batch in table.data.epoch(2):
        said = table(batch).logits
        assert said.is_cuda
        with torch.no_grad():
            live = table.network.model(batch.images)
        torch.testing.assert_close(said, live, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("exact")
def test_views_that_were_not_filled_end_an_epoch_loudly(tmp_path):
    table = table_on("cuda", tmp_path)
    batch = next(table.data.epoch(1))
    unseen = dataclasses.replace(batch, view=(batch.view + 1) % 162)
    assert table(unseen).logits.isnan().any()


def test_devices_do_not_share_tables(tmp_path):
    assert table_on("cuda", tmp_path).folder != table_on("cpu", tmp_path).folder


def run_on_cuda(seed, method, precision="fp32"):
    stage = Stage(method, 2, Reference())
    training = Training(2, batch_size=16, precision=precision)
    return prepare(
        Network(tiny_net(seed).cuda(), TAPS), [Network(trained_teacher().cuda(), TAPS)], stage,
        training, tiny_data(1)[0].cuda(), seed=seed,
    )  # fmt: skip


def data_on_cuda(seed):
    images, labels = tiny_data()
    return ResidentBatches(images.cuda(), labels.cuda(), 16, seed)


@pytest.mark.usefixtures("exact")
def test_folded_seeds_agree_with_seeds_alone():
    alone, folded = ([run_on_cuda(s, KD()) for s in (0, 1, 2)] for _ in range(2))
    for seed, run in enumerate(alone):
        train(run, data_on_cuda(seed), lambda run: None)
    train_group(Folded(folded), [data_on_cuda(s) for s in (0, 1, 2)], lambda run: None)
    for one, other in zip(alone, folded, strict=True):
        for name, value in one.student.model.state_dict().items():
            ours = other.student.model.state_dict()[name]
            torch.testing.assert_close(ours, value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_compiled_training_agrees_with_eager(precision):
    eager, compiled = (run_on_cuda(0, KD(), precision) for _ in range(2))
    compile_networks(compiled)
    for run in (eager, compiled):
        train(run, data_on_cuda(0), lambda run: None)
    ours, theirs = compiled.history[0]["loss"], eager.history[0]["loss"]
    assert ours == pytest.approx(theirs, rel=0.05)


def test_a_step_never_waits_for_the_device():
    run = run_on_cuda(0, KD())
    batches = data_on_cuda(0)
    train(run, batches, lambda run: None)  # warm: the first step makes constants
    group, meter = Alone(run), Meter(1)
    group.begin(0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in list(batches.epoch(1)):
            group.step([batch], 1, [meter])
    finally:
        torch.cuda.set_sync_debug_mode("default")
