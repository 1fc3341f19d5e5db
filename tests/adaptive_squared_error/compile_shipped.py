"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

import torch
from ahead_of_time import print_reports

from mfkernels.adaptive_squared_error.kernels import backward_launch, finish_launch, forward_launch
from mfkernels.launch import Launch, find_config

DTYPE = torch.bfloat16
B, B_t = 8, 2


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def samples(rows: int, size: int) -> torch.Tensor:
    return meta(rows, size, dtype=DTYPE)


def forward(arch: str, size: int) -> Launch:
    config = find_config("adaptive_squared_error", arch, DTYPE)
    return forward_launch(
        samples(B, size),
        samples(B, size),
        samples(B_t, size),
        meta(B),
        samples(B, size),
        meta(B),
        meta(B),
        meta(B),
        None if size <= config["CHUNK"] else meta(B, -(-size // config["CHUNK"])),
        p=0.75,
        eps=0.01,
        config=config,
    )


def finish(arch: str, size: int) -> Launch:
    return finish_launch(meta(B, -(-size // 16384)), meta(B), meta(B), meta(B), p=0.75, eps=0.01)


def backward(arch: str, size: int) -> Launch:
    config = find_config("adaptive_squared_error", arch, DTYPE)
    return backward_launch(meta(B), samples(B, size), meta(B), samples(B, size), config=config)


if __name__ == "__main__":
    launches = {"forward": forward, "finish": finish, "backward": backward}
    launches = {f"adaptive_squared_error_{name}": launch for name, launch in launches.items()}
    print_reports(launches, widths=(4 * 32 * 32, 3 * 256 * 256))
