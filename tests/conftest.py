"""One thread for every test: the networks are tiny, and more threads only wait for each other."""

import importlib
import os
from contextlib import suppress
from functools import cache

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def operators_read_once():
    """torch's exporter parses all its operators anew for each graph, a second; here once."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError, AttributeError):  # of torch's insides: another torch reads them
            apis = importlib.import_module("torch.onnx._internal._lazy_import").onnxscript_apis
            name = apis._name
            read = cache(lambda: importlib.import_module(name).get_torchlib_ops())
            patch.setattr(apis, "get_torchlib_ops", read, raising=False)
        yield
