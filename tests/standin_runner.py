"""Stands for a device runner where a test needs one that misbehaves, or results of some size.

``~/behave`` holds words that say how; ``~/runs`` gets a line for every run that measures.
"""

import argparse
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

HOME = Path.home()


def say(event, **more):
    print(json.dumps(dict(event=event, t=0.0, **more)), flush=True)


def watch():
    while os.read(0, 1 << 16):  # not through sys.stdin: its lock would block the end of Python
        pass
    os._exit(4)


def probe():
    version = ".".join(map(str, sys.version_info[:3]))
    return {
        "utc": "2026-01-01T00:00:00+00:00", "arch": os.uname().machine, "board": "stand-in",
        "cpu": "", "cores": 1, "os": "", "kernel": "", "l4t": "", "python": version, "numpy": "",
        "runtime": "onnxruntime", "runtime_version": "1.0", "cuda": "", "gpu": "",
        "compute_capability": "", "memory_total_mb": None, "memory_free_mb": None,
        "gpu_memory_free_mb": None, "disk_free_mb": None, "power_mode": "", "power_modes": [],
        "clocks_locked": None, "clocks_khz": {}, "temperatures_c": {}, "throttle_counts": {},
        "load_1min": None, "gpu_processes": [], "emulated": False,
    }  # fmt: skip


def result(args, out, behave):
    size = int(behave[behave.index("bytes") + 1]) if "bytes" in behave else 1000
    files = {"fp32-b1-host_ns.npy": os.urandom(size), "fp32-b1-classes.npy": os.urandom(99)}
    for name, data in files.items():
        (out / name).write_bytes(data)
    bundle = Path(args.bundle)
    record = {
        "schema": 1,
        "bundle_id": hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest(),
        "runner_sha256": hashlib.sha256((bundle / "run.py").read_bytes()).hexdigest(),
        "protocol": "quick" if args.quick else "cpu-v1",
        "threads": 1, "affinity": [], "started_utc": "", "ended_utc": "", "allowed": args.allow,
        "before": probe(), "after": probe(), "rows": [],
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "aborted": "too hot" if "aborted" in behave else "",
    }  # fmt: skip
    if "other" in behave:
        record["bundle_id"] = "0" * 64
    (out / "result.json").write_text(json.dumps(record))


def refuse(code, message):
    say("refused", code=code, message=message, remedy="mend \x1b[31mit", offers=["0=15W"])
    say("end", status="refused")
    sys.exit(3)


def verify(folder):
    files = json.loads((folder / "bundle.json").read_text())["files"]
    for name, digest in files.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            refuse("bundle", name + " is not the file that the manifest lists")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    for name in ("--out", "--test-set", "--cache", "--expect-id", "--threads", "--affinity"):
        parser.add_argument(name)
    for name in ("--precision", "--allow"):
        parser.add_argument(name, action="append", default=[])
    for name in ("--quick", "--no-energy", "--probe", "--stop-with-stdin"):
        parser.add_argument(name, action="store_true")
    args = parser.parse_args()
    path = HOME / "behave"
    behave = path.read_text().split() if path.exists() else []
    if args.stop_with_stdin:
        threading.Thread(target=watch, daemon=True).start()
    say("start")
    say("probe", probe={"arch": []} if "vague" in behave else probe())
    if "refuse" in behave and "power_mode" not in args.allow:
        refuse("power_mode", 'nvpmodel is "25W"')
    if args.probe:
        say("end", status="ok")
        return
    lock = (Path(args.cache) / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        refuse("busy", "another measurement runs here")
    verify(Path(args.bundle))
    with (HOME / "runs").open("a") as runs:
        runs.write("run\n")
    out = Path(args.out)
    out.mkdir()
    if "crash" in behave:
        raise RuntimeError("out of ideas")
    if "killed" in behave:
        os.kill(os.getpid(), signal.SIGKILL)
    print("not an event \x1b[2J", flush=True)
    while "slow" in behave:
        say("window", precision="fp32", batch=1, number=1, of=5, n=50, p50_ms=1.0)
        time.sleep(0.05)
    say("row", row={"id": "fp32-b1"})
    result(args, out, behave)
    if "damaged" in behave:
        (out / "fp32-b1-classes.npy").write_bytes(b"other")
    (out / "events.jsonl").write_text('{"event": "start"}\n')
    say("end", status="ok")
    sys.exit(5 if "gate" in behave else 4 if "aborted" in behave else 0)


if __name__ == "__main__":
    main()
