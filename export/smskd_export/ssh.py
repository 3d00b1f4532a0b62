"""A measurement on another machine, through the system's OpenSSH.

The user's own configuration counts: names, ports, jump hosts, keys, known hosts. The device needs
a POSIX shell, tar, tail and df beside Python. Everything lies in one folder there:

    ~/.cache/smskd-bench/
      objects/<id>/     bundles and test sets, named by their content, sent once
      results/<name>/   what was measured and is not fetched yet
      lock, engines/    the runner's own

What runs there does not outlive the link: the runner stops when its input ends.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from smskd.errors import RefusedError, RunError, SmskdError
from smskd_export.manifest import RUNNER
from smskd_export.pulling import PLAIN_NAME, Stream, damaged
from smskd_export.remote_shell import Session, checked_device, new_mark
from smskd_export.sending import Payload
from smskd_export.test_sets import IMAGES, LABELS
from smskd_export.transport import Ended, Event, Job, OnEvent, Step, plain

PYTHON = "python3"

_SPARE_KB = 4096
_PROGRESS_S = 0.5
_NO_FOLDER, _FAILED = 73, 74
_CANNOT_RUN, _NOT_FOUND = 126, 127
_TRIES = 3
_ROTTEN = ("bundle", "bundle_id", "test_set")
"""Refusals of a runner that finds something else than what was sent."""

_HOME = f'd="$HOME/.cache/smskd-bench"; umask 077; e={_NO_FOLDER}; '
_PREPARE = _HOME + (
    'mkdir -p "$d/objects" "$d/results" && cd "$d" || exit $e; echo "$m in $d"; '
    'command -v "$1" >/dev/null 2>&1 && echo "$m python"; shift; '
    'for o in "$@"; do [ -d "objects/$o" ] && echo "$m has $o"; done; '
    'for r in results/*; do if [ -f "$r/result.json" ]; then echo "$m done ${r#results/}"; '
    'elif [ -d "$r" ]; then echo "$m open ${r#results/}"; fi; done; '
    'LC_ALL=C df -Pk . | while read -r x; do echo "$m df $x"; done'
)
_PUSH = _HOME + (
    'id=$1; cd "$d/objects" || exit $e; '
    'for o in .part-"$id"-*; do kill -0 "${o##*-}" 2>/dev/null || rm -rf "$o"; done; '
    't=".part-$id-$$"; mkdir "$t" || exit $e; '
    f'c={_FAILED}; if (cd "$t" && tar -xof -) && [ -f "$t/.whole" ] && rm -f "$t/.whole"; '
    'then [ -d "$id" ] || mv "$t" "$id"; c=$?; fi; rm -rf "$t"; exit $c'
)
_RUN = _HOME + 'cd "$d" || exit $e; "$@"'
_PULL = _HOME + (
    'have=$2; cd "$d/results/$1" && [ -f result.json ] || exit $e; '
    'for f in *; do o=1; case "$have" in *" $f="*) o="${have#*" $f="}"; o="${o%% *}";; esac; '
    f'echo "$m file $f"; tail -c "+$o" "$f" || exit {_FAILED}; echo; echo "$m end"; done'
)
_REMOVE = _HOME + 'cd "$d/$1" || exit $e; shift; rm -rf "$@"'

_LOOKING = Step("looking at what is there", "the same command again; nothing was measured yet")
_PROBING = Step("asking what it offers", "the same command again; nothing was measured yet")
_RUNNING = Step(
    "it measured",
    "the runner there stops with its link, and what it had measured is void: the same command "
    "measures again. If it was just finished, --resume fetches the results instead",
)
_FETCHING = Step(
    "the results were fetched",
    "they are safe on the device, and what came is kept here: the same command with --resume "
    "fetches the rest and measures nothing again",
)


class SshTransport:
    """Runs the runner on a device.

    Args:
        device: As ssh takes it: ``user@host``, a name from its configuration, or
            ``ssh://user@host:port``.

    Raises:
        UsageError: no device can be called like this.
    """

    def __init__(self, device: str) -> None:
        self.where = checked_device(device)
        self._obsolete: list[str] = []

    def probe(self, job: Job, on_event: OnEvent) -> Ended:
        """Ask whether the device can do the job; the bundle is sent if it is not there."""

        def ask() -> tuple[Ended, Path]:
            there = self._prepare(job)
            missing = there.without({job.bundle_id: Payload(job.bundle)})
            self._need_room(there, missing)
            return self._probe(job, missing, on_event), Path()

        return self._with_undamaged(job, ask)[0]

    def measure(self, job: Job, scratch: Path, on_event: OnEvent) -> tuple[Ended, Path]:
        """Send what is missing, measure there, fetch the results into a folder below ``scratch``.

        Raises:
            RefusedError: the device cannot be used as it is.
            LinkLostError: the link broke; the message says what is left and what to do.
            RunError: the device does not do what it should.
        """
        return self._with_undamaged(job, lambda: self._measure(job, scratch, on_event))

    def _with_undamaged(
        self, job: Job, work: Callable[[], tuple[Ended, Path]]
    ) -> tuple[Ended, Path]:
        """Do the work; where it turns out that the device's copies rotted, send them anew, once."""
        ended, place = work()
        if any(refusal.code in _ROTTEN for refusal in ended.refusals):
            self._ask(_REMOVE, ["objects", *_objects(job)], _LOOKING)
            ended, place = work()
        return ended, place

    def _measure(self, job: Job, scratch: Path, on_event: OnEvent) -> tuple[Ended, Path]:
        there = self._prepare(job)
        missing = there.without(_objects(job))
        self._need_room(there, missing)
        if job.test_set_id in missing:  # a device that says no is not sent much
            test_set = {job.test_set_id: missing.pop(job.test_set_id)}
            probed = self._probe(job, missing, lambda event: None)
            if probed.code:
                return probed, scratch
            missing = test_set
        self._send_all(missing, on_event)
        name = f"{job.key}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
        ended = self._runner(job, ["--out", f"results/{name}"], _RUNNING, on_event)
        if ended.may_have_results and self._fetch(name, scratch / name, on_event):
            # It had the lock, so whoever left something unfinished before is gone.
            self._obsolete += [*there.unfinished, *there.finished(job)]
        return ended, scratch / name

    def resume(self, job: Job, scratch: Path, on_event: OnEvent) -> Path:
        """Fetch what an earlier ``measure`` left on the device.

        Raises:
            RefusedError: it left nothing.
            LinkLostError: as in ``measure``.
        """
        names = self._prepare(job).finished(job)
        if not names or not self._fetch(names[-1], scratch / names[-1], on_event):
            raise RefusedError(
                f"{self.where} keeps no finished results of this measurement",
                "measure again, without --resume",
            )
        self._obsolete += names
        return scratch / names[-1]

    def forget(self, job: Job, on_event: OnEvent) -> None:
        """Remove what was fetched, and what earlier attempts left, from the device.

        A failure is no more than an event: a later measurement removes it then.
        """
        try:
            self._ask(_REMOVE, ["results", *sorted(set(self._obsolete))], _LOOKING)
        except SmskdError as error:
            on_event({"event": "not_removed", "message": error.message})

    def _probe(self, job: Job, missing: Mapping[str, Payload], on_event: OnEvent) -> Ended:
        self._send_all(missing, on_event)
        bare = replace(job, test_set=None, test_set_id="")
        return self._runner(bare, ["--probe"], _PROBING, on_event)

    def _prepare(self, job: Job) -> _There:
        python = job.python or PYTHON
        there = _There.read(self._ask(_PREPARE, [python, *_objects(job)], _LOOKING))
        if not there.python:
            raise _no_python(self.where, python)
        return there

    def _need_room(self, there: _There, missing: Mapping[str, Payload]) -> None:
        needed = sum(payload.kilobytes() for payload in missing.values()) + _SPARE_KB
        if missing and there.free_kb is not None and there.free_kb < needed:
            raise _no_room(
                self.where,
                f"{needed / 1024:.0f} MiB are needed in {there.folder}, "
                f"{there.free_kb / 1024:.0f} MiB are free",
            )

    def _send_all(self, missing: Mapping[str, Payload], on_event: OnEvent) -> None:
        for name, payload in missing.items():
            step = Step(
                f"{plain(payload.folder.name)} was sent",
                "nothing was measured yet, and what came in part is thrown away there: "
                "the same command sends it again",
            )
            self._ask(_PUSH, [name], step, _reported(payload, on_event))

    def _runner(self, job: Job, words: list[str], step: Step, on_event: OnEvent) -> Ended:
        """Run the runner; whatever happens, it is not left running."""
        python, bundle = job.python or PYTHON, f"objects/{job.bundle_id}"
        command = [python, f"{bundle}/{RUNNER}", bundle, *words, "--stop-with-stdin"]
        command += ["--cache", ".", "--expect-id", job.bundle_id]
        command += ["--test-set", f"objects/{job.test_set_id}"] if job.test_set_id else []
        ended = Ended()
        with Session(self.where, _RUN, [*command, *job.options], new_mark()) as session:
            for line in session.lines():
                ended.take(line, on_event)
            code = session.finish(step)
            for line in session.child.complaints:
                ended.complain(line)
        if code in (_CANNOT_RUN, _NOT_FOUND):
            raise _no_python(self.where, python, " / ".join(ended.complaints))
        ended.code = 128 - code if code > 128 else code  # a shell says 128 + the signal
        return ended

    def _fetch(self, name: str, folder: Path, on_event: OnEvent) -> bool:
        """Fetch until every file is what the result says; False: there is no result."""
        folder.mkdir(parents=True, exist_ok=True)
        wrong: list[str] = []
        for _ in range(_TRIES):
            if self._pull(name, folder, on_event) == _NO_FOLDER:
                return False
            wrong = damaged(folder)
            if not wrong:
                self._obsolete.append(name)
                return True
            for file in filter(PLAIN_NAME.fullmatch, wrong):
                (folder / file).unlink(missing_ok=True)
        names = plain(", ".join(wrong))
        raise RunError(f"{self.where} sends damaged results: {names}", "measure again")

    def _pull(self, name: str, folder: Path, on_event: OnEvent) -> int:
        """Fetch what is not here yet; the exit status of the sender."""
        mark = new_mark()
        stream = Stream(folder, mark)
        with Session(self.where, _PULL, [name, stream.offsets()], mark) as session:
            said = 0.0
            for received in stream.take(session.chunks()):
                if time.monotonic() - said >= _PROGRESS_S:
                    said = time.monotonic()
                    on_event({"event": "fetch", "done": received})
            for line in stream.others:
                session.at_mark(line)
            return session.finish(_FETCHING)

    def _ask(
        self, script: str, arguments: Sequence[str], step: Step, data: Iterable[bytes] = ()
    ) -> list[str]:
        """Run a short command; the lines that it marked, without their mark.

        Raises:
            RefusedError: there is no room there.
            RunError: it failed.
        """
        with Session(self.where, script, arguments, new_mark()) as session:
            lines = [line.decode("utf-8", "replace") for line in session.lines(data)]
            code = session.finish(step)
            said = [plain(line.decode("utf-8", "replace")) for line in session.child.complaints]
        full = [line for line in said if "No space left" in line or "quota" in line]
        if code and full:
            raise _no_room(self.where, full[0])
        detail = said[-1] if said else f"exit status {code}"
        if code:
            raise RunError(
                f"a command on {self.where} failed: {detail}",
                "mend that on the device: the folder ~/.cache/smskd-bench must be writable, "
                "and tar must be there",
            )
        start = f"{session.mark} "
        return [plain(line.removeprefix(start)) for line in lines if line.startswith(start)]


