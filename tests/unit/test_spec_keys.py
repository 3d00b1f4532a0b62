"""What changes the key of a stage run, and what does not."""

import copy
import hashlib
import json
from dataclasses import fields, replace

import pytest
import smskd_bench.plan as plan_module
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrices import content, load_text, plan_of, specs
from smskd_bench.plan import make_plan
from smskd_bench.spec import DataSpec, MethodSpec, NamedSettings, StageSpec, key_of

from smskd.methods import METHODS
from smskd.models import MODELS
from smskd.settings import Optimizer, Reference, Schedule, Training, Weighting

ROW = {"stages": ["fitnet", {"method": "kd"}], "name": "r"}
MAP = {"map": "constant"}


def keys(**entries):
    """Keys of teacher, stage 1 and stage 2 of the only cell."""
    plan = plan_of(**{"rows": [ROW], **entries})
    (cell,) = plan.cells
    return (cell.teacher, *cell.stages)


def row(*stages, **entries):
    return {"rows": [{"stages": list(stages), "name": "r", **entries}]}


def stage(method="kd", **entries):
    return {"method": method, **entries}


def recipe(**entries):
    return {"recipe": {"epochs": [2, 1], **entries}}


def changed(**entries):
    """Which of "t" (teacher), "1" and "2" (stages) got another key."""
    return "".join(
        w for w, old, new in zip("t12", keys(), keys(**entries), strict=True) if old != new
    )


KD_VARIANT = {"v": {"method": "kd", "settings": {}}}


def variant(settings=None, modifiers=(), base="kd"):
    """Row fitnet>v with a variant of KD."""
    return {
        "methods": {
            "v": {"method": base, "settings": settings or {}, "modifiers": list(modifiers)}
        },
        **row("fitnet", "v"),
    }


# ------------------------------------------------------------------------------------ must change

