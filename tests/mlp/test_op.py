import math

import pytest
import torch

from mfkernels import Mlp, mlp
from mfkernels.testing import assert_dual


def oracle(x, w1, b1, w2, b2):
    h = x @ w1.T + b1
    a = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return a @ w2.T + b2


def make(*shape, hidden):
    D = shape[-1]
    return {
        "x": torch.randn(shape, dtype=torch.float64),
        "w1": torch.randn(hidden, D, dtype=torch.float64) / D**0.5,
        "b1": torch.randn(hidden, dtype=torch.float64),
        "w2": torch.randn(D, hidden, dtype=torch.float64) / hidden**0.5,
        "b2": torch.randn(D, dtype=torch.float64),
    }


# measured: 4.9e-16, 2.4e-7, 3.7e-3
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-15), (torch.float32, 5e-7), (torch.bfloat16, 7.5e-3)])
@pytest.mark.parametrize(("shape", "hidden"), [((4, 7, 24), 96), ((3, 17, 10), 27), ((1, 1, 8), 3)])
def test_against_float64(shape, hidden, dtype, bound):
    assert_dual(mlp, oracle, make(*shape, hidden=hidden), duals=["x"], dtype=dtype, bound=bound)


def test_backward_keeps_what_a_plain_mlp_keeps():
    from mfkernels import Dual

    net = Mlp(24, 96)
    x = torch.randn(4, 7, 24)

    def saved_bytes(arg):
        total = 0

        def pack(a):
            nonlocal total
            total += a.numel() * a.element_size()
            return a

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
            net(arg)
        return total

    assert saved_bytes(Dual(x, torch.randn(4, 7, 24))) == saved_bytes(x)


def test_bad_arguments():
    x = make(2, 3, 8, hidden=12)
    with pytest.raises(ValueError, match="w2: expected"):
        mlp(x["x"], x["w1"], x["b1"], x["w1"], x["b2"])
    with pytest.raises(ValueError, match="b1: expected shape"):
        mlp(x["x"], x["w1"], x["b2"], x["w2"], x["b2"])
    with pytest.raises(ValueError, match="x: expected last size 8"):
        mlp(x["x"][..., :5], x["w1"], x["b1"], x["w2"], x["b2"])
