"""The CUDA kernels against float64 on shapes that are multiples of nothing; also what compute-sanitizer runs.

timeout 120 python bench/attention/ragged.py --json FILE      # all cases; a table, and the figures after every row
compute-sanitizer --tool racecheck python bench/attention/ragged.py --only 6
python bench/attention/ragged.py --emulator                   # a few small cases without a GPU, as the tests run them

A case that is wrong or raises does not end it. An error that ends the process's use of the GPU (an illegal address, a
trap of the watchdog) does: the cases after it are "not run". Exit code: 0 if all cases are right, else 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "attention"))  # cuda_emulator
sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest

from conftest import write

from mfkernels import extension
from mfkernels.attention import cuda

TABLE = "Attention forward on ragged shapes"


class Shape(NamedTuple):
    B: int
    B_t: int  # batch rows with a tangent
    N_q: int
    N_kv: int
    H: int
    H_kv: int
    causal: bool = False


SHAPES = [
    Shape(1, 1, 1, 17, 1, 1),
    Shape(2, 0, 65, 33, 1, 1, causal=True),
    Shape(1, 1, 64, 300, 2, 1),  # the second warpgroup has no queries
    Shape(3, 1, 131, 277, 4, 2),
    Shape(2, 2, 277, 131, 2, 2, causal=True),
    Shape(2, 1, 256, 256, 2, 2),  # nothing is missing
    Shape(1, 1, 130, 1030, 4, 1),
    Shape(24, 12, 257, 300, 16, 4),  # more work than multiprocessors: blocks go on to a second and a third
    Shape(24, 12, 257, 300, 16, 4, causal=True),
]
IN_EMULATOR = SHAPES[:3]
# Twice those of tests/attention/test_cuda_kernels.py: they were measured in the emulator, whose exp2 is exact to a
# rounding and whose products round where the tensor cores cut off.
BOUND = {torch.float16: 1.16e-3, torch.bfloat16: 9.2e-3}
LSE_BOUND = 2.4e-7


class Case(NamedTuple):
    shape: Shape
    dtype: torch.dtype
    d: int


class Result(NamedTuple):
    """Relative errors (None: not computed), the largest as a part of its bound, and "ok" or what is wrong."""

    o: float | None
    o_dot: float | None
    lse: float | None
    of_bound: float | None
    verdict: str


# --------------------------------------------------------------------------------------------------------- one case


def oracle(
    primals: list[Tensor], dots: list[Tensor] | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """o [B, N_q, H, d], o_dot [B_t, N_q, H, d] and lse [B, H, N_q] in float64."""
    group = primals[0].shape[2] // primals[1].shape[2]

    def heads(x: Tensor) -> Tensor:
        return x.double().transpose(1, 2)  # [B, H, N, d]

    def kv_heads(x: Tensor) -> Tensor:
        return heads(x).repeat_interleave(group, 1)  # [B, H, N_kv, d]

    q, k, v = heads(primals[0]), kv_heads(primals[1]), kv_heads(primals[2])
    s = scale * q @ k.mT  # [B, H, N_q, N_kv]
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
    p, lse = s.softmax(-1), s.logsumexp(-1)
    o = (p @ v).transpose(1, 2)
    if dots is None:
        return o, None, lse
    q_dot, k_dot, v_dot = heads(dots[0]), kv_heads(dots[1]), kv_heads(dots[2])
    q, k, v, p = (x[: q_dot.shape[0]] for x in (q, k, v, p))
    s_dot = scale * (q_dot @ k.mT + q @ k_dot.mT)  # [B_t, H, N_q, N_kv]
    p_dot = p * (s_dot - (p * s_dot).sum(-1, keepdim=True))
    return o, (p_dot @ v + p @ v_dot).transpose(1, 2), lse


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def measure(case: Case, device: torch.device) -> Result:
    B, B_t, N_q, N_kv, H, H_kv, causal = case.shape
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(N_q, H, case.d), (N_kv, H_kv, case.d), (N_kv, H_kv, case.d)]

    def draw(rows: int) -> list[Tensor]:
        return [torch.randn(rows, *size, generator=generator, device=device).to(case.dtype) for size in sizes]

    primals, dots = draw(B), draw(B_t) if B_t else None
    scale = case.d**-0.5
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN: what the kernel does not write shows
    try:
        o, o_dot, lse = cuda.attention_forward(*primals, *(dots or [None] * 3), scale=scale, causal=causal)
    finally:
        torch.use_deterministic_algorithms(False)
    if device.type == "cuda":
        torch.cuda.synchronize()  # the kernel's errors are its own case's
    ref, ref_dot, ref_lse = oracle(primals, dots, scale, causal)
    errors = [relative_error(o, ref), relative_error(lse, ref_lse)]
    ratios = [errors[0] / BOUND[case.dtype], errors[1] / LSE_BOUND]
    error_dot = None
    if ref_dot is not None:
        error_dot = math.nan if o_dot is None else relative_error(o_dot, ref_dot)
        ratios.append(error_dot / BOUND[case.dtype])
    worst = math.nan if any(math.isnan(ratio) for ratio in ratios) else max(ratios)
    return Result(errors[0], error_dot, errors[1], worst, "ok" if worst <= 1 else "WRONG")


# -------------------------------------------------------------------------------------------------------- all of them


def usable(device: torch.device) -> bool:
    """False after an error that lasts as long as the process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def as_row(case: Case, result: Result) -> dict[str, object]:
    shape = "×".join(map(str, case.shape[:-1]))
    row: dict[str, object] = {
        "table": TABLE,
        "dtype": str(case.dtype).removeprefix("torch."),
        "d": case.d,
        "B×B_t×N_q×N_kv×H×H_kv": shape,
        "causal": case.shape.causal,
    }
    names = {"o": "error of o", "o_dot": "error of o_dot", "lse": "error of lse", "of_bound": "error/bound"}
    for field, value in result._asdict().items():
        finite = not isinstance(value, float) or math.isfinite(value)
        row[names.get(field, field)] = value if finite else str(value)  # JSON has neither NaN nor infinity
    return row


