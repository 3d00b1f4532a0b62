"""The web page in a real, headless Chromium, opened from disk."""

import json
import re
from urllib.parse import urlencode

import pytest
from cases import daily, later
from made_site import DOCUMENT, made_store, make_site
from smskd_bench.report.leaderboard import read_leaderboard
from smskd_bench.site.table import table_rows

from benchmarks.chromium import browser, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")

HOSTILE = '<img src=x onerror="hit=1"><script>hit=1</script>"onmouseover="hit=1" </script>**a**'
THEMES = ("light", "dark")
QUICK = {"timeout": 20_000}


def hostile(document):
    """The same board with one more row, one more method and a description that attack."""
    method = "kd" + HOSTILE
    return {
        **document,
        "description": HOSTILE,
        "methods": {method: {"method": "kd", "settings": {"temperature": 2.0}}},
        "rows": [
            *document["rows"],
            {"name": HOSTILE, "stages": ["fitnet", method], "note": HOSTILE, "controls": ["kd"]},
        ],
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    matrix, plan, store = made_store(folder, hostile(DOCUMENT), leave_out=["kd>fitnet"])
    make_site(folder / "site", matrix, store)
    return folder / "site", read_leaderboard(plan, store)


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


class Opened:
    """A page, and all that it complained about or asked for."""

    def __init__(self, chromium, site, **settings):
        self.site = site
        self.context = chromium.new_context(
            **{"viewport": {"width": 1280, "height": 900}, **settings}
        )
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on(
            "console",
            lambda m: self.said.append(m.text) if m.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def go(self, name="index.html", place=""):
        self.page.goto("about:blank")  # a change of the part after # alone loads nothing
        self.page.goto((self.site / name).as_uri() + place)
        if name == "index.html":
            self.page.wait_for_selector("#table.ready", **QUICK)
        return self.page

    def drawn(self):
        """Scroll through, so that all pictures are drawn."""
        height = self.page.evaluate("document.documentElement.scrollHeight")
        for place in range(0, height + 1, 300):
            self.page.evaluate(f"scrollTo({{top: {place}, behavior: 'instant'}})")
            self.page.wait_for_timeout(30)
        self.page.wait_for_selector("body:not(:has(.plot:not([data-drawn])))", **QUICK)

    def rows(self):
        return self.page.eval_on_selector_all(
            "#table tbody tr",
            "rows => rows.map(r => r.cells[1].querySelector('a').getAttribute('href'))",
        )

    def quiet(self):
        assert self.said == []
        outside = [
            url for url in self.asked if not url.startswith(("file://", "data:", "about:", "blob:"))
        ]
        assert outside == []


@pytest.fixture
def opened(chromium, made):
    found = Opened(chromium, made[0])
    yield found
    found.context.close()


def files(board, wanted=lambda row: True, key=None, falling=False):
    """Pages of rows in an order that Python computed."""
    rows = [r for r in table_rows(1, board.rows) if wanted(r.row)]
    if key is not None:
        known = [r for r in rows if key(r.row) is not None]
        known.sort(key=lambda r: key(r.row), reverse=falling)
        rows = known + [r for r in rows if key(r.row) is None]
    return [r.file for r in rows]


def page_of(board, name):
    return next(r.file for r in table_rows(1, board.rows) if r.row.row == name)


def heading(page, name):
    return page.locator("#table thead th button", has_text=re.compile(f"^{re.escape(name)}$"))


# ------------------------------------------------------------------------------------- it just works


def test_pages_load_from_disk_without_a_complaint_or_a_request(opened, made):
    opened.go()
    opened.drawn()
    assert opened.page.locator("#cost-plot .main-svg").count()
    assert opened.page.locator("#curves-plot .main-svg").count()
    opened.go(page_of(made[1], "fitnet>kd"))
    opened.drawn()
    assert opened.page.locator(".plot .main-svg").count() >= 4
    opened.quiet()


def test_pictures_are_loaded_late_and_their_data_too(opened):
    opened.page.set_viewport_size({"width": 1280, "height": 300})
    opened.go()
    opened.page.wait_for_timeout(200)
    late = [url for url in opened.asked if "plotly" in url or "/data/" in url]
    assert late == []


def test_hostile_names_run_nothing_and_are_seen_as_they_are(opened, made):
    page = opened.go()
    opened.drawn()
    row = page.locator("#table tbody tr", has_text="onerror").first
    assert row.locator("a").inner_text() == HOSTILE
    row.hover()
    page.select_option("#method", "kd" + HOSTILE)
    assert len(opened.rows()) == 2
    opened.drawn()
    opened.go(page_of(made[1], HOSTILE))
    opened.drawn()
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.evaluate("typeof hit") == "undefined"
    assert page.locator("img").count() == 0
    opened.quiet()


def test_links_lead_to_the_row_and_back(opened, made):
    page = opened.go()
    link = page.locator("#table tbody th a").first
    name = link.inner_text()
    link.click()
    page.wait_for_selector("h1")
    assert page.locator("h1").inner_text() == name
    page.locator("nav[aria-label=Site] a").last.click()
    page.wait_for_selector("#table.ready", **QUICK)
    opened.quiet()


# --------------------------------------------------------------------------- sorting and filtering


def test_sorting_orders_by_numbers_and_says_so(opened, made):
    page, board = opened.go(), made[1]
    assert opened.rows() == files(board)
    button = heading(page, "top-1 %")
    button.click()
    assert opened.rows() == files(board, key=lambda r: r.mean, falling=True)
    assert button.locator("..").get_attribute("aria-sort") == "descending"
    button.click()
    assert opened.rows() == files(board, key=lambda r: r.mean)
    assert button.locator("..").get_attribute("aria-sort") == "ascending"
    heading(page, "row").click()
    assert opened.rows() == files(board, key=lambda r: r.row.lower())
    assert page.locator("#table th[aria-sort]").count() == 1
    heading(page, "difference").click()
    assert opened.rows() == files(
        board, key=lambda r: r.versus.difference if r.versus else None, falling=True
    )


def test_filters_leave_the_right_rows(opened, made):
    page, board = opened.go(), made[1]
    pair = board.rows[-1].pair
    page.select_option("#pair", pair)
    assert opened.rows() == files(board, lambda r: r.pair == pair)
    page.select_option("#method", "fitnet")
    assert opened.rows() == files(board, lambda r: r.pair == pair and "fitnet" in r.methods)
    page.fill("#q", "NO-REF fitnet")
    wanted = files(board, lambda r: r.pair == pair and r.row == "fitnet>kd no-ref")
    assert opened.rows() == wanted
    assert page.locator("#count").inner_text() == f"1 of {len(board.rows)} rows"
    page.click("#reset")
    assert opened.rows() == files(board)
    verdict = next(r.versus.verdict for r in board.rows if r.versus)
    page.select_option("#verdict", verdict)
    assert opened.rows() == files(
        board, lambda r: r.versus is not None and r.versus.verdict == verdict
    )
    page.fill("#q", "nothing like this")
    assert opened.rows() == []
    opened.drawn()
    opened.quiet()


def test_the_address_holds_the_view(opened, made):
    page, board = opened.go(), made[1]
    pair = board.rows[0].pair
    page.select_option("#pair", pair)
    page.fill("#q", "kd no-ref")
    heading(page, "difference").click()
    place, shown = page.evaluate("location.hash"), opened.rows()
    assert "pair=" in place
    assert "sort=-difference" in place
    opened.go(place=place)
    assert opened.rows() == shown
    assert page.input_value("#pair") == pair
    assert page.input_value("#q") == "kd no-ref"
    page.evaluate("location.hash = '#method=fitnet'")
    page.wait_for_timeout(100)
    assert opened.rows() == files(board, lambda r: "fitnet" in r.methods)
    page.click(".toc a[href='#basis']")
    assert opened.rows() == files(board, lambda r: "fitnet" in r.methods)
    opened.quiet()


@pytest.mark.parametrize(
    "place",
    [
        "#axis=q&target=%00",
        *(later(p) for p in ("#pair=none", "#sort=nothing", "#=%E0%A4%A", "#method=%3Cscript%3E")),
    ],
)
def test_addresses_that_make_no_sense_do_no_harm(opened, place):
    opened.go(place=place)
    opened.drawn()
    opened.quiet()


def test_costs_and_their_front(opened, made):
    page, board = opened.go(place="#" + urlencode({"axis": "macs"})), made[1]
    opened.drawn()
    best = max((r for r in board.rows if r.mean is not None), key=lambda r: r.mean)
    cheap = min(r.macs for r in board.rows)
    first = max((r for r in board.rows if r.macs == cheap and r.mean), key=lambda r: r.mean)
    words = page.locator("#front").inner_text()
    assert words.startswith(f"Front, cheapest first: {first.row} (")
    assert f"{best.row} ({best.mean:.2f} %)" in words
    page.select_option("#axis", "params")
    assert "axis=params" in page.evaluate("location.hash")


def test_many_rows_come_in_parts(chromium, tmp_path):
    rows = [{"name": f"row {i}", "stages": ["kd"]} for i in range(40)]
    matrix, _, store = made_store(tmp_path, {**DOCUMENT, "rows": rows}, [r["name"] for r in rows])
    make_site(tmp_path / "site", matrix, store)
    opened = Opened(chromium, tmp_path / "site")
    page = opened.go()
    assert len(opened.rows()) == 50
    assert page.locator("#count").inner_text() == "80 rows, the first 50 are shown"
    page.click("#more-button")
    assert len(opened.rows()) == 80
    page.fill("#q", "row 3")
    assert len(opened.rows()) == 2 * 13  # 3, 13, 23, 30 to 39
    assert not page.locator("#more").is_visible()
    opened.drawn()
    opened.quiet()
    opened.context.close()


def test_heat_maps_show_one_pair(opened, made):
    page = opened.go()
    pairs = list(dict.fromkeys(row.pair for row in made[1].rows))
    page.select_option("#heat-pair", pairs[1])
    shown = page.locator("#maps .map:visible")
    assert {shown.nth(i).get_attribute("data-pair") for i in range(shown.count())} == {pairs[1]}


# ------------------------------------------------------------------------ for everybody, everywhere


def violations(page):
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return json.dumps(
        [{"id": v["id"], "nodes": [n["html"][:200] for n in v["nodes"][:3]]} for v in found],
        indent=1,
    )


@pytest.mark.parametrize("theme", daily(THEMES))
@pytest.mark.parametrize(
    "name",
    ["index.html", later("fitnet>kd"), later(HOSTILE), later("kd>fitnet")],
    ids=["index", "row", "hostile", "missing"],
)
def test_axe_finds_nothing(chromium, made, theme, name):
    site, board = made
    # Only axe itself needs more than the page's own policy allows.
    opened = Opened(chromium, site, color_scheme=theme, bypass_csp=True)
    opened.go(name if name == "index.html" else page_of(board, name))
    opened.drawn()
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    found = violations(opened.page)
    opened.context.close()
    assert found == "[]", found


@pytest.mark.parametrize(
    "name", ["index.html", later("fitnet>kd"), HOSTILE], ids=["index", "row", "hostile"]
)
def test_a_phone_never_scrolls_sideways(chromium, made, name):
    site, board = made
    opened = Opened(chromium, site, viewport={"width": 390, "height": 844})
    page = opened.go(name if name == "index.html" else page_of(board, name))
    opened.drawn()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.quiet()
    opened.context.close()


def test_colours_follow_the_button_and_are_remembered(chromium, made):
    opened = Opened(chromium, made[0], color_scheme="light")
    page = opened.go()
    opened.drawn()
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.get_attribute("#theme", "aria-label") == "Colours: dark"
    dark = page.evaluate(paper)
    assert dark != light
    opened.go()
    assert page.evaluate(paper) == dark
    page.click("#theme")
    assert page.evaluate(paper) == light
    opened.quiet()
    opened.context.close()


def test_the_keyboard_reaches_everything(opened):
    page = opened.go()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    heading(page, "top-1 %").focus()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.keyboard.press("Enter")
    assert page.locator("#table th[aria-sort=descending]").count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate(outline) != "none"


def test_without_scripts_the_table_is_whole(chromium, made):
    opened = Opened(chromium, made[0], java_script_enabled=False)
    opened.page.goto((made[0] / "index.html").as_uri())
    assert opened.page.locator("#table tbody tr").count() == len(made[1].rows)
    opened.context.close()
