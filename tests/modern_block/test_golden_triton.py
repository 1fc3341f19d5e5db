"""The improved MeanFlow authors' values, as in test_golden_imf.py, with every op that has a Triton kernel on it."""

import pytest
import torch
from test_golden_imf import data, net, test_objective_and_gradients, test_samples

from mfkernels import use_backend
from mfkernels.backend import recorded_choices

pytest.importorskip("triton", minversion="3.4")

__all__ = ["data", "net", "test_objective_and_gradients", "test_samples"]  # collected here as well


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _triton(poison_empty):
    with use_backend("triton"), recorded_choices() as chosen:
        yield
    assert {op for op, backend in chosen.items() if backend == "triton"} >= {
        "attention",
        "rms_norm",
        "qk_norm_rotary",
        "swiglu",
        "layer_scale_residual",
    }