WIDTHS = (8, 3, 22, 6, 10, 14, 12, 11)


def print_line(cells: list[object]) -> None:
    texts = ["-" if cell is None else f"{cell:.2g}" if isinstance(cell, float) else str(cell) for cell in cells]
    padded = [text.ljust(width) for text, width in itertools.zip_longest(texts, WIDTHS, fillvalue=0)]
    print("| " + " | ".join(padded) + " |", flush=True)


def print_row(row: dict[str, object]) -> None:
    print_line([value for name, value in row.items() if name != "table"])


NOTHING = Result(None, None, None, None, "not run")


def run(cases: list[Case], device: torch.device, path: Path | None) -> list[Result]:
    results: list[Result] = []
    print_line([name for name in as_row(cases[0], NOTHING) if name != "table"])
    for case in cases:
        try:
            result = measure(case, device)
            alive = True
        except Exception as error:
            result = NOTHING._replace(verdict=first_line(error))
            alive = usable(device)
        results.append(result)
        print_row(as_row(case, result))
        if not alive:
            results += [NOTHING] * (len(cases) - len(results))
            print("after this error the process cannot use the GPU: the cases that are left are not run", flush=True)
        if path is not None:
            write(path, [as_row(*pair) for pair in zip(cases, results, strict=False)])
        if not alive:
            break
    return results


def emulate() -> None:
    """The extension's functions in the emulator, on CPU tensors."""
    import cuda_emulator

    if cuda_emulator.find_compiler() is None:
        raise SystemExit("no C++ compiler (c++) for the emulator")
    compiled = cuda_emulator.extension()
    cuda_emulator.configure()
    extension.load = lambda: compiled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file after every row")
    parser.add_argument("--only", type=int, metavar="N", help="N of the cases, drawn with a fixed seed")
    parser.add_argument("--head-dims", type=int, nargs="+", default=cuda.HEAD_DIMS, choices=cuda.HEAD_DIMS)
    parser.add_argument("--emulator", action="store_true", help="the smallest shapes, in the emulator")
    arguments = parser.parse_args()
    if arguments.emulator:
        device = torch.device("cpu")
        emulate()
    else:
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --emulator needs none")
        device = torch.device("cuda", torch.cuda.current_device())
        why_not = cuda.unavailable(device)
        if why_not is not None:
            raise SystemExit(why_not)
    shapes = IN_EMULATOR if arguments.emulator else SHAPES
    cases = [Case(*case) for case in itertools.product(shapes, BOUND, arguments.head_dims)]
    if arguments.only is not None:
        chosen = random.Random(0).sample(range(len(cases)), min(max(arguments.only, 1), len(cases)))
        cases = [cases[i] for i in sorted(chosen)]
    results = run(cases, device, arguments.json)
    right = sum(result.verdict == "ok" for result in results)
    not_run = sum(result.verdict == "not run" for result in results)
    worst = max((r.of_bound for r in results if r.of_bound is not None), default=math.nan)
    print(f"{right} of {len(results)} cases right, {len(results) - right - not_run} wrong, {not_run} not run; ", end="")
    print(f"the largest error is {worst:.2f} of its bound")
    return 0 if right == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
