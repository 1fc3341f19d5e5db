"""Launches, bytes and FLOPs of one DiT block, forward and backward, as a GPU would run it; no GPU is needed.

    python bench/bytes/count.py [--json FILE] [--batch 256] [--tokens 256] [--width 768] [--heads 12]

DiT-B/2's block under bfloat16 autocast with float32 weights and residual stream, in three ways: flow matching,
MeanFlow with a tangent on a quarter of the rows, and the eager peer (peers.py) through PyTorch's fused attention. It
runs on fake tensors, which have shapes and no memory, so it takes seconds and is exact: the same at every run.

What counts as a launch: each Triton kernel (`Launch.run`), and each ATen operator that reaches a device, below
autograd and autocast, unless it makes a view or only allocates. What counts as its bytes: every tensor that it is
given or returns, once, in the elements that the view shows; an operator that writes in place reads and writes it. So
an operand that a kernel reads twice counts once, and caches do not exist. A launch is "gemm", "attention" or
"elementwise", which is everything else.

What it does not see: an ATen operator that takes several launches on a GPU (flash attention's backward, a split-K
product, a reduction in two steps) is one here; operators are chosen as on a CPU, whose autocast treats these blocks
as CUDA's does and whose fused attention has the operands of flash's; the optimiser, gradient accumulation across
calls and everything outside the block.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest, without_gpu

from without_gpu import TANGENT_SHARE, WAYS, as_on_h100, blocks, inputs

from meanflow.models import DiTBlock
from mfkernels import Dual, ResidualStream
from mfkernels._torch import TorchDispatchMode, is_view, lookup, memory_of, overload_of, tree_leaves
from mfkernels.dual import primal_of
from mfkernels.launch import Launch

_METER = "bench/bytes/count.py"
FakeTensorMode = lookup("torch._subclasses:FakeTensorMode", _METER)
DispatchKey = lookup("torch:_C.DispatchKey", _METER)
CUSTOM_OPS = lookup("torch._library.custom_ops:OPDEFS", _METER)  # by name: fake tensors would stop at their shapes

BANDWIDTH, TENSOR_FLOPS = 2.55e12, 650e12  # bytes/s and FLOP/s that an H200 is taken to reach: a model, not measured

ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")
OVERWRITE = ("copy_", "fill_", "zero_")  # the tensor that they write to is not read
GEMMS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation")
ATTENTION = "_scaled_dot_product_"

# Products of N·N·d multiply-adds a head: of every row, and in addition of a row with a tangent.
PRODUCTS = {
    "_attention_forward_kernel": (2, 4),
    "_dq_kernel": (3, 0),
    "_dkdv_kernel": (4, 0),
    "_scaled_dot_product_flash_attention_for_cpu": (2, 0),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (5, 0),
}

KERNELS = {
    "_gated_residual_forward_kernel": "gated residual",
    "_gated_residual_backward_kernel": "gated residual",
    "_gelu_forward_kernel": "GELU",
    "_gelu_backward_kernel": "GELU (remakes a)",
    "_sum_partials_kernel": "sums of partial sums",
}


@dataclass(frozen=True)
class Block:
    """Sizes of a block and its input."""

    batch: int = 256
    tokens: int = 256
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0


@dataclass
class Event:
    """One launch."""

    phase: str  # "F" or "B"
    name: str
    kind: str  # "gemm", "attention" or "elementwise"
    bytes: int
    flops: int
    reads: list[Tensor]
    writes: list[Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of a Triton launch


def place(x: Tensor) -> tuple[Any, ...]:
    """The same for two views if and only if they show the same elements in the same order."""
    return memory_of(x), x.storage_offset(), tuple(x.shape), x.stride()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Each once; a dimension that was expanded is there once."""
    total = 0
    for x in {place(x): x for x in tensors}.values():
        elements = 1
        for n, step in zip(x.shape, x.stride(), strict=True):
            elements *= 1 if step == 0 and n > 1 else n
        total += elements * x.element_size()
    return total


