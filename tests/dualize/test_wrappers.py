"""A dualized network in DDP and FSDP2 with two real processes: gradients are the single process's."""

from pathlib import Path

import pytest
from minimum import needs_sharding
from processes import assert_nothing_said, what_processes_say

WORKERS = Path(__file__).with_name("workers.py")
CASES = [
    "ddp",
    "ddp, static_graph",
    "ddp, checkpointed",
    "fsdp",
    "fsdp, dualized after",
    "fsdp, bf16",
    "fsdp, checkpointed",
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return what_processes_say(WORKERS, 2, tmp_path_factory.mktemp("processes"), seconds=180)


@pytest.mark.parametrize("case", [pytest.param(c, marks=needs_sharding) if c.startswith("fsdp") else c for c in CASES])
def test_gradients_are_the_single_processs(told, case):
    assert_nothing_said(told, case)
