"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

import torch
from ahead_of_time import print_reports

from mfkernels.ada_layer_norm.kernels import backward_launch, forward_launch
from mfkernels.launch import Launch, find_config

DTYPE = torch.bfloat16
B, B_t, N = 8, 2, 256


def meta(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward(arch: str, D: int, residual: bool) -> Launch:
    def stream(rows: int) -> torch.Tensor:
        return meta(rows, N, D)

    shift, scale, gate = meta(B, 6 * D).chunk(6, dim=1)[:3]
    shift_dot, scale_dot, gate_dot = meta(B_t, 6 * D).chunk(6, dim=1)[:3]
    return forward_launch(
        stream(B),
        stream(B) if residual else None,
        gate if residual else None,
        shift,
        scale,
        stream(B_t),
        stream(B_t) if residual else None,
        gate_dot if residual else None,
        shift_dot,
        scale_dot,
        stream(B) if residual else None,
        stream(B),
        stream(B_t) if residual else None,
        stream(B_t),
        meta(B, N, 2, dtype=torch.float32),
        eps=1e-6,
        config=find_config("ada_layer_norm_forward", arch, DTYPE, width=D),
    )


def backward(arch: str, D: int, residual: bool) -> Launch:
    config = find_config("ada_layer_norm_backward", arch, DTYPE, width=D)
    scale, gate = meta(B, 6 * D).chunk(6, dim=1)[:2]
    return backward_launch(
        meta(B, N, D),
        meta(B, N, D) if residual else None,
        meta(B, N, D),
        meta(B, N, D) if residual else None,
        gate if residual else None,
        scale,
        meta(B, N, 2, dtype=torch.float32),
        meta(B, N, D),
        meta(B, N, D) if residual else None,
        meta(3 if residual else 2, B, N // config["CHUNK"], D, dtype=torch.float32),
        config=config,
    )


if __name__ == "__main__":
    print_reports(
        {
            "ada_layer_norm_forward": lambda arch, D: forward(arch, D, residual=False),
            "gated_residual_ada_layer_norm_forward": lambda arch, D: forward(arch, D, residual=True),
            "ada_layer_norm_backward": lambda arch, D: backward(arch, D, residual=False),
            "gated_residual_ada_layer_norm_backward": lambda arch, D: backward(arch, D, residual=True),
        }
    )
