"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

import torch
from ahead_of_time import meta, print_reports

from mfkernels.launch import Launch, find_config
from mfkernels.mlp.kernels import backward_launch, forward_launch

DTYPE = torch.bfloat16
M, M_t = 2048, 512


def forward(arch: str, H: int) -> Launch:
    config = find_config("gelu_forward", arch, DTYPE, width=H)
    return forward_launch(meta(M, H), meta(H), meta(M_t, H), meta(M, H), meta(M_t, H), config=config)


def tangent(arch: str, H: int) -> Launch:
    config = find_config("gelu_forward", arch, DTYPE, width=H)
    return forward_launch(meta(M_t, H), None, meta(M_t, H), None, meta(M_t, H), config=config)


def backward(arch: str, H: int) -> Launch:
    config = find_config("gelu_backward", arch, DTYPE, width=H)
    partials = meta(1, M // config["CHUNK"], H, dtype=torch.float32)
    return backward_launch(meta(M, H), meta(H), meta(M, H), meta(M, H), meta(M, H), partials, config=config)


if __name__ == "__main__":
    print_reports(
        {"gelu_forward": forward, "gelu_forward, the tangent alone": tangent, "gelu_backward": backward},
        widths=(4 * 768, 4 * 1152, 2730),
    )