MUST = {
    "data set": ({"dataset": {"name": "cifar10"}}, "t12"),
    "train size": ({"dataset": {"name": "digits", "train_size": 500}}, "t12"),
    "dev size": ({"dataset": {"name": "digits", "dev_size": 100}}, "t12"),
    "student": ({"pairs": [{"teacher": "resnet14_half", "student": "resnet8_half"}]}, "12"),
    "teacher": ({"pairs": [{"teacher": "resnet20", "student": "resnet8_quarter"}]}, "t12"),
    "seed": ({"seeds": [1]}, "12"),
    "rate of the pair": ({"pairs": [{"teacher": "resnet14_half", "student": "resnet8_quarter", "lr": 0.01}]}, "12"),
    "teacher's epochs": ({"teacher": {"epochs": 4}}, "t12"),
    "teacher's seed": ({"teacher": {"epochs": 3, "seed": 1}}, "t12"),
    "teacher's rate": ({"teacher": {"epochs": 3, "lr": 0.1}}, "t12"),
    "teacher's schedule": ({"teacher": {"epochs": 3, "schedule": {"kind": "cosine"}}}, "t12"),
    "method of stage 1": (row("at", "kd"), "12"),
    "method of stage 2": (row("fitnet", "dkd"), "2"),
    "order": (row("kd", "fitnet"), "12"),
    "one stage more before": (row("fitnet", "at", "kd"), None),
    "joint": (row("fitnet", ["kd", "at"]), "2"),
    "epochs of stage 1": (row("fitnet", "kd", epochs=[3, 1]), "12"),
    "epochs of stage 2": (row("fitnet", "kd", epochs=[2, 2]), "2"),
    "rate": (recipe(optimizer={"lr": 0.1}), "t12"),
    "momentum": (recipe(optimizer={"momentum": 0.8}), "t12"),
    "weight decay": (recipe(optimizer={"weight_decay": 1e-4}), "t12"),
    "nesterov": (recipe(optimizer={"nesterov": True}), "t12"),
    "batch size": (recipe(batch_size=32), "t12"),
    "precision": (recipe(precision="bf16"), "t12"),
    "first schedule's kind": (recipe(first_stage={"kind": "cosine"}), "t12"),
    "first schedule's start": (recipe(first_stage={"start": 0.5}), "t12"),
    "first schedule's milestones": (recipe(first_stage={"milestones": [0.5]}), "t12"),
    "first schedule's gamma": (recipe(first_stage={"gamma": 0.2}), "t12"),
    "later schedule": (recipe(later_stages={"start": 0.2}), "2"),
    "init": (recipe(init="reinit"), "2"),
    "a stage's schedule": (row("fitnet", stage(schedule={"kind": "constant"})), "2"),
    "a stage's epochs": (row("fitnet", stage(epochs=5)), "2"),
    "a stage's init": (row("fitnet", stage(init="reinit")), "2"),
    "method weight": (row("fitnet", stage(method_weight=2)), "2"),
    "method weight of stage 1": (row(stage("fitnet", method_weight=2), "kd"), "12"),
    "cross-entropy weight": (row("fitnet", stage(ce_weight=0.5)), "2"),
    "cross-entropy weight 0": (row("fitnet", stage(ce_weight=0)), "2"),
    "no reference": (row("fitnet", "kd", reference=None), "2"),
    "no reference on a stage": (row("fitnet", stage(reference=None)), "2"),
    "reference weight": ({"reference": {"weight": 2}}, "2"),
    "reference temperature": ({"reference": {"temperature": 2}}, "2"),
    "reference space": ({"reference": {"space": "features"}}, "2"),
    "weight map": ({"reference": {"weighting": {"map": "tcp"}}}, "2"),
    "constant map": ({"reference": {"weighting": MAP}}, "2"),
    "TCP temperature": ({"reference": {"weighting": {"temperature": 2}}}, "2"),
    "normalisation": ({"reference": {"weighting": {"normalise": "batch_mean"}}}, "2"),
    "denominator": ({"reference": {"weighting": {"denominator": "weights"}}}, "2"),
    "reference of the row": (row("fitnet", "kd", reference={"weight": 2}), "2"),
    "reference of the stage": (row("fitnet", stage(reference={"weight": 2})), "2"),
    "modifier": (variant(modifiers=["logit_standardisation"]), "2"),
}  # fmt: skip


@pytest.mark.parametrize("what", MUST)
def test_what_changes_a_key(what):
    entries, expected = MUST[what]
    if expected is None:
        assert keys(**entries)[-1] != keys()[-1]
    else:
        assert changed(**entries) == expected


def other_value(value):
    return value + 1 if not isinstance(value, bool) else not value


EVERY_SETTING = [
    (name, entry.name) for name, method in METHODS.items() for entry in fields(method) if isinstance(entry.default, int | float)
]  # fmt: skip


@pytest.mark.parametrize(("name", "setting"), EVERY_SETTING)
def test_every_setting_of_every_method_changes_the_key(name, setting):
    plain = specs(plan_of(**variant(base=name)), "r")[1]
    value = other_value(next(f.default for f in fields(METHODS[name]) if f.name == setting))
    other = specs(plan_of(**variant({setting: value}, base=name)), "r")[1]
    assert other.methods[0].settings[setting] == value
    assert other.key != plain.key
    assert other.parent == plain.parent


def test_every_method_has_a_key_of_its_own():
    found = {keys(**row("fitnet", name))[-1] for name in METHODS}
    assert len(found) == len(METHODS)


def test_order_of_joint_methods():
    assert keys(**row("fitnet", ["kd", "at"]))[-1] != keys(**row("fitnet", ["at", "kd"]))[-1]


def test_split_seed_with_a_split():
    for size in ({"train_size": 500}, {"dev_size": 100}):
        found = {keys(dataset={"name": "digits", "split_seed": seed, **size}) for seed in (0, 1)}
        assert len(found) == 2


