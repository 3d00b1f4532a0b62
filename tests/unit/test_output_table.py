"""The table of a frozen network's outputs: exact, shared, and never used when damaged."""

import copy
import errno
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from tiny import TAPS, tiny_net

from smskd import output_table
from smskd.data import Batch, Normalisation, ResidentBatches
from smskd.entry_file import EntryFile
from smskd.errors import DataError, TableError
from smskd.models import build_model, taps_of
from smskd.output_table import OutputTable, TableSettings, drawn, table_key
from smskd.taps import Network
from smskd.torchvision_bridge import import_torchvision
from smskd.views import Augmentation

EXACT = TableSettings(storage="fp32")
PIXELS = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def pixel_data(num=12, size=8, seed=0, pad=1, batch_size=5):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(num) % 4
    return ResidentBatches(images, labels, batch_size, seed, PIXELS, Augmentation(pad, flip=True))


def network(seed=0):
    return Network(tiny_net(seed, width=8).to(memory_format=torch.channels_last), TAPS)


def everything(data):
    return np.ones((data.num_samples, data.augment.num_views), bool)


def all_views(data):
    index, view = (torch.from_numpy(x) for x in np.nonzero(everything(data)))
    return Batch(data.cut(index, view), data.labels[index], index, view)


@pytest.fixture
def table(tmp_path):
    made = OutputTable(tmp_path, network(), pixel_data(), EXACT)
    made.fill(everything(made.data))
    return made


def test_every_entry_is_the_live_output_to_the_last_bit(table):
    batch = all_views(table.data)
    with torch.no_grad():
        live = table.network.model(batch.images)
    assert torch.equal(table(batch).logits, live)


def test_lookup_equals_a_live_forward_through_torchvisions_crop_and_flip(tmp_path):
    torchvision = import_torchvision()
    transforms = torchvision.transforms
    from PIL import Image

    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    data = ResidentBatches(pixels, torch.arange(6), 6, 0, PIXELS, Augmentation(4, flip=True))
    torch.manual_seed(1)
    model = build_model("resnet8", 10).to(memory_format=torch.channels_last)
    made = OutputTable(tmp_path, Network(model, taps_of("resnet8")), data, EXACT)
    made.fill(everything(data))
    finish = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(PIXELS.mean, PIXELS.std)]
    )
    torch.manual_seed(5)
    for n in range(6):
        padded = transforms.functional.pad(Image.fromarray(pixels[n].permute(1, 2, 0).numpy()), 4)
        for _ in range(8):
            top, left, height, width = transforms.RandomCrop.get_params(padded, (32, 32))
            flip = int(torch.rand(()) < 0.5)
            image = transforms.functional.crop(padded, top, left, height, width)
            image = transforms.functional.hflip(image) if flip else image
            with torch.no_grad():
                live = model(finish(image).unsqueeze(0))
            view = torch.tensor([(top * 9 + left) * 2 + flip])
            index = torch.tensor([n])
            said = made(Batch(torch.empty(0), data.labels[index], index, view)).logits
            torch.testing.assert_close(said, live, rtol=1e-5, atol=1e-5)


def test_half_precision_differs_by_rounding_only(tmp_path):
    data = pixel_data()
    made = OutputTable(tmp_path, network(), data, TableSettings(storage="fp16"))
    made.fill(everything(data))
    batch = all_views(data)
    with torch.no_grad():
        live = made.network.model(batch.images)
    assert torch.equal(made(batch).logits, live.half().float())
    assert made.source == "table fp16"


def test_pooled_features_are_kept_when_asked_for(tmp_path):
    data = pixel_data()
    made = OutputTable(tmp_path, network(), data, TableSettings("fp32", pooled=True))
    made.fill(everything(data))
    batch = all_views(data)
    seen = []
    model = made.network.model
    handle = model.head.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(batch.images)
    handle.remove()
    assert torch.equal(made(batch).pooled, seen[0])


def test_only_what_is_drawn_is_computed_and_once(tmp_path):
    data = pixel_data(num=20, seed=4)
    made = OutputTable(tmp_path, network(), data, EXACT)
    wanted = drawn(data, range(1, 4))
    assert 20 < wanted.sum() <= 60
    assert made.fill(wanted) == wanted.sum()
    assert made.fill(wanted) == 0
    for epoch in (1, 2, 3):
        for batch in data.epoch(epoch):
            assert made(batch).logits.shape == (len(batch.labels), 4)
    with pytest.raises(DataError, match="lacks views"):
        made(all_views(data))


