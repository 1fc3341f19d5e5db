"""The shipped configurations of the norm, alone and behind the residual update, compiled for three architectures."""

import pytest
from ahead_of_time import assert_compile_well

pytest.importorskip("triton", minversion="3.4")


def test_shipped_configurations(tmp_path):
    assert_compile_well("ada_layer_norm", tmp_path)
