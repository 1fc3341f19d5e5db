import pytest
import torch

from mfkernels import TimestepEmbedder, timestep_embedding
from mfkernels.testing import assert_dual


def oracle(t, dim=16):
    half = dim // 2
    omega = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    return torch.cat([torch.cos(t[:, None] * omega), torch.sin(t[:, None] * omega)], 1)


# measured: 2.2e-16, 7.8e-8, 2.1e-3
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 4e-16), (torch.float32, 2e-7), (torch.bfloat16, 4.2e-3)])
@pytest.mark.parametrize("B", [1, 5, 64])
def test_against_float64(B, dtype, bound):
    t = torch.rand(B, dtype=torch.float64)
    assert_dual(lambda t: timestep_embedding(t, 16), oracle, {"t": t}, duals=["t"], dtype=dtype, bound=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 4e-4), (torch.bfloat16, 3.4e-3)])
def test_times_in_thousandths_in_half_precision(dtype, bound):
    t = 1000 * torch.rand(9, dtype=torch.float64)
    assert_dual(lambda t: timestep_embedding(t, 16), oracle, {"t": t}, duals=["t"], dtype=dtype, bound=bound)


def test_module_against_float64():
    net = TimestepEmbedder(24).double()
    w = [p.detach() for p in net.parameters()]

    def reference(t):
        h = oracle(t, 256) @ w[0].T + w[1]
        return (h / (1 + torch.exp(-h))) @ w[2].T + w[3]

    t = torch.rand(5, dtype=torch.float64)
    assert_dual(net, reference, {"t": t}, duals=["t"], dtype=torch.float64, bound=1.2e-15)  # measured 6.0e-16


@pytest.mark.parametrize("dim", [0, 7])
def test_odd_dim(dim):
    with pytest.raises(ValueError, match="dim: expected an even integer"):
        timestep_embedding(torch.rand(3), dim)


def test_bad_shape_and_period():
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
