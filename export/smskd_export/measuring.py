"""A bundle measured on some machine: the checked results, or one message that says why not.

``measure`` is what ``smskd-bench measure`` does; it needs no torch.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from smskd.errors import DataError, RefusedError, RunError, StoreError, UsageError, unknown_name
from smskd_export.bundle import verify_bundle
from smskd_export.local import LocalTransport
from smskd_export.manifest import RUNNER, Manifest, bundle_id
from smskd_export.measurement import RESULT, Measurement, Probe, read_measurement
from smskd_export.publish import published
from smskd_export.records import adapter, first_problem
from smskd_export.ssh import SshTransport
from smskd_export.test_sets import hash_test_set
from smskd_export.transport import (
    REFUSED,
    Ended,
    Event,
    Job,
    LinkLostError,
    Refusal,
    Transport,
)

_CODE = re.compile(r"[a-z][a-z0-9_]*")
EVENTS = "events.jsonl"


def measure(
    bundle: Path,
    out: Path,
    *,
    test_set: Path | None = None,
    device: str | None = None,
    quick: bool = False,
    threads: int | None = None,
    affinity: Sequence[int] = (),
    precisions: Sequence[str] = (),
    allow: Sequence[str] = (),
    energy: bool = True,
    python: str | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Measurement:
    """Measure a bundle here or on a device, into the new folder ``out``.

    Args:
        bundle: Folder of the bundle.
        out: Folder to make: complete afterwards, or absent.
        test_set: Folder of the bundle's test set; None: accuracy is not measured.
        device: As ssh takes it; None: this machine.
        quick: Shorten the protocol; the numbers are good for wiring and for no claim.
        threads: CPU threads of the runtime; None: as the target says.
        affinity: Cores to run on; empty: as the target says.
        precisions: Only these; empty: all.
        allow: Codes of requirements that need not be met; the results say so.
        energy: Whether to measure energy where it can be.
        python: Interpreter on the machine that measures; None: ``python3`` of a device, and here
            the one that runs this.
        resume: Fetch what a lost link left on the device, and measure nothing.
        on_event: Gets what the runner reports, free of control characters, and besides ``send``
            and ``fetch`` (with ``done`` bytes) and ``not_removed`` (with ``message``).

    Raises:
        UsageError: an argument makes no sense.
        StoreError: the bundle is damaged, or ``out`` cannot be made.
        DataError: the test set is not that of the bundle.
        RefusedError: the machine refuses, or cannot be used as it is.
        LinkLostError: the link to the device broke; the message says what to do.
        RunError: the runner crashed, or brought something else.
    """
    options = _options(quick, threads, affinity, precisions, allow, energy)
    job, manifest = _job(bundle, test_set, options, python)
    _known(precisions, manifest)
    transport = _transport(device)
    scratch = out.parent / _scratch_name(job, transport)
    with published(out) as folder, _kept_for_resume(scratch, keep=resume):
        place = _carry_out(transport, job, scratch, resume, on_event)
        found = _checked(place, job, quick, transport.where)
        _move(place, folder, {RESULT, EVENTS, *found.files})
    transport.forget(job, on_event)
    return found


def probe(
    bundle: Path,
    device: str | None = None,
    *,
    allow: Sequence[str] = (),
    python: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> tuple[Probe, tuple[Refusal, ...]]:
    """Look at a machine: what it is, and what keeps it from measuring the bundle.

    Raises:
        UsageError: an argument makes no sense.
        StoreError: the bundle is damaged.
        RefusedError: the device cannot be reached or used as it is.
        LinkLostError: the link to the device broke.
        RunError: the runner crashed.
    """
    job, _ = _job(bundle, None, _options(allow=allow), python)
    transport = _transport(device)
    ended = transport.probe(job, on_event)
    if ended.code not in (0, REFUSED) or ended.probe is None:
        raise _crash(ended, transport.where)
    try:
        found = adapter(Probe).validate_python(ended.probe)
    except ValidationError as error:
        raise RunError(
            f"{transport.where} describes itself in a way not understood: {first_problem(error)}"
        ) from error
    return found, tuple(ended.refusals)


def _options(
    quick: bool = False,
    threads: int | None = None,
    affinity: Sequence[int] = (),
    precisions: Sequence[str] = (),
    allow: Sequence[str] = (),
    energy: bool = True,
) -> tuple[str, ...]:
    """The runner's options; the same request gives the same ones."""
    if threads is not None and threads < 1:
        raise UsageError("threads must be 1 or more")
    if any(core < 0 for core in affinity):
        raise UsageError("cores are numbered from 0")
    for code in allow:
        if not _CODE.fullmatch(code):
            raise UsageError(f"{code!r} is no code of a requirement", "refusals name their codes")
    words = ["--quick"] * quick
    words += [] if threads is None else ["--threads", str(threads)]
    words += ["--affinity", ",".join(map(str, affinity))] if affinity else []
    words += [word for name in precisions for word in ("--precision", name)]
    words += [word for code in sorted(set(allow)) for word in ("--allow", code)]
    return (*words, *(["--no-energy"] * (not energy)))


