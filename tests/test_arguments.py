"""Bad arguments of the public functions, each refused with its name; what the random calls do not draw."""

import numpy as np
import pytest
import torch

import mfkernels
from mfkernels import Dual

X = torch.randn(2, 3, 8)
W = torch.ones(8)
QK = torch.randn(2, 3, 2, 8)
W1, W2 = torch.randn(5, 8), torch.randn(4, 5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_dtypes(dtype):
    with pytest.raises(TypeError, match="x: expected a floating-point dtype"):
        mfkernels.silu(torch.zeros(2, 3).to(dtype))


@pytest.mark.parametrize(
    "make",
    [
        lambda: X[0].to_sparse(),
        lambda: X[0].to_sparse_csr(),
        lambda: X[0].to_mkldnn(),
        lambda: torch.nested.nested_tensor([X[0], X[1]]),
    ],
    ids=["coo", "csr", "mkldnn", "nested"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, that these layouts are in beta
def test_layouts(make):
    x = make()
    with pytest.raises(TypeError, match=r"x: expected a dense \(strided\) tensor, got"):
        mfkernels.silu(x)
    with pytest.raises(TypeError, match=r"x: expected a dense \(strided\) tensor, got"):
        mfkernels.rms_norm(Dual(x), W)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_quantized():
    x = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match="x: expected a floating-point dtype"):
        mfkernels.silu(x)


@pytest.mark.parametrize("name", ["w1", "w2"])
def test_an_mlp_without_a_weight(name):
    inputs = {"x": X, "w1": W1, "b1": None, "w2": W2, "b2": None}
    with pytest.raises(TypeError, match=f"{name}: expected a tensor or a Dual, got NoneType"):
        mfkernels.mlp(**{**inputs, name: None})


@pytest.mark.parametrize(("p", "q"), [(0, 2), (2, 0), (0, 0)])
def test_patches_without_pixels(p, q):
    with pytest.raises(ValueError, match="weight: expected patches of at least one pixel"):
        mfkernels.patch_embed(torch.randn(1, 2, 4, 4), torch.randn(3, 2, p, q))


@pytest.mark.parametrize(
    ("eps", "error", "match"),
    [
        ("a", TypeError, "eps: expected a number, got str"),
        (None, TypeError, "eps: expected a number, got NoneType"),
        (True, TypeError, "eps: expected a number, got bool"),
        (1e-6j, TypeError, "eps: expected a number, got complex"),
        (torch.tensor(1e-6), TypeError, "eps: expected a number, got Tensor"),
        (-1e-6, ValueError, "eps: expected a finite number >= 0, got -1e-06"),
        (float("nan"), ValueError, "eps: expected a finite number >= 0, got nan"),
        (float("inf"), ValueError, "eps: expected a finite number >= 0, got inf"),
        (10**400, ValueError, "eps: expected a finite number >= 0"),
    ],
)
def test_eps(eps, error, match):
    cos, sin = torch.ones(3, 4), torch.zeros(3, 4)
    calls = (
        lambda: mfkernels.ada_layer_norm(X, X[:, 0], X[:, 0], eps=eps),
        lambda: mfkernels.gated_residual_ada_layer_norm(X, X, X[:, 0], X[:, 0], X[:, 0], eps=eps),
        lambda: mfkernels.rms_norm(X, W, eps=eps),
        lambda: mfkernels.qk_norm_rotary(QK, QK, W, W, cos, sin, eps=eps),
    )
    for call in calls:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("eps", [1, np.float32(1e-3), np.float64(1e-3), np.int64(1)])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_numbers_of_other_kinds(eps, backend):
    if backend == "triton":
        pytest.importorskip("triton", minversion="3.4")
        if torch.cuda.is_available():
            pytest.skip("these tensors are on the CPU")
    with mfkernels.use_backend(backend):
        torch.testing.assert_close(mfkernels.rms_norm(X, W, eps=eps), mfkernels.rms_norm(X, W, eps=float(eps)))


def test_flags():
    cos, sin = torch.ones(3, 4), torch.zeros(3, 4)
    with pytest.raises(TypeError, match="interleaved: expected True or False, got str"):
        mfkernels.rotary(QK, QK, cos, sin, interleaved="no")
    with pytest.raises(TypeError, match="is_causal: expected True or False, got int"):
        mfkernels.scaled_dot_product_attention(QK, QK, QK, is_causal=1)
