import pytest
import torch

from mfkernels import patch_embed
from mfkernels.testing import assert_dual


def oracle(x, weight, bias):
    B, C, H, W = x.shape
    p, q = weight.shape[2:]
    patches = x.reshape(B, C, H // p, p, W // q, q).permute(0, 2, 4, 1, 3, 5)
    return torch.einsum("bhwcij,dcij->bhwd", patches, weight).reshape(B, -1, weight.shape[0]) + bias


# measured: 2.3e-16, 1.5e-7, 1.8e-3
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 5e-16), (torch.float32, 3e-7), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("B", "C", "H", "W", "p"), [(4, 4, 8, 8, 2), (3, 1, 12, 6, 3), (1, 3, 5, 7, 1)])
def test_against_float64(B, C, H, W, p, dtype, bound):
    inputs = {
        "x": torch.randn(B, C, H, W, dtype=torch.float64),
        "weight": torch.randn(24, C, p, p, dtype=torch.float64),
        "bias": torch.randn(24, dtype=torch.float64),
    }
    assert_dual(patch_embed, oracle, inputs, duals=["x"], dtype=dtype, bound=bound)


def test_bad_arguments():
    with pytest.raises(ValueError, match="x: expected 3 channels"):
        patch_embed(torch.randn(1, 4, 4, 4), torch.randn(8, 3, 2, 2))
    with pytest.raises(ValueError, match="divisible"):
        patch_embed(torch.randn(1, 3, 5, 4), torch.randn(8, 3, 2, 2))
