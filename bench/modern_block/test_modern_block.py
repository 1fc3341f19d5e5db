"""The ops of the modern DiT line (output, tangent; backward) next to PyTorch, eager and compiled.

All of them are bound by memory. GB/s counts what has to move: each input and output once, in the storage dtype; vectors
of one width (weights, tables) are left out. With A = bytes of one (B, N, D) operand and s = share of tangent rows:

    rms_norm              2A (1 + s)      backward 3A        (dy, x in; dx out)
    swiglu                3A (1 + s)      backward 5A        (dy, a, b in; da, db out)
    layer_scale_residual  3A (1 + s)      backward 3A        (dout, y in; dy out; dx is dout itself)
    qk_norm_rotary        4A (1 + s)      backward 6A        (dq, dk, q, k in; dq, dk out)

The ceiling is a large copy, timed in the same process. A contender that disagrees with float64 is not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from measure import copy_bytes, median_ratio
from torch import Tensor

from mfkernels import Dual, layer_scale_residual, qk_norm_rotary, rms_norm, swiglu, use_backend
from mfkernels.measuring import interleaved_seconds
from mfkernels.testing import relative_error

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 1e-2 if GPU else 1e-5
TOKENS = (256, 276) if GPU else (4, 32)  # B, N
WIDTHS = (768, 1024, 1152) if GPU else (96,)
HIDDEN = (2048, 2730, 3072) if GPU else (250,)
HEADS = ((12, 64), (16, 64), (16, 72)) if GPU else ((2, 24),)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x[..., 0::2], x[..., 1::2]  # [B, N, H, d/2]
    cos, sin = cos[:, None], sin[:, None]  # [N, 1, d/2]
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).flatten(-2).to(x.dtype)  # [B, N, H, d]


@dataclass(frozen=True)
class Op:
    """An op of `primals` (which carry tangents) and `constants`, and the same function in ordinary PyTorch."""

    ours: Callable[..., object]
    plain: Callable[..., object]
    primals: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    parameters: int  # how many of the constants get a gradient
    forward_passes: int  # over one operand
    backward_passes: int


def make(name: str, size: object, device: torch.device) -> Op:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=DTYPE)

    B, N = TOKENS
    if name == "rms_norm":
        return Op(
            rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), (random(B, N, size),), (random(size),), 1, 2, 3
        )
    if name == "swiglu":
        return Op(swiglu, lambda a, b: F.silu(a) * b, (random(B, N, size), random(B, N, size)), (), 0, 3, 5)
    if name == "layer_scale_residual":
        streams = random(B, N, size), random(B, N, size)
        return Op(layer_scale_residual, lambda x, y, s: x + s * y, streams, (random(size),), 1, 3, 3)
    H, d = size
    q, k, _ = random(B, N, 3, H, d).unbind(2)  # [B, N, H, d] views of a packed projection
    angles = torch.rand(N, d // 2, device=device) * 6  # [N, d/2]

    def plain(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = F.rms_norm(q, wq.shape, wq, 1e-6), F.rms_norm(k, wk.shape, wk, 1e-6)
        return turned(q, cos, sin), turned(k, cos, sin)

    def ours(*a: object) -> object:
        return qk_norm_rotary(*a, interleaved=True)

    return Op(ours, plain, (q, k), (random(d), random(d), angles.cos(), angles.sin()), 2, 4, 6)


CASES = [(name, size) for name in ("rms_norm", "layer_scale_residual") for size in WIDTHS]
CASES += [("swiglu", size) for size in HIDDEN] + [("qk_norm_rotary", size) for size in HEADS]
every_case = pytest.mark.parametrize(("name", "size"), CASES, ids=str)


def operand_bytes(op: Op) -> int:
    return op.primals[0].numel() * DTYPE.itemsize


def flat(out: object) -> list[Tensor]:
    """Primals, then tangents, of a (nested) result."""
    if isinstance(out, Dual):
        return [out.primal] if out.tangent is None else [out.primal, out.tangent]
    if isinstance(out, Tensor):
        return [out]
    parts = [flat(x) for x in out]
    columns = zip(*parts, strict=True) if isinstance(out[0], Dual) else parts
    return [x for column in columns for x in column]


@every_case
def test_forward(name, size, device, figures, benchmark):
    op = make(name, size, device)
    dots = tuple(torch.randn_like(x) for x in op.primals)
    B = TOKENS[0]

    def ours(rows: int) -> object:
        return op.ours(*(Dual(x, t[:rows]) for x, t in zip(op.primals, dots, strict=True)), *op.constants)

    def on_reference() -> object:
        with use_backend("reference"):
            return ours(B)

    def jvp(*a: Tensor) -> object:
        n = len(op.primals)
        return torch.func.jvp(lambda *xs: op.plain(*xs, *op.constants), a[:n], a[n:])

    # with symbolic strides compiled forward mode fails inside PyTorch (2.13: _new_zeros_with_same_feature_meta)
    torch._dynamo.reset()
    compiled, compiled_plain = (torch.compile(fn, dynamic=False) for fn in (jvp, op.plain))
    A, passes = operand_bytes(op), op.forward_passes
    ways = {
        "this library, every row": (lambda: ours(B), 2 * passes * A),
        "this library, 25 % of rows": (lambda: ours(B // 4), passes * A * (1 + (B // 4) / B)),
        "this library, no tangent": (lambda: op.ours(*op.primals, *op.constants), passes * A),
        "reference backend, every row": (on_reference, 2 * passes * A),
        "eager torch.func.jvp": (lambda: jvp(*op.primals, *dots), 2 * passes * A),
        "compiled torch.func.jvp": (lambda: compiled(*op.primals, *dots), 2 * passes * A),
        "compiled, no tangent": (lambda: compiled_plain(*op.primals, *op.constants), passes * A),
    }
    wide = [x.double() for x in (*op.primals, *dots)]
    n = len(op.primals)
    constants = [c.double() for c in op.constants]
    wanted = flat(torch.func.jvp(lambda *xs: op.plain(*xs, *constants), tuple(wide[:n]), tuple(wide[n:])))
    for way in ("this library, every row", "reference backend, every row", "compiled torch.func.jvp"):
        for got, want in zip(flat(ways[way][0]()), wanted, strict=True):
            assert relative_error(got, want) < TOLERANCE, f"{way} is wrong: no figure"
    report(figures, f"{name} forward, {DTYPE}", size, ways)
    benchmark.pedantic(ways["this library, every row"][0], rounds=3)


@every_case
def test_backward(name, size, device, figures, benchmark):
    torch._dynamo.reset()
    op = make(name, size, device)
    primals = [x.detach().requires_grad_() for x in op.primals]
    parameters = [c.detach().requires_grad_() for c in op.constants[: op.parameters]]
    leaves, rest = [*primals, *parameters], op.constants[op.parameters :]
    cotangents = [torch.randn(x.shape, device=device, dtype=DTYPE) for x in flat(op.plain(*op.primals, *op.constants))]

    def backward_of(forward: Callable[..., object]) -> Callable[[], object]:
        outs = flat(forward(*leaves, *rest))
        return lambda: torch.autograd.grad(outs, leaves, cotangents, retain_graph=True)

    ways = {
        "this library": backward_of(op.ours),
        "eager PyTorch": backward_of(op.plain),
        "compiled PyTorch": backward_of(torch.compile(op.plain, dynamic=False)),
    }
    wide = [x.detach().double().requires_grad_() for x in leaves]
    outs = flat(op.plain(*wide, *(c.double() for c in rest)))
    wanted = torch.autograd.grad(outs, wide, [c.double() for c in cotangents])
    for got, want in zip(ways["this library"](), wanted, strict=True):
        assert relative_error(got, want) < TOLERANCE, "this library is wrong: no figure"
    moved = op.backward_passes * operand_bytes(op)
    report(figures, f"{name} backward, {DTYPE}", size, {way: (fn, moved) for way, fn in ways.items()})
    benchmark.pedantic(ways["this library"], rounds=3)


def report(figures: list[dict], table: str, size: object, ways: dict[str, tuple[Callable[[], object], float]]) -> None:
    ceiling = copy_bytes()
    times = interleaved_seconds({way: fn for way, (fn, _) in ways.items()}, rounds=20 if GPU else 5, warmup=3)
    base = next(iter(times.values()))
    for way, (_, moved) in ways.items():
        seconds = statistics.median(times[way])
        figures.append(
            {
                "table": table,
                "B×N": "×".join(map(str, TOKENS)),
                "width": str(size),
                "way": way,
                "ms": 1e3 * seconds,
                "GB/s": moved / seconds / 1e9,
                "of copy": moved / seconds / ceiling,
                "× this library": median_ratio(times[way], base),
            }
        )
