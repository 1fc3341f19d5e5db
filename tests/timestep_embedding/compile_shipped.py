"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

from functools import partial

import torch
from ahead_of_time import meta, print_reports

from mfkernels.launch import Launch, find_config
from mfkernels.timestep_embedding.kernels import backward_launch, forward_launch

B, B_t = 256, 64
float32 = partial(meta, dtype=torch.float32)


def forward(arch: str, dim: int) -> Launch:
    config = find_config("timestep_embedding", arch, torch.float32, width=dim)
    return forward_launch(float32(B), float32(B_t), float32(B, dim), float32(B_t, dim), max_period=1e4, config=config)


def backward(arch: str, dim: int) -> Launch:
    config = find_config("timestep_embedding", arch, torch.float32, width=dim)
    return backward_launch(float32(B, dim), float32(B), float32(B), max_period=1e4, config=config)


if __name__ == "__main__":
    launches = {"timestep_embedding_forward": forward, "timestep_embedding_backward": backward}
    print_reports(launches, widths=(256, 1152, 2730))
