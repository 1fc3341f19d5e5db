import oracles
import pytest
import torch
from both_backends import DEVICE, both, cases
from memory import saved_bytes
from op_checks import assert_tangents_of_different_rows

from mfkernels import Dual, SwiGLU, split_map, swiglu


def make(*shape, dtype=torch.float64):
    return {"a": 2 * torch.randn(shape, dtype=dtype), "b": torch.randn(shape, dtype=dtype)}


SHAPES = [(4, 7, 24), (2, 1, 2730), (3, 5, 2, 9), (4, 9), (1, 1, 3), (2, 276, 48), (2, 2, 768), (1, 3, 1152)]
backend = both()
case = cases(
    reference=(4.5e-16, 2.2e-7, 8e-3),  # measured: 2.1e-16, 1.1e-7, 4.0e-3
    triton=(2.2e-7, 5.6e-4, 1.2e-2),  # 1.1e-7, 2.8e-4, 6.0e-3
)
module_case = cases(
    reference=(4.1e-16, 4.1e-7, 1.2e-2),  # measured: 2.0e-16, 2.0e-7, 5.9e-3
    triton=(4.1e-7, 1.2e-3, 1.2e-2),  # 2.0e-7, 5.9e-4, 5.6e-3
)


@pytest.mark.parametrize(
    ("shape", "duals"), [(s, "ab") for s in SHAPES] + [(s, one) for s in SHAPES[:2] for one in "ab"]
)
def test_against_float64(duals, shape, case):
    case.check(swiglu, oracles.swiglu, make(*shape), duals)


@pytest.mark.parametrize("shape", [(4, 7, 2 * 24), (2, 3, 2 * 2730), (5, 2 * 300)])
def test_halves_of_one_projection(shape, case):
    def run(ab):
        a, b = split_map(lambda x: x.chunk(2, -1), ab)
        return swiglu(a, b)

    inputs = {"ab": torch.randn(shape, dtype=torch.float64)}
    case.check(run, lambda ab: oracles.swiglu(*ab.chunk(2, -1)), inputs, ["ab"])


def test_tangents_of_different_rows(case):
    rows = {"a": 1, "b": 3}
    assert_tangents_of_different_rows(swiglu, oracles.swiglu, make(4, 3, 8), rows, *case)


def mlp_oracle(x, w1, w2, w3):
    return oracles.swiglu(x @ w1.T, x @ w3.T) @ w2.T


@pytest.mark.parametrize("shape", [(4, 7, 24), (3, 10)])
def test_module(shape, module_case):
    D, hidden = shape[-1], 27
    inputs = {"x": torch.randn(shape, dtype=torch.float64)}
    for name, size in (("w1", (hidden, D)), ("w2", (D, hidden)), ("w3", (hidden, D))):
        inputs[name] = torch.randn(size, dtype=torch.float64) / size[1] ** 0.5
    net = SwiGLU(D, hidden).to(DEVICE, module_case.dtype)
    assert list(net.state_dict()) == ["w1.weight", "w2.weight", "w3.weight"]

    def run(x, **weights):
        return torch.func.functional_call(net, {f"{name}.weight": w for name, w in weights.items()}, (x,))

    module_case.check(run, mlp_oracle, inputs, ["x"])


def test_backward_keeps_nothing_of_the_tangent(backend):
    net, x = SwiGLU(24, 50, bias=True), torch.randn(4, 7, 24)

    assert saved_bytes(lambda: net(Dual(x, torch.randn_like(x)))) == saved_bytes(lambda: net(x))


def test_bad_arguments(backend):
    a = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"b: expected shape \(B, …, D\) of a = \(2, 3, 8\), got \(3, 8\)"):
        swiglu(a, a[0])
    with pytest.raises(TypeError, match="b: expected the dtype of a"):
        swiglu(a, a.double())
    with pytest.raises(TypeError, match="a: expected a tensor or a Dual, got float"):
        swiglu(1.0, a)


def test_no_rows(backend):
    y = swiglu(Dual(torch.randn(0, 3, 8), torch.randn(0, 3, 8)), torch.randn(0, 3, 8))
    assert y.primal.shape == y.tangent.shape == (0, 3, 8)
