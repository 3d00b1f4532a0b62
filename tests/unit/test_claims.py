"""The ledger of claims: its file, the evidence computed from stores, and badges of published numbers."""

import io
import json
from pathlib import Path

import pytest
from filled import fill, filled
from matrices import PAIR, plan_of, write_matrix
from rich.console import Console
from smskd_bench import claims
from smskd_bench.claims import Claim, ClaimTest, Ledger, check_claims, load_claims
from smskd_bench.config import load_matrix
from smskd_bench.plan import make_plan
from smskd_bench.published import STANDARD, Published, load_published, load_sources
from smskd_bench.report.claim_board import ClaimsRequest, show
from smskd_bench.report.evidence import claim_states
from smskd_bench.report.published_comparison import (
    badge_of,
    compare_published,
    difference_ends,
    protocol_of,
)
from smskd_bench.report.rows import leaderboard_rows
from smskd_bench.store import Store
from smskd_export.yaml_reader import parse_yaml

from smskd.errors import ConfigError, SmskdError

FOLDER = Path(__file__).parents[2] / "leaderboards"
SEEDS = [0, 1, 2]
ROWS = [
    {"stages": ["fitnet", "kd"]},
    {"stages": ["fitnet", "kd"], "name": "no-ref", "reference": None},
    {"stages": ["kd", "kd"], "name": "twice", "reference": None},
]
TOP1 = {
    "fitnet>kd": [77.0, 77.3, 77.1],
    "no-ref": [77.01, 77.29, 77.1],
    "twice": [72.0, 72.2, 72.2],
}


def claim(expect, row="fitnet>kd", control="twice", name="c", percent=10.0):
    return Claim(
        name, "it helps", "nobody", expect, (ClaimTest("some", row, control, "why"),), percent
    )


def state_of(plan, store, *claims):
    return [state.state for state in claim_states(Ledger(claims), plan, store)]


@pytest.fixture(scope="module")
def plan():
    return plan_of(rows=ROWS, seeds=SEEDS)


@pytest.fixture
def store(tmp_path, plan):
    return filled(tmp_path / "runs", plan, TOP1)


# --------------------------------------------------------------------------------------- the file


def test_the_shipped_claims_name_rows_that_are_there():
    ledger = load_claims()
    matrices = {path.stem: path for path in FOLDER.glob("*.yaml") if path.name != "claims.yaml"}
    ids = {claim.id for claim in ledger.claims}
    assert {"stages", "reference", "tcp", "cost", "order", "pairing"} <= ids
    named = {test.matrix for claim in ledger.claims for test in claim.tests}
    assert {"quickstart", "cifar100"} <= named <= matrices.keys()
    for name in named:
        matrix = load_matrix(matrices[name]).matrix
        assert matrix.name == name
        for one in ledger.claims:
            claims.tests_of(one, matrix)


def test_the_shipped_claims_hold_no_results():
    text = (FOLDER / "claims.yaml").read_text()
    assert "top1" not in text
    assert "%" not in text