def test_carry():
    dev = {"dataset": {"name": "digits", "dev_size": 100}}
    last, best = keys(**dev), keys(**dev, **recipe(carry="best_on_dev"))
    assert last[0] == best[0]  # a teacher always keeps its last epoch
    assert last[1] != best[1]


def test_content_of_imported_weights(tmp_path):
    found = set()
    for i, data in enumerate((b"one", b"two", b"one")):
        file = tmp_path / f"{i}.safetensors"
        file.write_bytes(data)
        found.add(keys(teacher={"weights": {"resnet14_half": str(file)}}))
    assert len(found) == 2


def test_versions(monkeypatch):
    before = keys()
    entry = MODELS["resnet8_quarter"]
    with monkeypatch.context() as patch:
        patch.setitem(MODELS, "resnet8_quarter", replace(entry, version=entry.version + 1))
        assert [a == b for a, b in zip(before, keys(), strict=True)] == [True, False, False]
    with monkeypatch.context() as patch:
        patch.setattr(METHODS["kd"], "version", METHODS["kd"].version + 1)
        assert [a == b for a, b in zip(before, keys(), strict=True)] == [True, True, False]
    with monkeypatch.context() as patch:
        patch.setattr(METHODS["scratch"], "version", METHODS["scratch"].version + 1)
        assert not set(before) & set(keys())
    info = plan_module.dataset_info("digits")
    for raised in (replace(info, version=info.version + 1), replace(info, fingerprint="0" * 64)):
        with monkeypatch.context() as patch:
            patch.setattr(plan_module, "dataset_info", lambda name, info=raised: info)
            assert not set(before) & set(keys())
    assert keys() == before


def test_loop_and_form_are_in_the_key():
    spec = specs(plan_of(), "kd")[0]
    assert len({spec.key, replace(spec, loop=spec.loop + 1).key, replace(spec, schema=2).key}) == 3


# --------------------------------------------------------------------------------- must not change

NEVER = {
    "name of the matrix": {"name": "another"},
    "description": {"description": "words"},
    "protocol": {"protocol": 7},
    "evaluate_every": {"evaluate_every": 3},
    "name of the row": {"rows": [{"stages": ["fitnet", "kd"]}]},
    "note": row("fitnet", "kd", note="words"),
    "only": row("fitnet", "kd", only=["resnet14_half>resnet8_quarter"]),
    "defaults written out": {
        "recipe": {
            "epochs": {"per_stage": [2, 1, 9]}, "batch_size": 64, "precision": "fp32", "carry": "last", "init": "warm",
            "optimizer": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False},
            "first_stage": {"kind": "step", "start": 1, "milestones": [0.625, 0.75, 0.875], "gamma": 0.1},
        },
        "reference": {"weight": 1, "temperature": 4, "space": "logits",
                      "weighting": {"map": "one_minus_tcp", "temperature": 1, "normalise": "none", "denominator": "batch"}},
        "teacher": {"epochs": 3, "seed": 0, "lr": None, "schedule": None},
        "dataset": {"name": "digits", "train_size": None, "dev_size": 0},
        "schema": 1, "methods": {}, "plugins": [],
    },
    "rate of the pair equal to the recipe's": {"pairs": [{"teacher": "resnet14_half", "student": "resnet8_quarter", "lr": 0.05}]},
    "stage settings equal to the recipe's": row("fitnet", stage(epochs=1, init="warm", carry="last", method_weight=1, ce_weight=None)),
    "total that gives the same epochs": row("fitnet", "kd", epochs={"total": 3}),
    "a variant with the defaults": variant({"weight": 0.9, "temperature": 4}),
    "a variant that is not used": {"methods": {"v": {"method": "kd", "settings": {"weight": 3}}}},
    "split seed without a split": {"dataset": {"name": "digits", "split_seed": 5}},
    "reference of stage 1": row(stage("fitnet", reference={"weight": 7}), "kd"),
    "init of stage 1": row(stage("fitnet", init="reinit"), "kd"),
}  # fmt: skip


