import pytest
import torch

from meanflow.models import MLP
from mfkernels import jvp
from mfkernels.testing import relative_error


def inputs(B=6, dtype=torch.float64):
    t = torch.rand(B, dtype=dtype)
    return torch.randn(B, 2, 1, 1, dtype=dtype), t * torch.rand(B, dtype=dtype), t, torch.arange(B) % 3


@pytest.mark.parametrize("depth", [0, 2])
def test_value_tangent_and_gradients_against_func_jvp(depth):
    net = MLP(1, 2, hidden_size=24, depth=depth, num_classes=3).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    z, r, t, y = inputs()
    tangents = tuple(torch.randn_like(a) for a in (z, r, t))
    u, du = jvp(net, (z, r, t), tangents, rows=4, y=y)
    ref, ref_dot = torch.func.jvp(lambda *a: net(*a, y), (z, r, t), tangents)
    assert relative_error(u, ref) <= 2e-15
    assert relative_error(du, ref_dot[:4]) <= 5e-15
    weight = torch.randn_like(u)
    found = torch.autograd.grad((u * weight).sum(), list(net.parameters()), materialize_grads=True)
    expected = torch.autograd.grad((net(z, r, t, y) * weight).sum(), list(net.parameters()), materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= 1e-14


def test_it_starts_silent():
    assert not MLP(2, 1, hidden_size=8)(
        torch.randn(3, 1, 2, 2), torch.rand(3), torch.rand(3), torch.zeros(3).long()
    ).any()


def test_it_checks_its_sizes_and_its_input():
    for name, least in (("input_size", 1), ("in_channels", 1), ("hidden_size", 1), ("depth", 0), ("num_classes", 1)):
        with pytest.raises(ValueError, match=f"{name}: expected at least {least}, got {least - 1}"):
            MLP(**{"input_size": 1, "in_channels": 2, name: least - 1})
    with pytest.raises(ValueError, match=r"z: expected shape \(B, 2, 1, 1\)"):
        MLP(1, 2)(torch.randn(3, 2), torch.rand(3), torch.rand(3), torch.zeros(3, dtype=torch.long))
