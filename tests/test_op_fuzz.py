"""Random calls of every op, right and wrong ones, on both backends.

nox -s fuzz_ops     # many more of them: see tests/support/op_fuzz.py
"""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from op_calls import OPS, Draw
from op_fuzz import one

import mfkernels
from mfkernels import Dual

SEEDS = st.integers(0, 2**32 - 1)


def few(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a smaller seed is no smaller call
        suppress_health_check=list(HealthCheck),
    )


def assert_sound(seed, backend):
    outcome = one(seed, backend)
    assert outcome.kind in ("right", "refused"), outcome


@given(SEEDS)
@few(60)
def test_a_random_call_on_the_reference(seed):
    assert_sound(seed, "reference")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter: without eps, and of overflows
@given(SEEDS)
@few(12)
def test_a_random_call_on_triton(seed):
    pytest.importorskip("triton", minversion="3.4")
    assert_sound(seed, "triton")


def test_every_public_op_is_drawn():
    drawn = {OPS[name](Draw(0)).op for name in OPS}
    functions = {name for name in mfkernels.__all__ if name.islower() and callable(getattr(mfkernels, name))}
    not_ops = {"checkpoint", "checkpoint_module", "dual_aware", "dualize", "is_dual_aware", "jvp", "linear_map"}
    not_ops |= {"patch_sdpa", "requested_backend", "split_map", "use_backend"}
    assert drawn == functions - not_ops


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda y: Dual(y.primal * (1 + 1e-4), y.tangent), "value 0"),
        (lambda y: Dual(y.primal, None if y.tangent is None else y.tangent * (1 + 1e-4)), "tangent 0"),
        (lambda y: Dual(y.primal + y.primal - y.primal.detach(), y.tangent), "gradient of x"),
        (lambda y: Dual(y.primal, None), "others are not zero"),
    ],
)
def test_damage_is_noticed(monkeypatch, damage, what):
    own = mfkernels.silu
    monkeypatch.setattr("op_fuzz.OPS", {"silu": OPS["silu"]})
    assert all(one(seed, "reference").kind in ("right", "refused") for seed in range(40))
    monkeypatch.setattr(mfkernels, "silu", lambda x: damage(own(x)) if isinstance(x, Dual) else own(x))
    assert any(what in one(seed, "reference").what for seed in range(40))


def test_a_bad_argument_that_is_taken_and_an_unnamed_error_are_noticed(monkeypatch):
    monkeypatch.setattr("op_fuzz.OPS", {"silu": OPS["silu"]})
    monkeypatch.setattr(mfkernels, "silu", lambda x: torch.zeros(()))
    assert any(one(seed, "reference").what == "was not refused" for seed in range(40))

    def fails(x):
        raise ValueError("internal")

    monkeypatch.setattr(mfkernels, "silu", fails)
    assert all(one(seed, "reference").kind == "crashed" for seed in range(5))
