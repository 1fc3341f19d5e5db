"""Inspect the machine code of a launch without a GPU: registers, spills, shared memory, and whether wgmmas overlap."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mfkernels.launch import OPTIONS, Launch

# Bytes one block may have, by architecture (CUDA C++ programming guide, table of compute capabilities).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}

# Columns of tensor memory that one block may have. Past it Triton emits an empty kernel, and only its launch fails.
TENSOR_MEMORY_LIMIT = 512

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class KernelReport:
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    wgmmas: int
    wgmma_waits: int
    tensor_instructions: int
    tensor_memory: int

    @property
    def serialised(self) -> bool:
        """Whether ptxas gave up on overlapping wgmmas: it then waits for each one, and prints no warning."""
        return self.wgmmas > 0 and self.wgmma_waits >= self.wgmmas


def inspect_launch(launch: Launch, arch: str) -> KernelReport:
    """Compile a launch for "sm_90" or another target; its tensors may be on the meta device."""
    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError("a kernel cannot be compiled in a process that was started with TRITON_INTERPRET=1")
    options = {key: launch.config[key] for key in ("num_warps", "num_stages")} | OPTIONS
    constants = {key: value for key, value in launch.config.items() if key not in options}
    source = _source(launch.kernel, {**launch.arguments, **constants})
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("--dump-sass", cubin)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage!r}")
    return KernelReport(
        registers=int(registers[1]),
        spill_stores=_count("STL", sass),
        spill_loads=_count("LDL", sass),
        shared_bytes=compiled.metadata.shared,
        wgmmas=_count("HGMMA", sass),
        wgmma_waits=_count("WARPGROUP.DEPBAR", sass),
        tensor_instructions=len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", sass)),
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
    )


def _source(kernel: JITFunction, arguments: Mapping[str, Any]) -> ASTSource:
    """The specialisation for these arguments: 1 and None are constants, divisibility by 16 is known."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout


def _count(instruction: str, sass: str) -> int:
    return len(re.findall(rf"(?<![A-Z0-9]){re.escape(instruction)}(?![A-Z0-9])", sass))
