"""Arguments of attention, and its kernels held against the oracle: for Triton's, CUDA's, and others' backward."""

from collections.abc import Callable
from typing import NamedTuple

import oracles
import torch
from both_backends import DEVICE
from torch import Tensor

from meanflow.models import DiTBlock
from mfkernels import Dual
from mfkernels.testing import relative_error

DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])

# Measured in the interpreter, the largest over CASES: float16 o 3.3e-4, o_dot 3.1e-4, gradients 3.6e-4; float32 o
# 4.7e-7, o_dot 5.1e-7, gradients 5.7e-7; lse 6.0e-8. The bounds are twice that; bfloat16 keeps 3 bits fewer.
OUTPUT_BOUND = {torch.float16: 6.6e-4, torch.bfloat16: 5.3e-3, torch.float32: 1e-6}
GRADIENT_BOUND = {torch.float16: 7.2e-4, torch.bfloat16: 5.8e-3, torch.float32: 1.1e-6}
LSE_BOUND = 1.2e-7
# At scores of +-80: float16 o_dot 6.8e-4, gradients 1.5e-3 (SDPA's: 1.6e-3); float32 o_dot 2.5e-6, gradients 1.0e-5
# (SDPA's: 1.1e-5).
LARGE_SCORE_OUTPUT_BOUND = {torch.float16: 1.4e-3, torch.bfloat16: 1.1e-2, torch.float32: 5e-6}
LARGE_SCORE_GRADIENT_BOUND = {torch.float16: 3e-3, torch.bfloat16: 2.4e-2, torch.float32: 2e-5}
LARGE_SCORE_LSE_BOUND = 2.5e-7


def packed(B, N, H, d):
    """q, k, v as views of one [B, N, 3, H, d] buffer, as a qkv projection leaves them."""
    return dict(zip("qkv", torch.randn(B, N, 3, H, d, dtype=torch.float64).unbind(2), strict=True))


def separate(B, N_q, N_kv, H, H_kv, d):
    return {
        "q": torch.randn(B, N_q, H, d, dtype=torch.float64),
        "k": torch.randn(B, N_kv, H_kv, d, dtype=torch.float64),
        "v": torch.randn(B, N_kv, H_kv, d, dtype=torch.float64),
    }


class Case(NamedTuple):
    N_q: int
    N_kv: int
    D: int
    B: int = 1
    B_t: int = 1
    H: int = 1
    H_kv: int = 1
    causal: bool = False


