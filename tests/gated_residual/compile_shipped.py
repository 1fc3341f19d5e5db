"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

import torch
from ahead_of_time import meta, print_reports

from mfkernels.gated_residual.kernels import backward_launch, forward_launch
from mfkernels.launch import Launch, find_config

DTYPE = torch.bfloat16
B, B_t, N = 8, 2, 256


def forward(arch: str, D: int) -> Launch:
    return forward_launch(
        meta(B, N, D),
        meta(B, N, D),
        meta(B, 6 * D).chunk(6, dim=1)[2],
        meta(B_t, N, D),
        meta(B_t, N, D),
        meta(B_t, 6 * D).chunk(6, dim=1)[2],
        meta(B, N, D),
        meta(B_t, N, D),
        config=find_config("gated_residual_forward", arch, DTYPE, width=D),
    )


def backward(arch: str, D: int) -> Launch:
    config = find_config("gated_residual_backward", arch, DTYPE, width=D)
    return backward_launch(
        meta(B, N, D),
        meta(B, N, D),
        meta(B, 6 * D).chunk(6, dim=1)[2],
        meta(B, N, D),
        meta(B, N // config["CHUNK"], D, dtype=torch.float32),
        config=config,
    )


if __name__ == "__main__":
    print_reports({"gated_residual_forward": forward, "gated_residual_backward": backward})
