"""The shipped configurations, compiled for three architectures."""

import pytest
from ahead_of_time import assert_compile_well

pytest.importorskip("triton", minversion="3.4")


def test_shipped_configurations(tmp_path):
    # cos and sin of angles past 1e5 have a table on the stack, in a branch that times do not take
    assert_compile_well("timestep_embedding", tmp_path, uses_stack=True)
