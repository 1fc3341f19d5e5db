"""For tests that run alike on the reference and on the Triton kernels (interpreted where there is no GPU)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mfkernels import use_backend
from mfkernels.testing import assert_dual

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {
    "reference": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}


def float32(inputs):
    """The inputs of an op, in float32 on the tests' device."""
    return {name: a.to(DEVICE, torch.float32) for name, a in inputs.items()}


class Case(NamedTuple):
    dtype: torch.dtype
    bound: Any  # a number, or several for tests that make several comparisons

    def check(
        self,
        op: Callable[..., object],
        oracle: Callable[..., Tensor],
        inputs: Mapping[str, Tensor],
        duals: Iterable[str],
    ) -> None:
        """`assert_dual` in this dtype, within this bound: primal, tangent, gradients; rows none, some and all."""
        assert_dual(op, oracle, inputs, duals=duals, dtype=self.dtype, bound=self.bound, device=DEVICE)


def cases(**bounds):
    """A fixture: a `Case` on each backend in turn; `bounds` in the order of DTYPES, or by dtype.

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
            yield Case(dtype, bound)

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
