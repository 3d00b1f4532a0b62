"""docs/methods.md and docs/matrix.md say what is there: the zoo's table, and YAML that loads."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from matrices import content, load_text, plan_of
from smskd_bench.compatibility import check_plan
from smskd_bench.plan import make_plan
from smskd_export.yaml_reader import parse_yaml

from smskd.errors import SmskdError
from smskd.methods import METHODS, MODIFIERS, Method, Modifier
from smskd.methods.base import KINDS
from smskd.taps import CLASSIFIER, FEATURES, NETWORK

DOCS = Path(__file__).parents[2] / "docs"
FILE = Path("demo.yaml")
ZOO = {**METHODS, **MODIFIERS}


def section(page, heading):
    """The text between a heading of the second level and the next one."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def blocks(text, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in found if name == language]


def rows(text):
    """Cells of the lines of tables whose first cell is one name."""
    lines = [line for line in text.splitlines() if re.match(r"\| `\w+` \|", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def line_of(name, cls):
    """What the zoo's table shall say of a method or modifier."""
    return [f"`{name}`", kind_of(cls), cls.paper or "-", reads(cls), default_settings(cls)]


def kind_of(cls):
    if issubclass(cls, Method):
        return cls.kind
    return "modifier" if cls.fits == KINDS else f"modifier of {' and '.join(cls.fits)}"


def reads(cls):
    """What is asked of the networks beside their logits."""
    needs = cls.needs
    student, teacher = (", ".join(sorted(r)) for r in (needs.student_roles, needs.teacher_roles))
    if issubclass(cls, Modifier) and not (student or teacher):
        return "-"
    if not needs.teacher:
        return f"no teacher; student: {student}" if student else "no teacher"
    same = student == teacher
    text = student if same else f"student: {student or 'logits'}; teacher: {teacher or 'logits'}"
    return (text or "logits") + (", index" if needs.index else "")


def default_settings(cls):
    named = {f.name: f.default for f in fields(cls) if f.name != "compat"}
    values = [f"{'CE' if n == 'ce_weight' else n} {written(v)}" for n, v in named.items()]
    return ", ".join(values) or "-"


def written(value):
    if isinstance(value, tuple):
        return " ".join(map(written, value))
    return str(value).lower() if isinstance(value, bool | str) else f"{value:g}"


@pytest.mark.parametrize("name", ZOO)
def test_zoo_has_the_line_of(name):
    wanted = line_of(name, ZOO[name])
    found = [row for row in rows(section("methods.md", "The zoo")) if row[0] == wanted[0]]
    assert found == [wanted], f"docs/methods.md wants: | {' | '.join(wanted)} |"


def test_zoo_has_no_unknown_names():
    named = {row[0].strip("`") for row in rows(section("methods.md", "The zoo"))}
    assert named == set(ZOO)


def test_every_switch_for_other_code_is_in_its_table():
    listed = [
        (row[0].strip("`"), row[1].strip("`")) for row in rows(section("methods.md", "Other code"))
    ]
    choices = [
        (name, choice)
        for name, cls in METHODS.items()
        for choice in get_args(get_type_hints(cls).get("compat"))
        if choice != "none"
    ]
    assert sorted(listed) == sorted(choices)


def test_kinds_and_roles_of_the_contract_are_explained():
    named = {row[0].strip("`") for row in rows(section("methods.md", "The contract"))}
    assert named >= {*KINDS, *FEATURES, CLASSIFIER, NETWORK}


def load_and_check(text):
    """As a run does before it trains anything."""
    plan = make_plan(load_text(text, FILE))
    check_plan(plan, plan.nodes)
    return plan


def snippets(page, heading):
    """Parts of a matrix, to be completed with what they leave out."""
    found = blocks(section(page, heading), "yaml")
    return [pytest.param(text, id=f"{page} {i}") for i, text in enumerate(found)]


@pytest.mark.parametrize(
    "snippet",
    snippets("methods.md", "How the unusual kinds fit") + snippets("matrix.md", "The document"),
)
def test_snippet_loads_and_its_methods_can_work_with_its_networks(snippet):
    given = parse_yaml(snippet, FILE).content
    whole = content(dataset={"name": "cifar10"})
    rest = {key: value for key, value in whole.items() if key not in given}
    load_and_check(snippet + yaml.safe_dump(rest))


def test_an_assistant_that_is_the_student_itself_costs_nothing_beside_it():
    (text,) = (
        t for t in blocks(section("methods.md", "How the unusual kinds fit"), "yaml") if "tfkd" in t
    )
    plan = plan_of(**parse_yaml(text, FILE).content)
    assert len(plan.nodes) == 2


def test_complete_example_is_as_large_as_it_says():
    (text,) = blocks(section("matrix.md", "A complete example"), "yaml")
    plan = load_and_check(text)
    assert (len(plan.cells), plan.stages_before_sharing(), len(plan.nodes)) == (45, 120, 65)


@pytest.mark.parametrize("heading", ["An error listing", "What cannot work together"])
def test_example_gives_the_messages_that_are_shown(heading):
    text = section("matrix.md", heading)
    (matrix,), (shown,) = blocks(text, "yaml"), blocks(text, "")
    with pytest.raises(SmskdError) as caught:
        load_and_check(matrix)
    assert f"error: {caught.value.message}\n  -> {caught.value.hint}\n" == shown
