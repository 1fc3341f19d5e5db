"""Dual attention (output, tangent) and its backward, next to what people use today.

Useful work: 12·B·H·N²·d FLOP for a row with a tangent (six products), 4·B·H·N²·d for one without; the backward counts
10·B·H·N²·d (five products). The ceiling is a square matrix product in the same dtype, timed in the same process. One
row is one way at one shape: it is compared with float64 first, and one that disagrees is not timed.

    python -m pytest bench/attention --json FILE
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import peers
import pytest
import torch
import torch.nn.functional as F
from measure import INTERPRETED, REHEARSAL, gemm_flops, measured, torch_compile
from torch import Tensor

from mfkernels import Dual, attention, use_backend
from mfkernels.attention import cuda
from mfkernels.attention.backward import unsupported
from mfkernels.backend import PARTS
from mfkernels.testing import relative_error

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 2e-2 if GPU else 1e-5
ROUNDS = 1 if REHEARSAL else 5
# B, N, H, d: DiT-B/4, B/2 and XL/2 at training sizes, then long sequences
SHAPES = (
    [
        (256, 256, 12, 64),
        (1024, 64, 12, 64),
        (256, 256, 16, 72),
        (32, 1024, 16, 64),
        (4, 4096, 16, 64),
        (4, 4096, 16, 128),
    ]
    if GPU
    else [(4, 9, 1, 16)]
    if REHEARSAL
    else [(8, 64, 6, 64), (4, 256, 4, 72)]
)


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class Inputs(NamedTuple):
    """Views of packed buffers [B, N, 3, H, d], as they come from a projection, and one cotangent."""

    qkv: Sequence[Tensor]  # [B, N, H, d] each
    dots: Sequence[Tensor]  # [B, N, H, d] each
    do: Tensor  # [B, N, H, d]

    def duals(self, rows: int) -> list[Dual]:
        return [Dual(a, a_dot[:rows]) for a, a_dot in zip(self.qkv, self.dots, strict=True)]


@functools.lru_cache(maxsize=1)
def inputs(shape: tuple[int, ...], device: torch.device) -> Inputs:
    B, N, H, d = shape
    torch.manual_seed(0)
    # two buffers: compiled forward mode fails inside PyTorch (2.13) where a tangent's storage is not laid out alike
    qkv, dots = (torch.randn(B, N, 3, H, d, device=device, dtype=DTYPE) for _ in range(2))
    do = torch.randn(B, N, H, d, device=device, dtype=DTYPE)
    return Inputs(qkv.unbind(2), dots.unbind(2), do)


def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, H, d] attention with materialised scores, as every `torch.func.jvp` trainer runs it."""
    return peers.math_attention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, H, d] attention through PyTorch's fused kernels."""
    return F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2)


