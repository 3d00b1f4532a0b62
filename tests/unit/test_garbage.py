"""What a store could do without: exactly that, whoever holds it, and never through a link."""

import io
import os
import time

import pytest
from matrices import content, write_matrix
from rich.console import Console
from smskd_bench import garbage, tidying
from smskd_bench.config import load_matrix
from smskd_bench.garbage import leftovers, needed, size_of, unreferred
from smskd_bench.leases import LeaseBook, try_lock
from smskd_bench.plan import make_plan
from smskd_bench.store import Store
from smskd_bench.tidying import TidyRequest, tidy
from smskd_bench.usage import in_use, maintenance

from smskd.errors import StoreError

LONG_AGO = time.time() - 10 * garbage.OLD_S


@pytest.fixture
def kept(tmp_path):
    """The plan of a matrix with one row, ``kd``."""
    (tmp_path / "kept").mkdir()
    return make_plan(load_matrix(write_matrix(tmp_path / "kept", name="kept")))


@pytest.fixture
def other(tmp_path):
    """That of another one, which shares the teacher with it: ``fitnet>kd``."""
    (tmp_path / "other").mkdir()
    rows = [["fitnet", "kd"]]
    return make_plan(load_matrix(write_matrix(tmp_path / "other", name="other", rows=rows)))


@pytest.fixture
def store(tmp_path, kept, other):
    """All stage runs of both, with something of every kind for each."""
    store = Store.open(tmp_path / "runs")
    for key, spec in (kept.nodes | other.nodes).items():
        folder = store.begin(spec)
        (folder / "result.json").write_text("{}")
        write(store.root / "exports" / key / "cpu" / "report.json")
        write(store.root / "measurements" / key / "cpu" / "local-1" / "judged.json")
        write(store.root / "tables" / key[:32] / "network", key)
        write(store.root / "tables" / key[:32] / "lock")
    for name in ("kept", "other"):
        write(store.root / "pictures" / f"{name}-devices.png")
    write(store.root / "wandb" / "run-1" / "file")
    write(store.root / "calibration.json", "{}")
    return store


