"""Run by test_compile.py: what ptxas makes of the shipped configurations, as JSON."""

import torch
from ahead_of_time import meta, print_reports

from mfkernels.launch import Launch, find_config
from mfkernels.layer_scale_residual import kernels as layer_scale
from mfkernels.rms_norm import kernels as rms_norm
from mfkernels.rotary import backward_kernels as rotary_backward
from mfkernels.rotary import kernels as rotary
from mfkernels.swiglu import kernels as swiglu

DTYPE = torch.bfloat16
R, R_t = 4096, 1024
B, B_t, N, H = 16, 4, 276, 16
HEAD_DIMS = {768: 64, 1152: 72, 2730: 128}  # the three head dims that matter, by the width they are reported under


def rms_norm_forward(arch: str, D: int) -> Launch:
    config = find_config("rms_norm_forward", arch, DTYPE, width=D)
    return rms_norm.forward_launch(meta(R, D), meta(R_t, D), meta(D), meta(R, D), meta(R_t, D), eps=1e-6, config=config)


def rms_norm_backward(arch: str, D: int) -> Launch:
    config = find_config("rms_norm_backward", arch, DTYPE, width=D)
    partials = meta(config["PARTS"], D, dtype=torch.float32)
    return rms_norm.backward_launch(meta(R, D), meta(R, D), meta(D), meta(R, D), partials, eps=1e-6, config=config)


def layer_scale_forward(arch: str, D: int) -> Launch:
    config = find_config("layer_scale_residual_forward", arch, DTYPE, width=D)
    stream, dot = meta(R, D), meta(R_t, D)
    return layer_scale.forward_launch(stream, stream, dot, dot, meta(D), stream, dot, config=config)


def layer_scale_backward(arch: str, D: int) -> Launch:
    config = find_config("layer_scale_residual_backward", arch, DTYPE, width=D)
    partials = meta(config["PARTS"], D, dtype=torch.float32)
    return layer_scale.backward_launch(meta(R, D), meta(R, D), meta(D), meta(R, D), partials, config=config)


def swiglu_forward(arch: str, D: int) -> Launch:
    config = find_config("swiglu", arch, DTYPE, width=swiglu.FLAT_WIDTH)
    stream, dot = meta(R, D), meta(R_t, D)
    return swiglu.forward_launch(stream, stream, dot, dot, stream, dot, config=config)


def swiglu_forward_halves(arch: str, D: int) -> Launch:
    config = find_config("swiglu", arch, DTYPE, width=D)
    pair, dots = meta(R, 2 * D).chunk(2, dim=1), meta(R_t, 2 * D).chunk(2, dim=1)
    return swiglu.forward_launch(*pair, *dots, meta(R, D), meta(R_t, D), config=config)


def swiglu_backward(arch: str, D: int) -> Launch:
    config = find_config("swiglu", arch, DTYPE, width=swiglu.FLAT_WIDTH)
    return swiglu.backward_launch(*(meta(R, D) for _ in range(5)), config=config)


def swiglu_backward_halves(arch: str, D: int) -> Launch:
    config = find_config("swiglu", arch, DTYPE, width=D)
    pair = meta(R, 2 * D).chunk(2, dim=1)
    return swiglu.backward_launch(meta(R, D), *pair, meta(R, D), meta(R, D), config=config)


def qk(batch: int, d: int) -> tuple[torch.Tensor, ...]:
    return meta(batch, N, 3, H, d).unbind(2)[:2]


def tables(d: int) -> tuple[torch.Tensor, ...]:
    return meta(N, d // 2, dtype=torch.float32), meta(N, d // 2, dtype=torch.float32)


def rotary_forward(arch: str, D: int, normed: bool, interleaved: bool) -> Launch:
    d = HEAD_DIMS[D]
    config = find_config("rotary", arch, DTYPE, head_dim=d)
    weights = (meta(d), meta(d)) if normed else (None, None)
    out, dot = meta(B, N, H, d), meta(B_t, N, H, d)
    return rotary.forward_launch(
        *qk(B, d),
        *qk(B_t, d),
        *weights,
        *tables(d),
        out,
        out,
        dot,
        dot,
        eps=1e-6,
        interleaved=interleaved,
        config=config,
    )


def qk_norm_backward(arch: str, D: int, interleaved: bool) -> Launch:
    d = HEAD_DIMS[D]
    config = find_config("qk_norm_rotary_backward", arch, DTYPE, head_dim=d)
    out = meta(B, N, H, d)
    partials = meta(2, config["PARTS"], d, dtype=torch.float32)
    return rotary_backward.norm_backward_launch(
        out,
        out,
        *qk(B, d),
        meta(d),
        meta(d),
        *tables(d),
        out,
        out,
        partials,
        eps=1e-6,
        interleaved=interleaved,
        config=config,
    )


if __name__ == "__main__":
    print_reports(
        {
            "rms_norm_forward": rms_norm_forward,
            "rms_norm_backward": rms_norm_backward,
            "layer_scale_residual_forward": layer_scale_forward,
            "layer_scale_residual_backward": layer_scale_backward,
            "swiglu_forward": swiglu_forward,
            "swiglu_forward, halves": swiglu_forward_halves,
            "swiglu_backward": swiglu_backward,
            "swiglu_backward, halves": swiglu_backward_halves,
            "qk_norm_rotary": lambda arch, D: rotary_forward(arch, D, True, False),
            "qk_norm_rotary, interleaved": lambda arch, D: rotary_forward(arch, D, True, True),
            "qk_norm_rotary_backward": lambda arch, D: qk_norm_backward(arch, D, False),
            "qk_norm_rotary_backward, interleaved": lambda arch, D: qk_norm_backward(arch, D, True),
        }
    )
