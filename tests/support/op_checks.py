"""What every Triton op's tests ask of its public function beside accuracy; each function is one such demand."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from mfkernels import Dual
from mfkernels.dual import primal_of, tangent_of
from mfkernels.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
) -> None:
    """Plain tensors under torch.func.jvp and forward_ad, eager and compiled: value, tangent and gradients.

    `op` and `oracle` take the inputs by keyword; float32 and float64 respectively.
    """
    low = {name: x.to(DEVICE, torch.float32).requires_grad_() for name, x in inputs.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    tangents = tuple(torch.randn_like(low[name].detach()) for name in duals)

    def by_position(fn, all_inputs):
        return lambda *xs: fn(**{**all_inputs, **dict(zip(duals, xs, strict=True))})

    ref, ref_dot = torch.func.jvp(
        by_position(oracle, wide), tuple(wide[n] for n in duals), tuple(t.double() for t in tangents)
    )
    ref_grads = torch.autograd.grad(ref.square().sum(), list(wide.values()))
    torch.compiler.reset()  # it counts recompilations of `run` over all the tests that come here
    for transform in (torch.func.jvp, forward_ad):

        def run(*primals, transform=transform):
            return transform(by_position(op, low), primals, tangents)

        for fn in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            out, out_dot = fn(*(low[n] for n in duals))
            assert relative_error(out, ref) <= bound
            assert relative_error(out_dot, ref_dot) <= bound
            for g, g_ref in zip(torch.autograd.grad(out.square().sum(), list(low.values())), ref_grads, strict=True):
                assert relative_error(g, g_ref) <= 3 * bound  # the cotangent 2·out is rounded as well


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
