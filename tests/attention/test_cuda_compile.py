"""The machine code of the compiled extension, read without a GPU: nothing spills, and the products overlap."""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from mfkernels import extension
from mfkernels.attention import cuda

ROOT = Path(__file__).parents[2]


class Kernel(NamedTuple):
    dtype: str
    head_dim: int
    dual: bool
    code: list[str]  # instructions, in order
    lines: list[str]  # the same with their operands


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    triton = pytest.importorskip("triton", minversion="3.4")
    why_not = cuda.unavailable()
    if why_not is not None:
        pytest.skip(why_not)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    library = extension.load().__file__
    dump = subprocess.run([tool, "--dump-sass", library], capture_output=True, text=True, check=True).stdout
    found = []
    for text in dump.split("Function : ")[1:]:
        name = re.search(r"ForwardKernel.*?(BFloat16|Float16)ELi(\d+)ELb([01])", text.split("\n", 1)[0])
        assert name is not None, text[:200]
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*)", text, re.MULTILINE)
        code = [line.split()[0] for line in lines]
        found.append(Kernel(name[1], int(name[2]), name[3] == "1", code, lines))
    return found


def waits(kernel: Kernel) -> list[tuple[int, int]]:
    """For each wait, the products and the exponentials issued since products were last begun."""
    counts, products, exponentials = [], 0, 0
    for instruction in kernel.code:
        if instruction == "WARPGROUP.ARRIVE":
            products = exponentials = 0
        elif instruction.startswith("HGMMA"):
            products += 1
        elif instruction == "MUFU.EX2":
            exponentials += 1
        elif instruction.startswith("WARPGROUP.DEPBAR"):
            counts.append((products, exponentials))
    return counts


def test_every_kernel_is_there(kernels: list[Kernel]) -> None:
    there = {(kernel.dtype, kernel.head_dim, kernel.dual) for kernel in kernels}
    assert there == {(t, d, dual) for t in ("BFloat16", "Float16") for d in cuda.HEAD_DIMS for dual in (False, True)}
    assert len(kernels) == len(there)


def test_nothing_spills(kernels: list[Kernel]) -> None:
    assert not [k[:3] for k in kernels if any(op.split(".")[0] in ("STL", "LDL") for op in k.code)]


def test_products_are_not_waited_for_one_by_one(kernels: list[Kernel]) -> None:
    """What ptxas does when it gives up on overlap; it says so in a warning at most."""
    for kernel in kernels:
        products = sum(op.startswith("HGMMA") for op in kernel.code)
        assert 3 * len(waits(kernel)) < products, kernel[:3]


def test_softmax_runs_under_products(kernels: list[Kernel]) -> None:
    """Of each step's exponentials (one for each score, two for the rows) most stand between products and their wait.

    The dual kernel has three such steps (the first tile, whole tiles, masked tiles) under the tangent scores; the
    primal has two under the products of values. Measured with CUDA 13.0: 94 % at least in the dual, 44 % in the primal.
    """
    for kernel in kernels:
        scores = sum(op == "MUFU.EX2" for op in kernel.code) / 3
        overlapped = sorted((exponentials for _, exponentials in waits(kernel)), reverse=True)
        steps, share = (3, 0.8) if kernel.dual else (2, 0.35)
        assert all(count >= share * scores for count in overlapped[:steps]), (kernel[:3], scores, overlapped)


def test_nothing_touches_the_registers_of_products_in_flight(kernels: list[Kernel]) -> None:
    """Between a product's issue and its wait, what it writes to or reads from registers is the tensor cores'."""
    for kernel in kernels:
        in_flight: set[int] = set()
        for op, line in zip(kernel.code, kernel.lines, strict=True):
            if op.startswith("HGMMA"):
                columns = re.match(r"HGMMA\.64x(\d+)x16\.", op)
                operands = re.match(r"\S+ R(\d+), (?:R(\d+), )?gdesc", line)
                assert columns is not None
                assert operands is not None, line
                accumulators, a = int(operands[1]), operands[2]
                in_flight |= set(range(accumulators, accumulators + int(columns[1]) // 2))
                in_flight |= set(range(int(a), int(a) + 4)) if a else set()
            elif op.startswith("WARPGROUP.DEPBAR"):
                in_flight.clear()
            else:
                touched = set(map(int, re.findall(r"\bR(\d+)\b", line))) & in_flight
                assert not touched, (kernel[:3], line)


def test_roles_have_their_registers(kernels: list[Kernel]) -> None:
    """setmaxnreg is there; ptxas drops it without an error where it cannot apply it."""
    for kernel in kernels:
        assert sum(op.startswith("USETMAXREG") for op in kernel.code) == 2, kernel[:3]


def test_the_producer_stays_within_its_registers(kernels: list[Kernel]) -> None:
    """It keeps 24 when it has given the others back, and what it would write past them is another warp's."""
    for kernel in kernels:
        given_back = next(i for i, line in enumerate(kernel.lines) if line.startswith("USETMAXREG.DEALLOC"))
        copies = [i for i, op in enumerate(kernel.code) if op.startswith("UTMALDG")]
        assert min(copies) > given_back
        used = re.findall(r"\bR(\d+)\b", " ".join(kernel.lines[given_back : max(copies) + 1]))
        assert max(map(int, used)) < 24, kernel[:3]


PRODUCTS = """
#include "hopper/wgmma.cuh"
using namespace mfkernels::hopper;
__global__ void kernel(float* out, MatrixDescriptor a, MatrixDescriptor b) {
  float d[32];
  wgmma_fence();
  Wgmma<BFloat16, 64>::rows(d, a, b, false);
  TOUCH
  Wgmma<BFloat16, 64>::rows(d, a, b, true);
  wgmma_commit();
  wgmma_wait<0>(d);
  for (int i = 0; i < 32; ++i) out[32 * threadIdx.x + i] = d[i];
}
"""


@pytest.mark.parametrize("touch", ["", "d[3] *= out[0];"])
def test_products_that_ptxas_serializes_are_an_error(
    touch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those whose accumulators are written before the wait."""
    pytest.importorskip("pybind11")
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    source = tmp_path / "kernel.cu"
    source.write_text(PRODUCTS.replace("TOUCH", touch))
    command = [nvcc, *setup.flags(setup.toolkit_of(nvcc))["nvcc"], "-c", source, "-o", os.devnull]
    if not touch:
        setup.compile_kernels(command)
        return
    with pytest.raises(SystemExit, match=r"ptxas says:\n  \(C75\d\d\) .*wgmma"):
        setup.compile_kernels(command)