class Meter(TorchDispatchMode):
    """Records what is launched while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "F"
        self.events: list[Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func.name().split(".")[0].split("::")
        if namespace == "mfkernels":
            with self:  # what is inside our own operators is counted, not they
                return CUSTOM_OPS[f"{namespace}::{name}"]._init_fn(*args, **kwargs)
        if namespace == "aten" and not func.has_kernel_for_dispatch_key(DispatchKey.CPU):
            with self:  # `linear` comes whole from inside them, from elsewhere as the operators that it is made of
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        made = [a for a in tree_leaves(out) if isinstance(a, Tensor)]
        if namespace == "aten" and name not in ALLOCATE and made and not is_view(func):
            given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
            self._operator(name, given, made, overwrites=name in OVERWRITE or overload_of(func) == "out")
        return out

    def _operator(self, name: str, given: list[Tensor], made: list[Tensor], *, overwrites: bool) -> None:
        written = {place(x) for x in made}
        reads = [x for x in given if not (overwrites and place(x) in written)]
        kind, flops = "elementwise", 0
        if name in GEMMS:
            kind, flops = "gemm", 2 * made[0].numel() * given[-2].shape[-1]
        elif name.startswith(ATTENTION):
            q = given[1] if name.endswith("backward") else given[0]  # [B, H, N, d]
            kind, flops = "attention", _attention_flops(name, q.shape[0], 0, q.shape[1], q.shape[2], q.shape[3])
        self.events.append(Event(self.phase, name, kind, bytes_of(reads) + bytes_of(made), flops, reads, made))

    def launch(self, launch: Launch) -> None:
        """In place of `Launch.run`."""
        tensors = {name: a for name, a in launch.arguments.items() if isinstance(a, Tensor)}
        name = launch.kernel.__name__
        kind, flops = "elementwise", 0
        if launch.kernel.fn.__module__.startswith("mfkernels.attention"):
            B, N, H, d = tensors["q_ptr"].shape
            rows = tensors["o_dot_ptr"].shape[0] if "o_dot_ptr" in tensors else 0
            kind, flops = "attention", _attention_flops(name, B, rows, H, N, d)
        every = list(tensors.values())
        self.events.append(Event(self.phase, name, kind, bytes_of(every), flops, every, every, launch.arguments))


def _attention_flops(name: str, B: int, rows: int, H: int, N: int, d: int) -> int:
    if name not in PRODUCTS:
        raise LookupError(f"{name}: expected one of {', '.join(PRODUCTS)}; add how many products it computes")
    every, tangent = PRODUCTS[name]
    return 2 * H * N * N * d * (B * every + rows * tangent)


# ---------------------------------------------------------------------------------------------------------- what is run


def meter(run: Callable[[Meter], None]) -> list[Event]:
    """The launches that `run` makes within `with meter:`; the tensors that it makes are fake, on the CPU."""
    meter = Meter()
    with FakeTensorMode(), as_on_h100(run=lambda launch: meter.launch(launch)):
        run(meter)
    return meter.events


def count(way: str, block: Block) -> list[Event]:
    """The launches of one block, forward and backward."""

    def run(meter: Meter) -> None:
        B, N, D = block.batch, block.tokens, block.width
        x, c, x_dot, c_dot, dx = inputs(B, N, D)
        if way == "plain":
            forward, parameters = blocks(way, depth=1, width=D, heads=block.heads, mlp_ratio=block.mlp_ratio)
            with meter:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    out = forward(x, c, x_dot, c_dot)  # [B, N, D]
                meter.phase = "B"
                torch.autograd.grad(out, [x, c, *parameters], dx)
            return
        # a block between two others: what comes in, and what goes out, is a sum that is not written yet
        middle = DiTBlock(D, block.heads, block.mlp_ratio)
        y = torch.randn(B, N, D, dtype=torch.bfloat16, requires_grad=True)  # [B, N, D]
        gate = torch.randn(B, D, dtype=torch.bfloat16, requires_grad=True)  # [B, D]
        bias = torch.randn(D, requires_grad=True)  # [D]
        grads = [dx, *(torch.randn_like(a) for a in (y, gate, bias))]
        operands, condition = [x, y, gate], c
        if way == "meanflow":
            rows = B // TANGENT_SHARE
            dots = (x_dot, torch.randn_like(y[:rows]), torch.randn_like(gate[:rows]))
            operands = [Dual(a, a_dot) for a, a_dot in zip(operands, dots, strict=True)]
            condition = Dual(c, c_dot)
        with meter:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                stream = middle(ResidualStream(*operands, bias), condition)
            meter.phase = "B"
            outs = [primal_of(a) for a in (stream.x, stream.y, stream.gate, stream.bias)]
            torch.autograd.grad(outs, [x, y, gate, bias, c, *middle.parameters()], grads)

    return meter(run)


# ------------------------------------------------------------------------------------------------------------- the rows


def row_names(events: list[Event], way: str, block: Block) -> list[str]:
    """The row of each launch: what it is for in this project's blocks, the operator's name in the peer's."""
    named = [_name(event, way, block) for event in events]
    for i, (event, name) in enumerate(zip(events, named, strict=True)):
        if name != "cast":
            continue
        memory = [memory_of(x) for x in (event.reads if event.phase == "F" else event.writes)]
        if event.phase == "F":  # of what was made last before it
            found = (n for e, n in zip(events[:i][::-1], named[:i][::-1], strict=True) if _has(e.writes, memory))
            named[i] = f"cast after {next(found, 'the input')}"
        else:  # for what reads it
            found = (n for e, n in zip(events[i + 1 :], named[i + 1 :], strict=True) if _has(e.reads, memory))
            named[i] = f"cast before {next(found, 'the output')}"
    return [f"{event.phase} {name}" for event, name in zip(events, named, strict=True)]


