"""What every Triton op's tests ask of its public function beside accuracy; each function is one such demand."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from both_backends import DEVICE
from torch import Tensor

from mfkernels import Dual
from mfkernels.dual import primal_of, tangent_of
from mfkernels.testing import relative_error


def forward_ad(fn, primals, tangents):
    """`torch.func.jvp` by the other of PyTorch's two interfaces."""
    with fwAD.dual_level():
        return tuple(fwAD.unpack_dual(fn(*(fwAD.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)))))


def assert_forward_mode(
    op: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    duals: Sequence[str],
    bound: float,
    gradient_bound: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Plain tensors under torch.func.jvp and forward_ad, eager and compiled: value, tangent and gradients.

    `op` and `oracle` take the inputs by keyword, in `dtype` and in float64. `gradient_bound` is by default three times
    `bound`: the cotangent, twice the value, is rounded as well.
    """
    low = {name: x.to(DEVICE, dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    tangents = tuple(torch.randn_like(low[name].detach()) for name in duals)

    def by_position(fn, all_inputs):
        return lambda *xs: fn(**{**all_inputs, **dict(zip(duals, xs, strict=True))})

    ref, ref_dot = torch.func.jvp(
        by_position(oracle, wide), tuple(wide[n] for n in duals), tuple(t.double() for t in tangents)
    )
    ref_grads = torch.autograd.grad(ref.square().sum(), list(wide.values()))
    torch.compiler.reset()  # it counts recompilations of `run` over all the tests that come here
    # eager first: where torch.compile is skipped, that much has been compared
    for compiled, transform in itertools.product((False, True), (torch.func.jvp, forward_ad)):

        def run(*primals, transform=transform):
            return transform(by_position(op, low), primals, tangents)

        fn = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        out, out_dot = fn(*(low[n] for n in duals))
        assert relative_error(out, ref) <= bound
        assert relative_error(out_dot, ref_dot) <= bound
        for g, g_ref in zip(torch.autograd.grad(out.square().sum(), list(low.values())), ref_grads, strict=True):
            assert relative_error(g, g_ref) <= (gradient_bound or 3 * bound)


def assert_tangents_of_different_rows(
    op: Callable[..., Dual],
    oracle: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    rows: Mapping[str, int],
    dtype: torch.dtype,
    bound: float,
) -> None:
    """The inputs named in `rows` carry as many tangent rows each; the result carries the most, the others are zero."""
    low = {name: x.to(DEVICE, dtype) for name, x in inputs.items()}
    wide = {name: x.double() for name, x in low.items()}
    tangents = {name: torch.randn_like(low[name]) for name in rows}
    out = op(**{name: Dual(x, tangents[name][: rows[name]]) if name in rows else x for name, x in low.items()})
    for name, n in rows.items():
        tangents[name][n:] = 0

    def of_duals(*xs: Tensor) -> Tensor:
        return oracle(**{**wide, **dict(zip(rows, xs, strict=True))})

    _, ref = torch.func.jvp(of_duals, tuple(wide[n] for n in rows), tuple(x.double() for x in tangents.values()))
    assert out.tangent is not None
    assert relative_error(out.tangent, ref[: max(rows.values())]) <= bound


def assert_compiles(op: Callable[..., object], inputs: Sequence[Dual | Tensor]) -> None:
    """One graph on Duals; values, tangents and gradients are those of the eager op, bit for bit."""
    results = []
    for fn in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
        leaves = [primal_of(x).detach().requires_grad_() for x in inputs]
        args = [Dual(p, tangent_of(x)) if isinstance(x, Dual) else p for p, x in zip(leaves, inputs, strict=True)]
        out = fn(*args)
        outs = [out] if isinstance(out, Dual) else list(out)
        loss = sum((o.primal * torch.linspace(0.5, 1.5, o.shape[-1], device=DEVICE)).sum() for o in outs)
        grads = torch.autograd.grad(loss, leaves)
        results.append([a for o in outs for a in (o.primal, o.tangent)] + list(grads))
    for eager, compiled in zip(*results, strict=True):
        assert eager.abs().sum() > 0
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def assert_no_gradient_through_the_tangent(
    name: str, op: Callable[..., object], inputs: Mapping[str, Tensor], duals: Sequence[str]
) -> None:
    """A loss that reads a forward-mode tangent raises in its backward; one that reads the value alone does not.

    `name` is what the error calls the op; of several results, the last one is read.
    """
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    primals = tuple(leaves[n] for n in duals)

    def run(*xs: Tensor) -> Tensor:
        out = op(**{**leaves, **dict(zip(duals, xs, strict=True))})
        return out if isinstance(out, Tensor) else out[-1]

    for reads_tangent in (True, False):
        out, out_dot = torch.func.jvp(run, primals, tuple(torch.randn_like(p.detach()) for p in primals))
        if reads_tangent:
            with pytest.raises(
                RuntimeError, match=f"{name}: a gradient was asked for through its forward-mode tangent"
            ):
                (out.sum() + out_dot.sum()).backward()
        else:
            out.sum().backward()
