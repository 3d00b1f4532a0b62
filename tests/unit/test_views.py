"""The order and the views of an epoch: frozen values, an independent generator, and statistics."""

import hashlib

import numpy as np
import pytest
import torch

from smskd.seeding import derive, restore_rng, rng_state, seeded
from smskd.views import Augmentation, draw_order, draw_views

MASK = 2**64 - 1


def philox(key, count):
    """Philox 4x64-10 from its definition (Salmon et al., SC 2011), first counter 1."""
    words, counter = [], 0
    while len(words) < count:
        counter += 1
        c, (k0, k1) = [counter, 0, 0, 0], key
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(p1 >> 64) ^ c[1] ^ k0, p1 & MASK, (p0 >> 64) ^ c[3] ^ k1, p0 & MASK]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
        words += c
    return words[:count]


def sha(array):
    return hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()[:16]


def chi_square(counts):
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def test_frozen_values():
    # Changing any of these changes every result of the benchmark.
    assert draw_order(0, 1, 12).tolist() == [3, 6, 11, 10, 9, 8, 1, 7, 4, 2, 0, 5]
    assert draw_order(0, 2, 12).tolist() == [10, 1, 0, 5, 7, 2, 4, 3, 6, 11, 9, 8]
    assert draw_views(0, 1, 12, 162).tolist() == [
        36, 46, 120, 160, 90, 134, 81, 131, 103, 119, 53, 86,
    ]  # fmt: skip
    assert draw_views(3, 240, 8, 162).tolist() == [25, 125, 6, 117, 147, 94, 21, 96]
    assert sha(draw_order(0, 1, 50_000)) == "29d39f88bb04f6f9"
    assert sha(draw_views(0, 1, 50_000, 162)) == "3c69cf1d369dd831"


def test_frozen_seeds():
    assert derive(0, "order") == 3958417628845602065
    assert derive(0, "adapters", 2) == 1859074680291647543
    assert derive(3) == 5038928960761627559


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (3, 240), (2**31, 7)])
def test_draws_equal_an_independent_philox(seed, epoch):
    words = philox((derive(seed, "views"), epoch), 10)
    assert draw_views(seed, epoch, 10, 162).tolist() == [w % 162 for w in words]
    words = philox((derive(seed, "order"), epoch), 10)
    assert draw_order(seed, epoch, 10).tolist() == sorted(range(10), key=words.__getitem__)


@pytest.mark.parametrize("num", [1, 2, 63, 1000])
def test_order_is_a_permutation(num):
    assert sorted(draw_order(5, 9, num).tolist()) == list(range(num))


def test_prefix_does_not_depend_on_the_number_of_samples():
    assert draw_views(1, 1, 10, 162).tolist() == draw_views(1, 1, 1000, 162)[:10].tolist()


def test_views_are_uniform():
    counts = np.bincount(draw_views(0, 1, 162 * 400, 162), minlength=162)
    # 161 degrees of freedom: mean 161, standard deviation 18; 230 is 3.8 of them above.
    assert 100 < chi_square(counts) < 230


def test_order_is_uniform():
    # Where sample 0 ends up over 2000 epochs, in 20 bins: 19 degrees of freedom.
    places = [int(np.argmin(draw_order(0, epoch, 20))) for epoch in range(1, 2001)]
    assert 4 < chi_square(np.bincount(places, minlength=20)) < 44


def test_streams_epochs_and_seeds_are_independent():
    views = draw_views(0, 1, 20_000, 162).astype(float)
    others = {
        "next epoch": draw_views(0, 2, 20_000, 162),
        "next seed": draw_views(1, 1, 20_000, 162),
        "order": draw_order(0, 1, 20_000),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(views, other)[0, 1]) < 4 / 20_000**0.5, name
    shift, flip = np.divmod(draw_views(0, 1, 20_000, 162), 2)
    assert abs(np.corrcoef(shift, flip)[0, 1]) < 4 / 20_000**0.5


@pytest.mark.parametrize(("pad", "flip", "count"), [(4, True, 162), (4, False, 81), (0, True, 2), (0, False, 1), (2, True, 50)])  # fmt: skip
def test_split_covers_every_view_once(pad, flip, count):
    augment = Augmentation(pad, flip)
    assert augment.num_views == count
    dy, dx, flipped = augment.split(np.arange(count))
    seen = set(zip(dy.tolist(), dx.tolist(), flipped.tolist(), strict=True))
    side = range(2 * pad + 1)
    assert len(seen) == count
    assert seen == {(y, x, f) for y in side for x in side for f in range(1 + flip)}


def test_views_count_flips_first_then_columns_then_rows():
    dy, dx, flipped = Augmentation(pad=4, flip=True).split(np.array([0, 1, 2, 18, 161]))
    assert dy.tolist() == [0, 0, 0, 1, 8]
    assert dx.tolist() == [0, 0, 1, 0, 8]
    assert flipped.tolist() == [0, 1, 0, 0, 1]


def test_seeds_of_purposes_differ():
    seeds = [
        derive(s, *p) for s in range(50) for p in [(), ("order",), ("views",), ("adapters", 1)]
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeded_is_torchs_own_stream_and_gives_the_old_state_back():
    torch.manual_seed(11)
    expected = torch.rand(3)
    before = torch.get_rng_state()
    with seeded(11):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_gives_the_state_back_after_an_error():
    before = torch.get_rng_state()

    def fail():
        with seeded(1):
            torch.rand(1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_rng_state_is_restored():
    state = rng_state()
    first = torch.rand(4)
    restore_rng(state)
    assert torch.equal(torch.rand(4), first)
