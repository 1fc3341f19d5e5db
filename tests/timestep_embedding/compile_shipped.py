"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

import torch
from ahead_of_time import print_reports

from mfkernels.launch import Launch, find_config
from mfkernels.timestep_embedding.kernels import backward_launch, forward_launch

B, B_t = 256, 64


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def forward(arch: str, dim: int) -> Launch:
    config = find_config("timestep_embedding", arch, torch.float32, width=dim)
    return forward_launch(meta(B), meta(B_t), meta(B, dim), meta(B_t, dim), max_period=1e4, config=config)


def backward(arch: str, dim: int) -> Launch:
    config = find_config("timestep_embedding", arch, torch.float32, width=dim)
    return backward_launch(meta(B, dim), meta(B), meta(B), max_period=1e4, config=config)


if __name__ == "__main__":
    launches = {"timestep_embedding_forward": forward, "timestep_embedding_backward": backward}
    print_reports(launches, widths=(256, 1152, 2730))