@pytest.mark.parametrize("what", NEVER)
def test_what_changes_no_key(what):
    assert changed(**NEVER[what]) == ""


def same(*variants):
    assert len({keys(**entries) for entries in variants}) == 1


def test_the_spelling_of_numbers():
    settings = (
        {"weight": 2, "temperature": 3},
        {"weight": 2.0, "temperature": 3.0},
        {"temperature": 3.0, "weight": 2},
    )
    same(*(variant(s) for s in settings))
    same(*(recipe(optimizer={"lr": lr}) for lr in (1, 1.0)))
    same(*({"reference": {"weight": w, "weighting": {"temperature": w}}} for w in (2, 2.0)))
    same(*(row("fitnet", stage(method_weight=w, ce_weight=w)) for w in (3, 3.0)))
    texts = (
        yaml.safe_dump(content()) + f"recipe: {{optimizer: {{weight_decay: {text}}}}}\n"
        for text in ("5e-4", "0.0005", "5.0E-4", ".0005")
    )
    texts = [text.replace("recipe:\n  epochs:\n  - 2\n  - 1\n", "") for text in texts]
    assert len({make_plan(load_text(text)).cells[0].stages for text in texts}) == 1


def reordered(node):
    if isinstance(node, dict):
        return {k: reordered(v) for k, v in reversed(node.items())}
    return [reordered(v) for v in node] if isinstance(node, list) else node


def test_the_order_of_keys_in_the_file():
    document = content(
        **variant({"weight": 2.0, "temperature": 3.0}),
        reference={"weight": 2, "weighting": {"map": "tcp", "temperature": 2}},
    )
    one, other = (
        make_plan(load_text(yaml.safe_dump(d, sort_keys=False)))
        for d in (document, reordered(document))
    )
    assert one.cells == other.cells


def test_order_and_number_of_rows_and_seeds():
    rows = [ROW, {"stages": ["kd"], "controls": ["r"]}, ["at", "at"]]
    plan = plan_of(rows=rows, seeds=[0, 1, 2])
    backward = plan_of(rows=rows[::-1], seeds=[2, 1, 0])
    alone = plan_of(rows=[ROW])
    assert {c.name: c.stages for c in plan.cells} == {c.name: c.stages for c in backward.cells}
    assert alone.cells[0].stages == plan.cells[0].stages
    assert set(alone.nodes) < set(plan.nodes) == set(backward.nodes)


def test_controls():
    rows = [ROW, ["kd"]]
    with_controls = [{**ROW, "controls": ["kd"]}, ["kd"]]
    assert plan_of(rows=rows).cells == plan_of(rows=with_controls).cells


REFERENCES = [
    {"temperature": 9.0}, {"space": "features"}, {"weighting": {"map": "tcp", "temperature": 3.0}},
    {"weighting": {"normalise": "batch_sum", "denominator": "weights"}},
]  # fmt: skip


@pytest.mark.parametrize("reference", REFERENCES, ids=str)
def test_a_reference_that_is_off_has_no_settings(reference):
    off = row("fitnet", "kd", reference=None)
    same(
        off,
        {**off, "reference": reference},
        row("fitnet", stage(reference={**reference, "weight": 0})),
    )


def test_what_concerns_later_stages_changes_nothing_of_a_first():
    same(row("kd"), {**row("kd"), "reference": {"weight": 9}})
    same(row("kd"), {**row("kd"), **recipe(later_stages={"start": 0.7}, init="reinit")})
    same(row("kd"), {**row("kd"), "recipe": {"epochs": [2, 7, 8]}})


