"""mfkernels._C, the compiled extension (csrc/): whether it is there, and loading it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}  # as the extension calls them

# Looked up, not imported: importing this package loads nothing, and torch.compile traces through the question.
COMPILED = importlib.util.find_spec("mfkernels._C") is not None


def load() -> ModuleType:
    try:
        return importlib.import_module("mfkernels._C")
    except ImportError as error:
        raise ImportError(
            f"the CUDA extension does not load ({error}); reinstall the package with this Python"
        ) from error


@contextmanager
def launching(device: torch.device) -> Iterator[dict[str, int]]:
    """`device` is the current one; gives the arguments of these names that every function of the extension takes."""
    if device.type != "cuda":  # the tests run them on CPU tensors
        yield {"device": 0, "stream": 0}
        return
    with torch.cuda.device(device):
        yield {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream}


def unavailable(device: torch.device | None) -> str | None:
    """Why the extension cannot run on `device` (None: on any), and what to do about it; None where it is there."""
    if not COMPILED:
        return (
            "the CUDA extension was not compiled when this package was installed; with CUDA's nvcc on the PATH, "
            "`MFKERNELS_CUDA=1 pip install .` compiles it, or says why it cannot"
        )
    if device is not None and device.type != "cuda":
        return f"device: expected a CUDA device, got {device}"
    return None


def description() -> str:
    """One line: what is compiled, or why nothing is and how to get it."""
    why_not = unavailable(None)
    if why_not is not None:
        return why_not
    try:
        architectures = load().ARCHITECTURES
    except ImportError as error:
        return str(error)
    return (
        f"attention, compiled for {architectures}, and the mlp by cuBLASLt; they serve calls that ask for them "
        "(attention=cuda, mlp=cublaslt)"
    )
