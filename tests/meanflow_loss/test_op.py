import pytest
import torch

from mfkernels import meanflow_loss
from mfkernels.testing import relative_error


def oracle(u, du, v, t, r, p, eps):
    du = torch.cat([du, torch.zeros_like(u[len(du) :])])
    target = (v - (t - r).view(-1, 1, 1, 1) * du).detach()
    e = ((u - target) ** 2).sum((1, 2, 3))
    return e / (e.detach() + eps) ** p


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-15), (torch.float32, 6e-7), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("p", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("rows", [0, 2, 5])
def test_against_float64(rows, p, dtype, bound):
    u, du, v = torch.randn(3, 5, 3, 4, 4, dtype=torch.float64).to(dtype)
    t, r = torch.rand(2, 5, dtype=torch.float64).to(dtype)
    u.requires_grad_()
    wide = [a.detach().double() for a in (u, du[:rows], v, t, r)]
    wide[0].requires_grad_()
    out = meanflow_loss(u, du[:rows], v, t, r, norm_p=p, norm_eps=0.01)
    ref = oracle(*wide, p, 0.01)
    assert relative_error(out.per_sample, ref) <= bound
    assert relative_error(out.squared_error, oracle(*wide, 0.0, 0.01)) <= bound
    (g,) = torch.autograd.grad(out.per_sample.mean(), u)
    (g_ref,) = torch.autograd.grad(ref.mean(), wide[0])
    assert relative_error(g, g_ref) <= bound


def test_bad_arguments():
    u, t = torch.randn(3, 1, 2, 2), torch.rand(3)
    with pytest.raises(ValueError, match="du_dt: expected at most 3 rows"):
        meanflow_loss(u, torch.randn(4, 1, 2, 2), u, t, t)
    with pytest.raises(ValueError, match="du_dt: a tangent must not require grad"):
        meanflow_loss(u, u.clone().requires_grad_(), u, t, t)
    with pytest.raises(ValueError, match="v: expected shape"):
        meanflow_loss(u, u, u[:1], t, t)
    with pytest.raises(ValueError, match="norm_eps"):
        meanflow_loss(u, u, u, t, t, norm_eps=0.0)
    with pytest.raises(ValueError, match="norm_p"):
        meanflow_loss(u, u, u, t, t, norm_p=-1.0)
