"""The measurement behind docs/precision.md, at its smallest network."""

import pytest
import torch
from precision import POLICIES, SIZES, errors_against_float64


@pytest.mark.parametrize("policy", ["no", "bf16-weights"])
def test_the_derivative_is_no_further_from_float64_than_that_of_func_jvp(policy):
    ours, theirs = errors_against_float64(SIZES["S/4"], POLICIES[policy], seeds=2)  # [4] each
    assert torch.all(ours[[0, 1, 3]] <= 1.05 * theirs[[0, 1, 3]])  # u, du/dt, gradients
