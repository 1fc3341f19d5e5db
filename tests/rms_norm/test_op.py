import oracles
import pytest
import torch
from both_backends import both, cases
from memory import saved_bytes

from mfkernels import Dual, RMSNorm, linear_map, rms_norm


def make(*shape):
    x = torch.randn(shape, dtype=torch.float64)
    return {"x": x, "weight": 1 + 0.3 * torch.randn(shape[-1], dtype=torch.float64)}


SHAPES = [(4, 7, 24), (2, 1, 2730), (3, 17, 2, 48), (4, 9), (1, 1, 3), (2, 276, 48), (1, 5, 1152), (2, 3, 768)]
backend = both()
case = cases(
    reference=(5e-16, 4.4e-7, 4.2e-3),  # measured: 2.2e-16, 2.2e-7, 2.1e-3
    triton=(4e-7, 5.6e-4, 9.7e-3),  # 2.0e-7, 2.7e-4, 4.8e-3
)


@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, case):
    case.check(rms_norm, oracles.rms_norm, make(*shape), ["x"])


@pytest.mark.parametrize(
    "view", [lambda a: a[:, 5:], lambda a: a.unflatten(1, (3, 4))[:, :, 1], lambda a: a[..., :7].mT]
)
def test_strided_views(view, case):
    inputs = {"x": torch.randn(3, 12, 24, dtype=torch.float64), "weight": make(24)["weight"]}
    width = view(inputs["x"]).shape[-1]
    case.check(
        lambda x, weight: rms_norm(linear_map(view, x), weight[:width]),
        lambda x, weight: oracles.rms_norm(view(x), weight[:width]),
        inputs,
        ["x"],
    )


def test_eps_bounds_the_norm_of_a_zero_row(backend):
    y = rms_norm(Dual(torch.zeros(2, 3, 8), torch.ones(2, 3, 8)), torch.ones(8), eps=1e-4)
    assert torch.equal(y.primal, torch.zeros(2, 3, 8))
    torch.testing.assert_close(y.tangent, torch.full((2, 3, 8), 100.0))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_the_gradients_of_a_few_rows_are_finite_without_eps(backend, eps):
    """A block of rows has some that are not there."""
    x, weight = torch.randn(3, 5), torch.randn(5).requires_grad_()
    (dweight,) = torch.autograd.grad(rms_norm(x, weight, eps=eps).sum(), weight)
    torch.testing.assert_close(dweight, (x / x.square().mean(-1, keepdim=True).sqrt()).sum(0), rtol=1e-4, atol=1e-4)


def test_the_weight_may_be_wider_than_the_input(backend):
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    weight = 1 + 0.3 * torch.randn(24)
    y = rms_norm(Dual(x, x), weight)
    assert y.primal.dtype == y.tangent.dtype == torch.bfloat16
    torch.testing.assert_close(y.primal, oracles.rms_norm(x.double(), weight.double()).bfloat16(), rtol=1e-2, atol=1e-2)


def test_module_is_the_ops_and_saves_what_torch_saves(backend):
    norm = RMSNorm(24, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    plain = torch.nn.RMSNorm(24, eps=1e-5)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(4, 7, 24, requires_grad=True)

    torch.testing.assert_close(norm(x), plain(x))
    kept = saved_bytes(lambda: norm(x))
    assert saved_bytes(lambda: norm(Dual(x, torch.randn_like(x)))) == kept
    assert kept <= saved_bytes(lambda: plain(x))


def test_bad_arguments(backend):
    x, weight = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight: expected shape \(D,\) of x = \(8,\), got \(1, 8\)"):
        rms_norm(x, weight[None])
    with pytest.raises(TypeError, match="weight: expected a tensor, got a Dual"):
        rms_norm(x, Dual(weight))
    with pytest.raises(ValueError, match="eps: expected a finite number >= 0"):
        rms_norm(x, weight, eps=-1.0)
    with pytest.raises(ValueError, match=r"x: expected \(B, …, D\), got shape \(8,\)"):
        rms_norm(x[0, 0], weight)
    with pytest.raises(TypeError, match="x: expected a floating-point dtype"):
        rms_norm(x.long(), weight)
    with pytest.raises(NotImplementedError, match="weight: a forward-mode tangent of a parameter"):
        torch.func.jvp(lambda w: rms_norm(x, w), (weight,), (weight,))


def test_no_rows(backend):
    y = rms_norm(Dual(torch.randn(0, 3, 8), torch.randn(0, 3, 8)), torch.ones(8))
    assert y.primal.shape == y.tangent.shape == (0, 3, 8)
