"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

import torch
from ahead_of_time import print_reports

from mfkernels.launch import Launch, find_config
from mfkernels.meanflow_loss.kernels import backward_launch, finish_launch, forward_launch

DTYPE = torch.bfloat16
B, B_t = 8, 2


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def images(rows: int, size: int) -> torch.Tensor:
    return meta(rows, size, dtype=DTYPE)


def forward(arch: str, size: int) -> Launch:
    config = find_config("meanflow_loss", arch, DTYPE)
    return forward_launch(
        images(B, size),
        images(B_t, size),
        images(B, size),
        meta(B),
        meta(B),
        images(B, size),
        meta(B),
        meta(B),
        meta(B),
        None if size <= config["CHUNK"] else meta(B, -(-size // config["CHUNK"])),
        norm_p=0.75,
        norm_eps=0.01,
        config=config,
    )


def finish(arch: str, size: int) -> Launch:
    return finish_launch(meta(B, -(-size // 16384)), meta(B), meta(B), meta(B), norm_p=0.75, norm_eps=0.01)


def backward(arch: str, size: int) -> Launch:
    config = find_config("meanflow_loss", arch, DTYPE)
    return backward_launch(meta(B), images(B, size), meta(B), images(B, size), config=config)


if __name__ == "__main__":
    launches = {"meanflow_loss_forward": forward, "meanflow_loss_finish": finish, "meanflow_loss_backward": backward}
    print_reports(launches, widths=(4 * 32 * 32, 3 * 256 * 256))
