"""Dual attention (output, tangent) next to what people use today.

Useful work: 12·B·H·N²·d FLOP for a row with a tangent (six products), 4·B·H·N²·d for one without; the backward counts
10·B·H·N²·d (five products). The ceiling is a square matrix product in the same dtype, timed in the same process.
A contender that does not agree with the float64 oracle is not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable

import peers
import pytest
import torch
import torch.nn.functional as F
from measure import gemm_flops, interleaved_seconds, median_ratio
from torch import Tensor

from mfkernels import Dual, attention, use_backend
from mfkernels.testing import relative_error

cuda = importlib.import_module("mfkernels.attention.cuda")  # mfkernels.attention is the function

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 2e-2 if GPU else 1e-5
# B, N, H, d: DiT-B/4, B/2 and XL/2 at training sizes, then long sequences
SHAPES = (
    [
        (1024, 64, 12, 64),
        (256, 256, 12, 64),
        (256, 256, 16, 72),
        (32, 1024, 16, 64),
        (32, 1024, 16, 72),
        (32, 1024, 16, 128),
        (4, 4096, 16, 64),
        (4, 4096, 16, 128),
    ]
    if GPU
    else [(8, 64, 6, 64), (4, 256, 4, 72)]
)


def packed(B: int, N: int, H: int, d: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v = torch.randn(B, N, 3, H, d, device=device, dtype=DTYPE).unbind(2)
    dots = torch.randn(B, N, 3, H, d, device=device, dtype=DTYPE).unbind(2)
    return [q, k, v], list(dots)


def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, H, d] attention with materialised scores, as every `torch.func.jvp` trainer runs it."""
    return peers.math_attention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, H, d] attention through PyTorch's fused kernels."""
    return F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2)


def duals(tensors: list[Tensor], dots: list[Tensor], rows: int) -> list[Dual]:
    return [Dual(a, t[:rows]) for a, t in zip(tensors, dots, strict=True)]


def jvp_flash_attention() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The peer's dual forward, where `pip install jvp-flash-attention` has been done."""
    if not GPU or importlib.util.find_spec("jvp_flash_attention") is None:
        return None
    from jvp_flash_attention.jvp_attention import JVPAttn

    def run(tensors: list[Tensor], dots: list[Tensor]) -> tuple[Tensor, Tensor]:
        heads = [a.transpose(1, 2).contiguous() for a in tensors]
        tangents = tuple(a.transpose(1, 2).contiguous() for a in dots)
        o, o_dot = torch.func.jvp(lambda *qkv: JVPAttn.fwd_dual(*qkv), tuple(heads), tangents)
        return o.transpose(1, 2), o_dot.transpose(1, 2)

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward(shape, device, figures, benchmark):
    B, N, H, d = shape
    tensors, dots = packed(*shape, device)
    peer = jvp_flash_attention()
    torch.compiler.reset()  # the graph of one shape would make the next one's sizes symbols
    compiled = torch.compile(lambda *a: torch.func.jvp(math, a[:3], a[3:]), dynamic=False)
    ways: dict[str, tuple[Callable[[], object], float]] = {
        "this library, every row": (lambda: attention(*duals(tensors, dots, B)), 12.0),
        "this library, 25 % of rows": (lambda: attention(*duals(tensors, dots, B // 4)), 4.0 + 8.0 * (B // 4) / B),
        "this library, no tangent": (lambda: attention(*tensors), 4.0),
        "reference backend, every row": (_on("reference", lambda: attention(*duals(tensors, dots, B))), 12.0),
        "torch.func.jvp, math attention": (lambda: torch.func.jvp(math, tuple(tensors), tuple(dots)), 12.0),
        "torch.compile of it": (lambda: compiled(*tensors, *dots), 12.0),
        "SDPA forward alone": (lambda: sdpa(*tensors), 4.0),
    }
    if cuda.unsupported(tensors[0], 1.0) is None:
        ways |= {
            "this library, cuda, every row": (_on("cuda", lambda: attention(*duals(tensors, dots, B))), 12.0),
            "this library, cuda, 25 % of rows": (
                _on("cuda", lambda: attention(*duals(tensors, dots, B // 4))),
                4.0 + 8.0 * (B // 4) / B,
            ),
            "this library, cuda, no tangent": (_on("cuda", lambda: attention(*tensors)), 4.0),
        }
    if peer is not None:
        ways["jvp-flash-attention"] = (lambda: peer(tensors, dots), 12.0)

    few = [a[:2].double() for a in (*tensors, *dots)]
    wanted = torch.func.jvp(math, tuple(few[:3]), tuple(few[3:]))
    for name, (way, _) in list(ways.items()):
        got = way()
        parts = tuple(got) if isinstance(got, tuple) else (got,)  # the value, and its tangent where there is one
        errors = [relative_error(g[:2], w[: len(g)]) for g, w in zip(parts, wanted, strict=False)]
        if max(errors) >= TOLERANCE:
            assert "this library" not in name, f"{name} is wrong: no figure"
            del ways[name]
    _report(
        figures, f"Attention forward, {DTYPE}", shape, {n: (w, f * B * H * N * N * d) for n, (w, f) in ways.items()}
    )
    benchmark.pedantic(ways["this library, every row"][0], rounds=3)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_backward(shape, device, figures, benchmark):
    B, N, H, d = shape
    tensors, dots = packed(*shape, device)
    leaves = [a.detach().requires_grad_() for a in tensors]
    do = torch.randn(B, N, H, d, device=device, dtype=DTYPE)

    def backward_of(forward: Callable[[], Tensor]) -> Callable[[], object]:
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)

    ways = {
        "this library": backward_of(lambda: attention(*duals(leaves, dots, B)).primal),
        "SDPA": backward_of(
            lambda: F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in leaves)).transpose(1, 2)
        ),
        "math attention": backward_of(lambda: math(*leaves)),
    }
    few = [a[:2].detach().double().requires_grad_() for a in leaves]
    wanted = torch.autograd.grad(math(*few), few, do[:2].double())
    for name, way in ways.items():
        for g, w in zip(way(), wanted, strict=True):
            assert relative_error(g[:2], w) < 2 * TOLERANCE, f"{name} is wrong: no figure"
    _report(figures, f"Attention backward, {DTYPE}", shape, {n: (w, 10.0 * B * H * N * N * d) for n, w in ways.items()})
    benchmark.pedantic(ways["this library"], rounds=3)


def _on(backend: str, fn: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with use_backend(backend):
            return fn()

    return run


def _report(
    figures: list[dict], table: str, shape: tuple[int, ...], ways: dict[str, tuple[Callable[[], object], float]]
) -> None:
    ceiling = gemm_flops(DTYPE)
    times = interleaved_seconds({name: way for name, (way, _) in ways.items()}, rounds=20 if GPU else 5)
    base = next(iter(times.values()))
    for name, (_, flops) in ways.items():
        seconds = statistics.median(times[name])
        figures.append(
            {
                "table": table,
                "B×N×H×d": "×".join(map(str, shape)),
                "way": name,
                "ms": 1e3 * seconds,
                "TFLOP/s": flops / seconds / 1e12,
                "of ceiling": flops / seconds / ceiling,
                "× this library": median_ratio(times[name], base),
            }
        )
