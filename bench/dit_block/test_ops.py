"""The elementwise and norm ops of a DiT block (output, tangent; backward) next to PyTorch, eager and compiled.

All of them are bound by memory. GB/s counts what has to move: each input and output once, in the storage dtype; the
per-sample vectors are left out. With A = bytes of one (B, N, D) operand and s = share of tangent rows:

    ada_layer_norm                 2A (1 + s)     backward 3A     (dh, x in; dx out)
    gated_residual                 3A (1 + s)     backward 3A     (dout, y in; dy out; dx is dout itself)
    gated_residual_ada_layer_norm  4A (1 + s)     backward 6A     (dh, dx_new, x_new, y in; dx, dy out)
    gelu (bias, between an MLP's products; A is that of the hidden width)
                                   2A (1 + s)     backward 4A     (da, h in; dh and a, which was not kept, out)
    adaptive_squared_error         A (3 + s)      backward 2A     (u, v, correction in, error out; that in, du out)

The ceiling is a large copy, timed in the same process. One row is one way at one size: it is compared with float64
first, and one that disagrees is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from measure import INTERPRETED, REHEARSAL, copy_bytes, measured, torch_compile
from torch import Tensor

from mfkernels import (
    Dual,
    ada_layer_norm,
    adaptive_squared_error,
    gated_residual,
    gated_residual_ada_layer_norm,
    use_backend,
)
from mfkernels.testing import relative_error

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 1e-2 if GPU else 1e-5
TOKENS = (256, 256) if GPU else (4, 5) if REHEARSAL else (4, 32)  # B, N
WIDTHS = (768, 1152, 2730) if GPU else (40,) if REHEARSAL else (96,)
ROUNDS = 1 if REHEARSAL else 3


def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def update(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def both(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x = update(x, y, gate)
    return x, norm(x, shift, scale)


@dataclass(frozen=True)
class Op:
    """An op and the same function in ordinary PyTorch; passes over one (B, N, D) operand, forward and backward."""

    ours: Callable[..., object]
    plain: Callable[..., object]
    streams: int
    vectors: int
    forward_passes: int
    backward_passes: int


OPS = {
    "ada_layer_norm": Op(ada_layer_norm, norm, 1, 2, 2, 3),
    "gated_residual": Op(gated_residual, update, 2, 1, 3, 3),
    "gated_residual_ada_layer_norm": Op(gated_residual_ada_layer_norm, both, 2, 3, 4, 6),
}
every_case = pytest.mark.parametrize(("name", "D"), [(name, D) for name in OPS for D in WIDTHS])
OURS, QUARTER, PRIMAL = "this library, every row", "this library, 25 % of rows", "this library, no tangent"
REFERENCE = "reference backend, every row"
EAGER_JVP, COMPILED_JVP = "eager torch.func.jvp", "compiled torch.func.jvp"


def inputs(op: Op, D: int, device: torch.device) -> tuple[Tensor, ...]:
    B, N = TOKENS
    streams = [torch.randn(B, N, D, device=device, dtype=DTYPE) for _ in range(op.streams)]
    return *streams, *torch.randn(B, 6 * D, device=device, dtype=DTYPE).chunk(6, dim=1)[: op.vectors]


def flat(out: object) -> list[Tensor]:
    """Primals, then tangents, of a result."""
    outs = [out] if isinstance(out, (Dual, Tensor)) else list(out)
    if not isinstance(outs[0], Dual):
        return [x for part in outs for x in ([part] if isinstance(part, Tensor) else flat(part))]
    return [x.primal for x in outs] + [x.tangent for x in outs if x.tangent is not None]


@every_case
@pytest.mark.parametrize("way", [OURS, QUARTER, PRIMAL, COMPILED_JVP, "compiled, no tangent", EAGER_JVP, REFERENCE])
def test_forward(way, name, D, device, figures):
    op, B = OPS[name], TOKENS[0]
    primals = inputs(op, D, device)
    dots = inputs(op, D, device)  # in the layout of the primals, or compiled forward mode fails inside PyTorch (2.13)

    def ours(rows: int) -> object:
        return op.ours(*(Dual(x, t[:rows]) for x, t in zip(primals, dots, strict=True)))

    def on_reference() -> object:
        with use_backend("reference"):
            return ours(B)

    def jvp(*a: Tensor) -> object:
        return torch.func.jvp(op.plain, a[: len(primals)], a[len(primals) :])

    torch.compiler.reset()
    compiled, compiled_plain = (torch_compile(fn) for fn in (jvp, op.plain))
    moved = op.forward_passes * primals[0].nbytes
    ways = {
        OURS: (lambda: ours(B), 2 * moved),
        QUARTER: (lambda: ours(B // 4), moved * (1 + (B // 4) / B)),
        PRIMAL: (lambda: op.ours(*primals), moved),
        REFERENCE: (on_reference, 2 * moved),
        EAGER_JVP: (lambda: jvp(*primals, *dots), 2 * moved),
        COMPILED_JVP: (lambda: compiled(*primals, *dots), 2 * moved),
        "compiled, no tangent": (lambda: compiled_plain(*primals), moved),
    }
    wanted = flat(jvp(*(x.double() for x in (*primals, *dots))))
    for got, want in zip(flat(ways[way][0]()), wanted, strict=False):  # primals first, then tangents where there are
        check(got, want[: len(got)])
    report(figures, f"{name} forward, {DTYPE}", primals[0].shape, way, ways)


@every_case
@pytest.mark.parametrize("way", ["this library", "compiled PyTorch", "eager PyTorch"])
def test_backward(way, name, D, device, figures):
    op = OPS[name]
    leaves = [x.detach().requires_grad_() for x in inputs(op, D, device)]
    cotangents = [torch.randn_like(x) for x in flat(op.plain(*(x.detach() for x in leaves)))]

    def backward_of(forward: Callable[..., object]) -> Callable[[], object]:
        outs = flat(forward(*leaves))
        return lambda: torch.autograd.grad(outs, leaves, cotangents, retain_graph=True)

    torch.compiler.reset()
    ways = {
        "this library": op.ours,
        "eager PyTorch": op.plain,
        "compiled PyTorch": torch_compile(op.plain),
    }
    steps = {name: backward_of(ways[name]) for name in dict.fromkeys(("this library", way))}
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted = torch.autograd.grad(flat(op.plain(*wide)), wide, [c.double() for c in cotangents])
    for got, want in zip(steps[way](), wanted, strict=True):
        check(got, want)
    moved = op.backward_passes * leaves[0].nbytes
    report(figures, f"{name} backward, {DTYPE}", leaves[0].shape, way, {n: (fn, moved) for n, fn in steps.items()})


HIDDEN = [50] if REHEARSAL else [4 * D for D in WIDTHS if D % 8 == 0] + [2730]
only_kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="the Triton kernel alone, which needs a GPU")


@only_kernels
@pytest.mark.parametrize("H", HIDDEN)
@pytest.mark.parametrize("way", [OURS, QUARTER, PRIMAL, COMPILED_JVP, EAGER_JVP])
def test_gelu_forward(way, H, device, figures):
    from mfkernels.mlp.kernels import gelu_forward

    h, h_dot, _, bias = hidden(H, device)

    def plain(h: Tensor) -> Tensor:
        return F.gelu(h + bias, approximate="tanh")

    def jvp(h: Tensor, h_dot: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(plain, (h,), (h_dot,))

    torch.compiler.reset()
    compiled = torch_compile(jvp)
    quarter = h_dot[: len(h) // 4]
    ways = {
        OURS: (lambda: gelu_forward(h, bias, h_dot), 4 * h.nbytes),
        QUARTER: (lambda: gelu_forward(h, bias, quarter), 2.5 * h.nbytes),
        PRIMAL: (lambda: gelu_forward(h, bias, None), 2 * h.nbytes),
        COMPILED_JVP: (lambda: compiled(h, h_dot), 4 * h.nbytes),
        EAGER_JVP: (lambda: jvp(h, h_dot), 4 * h.nbytes),
    }
    few = slice(0, 4096)
    wide = h[few].double() + bias.double()
    wanted = torch.func.jvp(lambda h: F.gelu(h, approximate="tanh"), (wide,), (h_dot[few].double(),))
    for got, want in zip(ways[way][0](), wanted, strict=True):
        if got is not None:
            check(got[few], want[: len(got)])
    report(figures, f"gelu forward, {DTYPE}", h.shape, way, ways)


@only_kernels
@pytest.mark.parametrize("H", HIDDEN)
@pytest.mark.parametrize("way", ["this library", "compiled PyTorch, a kept", "eager PyTorch, a kept"])
def test_gelu_backward(way, H, device, figures):
    from mfkernels.mlp.kernels import gelu_backward

    h, _, da, bias = hidden(H, device)

    def backward(h: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
        dh = torch.ops.aten.gelu_backward(da, h + bias, approximate="tanh")
        return dh, dh.sum(0)

    torch.compiler.reset()
    compiled = torch_compile(backward)
    ways = {
        "this library": (lambda: gelu_backward(h, bias, da)[1:], 4 * h.nbytes),
        "eager PyTorch, a kept": (lambda: backward(h, da), 3 * h.nbytes),
        "compiled PyTorch, a kept": (lambda: compiled(h, da), 3 * h.nbytes),
    }
    dh, dbias = ways[way][0]()
    few = slice(0, 4096)
    wide = h[few].double() + bias.double()
    check(dh[few], torch.ops.aten.gelu_backward(da[few].double(), wide, approximate="tanh"))
    check(dbias, dh.double().sum(0))
    report(figures, f"gelu backward, {DTYPE}", h.shape, way, ways)


def hidden(H: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, h_dot and da [B·N, H], and a bias [H]."""
    B, N = TOKENS
    h, h_dot, da = torch.randn(3, B * N, H, device=device, dtype=DTYPE)
    return h, h_dot, da, torch.randn(H, device=device, dtype=DTYPE)


