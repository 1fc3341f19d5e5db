"""Compiles csrc/ for the emulator of emulator/: the CUDA backend's own code, bindings included, without a GPU.

Kernels see `#include "hopper/…"` resolved to the emulator's headers instead of those of csrc/hopper.
"""

import ctypes
import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
CSRC, EMULATOR = ROOT / "csrc", Path(__file__).parent / "emulator"
BUILD = ROOT / "build" / "emulator"
KERNELS = sorted((CSRC / "attention").glob("*.cu"))
SOURCES = [
    *KERNELS,
    CSRC / "attention" / "forward.cpp",
    CSRC / "mlp" / "gelu_product.cpp",
    CSRC / "bindings.cpp",
    EMULATOR / "configure.cpp",
]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fvisibility=hidden"]


def find_compiler() -> str | None:
    return shutil.which("c++")


def compiler() -> str:
    found = find_compiler()
    if found is None:
        pytest.skip("no C++ compiler (c++) for the emulator")
    return found


def command(source: Path, target: Path, *flags: str, csrc: Path = CSRC) -> list[str]:
    """Compiles one CUDA source file for the host: a program, or with -shared a library."""
    return [compiler(), *FLAGS, *flags, f"-I{EMULATOR}", f"-I{csrc}", "-x", "c++", str(source), "-o", str(target)]


@functools.cache
def library() -> Path:
    """The compiled module, made anew where a source has changed."""
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    import ninja
    import pybind11

    includes = [f"-I{EMULATOR}", f"-I{CSRC}"]
    includes += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    target = BUILD / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines = [
        "rule compile",
        "  depfile = $out.d",
        "  deps = gcc",
        f"  command = {compiler()} {' '.join([*FLAGS, *includes])} -DMF_ARCHITECTURES='\"emulator\"' "
        "-MD -MF $out.d -x c++ -c $in -o $out",
        "rule link",
        f"  command = {compiler()} -shared $in -o $out",
    ]
    lines += [f"build {source.name}.o: compile {source}" for source in SOURCES]
    lines.append(f"build {target}: link {' '.join(f'{source.name}.o' for source in SOURCES)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # several processes may run tests at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run(
            [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(BUILD)], capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stdout[-4000:]
    return target


@functools.cache
def extension() -> ModuleType:
    """`mfkernels._C` as the bindings make it, with the kernels in the emulator."""
    spec = importlib.util.spec_from_file_location("emulator._C", library())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configure(
    *, eager_copies: bool = False, eager_products: bool = False, multiprocessors: int = 3, seed: int = 0
) -> None:
    """When copies and products happen, and over how many blocks the work is spread."""
    ctypes.CDLL(str(library())).configure(eager_copies, eager_products, multiprocessors, seed)
