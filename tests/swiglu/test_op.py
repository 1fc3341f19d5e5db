import pytest
import torch

from mfkernels import Dual, SwiGLU, swiglu, use_backend
from mfkernels.testing import assert_dual


def oracle(a, b):
    return a / (1 + torch.exp(-a)) * b


def make(*shape):
    """Two halves of one projection."""
    a, b = (2 * torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64)).chunk(2, -1)
    return {"a": a, "b": b}


SHAPES = [(4, 7, 24), (2, 1, 2730), (3, 5, 2, 9), (4, 9), (1, 1, 3)]


@pytest.fixture(autouse=True)
def _reference():
    torch.manual_seed(1)  # with seed 0 the dual check would draw the inputs again, as their tangents
    with use_backend("reference"):
        yield


# measured: 2.6e-16, 1.1e-7, 4.5e-3
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 5.2e-16), (torch.float32, 2.2e-7), (torch.bfloat16, 9e-3)]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("duals", ["ab", "a", "b"])
def test_against_float64(duals, shape, dtype, bound):
    assert_dual(swiglu, oracle, make(*shape), duals=duals, dtype=dtype, bound=bound)


def test_tangents_of_different_rows():
    m = make(4, 3, 8)
    a_dot, b_dot = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(3, 3, 8, dtype=torch.float64)
    y = swiglu(Dual(m["a"], a_dot), Dual(m["b"], b_dot))
    tangents = tuple(torch.cat([t, t.new_zeros(4 - t.shape[0], 3, 8)]) for t in (a_dot, b_dot))
    _, ref = torch.func.jvp(oracle, (m["a"], m["b"]), tangents)
    torch.testing.assert_close(y.tangent, ref[:3])


def mlp_oracle(x, w1, w2, w3):
    return oracle(x @ w1.T, x @ w3.T) @ w2.T


@pytest.mark.parametrize("shape", [(4, 7, 24), (3, 10)])
def test_module(shape):
    D, hidden = shape[-1], 27
    inputs = {"x": torch.randn(shape, dtype=torch.float64)}
    for name, size in (("w1", (hidden, D)), ("w2", (D, hidden)), ("w3", (hidden, D))):
        inputs[name] = torch.randn(size, dtype=torch.float64) / size[1] ** 0.5
    net = SwiGLU(D, hidden).double()
    assert list(net.state_dict()) == ["w1.weight", "w2.weight", "w3.weight"]

    def run(x, **weights):
        return torch.func.functional_call(net, {f"{name}.weight": w for name, w in weights.items()}, (x,))

    assert_dual(run, mlp_oracle, inputs, duals=["x"], dtype=torch.float64, bound=1e-15)


def test_backward_keeps_nothing_of_the_tangent():
    net, x = SwiGLU(24, 50, bias=True), torch.randn(4, 7, 24)

    def saved_bytes(arg):
        total = 0

        def pack(a):
            nonlocal total
            total += a.numel() * a.element_size()
            return a

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
            net(arg)
        return total

    assert saved_bytes(Dual(x, torch.randn_like(x))) == saved_bytes(x)


def test_bad_arguments():
    a = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"b: expected shape \(B, …, D\) of a = \(2, 3, 8\), got \(3, 8\)"):
        swiglu(a, a[0])
    with pytest.raises(TypeError, match="b: expected the dtype of a"):
        swiglu(a, a.double())
    with pytest.raises(TypeError, match="a: expected a tensor or a Dual, got float"):
        swiglu(1.0, a)


def test_no_rows():
    y = swiglu(Dual(torch.randn(0, 3, 8), torch.randn(0, 3, 8)), torch.randn(0, 3, 8))
    assert y.primal.shape == y.tangent.shape == (0, 3, 8)
