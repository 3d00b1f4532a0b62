"""Stage runs as objects: the same bytes on the other side, and nothing damaged gets in."""

import pytest
import torch
from matrices import plan_of
from smskd_bench.executors.parcels import Parcel, pack, unpack, unpack_all
from smskd_bench.store import CHECKPOINT, RESULT, SPEC, WEIGHTS, Store

from smskd.errors import StoreError


@pytest.fixture
def spec():
    return next(iter(plan_of().nodes.values()))


@pytest.fixture
def here(tmp_path):
    return Store.open(tmp_path / "here")


@pytest.fixture
def there(tmp_path):
    return Store.open(tmp_path / "there")


def finish(store, spec, value=1.0):
    weights = {"a.weight": torch.full((3, 2), value), "b": torch.arange(4)}
    store.begin(spec)
    store.complete(
        spec.key,
        {"key": spec.key, "test": {"top1": 0.1 + 0.2}, "kept": None},
        weights,
        torch.arange(5),
        {"m": torch.ones(2)},
    )


def contents(store, spec):
    folder = store.folder(spec.key)
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


def checkpoint(epoch):
    return {"epoch": epoch, "steps": 0, "weights": {"a": torch.ones(2)}}


def test_a_result_arrives_as_it_left(here, there, spec):
    finish(here, spec)
    unpack(there, pack(here, spec.key))
    assert contents(there, spec) == contents(here, spec)
    finish(there, spec, value=2.0)  # another draw of the same key: what is brought is what is read
    unpack_all(there, [pack(here, spec.key)])
    assert contents(there, spec) == contents(here, spec)


def test_a_checkpoint_arrives_unless_there_is_a_later_one(here, there, spec):
    here.begin(spec)
    here.save_checkpoint(spec.key, checkpoint(2))
    here.fail(spec.key, "failed", "some reason", 2)
    unpack(there, pack(here, spec.key))
    assert there.checkpoint(spec.key)["epoch"] == 2
    assert there.failure(spec.key)["reason"] == "some reason"
    there.save_checkpoint(spec.key, checkpoint(3))
    unpack(there, pack(here, spec.key))
    assert there.checkpoint(spec.key)["epoch"] == 3
    finish(there, spec)
    before = contents(there, spec)
    unpack(there, pack(here, spec.key))
    assert contents(there, spec) == before


@pytest.mark.parametrize("name", [WEIGHTS, RESULT, SPEC])
@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_parcel_is_refused(here, there, spec, name, damage):
    finish(here, spec)
    parcel = pack(here, spec.key)
    content = parcel.files[name]
    wrong = {
        "cut": content[:-3],
        "empty": b"",
        "other": content.replace(b"1", b"2").replace(b"\0\0\x80?", b"\0\0\0@"),
    }
    damaged = Parcel(parcel.key, {**parcel.files, name: wrong[damage]})
    with pytest.raises(StoreError, match="is damaged"):
        unpack(there, damaged)
    assert not there.is_done(spec.key)


def test_a_checkpoint_that_would_run_code_is_as_good_as_none(here, there, spec):
    here.begin(spec)
    torch.save({"epoch": 1, "call": print}, here.folder(spec.key) / CHECKPOINT)
    unpack(there, pack(here, spec.key))
    assert there.checkpoint(spec.key) is None
