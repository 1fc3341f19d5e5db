"""What `meanflow info` prints."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

import mfkernels
import mfkernels.backend
from mfkernels.extension import description as cuda_description

from .models import DiT, IMFDiT
from .objectives import ImprovedMeanFlow, MeanFlow

PACKAGES = ("meanflow", "torch", "triton", "numpy", "accelerate", "safetensors", "scikit-learn", "tensorboard")


def served_by(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which backend serves each op in small training steps (head dim 64, 64 tokens) on this device.

    Raises:
        NotImplementedError: a backend that was asked for cannot serve an op.
    """
    sizes: dict[str, Any] = {"input_size": 16, "patch_size": 2, "in_channels": 4, "num_classes": 10}
    sizes |= {"hidden_size": 128, "num_heads": 2}
    x = torch.zeros(2, 4, 16, 16, device=device, dtype=dtype)  # [B, C, H, W]
    y = torch.zeros(2, dtype=torch.long, device=device)  # [B]
    q = torch.zeros(2, 64, 2, 64, device=device, dtype=dtype)  # [B, N, H, d]
    angle = torch.zeros(64, 32, device=device)  # [N, d/2]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on two busy cores took 4 s for what one does in 0.5
    try:
        with mfkernels.backend.recorded_choices() as chosen:
            for net, objective in (
                (DiT(**sizes, depth=1), MeanFlow(ratio=0.5)),
                (IMFDiT(**sizes, depth=2, aux_head_depth=1), ImprovedMeanFlow(ratio=0.5)),
            ):
                objective(net.to(device=device, dtype=dtype), x, y).loss.backward()
            mfkernels.rotary(q, q, angle.cos(), angle.sin())  # of other people's networks
    finally:
        torch.set_num_threads(threads)
    return chosen


def _devices() -> list[tuple[torch.device, str]]:
    cpu = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    found = [(torch.device("cpu"), cpu)]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        words = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        found.append((torch.device("cuda", index), words))
    return found


def describe(device: str | None = None) -> str:
    """Versions, devices, and the backend of each op on each device, as text.

    Args:
        device: "cpu" or "cuda" to look at one kind of device only.
    """
    lines = [f"{'python':<16}{platform.python_version()} on {platform.platform()}"]
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{package:<16}{version}")
    lines.append(f"{'CUDA of torch':<16}{torch.version.cuda or 'none (CPU build)'}")
    asked = os.environ.get("MFKERNELS_BACKEND")
    lines.append(
        f"{'backends':<16}{', '.join(mfkernels.backend.backends())}" + (f" (asked for: {asked})" if asked else "")
    )
    lines.append(f"{'CUDA kernels':<16}{cuda_description()}")
    for place, words in _devices():
        if device is not None and place.type != device:
            continue
        lines += ["", f"{place}: {words}"]
        for dtype in (torch.float32, torch.bfloat16):
            lines.append(f"  {str(dtype).removeprefix('torch.')}")
            try:
                lines += [f"    {op:<32}{backend}" for op, backend in sorted(served_by(place, dtype).items())]
            except (NotImplementedError, ValueError) as error:
                lines.append(f"    {error}")
    lines += ["", "`python -m mfkernels.check` compares every op of this machine with float64."]
    return "\n".join(lines)
