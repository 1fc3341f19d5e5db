"""What a call comes to is remembered by its kind: every property that a check or a choice looks at is in it."""

import warnings

import pytest
import torch

from mfkernels import Dual, attention, gated_residual_ada_layer_norm, linear, mlp, silu, use_backend
from mfkernels.calls import forget, kind_of_call, known, remember


def kind(*operands):
    return kind_of_call("op", *operands)


def test_kinds_differ():
    x = torch.randn(3, 4)
    kinds = [
        kind(x),
        kind(x[:2]),
        kind(x.double()),
        kind(x.to("meta")),
        kind(x, None),
        kind(x, x),
        kind(Dual(x)),
        kind(Dual(x, x)),
        kind(Dual(x, x[:1])),
        kind(x, 2),
        kind_of_call("another", x),
        kind(x.to_sparse()),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kinds.append(kind(x))
        with torch.autocast("cpu", enabled=False):
            assert kind(x) == kinds[0]
    with torch.autocast("cpu", dtype=torch.float16):
        kinds.append(kind(x))
    with use_backend("reference"):
        kinds.append(kind(x))
    assert () not in kinds
    assert len(set(kinds)) == len(kinds)
    assert kind(x) == kind(torch.zeros(3, 4)) == kind(torch.nn.Parameter(x))


def test_what_has_no_kind():
    x = torch.randn(3, 4)
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([x, x[:2]])

    def tell(a):
        told.append(kind(a))
        return a * 1.0

    torch.func.jvp(tell, (x,), (x,))
    torch.func.grad(lambda a: tell(a).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        tell(x)
    told += [
        kind(x.as_subclass(torch.nn.Buffer)),
        kind(Dual(x, x.clone().requires_grad_())),
        kind(nested),
        kind("text"),
        kind([x]),
    ]
    assert told == [()] * len(told)
    remember((), "never")
    assert known(()) is None


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


def test_a_request_is_not_forgotten():
    pytest.importorskip("triton", minversion="3.4")
    x, w = torch.randn(2, 3, 8), torch.randn(8, 8)
    mlp(x, w, None, w, None)
    for _ in range(2):
        with use_backend("cuda"), pytest.raises(NotImplementedError, match="mlp: no cuda backend"):
            mlp(x, w, None, w, None)
        with use_backend("cuda"), pytest.raises(NotImplementedError, match="attention"):
            attention(*torch.randn(3, 1, 4, 1, 8))


def test_forget():
    remember(("a kind",), 1)
    assert known(("a kind",)) == 1
    forget()
    assert known(("a kind",)) is None
