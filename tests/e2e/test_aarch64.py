"""The runner on an imitated ARM processor: what it computes is checked, its times mean nothing.

The imitation is qemu in user mode over a Debian root of 77 MB; ``/proc/cpuinfo`` of that root
must be an ARM one, because ONNX Runtime looks there for what the processor can do.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from real_bundle import export_digit_reader
from smskd_export.measuring import measure, probe
from sshd import write_script

KEPT = Path(tempfile.gettempdir()) / "smskd-aarch64"
TOOLS = ("qemu-aarch64-static", "mmdebstrap")
PACKAGES = "python3-minimal,python3,libstdc++6,libgomp1"
CORE = """processor\t: {number}
BogoMIPS\t: 48.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not all(map(shutil.which, TOOLS)),
        reason="apt-get install qemu-user-static mmdebstrap makes this possible",
    ),
]


def done(*command):
    """Run a command that makes the imitated machine; skip where it cannot be made."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.skip(f"{command[0]} fails here: {ran.stderr.strip()[-200:]}")


@pytest.fixture(scope="module")
def arm():
    """An interpreter of ARM programs, made once and kept."""
    root, site, wheels = KEPT / "root", KEPT / "site", KEPT / "wheels"
    python = KEPT / "python"
    if not python.exists():
        shutil.rmtree(KEPT, ignore_errors=True)
        KEPT.mkdir()
        done("mmdebstrap", "--variant=extract", "--architectures=arm64", f"--include={PACKAGES}",
             "bookworm", str(root))  # fmt: skip
        platforms = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
        done(sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels),
             "--only-binary=:all:", *[f"--platform={name}" for name in platforms],
             "--python-version=3.11", "onnxruntime", "numpy")  # fmt: skip
        for wheel in wheels.iterdir():
            shutil.unpack_archive(wheel, site, "zip")
        (root / "proc").mkdir(exist_ok=True)
        (root / "proc" / "cpuinfo").write_text("".join(CORE.format(number=n) for n in range(2)))
        qemu = f"qemu-aarch64-static -cpu cortex-a76 -L {root} {root}/usr/bin/python3.11"
        write_script(python, f'PYTHONPATH={site}; export PYTHONPATH; exec {qemu} "$@"')
    return str(python)


def test_it_computes_there_what_it_computes_here(arm, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    bundle, test_set = export_digit_reader(tmp_path / "real")
    found, refusals = probe(bundle, python=arm)
    assert (found.arch, found.emulated, refusals) == ("aarch64", True, ())
    started = time.monotonic()
    there = measure(bundle, tmp_path / "arm", test_set=test_set, quick=True, python=arm)
    seconds = time.monotonic() - started
    here = measure(bundle, tmp_path / "here", test_set=test_set, quick=True)
    assert there.before.emulated
    assert not here.before.emulated
    print(f"\n{there.before.cpu}, ONNX Runtime {there.before.runtime_version}: {seconds:.0f} s")
    for ours, theirs in zip(there.rows, here.rows, strict=True):
        print(ours.id, ours.parity, ours.accuracy and ours.accuracy.top1)
        assert ours.status == theirs.status == "ok"
        assert ours.parity.agreement == theirs.parity.agreement
        assert ours.parity.max_abs_diff == pytest.approx(theirs.parity.max_abs_diff, abs=1e-3)
        if ours.accuracy is not None:
            classes = (ours.accuracy.classes_file, theirs.accuracy.classes_file)
            ours_are, theirs_are = (
                np.load(tmp_path / "arm" / classes[0]),
                np.load(tmp_path / "here" / classes[1]),
            )
            np.testing.assert_array_equal(ours_are, theirs_are)
            assert ours.accuracy.top1 == theirs.accuracy.top1
