"""The web page without a browser: what it shows, what it escapes, what it never overwrites."""

import copy
import json
import os
import shlex
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from command import Bench, kill, wait_for
from made_site import DOCUMENT, fill, made_store, make_site, write_matrix
from smskd_bench.config import load_matrix
from smskd_bench.plan import make_plan
from smskd_bench.publishing.addresses import Addresses, note_addresses, read_addresses
from smskd_bench.publishing.names import stable_id
from smskd_bench.report.leaderboard import read_leaderboard
from smskd_bench.site import command
from smskd_bench.site.changes import stage_changes
from smskd_bench.site.curves import mean_points, seed_curve, thinned
from smskd_bench.site.folder import MARKER, check_folder, new_site
from smskd_bench.site.heat import heat_maps
from smskd_bench.site.inline import number, script_json, visible
from smskd_bench.site.names import row_file, slug
from smskd_bench.site.row_data import Source, row_data
from smskd_bench.site.scales import difference_bars, interval_bars
from smskd_bench.site.table import table_data, table_rows, telling_headings
from smskd_bench.store import Store

from smskd.datasets import dataset_info
from smskd.errors import ConfigError, StoreError

HOSTILE = (
    '<script>hit()</script>"onmouseover=hit() x="</script><!--[a](javascript:hit())&amp;`**b**'
)


