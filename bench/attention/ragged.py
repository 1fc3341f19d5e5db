"""The CUDA kernels on shapes that are multiples of nothing: for compute-sanitizer, and as a first sign of life.

timeout 60 python bench/attention/ragged.py
compute-sanitizer --tool racecheck python bench/attention/ragged.py
"""

from __future__ import annotations

import importlib

import torch

from mfkernels.attention import reference

cuda = importlib.import_module("mfkernels.attention.cuda")  # mfkernels.attention is the function

# B, B_t, N_q, N_kv, H, H_kv, causal
SHAPES = [
    (1, 1, 1, 17, 1, 1, False),
    (3, 1, 131, 277, 4, 2, False),
    (2, 2, 277, 131, 2, 2, True),
    (2, 0, 65, 33, 1, 1, True),
    (24, 12, 257, 300, 16, 4, False),  # more work than multiprocessors: blocks go on to a second and a third
    (24, 12, 257, 300, 16, 4, True),
]
BOUND = {torch.float16: 1.2e-3, torch.bfloat16: 1e-2}  # twice the tests': the reference here is float32's


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    why_not = cuda.unavailable(device)
    if why_not is not None:
        raise SystemExit(why_not)
    worst = 0.0
    for dtype, bound in BOUND.items():
        for d in cuda.HEAD_DIMS:
            for B, B_t, N_q, N_kv, H, H_kv, causal in SHAPES:
                sizes = [(N_q, H, d), (N_kv, H_kv, d), (N_kv, H_kv, d)]
                primals = [torch.randn(B, *size, device=device).to(dtype) for size in sizes]
                dots = [torch.randn(B_t, *size, device=device).to(dtype) if B_t else None for size in sizes]
                o, o_dot, _ = cuda.attention_forward(*primals, *dots, scale=d**-0.5, causal=causal)
                wide = [x.float() for x in primals]
                pairs = [(o, reference.attention(*wide, d**-0.5, causal))]
                if o_dot is not None:
                    wide_dots = [x.float() for x in dots if x is not None]
                    few = [x[:B_t] for x in wide]
                    pairs.append((o_dot, reference.attention_tangent(*few, *wide_dots, d**-0.5, causal)))
                for got, expected in pairs:
                    error = ((got.float() - expected).norm() / expected.norm()).item()
                    assert error < bound, (dtype, d, B, B_t, N_q, N_kv, H, H_kv, causal, error)
                    worst = max(worst, error / bound)
    calls = 2 * len(cuda.HEAD_DIMS) * len(SHAPES)
    print(f"{calls} calls agree with float32; the largest error is {worst:.2f} of its bound")


if __name__ == "__main__":
    main()