CASES = [
    Case(1, 17, 8, B=2),
    Case(17, 17, 24, B=2, H=2, H_kv=2),
    Case(63, 63, 64, B=2, B_t=2),
    Case(100, 100, 72, B=2, H=2, H_kv=2),
    Case(276, 276, 72),
    Case(64, 128, 80),
    Case(100, 276, 80, H=2, H_kv=1),
    Case(276, 63, 128, B_t=0),
    Case(17, 100, 96),
    Case(63, 17, 48),
    Case(17, 63, 136),
    Case(17, 100, 256),
    Case(100, 100, 64, causal=True),
    Case(276, 100, 24, causal=True, H=4, H_kv=2),
    Case(63, 276, 72, causal=True),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def inputs(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(case.N_q, case.H, case.D), (case.N_kv, case.H_kv, case.D), (case.N_kv, case.H_kv, case.D)]
    primals = [draw((case.B, *shape), dtype, seed) for seed, shape in enumerate(shapes)]
    tangents = [draw((case.B_t, *shape), dtype, 3 + seed) for seed, shape in enumerate(shapes)]
    return primals, tangents


def scale_for_scores_of_eighty(q: Tensor, k: Tensor) -> float:
    """One key then takes nearly all the weight of a row, and exp(80) alone would overflow float16."""
    return 80 / (q.double().flatten(0, 2) @ k.double().flatten(0, 2).T).abs().max().item()


def tangent_of_oracle(primals: list[Tensor], tangents: list[Tensor | None], scale: float, causal: bool) -> Tensor:
    rows = next(x.shape[0] for x in tangents if x is not None)
    primals = [x[:rows].double() for x in primals]
    pairs = zip(primals, tangents, strict=True)
    tangents = [torch.zeros_like(x) if x_dot is None else x_dot.double() for x, x_dot in pairs]
    return torch.func.jvp(lambda *qkv: oracles.attention(*qkv, scale, causal), tuple(primals), tuple(tangents))[1]


def uncentred_tangent(primals: list[Tensor], tangents: list[Tensor], scale: float) -> Tensor:
    """The tangent as kernels without a centre compute it: float32, with p and p s_dot rounded before the products."""
    (q, k, v), (q_dot, k_dot, v_dot) = ([x.float().transpose(1, 2) for x in xs] for xs in (primals, tangents))
    low = primals[0].dtype
    s = scale * q @ k.mT  # [B, H, N_q, N_kv]
    p = (s - s.amax(-1, keepdim=True)).exp()  # [B, H, N_q, N_kv]
    h = p * scale * (q_dot @ k.mT + q @ k_dot.mT)  # [B, H, N_q, N_kv]
    l, mu = p.sum(-1, keepdim=True), h.sum(-1, keepdim=True)  # [B, H, N_q, 1]  # noqa: E741
    p, h = p.to(low).float(), h.to(low).float()
    return ((h @ v + p @ v_dot) / l - mu / l * (p @ v / l)).transpose(1, 2)  # [B, N_q, H, D]


def check_forward(
    forward: Callable[..., tuple[Tensor, Tensor | None, Tensor]],
    primals: list[Tensor],
    tangents: list[Tensor | None],
    scale: float,
    causal: bool = False,
    bound: float | None = None,
    lse_bound: float = LSE_BOUND,
    **options: object,
) -> None:
    o, o_dot, lse = forward(*primals, *tangents, scale=scale, causal=causal, **options)
    ref, ref_lse = oracles.attention_with_lse(*(x.double() for x in primals), scale, causal)
    bound = bound or OUTPUT_BOUND[o.dtype]
    assert o.is_contiguous()
    assert relative_error(o, ref) < bound
    assert relative_error(lse, ref_lse) < lse_bound
    if all(x is None for x in tangents):
        assert o_dot is None
    elif next(x for x in tangents if x is not None).shape[0]:
        assert o_dot.is_contiguous()
        assert relative_error(o_dot, tangent_of_oracle(primals, tangents, scale, causal)) < bound


def check_backward(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    primals: list[Tensor],
    scale: float,
    causal: bool = False,
    bound: float | None = None,
    **options: object,
) -> None:
    from mfkernels.attention.kernels import attention_forward  # needs Triton

    o, _, lse = attention_forward(*primals, scale=scale, causal=causal)
    do = draw(tuple(o.shape), o.dtype, 7)
    gradients = backward(do, *primals, o, lse, scale=scale, causal=causal, **options)
    leaves = [x.double().requires_grad_() for x in primals]
    expected = torch.autograd.grad(oracles.attention(*leaves, scale, causal), leaves, do.double())
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.is_contiguous()
        assert relative_error(gradient, reference) < (bound or GRADIENT_BOUND[o.dtype])


def assert_block_compiles(width: int, heads: int, *, std: float, bound: float) -> None:
    """A DiT block on Duals is one graph; value, tangent and the gradient of qkv are those of the eager block."""
    block = DiTBlock(width, heads).to(DEVICE)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=std)
    x, c = torch.randn(3, 9, width, device=DEVICE), torch.randn(3, width, device=DEVICE)
    duals = Dual(x, torch.randn_like(x[:2])), Dual(c, torch.randn_like(c[:2]))
    results = []
    for fn in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        y = fn(*duals)
        y.primal.float().square().sum().backward()
        results.append((y.primal, y.tangent, block.attn.qkv.weight.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        assert eager.abs().sum() > 0
        assert relative_error(compiled, eager) <= bound