@pytest.mark.parametrize("shape", [(1024, 4, 32, 32), (32, 3, 256, 256)] if GPU else [(8, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("way", ["this library", "compiled PyTorch", "eager PyTorch"])
def test_adaptive_squared_error(way, shape, device, figures):
    u, v, correction = torch.randn(3, *shape, device=device, dtype=DTYPE)
    rows = shape[0] // 4
    correction, interval = correction[:rows], torch.rand(rows, device=device)
    u.requires_grad_()

    def plain(u: Tensor, v: Tensor, correction: Tensor, interval: Tensor) -> Tensor:
        target = v.float()
        target = torch.cat([target[:rows] - interval.view(-1, 1, 1, 1) * correction.float(), target[rows:]])
        e = (u.float() - target).square().flatten(1).sum(1)
        return e / (e.detach() + 0.01)

    def ours(*inputs: Tensor) -> Tensor:
        return adaptive_squared_error(*inputs).per_sample

    torch.compiler.reset()
    ways = {"this library": ours, "compiled PyTorch": torch_compile(plain), "eager PyTorch": plain}
    inputs = (u, v, correction, interval)
    wide = [a.detach().double() for a in inputs]
    wide[0].requires_grad_()
    target = torch.cat([wide[1][:rows] - wide[3].view(-1, 1, 1, 1) * wide[2], wide[1][rows:]])
    e = (wide[0] - target).square().flatten(1).sum(1)
    wanted = e / (e.detach() + 0.01)
    (wanted_du,) = torch.autograd.grad(wanted.sum(), wide[0])
    loss = ways[way](*inputs)
    check(loss, wanted)
    check(torch.autograd.grad(loss.sum(), u)[0], wanted_du)
    moved = (5 + 0.25) * u.nbytes
    steps = {name: (lambda fn=fn: torch.autograd.grad(fn(*inputs).sum(), u), moved) for name, fn in ways.items()}
    report(figures, f"adaptive_squared_error forward and backward, {DTYPE}", shape, way, steps)


def check(got: Tensor, wanted: Tensor) -> None:
    error = relative_error(got, wanted)
    assert error < TOLERANCE, f"wrong by {error:.1e}, so it is not timed"


def report(
    figures, table: str, size: Sequence[int], way: str, ways: dict[str, tuple[Callable[[], object], float]]
) -> None:
    """Time `way` next to the first of `ways`."""
    fn, moved = ways[way]
    taken = measured(fn, next(iter(ways.values()))[0], rounds=ROUNDS)
    figures.append(
        {
            "table": table,
            "operand": "×".join(map(str, size)),
            "way": way,
            "ms": 1e3 * taken.seconds,
            "GB/s": moved / taken.seconds / 1e9,
            "of copy": moved / taken.seconds / copy_bytes(),
            "× this library": taken.ratio,
            "latency ms": 1e3 * taken.latency,
            "timed by": taken.how,
        }
    )
