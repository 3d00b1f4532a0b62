"""Where stage runs go on a cluster, and what is asked of it; nothing here needs Ray."""

from types import SimpleNamespace

import pytest
from matrices import plan_of
from smskd_bench.executors.ray_cluster import Node, RayCluster, Share, _check_address
from smskd_bench.executors.ray_executor import Dispatch, Spread
from smskd_bench.executors.ray_settings import RaySettings
from smskd_bench.executors.ray_task import look

from smskd.errors import ConfigError


def cluster(*nodes, **settings):
    """A cluster that says it has these nodes: (id, CPUs, GPUs)."""
    listed = [
        {
            "NodeID": name,
            "NodeManagerHostname": f"host-{name}",
            "Alive": True,
            "Resources": {"CPU": cpus, "GPU": gpus},
        }
        for name, cpus, gpus in nodes
    ]
    return RayCluster(RaySettings(**settings), SimpleNamespace(nodes=lambda: listed))


@pytest.mark.parametrize(
    ("cpus", "gpus", "share", "places"),
    [
        (8, 0, Share(1), 8), (8, 0, Share(3), 2), (0, 0, Share(1), 0), (8, 2, Share(1, 1.0), 2),
        (8, 2, Share(1, 0.25), 8), (32, 1, Share(1, 0.1), 10), (32, 1, Share(1, 0.3), 3), (8, 0, Share(1, 0.5), 0),
    ],
)  # fmt: skip
def test_places_of_a_node(cpus, gpus, share, places):
    assert Node("a", "host", cpus, gpus).places(share) == places


def test_share_of_a_stage_run():
    gpus = cluster(("head", 0, 0), ("a", 8, 2))
    assert gpus.share("cuda", 1) == Share(1, 1.0)
    assert gpus.share("cpu", 2) == Share(2, 0.0)
    assert cluster(("a", 8, 2), gpus_per_stage_run=0.25).share("cuda", 1) == Share(1, 0.25)
    with pytest.raises(
        ConfigError,
        match="no node has room for a stage run of 9 CPU threads; the largest has 8 CPUs",
    ):
        gpus.share("cpu", 9)
    with pytest.raises(ConfigError, match="is for GPUs"):
        cluster(("a", 8, 2), gpus_per_stage_run=0.5).share("cpu", 1)


def test_device_is_what_the_nodes_have():
    with_gpu, without = cluster(("head", 1, 0), ("a", 8, 1)), cluster(("a", 8, 0))
    assert [with_gpu.device("auto"), with_gpu.device("cpu"), with_gpu.device("cuda")] == [
        "cuda",
        "cpu",
        "cuda",
    ]
    assert without.device("auto") == "cpu"
    for which, wanted in ((without, "cuda"), (with_gpu, "cuda:1"), (with_gpu, "tpu")):
        with pytest.raises(ConfigError):
            which.device(wanted)


@pytest.mark.parametrize(
    "address", ["host", "host:", ":1", "ray://host:10001", "host:port", "http://h:1"]
)
def test_an_address_that_is_none(address):
    with pytest.raises(ConfigError, match="is no address of a Ray cluster"):
        _check_address(address)


def dispatch(plan, homes=(), running=()):
    """A driver in the middle of a run."""
    made = object.__new__(Dispatch)
    made.cluster, made.spread = cluster(("a", 2, 0), ("b", 2, 0)), Spread(Share(1))
    made._tables, made._homes = set(plan.nodes), dict(homes)
    made._running = {number: SimpleNamespace(node=node) for number, node in enumerate(running)}
    return made


def test_readers_of_a_table_stay_where_it_is_while_there_is_room():
    plan = plan_of(rows=[["kd"]])
    teacher, student = plan.nodes.values()
    assert student.teachers == (teacher.key,)
    homes = {teacher.key: "b"}
    assert dispatch(plan)._home((student,)) is None
    assert dispatch(plan, homes=homes)._home((teacher,)) is None
    assert dispatch(plan, homes=homes)._home((student,)) == "b"
    assert dispatch(plan, homes=homes, running=["b", "a", "a"])._home((student,)) == "b"
    assert dispatch(plan, homes=homes, running=["b", "b"])._home((student,)) is None
    assert dispatch(plan, homes={teacher.key: "dead"})._home((student,)) is None


def test_a_node_sees_a_store_or_not(tmp_path):
    beacon = tmp_path / ".ray-token.tmp"
    assert not look(beacon, "token", ".answer.tmp").sees_store
    beacon.write_text("another")
    assert not look(beacon, "token", ".answer.tmp").sees_store
    beacon.write_text("token")
    assert look(beacon, "token", ".answer.tmp").sees_store
    assert (tmp_path / ".answer.tmp").read_text() == "token"
    assert look(None, "token", ".answer.tmp").sees_store
