"""What is renamed into its place is on the disk by then, and so is its name right after.

A power cut keeps what was forced to disk and any part of the rest. So a name may point to new
content only after an fsync of that content, and is safe after an fsync of its folder.
"""

import os
import stat
from io import StringIO
from pathlib import Path

import pytest
import yaml
from command import tiny
from smskd_bench import exporting, running
from smskd_bench.fast_paths import FastPaths
from smskd_bench.terminal import Terminal

HELD_NOT_KEPT = ("lease.json",)
"""Says who holds what just now; after a power cut nobody does."""


class Disk:
    """Watches what is forced to disk, and what is renamed.

    Attributes:
        lost: Files that were renamed before their content was on the disk.
        renames: How many files and folders were.
        unsafe: Folders with names that a power cut could take back.
    """

    def __init__(self, root, patch):
        self.root, self.synced = root, {}
        self.lost, self.renames, self.unsafe = [], 0, {}
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def watched_fsync(handle):
            fsync(handle)
            self._note(os.fstat(handle))

        def watched(do):
            def move(source, target, **words):
                inside = self._is_final(Path(target))
                if inside:
                    self._check(Path(source), Path(target))
                do(source, target, **words)
                if inside:
                    folder = Path(target).parent
                    self.unsafe[folder.stat().st_ino] = folder

            return move

        patch.setattr(os, "fsync", watched_fsync)
        patch.setattr(os, "rename", watched(rename))
        patch.setattr(os, "replace", watched(replace))

    def _is_final(self, target):
        """Whether readers look there; names with a dot are folders that are still being made."""
        if self.root not in target.parents or target.name in HELD_NOT_KEPT:
            return False
        return not any(part.startswith(".") for part in target.relative_to(self.root).parts)

    def _note(self, found):
        self.synced[found.st_ino] = (found.st_size, found.st_mtime_ns)
        if stat.S_ISDIR(found.st_mode):
            self.unsafe.pop(found.st_ino, None)

    def _check(self, source, target):
        self.renames += 1
        for path in [source, *source.rglob("*")]:
            found = path.stat()
            if self.synced.get(found.st_ino) != (found.st_size, found.st_mtime_ns):
                self.lost.append(target / path.relative_to(source))


@pytest.fixture
def disk(tmp_path, monkeypatch):
    return Disk(tmp_path / "store", monkeypatch)


def test_a_run_and_an_export_rename_only_what_is_on_the_disk(disk, tmp_path):
    matrix, store = tmp_path / "matrix.yaml", disk.root
    matrix.write_text(yaml.safe_dump(tiny(["fitnet", "kd"], seeds=[0])))
    console = Terminal(file=StringIO(), width=120)
    paths = FastPaths.choose(False, workers=1)
    request = running.RunRequest(matrix, store, device="cpu", tracking="none", paths=paths)
    assert running.run(request, console) == 0
    words = {"matrix": matrix, "store": store, "target": "cpu", "quick": True, "tracking": "none"}
    exporting.export(exporting.request(**words), console)
    assert disk.renames > 20
    assert disk.lost == []
    assert list(disk.unsafe.values()) == []
