"""Kernel launches of one DiT block on Duals, a quarter of the rows with a tangent; no GPU is needed.

A launch is counted for every ATen operator that calls no other ATen operator, unless it only allocates or makes a view,
for each library operator of `ONE_KERNEL`, and for every Triton kernel (`Launch.run`). The operators come from PyTorch's
profiler on the CPU; one that takes two launches on a GPU counts as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from meanflow.models import DiTBlock
from mfkernels import Dual, use_backend
from mfkernels.backend import triton_unavailable

B, N, D, H = 4, 128, 64, 4  # more tokens than one chunk of the backward kernels
ROWS = B // 4
NO_KERNEL = """
empty empty_like empty_strided new_empty resize_ detach alias lift_fresh result_type promote_types resolve_conj
resolve_neg item _local_scalar_dense view view_as as_strided _unsafe_view _reshape_alias reshape flatten unflatten
squeeze unsqueeze expand expand_as t transpose permute mT slice select narrow chunk split split_with_sizes unbind
contiguous to type_as
"""
# what these call inside on a CPU is one kernel's work on a GPU
ONE_KERNEL = """
mm addmm bmm baddbmm cat sum mean native_layer_norm native_layer_norm_backward
_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
"""
TRITON = "triton launch: "


def launches(fn: Callable[[], object]) -> Counter[str]:
    from mfkernels.launch import Launch

    run = Launch.run

    def marked(launch: Launch) -> None:
        with record_function(TRITON + launch.kernel.__name__):
            run(launch)

    with patch.object(Launch, "run", marked), profile(activities=[ProfilerActivity.CPU]) as profiled:
        fn()
    found: Counter[str] = Counter()

    def visit(event) -> None:
        if event.name.startswith(TRITON):  # the interpreter's own copies do not count
            found[event.name.removeprefix(TRITON)] += 1
            return
        if event.name.removeprefix("aten::") in ONE_KERNEL.split():
            found[event.name] += 1
            return
        children = [c for c in event.cpu_children if c.name.startswith(("aten::", "mfkernels::", TRITON))]
        if event.name.startswith("aten::") and not children:
            if event.name.removeprefix("aten::") not in NO_KERNEL.split():
                found[event.name] += 1
            return
        for child in event.cpu_children:
            visit(child)

    for event in profiled.events():
        if event.cpu_parent is None:
            visit(event)
    return found


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_launches(backend, figures):
    why_not = triton_unavailable(torch.device("cpu"))
    if backend == "triton" and why_not is not None:
        pytest.skip(why_not)
    torch.manual_seed(0)
    block = DiTBlock(D, H)
    x, c = torch.randn(B, N, D, requires_grad=True), torch.randn(B, D, requires_grad=True)
    x_dot, c_dot = torch.randn(ROWS, N, D), torch.randn(ROWS, D)
    dy = torch.randn(B, N, D)
    kept: list[torch.Tensor] = []

    def forward_plain() -> None:
        kept[:] = [block(x, c)]

    def forward_dual() -> None:
        kept[:] = [block(Dual(x, x_dot), Dual(c, c_dot)).primal]

    def backward() -> None:
        torch.autograd.grad(kept[0], [x, c, *block.parameters()], dy)

    with use_backend(backend):
        forward_dual()
        for name, fn in (("forward, plain", forward_plain), ("forward, dual", forward_dual), ("backward", backward)):
            found = launches(fn)
            figures.append(
                {
                    "table": "Launches of a DiT block",
                    "backend": backend,
                    "pass": name,
                    "launches": found.total(),
                    "which": ", ".join(f"{n}× {op}" if n > 1 else op for op, n in found.most_common()),
                }
            )
