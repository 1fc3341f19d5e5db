import pytest
import torch
from memory import saved_bytes
from plain_mlp import make, oracle

from mfkernels import Mlp, mlp
from mfkernels.testing import assert_dual


# measured: 4.9e-16, 2.4e-7, 3.7e-3
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-15), (torch.float32, 5e-7), (torch.bfloat16, 7.5e-3)])
@pytest.mark.parametrize(("shape", "hidden"), [((4, 7, 24), 96), ((3, 17, 10), 27), ((1, 1, 8), 3)])
def test_against_float64(shape, hidden, dtype, bound):
    assert_dual(mlp, oracle, make(*shape, hidden=hidden), duals=["x"], dtype=dtype, bound=bound)


def test_backward_keeps_what_a_plain_mlp_keeps():
    from mfkernels import Dual

    net = Mlp(24, 96)
    x = torch.randn(4, 7, 24)

    assert saved_bytes(lambda: net(Dual(x, torch.randn(4, 7, 24)))) == saved_bytes(lambda: net(x))


def test_bad_arguments():
    x = make(2, 3, 8, hidden=12)
    with pytest.raises(ValueError, match="w2: expected"):
        mlp(x["x"], x["w1"], x["b1"], x["w1"], x["b2"])
    with pytest.raises(ValueError, match="b1: expected shape"):
        mlp(x["x"], x["w1"], x["b2"], x["w2"], x["b2"])
    with pytest.raises(ValueError, match="x: expected last size 8"):
        mlp(x["x"][..., :5], x["w1"], x["b1"], x["w2"], x["b2"])
