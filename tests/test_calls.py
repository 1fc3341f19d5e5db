"""What is decided about a call is cached: every property that a check or a choice depends on is in the key."""

import warnings

import pytest
import torch

from mfkernels import Dual, attention, gated_residual_ada_layer_norm, linear, mlp, silu, use_backend
from mfkernels.calls import cache_key, cached, clear_cache, store


def key(*operands):
    return cache_key("op", *operands)


def test_keys_differ():
    x = torch.randn(3, 4)
    keys = [
        key(x),
        key(x[:2]),
        key(x.double()),
        key(x.to("meta")),
        key(x, None),
        key(x, x),
        key(Dual(x)),
        key(Dual(x, x)),
        key(Dual(x, x[:1])),
        key(x, 2),
        cache_key("another", x),
        key(x.to_sparse()),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys.append(key(x))
        with torch.autocast("cpu", enabled=False):
            assert key(x) == keys[0]
    with torch.autocast("cpu", dtype=torch.float16):
        keys.append(key(x))
    with use_backend("reference"):
        keys.append(key(x))
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key(x) == key(torch.zeros(3, 4)) == key(torch.nn.Parameter(x))


def test_what_has_no_key():
    x = torch.randn(3, 4)
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([x, x[:2]])

    def tell(a):
        told.append(key(a))
        return a * 1.0

    torch.func.jvp(tell, (x,), (x,))
    torch.func.grad(lambda a: tell(a).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        tell(x)
    told += [
        key(x.as_subclass(torch.nn.Buffer)),
        key(Dual(x, x.clone().requires_grad_())),
        key(nested),
        key("text"),
        key([x]),
    ]
    assert told == [None] * len(told)
    store(None, "never")
    assert cached(None) is None


def test_bad_arguments_after_good_ones():
    x, w, b = torch.randn(2, 3, 8), torch.randn(8, 8), torch.randn(8)
    m = torch.randn(2, 8)
    for _ in range(2):
        linear(x, w, b), mlp(x, w, b, w, b), silu(x), gated_residual_ada_layer_norm(x, x, m, m, m)
        with pytest.raises(ValueError, match="weight"):
            linear(torch.randn(2, 3, 7), w, b)
        with pytest.raises(ValueError, match="b1: expected shape"):
            mlp(x, w, b[:7], w, b)
        with pytest.raises(ValueError, match="must not require grad"):
            linear(Dual(x, x.clone().requires_grad_()), w, b)
        with pytest.raises(ValueError, match="gate: expected shape"):
            gated_residual_ada_layer_norm(x, x, m[:, :7], m, m)
        with pytest.raises(TypeError, match="dtype"):
            linear(x, w.double(), b)
        with pytest.raises(ValueError, match="eps"):
            gated_residual_ada_layer_norm(x, x, m, m, m, eps=-1.0)


def test_a_request_is_in_the_key():
    pytest.importorskip("triton", minversion="3.4")
    x, w = torch.randn(2, 3, 8), torch.randn(8, 8)
    mlp(x, w, None, w, None)
    for _ in range(2):
        with use_backend("cuda"), pytest.raises(NotImplementedError, match="mlp: no cuda backend"):
            mlp(x, w, None, w, None)
        with use_backend("cuda"), pytest.raises(NotImplementedError, match="attention"):
            attention(*torch.randn(3, 1, 4, 1, 8))


def test_the_cache_is_cleared():
    store(("a key",), 1)
    assert cached(("a key",)) == 1
    clear_cache()
    assert cached(("a key",)) is None
