"""The shipped configurations of the plain residual update; its fusion with the norm: ada_layer_norm/test_compile.py."""

import pytest
from ahead_of_time import assert_compile_well

pytest.importorskip("triton", minversion="3.4")


def test_shipped_configurations(tmp_path):
    assert_compile_well("gated_residual", tmp_path)
