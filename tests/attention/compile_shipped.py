"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

import json

import torch
from ahead_of_time import meta, report_of

from mfkernels.attention.backward_kernels import dkdv_launch, dq_launch
from mfkernels.attention.kernels import forward_launch
from mfkernels.launch import Launch, find_config

B, B_t, H = 4, 2, 16
FORWARD, PRIMAL = "attention_forward", "attention_forward_primal"
DQ, DKDV = "attention_backward_dq", "attention_backward_dkdv"
PACKED = " of a packed qkv"  # whose gradient is one buffer, with the sums for its bias
TF32 = " in tf32"  # of float32; all others are of bfloat16

# op, head dim, tokens, causal
SM_90 = [(op, D, 1024, False) for op in (FORWARD, PRIMAL, DQ, DKDV) for D in (8, 24, 64, 72, 80, 128, 256)]
SM_90 += [(op + PACKED, D, 1024, False) for op in (DQ, DKDV) for D in (64, 72, 80, 128)]
SM_90 += [(FORWARD, D, N, causal) for D in (64, 72, 128) for N, causal in ((276, False), (1024, True), (64, False))]
SM_90 += [(PRIMAL, D, 64, False) for D in (64, 72)]
SM_90 += [(op + TF32, D, 1024, False) for op in (FORWARD, PRIMAL, DQ, DKDV) for D in (64, 72, 128)]
OTHERS = [(op, D, 1024, False) for op in (FORWARD, DQ, DKDV) for D in (64, 72, 128, 256)]
OTHERS += [(op + PACKED, D, 1024, False) for op in (DQ, DKDV) for D in (64, 72, 128)]
OTHERS += [(op + TF32, 72, 1024, False) for op in (FORWARD, PRIMAL, DQ, DKDV)]
CASES = {"sm_90": SM_90, "sm_80": OTHERS, "sm_100": OTHERS}


def meta_launch(op: str, D: int, N: int, causal: bool, arch: str) -> Launch:
    """The launch as a packed qkv buffer gives it, without memory."""
    dtype, precision = (torch.float32, "tf32") if TF32 in op else (torch.bfloat16, "ieee")
    kernel = op.removesuffix(TF32).removesuffix(PACKED)
    sizes = {"head_dim": D, "tokens": N, "packed": int(PACKED in op)}

    def packed(batch: int) -> tuple[torch.Tensor, ...]:
        return meta(batch, N, 3, H, D, dtype=dtype).unbind(2)

    def plain(batch: int) -> torch.Tensor:
        return meta(batch, N, H, D, dtype=dtype)

    row = meta(B, H, N, dtype=torch.float32)
    q, k, v = packed(B)
    options = {
        "scale": D**-0.5,
        "causal": causal,
        "precision": precision,
        "config": find_config(kernel, arch, dtype, precision=precision, **sizes),
    }
    if kernel == FORWARD:
        return forward_launch(q, k, v, *packed(B_t), plain(B), plain(B_t), row, **options)
    if kernel == PRIMAL:
        return forward_launch(q, k, v, None, None, None, plain(B), None, row, **options)
    dq, dk, dv, partials = plain(B), plain(B), plain(B), None
    if PACKED in op:
        dq, dk, dv = packed(B)
        partials = meta(B, N // 64, 3, H, D, dtype=torch.float32)
    if kernel == DQ:
        return dq_launch(plain(B), q, k, v, plain(B), row, row, dq, partials, **options)
    return dkdv_launch(plain(B), q, k, v, row, row, dk, dv, partials, **options)


def main() -> None:
    reports = []
    for arch, cases in CASES.items():
        for op, D, N, causal in cases:
            launch = meta_launch(op, D, N, causal, arch)
            reports.append(report_of(launch, arch, op=op, head_dim=D, tokens=N, causal=causal))
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
