"""(Improved) MeanFlow steps in DDP and FSDP2 with real processes: losses and gradients are the single process's."""

from pathlib import Path

import pytest
from minimum import needs_compile, needs_sharding
from processes import assert_nothing_said, what_processes_say

WORKERS = Path(__file__).with_name("workers.py")
FORMS = [
    "ddp",
    "ddp, static_graph",
    "ddp, checkpointed",
    "ddp, no_sync",
    "fsdp",
    "fsdp, accumulated",
    "fsdp, checkpointed",
    "fsdp, bf16",
    "fsdp, bf16, checkpointed",
    "the trainer's ddp",
    "the trainer's fsdp",
    "the trainer's fsdp, bf16",
]
COMPILED = ["DiT: ddp, compiled", "DiT: fsdp, compiled, checkpointed", "iMF-DiT: fsdp, compiled"]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def told(request, tmp_path_factory):
    return what_processes_say(WORKERS, request.param, tmp_path_factory.mktemp("processes"), seconds=480)


@pytest.mark.parametrize("form", [pytest.param(f, marks=needs_sharding) if "fsdp" in f else f for f in FORMS])
@pytest.mark.parametrize("net", ["DiT", "iMF-DiT"])
def test_losses_and_gradients_are_the_single_processs(told, net, form):
    assert_nothing_said(told, f"{net}: {form}")


@pytest.mark.parametrize("told", [2], indirect=True, ids=["2 processes"])  # four would take a minute to compile
@pytest.mark.parametrize("case", COMPILED)
@needs_compile
def test_compiled_steps_are_the_single_processs_and_compile_once(told, case):
    assert_nothing_said(told, case)