def test_settings_that_cannot_act():
    constant = {"weighting": {"map": "constant"}}
    same(
        {"reference": constant},
        {"reference": {"weighting": {**MAP, "temperature": 3.0}}},
        {"reference": {"weighting": {**MAP, "normalise": "batch_mean"}}},
        {"reference": {"weighting": {**MAP, "denominator": "weights"}}},
    )
    # Divided by the batch's sum of weights, a constant is another scale.
    assert changed(reference={"weighting": {**MAP, "normalise": "batch_sum"}}) == "2"
    same(*({"reference": {"space": "features", "temperature": t}} for t in (1.0, 4.0)))
    same(
        *(
            recipe(later_stages={"kind": "cosine", "milestones": m, "gamma": 0.3})
            for m in ([0.2], [0.4, 0.5])
        )
    )
    same(*(recipe(first_stage={"kind": "constant", "milestones": m}) for m in ([0.2], [0.3])))
    same(*(row("fitnet", stage(schedule={"kind": "cosine", "gamma": g})) for g in (0.1, 0.5)))


def test_a_student_without_teacher_knows_nothing_of_it():
    plain = row("scratch")
    first = keys(**plain)
    for teacher in (
        {"epochs": 9},
        {"epochs": 3, "seed": 4},
        {"epochs": 3, "lr": 1.0},
        {"epochs": 3, "schedule": {"kind": "cosine"}},
    ):
        assert keys(**plain, teacher=teacher)[1:] == first[1:]
    other = [{"teacher": "resnet20", "student": "resnet8_quarter"}]
    assert keys(**plain, pairs=other)[1:] == first[1:]
    # A later stage of plain training is held by weights that the teacher gives, or by none.
    twice = row("scratch", "scratch")
    assert keys(**twice)[2] != keys(**twice, teacher={"epochs": 9})[2]
    constant = {"reference": {"weighting": MAP}}
    assert keys(**twice, **constant)[1:] == keys(**twice, **constant, teacher={"epochs": 9})[1:]


def test_imported_weights_hide_the_recipe_of_the_teacher_and_their_path(tmp_path):
    found = set()
    for i, teacher in enumerate(({}, {"epochs": 9}, {"seed": 3}, {"lr": 1.0})):
        file = tmp_path / f"{i}.safetensors"
        file.write_bytes(b"same")
        found.add(keys(teacher={**teacher, "weights": {"resnet14_half": str(file)}}))
    assert len(found) == 1


def test_a_plain_student_and_a_teacher_are_the_same_work():
    pairs = [
        {"teacher": "resnet20", "student": "resnet8_half"},
        {"teacher": "resnet8_half", "student": "resnet8_quarter"},
    ]
    plan = plan_of(pairs=pairs, rows=[["scratch"]], teacher={"epochs": 2})
    assert plan.cells[0].stages == (plan.cells[1].teacher,)


# ------------------------------------------------------------------------------------------ golden


GOLDEN = "4b78d8ec585cc28863c7aa3393dedb9a7014abed539a9b2d9dca870729f0894c"


def simple_spec():
    return StageSpec(
        dataset=DataSpec("digits", 1, "f" * 64),
        model="resnet8",
        model_version=1,
        seed=3,
        methods=(MethodSpec("kd", 1, {"ce_weight": 0.1, "weight": 0.9, "temperature": 4.0}),),
        training=Training(epochs=20),
        number=2,
        first_epoch=20,
        reference=Reference(),
        parent="a" * 64,
        teachers=("b" * 64,),
    )


def test_a_key_does_not_change_by_accident():
    # If this fails, every store in the world is out of date: raise SPEC_SCHEMA or undo the change.
    assert simple_spec().key == GOLDEN


def test_a_key_is_the_hash_of_compact_sorted_json():
    spec = simple_spec()
    text = json.dumps(spec.document(), sort_keys=True, separators=(",", ":"))
    assert spec.key == hashlib.sha256(text.encode()).hexdigest() == key_of(spec.document())
    assert len(spec.key) == 64