@dataclass(frozen=True)
class _There:
    """What the device's work folder holds."""

    folder: str
    python: bool
    objects: tuple[str, ...]
    whole: tuple[str, ...]
    unfinished: tuple[str, ...]
    free_kb: int | None

    @staticmethod
    def read(lines: list[str]) -> _There:
        """From what the device answered; names that nobody here gives are left alone."""
        said = [line.partition(" ")[::2] for line in lines]
        names = {word: tuple(rest for w, rest in said if w == word) for word, _ in said}
        plain_names = {
            word: tuple(sorted(name for name in names.get(word, ()) if PLAIN_NAME.fullmatch(name)))
            for word in ("done", "open")
        }
        free = re.search(r"\s\d+\s+\d+\s+(-?\d+)\s+\d+%", " ".join(names.get("df", ())[-1:]))
        return _There(
            folder=names.get("in", ("",))[0],
            python="python" in names,
            objects=names.get("has", ()),
            whole=plain_names["done"],
            unfinished=plain_names["open"],
            free_kb=int(free[1]) if free else None,
        )

    def without(self, objects: Mapping[str, Payload]) -> dict[str, Payload]:
        """Those of ``objects`` that are not there."""
        return {name: payload for name, payload in objects.items() if name not in self.objects}

    def finished(self, job: Job) -> list[str]:
        """Names of finished results of this job, oldest first."""
        return [name for name in self.whole if name.startswith(f"{job.key}-")]


def _objects(job: Job) -> dict[str, Payload]:
    """What the job needs, by name on the device."""
    found = {job.bundle_id: Payload(job.bundle)}
    if job.test_set is not None:
        found[job.test_set_id] = Payload(job.test_set, (IMAGES, LABELS))
    return found


def _reported(payload: Payload, on_event: OnEvent) -> Iterator[bytes]:
    """The payload packed, with an event from time to time."""
    event: Event = {"event": "send", "what": plain(payload.folder.name), "total": payload.size()}
    done, said = 0, 0.0
    for chunk in payload.packed():
        if time.monotonic() - said >= _PROGRESS_S:
            said = time.monotonic()
            on_event({**event, "done": done})
        done += len(chunk)
        yield chunk


def _no_python(device: str, python: str, detail: str = "") -> RefusedError:
    return RefusedError(
        f"{device} has no Python interpreter {python}" + (f" ({detail})" if detail else ""),
        "on the device: sudo apt install python3; or name another one, best by its full path, "
        "with --python",
    )


def _no_room(device: str, detail: str) -> RefusedError:
    return RefusedError(
        f"not enough room on {device}: {detail}",
        "free some; bundles of earlier measurements lie in ~/.cache/smskd-bench/objects there",
    )
