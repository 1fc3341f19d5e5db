"""An op in eager is an autograd.Function, elsewhere a custom op: both give the same."""

import pytest
import torch
from both_backends import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from mfkernels import Dual, ada_layer_norm, mlp
from mfkernels.ada_layer_norm import op
from mfkernels.operator import is_plain_eager

pytestmark = pytest.mark.usefixtures("triton")


class Names(TorchDispatchMode):
    """The operators that a mode sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def operands(rows=2):
    x = torch.randn(3, 7, 24, device=DEVICE, requires_grad=True)
    shift, scale = (torch.randn(3, 24, device=DEVICE, requires_grad=True) for _ in range(2))
    return x, shift, scale, torch.randn(rows, 7, 24, device=DEVICE)


def test_both_give_the_same_bits():
    x, shift, scale, x_dot = operands()
    results = []
    for mode in (None, Names()):
        if mode is None:
            h = ada_layer_norm(Dual(x, x_dot), shift, scale)
        else:
            with mode:
                h = ada_layer_norm(Dual(x, x_dot), shift, scale)
            assert "mfkernels::ada_layer_norm_forward" in mode.seen
        node = h.primal.grad_fn.name()
        assert ("mfkernels" in node.lower() or "Generated" in node) == (mode is not None), node
        results.append([*h, *torch.autograd.grad(h.primal.sin().sum(), [x, shift, scale])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_not_plain_eager():
    x, _, _, x_dot = operands()
    assert is_plain_eager(x, None, torch.nn.Parameter(x.detach()), 1.0)
    told = []

    def tell(a):
        told.append(is_plain_eager(a))
        return a * 2.0

    torch.func.jvp(tell, (x.detach()[:2],), (x_dot,))
    torch.func.vmap(tell)(x)
    torch.func.grad(lambda a: tell(a).sum())(x.detach())
    with torch.autograd.forward_ad.dual_level():
        tell(x)
    with Names():
        tell(x)
    assert told == [False] * 5

    class Sub(torch.Tensor):
        pass

    assert not is_plain_eager(x.detach().as_subclass(Sub))


def test_a_second_derivative_is_an_error():
    x, shift, scale, _ = operands()
    w1, w2 = (torch.randn(24, 24, device=DEVICE, requires_grad=True) for _ in range(2))
    with torch.autocast(DEVICE, dtype=torch.float16):
        low = [mlp(x, w1, None, w2, None), ada_layer_norm(x, shift, scale)]
    # of a sum the incoming gradient is a constant, and of what autocast has cast nothing requires a gradient
    for out in (ada_layer_norm(x, shift, scale), mlp(x, w1, None, w2, None), *low):
        (dx,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="a second derivative is not supported"):
            (dx * x).sum().backward()


def test_without_gradients_nothing_is_kept():
    x, shift, scale, _ = operands()
    with torch.no_grad():
        assert ada_layer_norm(x, shift, scale).grad_fn is None
    with torch.inference_mode():
        assert ada_layer_norm(x, shift, scale).is_inference()
    assert ada_layer_norm(x.detach(), shift.detach(), scale.detach()).grad_fn is None
    assert op._forward.apply is not None
