"""The example of CONTRIBUTING.md, run as it is written there, and what the router does alike for every op."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD

from mfkernels import Dual, backend, dual_aware, dualize, jvp, silu, use_backend
from mfkernels.backend import recorded_choices, rows_unsupported
from mfkernels.check.case import channel_cases
from mfkernels.operator import num_tangent_rows, operator, tangent_or_empty
from mfkernels.router import Backend, DualOp
from mfkernels.testing import assert_dual

FLOAT64 = {"duals": ["x"], "dtype": torch.float64, "bound": 1e-15}
TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def example():
    """The names that the first example of "Adding an op" defines."""
    source = re.search(r"## Adding an op.*?```python\n(.*?)```", TEXT, re.DOTALL)[1]
    names: dict = {}
    exec(compile(source, "CONTRIBUTING.md", "exec"), names)
    return names


def oracle(x, weight, power=2.0):
    return weight * x.abs() ** power


def inputs():
    return {"x": torch.randn(5, 3, 7, dtype=torch.float64), "weight": torch.randn(7, dtype=torch.float64)}


@pytest.mark.parametrize("power", [2.0, 3.5])
def test_primal_tangent_and_gradients(example, power):
    scaled_power = partial(example["scaled_power"], power=power)
    assert_dual(scaled_power, partial(oracle, power=power), inputs(), **FLOAT64)


def test_forward_mode(example):
    x, weight = inputs().values()
    x_dot = torch.randn_like(x)
    with fwAD.dual_level():
        y, y_dot = fwAD.unpack_dual(example["scaled_power"](fwAD.make_dual(x, x_dot), weight))
    expected, expected_dot = torch.func.jvp(lambda x: oracle(x, weight), (x,), (x_dot,))
    torch.testing.assert_close((y, y_dot), (expected, expected_dot), rtol=1e-14, atol=1e-14)
    _, y_dot = torch.func.jvp(lambda x: example["scaled_power"](x, weight), (x.requires_grad_(),), (x_dot,))
    with pytest.raises(RuntimeError, match="scaled_power: a gradient was asked for through its forward-mode tangent"):
        y_dot.sum().backward()


def test_in_modules(example):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))

        def forward(self, x):
            return example["scaled_power"](x, self.weight)

    net, x = Net(), inputs()["x"]
    x_dot = torch.randn_like(x)
    expected = torch.func.jvp(lambda x: oracle(x, net.weight), (x,), (x_dot,))
    for module in (dualize(net), dual_aware(Net)()):
        module.load_state_dict(net.state_dict())
        for found, wanted in zip(jvp(module, (x,), (x_dot,)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_bad_arguments_are_named_at_every_call(example):
    x, weight = inputs().values()
    for _ in range(2):
        example["scaled_power"](x, weight)
        with pytest.raises(ValueError, match="weight: expected shape"):
            example["scaled_power"](x, weight[:6])
        with pytest.raises(ValueError, match="power: expected a finite number >= 1"):
            example["scaled_power"](x, weight, power=0.5)


def test_an_op_without_backends_is_recorded_and_takes_no_request(example):
    with use_backend("triton"), recorded_choices() as chosen:
        for _ in range(2):
            example["scaled_power"](*inputs().values())
            silu(torch.randn(3))
    assert chosen == {"scaled_power": "reference", "silu": "reference"}


def test_the_cases_of_the_guide_are_checked(example):
    line = re.search(r"`(CASES = .*?)`", TEXT)[1]
    names = {"scaled_power": example["scaled_power"], "formula": oracle, "channel_cases": channel_cases}
    exec(line, names)
    for case in names["CASES"]["scaled_power"].small:
        assert max(case.errors(1, torch.float32, torch.device("cpu"), plain=False).values()) < 1e-6


# An op with a backend, whose "kernels" are plain PyTorch; y is differentiable, its tangent and the sum are not.


@operator("toy_cube_forward")
def _cube(x: torch.Tensor, x_dot: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x**3, tangent_or_empty(None if x_dot is None else 3 * x[: x_dot.shape[0]] ** 2 * x_dot, x), x.sum()


@_cube.register_fake
def _(x, x_dot):
    return x.new_empty(x.shape), x.new_empty((num_tangent_rows(x_dot), *x.shape[1:])), x.new_empty(())


_cube.register_gradients(
    lambda ctx, dy: (3 * ctx.saved_tensors[0] ** 2 * dy,),
    save=lambda ctx, inputs, output: inputs[:1],
)


@pytest.fixture
def cube(monkeypatch):
    monkeypatch.setattr(backend, "OPS", dict(backend.OPS))
    return DualOp(
        "toy_cube",
        ["x"],
        check=lambda x: None,
        reference=lambda x: x**3,
        tangent=lambda x, x_dot: 3 * x**2 * x_dot,
        backends={"triton": Backend(_cube, lambda x: None if x.ndim > 1 else "x: expected more dimensions")},
    )


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_both_backends(cube, name):
    with use_backend(f"toy_cube={name}"), recorded_choices() as chosen:
        assert_dual(lambda x: cube(x), lambda x: x**3, {"x": torch.randn(4, 3, dtype=torch.float64)}, **FLOAT64)
    assert chosen == {"toy_cube": name}


def test_an_op_is_known_to_requests_by_its_declaration(cube):
    with (
        pytest.raises(ValueError, match="toy_cube has the backends reference, triton, got 'cuda'"),
        use_backend("toy_cube=cuda"),
    ):
        pass
    with use_backend("toy_cube=triton"), pytest.raises(NotImplementedError, match="x: expected more dimensions"):
        cube(torch.randn(4))


def test_outputs_past_the_differentiable_ones_are_constants(cube):
    x = torch.randn(4, 3, requires_grad=True)
    for run in (_cube, _cube.custom_op):
        y, y_dot, total = run(x, torch.ones(2, 3))
        assert (y.requires_grad, y_dot.requires_grad, total.requires_grad) == (True, False, False)
    with use_backend("toy_cube=triton"):
        y = cube(Dual(x, torch.ones(2, 3)))
    assert not y.tangent.requires_grad
    assert torch.equal(torch.autograd.grad(y.primal.sum(), x)[0], 3 * x.detach() ** 2)
    torch.library.opcheck(_cube.custom_op, (x, None))


def test_rows_unsupported_passes_over_what_is_not_there(monkeypatch):
    monkeypatch.setattr(backend, "triton_unavailable", lambda device: None)
    assert rows_unsupported(x=torch.randn(2, 3), bias=None) is None
    assert rows_unsupported(x=torch.randn(2, 20000)) == "x: expected a width from 1 to 16384, got 20000"
