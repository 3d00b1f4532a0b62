"""Training batches: equal to torchvision's own transforms, repeatable, and clear about bad input."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from smskd.data import Batch, LoaderBatches, Normalisation, ResidentBatches
from smskd.errors import ConfigError, DataError
from smskd.torchvision_bridge import import_torchvision
from smskd.views import Augmentation, draw_order, draw_views

CIFAR100 = Normalisation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
CIFAR_VIEWS = Augmentation(pad=4, flip=True)


def bytes_and_labels(num=10, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(num) % 7


def resident(images, labels, **options):
    options = {"batch_size": 4, "normalise": CIFAR100, "augment": CIFAR_VIEWS} | options
    return ResidentBatches(images, labels, **options)


def joined(batches, epoch):
    """All images of an epoch, in training-set order."""
    parts = list(batches.epoch(epoch))
    index = torch.cat([b.index for b in parts])
    return torch.cat([b.images for b in parts])[index.argsort()]


@pytest.fixture(scope="module")
def functional():
    pytest.importorskip("PIL", reason="torchvision is not installed")
    try:
        import_torchvision()
    except ConfigError:
        pytest.skip("torchvision is not installed")
    from torchvision.transforms import functional

    return functional


@pytest.fixture(scope="module")
def peer_view(functional):
    """RandomCrop(32, 4), RandomHorizontalFlip, ToTensor and Normalize with the draws given."""
    from PIL import Image

    def view(image, dy, dx, flip):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        image = functional.crop(functional.pad(image, [4, 4, 4, 4], fill=0), dy, dx, 32, 32)
        image = functional.hflip(image) if flip else image
        return functional.normalize(functional.to_tensor(image), CIFAR100.mean, CIFAR100.std)

    return view


def test_all_views_equal_torchvisions_bit_for_bit(peer_view):
    images, labels = bytes_and_labels(3)
    batches = resident(images, labels)
    views = torch.arange(162)
    dy, dx, flip = CIFAR_VIEWS.split(views)
    for n, image in enumerate(images):
        ours = batches.cut(torch.full((162,), n), views)
        peers = torch.stack(
            [peer_view(image, *map(int, v)) for v in zip(dy, dx, flip, strict=True)]
        )
        assert torch.equal(ours, peers)


def test_an_epoch_equals_torchvisions_with_the_same_draws(peer_view):
    images, labels = bytes_and_labels(10)
    order = draw_order(5, 3, 10)
    drawn = CIFAR_VIEWS.split(draw_views(5, 3, 10, 162))
    for k, batch in enumerate(resident(images, labels, seed=5).epoch(3)):
        assert batch.index.tolist() == order[4 * k : 4 * k + 4].tolist()
        assert torch.equal(batch.labels, labels[batch.index])
        assert batch.view.tolist() == draw_views(5, 3, 10, 162)[batch.index].tolist()
        for n, image in zip(batch.index.tolist(), batch.images, strict=True):
            assert torch.equal(image, peer_view(images[n], *(int(part[n]) for part in drawn)))


def test_border_is_black_before_normalisation():
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    corner = torch.zeros(1, dtype=torch.long)
    view = resident(white, torch.zeros(1)).cut(corner, corner)
    black = torch.tensor([-m / s for m, s in zip(CIFAR100.mean, CIFAR100.std, strict=True)])
    for border in (view[0, :, :4], view[0, :, :, :4]):
        torch.testing.assert_close(border, black.view(3, 1, 1).expand_as(border))
    assert (view[0, :, 4:, 4:] > 1.5).all()


def test_last_smaller_batch_is_kept():
    sizes = [len(b.labels) for b in resident(*bytes_and_labels(10)).epoch(1)]
    assert sizes == [4, 4, 2]


def test_same_epoch_gives_the_same_batches_and_another_one_others():
    batches = resident(*bytes_and_labels(10))
    first, again, other = list(batches.epoch(2)), list(batches.epoch(2)), list(batches.epoch(3))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.index, b.index)
    assert [b.index.tolist() for b in first] != [b.index.tolist() for b in other]
    assert not torch.equal(joined(batches, 2), joined(batches, 3))


def test_batch_size_changes_neither_order_nor_views():
    images, labels = bytes_and_labels(10)
    small, large = resident(images, labels, batch_size=3), resident(images, labels, batch_size=10)
    assert torch.equal(
        torch.cat([b.images for b in small.epoch(4)]), next(iter(large.epoch(4))).images
    )


def test_seed_changes_the_batches():
    images, labels = bytes_and_labels(10)
    zero, one = resident(images, labels, seed=0), resident(images, labels, seed=1)
    assert not torch.equal(joined(zero, 1), joined(one, 1))


def test_without_augmentation_images_are_only_normalised():
    images, labels = bytes_and_labels(6)
    batches = resident(images, labels, augment=None)
    assert torch.equal(joined(batches, 1), CIFAR100(images))


def test_float_images_are_taken_as_they_are_and_padded_with_zeros():
    images = torch.randn(5, 2, 8, 6)
    plain = ResidentBatches(images, torch.arange(5), batch_size=2)
    assert torch.equal(joined(plain, 1), images)
    padded = ResidentBatches(images, torch.arange(5), augment=Augmentation(pad=1))
    zero = torch.tensor([0])
    view = padded.cut(zero, zero + 2)  # row offset 0, column offset 2
    assert torch.equal(view[0, :, 0], torch.zeros(2, 6))
    assert torch.equal(view[0, :, 1:, :5], images[0, :, :7, 1:])


def test_batches_are_channels_last_and_of_the_promised_types():
    batch = next(iter(resident(*bytes_and_labels(10)).epoch(1)))
    assert isinstance(batch, Batch)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert (batch.images.dtype, batch.labels.dtype) == (torch.float32, torch.int64)


def test_inputs_are_left_as_they_were():
    images, labels = bytes_and_labels(10)
    kept = images.clone()
    list(resident(images, labels).epoch(1))
    CIFAR100(images)
    assert torch.equal(images, kept)


def test_narrow_labels_are_widened():
    images, labels = bytes_and_labels(4)
    batch = next(iter(resident(images, labels.to(torch.uint8)).epoch(1)))
    assert batch.labels.dtype == torch.int64
    assert resident(images, labels).num_samples == 4


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (torch.zeros(3, 3, 4, 4), torch.zeros(2), "3 images but 2 labels"),
        (torch.zeros(0, 3, 4, 4), torch.zeros(0), "0 images but 0 labels"),
        (torch.zeros(3, 4, 4), torch.zeros(3), r"shapes \(3, 4, 4\) and \(3,\)"),
        (torch.zeros(3, 3, 4, 4), torch.zeros(3, 5), r"\(3, 5\)"),
        (torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.zeros(3), "without a normalisation"),
    ],
)
def test_unusable_tensors_are_refused(images, labels, said):
    with pytest.raises(DataError, match=said):
        ResidentBatches(images, labels)


def test_normalising_floats_and_empty_batches_are_refused():
    with pytest.raises(DataError, match=r"for uint8 images, but these are torch\.float32"):
        CIFAR100(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="a batch of 0 samples"):
        resident(*bytes_and_labels(4), batch_size=0)


class WithIndex(Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, n):
        return self.images[n], self.labels[n], n


def test_loader_without_index():
    images, labels = torch.randn(10, 3, 8, 8), torch.arange(10)
    batches = LoaderBatches(DataLoader(TensorDataset(images, labels), batch_size=4))
    got = list(batches.epoch(1))
    assert batches.num_samples == 10
    assert torch.equal(torch.cat([b.images for b in got]), images)
    assert torch.equal(torch.cat([b.labels for b in got]), labels)
    assert all((b.index == -1).all() for b in got)
    assert len(list(batches.epoch(2))) == 3


def test_loader_with_index():
    images, labels = torch.randn(10, 3, 8, 8), torch.arange(10)
    shuffled = torch.Generator().manual_seed(3)
    loader = DataLoader(WithIndex(images, labels), batch_size=4, shuffle=True, generator=shuffled)
    for batch in LoaderBatches(loader).epoch(1):
        assert torch.equal(batch.images, images[batch.index])
        assert torch.equal(batch.labels, labels[batch.index])


def test_plain_list_of_batches_does_not_say_its_length():
    batches = LoaderBatches([(torch.zeros(2, 3, 4, 4), torch.zeros(2))])
    assert batches.num_samples == 0
    assert len(list(batches.epoch(1))) == 1


@pytest.mark.parametrize("given", [[torch.zeros(2, 3, 4, 4)], [{"x": 1}], [(torch.zeros(1),)]])
def test_loader_that_gives_something_else_is_refused(given):
    with pytest.raises(DataError, match="the loader gives a"):
        next(LoaderBatches(given).epoch(1))


def test_one_pass_iterator_is_refused():
    with pytest.raises(DataError, match="ends after one pass"):
        LoaderBatches((torch.zeros(1), torch.zeros(1)) for _ in range(3))
