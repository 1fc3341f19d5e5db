"""Check a dual op against a float64 oracle: primal, tangent and every gradient, tangent rows none, some and all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .dual import Dual


def relative_error(out: Tensor, ref: Tensor, floor: float = torch.finfo(torch.float64).tiny) -> float:
    """‖out − ref‖ / max(‖ref‖, floor) in float64; NaN anywhere gives infinity."""
    out64, ref64 = out.detach().double().cpu(), ref.detach().double().cpu()
    if out64.shape != ref64.shape:
        raise AssertionError(f"shape {tuple(out64.shape)} instead of {tuple(ref64.shape)}")
    error = ((out64 - ref64).norm() / ref64.norm().clamp_min(floor)).item()
    return error if error == error else float("inf")


def dual_errors(
    op: Callable[..., object],
    oracle: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    *,
    duals: Iterable[str],
    rows: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0x7A6E,
) -> dict[str, float]:
    """Relative errors of `op` on Duals in `dtype` against `oracle` in float64.

    Args:
        op: called with the inputs by keyword; those named in `duals` are Duals with `rows` tangent rows.
        oracle: the same function of plain float64 tensors, written independently; differentiated by `torch.func.jvp`
            and by autograd.
        inputs: float64 tensors by name; rounded to `dtype` first, so both sides see the same numbers. Their strides
            are kept.
        duals: names of the inputs that carry tangents; their first dimension is the batch.
        rows: tangent rows.
        dtype, device: what `op` runs in.
        seed: of the tangents and the cotangent; another one than the inputs', or they would be equal.

    Returns:
        Errors by name: "primal", "tangent", and "d_<name>" for the gradient of each input.

    Raises:
        AssertionError: a tangent requires grad, or its shape is wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    duals = list(duals)

    def rounded(x: Tensor) -> Tensor:
        # `.to` would close the gaps between the rows of a view
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)

    low = {name: rounded(x).requires_grad_() for name, x in inputs.items()}
    high = {name: x.detach().cpu().double().requires_grad_() for name, x in low.items()}
    tangents = {
        name: torch.randn(inputs[name].shape, generator=generator, dtype=torch.float64).to(dtype) for name in duals
    }
    args: dict[str, object] = dict(low)
    for name in duals:
        args[name] = Dual(low[name], tangents[name][:rows].to(device))
    out = op(**args)
    assert isinstance(out, Dual), f"expected a Dual, got {type(out).__name__}"
    assert out.tangent is not None, "the tangent is missing"
    assert not out.tangent.requires_grad, "a tangent must not require grad"
    assert out.tangent.shape == (rows, *out.primal.shape[1:]), f"tangent of shape {tuple(out.tangent.shape)}"
    assert out.tangent.dtype == out.primal.dtype

    # rows beyond `rows` have tangent zero
    full = tuple(torch.cat((tangents[n][:rows], torch.zeros_like(tangents[n][rows:]))).double() for n in duals)
    with torch.no_grad():
        tangent = torch.func.jvp(
            lambda *xs: oracle(**{**high, **dict(zip(duals, xs, strict=True))}), tuple(high[n] for n in duals), full
        )[1]
    primal = oracle(**high)
    cotangent = torch.randn(primal.shape, generator=generator, dtype=torch.float64)
    errors = {"primal": relative_error(out.primal, primal), "tangent": 0.0}
    if rows:
        errors["tangent"] = relative_error(out.tangent, tangent[:rows], floor=1e-3 * primal[:rows].norm().item())
    ours = torch.autograd.grad(out.primal, list(low.values()), cotangent.to(out.primal.dtype).to(device))
    theirs = torch.autograd.grad(primal, list(high.values()), cotangent.to(out.primal.dtype).double())
    for name, g, g_ref in zip(inputs, ours, theirs, strict=True):
        # the floor serves gradients that are zero in exact arithmetic (a softmax over one key)
        errors[f"d_{name}"] = relative_error(g, g_ref, floor=0.1 * cotangent.norm().item())
    return errors


def assert_dual(
    op: Callable[..., object],
    oracle: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    *,
    duals: Iterable[str],
    dtype: torch.dtype,
    bound: float,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """`dual_errors` with no, some and all rows carrying tangents; every error must be within `bound`.

    Returns:
        The largest error by name.
    """
    duals = list(duals)
    batch = inputs[duals[0]].shape[0]
    worst: dict[str, float] = {}
    for rows in sorted({0, batch // 2, batch}):
        errors = dual_errors(op, oracle, inputs, duals=duals, rows=rows, dtype=dtype, device=device)
        for name, error in errors.items():
            worst[name] = max(worst.get(name, 0.0), error)
            assert error <= bound, f"{name}, {rows} of {batch} tangent rows: error {error:.2e} > {bound:.2e}"
    return worst
