"""The shipped configurations, compiled for three architectures."""

from pathlib import Path

import pytest
from ahead_of_time import assert_compile_well

pytest.importorskip("triton", minversion="3.4")


def test_shipped_configurations(tmp_path):
    assert_compile_well(Path(__file__).with_name("compile_shipped.py"), tmp_path)
