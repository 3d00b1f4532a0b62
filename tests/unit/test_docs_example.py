"""The method that the documentation adds as an example: taken from the page, it keeps the contract."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from smskd.contract import check_method
from smskd.methods import METHODS, Method

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
NAME = "smskd.methods.logit_mse"


def code_blocks():
    section = PAGE.read_text(encoding="utf-8").split("## Adding a method")[1].split("\n### ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def module_of(name, source):
    module = ModuleType(name)
    sys.modules[name] = module  # where dataclasses and the contract look a class's module up
    exec(compile(source, f"{PAGE.name}:{name}", "exec"), module.__dict__)
    return module


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, None)
    return module_of(NAME, code_blocks()[0])


def test_page_has_the_method_the_line_and_the_golden_test():
    method, line, golden = code_blocks()
    assert "class LogitMSE(Method)" in method
    assert "def test_logit_mse" in golden
    assert line.strip() == '"logit_mse": LogitMSE,'
    assert "logit_mse" not in METHODS, "the example shall be new to the reader"


def test_example_keeps_the_contract(example):
    assert issubclass(example.LogitMSE, Method)
    check_method(example.LogitMSE)


def test_golden_test_of_the_page(example):
    golden = {"__name__": "golden"}
    exec(compile(code_blocks()[2], PAGE.name, "exec"), golden)
    golden["test_logit_mse"]()


def test_golden_test_of_the_page_can_fail(example, monkeypatch):
    golden = {"__name__": "golden"}
    exec(compile(code_blocks()[2], PAGE.name, "exec"), golden)
    golden["slow_logit_mse"] = lambda z_s, z_t: (z_s - z_t).abs().sum()
    with pytest.raises(AssertionError):
        golden["test_logit_mse"]()
