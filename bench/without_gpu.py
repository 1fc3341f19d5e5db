"""The blocks as an H100 would run them, in a process that has no GPU: what the meters in bytes/ and host/ share.

Tensors are on the CPU; `as_on_h100` makes this project's own decisions fall as they would on a GPU. PyTorch and Triton
stay as they are: `stub_driver` gives Triton, by its public `driver.set_active`, a driver that launches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from mfkernels import Dual, ResidualStream, calls, launch, use_backend
from mfkernels.attention import op

ARCH = "sm_90"
WAYS = ("flow_matching", "meanflow", "plain")
TANGENT_SHARE = 4  # one row in so many has a tangent


@contextmanager
def as_on_h100(*, chunk: int | None = None, run: Callable[[launch.Launch], None] | None = None) -> Iterator[None]:
    """Triton serves CPU tensors, by the package's launch table for this GPU; a table of the user's own is not read.

    Args:
        chunk: in place of the table's CHUNK, so that few tokens are several chunks, as many tokens are.
        run: in place of `Launch.run`.
    """
    find_config = launch.find_config

    def on_h100(op: str, arch: str, dtype: torch.dtype, **sizes: int) -> launch.Config:
        config = find_config(op, ARCH, dtype, **sizes)
        return config if chunk is None or "CHUNK" not in config else {**config, "CHUNK": chunk}

    replaced: dict[str, Any] = {
        "mfkernels.backend._INTERPRETED": True,  # "Triton runs on CPU tensors"
        "mfkernels.launch.find_config": on_h100,
        "mfkernels.launch.multiprocessors": lambda device: 132,
        "mfkernels.launch.user_table": lambda: launch.PACKAGE / "none.json",
    }
    if run is not None:
        replaced["mfkernels.launch.Launch.run"] = run
        # a meter of fake tensors is a dispatch mode, for which ops take another way than in a training step
        replaced["mfkernels.operator.is_plain_eager"] = lambda *inputs: True
        replaced["mfkernels.calls.nothing_intercepts"] = lambda: True
        replaced["mfkernels.calls.is_plain"] = lambda x: isinstance(x, Tensor)
        replaced["mfkernels.products.writes_float32"] = lambda device: True
    with ExitStack() as stack:
        for clear_cache in (launch.clear_cache, calls.clear_cache):
            clear_cache()
            stack.callback(clear_cache)
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        # the interpreter has no bfloat16; a GPU has
        served = op._attention.backends["triton"]._replace(unsupported=lambda **tensors: None)
        stack.enter_context(patch.dict(op._attention.backends, triton=served))
        stack.enter_context(use_backend("triton"))
        yield


Forward = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def blocks(way: str, *, depth: int, width: int, heads: int, mlp_ratio: float = 4.0) -> tuple[Forward, list[Tensor]]:
    """So many DiT blocks one after the other: their output at (x, c, x_dot, c_dot), and their parameters.

    Args:
        way: "plain" for the eager peer through PyTorch's fused attention; else this project's, which "meanflow" runs
            on Duals.
    """
    from peers import Block

    from meanflow.models import DiTBlock

    make = Block if way == "plain" else DiTBlock
    stack = torch.nn.ModuleList(make(width, heads, mlp_ratio) for _ in range(depth))

    def plain(x: Tensor, c: Tensor, x_dot: Tensor | None, c_dot: Tensor | None) -> Tensor:
        for block in stack:
            x = block(x, c, F.scaled_dot_product_attention)  # [B, N, D]
        return x

    def flow_matching(x: Tensor, c: Tensor, x_dot: Tensor | None, c_dot: Tensor | None) -> Tensor:
        stream = ResidualStream(x)
        for block in stack:
            stream = block(stream, c)  # [B, N, D]
        return stream.value()

    def meanflow(x: Tensor, c: Tensor, x_dot: Tensor | None, c_dot: Tensor | None) -> Tensor:
        stream, condition = ResidualStream(Dual(x, x_dot)), Dual(c, c_dot)  # [B, N, D], [B, D]
        for block in stack:
            stream = block(stream, condition)  # [B, N, D]
        return stream.value().primal

    forwards: dict[str, Forward] = {"plain": plain, "flow_matching": flow_matching, "meanflow": meanflow}
    return forwards[way], list(stack.parameters())


def inputs(B: int, N: int, D: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, c, their tangents on the first quarter of the rows, and the gradient of the output, all float32."""
    rows = B // TANGENT_SHARE
    x = torch.randn(B, N, D, requires_grad=True)  # [B, N, D]
    c = torch.randn(B, D, requires_grad=True)  # [B, D]
    return x, c, torch.randn(rows, N, D), torch.randn(rows, D), torch.randn(B, N, D)


# --------------------------------------------------------------------------------------------------- a driver of Triton


def stub_driver() -> None:
    """Triton compiles for an H100 from here on, and launches nothing: its Python runs as ever, up to the launcher."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Utils:
        """Answers for CompiledKernel: a loaded binary is (module, function, registers, spills, most threads)."""

        @staticmethod
        def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            return 1, 1, 0, 0, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}

    class Launcher:
        def __init__(self, source: object, metadata: object) -> None:
            pass

        def __call__(self, *args: object) -> None:
            pass

    class Driver(DriverBase):
        utils = Utils()
        launcher_cls = Launcher

        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("nothing is launched, so no launcher is written")

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is launched, so nothing is timed")

    triton.runtime.driver.set_active(Driver())
