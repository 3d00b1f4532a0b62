"""Which stage runs several processes can train together; how they do it is in test_sharded.py."""

import pytest
from matrices import plan_of, specs
from smskd_bench.distributed import check_divisible, why_not_divisible

from smskd.errors import RefusedError


def why_not(row, processes=2, **entries):
    (spec, *_) = specs(plan_of(rows=[[row]], **entries), row)
    return why_not_divisible(spec, processes)


@pytest.mark.parametrize("method", ["kd", "fitnet", "sp", "rkd", "dist", "at"])
def test_methods_that_can_be_divided(method):
    assert why_not(method) is None


@pytest.mark.parametrize(("method", "word"), [("crd", "random numbers"), ("dml", "networks")])
def test_methods_that_cannot(method, word):
    assert word in why_not(method)


def test_a_rest_that_is_too_small():
    data = {"name": "digits", "train_size": 130}
    recipe = {"epochs": [1], "batch_size": 64}
    assert why_not("kd", 2, dataset=data, recipe=recipe) is None
    reason = why_not("kd", 3, dataset=data, recipe=recipe)
    assert reason == "its epochs end with a batch of 2, and there are 3 processes"


def test_the_whole_plan_is_looked_at():
    check_divisible(plan_of(rows=[["kd"], ["fitnet", "kd"]]), 2)
    with pytest.raises(RefusedError, match="crd s0 stage 2 cannot be divided among processes"):
        check_divisible(plan_of(rows=[["kd", "crd"]]), 2)
