import pytest
import torch

from mfkernels import adaptive_squared_error
from mfkernels.testing import relative_error


def oracle(u, v, correction, interval, p, eps):
    rows = len(correction)
    target = torch.cat([v[:rows] - interval[:rows].view(-1, 1, 1, 1) * correction, v[rows:]]).detach()
    e = ((u - target) ** 2).sum((1, 2, 3))
    return e / (e.detach() + eps) ** p


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-15), (torch.float32, 6e-7), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("p", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("rows", [0, 2, 5])
def test_against_float64(rows, p, dtype, bound):
    u, v, correction = torch.randn(3, 5, 3, 4, 4, dtype=torch.float64).to(dtype)
    interval = torch.rand(5, dtype=torch.float64).to(dtype)
    u.requires_grad_()
    wide = [a.detach().double() for a in (u, v, correction[:rows], interval)]
    wide[0].requires_grad_()
    out = adaptive_squared_error(u, v, correction[:rows], interval, p=p, eps=0.01)
    ref = oracle(*wide, p, 0.01)
    assert relative_error(out.per_sample, ref) <= bound
    assert relative_error(out.squared_error, oracle(*wide, 0.0, 0.01)) <= bound
    (g,) = torch.autograd.grad(out.per_sample.mean(), u)
    (g_ref,) = torch.autograd.grad(ref.mean(), wide[0])
    assert relative_error(g, g_ref) <= bound


def test_bad_arguments():
    u, a = torch.randn(3, 1, 2, 2), torch.rand(3)
    with pytest.raises(ValueError, match=r"correction: expected shape .* with at most 3 rows"):
        adaptive_squared_error(u, u, torch.randn(4, 1, 2, 2), a)
    with pytest.raises(ValueError, match="correction: expected a tensor without gradient"):
        adaptive_squared_error(u, u, u.clone().requires_grad_(), a)
    with pytest.raises(TypeError, match="correction: expected the dtype of u"):
        adaptive_squared_error(u, u, u.double(), a)
    with pytest.raises(ValueError, match="interval: expected a tensor"):
        adaptive_squared_error(u, u, u)
    with pytest.raises(ValueError, match="correction: expected a tensor"):
        adaptive_squared_error(u, u, interval=a)
    with pytest.raises(ValueError, match=r"interval: expected shape \(3,\) or \(2,\), got \(1,\)"):
        adaptive_squared_error(u, u, u[:2], a[:1])
    with pytest.raises(ValueError, match="v: expected shape"):
        adaptive_squared_error(u, u[:1])
    with pytest.raises(ValueError, match="eps"):
        adaptive_squared_error(u, u, eps=0.0)
    with pytest.raises(ValueError, match="p: expected a finite number >= 0"):
        adaptive_squared_error(u, u, p=-1.0)
