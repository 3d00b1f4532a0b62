"""What a record says about how it was made, and what two of them say differently."""

import pytest
from smskd_bench.manner import Manner, differences, manner_of

from smskd.errors import StoreError

SESSION = {
    "device": "CPU X", "threads": 2, "folded": 3, "compiled": False, "teacher": "table fp16",
    "reference": "live",
}  # fmt: skip


def record(*sessions, **environment):
    made = {
        "code": {"revision": "abc", "dirty": False},
        "packages": {"torch": "2.0"},
        "machine": {"processor": "CPU X", "system": "Linux", "python": "3.11", "cores": 8},
        "device": "CPU X",
    }
    return {"key": "k", "sessions": list(sessions), "environment": made | environment}


def test_one_manner_in_words():
    manner = manner_of(record(SESSION, SESSION))
    assert manner == Manner(2, 3, False, "table fp16", "live")
    assert manner.storage == "fp16"
    words = "2 threads, teacher table fp16, reference live, 3 seeds as one network"
    assert manner.text() == words
    assert manner_of(record()) == Manner()
    assert Manner(1, teacher="table fp32 and live").storage == "fp32"


def test_sessions_of_several_manners_are_answered_exactly():
    manner = manner_of(record(SESSION, SESSION | {"threads": 1, "teacher": "live"}))
    assert (manner.threads, manner.folded, manner.teacher, manner.storage) == (1, 1, "live", None)
    assert manner.mixed == "its sessions differ in threads, teacher"


@pytest.mark.parametrize("sessions", [[{}], [3], None, 3, [SESSION | {"threads": "many"}]])
def test_a_damaged_record_is_refused(sessions):
    with pytest.raises(StoreError, match="is damaged"):
        manner_of({"key": "k", "sessions": sessions})


def test_differences_are_named():
    assert differences(record(SESSION), record(SESSION)) == []
    other = record(SESSION | {"threads": 1}, packages={"torch": "2.1"}, device="GPU Y")
    assert differences(record(SESSION), other) == [
        "torch: 2.0 recorded, 2.1 here",
        "device: CPU X recorded, GPU Y here",
        "threads: 2 recorded, 1 here",
    ]
    changed = record(SESSION, code={"revision": "abc", "dirty": True})
    assert "code was changed since its revision" in differences(record(SESSION), changed)[-1]
    mixed = record(SESSION, SESSION | {"threads": 1})
    assert differences(mixed, record(SESSION)) == [
        "its sessions differ in threads, which cannot be repeated"
    ]
