"""A whole DiT block, forward and forward + backward, next to the same block in plain PyTorch, eager and compiled.

Every figure is a multiple of this library's own block without tangents, timed in turns in the same process; a quarter
or all of the rows carry tangents. The tangent's peer is `torch.func.jvp` of the plain block with materialised
attention, eager and compiled. A contender that disagrees with float64 is not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import peers
import pytest
import torch
import torch.nn.functional as F
from measure import median_ratio
from torch import Tensor

from meanflow.models import DiTBlock
from mfkernels import Dual
from mfkernels.measuring import interleaved_seconds
from mfkernels.testing import relative_error

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 2e-2 if GPU else 1e-5
# B, N, D, H: DiT-B/4, B/2 and XL/2
SIZES = [(1024, 64, 768, 12), (256, 256, 768, 12), (256, 256, 1152, 16)] if GPU else [(4, 16, 96, 4)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_block(size, device, figures, benchmark):
    B, N, D, H = size
    torch.manual_seed(0)
    block = DiTBlock(D, H)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.03)
    plain = peers.Block(D, H, 4.0)
    plain.load_state_dict(block.state_dict())
    block, plain = block.to(device, DTYPE), plain.to(device, DTYPE)
    x, x_dot = torch.randn(2, B, N, D, device=device, dtype=DTYPE)
    c, c_dot = torch.randn(2, B, D, device=device, dtype=DTYPE)
    x.requires_grad_()
    dy = torch.randn_like(x_dot)

    def ours(rows: int) -> Tensor | Dual:
        return block(Dual(x, x_dot[:rows]), Dual(c, c_dot[:rows])) if rows else block(x, c)

    def by_jvp(x: Tensor, c: Tensor, x_dot: Tensor, c_dot: Tensor) -> tuple[Tensor, Tensor]:
        y, y_dot = torch.func.jvp(lambda x, c: plain(x, c, peers.math_attention), (x, c), (x_dot, c_dot))
        return y, y_dot.detach()

    def by_sdpa(x: Tensor, c: Tensor) -> Tensor:
        return plain(x, c, F.scaled_dot_product_attention)

    torch._dynamo.reset()
    compiled, compiled_jvp = torch.compile(by_sdpa, dynamic=False), torch.compile(by_jvp, dynamic=False)
    ways: dict[str, tuple[Callable[[], Tensor | tuple], list[torch.nn.Parameter]]] = {
        "this library, no tangent": (lambda: ours(0), list(block.parameters())),
        "this library, 25 % of rows": (lambda: ours(B // 4), list(block.parameters())),
        "this library, every row": (lambda: ours(B), list(block.parameters())),
        "plain PyTorch, SDPA, no tangent": (lambda: by_sdpa(x, c), list(plain.parameters())),
        "compiled, SDPA, no tangent": (lambda: compiled(x, c), list(plain.parameters())),
        "torch.func.jvp, every row": (lambda: by_jvp(x, c, x_dot, c_dot), list(plain.parameters())),
        "compiled torch.func.jvp, every row": (lambda: compiled_jvp(x, c, x_dot, c_dot), list(plain.parameters())),
    }

    few = slice(0, 2)
    oracle = peers.Block(D, H, 4.0).to(device).double()
    oracle.load_state_dict({name: p.double() for name, p in plain.state_dict().items()})
    wide = [a[few].detach().double() for a in (x, c, x_dot, c_dot)]
    wanted = torch.func.jvp(lambda x, c: oracle(x, c, peers.math_attention), (wide[0], wide[1]), (wide[2], wide[3]))
    got = block(Dual(x, x_dot), Dual(c, c_dot))
    for name, a, b in (("output", got.primal, wanted[0]), ("tangent", got.tangent, wanted[1])):
        assert relative_error(a[few], b) < TOLERANCE, f"this library's {name} is wrong: no figure"
    for name, (way, _) in list(ways.items()):
        try:
            assert relative_error(primal(way())[few], wanted[0]) < TOLERANCE
        except torch.OutOfMemoryError:
            del ways[name]  # materialised attention on every row

    def with_backward(way: Callable[[], Tensor | tuple], parameters: list[torch.nn.Parameter]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(primal(way()), [x, *parameters], dy)

    forward = {name: (lambda way=way: _no_grad(way)) for name, (way, _) in ways.items()}
    both = {name: with_backward(*way) for name, way in ways.items()}
    for kind, fns in (("forward", forward), ("forward and backward", both)):
        times = interleaved_seconds(fns, rounds=20 if GPU else 3, warmup=3)
        base = times["this library, no tangent"]
        for name in fns:
            figures.append(
                {
                    "table": f"A DiT block, {kind}, {DTYPE}",
                    "B×N×D×H": "×".join(map(str, size)),
                    "way": name,
                    "ms": 1e3 * statistics.median(times[name]),
                    "× this library, no tangent": median_ratio(times[name], base),
                }
            )
    benchmark.pedantic(both["this library, 25 % of rows"], rounds=3)


def primal(out: Tensor | tuple) -> Tensor:
    """Of a tensor, a Dual or a pair of output and tangent."""
    return out if isinstance(out, Tensor) else out[0]


def _no_grad(way: Callable[[], object]) -> object:
    with torch.no_grad():
        return way()
