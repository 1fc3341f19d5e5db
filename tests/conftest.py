"""Hostile defaults: warnings are errors (pyproject.toml), every test starts from one seed; memory can be poisoned."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # before Triton is imported: without a GPU its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.backends.cudnn.allow_tf32 = False  # the oracles' convolutions, on a GPU
torch.set_num_threads(1)  # several tests at a time; two threads that fight for cores are ten times slower than one


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


@pytest.fixture
def poison_empty(monkeypatch):
    """An element that a kernel does not write stays NaN and fails the comparison."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (torch, "empty_strided")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