def test_nan_has_no_key():
    with pytest.raises(ValueError, match="JSON"):
        key_of({"x": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        _ = replace(simple_spec(), method_weight=float("nan")).key


def test_labels():
    spec = simple_spec()
    assert spec.label == "resnet8 kd s3 stage 2"
    assert replace(spec, imported="c" * 64).label == "resnet8 imported s3 stage 2"
    assert spec.depends_on == ("b" * 64, "a" * 64)
    assert replace(spec, parent=None, teachers=()).depends_on == ()


# -------------------------------------------------------------------------------------- round trip


def round_trip(spec):
    text = json.dumps(spec.document(), indent=1, allow_nan=False)
    return StageSpec.from_document(json.loads(text))


def test_round_trip_of_a_whole_plan():
    plan = plan_of(
        rows=[
            ROW,
            [["kd", "at"]],
            ["scratch", "v", {"method": "dkd", "ce_weight": 0, "schedule": {"kind": "cosine"}}],
        ],
        methods={"v": {"method": "kd", "modifiers": ["logit_standardisation"]}},
        dataset={"name": "digits", "train_size": 500, "dev_size": 100, "split_seed": 3},
        recipe={"epochs": [2], "carry": "best_on_dev", "precision": "bf16"},
    )
    for key, spec in plan.nodes.items():
        again = round_trip(spec)
        assert again == spec
        assert again.key == key == spec.key


NUMBERS = st.floats(0, 1e6, allow_nan=False) | st.integers(0, 1000)
NAMES = st.text(min_size=1, max_size=8)
SETTINGS = st.dictionaries(
    NAMES,
    st.one_of(NUMBERS, st.booleans(), NAMES, st.none(), st.lists(NUMBERS, max_size=2)),
    max_size=3,
)
NAMED = st.builds(NamedSettings, NAMES, st.integers(1, 9), SETTINGS)
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
SCHEDULES = st.builds(
    Schedule,
    st.sampled_from(["step", "cosine", "constant"]),
    NUMBERS,
    st.lists(st.floats(0, 1), max_size=3).map(tuple),
    NUMBERS,
)
TRAINING = st.builds(
    Training, st.integers(0, 999), st.builds(Optimizer, NUMBERS, NUMBERS, NUMBERS, st.booleans()), SCHEDULES,
    st.integers(1, 512), st.sampled_from(["fp32", "bf16"]), st.sampled_from(["last", "best_on_dev"]), st.sampled_from(["warm", "reinit"]),
)  # fmt: skip
WEIGHTING = st.builds(
    Weighting, st.sampled_from(["one_minus_tcp", "tcp", "constant", "exp_minus_tcp", "two_minus_tcp"]), NUMBERS,
    st.sampled_from(["none", "batch_mean", "batch_sum"]), st.sampled_from(["batch", "weights"]),
)  # fmt: skip
REFERENCE = st.builds(
    Reference, NUMBERS, NUMBERS, st.sampled_from(["logits", "features"]), WEIGHTING
)
SPECS = st.builds(
    StageSpec,
    dataset=st.builds(DataSpec, NAMES, st.integers(1, 9), HEX, st.none() | st.integers(1, 999), st.integers(0, 99), st.integers(0, 9)),
    model=NAMES, model_version=st.integers(1, 9), seed=st.integers(0, 2**40),
    methods=st.lists(st.builds(MethodSpec, NAMES, st.integers(1, 9), SETTINGS, st.lists(NAMED, max_size=2).map(tuple)), min_size=1, max_size=2).map(tuple),
    training=TRAINING, number=st.integers(1, 9), first_epoch=st.integers(0, 999), method_weight=NUMBERS,
    ce_weight=st.none() | NUMBERS, reference=st.none() | REFERENCE, parent=st.none() | HEX,
    teachers=st.lists(HEX, max_size=2).map(tuple), imported=st.none() | HEX,
)  # fmt: skip


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
)
@given(SPECS)
def test_round_trip_of_any_specification(spec):
    first = round_trip(spec)  # whole numbers become floats where the form says so
    again = round_trip(first)
    assert again == first
    assert again.key == first.key
    assert copy.deepcopy(first).key == first.key
