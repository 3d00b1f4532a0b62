"""Leases between machines: two books with two names of hosts, on a file system without locks."""

import json
import pickle

import pytest
from smskd_bench import leases
from smskd_bench.leases import LEASE, LeaseBook, holder, read_owner


@pytest.fixture
def no_locks(monkeypatch):
    """As on a shared folder that does not carry locks to other machines."""
    monkeypatch.setattr(leases, "try_lock", lambda handle: True)


@pytest.fixture
def clock(monkeypatch):
    """A watcher's clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    return now


def test_one_machine_at_a_time(tmp_path, no_locks, clock):
    one, two = LeaseBook("one"), LeaseBook("two")
    held = one.take(tmp_path)
    assert held is not None
    assert two.take(tmp_path) is None
    assert holder(tmp_path).host == "one"
    one.give_back(held)
    assert holder(tmp_path) is None
    assert two.take(tmp_path) is not None
    assert one.take(tmp_path) is None


def test_a_lease_that_lives_is_never_taken(tmp_path, no_locks, clock):
    one, two = LeaseBook("one"), LeaseBook("two")
    held = one.take(tmp_path)
    for _ in range(20):
        clock[0] += leases.STALE_S / 2
        assert two.take(tmp_path) is None
        one._beat(held)
    assert not one.lost(tmp_path)


def test_a_lease_that_stands_still_is_taken_over_and_its_owner_told(tmp_path, no_locks, clock):
    one, two = LeaseBook("one"), LeaseBook("two")
    held = one.take(tmp_path)
    assert two.take(tmp_path) is None
    clock[0] += leases.STALE_S - 1
    assert two.take(tmp_path) is None
    clock[0] += 2
    new = two.take(tmp_path)
    assert new is not None
    one._beat(held)
    assert one.lost(tmp_path)
    assert not two.lost(tmp_path)
    one.give_back(held)  # must not take away what is another's by now
    assert read_owner(tmp_path / LEASE).token == new.owner.token
    assert list(tmp_path.glob("*.tmp")) == []


def test_two_that_take_over_at_once(tmp_path, no_locks, clock, monkeypatch):
    gone, one, two = LeaseBook("gone"), LeaseBook("one"), LeaseBook("two")
    gone.take(tmp_path)
    assert one.take(tmp_path) is two.take(tmp_path) is None
    clock[0] += leases.STALE_S + 1
    take_away, winners = leases._take_away, []

    def slowly(path, found):
        monkeypatch.setattr(leases, "_take_away", take_away)
        winners.append(one.take(tmp_path))  # between two's look and its deed
        take_away(path, found)

    monkeypatch.setattr(leases, "_take_away", slowly)
    assert two.take(tmp_path) is None
    assert winners[0] is not None
    assert read_owner(tmp_path / LEASE).token == winners[0].owner.token


@pytest.mark.parametrize("content", [b"", b"{", b'{"host": 1}', b"\xff", b"[]"])
def test_a_damaged_lease_is_nobodys_after_a_minute(tmp_path, no_locks, clock, content):
    (tmp_path / LEASE).write_bytes(content)
    book = LeaseBook("one")
    assert book.take(tmp_path) is None
    clock[0] += leases.STALE_S + 1
    assert book.take(tmp_path) is not None


def test_what_a_killed_process_of_this_machine_left_is_free_at_once(tmp_path):
    (tmp_path / LEASE).write_text(
        json.dumps({"host": leases.this_host(), "name": "x", "pid": 1, "token": "t", "beat": 3})
    )
    assert holder(tmp_path) is None
    book = LeaseBook()
    held = book.take(tmp_path)
    assert held is not None
    assert LeaseBook().take(tmp_path) is None  # the kernel's lock
    book.give_back(held)


def test_leases_show_that_they_live(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.01)
    book = LeaseBook()
    held = book.take(tmp_path)
    for _ in range(1000):
        if held.owner.beat > 3:
            break
        leases.time.sleep(0.01)
    assert held.owner.beat > 3
    assert read_owner(tmp_path / LEASE).beat > 0
    book.give_back(held)
    assert not (tmp_path / LEASE).exists()


def test_a_book_arrives_empty_in_another_process(tmp_path):
    book = LeaseBook()
    held = book.take(tmp_path)
    assert pickle.loads(pickle.dumps(book))._held == {}
    book.give_back(held)
