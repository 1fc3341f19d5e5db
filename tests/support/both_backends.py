"""For tests that run alike on the reference and on the Triton kernels (interpreted where there is no GPU)."""

from collections.abc import Mapping

import pytest
import torch

from mfkernels import use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {
    "reference": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}


def cases(**bounds):
    """A fixture: (dtype, bound) on each backend in turn; `bounds` in the order of DTYPES, or by dtype.

    The interpreter cuts bfloat16 off where a GPU rounds it, so the kernels' errors are twice the reference's there.
    """
    params = [
        (name, *case)
        for name, of in bounds.items()
        for case in (of.items() if isinstance(of, Mapping) else zip(DTYPES[name], of, strict=True))
    ]

    @pytest.fixture(params=params, ids=[f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype, _ in params])
    def case(request, poison_empty):
        name, dtype, bound = request.param
        if name == "triton":
            pytest.importorskip("triton", minversion="3.4")
        with use_backend(name):
            yield dtype, bound

    return case


def both():
    """A fixture: each backend in turn, with new tensors on its device."""

    @pytest.fixture(params=DTYPES)
    def backend(request, poison_empty):
        if request.param == "triton":
            pytest.importorskip("triton", minversion="3.4")
        with use_backend(request.param), torch.device(DEVICE):
            yield request.param

    return backend
