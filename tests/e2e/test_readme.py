"""What the documents promise is there: commands that are run elsewhere too, files that exist."""

import re

import pytest
from command import ROOT

README, CI = ROOT / "README.md", ROOT / ".ci" / "run"
SKIPPED = {".git", ".venv", "runs", "data", "build", "dist", "node_modules"}
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md")
    if not any(part in SKIPPED or part.startswith(".") for part in path.relative_to(ROOT).parts)
)  # fmt: skip
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PATH = re.compile(
    r"`((?:\.\./)?(?:docs|smskd|bench|export|leaderboards|tests|benchmarks|\.ci)/[\w./-]+\.(?:md|yaml|svg))`"
)


def command(name):
    found = re.search(
        rf"<!-- command: {name} -->\n+```\w*\n(.+?)\n```", README.read_text(), re.DOTALL
    )
    assert found, f"README.md has no command marked {name!r}"
    return found.group(1)


def test_the_test_command_is_what_continuous_integration_calls():
    assert command("test") in CI.read_text()


def test_the_run_command_installs_alike_and_runs_a_matrix_that_is_there():
    install, _, run = command("run").rpartition(" && ")
    assert install in CI.read_text()
    words = run.split()
    assert words[:3] == [".venv/bin/smskd-bench", "run", "--matrix"]
    assert (ROOT / words[3]).is_file()
    assert words[4:] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document):
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    links = [link for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]
    broken = [link for link in links if not leads_somewhere(document, link)]
    assert broken == []
    named = [path for path in PATH.findall(text) if "NAME" not in path]
    assert [
        p for p in named if not (ROOT / p).exists() and not (document.parent / p).exists()
    ] == []


def leads_somewhere(document, link):
    path, _, anchor = link.partition("#")
    target = document.parent / path if path else document
    if not target.exists():
        return False
    return not anchor or anchor in anchors(target.read_text(encoding="utf-8"))


def anchors(text):
    """Names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
