"""Which backward serves a call of attention, and those that are not our own: PyTorch's, and flash-attn's.

All of them take our (q, k, v, o, lse). PyTorch's are right on an H100 (torch 2.11). THE PACKAGES HAVE NOT RUN HERE:
their calls follow the schemas and sources of flash-attn 2.8, flash_attn_3 3.0 and flash-attn-4 4.0. On a CPU "flash" is
PyTorch's CPU kernel, which shares with the GPU's the layout, the groups and our o and lse, and is tested.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from .._torch import attention_backward_cpu, attention_backward_cudnn, attention_backward_flash, attention_cudnn
from ..backend import BackendError, recorded, register_part
from .cuda import as_boxes

Gradients = tuple[Tensor, Tensor, Tensor]  # dq [B, N_q, H, d]; dk, dv [B, N_kv, H_kv, d]

# By name: the package, the module that has its backward, the compute capabilities that it serves.
PACKAGES: dict[str, tuple[str, str, range]] = {
    "flash-attn-2": ("flash-attn", "flash_attn.flash_attn_interface", range(8, 13)),
    "flash-attn-3": ("flash_attn_3", "flash_attn_interface", range(9, 10)),
    "flash-attn-4": ("flash-attn-4", "flash_attn.cute.interface", range(9, 13)),
}
register_part("attention_backward", ("triton", "cudnn", "flash", *PACKAGES), rules=("by-length",))
DETERMINISTIC = "torch.use_deterministic_algorithms is on, and it adds up its gradients in any order"


# Our own makes seven products where others make five, and writes what the projection reads, without a stack. By the
# arithmetic of both it is the faster one up to 256 tokens, and slower from this many on. The order is that of published
# figures; the last serves everything.
LONG = 512
FOR_LONG = ("flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2", "flash", "triton")


def by_length(q: Tensor, k: Tensor, *, causal: bool) -> str:
    """The backward that is expected to be fastest, as arguments of `unsupported`: our own below `LONG` tokens."""
    if min(q.shape[1], k.shape[1]) < LONG:
        return "triton"
    return next(name for name in FOR_LONG if unsupported(name, q, k, causal=causal) is None)


def choose_backward(requested: str, q: Tensor, k: Tensor, *, causal: bool) -> str:
    """The backward of this name, or the one that "by-length" selects, recorded for `recorded_choices`.

    Compiled, "by-length" is resolved when the call's backward runs. Others' kernels are expected to be faster on long
    sequences, but have not been measured: they serve on request only.

    Raises:
        BackendError: it cannot serve the call.
    """
    if requested == "by-length":
        if torch.compiler.is_compiling():
            return requested  # a compiler cannot trace the look-up of installed packages
        requested = by_length(q, k, causal=causal)
    why_not = unsupported(requested, q, k, causal=causal)
    if why_not is not None:
        message = f"attention: attention_backward={requested} cannot serve this call: {why_not}"
        raise BackendError(message, "attention_backward", requested, why_not)
    return recorded("attention_backward", requested)


def unsupported(name: str, q: Tensor, k: Tensor, *, causal: bool) -> str | None:
    """Why the backward of this name cannot serve a call that our forward serves; None where it can.

    Args:
        name: one of `mfkernels.backend.PARTS["attention_backward"]`.
        q, k: [B, N_q, H, d] and [B, N_kv, H_kv, d].
        causal: whether query i sees keys j <= i only.
    """
    if name == "triton":
        return None
    (N_q, H, d), (N_kv, H_kv) = q.shape[1:], k.shape[1:3]
    if causal and N_q != N_kv:
        return f"is_causal: expected as many keys as queries (its mask is aligned elsewhere), got {N_kv} and {N_q}"
    if q.device.type == "cpu" and name == "flash":
        return None
    if q.device.type != "cuda":
        return f"q: expected a CUDA tensor, got one on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q: expected float16 or bfloat16, got {q.dtype}"
    if d % 8 != 0 or d > 256:
        return f"q: expected a head dim that is a multiple of 8 up to 256, got {d}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if name == "cudnn":
        if torch.are_deterministic_algorithms_enabled():
            return DETERMINISTIC
        if not (torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()):
            return "cuDNN is not there, or torch.backends.cuda.enable_cudnn_sdp(False) was called"
        if d > 128 or H_kv != H or min(N_q, N_kv) < 64:
            return (
                "expected a head dim up to 128, as many heads in k as in q, and 64 queries and keys or more, "
                f"got q {tuple(q.shape)}, k {tuple(k.shape)}"
            )
        return None
    if name == "flash":
        if not (torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.is_flash_attention_available()):
            return "this PyTorch has no flash attention, or torch.backends.cuda.enable_flash_sdp(False) was called"
        if d > 192 and (major, minor) not in ((8, 0), (9, 0), (10, 0)):
            return f"q: expected a head dim up to 192 on compute capability {major}.{minor}, got {d}"
        return None
    package, module, served = PACKAGES[name]
    if not _installed(module):
        return f"the package {package} is not installed: pip install {package}"
    if major not in served:
        return f"device: expected compute capability {served[0]}.x to {served[-1]}.x, got {major}.{minor}"
    return None


@functools.cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that should hold it
        return False


def attention_backward_by(
    name: str,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
) -> Gradients:
    """dq, dk, dv, contiguous, in the shapes of q, k, v, by another package's kernel (see `unsupported`).

    Raises:
        RuntimeError: it is not deterministic, and `torch.use_deterministic_algorithms` was called since the forward.
    """
    if do.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    do, q, k, v, o = (as_boxes(x) for x in (do, q, k, v, o))  # they read 16 bytes at a time
    if name in PACKAGES:
        return _FLASH_ATTN[name](do, q, k, v, o, lse, scale, causal)
    if name == "cudnn" and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(f"attention: attention_backward=cudnn: {DETERMINISTIC}")
    group = q.shape[2] // k.shape[2]
    if group > 1:  # none of PyTorch's is documented to reduce dk and dv over a group of query heads
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)  # [B, N_kv, H, d]
    # PyTorch's layout is [B, H, N, d]; it works on [B, N, H, d] memory inside, so these views cost no copy.
    heads = [x.transpose(1, 2) for x in (do, q, k, v, o)]  # [B, H, N, d]
    kernel = {"cudnn": _cudnn, "flash": _cpu if q.device.type == "cpu" else _flash}[name]
    dq, dk, dv = (x.transpose(1, 2) for x in kernel(heads, lse, q.shape[1], k.shape[1], scale, causal))  # [B, N, H, d]
    if group > 1:
        dk, dv = (x.unflatten(2, (-1, group)).float().sum(3).to(q.dtype) for x in (dk, dv))  # [B, N_kv, H_kv, d]
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


# ------------------------------------------------------------------------------------------------------------ PyTorch's


def _cudnn(heads: list[Tensor], lse: Tensor, N_q: int, N_kv: int, scale: float, causal: bool) -> Gradients:
    """By published figures 1.3 to 1.6 times as fast as flash's on Hopper; not deterministic."""
    if _cudnn_lse_rank(lse.device) == 4:
        lse = lse.unsqueeze(-1)  # [B, H, N_q, 1]
    no_dropout = torch.zeros((), device=lse.device, dtype=torch.int64)
    return attention_backward_cudnn(
        *heads, lse, no_dropout, no_dropout, None, None, None, N_q, N_kv, 0.0, causal, scale=scale
    )


