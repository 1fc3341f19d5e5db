import pytest
import torch

from mfkernels import Dual, RMSNorm, rms_norm, use_backend
from mfkernels.testing import assert_dual


def oracle(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def make(*shape):
    x = torch.randn(shape, dtype=torch.float64)
    return {"x": x, "weight": 1 + 0.3 * torch.randn(shape[-1], dtype=torch.float64)}


SHAPES = [(4, 7, 24), (2, 1, 2730), (3, 17, 2, 48), (4, 9), (1, 1, 3)]


@pytest.fixture(autouse=True)
def _reference():
    torch.manual_seed(1)  # with seed 0 the dual check would draw the inputs again, as their tangents
    with use_backend("reference"):
        yield


# measured: 1.9e-16, 1.6e-7, 1.9e-3
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 4e-16), (torch.float32, 3.2e-7), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype, bound):
    assert_dual(rms_norm, oracle, make(*shape), duals=["x"], dtype=dtype, bound=bound)


def test_strided_views():
    tokens = torch.randn(3, 20 + 7, 24, dtype=torch.float64)[:, 20:]
    heads = torch.randn(3, 7, 3, 2, 24, dtype=torch.float64).unbind(2)[1]
    columns = torch.randn(3, 24, 7, dtype=torch.float64).mT
    for x in (tokens, heads, columns):
        assert_dual(rms_norm, oracle, {**make(24), "x": x}, duals=["x"], dtype=torch.float64, bound=1e-15)


def test_eps_bounds_the_norm_of_a_zero_row():
    x = Dual(torch.zeros(2, 3, 8, dtype=torch.float64), torch.ones(2, 3, 8, dtype=torch.float64))
    y = rms_norm(x, torch.ones(8, dtype=torch.float64), eps=1e-4)
    assert torch.equal(y.primal, torch.zeros(2, 3, 8, dtype=torch.float64))
    torch.testing.assert_close(y.tangent, torch.full((2, 3, 8), 100.0, dtype=torch.float64))


def test_the_weight_may_be_wider_than_the_input():
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    weight = 1 + 0.3 * torch.randn(24)
    y = rms_norm(Dual(x, x), weight)
    assert y.primal.dtype == y.tangent.dtype == torch.bfloat16
    torch.testing.assert_close(y.primal, oracle(x.double(), weight.double()).bfloat16(), rtol=1e-2, atol=1e-2)


def test_module_is_the_ops_and_saves_what_torch_saves():
    norm = RMSNorm(24, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    plain = torch.nn.RMSNorm(24, eps=1e-5)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(4, 7, 24)

    def saved_bytes(fn, arg):
        total = 0

        def pack(a):
            nonlocal total
            total += a.numel() * a.element_size()
            return a

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
            fn(arg)
        return total

    torch.testing.assert_close(norm(x), plain(x))
    assert saved_bytes(norm, Dual(x, torch.randn_like(x))) == saved_bytes(norm, x) <= saved_bytes(plain, x)


def test_bad_arguments():
    x, weight = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight: expected shape \(D,\) of x = \(8,\), got \(1, 8\)"):
        rms_norm(x, weight[None])
    with pytest.raises(TypeError, match="weight: expected a tensor, got a Dual"):
        rms_norm(x, Dual(weight))
    with pytest.raises(ValueError, match="eps: expected a finite number >= 0"):
        rms_norm(x, weight, eps=-1.0)
    with pytest.raises(TypeError, match="x: expected a floating-point dtype"):
        rms_norm(x.long(), weight)
    with pytest.raises(NotImplementedError, match="weight: a forward-mode tangent of a parameter"):
        torch.func.jvp(lambda w: rms_norm(x, w), (weight,), (weight,))


def test_no_rows():
    y = rms_norm(Dual(torch.randn(0, 3, 8), torch.randn(0, 3, 8)), torch.ones(8))
    assert y.primal.shape == y.tangent.shape == (0, 3, 8)