def on(backend: str, fn: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with use_backend(backend):
            return fn()

    return run


# -------------------------------------------------------------------------------------------------------------- forward


def ours(x: Inputs, share: float) -> Callable[[], object]:
    rows = int(share * len(x.do))
    return (lambda: attention(*x.duals(rows))) if rows else (lambda: attention(*x.qkv))


def by_cuda(x: Inputs, share: float) -> Callable[[], object]:
    why_not = cuda.unsupported(x.qkv[0])
    if why_not is not None:
        pytest.skip(why_not)
    return on("cuda", ours(x, share))


def by_jvp(*a: Tensor) -> object:
    return torch.func.jvp(math, a[:3], a[3:])


def by_compiled_jvp(x: Inputs, share: float) -> Callable[[], object]:
    torch.compiler.reset()  # the graph of one shape would make the next one's sizes symbols
    compiled = torch_compile(by_jvp)
    return lambda: compiled(*x.qkv, *x.dots)


def by_jvp_flash_attention(x: Inputs, share: float) -> Callable[[], object]:
    """The peer's dual forward, where `pip install jvp-flash-attention` has been done."""
    if not GPU or importlib.util.find_spec("jvp_flash_attention") is None:
        pytest.skip("jvp-flash-attention is not installed, or there is no GPU")
    from jvp_flash_attention.jvp_attention import JVPAttn

    def run() -> object:
        heads, tangents = (tuple(a.transpose(1, 2).contiguous() for a in part) for part in (x.qkv, x.dots))
        o, o_dot = torch.func.jvp(lambda *qkv: JVPAttn.fwd_dual(*qkv), heads, tangents)
        return o.transpose(1, 2), o_dot.transpose(1, 2)

    return run


# by name: how it is made, and the share of the rows that it gives a tangent of
Way = Callable[[Inputs, float], Callable[[], object]]
FORWARD: dict[str, tuple[Way, float]] = {
    "this library, every row": (ours, 1.0),
    "this library, 25 % of rows": (ours, 0.25),
    "this library, no tangent": (ours, 0.0),
    "SDPA forward alone": (lambda x, share: lambda: sdpa(*x.qkv), 0.0),
    "jvp-flash-attention": (by_jvp_flash_attention, 1.0),
    "torch.compile of torch.func.jvp, math attention": (by_compiled_jvp, 1.0),
    "torch.func.jvp, math attention": (lambda x, share: lambda: by_jvp(*x.qkv, *x.dots), 1.0),
    "reference backend, every row": (lambda x, share: on("reference", ours(x, share)), 1.0),
}
BY_CUDA = {
    "this library, cuda, every row": (by_cuda, 1.0),
    "this library, cuda, 25 % of rows": (by_cuda, 0.25),
    "this library, cuda, no tangent": (by_cuda, 0.0),
}


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_forward(way, shape, device, figures):
    forward(way, *FORWARD[way], shape, device, figures)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("way", BY_CUDA)
def test_forward_by_cuda(way, shape, device, figures):
    forward(way, *BY_CUDA[way], shape, device, figures)


def forward(way: str, make: Way, share: float, shape: tuple[int, ...], device: torch.device, figures) -> None:
    B, N, H, d = shape
    x = inputs(shape, device)
    fn = make(x, share)
    wide = [a[:2].double() for a in (*x.qkv, *x.dots)]
    got = fn()
    parts = tuple(got) if isinstance(got, tuple) else (got,)  # the value, and its tangent where there is one
    assert len(parts) == 1 + (share > 0)
    for part, wanted in zip(parts, by_jvp(*wide), strict=False):
        assert part.shape[0] in (B, int(share * B))
        check(part[:2], wanted[: len(part)], TOLERANCE)
    del got, parts
    report(
        figures,
        table=f"Attention forward, {DTYPE}",
        shape=shape,
        way=way,
        fn=fn,
        base=ours(x, 1.0),
        flops=(4 + 8 * int(share * B) / B) * B * H * N * N * d,
    )


# ------------------------------------------------------------------------------------------------------------- backward


def own(leaves: Sequence[Tensor], backward: str) -> Tensor:
    """Our output, whose backward is the one of this name; on a CPU, the reference's."""
    with use_backend(f"triton,attention_backward={backward}" if GPU or INTERPRETED else None):
        return attention(*leaves)


OWN = "this library"
OTHERS = {f"{OWN}, {name}": name for name in PARTS["attention_backward"] if name != "triton"}
BACKWARD = [OWN, *OTHERS, "SDPA", "math attention"]


@pytest.mark.parametrize("way", BACKWARD)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_backward(way, shape, device, figures):
    B, N, H, d = shape
    x = inputs(shape, device)
    leaves = [a.detach().requires_grad_() for a in x.qkv]
    if way in OTHERS:
        why_not = unsupported(OTHERS[way], *leaves[:2], causal=False)
        if why_not is None and not (GPU or INTERPRETED):
            why_not = "on a CPU the reference serves both passes"
        if why_not is not None:
            pytest.skip(why_not)

    def backward_of(out: Tensor) -> Callable[[], Sequence[Tensor]]:
        return lambda: torch.autograd.grad(out, leaves, x.do, retain_graph=True)

    outs = {"SDPA": sdpa, "math attention": math}
    fn = backward_of(outs[way](*leaves) if way in outs else own(leaves, OTHERS.get(way, "triton")))
    few = [a[:2].detach().double().requires_grad_() for a in leaves]
    for got, wanted in zip(fn(), torch.autograd.grad(math(*few), few, x.do[:2].double()), strict=True):
        check(got[:2], wanted, 2 * TOLERANCE)
    report(
        figures,
        table=f"Attention backward, {DTYPE}",
        shape=shape,
        way=way,
        fn=fn,
        base=backward_of(own(leaves, "triton")),
        flops=10 * B * H * N * N * d,
    )


# ------------------------------------------------------------------------------------------------------------ figures


def check(got: Tensor, wanted: Tensor, bound: float) -> None:
    error = relative_error(got, wanted)
    assert error < bound, f"wrong by {error:.1e}, so it is not timed"


def report(
    figures,
    *,
    table: str,
    shape: tuple[int, ...],
    way: str,
    fn: Callable[[], object],
    base: Callable[[], object],
    flops: float,
) -> None:
    taken = measured(fn, base, rounds=ROUNDS)
    figures.append(
        {
            "table": table,
            "B×N×H×d": "×".join(map(str, shape)),
            "way": way,
            "ms": 1e3 * taken.seconds,
            "TFLOP/s": flops / taken.seconds / 1e12,
            "of ceiling": flops / taken.seconds / gemm_flops(DTYPE),
            "× this library": taken.ratio,
            "latency ms": 1e3 * taken.latency,
            "timed by": taken.how,
        }
    )