BROKEN = {
    "claims: []\nclaim: 1": "unknown key; did you mean 'claims'?",
    "claims: [{id: a}]": "claims[0].claim: is missing",
    "claims: [{id: a, claim: b, source: c, expect: good, tests: []}]": "'better', 'worse', 'equal'",
    "claims: [{id: a, claim: b, source: c, expect: better, tests: []}]": "tests: is empty",
    "- 1": "mapping",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_ledger_is_one_message(text):
    with pytest.raises(ConfigError) as caught:
        check_claims(parse_yaml(text, Path("c.yaml")))
    assert BROKEN[text] in str(caught.value)


def test_two_claims_of_one_name():
    one = "{id: a, claim: b, source: c, expect: better, tests: [{matrix: m, row: r, control: s}]}"
    with pytest.raises(ConfigError, match="id of an earlier claim"):
        check_claims(parse_yaml(f"claims: [{one}, {one}]", Path("c.yaml")))


def test_a_row_that_is_not_there(plan, store):
    with pytest.raises(ConfigError, match=r"no row 'no-rf'(.|\n)*did you mean 'no-ref'"):
        state_of(plan, store, claim("better", control="no-rf"))


# ------------------------------------------------------------------------------------- the evidence


def test_what_a_store_says_about_claims(plan, store):
    found = state_of(
        plan, store,
        claim("better", name="1"), claim("worse", name="2"), claim("equal", name="3"),
        claim("different", name="4"), claim("better", control="no-ref", name="5"),
        claim("equal", control="no-ref", name="6"), claim("different", control="no-ref", name="7"),
    )  # fmt: skip
    assert found == [
        "supported", "contradicted", "contradicted", "supported", "contradicted", "supported", "contradicted",
    ]  # fmt: skip


def test_claims_of_other_matrices_and_without_results(plan, tmp_path):
    empty = Store.open(tmp_path / "empty")
    other = Claim("o", "x", "y", "better", (ClaimTest("other", "a", "b"),))
    assert state_of(plan, empty, claim("better"), claim("cheap", name="t"), other) == [
        "not run", "not run", "not tested here",
    ]  # fmt: skip


def test_several_tests_of_one_claim(plan, store):
    tests = (ClaimTest("some", "fitnet>kd", "twice"), ClaimTest("some", "fitnet>kd", "no-ref"))
    (found,) = claim_states(Ledger((Claim("c", "x", "y", "better", tests),)), plan, store)
    assert found.state == "mixed"
    assert [e.says for e in found.evidence] == ["supports", "contradicts"]
    assert {e.versus.family for e in found.evidence} == {2}


def test_few_seeds_leave_a_claim_open(plan, tmp_path):
    store = filled(tmp_path, plan, {row: numbers[:2] for row, numbers in TOP1.items()})
    (found,) = claim_states(Ledger((claim("better"),)), plan, store)
    assert (found.state, found.evidence[0].why) == ("open", "2 of at least 3 seeds")


def test_pairs_are_averaged_seed_by_seed_and_stand_apart_too(tmp_path):
    pairs = [
        {"teacher": "resnet14_half", "student": "resnet8_quarter"},
        {"teacher": "resnet20", "student": "resnet8_half"},
        {"teacher": "resnet14", "student": "resnet8_half"},
    ]
    plan = plan_of(rows=ROWS, seeds=SEEDS, pairs=pairs)
    other = "resnet20>resnet8_half"
    scores = {(PAIR, row): numbers for row, numbers in TOP1.items()}
    scores |= {(other, "fitnet>kd"): [50.0, 50.0, 52.0], (other, "twice"): [49.0, 48.0, 50.0]}
    (found,) = claim_states(Ledger((claim("better"),)), plan, filled(tmp_path, plan, scores))
    (evidence,) = found.evidence
    first = [a - b for a, b in zip(TOP1["fitnet>kd"], TOP1["twice"], strict=True)]
    means = [(a + b) / 2 for a, b in zip(first, [1.0, 2.0, 2.0], strict=True)]
    assert evidence.versus.difference == pytest.approx(sum(means) / 3)
    assert (evidence.versus.n, evidence.pairs) == (3, (PAIR, other))
    assert evidence.missing_pairs == ("resnet14>resnet8_half",)
    assert evidence.by_pair[other].difference == pytest.approx(5 / 3)
    assert {v.family for v in evidence.by_pair.values()} == {2}


# -------------------------------------------------------------------------------- training time


def timed(store, plan, seconds, **more):
    """Every stage of every cell, with its seconds; by row and seed."""
    for cell in plan.cells:
        for key in cell.stages:
            paths = {"teacher": "live", "folded": 1, "compiled": False}
            sessions = [{"device": "cpu", "threads": 1}]
            record = {
                "train_seconds": seconds(cell),
                "fast_paths": paths,
                "sessions": sessions,
                **more,
            }
            if not store.is_done(key):
                fill(store, plan, key, 50.0, **record)
    return store


@pytest.mark.parametrize(
    ("factor", "state"), [(1.03, "supported"), (1.5, "contradicted"), (1.1, "open")]
)
def test_time_beside_the_control(plan, tmp_path, factor, state):
    def seconds(cell):
        return (10.0 + cell.seed / 100) * (
            factor + 0.005 * cell.seed if cell.row == "fitnet>kd" else 1
        )

    store = timed(Store.open(tmp_path), plan, seconds)
    (found,) = claim_states(Ledger((claim("cheap", control="no-ref"),)), plan, store)
    assert found.state == state
    time = found.evidence[0].time
    assert time.n == 3
    assert time.low < time.percent < time.high
    # Only the stages that are not shared count: the first stage is the same stage run.
    assert time.percent == pytest.approx(100 * (factor + 0.005 - 1), abs=0.1)


def test_only_like_timings_compare(plan, tmp_path):
    folded = {"fast_paths": {"teacher": "live", "folded": 3, "compiled": False}}
    store = timed(Store.open(tmp_path / "a"), plan, lambda cell: 10.0, **folded)
    (found,) = claim_states(Ledger((claim("cheap", control="no-ref"),)), plan, store)
    assert (found.state, found.evidence[0].time.why) == (
        "open", "seeds were trained as one network, so they are one timing",
    )  # fmt: skip
    store = Store.open(tmp_path / "b")
    for cell in plan.cells:
        for key in cell.stages:
            device = [{"device": cell.row, "threads": 1}]
            if not store.is_done(key):
                fill(store, plan, key, 50.0, train_seconds=1.0, sessions=device)
    (found,) = claim_states(Ledger((claim("cheap", control="no-ref"),)), plan, store)
    assert "different devices" in found.evidence[0].why


# ------------------------------------------------------------------------------- published numbers


def test_every_source_says_which_epoch_it_reports():
    sources = load_sources()
    assert {n.source for n in load_published()} == sources.keys()
    text = (FOLDER / "published" / "README.md").read_text()
    for source in sources.values():
        assert source.epoch in ("last", "best", "not said")
        assert f"| {source.name} | {source.place} | {source.epoch} |" in text


@pytest.fixture(scope="module")
def standard():
    return make_plan(load_matrix(FOLDER / "cifar100-methods.yaml"), "resnet56>resnet20/")


BADGES = {
    "kd": ([70.6, 70.8, 70.65], "reproduced"),
    "fitnet": ([72.0, 72.1, 72.05], "higher"),
    "crd": ([68.0, 68.1, 67.9], "lower"),
    "sp": ([69.6], "too few seeds"),
    "ab": ([69.0, 69.1, 69.2], "different protocol"),
    "vid": ([], "not run"),
}


def test_badges(tmp_path, standard):
    store = filled(tmp_path, standard, {row: numbers for row, (numbers, _) in BADGES.items()})
    found = compare_published(standard, leaderboard_rows(standard, store))
    first = {}
    for comparison in found:
        if comparison.published.pair == "resnet56>resnet20":
            first.setdefault(comparison.row or comparison.published.method, comparison)
    assert {row: first[row].badge for row in BADGES} == {row: b for row, (_, b) in BADGES.items()}
    kd = first["kd"]
    assert (kd.published.top1, kd.n) == (70.66, 3)
    assert kd.difference == pytest.approx(kd.mean - 70.66)
    assert kd.difference_low < 0 < kd.difference_high
    assert first["ab"].difference is None
    assert {c.badge for c in found if not c.row} == {"no row"}
    best = next(c for c in found if c.epoch == "best" and c.row == "kd_ls")
    assert best.published.source == "LSKD README"


def test_another_recipe_is_another_protocol(tmp_path):
    pairs = [{"teacher": "resnet56", "student": "resnet20"}]
    small = {"recipe": {"epochs": [10]}, "dataset": {"name": "cifar100"}}
    plan = plan_of(pairs=pairs, rows=[["kd"]], seeds=SEEDS, **small)
    rows = leaderboard_rows(plan, filled(tmp_path, plan, {"kd": [70.6, 70.7, 70.8]}))
    assert protocol_of(plan, rows[0]) == ""
    assert {c.badge for c in compare_published(plan, rows) if c.row} == {"different protocol"}
    whole = plan_of(
        pairs=pairs, rows=[["kd"]], recipe={"epochs": [240]}, dataset={"name": "cifar100"}
    )
    assert protocol_of(whole, leaderboard_rows(whole, Store.peek(tmp_path / "none"))[0]) == STANDARD


def test_theirs_is_one_run_with_their_spread_if_they_give_it():
    plain = Published("p", "m", 70.0, None, "s", STANDARD, "kd")
    spread = Published("p", "m", 70.0, 2.0, "s", STANDARD, "kd")
    ours = [70.1, 70.2, 70.3]
    narrow, wide = difference_ends(ours, plain), difference_ends(ours, spread)
    assert wide[0] < narrow[0] < 0.2 < narrow[1] < wide[1]
    assert difference_ends([70.0], plain) is None
    assert badge_of(2.0, (-1.0, 5.0)) == "too few seeds"


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def ledger(tmp_path):
    file = tmp_path / "own.yaml"
    test = "{matrix: some, row: fitnet>kd, control: twice, asks: '[red]more | <b>'}"
    file.write_text(
        f"claims: [{{id: a, claim: it helps, source: b, expect: better, tests: [{test}]}}]"
    )
    return file


@pytest.mark.parametrize("form", ["table", "markdown", "json"])
def test_the_command_shows_the_evidence(tmp_path, store, ledger, form):
    matrix, out = write_matrix(tmp_path, rows=ROWS, seeds=SEEDS), Console(file=io.StringIO())
    show(ClaimsRequest(matrix, store.root, ledger=ledger, form=form), out)
    text = out.file.getvalue()
    assert "supported" in text
    assert "[red]more" in text
    if form == "json":
        assert json.loads(text)[0]["evidence"][0]["versus"]["verdict"] == "better"
    else:
        assert "+ better" in text
        assert ("&lt;b>" in text) == (form == "markdown")


def test_a_matrix_that_tests_no_claim_and_pairs_that_nobody_published(tmp_path, ledger):
    matrix = write_matrix(tmp_path, rows=ROWS, name="another")
    for request, words in (
        (
            ClaimsRequest(matrix, tmp_path, ledger=ledger),
            "no claim names rows of the matrix another",
        ),
        (ClaimsRequest(matrix, tmp_path, published=True), "no published number is of a pair"),
    ):
        with pytest.raises(SmskdError, match=words):
            show(request, Console(file=io.StringIO()))


@pytest.mark.parametrize("form", ["table", "markdown", "json"])
def test_published_numbers_that_were_not_run_are_counted(tmp_path, form):
    pairs = [{"teacher": "resnet56", "student": "resnet20"}]
    matrix = write_matrix(tmp_path, pairs=pairs, rows=[["kd"]], dataset={"name": "cifar100"})
    out = Console(file=io.StringIO(), width=300)
    show(ClaimsRequest(matrix, tmp_path / "none", published=True, form=form), out)
    if form == "json":
        assert json.loads(out.file.getvalue()) == []
    else:
        assert "not run" in out.file.getvalue()
    everything = Console(file=io.StringIO(), width=300)
    show(
        ClaimsRequest(matrix, tmp_path / "none", published=True, form=form, everything=True),
        everything,
    )
    assert "70.66" in everything.file.getvalue()