def test_seeds_and_batch_sizes_share_a_table_and_other_things_do_not(tmp_path):
    one, settings = network(), EXACT
    key = table_key(one, pixel_data(), settings)
    assert table_key(one, pixel_data(seed=9, batch_size=2), settings) == key
    others = [
        (network(1), pixel_data(), settings),
        (one, pixel_data(pad=2), settings),
        (one, pixel_data(num=13), settings),
        (one, pixel_data(), TableSettings("fp16")),
        (one, pixel_data(), TableSettings("fp32", "bf16")),
        (one, pixel_data(), TableSettings("fp32", pooled=True)),
    ]
    keys = {table_key(*other) for other in others}
    assert len(keys) == len(others)
    assert key not in keys


def test_the_order_of_filling_does_not_change_a_bit(tmp_path, monkeypatch):
    data = pixel_data(num=30)
    whole = OutputTable(tmp_path / "a", network(), data, EXACT)
    whole.fill(everything(data))
    monkeypatch.setitem(output_table.CHUNK, "cpu", 7)
    parts = OutputTable(tmp_path / "b", network(), data, EXACT)
    for epoch in (5, 1, 3):
        parts.fill(drawn(data, range(epoch, epoch + 1)))
    parts.fill(everything(data))
    assert (whole.folder / "logits.bin").read_bytes() == (parts.folder / "logits.bin").read_bytes()


def test_a_finished_table_is_taken_as_it_is(table, tmp_path):
    again = OutputTable(tmp_path, network(), pixel_data(seed=8), EXACT)
    assert again.fill(everything(again.data)) == 0
    assert torch.equal(again(all_views(again.data)).logits, table(all_views(table.data)).logits)


@pytest.mark.parametrize("where", [0, 777, -1])
def test_an_altered_byte_is_noticed_and_filled_anew(table, tmp_path, where):
    path = table.folder / "logits.bin"
    good = path.read_bytes()
    bad = bytearray(good)
    bad[where] ^= 1
    path.write_bytes(bad)
    again = OutputTable(tmp_path, network(), pixel_data(), EXACT)
    assert again.num_damaged > 0
    assert again.fill(everything(again.data)) == again.num_damaged
    assert path.read_bytes() == good


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_truncated_table_is_filled_anew(table, tmp_path, size):
    path = table.folder / "logits.bin"
    good = path.read_bytes()
    os.truncate(path, size)
    again = OutputTable(tmp_path, network(), pixel_data(), EXACT)
    again.fill(everything(again.data))
    assert path.read_bytes() == good


def test_a_damaged_state_file_empties_the_table(table, tmp_path):
    path = table.folder / "logits.bin.state"
    good = path.read_bytes()
    for bad in (b"", good[:50], good[:-1], good[:-40] + bytes([good[-40] ^ 1]) + good[-39:]):
        path.write_bytes(bad)
        again = OutputTable(tmp_path, network(), pixel_data(), EXACT)
        assert again.missing(everything(again.data)).all()


def test_one_damaged_block_costs_that_block_only(tmp_path, monkeypatch):
    monkeypatch.setattr("smskd.entry_file.BLOCK_BYTES", 1)  # a block a sample
    data = pixel_data()
    made = OutputTable(tmp_path, network(), data, EXACT)
    made.fill(everything(data))
    path = made.folder / "logits.bin"
    bad = bytearray(path.read_bytes())
    bad[0] ^= 1
    path.write_bytes(bad)
    assert OutputTable(tmp_path, network(), data, EXACT).num_damaged == data.augment.num_views


def test_a_teacher_too_loud_for_half_precision_is_refused(tmp_path):
    loud = network()
    with torch.no_grad():
        loud.model.head.bias.fill_(1e6)
    made = OutputTable(tmp_path, loud, pixel_data(), TableSettings("fp16"))
    with pytest.raises(TableError, match="do not fit into fp16"):
        made.fill(everything(made.data))


