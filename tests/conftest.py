"""Hostile defaults: warnings are errors (pyproject.toml), every test starts from one seed; memory can be poisoned."""

import os
import re
from pathlib import Path

import pytest
import torch
from minimum import COMPILES, NO_COMPILE

if not torch.cuda.is_available():
    # before Triton is imported: without a GPU its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.backends.cudnn.allow_tf32 = False  # the oracles' convolutions, on a GPU
torch.set_num_threads(1)  # several tests at a time; two threads that fight for cores are ten times slower than one

PINNED = re.search(r"^torch==(\S+)", (Path(__file__).parents[1] / "constraints.txt").read_text(), re.MULTILINE)[1]


def pytest_configure(config):
    """What a newer PyTorch deprecates is no failure there: with the pinned one, where warnings are errors, it is."""
    if torch.__version__.partition("+")[0] != PINNED:
        for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", "UserWarning"):
            config.addinivalue_line("filterwarnings", f"default::{category}")


def _poisoned(make):
    def wrapper(*args, **kwargs):
        out = make(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not out.is_meta:
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return wrapper


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compile_is_newer(monkeypatch):
    if not COMPILES:
        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.skip(NO_COMPILE))


@pytest.fixture
def poison_empty(monkeypatch):
    """An element that a kernel does not write stays NaN and fails the comparison."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (torch, "empty_strided")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def triton(poison_empty):
    """The Triton kernels, interpreted where there is no GPU."""
    pytest.importorskip("triton", minversion="3.4")
    from mfkernels import use_backend

    with use_backend("triton"):
        yield
