"""Migrates a copy of a store, killed before its n-th change of the disk, for every n. A program.

    python migration_kills.py STORE

Prints for each n what ``store.json`` said after the kill. A fork for each, from a process without
threads, as loading torch takes seconds.
"""

import io
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console
from smskd_bench import migrating, store

from smskd.errors import StoreError


def rename(old, new):
    def step(root):
        """Renames files one after another, some of which may be renamed already."""
        for path in sorted(root.glob(f"stages/*/*/{old}")):
            path.rename(path.with_name(new))

    return step


def register():
    store.STORE_FORMAT = 3
    migrating.STEPS.update(
        {1: rename("spec.json", "two.json"), 2: rename("two.json", "three.json")}
    )


def kill_before(number):
    """Kill this process before its ``number``-th renaming of a file, by whatever way."""
    count = itertools.count()

    def dying(change):
        def changed(*words):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*words)

        return changed

    Path.rename, Path.replace = dying(Path.rename), dying(Path.replace)


def in_child(work):
    """Do it in a process of its own; returns the signal or status that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def migrate(root):
    migrating.migrate(root, Console(file=io.StringIO()))


def files(root):
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and "maintenance" not in p.parts and not p.name.endswith(".tmp")
    }


def killed(root, number):
    kill_before(number)
    migrate(root)


def main(original):
    register()
    straight = Path(shutil.copytree(original, original.with_name("straight")))
    migrate(straight)
    for number in itertools.count():
        root = Path(shutil.copytree(original, original.with_name(f"killed{number}")))
        status = in_child(lambda r=root, n=number: killed(r, n))
        said = json.loads((root / "store.json").read_text())["format"]
        if said != 3:
            with pytest.raises(StoreError) as refused:
                store.Store.peek(root)
            assert "smskd-bench migrate --store" in refused.value.hint
            migrate(root)
        assert files(root) == files(straight), number
        if status == 0:
            return
        assert status == -signal.SIGKILL
        print("killed", number, said, flush=True)


main(Path(sys.argv[1]))
