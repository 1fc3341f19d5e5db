"""The elementwise and norm ops of a DiT block (output, tangent; backward) next to PyTorch, eager and compiled.

All of them are bound by memory. GB/s counts what has to move: each input and output once, in the storage dtype; the
per-sample vectors are left out. With A = bytes of one (B, N, D) operand and s = share of tangent rows:

    ada_layer_norm                 2A (1 + s)     backward 3A     (dh, x in; dx out)
    gated_residual                 3A (1 + s)     backward 3A     (dout, y in; dy out; dx is dout itself)
    gated_residual_ada_layer_norm  4A (1 + s)     backward 6A     (dh, dx_new, x_new, y in; dx, dy out)
    gelu (bias, between an MLP's products; A is that of the hidden width)
                                   2A (1 + s)     backward 4A     (da, h in; dh and a, which was not kept, out)
    meanflow_loss                  A (3 + s)      backward 2A     (u, v, du_dt in, u − u_tgt out; that in, du out)

The ceiling is a large copy, timed in the same process. A contender that disagrees with float64 is not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from measure import copy_bytes, interleaved_seconds, median_ratio
from torch import Tensor

from mfkernels import (
    Dual,
    ada_layer_norm,
    gated_residual,
    gated_residual_ada_layer_norm,
    meanflow_loss,
    use_backend,
)
from mfkernels.testing import relative_error

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 1e-2 if GPU else 1e-5
TOKENS = (256, 256) if GPU else (4, 32)  # B, N
WIDTHS = (768, 1152, 2730) if GPU else (96,)
ROUNDS = 20 if GPU else 3


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
def test_forward(name, D, device, figures, benchmark):
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

    torch._dynamo.reset()
    compiled, compiled_plain = (torch.compile(fn, dynamic=False) for fn in (jvp, op.plain))
    moved = op.forward_passes * primals[0].nbytes
    ways = {
        "this library, every row": (lambda: ours(B), 2 * moved),
        "this library, 25 % of rows": (lambda: ours(B // 4), moved * (1 + (B // 4) / B)),
        "this library, no tangent": (lambda: op.ours(*primals), moved),
        "reference backend, every row": (on_reference, 2 * moved),
        "eager torch.func.jvp": (lambda: jvp(*primals, *dots), 2 * moved),
        "compiled torch.func.jvp": (lambda: compiled(*primals, *dots), 2 * moved),
        "compiled, no tangent": (lambda: compiled_plain(*primals), moved),
    }
    wide = [x.double() for x in (*primals, *dots)]
    wanted = flat(jvp(*wide))
    for way in ("this library, every row", "reference backend, every row", "compiled torch.func.jvp"):
        for got, want in zip(flat(ways[way][0]()), wanted, strict=True):
            assert relative_error(got, want) < TOLERANCE, f"{way} is wrong: no figure"
    report(figures, f"{name} forward, {DTYPE}", primals[0].shape, ways)
    benchmark.pedantic(ways["this library, every row"][0], rounds=3)


@every_case
def test_backward(name, D, device, figures, benchmark):
    op = OPS[name]
    leaves = [x.detach().requires_grad_() for x in inputs(op, D, device)]
    cotangents = [torch.randn_like(x) for x in flat(op.plain(*(x.detach() for x in leaves)))]

    def backward_of(forward: Callable[..., object]) -> Callable[[], object]:
        outs = flat(forward(*leaves))
        return lambda: torch.autograd.grad(outs, leaves, cotangents, retain_graph=True)

    torch._dynamo.reset()
    ways = {
        "this library": backward_of(op.ours),
        "eager PyTorch": backward_of(op.plain),
        "compiled PyTorch": backward_of(torch.compile(op.plain, dynamic=False)),
    }
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted = torch.autograd.grad(flat(op.plain(*wide)), wide, [c.double() for c in cotangents])
    for got, want in zip(ways["this library"](), wanted, strict=True):
        assert relative_error(got, want) < TOLERANCE, "this library is wrong: no figure"
    moved = op.backward_passes * leaves[0].nbytes
    report(figures, f"{name} backward, {DTYPE}", leaves[0].shape, {way: (fn, moved) for way, fn in ways.items()})
    benchmark.pedantic(ways["this library"], rounds=3)


@pytest.mark.skipif(not GPU, reason="the Triton kernel alone")
@pytest.mark.parametrize("H", [4 * D for D in WIDTHS if D % 8 == 0] + [2730])
def test_gelu(H, device, figures, benchmark):
    from mfkernels.mlp.kernels import gelu_backward, gelu_forward

    B, N = TOKENS
    h, h_dot, da = torch.randn(3, B * N, H, device=device, dtype=DTYPE)
    bias = torch.randn(H, device=device, dtype=DTYPE)

    def plain(h: Tensor) -> Tensor:
        return F.gelu(h + bias, approximate="tanh")

    def backward(h: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
        dh = torch.ops.aten.gelu_backward(da, h + bias, approximate="tanh")
        return dh, dh.sum(0)

    def jvp(h: Tensor, h_dot: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(plain, (h,), (h_dot,))

    torch._dynamo.reset()
    compiled, compiled_backward = (torch.compile(fn, dynamic=False) for fn in (jvp, backward))
    quarter = h_dot[: B * N // 4]
    ways = {
        "this library, every row": (lambda: gelu_forward(h, bias, h_dot), 4 * h.nbytes),
        "this library, 25 % of rows": (lambda: gelu_forward(h, bias, quarter), 2.5 * h.nbytes),
        "this library, no tangent": (lambda: gelu_forward(h, bias, None), 2 * h.nbytes),
        "compiled torch.func.jvp": (lambda: compiled(h, h_dot), 4 * h.nbytes),
        "eager torch.func.jvp": (lambda: jvp(h, h_dot), 4 * h.nbytes),
    }
    rows = slice(0, 4096)
    wide = h[rows].double() + bias.double()
    wanted = torch.func.jvp(lambda h: F.gelu(h, approximate="tanh"), (wide,), (h_dot[rows].double(),))
    for got, want in zip(gelu_forward(h, bias, h_dot), wanted, strict=True):
        assert relative_error(got[rows], want) < TOLERANCE, "this library is wrong: no figure"
    report(figures, f"gelu forward, {DTYPE}", h.shape, ways)

    _, dh, dbias = gelu_backward(h, bias, da)
    assert relative_error(dbias, dh.double().sum(0)) < TOLERANCE, "this library is wrong: no figure"
    wanted_dh = torch.ops.aten.gelu_backward(da[rows].double(), wide, approximate="tanh")
    assert relative_error(dh[rows], wanted_dh) < TOLERANCE, "this library is wrong: no figure"
    ways = {
        "this library": (lambda: gelu_backward(h, bias, da), 4 * h.nbytes),
        "eager PyTorch, a kept": (lambda: backward(h, da), 3 * h.nbytes),
        "compiled PyTorch, a kept": (lambda: compiled_backward(h, da), 3 * h.nbytes),
    }
    report(figures, f"gelu backward, {DTYPE}", h.shape, ways)
    benchmark.pedantic(ways["this library"][0], rounds=3)


@pytest.mark.parametrize("shape", [(1024, 4, 32, 32), (32, 3, 256, 256)] if GPU else [(8, 4, 8, 8)], ids=str)
def test_meanflow_loss(shape, device, figures, benchmark):
    u, v, du = torch.randn(3, *shape, device=device, dtype=DTYPE)
    t = torch.rand(shape[0], device=device)
    r, du = t * torch.rand_like(t), du[: shape[0] // 4]
    u.requires_grad_()

    def plain(u: Tensor, du: Tensor, v: Tensor, t: Tensor, r: Tensor) -> Tensor:
        target = v.float()
        interval = (t - r).view(-1, 1, 1, 1)
        target = torch.cat([target[: len(du)] - interval[: len(du)] * du.float(), target[len(du) :]])
        e = (u.float() - target).square().flatten(1).sum(1)
        return e / (e.detach() + 0.01)

    def ours(u: Tensor, du: Tensor, v: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return meanflow_loss(u, du, v, t, r).per_sample

    torch._dynamo.reset()
    ways = {"this library": ours, "eager PyTorch": plain, "compiled PyTorch": torch.compile(plain, dynamic=False)}
    inputs = (u, du, v, t, r)
    wide = [a.detach().double() for a in inputs]
    wide[0].requires_grad_()
    interval = (wide[3] - wide[4]).view(-1, 1, 1, 1)
    target = torch.cat([wide[2][: len(du)] - interval[: len(du)] * wide[1], wide[2][len(du) :]])
    e = (wide[0] - target).square().flatten(1).sum(1)
    wanted = e / (e.detach() + 0.01)
    (wanted_du,) = torch.autograd.grad(wanted.sum(), wide[0])
    steps = {}
    for name, way in ways.items():
        loss = way(*inputs)
        (got,) = torch.autograd.grad(loss.sum(), u)
        assert relative_error(loss, wanted) < TOLERANCE, f"{name} is wrong: no figure"
        assert relative_error(got, wanted_du) < TOLERANCE, f"{name} is wrong: no figure"
        steps[name] = (lambda way=way: torch.autograd.grad(way(*inputs).sum(), u), (5 + 0.25) * u.nbytes)
    report(figures, f"meanflow_loss forward and backward, {DTYPE}", shape, steps)
    benchmark.pedantic(steps["this library"][0], rounds=3)


def report(
    figures: list[dict], table: str, size: Sequence[int], ways: dict[str, tuple[Callable[[], object], float]]
) -> None:
    ceiling = copy_bytes()
    times = interleaved_seconds({way: fn for way, (fn, _) in ways.items()}, rounds=ROUNDS, warmup=3)
    base = next(iter(times.values()))
    for way, (_, moved) in ways.items():
        seconds = statistics.median(times[way])
        figures.append(
            {
                "table": table,
                "operand": "×".join(map(str, size)),
                "way": way,
                "ms": 1e3 * seconds,
                "GB/s": moved / seconds / 1e9,
                "of copy": moved / seconds / ceiling,
                "× this library": median_ratio(times[way], base),
            }
        )
