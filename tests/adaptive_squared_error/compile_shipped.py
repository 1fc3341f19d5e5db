"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

from functools import partial

import torch
from ahead_of_time import meta, print_reports

from mfkernels.adaptive_squared_error.kernels import backward_launch, finish_launch, forward_launch
from mfkernels.launch import Launch, find_config

DTYPE = torch.bfloat16
B, B_t = 8, 2
float32 = partial(meta, dtype=torch.float32)


def forward(arch: str, size: int) -> Launch:
    config = find_config("adaptive_squared_error", arch, DTYPE)
    return forward_launch(
        meta(B, size),
        meta(B, size),
        meta(B_t, size),
        float32(B),
        meta(B, size),
        float32(B),
        float32(B),
        float32(B),
        None if size <= config["CHUNK"] else float32(B, -(-size // config["CHUNK"])),
        p=0.75,
        eps=0.01,
        config=config,
    )


def finish(arch: str, size: int) -> Launch:
    return finish_launch(float32(B, -(-size // 16384)), float32(B), float32(B), float32(B), p=0.75, eps=0.01)


def backward(arch: str, size: int) -> Launch:
    config = find_config("adaptive_squared_error", arch, DTYPE)
    return backward_launch(float32(B), meta(B, size), float32(B), meta(B, size), config=config)


if __name__ == "__main__":
    launches = {"forward": forward, "finish": finish, "backward": backward}
    launches = {f"adaptive_squared_error_{name}": launch for name, launch in launches.items()}
    print_reports(launches, widths=(4 * 32 * 32, 3 * 256 * 256))
