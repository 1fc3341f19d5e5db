import pytest
import torch
from both_backends import DEVICE, both, cases
from memory import saved_bytes
from op_checks import assert_compiles, assert_forward_mode, assert_no_gradient_through_the_tangent

from mfkernels import Dual, TimestepEmbedder, timestep_embedding
from mfkernels.testing import relative_error
from mfkernels.timestep_embedding import op

backend = both()
case = cases(
    reference=(4e-16, 2e-7, 4.2e-3),  # measured: 2.4e-16, 9.1e-8, 2.2e-3
    triton=(2.2e-7, 5e-4, 6.6e-3),  # 1.2e-7, 2.6e-4, 4.3e-3
)
thousandths = cases(
    reference={torch.float16: 4e-4, torch.bfloat16: 3.4e-3},  # measured: 2.7e-4, 1.7e-3
    triton={torch.float16: 4e-4, torch.bfloat16: 7.4e-3},  # 2.7e-4, 3.7e-3
)
module_case = cases(
    reference={torch.float64: 1.2e-15},  # measured 6.0e-16
    triton={torch.float32: 5e-7},  # 2.5e-7
)


def oracle(t, dim=16, max_period=10000.0):
    half = dim // 2
    omega = torch.tensor([max_period ** (-i / half) for i in range(half)], dtype=torch.float64, device=t.device)
    return torch.cat([torch.cos(t[:, None] * omega), torch.sin(t[:, None] * omega)], 1)


def of_dim(dim):
    return lambda t: timestep_embedding(t, dim)


@pytest.mark.parametrize(("B", "dim"), [(1, 16), (5, 6), (17, 256), (33, 2), (64, 16)])
def test_against_float64(B, dim, case):
    case.check(of_dim(dim), lambda t: oracle(t, dim), {"t": torch.rand(B, dtype=torch.float64)}, ["t"])


def test_times_in_thousandths_in_half_precision(thousandths):
    t = 1000 * torch.rand(9, dtype=torch.float64)
    thousandths.check(of_dim(16), oracle, {"t": t}, ["t"])


def test_times_in_thousandths_and_another_period(backend):
    """DiT's own times go to 1000: the angle's own rounding is then 3e-5 at most."""
    t = (1000 * torch.rand(9, dtype=torch.float64)).float()
    out = timestep_embedding(t, 64, max_period=100.0)
    assert relative_error(out, oracle(t.double(), 64, 100.0)) <= 1.2e-5  # measured 8.3e-6, and 1.0e-5 with Triton


def test_strided_times(backend):
    t = torch.rand(2, 9, dtype=torch.float64).T[:, 0]  # of a (9, 2) view
    assert relative_error(timestep_embedding(t.float(), 8), oracle(t, 8)) <= 5.5e-8  # measured 1.9e-8 and 2.6e-8
    expanded = torch.rand(1).expand(5)
    assert relative_error(timestep_embedding(expanded, 8), oracle(expanded.double(), 8)) <= 5.5e-8


def test_module_against_float64(module_case):
    net = TimestepEmbedder(24).to(DEVICE, module_case.dtype)
    w = [p.detach().double().cpu() for p in net.parameters()]

    def reference(t):
        h = oracle(t, 256) @ w[0].T + w[1]
        return (h / (1 + torch.exp(-h))) @ w[2].T + w[3]

    t = torch.rand(5, dtype=torch.float64)
    module_case.check(net, reference, {"t": t}, ["t"])


def test_no_times(backend):
    t = torch.rand(0, requires_grad=True)
    out = timestep_embedding(Dual(t, t.detach()), 8)
    assert out.primal.shape == out.tangent.shape == (0, 8)
    (g,) = torch.autograd.grad(out.primal.sum(), t)
    assert g.shape == (0,)


@pytest.mark.parametrize("dim", [0, 7])
def test_odd_dim(dim, backend):
    with pytest.raises(ValueError, match="dim: expected an even integer"):
        timestep_embedding(torch.rand(3), dim)


def test_bad_shape_and_period(backend):
    with pytest.raises(ValueError, match="t: expected 1 dimensions"):
        timestep_embedding(torch.rand(3, 1), 8)
    with pytest.raises(ValueError, match="max_period"):
        timestep_embedding(torch.rand(3), 8, max_period=0.5)


def test_sizes_of_the_embedder():
    with pytest.raises(ValueError, match="hidden_size: expected at least 1, got 0"):
        TimestepEmbedder(0)
    for odd in (0, 7):
        with pytest.raises(ValueError, match=f"frequency_embedding_size: expected an even number >= 2, got {odd}"):
            TimestepEmbedder(8, odd)


# ----------------------------------------------------------------------------------------------- Triton's kernels alone


def test_forward_mode_ad(triton):
    assert_forward_mode(of_dim(16), oracle, {"t": torch.rand(5, dtype=torch.float64)}, ["t"], bound=4e-7)


def test_a_gradient_through_the_tangent_is_an_error(triton):
    assert_no_gradient_through_the_tangent("timestep_embedding", of_dim(8), {"t": torch.rand(5, device=DEVICE)}, ["t"])


def test_compiles_as_one_graph(triton):
    t = torch.rand(5, device=DEVICE)
    assert_compiles(of_dim(8), [Dual(t, torch.randn_like(t[:2]))])


def test_backward_keeps_the_times_alone(triton):
    t = torch.rand(5, device=DEVICE, requires_grad=True)
    assert saved_bytes(lambda: timestep_embedding(t, 8)) == t.nbytes
    assert saved_bytes(lambda: timestep_embedding(Dual(t, t.detach()), 8)) == t.nbytes


def test_what_they_do_not_serve_is_refused_by_name(triton):
    with pytest.raises(NotImplementedError, match=r"timestep_embedding: the triton backend cannot.*torch.float64"):
        timestep_embedding(torch.rand(3, dtype=torch.float64, device=DEVICE), 8)
    with pytest.raises(NotImplementedError, match="dim: expected at most 16384, got 20000"):
        timestep_embedding(torch.rand(3, device=DEVICE), 20000)


def test_the_operators_obey_pytorchs_rules(triton):
    t, t_dot = torch.rand(5, device=DEVICE, requires_grad=True), torch.randn(2, device=DEVICE)
    for tangent in (t_dot, None):
        torch.library.opcheck(op._forward.custom_op, (t, tangent, 8, 10000.0))
    torch.library.opcheck(op._backward.custom_op, (torch.randn(5, 8, device=DEVICE), t.detach(), 10000.0))
