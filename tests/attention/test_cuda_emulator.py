"""The emulator finds the mistakes that it is there for: put into the kernel one at a time, each fails."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import oracles
import pytest
import torch
from cuda_emulator import CSRC, EMULATOR, FLAGS, compiler

# three tiles of keys, the last one ragged; three blocks of queries, of the last of which one warpgroup has none; all of
# them the work of one thread block
B, N, D = 2, 300, 72
KERNEL, LAYOUT = "attention/forward_kernel.cuh", "hopper/layout.h"


class Mistake(NamedTuple):
    file: str
    right: str
    wrong: str
    found: str  # what the emulator says; "" where the result is wrong


MISTAKES = {
    "none": Mistake(KERNEL, "", "", "nothing"),
    "the producer waits for the wrong round": Mistake(KERNEL, "keys.parity() ^ 1", "keys.parity()", "deadlock"),
    "values are not waited for": Mistake(
        KERNEL, "mbarrier_wait(memory.full_v(values.stage()), values.parity());", "", ""
    ),
    "keys are given back before the tangent scores have read them": Mistake(
        KERNEL,
        "release(memory.empty_v(values.stage()));\n        softmax",
        "release(memory.empty_k(1));\n        softmax",
        "",
    ),
    "queries are given back before the last tile": Mistake(
        KERNEL, "c.begin();\n", "c.begin();\n      c.release(c.empty_q);\n", ""
    ),
    "queries are not waited for": Mistake(
        KERNEL, "mbarrier_wait(full_q, queries.parity());\n      mbarrier_wait", "mbarrier_wait", ""
    ),
    "queries are overwritten while they are read": Mistake(
        KERNEL, "mbarrier_wait(memory.empty_q(warpgroup), queries.parity() ^ 1);", "", ""
    ),
    "the warpgroups' queries are one another's": Mistake(
        KERNEL, "BLOCK_M + warpgroup * ROWS, batch", "BLOCK_M + (1 - warpgroup) * ROWS, batch", ""
    ),
    "the warpgroups have one barrier of queries": Mistake(
        KERNEL, "BARRIERS_OFFSET + 16 * warpgroup", "BARRIERS_OFFSET", ""
    ),
    "queries are given back by both warpgroups": Mistake(
        KERNEL, "memory.empty_q(warpgroup), WARPGROUP / 32", "memory.empty_q(warpgroup), CONSUMER_WARPS", "deadlock"
    ),
    "a warpgroup without queries does not wait": Mistake(
        KERNEL,
        """
        mbarrier_wait(memory.full_k(keys.stage()), keys.parity());
        release(memory.empty_k(keys.stage()));
        mbarrier_wait(memory.full_v(keys.stage()), keys.parity());""",
        "release(memory.empty_k(keys.stage()));",
        "",
    ),
    "a warpgroup without queries keeps keys": Mistake(
        KERNEL, "release(memory.empty_k(keys.stage()));\n        mbarrier_wait", "mbarrier_wait", "deadlock"
    ),
    "a warpgroup without queries keeps values": Mistake(
        KERNEL, "release(memory.empty_v(keys.stage()));", "", "deadlock"
    ),
    "a warpgroup without queries keeps its buffer": Mistake(
        KERNEL, "queries.parity());\n      release(empty_q);", "queries.parity());", "deadlock"
    ),
    "a warpgroup without queries loses count": Mistake(KERNEL, "++queries.count;\n      for", "for", ""),
    "the values' blocks are too close": Mistake(
        KERNEL, "ValueTile::BLOCK_BYTES, Value", "ValueTile::BLOCK_BYTES / 2, Value", ""
    ),
    "tangent scores are not waited for": Mistake(KERNEL, "wgmma_wait<0>(ts);", "", ""),
    "registers are not fenced": Mistake(
        KERNEL, "wgmma_fence();\n        issue_tangent_scores();", "issue_tangent_scores();", "without a fence"
    ),
    "groups of rows are too close": Mistake(LAYOUT, "16, 8 * swizzle_bytes", "16, 4 * swizzle_bytes", ""),
    "the tail has another swizzle": Mistake(
        LAYOUT, "columns == 32 ? Swizzle::BYTES_64 : Swizzle::BYTES_32", "Swizzle::BYTES_64", ""
    ),
    "masks are a key too wide": Mistake(KERNEL, "i / 4 * 8 + i % 2 < visible", "i / 4 * 8 + i % 2 <= visible", ""),
}


def broken(mistake: Mistake, folder: Path) -> Path:
    """A copy of csrc with the mistake, compiled."""
    source = shutil.copytree(CSRC, folder / "csrc")
    text = (source / mistake.file).read_text()
    assert mistake.right in text
    (source / mistake.file).write_text(text.replace(mistake.right, mistake.wrong) if mistake.right else text)
    library = folder / "kernel.so"
    flags = [*FLAGS, "-w", "-shared", f"-I{EMULATOR}", f"-I{source}"]
    command = [compiler(), *flags, EMULATOR / "one_kernel.cpp", "-o", library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found(name: str, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    run = ctypes.CDLL(str(broken(mistake, tmp_path))).run
    run.restype = ctypes.c_char_p
    inputs = [torch.randn(B, N, 1, D).half() for _ in range(6)]
    o, o_dot = torch.full((2, B, N, 1, D), math.nan, dtype=torch.float16)
    lse = torch.full((B, 1, N), math.nan)
    pointers = (ctypes.c_void_p * 6)(*(x.data_ptr() for x in inputs))
    outputs = [ctypes.c_void_p(x.data_ptr()) for x in (o, o_dot, lse)]
    said = run(pointers, *outputs, B, N, D)
    wide = [x.double() for x in inputs]
    ref, ref_dot = torch.func.jvp(lambda *qkv: oracles.attention(*qkv, 0.125), tuple(wide[:3]), tuple(wide[3:]))
    worst = torch.stack([(a.double() - b).norm() / b.norm() for a, b in ((o, ref), (o_dot, ref_dot))]).max()  # NaN wins
    if mistake.found == "nothing":
        assert said is None
        assert worst < 5.8e-4
    else:
        assert said is not None or not worst < 1e-3
        assert mistake.found in (said or b"").decode()
