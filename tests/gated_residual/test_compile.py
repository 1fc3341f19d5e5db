"""The shipped configurations of the plain residual update; its fusion with the norm: ada_layer_norm/test_compile.py."""

from pathlib import Path

import pytest
from ahead_of_time import assert_compile_well

pytest.importorskip("triton", minversion="3.4")


def test_shipped_configurations(tmp_path):
    assert_compile_well(Path(__file__).with_name("compile_shipped.py"), tmp_path)
