"""Random modules, dualized and as they stand, against their own steps and PyTorch's forward mode.

python -m random_checks 5000     # more of them: see tests/support/random_checks.py
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_checks import check
from random_modules import random_program
from torch.utils._pytree import tree_leaves

import mfkernels

# MFKERNELS_RANDOM_MODULES=1000 for a long run
EXAMPLES = int(os.environ.get("MFKERNELS_RANDOM_MODULES", "100"))
SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS)
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # a smaller seed is no smaller program: that is what --minimise is for
    suppress_health_check=list(HealthCheck),
)
def test_a_random_module(seed):
    program = random_program(seed)
    faults = check(program).faults
    assert not faults, "\n".join([str(program), *faults])


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_gives_one_program_whose_samples_do_not_see_each_other(seed):
    program = random_program(seed)
    assert str(random_program(seed)) == str(program)
    if program.draws:
        return
    (primals, _), (again, _) = program.inputs(), program.inputs()
    with torch.no_grad():
        out, some = program.module()(*primals), program.module()(*(p[:2] for p in again))
    for u, v in zip(tree_leaves(out), tree_leaves(some), strict=True):
        torch.testing.assert_close(v, u[:2])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda u, u_dot: (u, u_dot * (1 + 1e-9)), "tangent wrong by"),
        (lambda u, u_dot: (u, u_dot.float()), "torch.float32"),
        (lambda u, u_dot: (u * (1 + 1e-15), u_dot), "value wrong by"),
        (lambda u, u_dot: (u.detach(), u_dot), "gradient of p0 is None"),
        (lambda u, u_dot: (u + u - u.detach(), u_dot), "gradient wrong by"),
    ],
)
def test_damage_is_noticed(monkeypatch, damage, fault):
    own = mfkernels.jvp
    program = random_program(0)
    program.dtype, program.batch, program.layouts = torch.float64, 3, ["contiguous"] * 6
    program.requires_grad, program.parts = [False, False, False, True], {"p0": "W"}
    program.steps, program.result = ["x3 = (x @ self.p0).sin()"], "x3"
    assert not check(program).faults
    monkeypatch.setattr(mfkernels, "jvp", lambda *args, **kwargs: damage(*own(*args, **kwargs)))
    assert any(fault in found for found in check(program).faults)
