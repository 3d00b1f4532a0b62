"""Small file systems, so that a disk can be full, and folders that nobody may write to."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from command import Bench


@contextmanager
def small_disk(folder, size):
    """A real file system of that size, or a skip where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(folder, size):
    """Give it more room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def without_roots_rights(folder):
    """The command without root's right to write where the file system says no."""
    if os.geteuid() != 0:
        return Bench(folder)
    rights = "-dac_override,-dac_read_search,-fowner"
    prefix = ("setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}")
    if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("nothing is read-only for root, and setpriv is not there to drop rights")
    return Bench(folder, prefix)


def set_writable(store, writable):
    """Give or take the right to make files in a store; open files stay open."""
    for path in (store, *store.rglob("*")):
        if path.is_dir():
            path.chmod(0o755 if writable else 0o555)
