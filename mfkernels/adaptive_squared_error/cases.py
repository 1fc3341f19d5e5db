"""What `python -m mfkernels.check` runs of adaptive_squared_error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..check.case import NOISE, Calls, Case, Inputs, OpCases, random
from ..testing import relative_error
from .op import adaptive_squared_error

ERROR_EPS = 0.01  # of the weight of a squared error
# NOISE of (e + ε)^(−p), in the kernel exp(−p log(e + ε)): an exponent up to 7 (e <= 1e4, p = 0.75), rounded twice.
NOISE_POWER = 8.0


def error_terms(
    u: Tensor, v: Tensor, correction: Tensor, interval: Tensor, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Weighted and plain squared error per sample, in float32 or better, as the op has them."""
    wide = torch.promote_types(u.dtype, torch.float32)
    correction = torch.cat((correction, torch.zeros_like(u[len(correction) :])))  # [B, …]
    interval = interval.to(wide).view(-1, *[1] * (u.ndim - 1))  # [B, 1, …]
    target = (v.to(wide) - interval * correction.to(wide)).detach()  # [B, …]
    squared_error = (u.to(wide) - target).square().flatten(1).sum(1)  # [B]
    return squared_error / (squared_error.detach() + eps) ** p, squared_error.detach()


class ErrorCase(Case):
    """The error has no Dual: `rows` have a correction, and u alone has a gradient. Both functions have two outputs."""

    def errors(self, rows: int, dtype: torch.dtype, device: torch.device, *, plain: bool) -> dict[str, float]:
        low = {name: x.to(device, dtype) for name, x in self.inputs().items()}
        low["correction"] = low["correction"][:rows]
        high = {name: x.cpu().double() for name, x in low.items()}
        for inputs in (low, high):
            inputs["u"].requires_grad_()
        error, squared_error = (self.formula if plain else self.ours)(**low)
        expected, expected_squared_error = self.formula(**high)
        cotangent = torch.randn(error.shape, generator=torch.Generator().manual_seed(1))  # [B]
        (du,) = torch.autograd.grad(error, low["u"], cotangent.to(error.device, error.dtype))
        (expected_du,) = torch.autograd.grad(expected, high["u"], cotangent.double())
        return {
            "primal": relative_error(error, expected),
            "squared error": relative_error(squared_error, expected_squared_error),
            "d_u": relative_error(du, expected_du),
        }

    def calls(self, dtype: torch.dtype, device: torch.device) -> Calls:
        """The error, all rows with corrections, and the error with its backward."""
        inputs = {name: x.to(dtype) for name, x in self.inputs(device).items()}
        u = inputs["u"].clone().requires_grad_()

        def forward(fn: Callable[..., Any]) -> Callable[[], object]:
            return lambda: fn(**inputs)

        def backward(fn: Callable[..., Any]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(fn(**{**inputs, "u": u})[0].sum(), u)

        return Calls(forward(self.ours), backward(self.ours), forward(self.formula), backward(self.formula))


def make(B: int, C: int, height: int, width: int, p: float = 1.0) -> Case:
    def inputs(generator: torch.Generator) -> Inputs:
        u, correction, v = random(generator, 3, B, C, height, width)  # [B, C, H, W]
        interval = random(generator, B).sigmoid()  # [B]
        return {"u": u, "v": v, "correction": correction, "interval": interval}

    return ErrorCase(
        f"B={B} C={C} H={height} W={width} p={p:g}",
        inputs,
        ["u"],
        lambda **xs: adaptive_squared_error(**xs, p=p, eps=ERROR_EPS),
        lambda **xs: error_terms(**xs, p=p, eps=ERROR_EPS),
        noise=NOISE if p == 1 else NOISE_POWER,
    )


CASES = {
    "adaptive_squared_error": OpCases(
        make,
        small=[make(3, 4, 9, 11), make(2, 1, 1, 1, p=0.75)],
        large=[make(5, 3, 32, 32, p=0.75)],
        timed=(make(2, 4, 16, 16), make(32, 4, 32, 32)),
    )
}