def write(path, text="content"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def age(path, when=LONG_AGO):
    os.utime(path, (when, when))
    return path


def only_of(one, another):
    return [key for key in one.nodes if key not in another.nodes]


def listed(store, *plans):
    kept = needed(store, {k for p in plans for k in p.nodes}, [p.matrix.name for p in plans])
    found = unreferred(store, kept)
    return sorted(str(one.path.relative_to(store.root)) for one in found)


def places(keys):
    """Everything that belongs to these stage runs."""
    found = [f"stages/{key[:2]}/{key}" for key in keys]
    found += [f"{kind}/{key}" for kind in ("exports", "measurements") for key in keys]
    return [*found, *(f"tables/{key[:32]}" for key in keys)]


def left(store):
    return sorted(str(one.path.relative_to(store.root)) for one in leftovers(store))


def tidied(store, *plans, delete=True):
    console = Console(file=io.StringIO(), width=300)
    tidy(TidyRequest(store.root, tuple(p.loaded.file for p in plans), delete), console)
    return console.file.getvalue()


def tree(root):
    """Everything but what the maintenance itself leaves."""
    return {
        p for p in root.rglob("*") if not {"maintenance", "users"} & {*p.relative_to(root).parts}
    }


def test_exactly_what_no_matrix_refers_to(store, kept, other):
    mine = only_of(other, kept)
    assert len(mine) == 2
    assert listed(store, kept) == sorted([*places(mine), "pictures/other-devices.png"])
    assert listed(store, kept, other) == []
    assert len(listed(store, other)) == 1 * 4 + 1
    assert left(store) == []


def test_listing_changes_nothing_and_deleting_only_that(store, kept, other):
    before = tree(store.root)
    text = tidied(store, kept, delete=False)
    assert tree(store.root) == before
    assert "9 things" in text
    assert "nothing was deleted: add --delete for that" in text
    gone = {store.root / place for place in listed(store, kept)}
    text = tidied(store, kept)
    assert "9 things" in text
    assert text.rstrip().endswith(": deleted")
    after = {p for p in before if not ({p, *p.parents} & gone)}
    assert tree(store.root) == after
    assert "0 things" in tidied(store, kept)


def test_what_a_process_holds_is_kept_with_what_it_builds_on(store, kept, other):
    first, second = only_of(other, kept)
    (store.folder(second) / "result.json").unlink()
    with store.try_lock(second) as held:
        assert held
        assert listed(store, kept) == ["pictures/other-devices.png"]
        assert "kept for running processes: 2 stage runs that no matrix names" in tidied(
            store, kept
        )
    assert first in "".join(listed(store, kept))


def test_what_a_process_named_is_kept_though_it_holds_nothing_now(store, kept, other):
    with in_use(store.root, other.nodes, LeaseBook()):
        assert listed(store, kept) == ["pictures/other-devices.png"]
    assert len(listed(store, kept)) == 9


def test_a_table_that_is_filled_now_and_one_without_a_name(store, kept, other):
    key = only_of(other, kept)[0]
    table = store.root / "tables" / key[:32]
    with (table / "lock").open("a") as handle:
        assert try_lock(handle.fileno())
        assert f"tables/{key[:32]}" not in listed(store, kept)
    assert f"tables/{key[:32]}" in listed(store, kept)
    (table / "network").unlink()
    assert f"tables/{key[:32]}" not in listed(store, kept)  # it may be in the making
    age(table)
    assert f"tables/{key[:32]}" in listed(store, kept)


def test_test_images_go_with_the_last_kept_bundle_that_shares_them(store, kept, other):
    shared = {
        name: write(store.root / "exports/test_sets" / (name * 64) / "images.npy") for name in "ab"
    }
    for name, key in (("a", next(iter(kept.nodes))), ("b", only_of(other, kept)[0])):
        bundle = store.root / "exports" / key / "cpu" / "test_set"
        bundle.mkdir()
        (bundle / "images.npy").hardlink_to(shared[name])
    sets = [place for place in listed(store, kept) if "test_sets" in place]
    assert sets == [f"exports/test_sets/{'b' * 64}"]
    with in_use(store.root, [], LeaseBook()):  # somebody may be about to share one
        assert not [place for place in listed(store, kept) if "test_sets" in place]


def test_leftovers_of_kills_whatever_the_matrix(store, kept):
    key = next(iter(kept.nodes))
    folder = store.folder(key)
    found = [
        write(folder / ".checkpoint.pt.4711.tmp"),
        write(folder / "checkpoint.pt"),
        write(folder / "checkpoint.previous.pt"),
        age(write(store.root / ".store.json.4711.tmp")),
        age(write(store.root / "pictures" / ".kept.png.1.tmp")),
        age(write(store.root / "exports" / key / f".cpu.partial-{'0' * 12}" / "x").parent),
        age(write(store.root / "measurements" / key / "cpu" / ".fetching-1-2" / "x").parent),
        age(write(store.root / "verify" / "abc" / "lock").parent),
        age(write(store.root / "users" / "1-abc" / "lock").parent),
        write(store.root / ".gone" / "abc" / "spec.json").parent,
    ]
    expected = sorted(str(path.relative_to(store.root)) for path in found)
    assert left(store) == expected
    with store.try_lock(key):
        assert left(store) == [place for place in expected if f"stages/{key[:2]}" not in place]
    text = tidied(store)
    assert "10 things" in text
    assert "only leftovers were looked for" in text
    assert left(store) == []
    assert not any(path.exists() for path in found)
    assert (folder / "result.json").exists()


def test_what_may_be_in_work_is_no_leftover(store, kept, other):
    key = next(iter(kept.nodes))
    now = time.time()
    age(write(store.root / ".store.json.4711.tmp"), now)
    age(write(store.root / "exports" / key / f".cpu.partial-{'0' * 12}" / "x").parent, now)
    age(write(store.root / "users" / "1-abc" / "lock").parent, now)
    unfinished = only_of(other, kept)[0]
    (store.folder(unfinished) / "result.json").unlink()
    write(store.folder(unfinished) / "checkpoint.pt")  # it can be gone on with
    held = age(write(store.root / "verify" / "abc" / "lock").parent)
    with (held / "lock").open("a") as handle:
        assert try_lock(handle.fileno())
        assert left(store) == []


def test_names_that_are_not_the_stores_own_are_left(store, kept):
    before = listed(store, kept)
    for place in ("stages/notes.txt", "stages/ab/mine/x", "exports/mine/x", "tables/mine/x",
                  "measurements/mine/x", "pictures/holiday.png", "mine/.x.tmp"):  # fmt: skip
        age(write(store.root / place))
    assert listed(store, kept) == before
    assert left(store) == []


def test_links_are_not_followed(store, kept, other, tmp_path):
    precious = tmp_path / "elsewhere"
    mine = only_of(other, kept)
    store.folder(mine[0]).rename(write(precious / "x").with_name("stage"))
    store.folder(mine[0]).symlink_to(precious / "stage")
    (store.root / "tables").rename(precious / "tables")
    (store.root / "tables").symlink_to(precious / "tables")
    inner = store.folder(mine[1]) / "link"
    inner.symlink_to(precious)
    before = {p: p.read_bytes() for p in precious.rglob("*") if p.is_file()}
    assert len(before) > 3
    tidied(store, kept)
    assert not store.folder(mine[1]).exists()
    assert store.folder(mine[0]).is_symlink()
    assert {p: p.read_bytes() for p in precious.rglob("*") if p.is_file()} == before


def test_a_place_for_what_goes_that_is_a_link_is_refused(store, kept, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (store.root / ".gone").symlink_to(tmp_path / "elsewhere")
    text = tidied(store, kept)
    assert text.count("left alone, .gone is a link") == 9
    assert "0 things" in text
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_is_taken_up_between_listing_and_deleting_is_left(store, kept, other, monkeypatch):
    mine = only_of(other, kept)
    book, put_aside = LeaseBook(), tidying._put_aside
    held = []

    def late(opened, one):
        if one.key == mine[0] and not held:
            held.append(book.take(store.folder(mine[0])))
        return put_aside(opened, one)

    monkeypatch.setattr(tidying, "_put_aside", late)
    assert "left alone, a process works on it by now" in tidied(store, kept)
    assert store.is_done(mine[0])
    assert not store.folder(mine[1]).exists()


def test_a_kill_while_deleting_leaves_nothing_half(store, kept, other, monkeypatch):
    monkeypatch.setattr(tidying, "_empty", lambda folder: None)  # killed just before
    tidied(store, kept)
    assert len(left(store)) == 9
    assert list(store.stage_keys()) == sorted(kept.nodes)
    monkeypatch.undo()
    tidied(store)
    assert left(store) == []
    assert not (store.root / ".gone").exists()


def test_refusals(store, kept, tmp_path):
    with pytest.raises(StoreError, match="there is no store"):
        tidied(Store(tmp_path / "nothing"), kept)
    assert not (tmp_path / "nothing").exists()
    with maintenance(store.root, LeaseBook()), pytest.raises(StoreError, match="another process"):
        tidied(store, kept)
    bad = tmp_path / "bad.yaml"
    bad.write_text(str(content(rows=[])))
    before = tree(store.root)
    with pytest.raises(Exception, match="rows"):
        tidy(TidyRequest(store.root, (kept.loaded.file, bad), delete=True), Console())
    assert tree(store.root) == before


def test_sizes_count_a_file_with_two_names_once(tmp_path):
    one = write(tmp_path / "a" / "one", "x" * 1000)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").hardlink_to(one)
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    seen = set()
    assert size_of(tmp_path / "a", seen) == 1000
    assert size_of(tmp_path / "b", seen) < 1000
    assert size_of(tmp_path / "nothing") == 0
