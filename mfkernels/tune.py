"""Measure launch configurations on this machine's GPU: `python -m mfkernels.tune`.

Writes the fastest of each problem into the user's table (`mfkernels.launch.user_table`), which lies over the package's.
Nothing else in the library ever measures: a training step never tunes behind its user's back.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mfkernels.attention.limits import MAX_HEAD_DIM
from mfkernels.launch import Config, Launch, clear_cache, read_table, triton_minor, user_table

# Largest difference from the first candidate's result, in norms, that rounding in another order explains.
AGREEMENT = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Problem:
    """One row to be found: its conditions, the candidates, the launch that each makes and the results it writes."""

    op: str
    conditions: Mapping[str, str | int]
    candidates: Sequence[Config]
    launch: Callable[[Config], Launch]
    results: Sequence[torch.Tensor]


def config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


FORWARD_CANDIDATES = [
    config(128, 64, 8, 2),
    config(128, 64, 8, 3),
    config(128, 128, 8, 2),
    config(128, 128, 8, 3),
    config(128, 64, 4, 2),
    config(128, 32, 8, 2),
    config(128, 32, 8, 3),
    config(64, 64, 4, 2),
    config(64, 64, 4, 3),
    config(64, 32, 4, 2),
    config(64, 32, 8, 2),
    config(32, 32, 4, 2),
]
BACKWARD_CANDIDATES = [
    config(64, 64, 4, 2),
    config(64, 64, 8, 2),
    config(128, 64, 8, 2),
    config(128, 64, 8, 3),
    config(64, 128, 8, 2),
    config(64, 128, 8, 3),
    config(32, 128, 8, 2),
    config(32, 64, 4, 2),
    config(32, 64, 8, 2),
    config(128, 32, 8, 2),
    config(64, 32, 4, 2),
    config(32, 32, 4, 2),
]


def attention_problems(
    head_dim: int,
    tokens: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    bounds: Mapping[str, int],
) -> Iterator[Problem]:
    """Forward with and without tangents, and the two backward kernels, on packed qkv buffers.

    To be run in this order: the backward reads what the forward before it wrote.
    """
    from mfkernels.attention.backward_kernels import dkdv_launch, dq_launch
    from mfkernels.attention.kernels import forward_launch

    heads = 16
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    q, k, v = random(batch, tokens, 3, heads, head_dim).unbind(2)  # [B, N, H, D]
    q_dot, k_dot, v_dot = random(batch, tokens, 3, heads, head_dim).unbind(2)  # [B, N, H, D]
    o, o_dot, do, dq, dk, dv = (torch.empty_like(q).contiguous() for _ in range(6))  # [B, N, H, D]
    do.copy_(random(*do.shape))
    lse, delta = (torch.empty((batch, heads, tokens), device=device) for _ in range(2))  # [B, H, N]
    options: dict[str, Any] = {"scale": head_dim**-0.5, "causal": False, "precision": "ieee"}

    yield Problem(
        op="attention_forward",
        conditions=bounds,
        candidates=FORWARD_CANDIDATES,
        launch=lambda config: forward_launch(q, k, v, q_dot, k_dot, v_dot, o, o_dot, lse, **options, config=config),
        results=(o, o_dot),
    )
    yield Problem(
        op="attention_forward_primal",
        conditions=bounds,
        candidates=FORWARD_CANDIDATES,
        launch=lambda config: forward_launch(q, k, v, None, None, None, o, None, lse, **options, config=config),
        results=(o,),
    )
    yield Problem(
        op="attention_backward_dq",
        conditions=bounds,
        candidates=BACKWARD_CANDIDATES,
        launch=lambda config: dq_launch(do, q, k, v, o, lse, delta, dq, **options, config=config),
        results=(dq,),
    )
    yield Problem(
        op="attention_backward_dkdv",
        conditions=bounds,
        candidates=BACKWARD_CANDIDATES,
        launch=lambda config: dkdv_launch(do, q, k, v, lse, delta, dk, dv, **options, config=config),
        results=(dk, dv),
    )


def measure(problem: Problem) -> tuple[Config, float] | None:
    """The fastest candidate that runs and agrees with the first that ran, and its milliseconds."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    expected: list[torch.Tensor] | None = None
    best: tuple[Config, float] | None = None
    for candidate in problem.candidates:
        launch = problem.launch(candidate)
        try:
            launch.run()
        except (OutOfResources, CompilationError, PTXASError) as error:
            print(f"  {candidate}: {type(error).__name__}")
            continue
        if expected is None:
            expected = [x.clone() for x in problem.results]
        elif not all(map(_agree, problem.results, expected)):
            print(f"  {candidate}: its result differs, so it is not taken; please report this")
            continue
        milliseconds = float(do_bench(launch.run, return_mode="median"))
        print(f"  {candidate}: {milliseconds:.4f} ms")
        if best is None or milliseconds < best[1]:
            best = candidate, milliseconds
    return best


def _agree(out: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = (out.float() - expected.float()).norm()
    return bool(difference <= AGREEMENT[out.dtype] * expected.float().norm())


def merge(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of both; a new row replaces an old one of the same op and conditions."""

    def key(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in ("config", "milliseconds")}

    replaced = [key(row) for row in new]
    return [row for row in old if key(row) not in replaced] + list(new)


def ranges(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The sizes that each measured size speaks for: down to the next smaller one, the smallest for itself alone."""
    ordered = sorted(set(sizes))
    return [(low + 1, high) for low, high in zip([ordered[0] - 1, *ordered], ordered, strict=False)]


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the table in one step, so that an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(list(rows), indent=1) + "\n")
    new.replace(path)
    clear_cache()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mfkernels.tune", description="Measure launch configurations on this GPU."
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 72, 128], metavar="D")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096], metavar="N")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    arguments = parser.parse_args(argv)
    path = user_table()
    try:
        table = read_table(path)  # now, not after hours of measuring
        if any(d % 8 != 0 or not 8 <= d <= MAX_HEAD_DIM for d in arguments.head_dims):
            raise ValueError(f"--head-dims: expected multiples of 8 up to {MAX_HEAD_DIM}, got {arguments.head_dims}")
        if min(arguments.tokens) < 1:
            raise ValueError(f"--tokens: expected at least 1, got {arguments.tokens}")
        if not torch.cuda.is_available():
            raise ValueError("it measures on a GPU, and torch.cuda.is_available() is False here")
    except ValueError as error:
        print(f"mfkernels.tune: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    machine = {"arch": f"sm_{major}{minor}", "triton": triton_minor(), "dtype": arguments.dtype}
    measured = 0
    for least_head_dim, head_dim in ranges(arguments.head_dims):
        for least, n in ranges(arguments.tokens):
            bounds = {
                "min_head_dim": least_head_dim,
                "max_head_dim": head_dim,
                "min_tokens": least,
                "max_tokens": n,
            }
            batch = max(1, 65536 // n)
            dtype = getattr(torch, arguments.dtype)
            for problem in attention_problems(head_dim, n, batch, dtype, device, bounds):
                print(f"{problem.op} head_dim={head_dim} tokens={n}")
                best = measure(problem)
                if best is not None:
                    row = {
                        "op": problem.op,
                        **machine,
                        **problem.conditions,
                        "config": dict(best[0]),
                        "milliseconds": round(best[1], 4),
                    }
                    table = merge(table, [row])
                    write_table(path, table)  # after each: an interrupted run keeps what it measured
                    measured += 1
    print(f"wrote {measured} rows to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