def _job(
    bundle: Path, test_set: Path | None, options: tuple[str, ...], python: str | None
) -> tuple[Job, Manifest]:
    manifest = verify_bundle(bundle)
    digest = "" if test_set is None else _checked_test_set(test_set, manifest)
    if python is not None and (python.startswith("-") or not python.isprintable() or not python):
        raise UsageError(f"{python!r} is no name of an interpreter")
    return Job(bundle, bundle_id(bundle), test_set, digest, options, python or ""), manifest


def _checked_test_set(folder: Path, manifest: Manifest) -> str:
    """Hash of the test set."""
    try:
        digest = hash_test_set(folder)
    except OSError as error:
        raise DataError(
            f"cannot read the test set {folder}: {error.strerror}",
            "name the folder of the export that holds images.npy and labels.npy",
        ) from error
    if digest != manifest.test_set.sha256:
        raise DataError(
            f"{folder} is not the test set of this bundle",
            "name the one that was exported with it",
        )
    return digest


def _known(precisions: Sequence[str], manifest: Manifest) -> None:
    known = {graph.precision for graph in manifest.graphs}
    for name in precisions:
        if name not in known:
            raise unknown_name("precision of this bundle", name, known)


def _transport(device: str | None) -> Transport:
    return LocalTransport() if device is None else SshTransport(device)


def _scratch_name(job: Job, transport: Transport) -> str:
    where = hashlib.sha256(transport.where.encode()).hexdigest()[:8]
    return f".fetching-{job.key}-{where}"


@contextmanager
def _kept_for_resume(folder: Path, keep: bool) -> Iterator[None]:
    """What comes from a device is removed in the end; after a break it stays for the next time."""
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    except (LinkLostError, KeyboardInterrupt, OSError):
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _carry_out(
    transport: Transport,
    job: Job,
    scratch: Path,
    resume: bool,
    on_event: Callable[[Event], None],
) -> Path:
    """Folder with what the runner wrote."""
    if resume:
        return transport.resume(job, scratch, on_event)
    ended, place = transport.measure(job, scratch, on_event)
    if ended.code == REFUSED:
        raise _refused(ended, transport.where)
    if not ended.may_have_results or not (place / RESULT).is_file():
        raise _crash(ended, transport.where)
    return place


def _checked(place: Path, job: Job, quick: bool, where: str) -> Measurement:
    """The results, if they are whole and of this job."""
    try:
        found = read_measurement(place)
    except StoreError as error:
        raise RunError(f"{where} brought results that cannot be used: {error.message}") from error
    runner = hashlib.sha256((job.bundle / RUNNER).read_bytes()).hexdigest()
    expected = (job.bundle_id, runner, quick)
    if found is None or (found.bundle_id, found.runner_sha256, found.quick) != expected:
        raise RunError(f"{where} brought results of something else", "measure again")
    return found


def _move(place: Path, folder: Path, names: set[str]) -> None:
    for name in names:
        if (place / name).is_file():
            (place / name).rename(folder / name)


def _refused(ended: Ended, where: str) -> RefusedError:
    reasons = [str(refusal) for refusal in ended.refusals] or list(ended.complaints)
    listed = "".join(f"\n  {reason}" for reason in reasons)
    return RefusedError(f"{where} cannot measure this bundle; nothing was measured{listed}")


def _crash(ended: Ended, where: str) -> RunError:
    """Why there are no results, as far as it is known."""
    errors = [line for line in ended.complaints if re.search("[Ee]rror|[Ff]atal", line)]
    said = (errors or list(ended.complaints) or ["it does not say why"])[-1]
    if ended.code == -signal.SIGKILL:
        return RunError(
            f"the runner on {where} was killed; nothing was measured",
            "a system does that when memory runs out (dmesg tells); the same command tries again",
        )
    how = f"by signal {-ended.code}" if ended.code < 0 else f"with exit status {ended.code}"
    return RunError(
        f"the runner on {where} stopped {how}: {ended.reason or said}",
        "to see more, try it there by hand: python3 bundle/run.py bundle --probe",
    )
