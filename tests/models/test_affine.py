import pytest
import torch

from meanflow.models import Affine, gaussian_average_velocity
from meanflow.objectives import MeanFlow
from meanflow.sampling import sample
from mfkernels import adaptive_squared_error, jvp
from mfkernels.testing import relative_error

MEAN, STD = 0.7, 0.3


def closed_form(z, r, t, y):
    return gaussian_average_velocity(z, r, t, MEAN, STD)


def inputs(B=6):
    z = torch.randn(B, 1, 3, 3, dtype=torch.float64)
    t = torch.rand(B, dtype=torch.float64)
    return z, t * torch.rand(B, dtype=torch.float64), t, torch.zeros(B, dtype=torch.long)


def test_closed_form_is_the_average_of_the_instantaneous_velocity():
    """u = (z_t − z_r)/(t − r) along the probability-flow ODE, integrated with 2000 midpoint steps."""
    z, r, t, y = inputs()
    x, n = z.clone(), 2000
    for i in range(n):
        s = (t + (r - t) * (i + 0.5) / n).clone()
        h = ((t - r) / n).view(-1, 1, 1, 1)
        before = (t + (r - t) * i / n).clone()
        middle = x - h / 2 * closed_form(x, before, before, y)
        x = x - h * closed_form(middle, s, s, y)
    u = (z - x) / (t - r).view(-1, 1, 1, 1)
    assert relative_error(closed_form(z, r, t, y), u) <= 1e-6


def test_it_satisfies_the_meanflow_identity_and_wrong_tangents_do_not():
    z, r, t, y = inputs()
    v = closed_form(z, t, t, y)
    zero, one = torch.zeros_like(t), torch.ones_like(t)

    def residual(dr, dt, dz=v):
        u, du = jvp(closed_form, (z, r, t), (dz, dr, dt), y=y)
        return adaptive_squared_error(u, v, du, t - r, p=0.0).squared_error.sum().item()

    assert residual(zero, one) <= 1e-27
    assert residual(zero, zero) > 1e-2
    assert residual(one, zero) > 1e-2
    assert residual(zero, one, dz=torch.zeros_like(v)) > 1e-2


def test_the_objective_has_zero_residual_at_the_closed_form():
    """With ω = 0, κ = 1 the target's velocity is the network's own marginal one, so the optimum has no residual."""
    x, r, t, y = inputs()
    r[:2] = t[:2]
    objective = MeanFlow(omega=0.0, kappa=1.0, norm_p=0.0, label_dropout=0.0)
    net = closed_form
    net.num_classes = 1
    out = objective.loss_at(net, x=x, noise=torch.randn_like(x), t=t, r=r, y=y)
    assert out.squared_error.max() <= 1e-28


def test_one_step_sampling_gives_the_data_distribution_exactly():
    noise = torch.randn(4000, 1, 2, 2, dtype=torch.float64)
    x = sample(closed_form, noise, torch.zeros(4000, dtype=torch.long))
    torch.testing.assert_close(x, MEAN + STD * noise)


def test_affine_against_func_jvp():
    net = Affine(input_size=3, in_channels=1, hidden_size=16, num_classes=2).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    z, r, t, y = inputs()
    tangents = tuple(torch.randn_like(a) for a in (z, r, t))
    u, du = jvp(net, (z, r, t), tangents, rows=4, y=y)
    ref, ref_dot = torch.func.jvp(lambda *a: net(*a, y), (z, r, t), tangents)
    assert relative_error(u, ref) <= 1e-15
    assert relative_error(du, ref_dot[:4]) <= 2e-15


def test_affine_checks_its_input():
    with pytest.raises(ValueError, match=r"z: expected shape \(B, 1, 3, 3\)"):
        Affine(3, 1)(torch.randn(2, 1, 4, 4), torch.rand(2), torch.rand(2), torch.zeros(2, dtype=torch.long))
    for name in ("input_size", "in_channels", "hidden_size", "num_classes"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            Affine(**{"input_size": 3, "in_channels": 1, name: 0})
