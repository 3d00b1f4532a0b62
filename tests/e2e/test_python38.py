"""The runner on the oldest Python that devices have: that of JetPack 5."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from real_bundle import export_digit_reader, make_real_bundle
from smskd_export.measuring import measure
from sshd import write_script

from smskd.errors import RefusedError

KEPT = Path(tempfile.gettempdir()) / "smskd-python38"


def oldest():
    """Some Python 3.8 that works, or None."""
    places = (os.environ.get("SMSKD_PYTHON38"), shutil.which("python3.8"))
    named = [Path(place) for place in places if place]
    for found in [*named, *sorted(Path.home().glob(".pyenv/versions/3.8*/bin/python"))]:
        version = subprocess.run([found, "-V"], capture_output=True, text=True, check=False)
        if version.stdout.startswith("Python 3.8"):
            return found
    return None


@pytest.fixture
def python38():
    found = oldest()
    if found is None:
        pytest.skip("no Python 3.8 is here")
    return found


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def with_packages(python):
    """The interpreter of an environment with numpy and ONNX Runtime, made once."""
    made, done = KEPT / "bin" / "python", KEPT / "complete"
    if not done.exists():
        shutil.rmtree(KEPT, ignore_errors=True)
        subprocess.run([python, "-m", "venv", KEPT], check=True)
        install = [made, "-m", "pip", "install", "-q", "numpy", "onnxruntime"]
        if subprocess.run(install, capture_output=True, check=False).returncode:
            pytest.skip("numpy and onnxruntime cannot be installed for Python 3.8 here")
        done.touch()
    return made


def test_without_packages_it_says_what_is_missing(python38, home, tmp_path):
    bundle, _ = make_real_bundle(tmp_path / "real")
    bare = tmp_path / "bare"
    write_script(bare, f'exec "{python38}" -S "$@"')
    with pytest.raises(RefusedError) as caught:
        measure(bundle, tmp_path / "out", python=str(bare), quick=True)
    assert "runtime_missing: Python has no numpy on this device" in str(caught.value)


@pytest.mark.slow
def test_it_measures_what_a_newer_one_measures(python38, tmp_path, monkeypatch):
    python = with_packages(python38)
    monkeypatch.setenv("HOME", str(tmp_path))
    bundle, test_set = export_digit_reader(tmp_path / "real")
    old = measure(bundle, tmp_path / "old", test_set=test_set, quick=True, python=str(python))
    new = measure(bundle, tmp_path / "new", test_set=test_set, quick=True)
    print(f"\n{old.before.python} {old.before.runtime_version}; {new.before.python} "
          f"{new.before.runtime_version}")  # fmt: skip
    assert old.before.python.startswith("3.8")
    assert [row.id for row in old.rows] == [row.id for row in new.rows]
    for ours, theirs in zip(old.rows, new.rows, strict=True):
        print(ours.id, ours.parity, ours.accuracy)
        assert ours.status == theirs.status == "ok"
        assert ours.parity.agreement == theirs.parity.agreement
        assert ours.parity.max_abs_diff == pytest.approx(theirs.parity.max_abs_diff, abs=1e-4)
        assert (ours.accuracy is None) == (theirs.accuracy is None)
        if ours.accuracy is not None:
            assert ours.accuracy.top1 == theirs.accuracy.top1
            assert ours.accuracy.agreement == theirs.accuracy.agreement