@functools.cache
def _cudnn_lse_rank(device: torch.device) -> int:
    """3 or 4: versions of torch differ in whether cuDNN's log-sum-exp ends in a dimension of one."""
    x = torch.zeros((1, 1, 64, 64), device=device, dtype=torch.float16)
    out = attention_cudnn(x, x, x, None, True, 0.0, False, False, scale=1.0)
    return out[1].ndim


def _flash(heads: list[Tensor], lse: Tensor, N_q: int, N_kv: int, scale: float, causal: bool) -> Gradients:
    """`torch.use_deterministic_algorithms` makes it deterministic."""
    no_dropout = torch.zeros((), device=lse.device, dtype=torch.int64)
    return attention_backward_flash(
        *heads, lse, None, None, N_q, N_kv, 0.0, causal, no_dropout, no_dropout, scale=scale
    )


def _cpu(heads: list[Tensor], lse: Tensor, N_q: int, N_kv: int, scale: float, causal: bool) -> Gradients:
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # [B, H, N_q] in [B, N_q, H] memory, as its forward gives
    return attention_backward_cpu(*heads, lse, 0.0, causal, scale=scale)


# --------------------------------------------------------------------------------------------------- flash-attn's three
# Their layout is ours, groups of heads included. What differs between releases is passed by keyword where it can be, so
# that another signature is an error.


def _flash_attn_2(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> Gradients:
    dq, dk, dv = _like(q), _like(k), _like(v)
    importlib.import_module(PACKAGES["flash-attn-2"][1])._flash_attn_backward(
        dout=do,
        q=q,
        k=k,
        v=v,
        out=o,
        softmax_lse=lse,
        dq=dq,
        dk=dk,
        dv=dv,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


def _flash_attn_3(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> Gradients:
    dq, dk, dv = _like(q), _like(k), _like(v)
    lengths = (None,) * 6  # of sequences that are packed
    importlib.import_module(PACKAGES["flash-attn-3"][1])._flash_attn_backward(
        do,
        q,
        k,
        v,
        o,
        lse,
        *lengths,
        dq,
        dk,
        dv,
        scale,
        causal,  # its keyword has had two names
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


def _flash_attn_4(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> Gradients:
    dq, dk, dv = importlib.import_module(PACKAGES["flash-attn-4"][1])._flash_attn_bwd(
        q=q,
        k=k,
        v=v,
        out=o,
        dout=do,
        lse=lse,
        softmax_scale=scale,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, device=x.device, dtype=x.dtype)


_FLASH_ATTN: dict[str, Callable[..., Gradients]] = {
    "flash-attn-2": _flash_attn_2,
    "flash-attn-3": _flash_attn_3,
    "flash-attn-4": _flash_attn_4,
}
