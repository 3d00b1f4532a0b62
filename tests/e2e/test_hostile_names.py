"""Names that a shell, a terminal or a path would take for something else, through real commands.

Nothing of them is executed, nothing is written out of the store, nothing unprintable is shown.
"""

import shutil
from pathlib import Path

import pytest
from command import PAIR, Bench, tiny
from mutations import is_clean
from standin_bundle import make_bundle, make_test_set

NAMES = {
    "spaces": "two words",
    "quotes": "a'b\"c",
    "shell": "$(touch ran); touch ran & `touch ran` | touch ran",
    "parent": "../../../escaped",
    "absolute": "/tmp/smskd-escaped",
    "dash": "--device=cuda:9",
    "markup": "[red]x[/red] [/]",
    "separators": "a>b+c/s0|d\\e*?",
    "letters": "Übung 网络",
}
"""These are names: rows and matrices may be called so."""

REFUSED = {
    "newline": "one\ntwo",
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "backwards": "abc\u202edcba",
    "zero": "a\0b",
    "blank": " x ",
}
"""These cannot be seen as what they are."""


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path / "bench")
    yield made
    made.close()


def check_quiet(bench, done):
    """Nothing was run, nothing lies where it should not, and the terminal was not steered."""
    assert is_clean(done.text, keep="\n\r"), ascii(done.text)
    assert not list(bench.folder.rglob("ran"))
    assert not Path("/tmp/smskd-escaped").exists()
    assert {path.name for path in bench.folder.parent.iterdir()} == {"bench"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_names_of_rows_and_matrices(bench):
    rows = [{"stages": ["scratch"], "name": name} for name in NAMES.values()]
    for row in rows[1:]:
        row["stages"] = ["kd"]
    name = f"{NAMES['shell']} {NAMES['parent']}"
    document = tiny(
        *rows, name=name, description=NAMES["shell"], recipe={"epochs": [1], "batch_size": 50}
    )
    matrix, store = bench.matrix(document, "m"), bench.folder / "store"
    check_quiet(bench, bench.run(matrix, store, "--tracking", "wandb", WANDB_MODE="offline"))
    for command in (
        ("leaderboard", "--matrix", matrix, "--store", store),
        ("leaderboard", "--matrix", matrix, "--store", store, "--format", "markdown"),
        ("status", "--store", store, "--matrix", matrix, "--only", NAMES["shell"]),
        ("run", "--matrix", matrix, "--store", store, "--dry-run", "--only", NAMES["quotes"]),
    ):
        check_quiet(bench, bench(*command))
    cell = f"{PAIR['teacher']}>{PAIR['student']}/{NAMES['shell']}/s0"
    archive = bench.folder / "a b'$(touch ran).tar"
    done = bench(
        "export", "--matrix", matrix, "--store", store, "--target", "cpu", "--cell", cell, "--quick",
        "--tracking", "none", "--archive", archive,
    )  # fmt: skip
    check_quiet(bench, done)
    assert archive.exists()
    check_quiet(bench, bench("measure", archive, "--quick"))
    assert files(bench.folder / "cwd") == {
        name for name in files(bench.folder / "cwd") if name.startswith("measurements")
    }


@pytest.mark.parametrize("what", REFUSED)
def test_names_that_cannot_be_seen(bench, what):
    name = REFUSED[what]
    document = tiny({"stages": ["kd"], "name": name}, name=name, plugins=[name])
    document["pairs"] = [{"teacher": name, "student": name}]
    document["methods"] = {name: {"method": name}}
    done = bench.run(bench.matrix(document), bench.folder / "store", expect=2)
    check_quiet(bench, done)
    assert not (bench.folder / "store").exists()


@pytest.mark.parametrize("what", ["shell", "parent", "dash"])
def test_names_of_models_plugins_and_weights(bench, what):
    name = NAMES[what]
    document = tiny(["kd"], plugins=[name], teacher={"epochs": 1, "weights": {name: name}})
    document["pairs"] = [{"teacher": name, "student": f"torchvision:{name}"}]
    done = bench.run(bench.matrix(document), bench.folder / "store", expect=2)
    check_quiet(bench, done)
    assert "unknown model" in done.err
    assert "plug-in" in done.err


HOSTS = (
    "-oProxyCommand=touch ran", "host;touch ran", "$(touch ran)@host", "`touch ran`", "a b", "host\ntouch ran",
    "\x1b[31mhost", "../host", "user@-oProxyCommand=touch", "x" * 5000 + " ",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_names_of_devices(bench):
    """Refused before anything is started, whatever ssh is: here one that would tell."""
    ssh = bench.folder / "ssh"
    ssh.write_text(f"#!/bin/sh\ntouch {bench.folder}/ran\n")
    ssh.chmod(0o755)
    made = bench.folder / "x"
    bundle = make_bundle(made / "bundle", make_test_set(made / "test_set"))
    for host in HOSTS:
        done = bench("measure", bundle, f"--device={host}", expect=2, SMSKD_SSH=str(ssh))
        check_quiet(bench, done)
        assert "is no name of a device" in done.err


PLACES = (
    "two words",
    "a'b\"c",
    "$(touch ran)",
    "-dash",
    "new\nline",
    "\x1b[31mred",
    b"\xff\xfe not UTF-8".decode("utf-8", "surrogateescape"),
)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_paths_of_stores_and_data(bench):
    matrix = bench.matrix(tiny(["scratch"], recipe={"epochs": [1], "batch_size": 50}))
    shutil.copy(matrix, bench.folder / "cwd" / "-m.yaml")
    for place in PLACES:
        words = ("--data-root", f"{place}/data", "--matrix", "-m.yaml", f"--store={place}/store")
        done = bench("run", *words, "--tracking", "none", "--workers", 1, "--threads", 1)
        check_quiet(bench, done)
        assert (bench.folder / "cwd" / place / "store" / "store.json").exists()
    left = {path.name for path in (bench.folder / "cwd").iterdir()}
    assert left == {"-m.yaml", *PLACES}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_paths_that_are_not_there(bench):
    for place in (*PLACES, "x" * 300, "../" * 40 + "none"):
        for words in (
            ("run", f"--matrix={place}/m.yaml"), ("leaderboard", f"--matrix={place}"),
            ("measure", "--", f"{place}/x.tar"), ("export", "--target", f"{place}/t.yaml"),
            ("import", "--model", place, "--classes", 10, "--out", "o", "--", place),
        )[:: 5 if place != PLACES[5] else 1]:  # fmt: skip
            process = bench.start(*words)
            out, err = process.communicate(timeout=120)
            assert process.returncode in (2, 3), (words, err)
            assert "Traceback" not in err
            assert is_clean(out + err), ascii(out + err)
    assert not list((bench.folder / "cwd").iterdir())


def test_a_store_that_speaks_to_the_terminal(bench):
    """What a shared store holds is printed by ``status``, and may be anybody's."""
    folder = bench.folder / "store" / "stages" / "ab" / ("ab" * 32)
    folder.mkdir(parents=True)
    (bench.folder / "store" / "store.json").write_text('{"format": 1}')
    (folder / "spec.json").write_text("{}")
    (folder / "failed.json").write_text(
        '{"status": "\\u001b[2Jx", "reason": "\\u001b]52;c;aGk=\\u0007 \\u202e [bold]"}'
    )
    done = bench("status", "--store", bench.folder / "store")
    check_quiet(bench, done)
    assert "\\x1b[2Jx" in done.out
    assert "[bold]" in done.out
