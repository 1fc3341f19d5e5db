"""A pytest plugin that spoils tests: PLANTED="hang:NAME,fail:NAME,memory:NAME,die:NAME"; a NAME ends a test's id."""

import os
import signal
import time

import pytest
import torch

PLANTED = [plant.split(":", 1) for plant in os.environ["PLANTED"].split(",")]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    for kind, name in PLANTED:
        if not pyfuncitem.nodeid.endswith(name):
            continue
        if kind == "hang":
            time.sleep(3600)
        elif kind == "fail":
            raise AssertionError("planted")
        elif kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        elif kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
