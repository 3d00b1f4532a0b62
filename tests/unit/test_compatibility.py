"""What cannot work is refused before anything is trained, with pair, method and reason."""

from dataclasses import replace

import pytest
from matrices import plan_of
from smskd_bench.compatibility import check_plan

from smskd.errors import IncompatibleError
from smskd.models import MODELS
from smskd.taps import Taps

HINT = {"hint_9": {"method": "fitnet", "settings": {"hint_layer": 9}}}


def refusal(**entries):
    plan = plan_of(**entries)
    with pytest.raises(IncompatibleError) as caught:
        check_plan(plan, plan.nodes)
    return caught.value.message


def test_a_plan_that_can_work_passes():
    plan = plan_of(rows=[["fitnet", "kd"], ["crd"], ["simkd"]])
    check_plan(plan, plan.nodes)


def test_every_method_and_pair_that_cannot_work_is_named_once():
    pairs = [{"teacher": t, "student": "resnet8_quarter"} for t in ("resnet20", "resnet14_half")]
    said = refusal(methods=HINT, rows=[["hint_9"], ["kd", "hint_9"]], pairs=pairs, seeds=[0, 1])
    assert said.count("hint_layer 9 asked for") == 2
    assert "resnet20>resnet8_quarter: fitnet: " in said
    assert "expected 0 <= hint_layer < 4" in said


def test_a_batch_that_is_too_small_for_a_method():
    said = refusal(rows=[["pkdot"]], recipe={"batch_size": 1, "epochs": [1]})
    assert "pkdot" in said
    assert "expected" in said


def test_a_modifier_around_a_method_that_it_cannot_change():
    variants = {"odd": {"method": "fitnet", "modifiers": ["ctkd"]}}
    assert "ctkd: it cannot change the loss of fitnet" in refusal(methods=variants, rows=[["odd"]])


def test_a_missing_tap_is_said(monkeypatch):
    bare = replace(MODELS["resnet8_quarter"], taps=Taps(pooled="fc:input"))
    monkeypatch.setitem(MODELS, "bare", bare)
    said = refusal(pairs=[{"teacher": "resnet14_half", "student": "bare"}], rows=[["at"], ["kd"]])
    assert said.endswith("resnet14_half>bare: bare: the model has no tap for maps")


def test_the_bare_student_of_simkd_cannot_hold_the_next_stage():
    said = refusal(rows=[["simkd", "kd"]])
    assert "stage 2: the reference compares logits" in said
    plan = plan_of(rows=[{"stages": ["simkd", "kd"], "reference": None}])
    check_plan(plan, plan.nodes)


def test_a_student_of_simkd_cannot_teach():
    assistants = {"ta": {"model": "resnet8_half", "stages": ["simkd"]}}
    rows = [{"name": "taught", "stages": [{"method": "kd", "teacher": "ta"}]}]
    assert "a student of simkd cannot teach" in refusal(assistants=assistants, rows=rows)
