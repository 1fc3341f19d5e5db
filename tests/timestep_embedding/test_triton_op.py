"""The public function on the Triton backend (in the interpreter where there is no GPU)."""

import pytest
import torch
from memory import saved_bytes
from op_checks import DEVICE, assert_compiles, assert_forward_mode

from mfkernels import Dual, timestep_embedding, use_backend
from mfkernels.testing import assert_dual, relative_error
from mfkernels.timestep_embedding import op

pytest.importorskip("triton", minversion="3.4")


@pytest.fixture(autouse=True)
def _triton(poison_empty):
    with use_backend("triton"):
        yield


def oracle(t, dim=16, max_period=10000.0):
    half = dim // 2
    omega = torch.tensor([max_period ** (-i / half) for i in range(half)], dtype=torch.float64, device=t.device)
    return torch.cat([torch.cos(t[:, None] * omega), torch.sin(t[:, None] * omega)], 1)


# measured in the interpreter: 1.1e-7, 2.5e-4, 3.3e-3 (it cuts bfloat16 off where a GPU rounds)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2.2e-7), (torch.float16, 5e-4), (torch.bfloat16, 6.6e-3)])
@pytest.mark.parametrize(("B", "dim"), [(1, 16), (17, 256), (5, 6), (33, 2)])
def test_against_float64(B, dim, dtype, bound):
    assert_dual(
        lambda t: timestep_embedding(t, dim),
        lambda t: oracle(t, dim),
        {"t": torch.rand(B, dtype=torch.float64)},
        duals=["t"],
        dtype=dtype,
        bound=bound,
        device=DEVICE,
    )


def test_times_in_thousandths_and_another_period():
    """DiT's own times go to 1000: the angle's own rounding is then 3e-5 at most; measured 5.8e-6."""
    t = (1000 * torch.rand(9, dtype=torch.float64)).float().to(DEVICE)
    out = timestep_embedding(t, 64, max_period=100.0)
    assert relative_error(out, oracle(t.double(), 64, 100.0)) <= 1.2e-5


def test_strided_times():
    t = torch.rand(2, 9, dtype=torch.float64).T[:, 0]  # of a (9, 2) view
    assert (
        relative_error(timestep_embedding(t.float().to(DEVICE), 8), oracle(t, 8)) <= 5.5e-8
    )  # measured 1.9e-8 and 2.6e-8
    expanded = torch.rand(1).expand(5).to(DEVICE)
    assert relative_error(timestep_embedding(expanded, 8), oracle(expanded.double(), 8)) <= 5.5e-8


def test_opcheck():
    t, t_dot = torch.rand(5, device=DEVICE, requires_grad=True), torch.randn(2, device=DEVICE)
    for tangent in (t_dot, None):
        torch.library.opcheck(op._forward.custom_op, (t, tangent, 8, 10000.0))
    torch.library.opcheck(op._backward.custom_op, (torch.randn(5, 8, device=DEVICE), t.detach(), 10000.0))


def test_forward_mode_ad():
    inputs = {"t": torch.rand(5, dtype=torch.float64)}
    assert_forward_mode(lambda t: timestep_embedding(t, 16), oracle, inputs, ["t"], bound=4e-7)


def test_a_gradient_through_the_tangent_is_an_error():
    t = torch.rand(5, device=DEVICE, requires_grad=True)
    _, out_dot = torch.func.jvp(lambda t: timestep_embedding(t, 8), (t,), (torch.ones_like(t.detach()),))
    with pytest.raises(RuntimeError, match="timestep_embedding: a gradient was asked for through its forward-mode"):
        out_dot.sum().backward()


def test_compiles_as_one_graph():
    t = torch.rand(5, device=DEVICE)
    assert_compiles(lambda t: timestep_embedding(t, 8), [Dual(t, torch.randn_like(t[:2]))])


def test_backward_keeps_the_times_alone():
    t = torch.rand(5, device=DEVICE, requires_grad=True)
    assert saved_bytes(lambda: timestep_embedding(t, 8)) == t.nbytes
    assert saved_bytes(lambda: timestep_embedding(Dual(t, t.detach()), 8)) == t.nbytes


def test_what_it_does_not_serve_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"timestep_embedding: the triton backend cannot.*torch.float64"):
        timestep_embedding(torch.rand(3, dtype=torch.float64, device=DEVICE), 8)
    with pytest.raises(NotImplementedError, match="dim: expected at most 16384, got 20000"):
        timestep_embedding(torch.rand(3, device=DEVICE), 20000)


def test_empty():
    t = torch.rand(0, device=DEVICE, requires_grad=True)
    out = timestep_embedding(Dual(t, t.detach()), 8)
    assert out.primal.shape == out.tangent.shape == (0, 8)
    (g,) = torch.autograd.grad(out.primal.sum(), t)
    assert g.shape == (0,)
