"""A matrix on a real Ray cluster: several nodes on this machine, really killed."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess

import pytest
from cases import daily
from command import PAIR, Bench, finish, litter, outputs, records, tiny, wait_for
from ray_nodes import RayNodes
from smskd_bench.store import Store

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="needs ray: pip install 'smskd-bench[ray]'",
)


def small():
    """Two stages, two seeds, a teacher; some tenths of a second each."""
    return tiny(["fitnet", "kd"], seeds=[0, 1])


def long():
    """A student of some seconds and many epochs: something to kill in the middle."""
    recipe = {"epochs": [30], "batch_size": 32}
    return tiny(["kd"], dataset={"name": "digits", "train_size": 300}, recipe=recipe)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head that trains nothing, and two nodes of one CPU."""
    bench = Bench(tmp_path_factory.mktemp("nodes"))
    nodes = RayNodes(bench.environment(), bench.folder / "nodes.log")
    try:
        for count in (2, 3):  # two that start at once may take each other's sockets
            nodes.add()
            nodes.wait_for(count)
        yield nodes
    finally:
        nodes.close()


@pytest.fixture
def on_ray(cluster, bench):
    """``run`` on the cluster."""
    home = cluster.environment["HOME"]

    def start(matrix, store, *words):
        where = ("--executor", "ray", "--address", cluster.address, "--workers", "auto")
        return bench.start_run(matrix, store, *where, *words, HOME=home)

    return start


def begun_epoch(store, epoch):
    """Key of a student's stage run whose checkpoint holds that many epochs and that is not done."""
    opened = Store(store)
    for key in opened.stage_keys():
        state = opened.checkpoint(key)
        model = opened.spec_document(key)["model"]
        if state and state["epoch"] >= epoch and model == PAIR["student"]:
            return key
    return None


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The small matrix, run without Ray. Read only."""
    bench = Bench(tmp_path_factory.mktemp("local"))
    return bench.folder / "store", bench.run(bench.matrix(small()), bench.folder / "store")


@pytest.mark.parametrize("mode", daily(["shared", "fetch"]))
def test_the_same_bits_as_a_local_run_and_the_same_lines(bench, local, on_ray, mode):
    matrix, store = bench.matrix(small()), bench.folder / "store"
    local, expected = local
    done = finish(on_ray(matrix, store, "--store-mode", mode))
    assert outputs(store) == outputs(local)
    assert litter(store) == []
    assert not list(store.glob(".*"))
    finished = [line for line in done.out.splitlines() if re.match(r"\[\d/5\] ", line)]
    assert len(finished) == 5
    labels = {line.split("]")[1].split("%")[0].strip() for line in finished}
    theirs = (line for line in expected.out.splitlines() if re.match(r"\[\d/5\] ", line))
    assert labels == {line.split("]")[1].split("%")[0].strip() for line in theirs}
    assert "5 stage runs trained, 0 already there, 0 failed" in done.out


def test_an_address_where_nothing_is_gives_one_message(bench):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        done = bench.run(
            bench.matrix(small()), bench.folder / "store", "--executor", "ray",
            "--address", address, expect=2,
        )  # fmt: skip
    assert done.err.startswith(f"error: there is no Ray cluster to join at {address}: ")
    assert len(done.err.splitlines()) == 2


@pytest.fixture(scope="module")
def local_long(tmp_path_factory):
    """Outputs of the long matrix, run without Ray."""
    bench = Bench(tmp_path_factory.mktemp("long"))
    bench.run(bench.matrix(long()), bench.folder / "store")
    return outputs(bench.folder / "store")


def start_and_wait_for_the_student(bench, on_ray, mode):
    """The long matrix under way: its student has some epochs behind it, many before it."""
    store, theirs = bench.folder / "store", bench.folder / "theirs"
    words = ("--node-store", theirs) if mode == "fetch" else ()
    process = on_ray(bench.matrix(long()), store, "--store-mode", mode, *words)
    stores = (lambda: theirs.glob("smskd-*")) if mode == "fetch" else (lambda: [store])
    wait_for(lambda: any(begun_epoch(one, 3) for one in stores()), process, 150)
    return process, store


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shared", "fetch"])
def test_a_node_killed_in_the_middle_changes_nothing(bench, cluster, local_long, on_ray, mode):
    process, store = start_and_wait_for_the_student(bench, on_ray, mode)
    for node in [node for node in cluster.started[1:] if node.poll() is None]:
        cluster.kill(node)  # it is on one of them
    cluster.add()
    done = finish(process, timeout_s=180)
    assert "once more" in done.out
    assert outputs(store) == local_long
    assert litter(store) == []
    # A checkpoint in a node's own store dies with it, if it was not sent yet.
    sessions = [len(record["sessions"]) for record in records(store).values()]
    assert max(sessions) == (2 if mode == "shared" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shared", "fetch"])
def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(bench, local_long, on_ray, mode):
    process, store = start_and_wait_for_the_student(bench, on_ray, mode)
    os.kill(process.pid, signal.SIGINT)
    done = finish(process, expect=130)
    assert "stopped; the same command goes on from the last checkpoint" in done.err
    key = begun_epoch(store, 3)
    assert key is not None
    assert not Store(store).is_running(key)
    finish(on_ray(bench.matrix(long()), store, "--store-mode", mode))
    assert outputs(store) == local_long
    assert litter(store) == []
    assert len(records(store)[key]["sessions"]) == 2


def can_hide_folders():
    """Whether we may give a process file systems of its own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_hide_folders(), reason="needs the right to mount (root)")
def test_a_node_without_the_store_is_refused_or_fetched_from(bench, local):
    hidden = bench.folder / "hidden"
    hidden.mkdir()
    matrix, store = bench.matrix(small()), hidden / "store"
    nodes = RayNodes(bench.environment(), bench.folder / "nodes.log")
    try:
        script = 'mount -t tmpfs none "$0" && exec "$@"'
        nodes.add(prefix=("unshare", "--mount", "sh", "-c", script, str(hidden)))
        where = ("--executor", "ray", "--address", nodes.address, "--workers", "auto")
        nodes.wait_for(2)
        refused = bench.run(matrix, store, *where, expect=3)
        assert re.match(r"error: node \S+ does not see the store ", refused.err)
        assert "--store-mode fetch" in refused.err
        assert not outputs(store)
        bench.run(matrix, store, *where, "--store-mode", "fetch")
        assert outputs(store) == outputs(local[0])
        assert not list(store.glob(".*"))
    finally:
        nodes.close()