def test_a_full_disk_is_said_with_the_size(tmp_path, monkeypatch):
    def no_room(handle, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(TableError, match=r"GiB cannot be written .*No space left"):
        OutputTable(tmp_path, network(), pixel_data(), EXACT)
    assert not list(tmp_path.rglob("*.bin"))


def test_a_batch_without_views_is_refused(table):
    batch = Batch(torch.empty(0), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(DataError, match="views"):
        table(batch)


def test_fixed_images_are_the_one_view_case(tmp_path):
    images, labels = torch.randn(9, 3, 8, 8), torch.arange(9) % 4
    data = ResidentBatches(images, labels, 4)
    made = OutputTable(tmp_path, network(), data, EXACT)
    assert made.fill(drawn(data, range(1, 100))) == 9


def test_the_folder_says_what_it_is(table):
    about = json.loads((table.folder / "table.json").read_text())
    assert about["columns"] == {"logits": [12, 18, 4]}
    assert about["storage"] == "fp32"
    assert about["key"] == table.key


def slow_fill(root, started):
    output_table.SAVE_EVERY_S = 0.0
    output_table.CHUNK["cpu"] = 2
    data = pixel_data(num=200)
    made = OutputTable(root, network(), data, EXACT)

    def progress(done, total):
        started.set()
        time.sleep(0.002)

    made.fill(everything(data), progress)


def test_a_killed_builder_loses_little_and_two_builders_do_no_harm(tmp_path):
    data = pixel_data(num=200)
    expected = OutputTable(tmp_path / "quiet", network(), data, EXACT)
    expected.fill(everything(data))
    context = multiprocessing.get_context("fork")
    started = context.Event()
    builders = [context.Process(target=slow_fill, args=(tmp_path / "t", started)) for _ in range(2)]
    for builder in builders:
        builder.start()
    assert started.wait(30)
    time.sleep(0.3)
    os.kill(builders[0].pid, signal.SIGKILL)
    os.kill(builders[1].pid, signal.SIGKILL)
    for builder in builders:
        builder.join()
    left = OutputTable(tmp_path / "t", network(), data, EXACT)
    assert left.num_damaged == 0
    assert 0 < left.missing(everything(data)).sum() < everything(data).sum()
    two = [context.Process(target=slow_fill, args=(tmp_path / "t", started)) for _ in range(2)]
    for builder in two:
        builder.start()
    for builder in two:
        builder.join(60)
        assert builder.exitcode == 0
    whole = OutputTable(tmp_path / "t", network(), data, EXACT)
    assert whole.num_damaged == 0
    assert whole.fill(everything(data)) == 0
    batch = all_views(data)
    assert torch.equal(whole(batch).logits, expected(batch).logits)


def test_entry_file_random_damage_is_always_found(tmp_path):
    generator = np.random.default_rng(0)
    shape = (40, 6, 5)
    values = generator.normal(size=shape).astype(np.float32)
    rows, columns = np.nonzero(np.ones(shape[:2], bool))
    file = EntryFile(tmp_path / "x.bin", shape, np.dtype(np.float32))
    file.write(rows, columns, values[rows, columns])
    file.save()
    good = (tmp_path / "x.bin").read_bytes()
    for _ in range(50):
        bad = bytearray(good)
        bad[generator.integers(len(bad))] ^= 1 << int(generator.integers(8))
        (tmp_path / "x.bin").write_bytes(bad)
        again = EntryFile(tmp_path / "x.bin", shape, np.dtype(np.float32))
        assert again.damaged
        kept = copy.deepcopy(again.filled)
        assert np.array_equal(np.asarray(again.entries)[kept], values[kept])


class Scaled(torch.nn.Module):
    """Its scale is neither a weight nor a layer."""

    def __init__(self, scale):
        super().__init__()
        self.net, self.scale = tiny_net(width=8), scale

    def forward(self, images):
        return self.net(images) * self.scale


def test_what_only_the_forward_pass_shows_is_in_the_key():
    keys = {table_key(Network(Scaled(scale)), pixel_data(), EXACT) for scale in (1.0, 4.0)}
    assert len(keys) == 2
    assert table_key(Network(Scaled(4.0)), pixel_data(), EXACT) in keys


def test_a_reader_gives_what_it_was_made_for(tmp_path):
    data = pixel_data()
    made = OutputTable(tmp_path, network(), data, TableSettings("fp32", pooled=True))
    made.fill(everything(data))
    batch = all_views(data)
    assert made.reader(pooled=False)(batch).pooled is None
    assert torch.equal(made.reader(pooled=True)(batch).pooled, made(batch).pooled)
