"""The library example of the README runs as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DRAFT = ROOT / "tests" / "e2e" / "library_snippet.py"
MARKER = "<!-- library snippet -->"
BLOCK = re.compile(rf"{MARKER}\s*```python\n(.*?)```\s*{MARKER}", re.DOTALL)


def readme_block():
    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    assert len(blocks) == 1, f"README.md must hold one python block between two {MARKER}"
    return blocks[0]


def test_readme_block_is_the_tested_file():
    assert readme_block() == DRAFT.read_text(encoding="utf-8")


def test_snippet_runs_and_prints_each_stages_accuracy(tmp_path):
    code = readme_block() if README.exists() else DRAFT.read_text(encoding="utf-8")
    script = tmp_path / "snippet.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = re.findall(
        r"^stage (\d): ([\d.]+) % of the test digits are right$", done.stdout, re.MULTILINE
    )
    assert [number for number, _ in said] == ["1", "2"]
    assert all(float(top1) > 70 for _, top1 in said)


def test_snippet_is_short():
    lines = [line for line in DRAFT.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= 25
