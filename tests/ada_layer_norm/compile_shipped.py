"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

from functools import partial

import torch
from ahead_of_time import meta, print_reports

from mfkernels.ada_layer_norm.kernels import Tangents, Update, backward_launch, forward_launch
from mfkernels.launch import Launch, find_config

DTYPE = torch.bfloat16
B, B_t, N = 8, 2, 256


def forward(arch: str, D: int, *, update: bool = False, base: bool = False, defer: bool = False) -> Launch:
    def stream(rows: int) -> torch.Tensor:
        return meta(rows, N, D)

    bias = meta(D, dtype=torch.float32)
    shift, scale, gate = meta(B, 6 * D).chunk(6, dim=1)[:3]
    shift_dot, scale_dot, gate_dot = meta(B_t, 6 * D).chunk(6, dim=1)[:3]
    return forward_launch(
        stream(B),
        Update(stream(B), gate, bias) if update else None,
        Update(stream(B), gate, bias) if base else None,
        shift,
        scale,
        Tangents(
            stream(B_t),
            stream(B_t) if update else None,
            gate_dot if update else None,
            shift_dot,
            scale_dot,
        ),
        (meta(1, 1, 1) if defer else stream(B)) if update else None,
        stream(B),
        stream(B_t) if update else None,
        stream(B_t),
        meta(B, N, 2, dtype=torch.float32),
        eps=1e-6,
        config=find_config("ada_layer_norm_forward", arch, DTYPE, width=D),
    )


def backward(arch: str, D: int, *, update: bool = False, deferred: bool = False) -> Launch:
    config = find_config("ada_layer_norm_backward", arch, DTYPE, width=D)
    scale, gate = meta(B, 6 * D).chunk(6, dim=1)[:2]
    return backward_launch(
        meta(B, N, D),
        meta(B, N, D) if update else None,
        meta(B, N, D),
        Update(meta(B, N, D), gate, meta(D, dtype=torch.float32)) if update else None,
        scale,
        meta(B, N, 2, dtype=torch.float32),
        meta(B, N, D),
        meta(B, N, D) if update else None,
        meta(4 if update else 2, B, N // config["CHUNK"], D, dtype=torch.float32),
        deferred=deferred,
        config=config,
    )


if __name__ == "__main__":
    print_reports(
        {
            "ada_layer_norm_forward": forward,
            "gated_residual_ada_layer_norm_forward": partial(forward, update=True),
            "deferred_forward": partial(forward, update=True, defer=True),
            "second_update_forward": partial(forward, update=True, base=True),
            "ada_layer_norm_backward": backward,
            "gated_residual_ada_layer_norm_backward": partial(backward, update=True),
            "deferred_backward": partial(backward, update=True, deferred=True),
        }
    )
