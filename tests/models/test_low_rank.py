"""The low-rank baseline: what it can represent, and the rank of its Jacobian beside that of a transformer."""

import pytest
import torch

from meanflow.models import DiT, LowRank, gaussian_average_velocity
from mfkernels import jvp
from mfkernels.testing import relative_error

R, T = 0.2, 0.7


def inputs(B=6, side=3):
    z = torch.randn(B, 1, side, side, dtype=torch.float64)
    t = torch.rand(B, dtype=torch.float64)
    return z, t * torch.rand(B, dtype=torch.float64), t, torch.arange(B) % 2


def with_random_weights(net, std=0.3):
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net.double()


def test_it_can_be_the_average_velocity_of_correlated_gaussian_data():
    """Σ = s²·I + FFᵀ of rank 2 beside the identity: in its eigenbasis each direction is `gaussian_average_velocity`."""
    d, rank, s = 9, 2, 0.4
    mean, F = torch.randn(d, dtype=torch.float64), torch.randn(d, rank, dtype=torch.float64)
    values, Q = torch.linalg.eigh(s**2 * torch.eye(d, dtype=torch.float64) + F @ F.T)  # [d], [d, d]
    z, _, _, y = inputs()
    r, t = torch.full((6,), R, dtype=torch.float64), torch.full((6,), T, dtype=torch.float64)
    expected = gaussian_average_velocity(z.flatten(1) @ Q, r, t, mean @ Q, values.sqrt()) @ Q.T  # [B, d]

    one, zero = torch.ones(1, d, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
    a = gaussian_average_velocity(one, r[:1], t[:1], 0.0, values.sqrt())[0]  # [d], the slope in each direction
    assert torch.equal(gaussian_average_velocity(zero, r[:1], t[:1], 0.0, values.sqrt()), zero)
    shift = -Q @ (a * (1 - T) * (Q.T @ mean)) - mean  # [d]
    net = LowRank(3, 1, hidden_size=8, rank=rank).double()
    with torch.no_grad():
        net.down.weight.copy_(Q[:, -rank:].T)
        net.up.weight.copy_(Q[:, -rank:])
        net.final_layer[1].bias.copy_(torch.cat([a[-rank:] - a[0], a[0].expand(d), shift]))
    assert relative_error(net(z, r, t, torch.zeros_like(y)).flatten(1), expected) <= 1e-14


@pytest.mark.parametrize("rank", [1, 3])
def test_blocks_off_the_diagonal_of_its_jacobian_have_its_rank_and_those_of_a_transformer_are_full(rank):
    z, r, t, y = inputs(1, side=4)
    upper = {}
    for name, net in (
        ("LowRank", LowRank(4, 1, hidden_size=8, rank=rank, num_classes=2)),
        ("DiT", DiT(4, 1, 1, hidden_size=16, depth=1, num_heads=2, num_classes=2)),
    ):
        net = with_random_weights(net, std=0.15)
        J = torch.autograd.functional.jacobian(lambda z, net=net: net(z, r, t, y), z).reshape(16, 16)
        upper[name] = int(torch.linalg.matrix_rank(J[:8, 8:], rtol=1e-10))
    assert upper == {"LowRank": rank, "DiT": 8}


def test_value_tangent_and_gradients_against_func_jvp():
    net = with_random_weights(LowRank(3, 1, hidden_size=16, rank=2, num_classes=2))
    z, r, t, y = inputs()
    tangents = tuple(torch.randn_like(a) for a in (z, r, t))
    u, du = jvp(net, (z, r, t), tangents, rows=4, y=y)
    ref, ref_dot = torch.func.jvp(lambda *a: net(*a, y), (z, r, t), tangents)
    assert relative_error(u, ref) <= 1e-15
    assert relative_error(du, ref_dot[:4]) <= 2e-15
    weight = torch.randn_like(u)
    found = torch.autograd.grad((u * weight).sum(), list(net.parameters()))
    expected = torch.autograd.grad((net(z, r, t, y) * weight).sum(), list(net.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= 1e-14


def test_it_starts_silent_and_its_coupling_learns():
    net = LowRank(3, 1, rank=2)
    z, r, t, _ = (a.float() if a.is_floating_point() else a for a in inputs())
    u = net(z, r, t, torch.zeros(6, dtype=torch.long))
    assert not u.any()
    u.sum().backward()
    assert net.final_layer[1].bias.grad[:2].abs().min() > 0


def test_it_checks_its_sizes_and_its_input():
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        LowRank(3, 1, rank=0)
    with pytest.raises(ValueError, match="rank: expected at most the 9 values of an image, got 10"):
        LowRank(3, 1, rank=10)
    with pytest.raises(ValueError, match=r"z: expected shape \(B, 1, 3, 3\)"):
        LowRank(3, 1)(torch.randn(2, 1, 4, 4), torch.rand(2), torch.rand(2), torch.zeros(2, dtype=torch.long))