def _has(tensors: list[Tensor], memory: list[int]) -> bool:
    return any(memory_of(x) in memory for x in tensors)


def _name(event: Event, way: str, block: Block) -> str:
    tensors = (*event.reads, *event.writes)
    if event.kind == "gemm":
        widths = {n for x in tensors for n in x.shape}
        if int(block.width * block.mlp_ratio) in widths:
            return "MLP GEMMs"
        return "modulation GEMMs" if 6 * block.width in widths else "qkv, proj GEMMs"
    if event.kind == "attention":
        return "attention"
    if event.name.startswith("_ada_layer_norm"):
        return "LN1" if event.arguments["y_ptr"] is None else "gate+LN2"
    if event.name in KERNELS:
        return KERNELS[event.name]
    rows = {block.batch * block.tokens, block.batch // TANGENT_SHARE * block.tokens}
    if not any((x.ndim > 2 and block.tokens in x.shape) or rows & set(x.shape) for x in tensors):
        return "on c, and casts of parameters" if event.phase == "F" else "on c, and casts of parameter gradients"
    if way == "plain":
        return event.name
    return {
        "_to_copy": "cast",
        "sum": "bias sums",
        "stack": "stack of dq dk dv",
        "add": "sum of gradients of x",
    }.get(event.name, event.name)


def summary(events: list[Event], way: str, block: Block) -> dict[str, Any]:
    """Rows in the order of their first launch, and their sums."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for event, name in zip(events, row_names(events, way, block), strict=True):
        new = {"row": name, "class": event.kind, "launches": 0, "mb": 0.0, "gflop": 0.0}
        row = rows.setdefault((name, event.kind), new)
        row["launches"] += 1
        row["mb"] += event.bytes / 1e6
        row["gflop"] += event.flops / 1e9

    def total(kind: str, key: str) -> float:
        return sum(row[key] for row in rows.values() if row["class"] == kind)

    return {
        "rows": list(rows.values()),
        "elementwise_gb": total("elementwise", "mb") / 1e3,
        "attention_gb": total("attention", "mb") / 1e3,
        "attention_gflop": total("attention", "gflop"),
        "gemm_gflop": total("gemm", "gflop"),
        "launches": sum(row["launches"] for row in rows.values()),
        "launches_by_class": {
            kind: sum(row["launches"] for row in rows.values() if row["class"] == kind)
            for kind in ("gemm", "attention", "elementwise")
        },
    }


def table(of: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> str:
    """Rows as text; with `base`, also what each has more than the row of that name there."""
    before = {row["row"]: row for row in base["rows"]} if base else {}
    lines = [("", "launches", "MB", "GF", "model ms", *(("more MB", "more GF") if base else ()))]
    for row in of["rows"]:
        model = row["gflop"] * 1e12 / TENSOR_FLOPS if row["class"] == "gemm" else row["mb"] * 1e9 / BANDWIDTH
        gemm, name = row["class"] == "gemm", row["row"]
        more = [row[key] - before.get(name, {}).get(key, 0.0) for key in ("mb", "gflop")] if base else []
        lines.append(
            (
                name,
                str(row["launches"]),
                "" if gemm else f"{row['mb']:.0f}",
                f"{row['gflop']:.0f}" if row["gflop"] else "",
                "" if row["class"] == "attention" else f"{model:.2f}",
                *(f"{x:.0f}" if round(x) else "" for x in more),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    asked = parser.parse_args()
    block = Block(asked.batch, asked.tokens, asked.width, asked.heads)
    found = {way: summary(count(way, block), way, block) for way in WAYS}
    for way, of in found.items():
        print(f"\n{way}: {of['launches']} launches, {of['elementwise_gb']:.2f} GB elementwise, ", end="")
        print(
            f"{of['attention_gb']:.2f} GB and {of['attention_gflop']:.0f} GF attention, {of['gemm_gflop']:.0f} GF GEMMs"
        )
        print(table(of, found["flow_matching"] if way == "meanflow" else None))
    print("\nmodel ms: GF at 650 TFLOP/s for GEMMs, MB at 2.55 TB/s for elementwise launches; nothing was timed")
    if asked.json is not None:
        from conftest import environment

        whole = {
            "environment": environment(),
            "block": vars(block),
            **found["flow_matching"],
            **{way: found[way] for way in WAYS if way != "flow_matching"},
        }
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
