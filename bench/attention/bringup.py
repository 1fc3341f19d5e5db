"""Compiles and runs bringup.cu, the first thing to run on a new GPU: the attention kernel's parts, one at a time.

python bench/attention/bringup.py               # on a Hopper GPU, with nvcc; the barriers have their watchdog
python bench/attention/bringup.py --emulator    # anywhere with a C++ compiler

The exit code is 0 where every part is right. An error that ends a process's use of the GPU (the watchdog's reads
"unspecified launch failure") fails its case alone: the cases after it run in a new process, within the time limit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_suffix(".cu")
COMPILE_SECONDS, RUN_SECONDS = 300, 60
NEXT_CASE = 100  # an exit code above it: the number of the case to go on with

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "attention")]  # setup, cuda_emulator


def for_gpu(program: Path) -> list[str]:
    import setup

    nvcc = setup.find_nvcc()
    if nvcc is None:
        sys.exit("no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda: the kernel's parts did not run")
    sources = [str(SOURCE), str(ROOT / "csrc" / "hopper" / "tensor_map.cpp")]
    return [str(nvcc), *setup.flags(setup.toolkit_of(nvcc))["nvcc"], "-DMF_WATCHDOG", *sources, "-o", str(program)]


def for_emulator(program: Path) -> list[str]:
    import cuda_emulator

    if cuda_emulator.find_compiler() is None:
        sys.exit("no C++ compiler (c++): the kernel's parts did not run")
    return cuda_emulator.command(SOURCE, program)


def compile_program(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        sys.exit(f"bringup.cu did not compile within {COMPILE_SECONDS} s")
    print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode != 0:
        sys.exit("bringup.cu did not compile")


def run_program(program: Path, seconds: float = RUN_SECONDS) -> int:
    """The worst exit code of its processes."""
    end = time.monotonic() + seconds
    first, worst = 0, 0
    while True:
        try:
            code = subprocess.run([program, str(first)], timeout=max(end - time.monotonic(), 0)).returncode
        except subprocess.TimeoutExpired:
            print(f"\nFAIL: not done within {seconds:g} s; the last part named is where it was", flush=True)
            return 1
        if code <= NEXT_CASE:
            return code or worst
        first, worst = code - NEXT_CASE, 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulator", action="store_true", help="compile for the host and run without a GPU")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bringup"
        compile_program(for_emulator(program) if arguments.emulator else for_gpu(program))
        code = run_program(program)
    print("every part is right" if code == 0 else f"FAIL: exit code {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
