"""What opens other doors is in no file that we write, and in nothing that we print."""

import pytest
from command import PAIR, Bench, tiny

MARK = "zzSECRETzz"
KEY = f"{MARK}{'0' * 30}"  # as long as a key of W&B
SECRETS = {
    "WANDB_API_KEY": KEY, "AWS_ACCESS_KEY_ID": f"AKIA{MARK}", "AWS_SECRET_ACCESS_KEY": f"aws{MARK}", "HF_TOKEN": f"hf_{MARK}",
    "GITHUB_TOKEN": f"ghp_{MARK}", "MY_PASSWORD": f"pass{MARK}", "HTTPS_PROXY": f"http://user:{MARK}@127.0.0.1:9",
}  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path / "bench")
    home = made.folder / "home"
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    (home / ".netrc").chmod(0o600)
    (home / ".aws").mkdir()
    (home / ".aws" / "credentials").write_text(f"aws_secret_access_key = aws{MARK}\n")
    yield made
    made.close()


def told(folder, leave_out=()):
    """Files below a folder that hold the mark."""
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in leave_out and MARK.encode() in path.read_bytes()
    ]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_keys_are_nowhere(bench):
    matrix, store = bench.matrix(tiny(["scratch"], ["kd"])), bench.folder / "store"
    online = {**SECRETS, "WANDB_MODE": "offline"}
    # The processes that we start, such as the mirror, have all that is in our environment.
    words = ("--tracking", "wandb")
    done = bench.run(matrix, store, *words, **online)
    archive, cell = bench.folder / "student.tar", f"{PAIR['teacher']}>{PAIR['student']}/kd/s0"
    made = bench(
        "export", "--matrix", matrix, "--store", store, "--target", "cpu", "--cell", cell, "--quick",
        "--archive", archive, **online,
    )  # fmt: skip
    measured = bench("measure", archive, "--quick", **online)
    broken = tiny(["nothing"])  # a message about an error holds no environment either
    refused = bench(
        "run", "--matrix", bench.matrix(broken, "broken"), "--store", store, expect=2, **online
    )
    doctor = bench.start("doctor", "--store", store, **online)
    out, err = doctor.communicate(timeout=120)
    assert MARK not in out + err
    for one in (done, made, measured, refused):
        assert MARK not in one.text
    assert archive.exists()
    assert list((store / "wandb").rglob("*.wandb"))  # the mirror did write
    assert told(bench.folder, leave_out=(".netrc", "credentials")) == []