ONE_PAIR = {**DOCUMENT, "pairs": DOCUMENT["pairs"][:1]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_store(tmp_path_factory.mktemp("made"), leave_out=["kd>kd no-ref"])


@pytest.fixture(scope="module")
def site(made, tmp_path_factory):
    matrix, _, store = made
    folder = tmp_path_factory.mktemp("site") / "site"
    make_site(folder, matrix, store)
    return folder


class Page(HTMLParser):
    """Elements, texts and places of a page."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.links, self.ids, self.text = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        found = dict(attrs)
        self.links += [found[name] for name in ("href", "src") if found.get(name)]
        self.ids += [found["id"]] if "id" in found else []

    def handle_data(self, data):
        self.text += data


# ------------------------------------------------------------------------------------------- names


def test_files_have_harmless_names_and_no_two_rows_share_one():
    names = ["kd", "KD", "k d", HOSTILE, "../../etc", "\u65e5\u672c", "", "a" * 500, "con.", "a/b"]
    files = [row_file(1, "t>s", name) for name in names]
    assert len(set(files)) == len(files)
    for file in files:
        assert set(file) <= set("abcdefghijklmnopqrstuvwxyz0123456789-/.")
        assert file.startswith("rows/")
        assert file.count("/") == 1
        assert ".." not in file
        assert len(file) < 90
    assert slug("\u65e5\u672c") == "x"


def test_data_in_a_script_cannot_end_it():
    text = script_json({HOSTILE: [HOSTILE, "\u2028", 1.5]})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {HOSTILE: [HOSTILE, "\u2028", 1.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(float("nan"))


def test_only_finite_numbers_are_drawn():
    assert number(1.234567) == 1.2346
    for value in (float("nan"), float("inf"), "1", None, True, [1]):
        assert number(value) is None


def test_text_that_turns_round_or_steers_is_taken_out():
    assert visible("a\u202eb\x1b[31mc\td\n") == "ab[31mc\td\n"


# ------------------------------------------------------------------------------------------ curves


def test_long_histories_are_thinned_with_both_ends():
    rows = [{"epoch": i, "loss": float(i)} for i in range(1, 241)]
    found = thinned(rows, 50)
    assert len(found) == 50
    assert found[0] == (1, {"loss": 1.0})
    assert found[-1] == (240, {"loss": 240.0})
    epochs = [epoch for epoch, _ in found]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("history", [None, "x", 5, [], [1, "a", None], {"epoch": 1}])
def test_a_history_that_is_none_draws_nothing(history):
    assert thinned(history) == []


def test_what_is_no_number_leaves_a_gap():
    rows = [{"epoch": 1, "loss": "x", "lr": 0.1}, {"epoch": "two", "loss": True, 5: 1.0}]
    assert thinned(rows) == [(1, {"lr": 0.1}), (2, {})]


def test_a_curve_runs_through_all_stages(made):
    _, plan, store = made
    cell = next(c for c in plan.cells if c.row == "fitnet>kd" and c.seed == 1)
    records = {key: store.result(key) for key in cell.stages}
    curve = seed_curve(plan, cell, records)
    assert list(curve.series["train_top1"]) == list(range(1, 19))
    assert list(curve.ends) == [12, 18]
    assert curve.ends[18] == pytest.approx(records[cell.stages[1]]["test"]["top1"], abs=1e-2)
    assert min(curve.series["reference/mean_weight"]) == 13
    half = seed_curve(plan, cell, {cell.stages[0]: records[cell.stages[0]]})
    assert list(half.ends) == [12]


def test_means_are_of_what_is_known_there():
    assert mean_points([{1: 1.0, 2: 2.0}, {2: 4.0}]) == {1: 1.0, 2: 3.0}


# ----------------------------------------------------------------------------------------- changes


def test_images_gained_and_lost_follow_from_the_record(made):
    _, plan, _ = made
    cell = next(c for c in plan.cells if c.row == "fitnet>kd")
    images = dataset_info("digits").num_test
    before, lost, gained = images - 60, 7, 19
    after = before - lost + gained
    kept = {
        "same": 95.0,
        "kept": 100 * (before - lost) / before,
        "gained": 100 * gained / (images - before),
    }
    records = {
        cell.stages[0]: {"test": {"top1": 100 * before / images}, "kept": None},
        cell.stages[1]: {"test": {"top1": 100 * after / images}, "kept": kept},
    }
    first, second = stage_changes(plan, cell, records, ["fitnet", "kd"])
    assert (first.gained, first.lost, first.change) == (None, None, None)
    assert (second.gained, second.lost) == (gained, lost)
    assert second.change == pytest.approx(100 * (gained - lost) / images, abs=1e-4)
    assert second.reference
    assert stage_changes(plan, cell, {}, ["fitnet", "kd"]) == []


# -------------------------------------------------------------------------------- heat maps, table


def test_maps_hold_plain_sequences_of_two_stages(made):
    _, plan, store = made
    rows = read_leaderboard(plan, store).rows
    maps = heat_maps(plan, rows)
    assert [(m.pair, m.reference) for m in maps] == [
        (pair.name, held) for pair in plan.matrix.pairs for held in (True, False)
    ]
    held = maps[0]
    assert {place: cell.row for place, cell in held.cells.items()} == {
        ("fitnet", "kd"): "fitnet>kd",  # and not the ablation
        ("kd", "fitnet"): "kd>fitnet",
    }
    means = {(row.pair, row.row): row.mean for row in rows}
    assert held.cells["fitnet", "kd"].mean == means[held.pair, "fitnet>kd"]
    assert maps[1].cells["kd", "kd"].mean is None


def test_the_table_sorts_by_numbers_and_leaves_quiet_columns_out(made):
    _, plan, store = made
    board = read_leaderboard(plan, store)
    rows = table_rows(1, board.rows)
    headings = telling_headings(rows)
    names = [heading.id for heading in headings]
    assert "pair" in names
    assert "status" in names
    assert not {"ms", "mb", "target"} & set(names)
    data = table_data(rows, headings)
    script_json(data)
    for row, entry in zip(board.rows, data["rows"], strict=True):
        assert entry["sort"][names.index("top1")] == row.mean
        assert data["pairs"][entry["pair"]] == row.pair
        assert row.row.lower() in entry["text"]
    assert [row.best for row in rows].count(True) == len(plan.matrix.pairs)


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    matrix, plan, store = made_store(tmp_path, {**ONE_PAIR, "seeds": [0]})
    rows = table_rows(1, read_leaderboard(plan, store).rows)
    assert all(row.cells["top1"].more == "" for row in rows)
    compared = [row for row in rows if row.row.versus]
    assert compared
    assert all("1 of at least 3 seeds" in row.cells["verdict"].more for row in compared)
    make_site(tmp_path / "site", matrix, store)


def test_bars_stay_on_their_scale(made):
    _, plan, store = made
    rows = read_leaderboard(plan, store).rows
    for bars in (interval_bars(rows), difference_bars(rows)):
        assert any(bars)
        for bar in filter(None, bars):
            assert 0 <= bar.left <= bar.x <= bar.right <= 100
    assert {bar.zero for bar in difference_bars(rows) if bar} == {50.0}


def test_commands_name_exactly_this_row(made):
    matrix, plan, store = made
    row = next(r for r in read_leaderboard(plan, store).rows if r.row == "fitnet>kd no-ref")
    cells = [c for c in plan.cells if (c.pair, c.row) == (row.pair, row.row)]
    found = row_data(Source(plan, matrix, store.root), row, cells, {}, [])
    train, verify, export = (shlex.split(line) for _, line in found.commands)
    assert train[:2] == ["smskd-bench", "run"]
    assert train[-1] == f"{row.pair}/{row.row}/s"
    assert verify[2] == export[-1] == cells[0].name
    assert make_plan(load_matrix(matrix), train[-1]).cells == cells


def test_rows_point_to_where_they_were_published(made, tmp_path):
    matrix, plan, store = made
    row, other = read_leaderboard(plan, store).rows[:2]
    cells = [c for c in plan.cells if (c.pair, c.row) == (row.pair, row.row)]
    name, project = plan.matrix.name, "https://wandb.example/me/p"
    runs = (
        stable_id("row", name, row.pair, row.row),
        stable_id("stage", cells[1].stages[0]),
        stable_id("row", name, other.pair, other.row),
    )
    note_addresses(tmp_path, name, Addresses(project, runs))
    note_addresses(tmp_path, "another", Addresses())
    published = read_addresses(tmp_path, name)
    found = row_data(Source(plan, matrix, store.root, published), row, cells, {}, [])
    assert found.links == (
        ("the row", f"{project}/runs/{runs[0]}"),
        ("seed 1, stage 1", f"{project}/runs/{runs[1]}"),
    )
    assert row_data(Source(plan, matrix, store.root), row, cells, {}, []).links == ()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"m": 3}', '{"m": {"project": "javascript:alert(1)", "runs": ["r"]}}']
)
def test_addresses_that_nobody_should_follow_are_none(tmp_path, text):
    path = tmp_path / "wandb" / "published" / "online.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert read_addresses(tmp_path, "m").of_run("r") == ""


# ------------------------------------------------------------------------------------- whole sites


def test_every_link_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) == 1 + 2 * len(DOCUMENT["rows"])
    for path, page in pages.items():
        assert len(set(page.ids)) == len(page.ids), path
        for link in page.links:
            if link == "data:,":  # no icon to ask a server for
                continue
            assert not link.startswith(("http:", "https:", "//", "/")), link
            file, _, place = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), (path, link)
            if place:
                assert place in pages[target].ids, (path, link)


def test_the_site_is_made_of_these_parts(site, made):
    board = (site / "index.html").read_text()
    for words in (
        "A board that was filled by hand",
        "The test set was evaluated",
        "not run yet",
        "No published number is of a pair of this board",
        "No energy" if "No energy" in board else "No export was measured yet",
    ):
        assert words in board, words
    for ending in ("md", "csv", "json", "tex"):
        assert (site / f"tables/1-made.{ending}").read_text()
    assert {path.suffix for path in (site / "figures").iterdir()} == {".png", ".svg"}
    plot = (site / "assets/plotly.min.js").read_text(encoding="utf-8")
    assert "plotly.js v" in plot[:300]
    assert "MIT" in (site / "assets/plotly.LICENSE.txt").read_text()
    assert "fetch(" not in "".join(p.read_text() for p in command_assets())
    names = json.loads((site / MARKER).read_text())["files"]
    assert sorted(names) == sorted(
        p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file() and p.name != MARKER
    )


def command_assets():
    return sorted((Path(command.__file__).parent / "assets").glob("*.js"))


def test_equal_stores_give_equal_sites(made, site, tmp_path):
    matrix, _, store = made
    make_site(tmp_path / "again", matrix, store)
    for path in site.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(site)).read_bytes() == path.read_bytes()


def hostile_document():
    document = copy.deepcopy(ONE_PAIR)
    document["name"] = document["description"] = HOSTILE
    document["methods"] = {"kd" + HOSTILE: {"method": "kd", "settings": {"temperature": 2.0}}}
    document["rows"] += [
        {"name": HOSTILE, "stages": ["fitnet", "kd" + HOSTILE], "note": HOSTILE},
        {"name": HOSTILE + "2", "stages": ["fitnet", "kd"], "controls": [HOSTILE]},
        {"name": "kd>kd held", "stages": ["kd", "kd"], "note": "\u202e\x07"},
    ]
    return document


def test_names_are_text_whatever_they_hold(tmp_path):
    matrix, plan, store = made_store(tmp_path, hostile_document())
    key = next(c for c in plan.cells if c.row == HOSTILE).stages[-1]
    fill(store, plan, [key], environment={HOSTILE: {HOSTILE: HOSTILE}}, wandb={"url": HOSTILE})
    other = next(c for c in plan.cells if c.row == HOSTILE + "2").stages[-1]
    fill(store, plan, [other], wandb={"url": 'https://x.example/"onmouseover="hit()'})
    make_site(tmp_path / "site", matrix, store)
    for path in (tmp_path / "site").rglob("*.html"):
        page = Page(path)
        for tag, attributes in page.elements:
            assert not [name for name in attributes if name.startswith("on")], (path, tag)
            if tag == "script" and attributes.get("type") != "application/json":
                assert attributes["src"].split("/")[-2] == "assets"
            assert not str(attributes.get("href", "")).startswith("javascript")
            assert tag not in ("iframe", "object", "embed", "img", "form") or tag == "form"
    assert HOSTILE in Page(tmp_path / "site/index.html").text.replace("\u200b", "")
    data = (tmp_path / f"site/data/1-{slug(HOSTILE)}.js").read_text()
    assert "<" not in data
    for svg in (tmp_path / "site/figures").glob("*.svg"):
        assert "<script" not in svg.read_text()


def test_unfinished_failed_and_empty_stores_give_a_page(tmp_path):
    matrix = write_matrix(tmp_path, ONE_PAIR)
    plan, store = make_plan(load_matrix(matrix)), Store.open(tmp_path / "store")
    make_site(tmp_path / "empty", matrix, store)
    assert "No row has a result yet" in (tmp_path / "empty/index.html").read_text()
    cell = plan.cells[0]
    store.begin(plan.nodes[cell.stages[0]])
    store.fail(cell.stages[0], "diverged", f"loss {HOSTILE} became NaN", 1)
    fill(store, plan, plan.cells[4].everything)
    make_site(tmp_path / "partly", matrix, store)
    text = Page(tmp_path / "partly/index.html").text
    assert "diverged" in text
    assert "1 of 3" in text


def test_a_store_that_is_not_there_is_an_empty_one(tmp_path):
    matrix = write_matrix(tmp_path, DOCUMENT)
    make_site(tmp_path / "site", matrix, Store(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_damaged_or_half_migrated_store_gives_one_message_and_no_page(made, tmp_path):
    matrix, plan, store = made_store(tmp_path)
    (store.root / "store.json").write_text('{"format": "1 to 2"}')
    with pytest.raises(StoreError, match="format '1 to 2'"):
        make_site(tmp_path / "site", matrix, store)
    (store.root / "store.json").write_text('{"format": 1}')
    path = store.folder(plan.cells[0].stages[0]) / "result.json"
    path.write_text(path.read_text().replace('"top1": 8', '"top1": NaN, "x": 8'))
    with pytest.raises(StoreError, match=r"result\.json is damaged"):
        make_site(tmp_path / "site", matrix, store)
    assert not (tmp_path / "site").exists()


@pytest.mark.slow
def test_several_matrices_give_a_page_that_leads_to_them(made, tmp_path):
    matrix, _, store = made
    other = write_matrix(tmp_path / "other", {**ONE_PAIR, "rows": [["kd"]], "name": "made"})
    request = command.SiteRequest(tmp_path / "site", (matrix, other), store.root)
    boards = command.read_boards(request)
    assert len({board.page for board in boards}) == 2
    out, errors = open_console(), open_console()
    command.build(request, out, errors)
    page = Page(tmp_path / "site/index.html")
    assert {board.page for board in boards} <= set(page.links)
    assert all((tmp_path / "site" / board.page).is_file() for board in boards)


def open_console():
    import io

    from rich.console import Console

    return Console(file=io.StringIO(), width=200)


def test_missing_packages_are_named(made, tmp_path, monkeypatch):
    matrix, _, store = made
    monkeypatch.setattr(command, "NEEDS", ("json", "a_package_that_is_not_there"))
    with pytest.raises(ConfigError, match=r"needs a_package_that_is_not_there[\s\S]*report"):
        make_site(tmp_path / "site", matrix, store)


# ------------------------------------------------------------------------------ what is overwritten


def small_site(folder, text="new", force=False):
    with new_site(folder, force) as work:
        (work / "index.html").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_overwritten_unasked(tmp_path):
    target = tmp_path / "site"
    small_site(target, "first")
    with pytest.raises(StoreError, match=r"there already\n  -> add --force"):
        small_site(target)
    assert (target / "index.html").read_text() == "first"
    small_site(target, force=True)
    assert (target / "index.html").read_text() == "new"
    assert names(tmp_path) == ["site"]


def test_a_folder_of_somebody_else_stays_even_with_force(tmp_path):
    target = tmp_path / "site"
    target.mkdir()
    check_folder(target, False)  # an empty one will do
    (target / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(StoreError, match="no site of this command"):
            small_site(target, force=force)
    (target / "thesis.txt").unlink()
    small_site(target)
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"did not write: thesis\.txt"):
        small_site(target, force=True)
    assert (target / "thesis.txt").read_text() == "mine"


def test_a_marker_that_says_nothing_makes_no_site(tmp_path):
    for text in ("", "[]", '{"files": 3}', '{"files": [1]}', "{"):
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / MARKER).write_text(text)
        with pytest.raises(StoreError, match="no site of this command"):
            check_folder(tmp_path / "site", True)


def test_what_fails_leaves_the_old_site_and_nothing_beside_it(tmp_path):
    target = tmp_path / "site"
    small_site(target, "old")

    def fails():
        with new_site(target, True) as work:
            (work / "index.html").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert (target / "index.html").read_text() == "old"
    assert names(tmp_path) == ["site"]


def test_a_kill_between_the_two_renames_is_mended(tmp_path):
    target = tmp_path / "site"
    small_site(target, "old")
    target.rename(tmp_path / ".site.old-abc")
    with pytest.raises(StoreError, match="there already"):
        small_site(target)
    assert (target / "index.html").read_text() == "old"


@pytest.mark.slow
def test_a_kill_while_it_is_written_leaves_no_site(made, tmp_path):
    matrix, _, store = made
    bench = Bench(tmp_path)
    words = ("report", "--html", tmp_path / "site", "--matrix", matrix, "--store", store.root)
    process = bench.start(*words)
    wait_for(lambda: any(tmp_path.glob(".site.partial-*/rows/*.html")), process)
    kill(process)
    assert not (tmp_path / "site").exists()
    assert "rows of 1 board" in bench(*words).out
    done = bench(*words, expect=3)
    assert "add --force to replace it" in done.err
    assert done.out == ""


def test_leftovers_of_kills_go_when_they_are_old(tmp_path):
    for name, age in ((".site.partial-new", 0), (".site.partial-old", 2 * 86400)):
        (tmp_path / name).mkdir()
        stamp = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (stamp, stamp))
    small_site(tmp_path / "site")
    assert names(tmp_path) == [".site.partial-new", "site"]


def test_targets_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "site"):
        with pytest.raises(StoreError, match=r"is a file|no folder to write to"):
            check_folder(target, True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        check_folder(tmp_path / "closed" / "site", False)
