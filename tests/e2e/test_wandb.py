"""The mirror in real runs of the command, read back from disk; W&B never gets in the way."""

import pytest
from cases import daily
from command import Bench, kill, outputs, results, tiny, wait_for
from smskd_bench.store import Store
from wandb_log import logged_runs

PAIR, STUDENT = "resnet8_half>resnet8_quarter", "resnet8_quarter"
NAMES = ["resnet8_half/scratch/s0", f"{STUDENT}/kd/s0", f"{STUDENT}/kd>fitnet/s0"]
NOBODY, KEY = "http://127.0.0.1:9", "a" * 40
ROWS = (["kd"], {"stages": ["kd", "fitnet"], "name": "two"})


def files_below(folder, *, without):
    return [p for p in folder.rglob("*") if p.is_file() and without not in p.parents]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run without a login and without any W&B setting: store, W&B runs by stage run, output."""
    bench = Bench(tmp_path_factory.mktemp("offline"))
    (bench.folder / "tmp").mkdir()
    matrix, store = bench.matrix(tiny(*ROWS)), bench.folder / "store"
    words = ("--tracking", "wandb", "--project", "proof")
    done = bench.run(matrix, store, *words, TMPDIR=str(bench.folder / "tmp"))
    by_id = {run.run.run_id: run for run in logged_runs(store / "wandb")}
    runs = {name: by_id.pop(result["key"][:16]) for name, result in results(store).items()}
    assert by_id == {}
    return bench, store, runs, done


def test_one_wandb_run_for_each_stage_run(offline):
    _, store, runs, done = offline
    assert sorted(runs) == sorted(NAMES)
    assert f"3 runs are recorded offline; to upload: wandb sync {store}/wandb/wandb/" in done.out
    for name, logged in runs.items():
        run, model = logged.run, name.split("/")[0]
        assert (run.project, run.run_group) == ("proof", "tiny")
        assert run.job_type == ("teacher" if model == "resnet8_half" else "student")
        assert {model, "digits", logged.config["methods"][0]["name"]} < set(run.tags)
        assert logged.exit_code == 0
    assert "stage-2" in runs[NAMES[2]].run.tags
    assert runs[NAMES[2]].run.display_name == f"{STUDENT} fitnet s0 stage 2"


def test_epochs_are_those_of_the_result(offline):
    _, store, runs, _ = offline
    for name, result in results(store).items():
        rows = [{k: v for k, v in row.items() if k[0] != "_"} for row in runs[name].rows]
        assert rows == result["history"]
        assert runs[name].steps["*"] == "epoch"


def test_summary_is_a_leaderboard_row(offline):
    _, store, runs, _ = offline
    for name, result in results(store).items():
        summary = runs[name].summary
        assert summary["test_top1"] == result["test"]["top1"]
        assert summary["status"] == "done"
        assert summary["seed"] == 0
    kd, two = (runs[name].summary for name in NAMES[1:])
    assert (kd["pair"], kd["row"], kd["final"], kd["stage"]) == (PAIR, "kd", True, 1)
    assert (two["pair"], two["row"], two["final"], two["stage"]) == (PAIR, "two", True, 2)
    assert two["reference_kept"] == results(store)[NAMES[2]]["kept"]["kept"]
    assert "row" not in runs[NAMES[0]].summary


def test_lineage_is_in_config_and_artifacts(offline):
    _, store, runs, _ = offline
    teacher, kd, two = (results(store)[name]["key"] for name in NAMES)
    config = runs[NAMES[2]].config
    assert (config["key"], config["parent_key"], config["teacher_keys"]) == (two, kd, [teacher])
    assert runs[NAMES[0]].config["parent_key"] is None
    assert config["training"]["epochs"] == 2
    for name, key, inputs in zip(
        NAMES, (teacher, kd, two), ([], [teacher], [teacher, kd]), strict=True
    ):
        artifacts = {a.name: a for a in runs[name].artifacts}
        assert {n for n, a in artifacts.items() if a.use_after_commit} == {
            f"student-{used[:16]}" for used in inputs
        }
        assert not artifacts[f"student-{key[:16]}"].use_after_commit
    digests = {}
    for run in runs.values():
        for artifact in run.artifacts:
            digests.setdefault(artifact.name, set()).add(artifact.digest)
    assert [len(found) for found in digests.values()] == [1, 1, 1]  # what is used is what was made


def test_nothing_is_written_outside_the_store(offline):
    bench, store, _, _ = offline
    made = files_below(bench.folder, without=store)
    assert [p for p in made if (bench.folder / "tmp") not in p.parents] == [
        bench.folder / "matrix.yaml"
    ]
    assert [p for p in made if (bench.folder / "tmp") in p.parents] == []


def test_disabled_by_the_environment_records_nothing(finished):
    assert outputs(finished.store)
    assert not (finished.store / "wandb").exists()


@pytest.mark.parametrize("patience", daily(["4", ""]))
def test_a_server_out_of_reach_costs_a_bounded_wait_and_nothing_else(bench, offline, patience):
    _, reference, _, plain = offline
    store = bench.folder / "store"
    away = {"WANDB_MODE": "online", "WANDB_BASE_URL": NOBODY, "WANDB_API_KEY": KEY}
    away |= {"WANDB_INIT_TIMEOUT": patience} if patience else {}
    done = bench.run(bench.matrix(tiny(*ROWS)), store, "--tracking", "wandb", **away)
    said = [line for line in done.out.splitlines() if line.startswith("tracking: W&B: ")]
    print(
        f"\nserver out of reach: {done.seconds - plain.seconds:+.1f} s against offline",
        *said,
        sep="\n  ",
    )
    assert said
    assert outputs(store) == outputs(reference)
    assert KEY not in done.text
    assert [
        p for p in bench.folder.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()
    ] == []
    assert "recording offline, no online run" in said[0]
    recorded = {run.run.run_id for run in logged_runs(store / "wandb")}
    assert recorded == {result["key"][:16] for result in results(store).values()}


@pytest.mark.slow
def test_a_killed_run_is_closed_and_continued(bench):
    document = tiny(["scratch"], dataset={"name": "digits", "train_size": 850})
    document["recipe"]["epochs"] = 8
    matrix, store = bench.matrix(document), bench.folder / "store"
    words = ("--only", "scratch", "--tracking", "wandb")
    process = bench.start_run(matrix, store, *words)
    wait_for(
        lambda: any(epochs_saved(store, key) >= 3 for key in Store(store).stage_keys()), process
    )
    kill(process)
    wait_for(lambda: [run.exit_code for run in logged_runs(store / "wandb")] == [1], None)
    bench.run(matrix, store, *words)
    first, *others = logged_runs(store / "wandb")
    assert first.summary["status"] == "stopped"
    same = [run for run in others if run.run.run_id == first.run.run_id]
    epochs = [row["epoch"] for run in (first, *same) for row in run.rows]
    (result,) = [r for r in results(store).values() if r["key"][:16] == first.run.run_id]
    trained = [row["epoch"] for row in result["history"]]
    assert epochs == [epoch for epoch in trained if epoch in epochs]
    # An epoch is mirrored after its checkpoint: the kill may fall between the two.
    assert len(trained) - len(epochs) <= 1
    assert [run.summary["status"] for run in same] == ["done"]


def epochs_saved(store, key):
    state = Store(store).checkpoint(key)
    return state["epoch"] if state else 0
