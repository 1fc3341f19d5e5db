"""The public function on the Triton backend (in the interpreter where there is no GPU)."""

import pytest
import torch
import torch.nn.functional as F
from memory import saved_bytes
from op_checks import DEVICE, assert_compiles, assert_forward_mode
from plain_mlp import make, oracle

from mfkernels import Dual, Mlp, mlp, use_backend
from mfkernels.mlp import op
from mfkernels.testing import assert_dual, relative_error

pytest.importorskip("triton", minversion="3.4")

# measured in the interpreter: 1.1e-6, 5.1e-4, 4.8e-3 (it cuts bfloat16 off where a GPU rounds)
BOUNDS = [(torch.float32, 2.2e-6), (torch.float16, 1e-3), (torch.bfloat16, 9.6e-3)]


@pytest.fixture(autouse=True)
def _triton(poison_empty):
    with use_backend("triton"):
        yield


@pytest.fixture
def fused(monkeypatch):
    """PyTorch's product that ends in GELU; on a CPU, which has another form of GELU in it, a stand-in that counts."""
    calls = []
    if DEVICE == "cpu":

        def product(bias, x, weight, *, use_gelu):
            calls.append(use_gelu)
            return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

        monkeypatch.setattr(op, "addmm_activation", product)
        monkeypatch.setattr(op, "_fuses_gelu", lambda device: True)
    return calls


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_without_gradients_the_product_ends_in_gelu(dtype, bound, fused):
    inputs = make(3, 17, 24, hidden=54, out=7)
    low = {name: a.to(DEVICE, dtype) for name, a in inputs.items()}
    wanted = oracle(**{name: a.double() for name, a in low.items()})
    for x in (low["x"], Dual(low["x"], None)):
        with torch.no_grad():
            y = mlp(**{**low, "x": x})
        assert isinstance(y, Dual) == isinstance(x, Dual)
        assert relative_error(y.primal if isinstance(x, Dual) else y, wanted) <= bound
    assert not fused or fused == [True, True]
    calls = len(fused)
    with torch.no_grad():  # a tangent needs the slope, and without a bias there is no such product
        mlp(**{**low, "x": Dual(low["x"], low["x"][:1])})
        mlp(**{**low, "b1": None})
        torch.func.jvp(lambda x: mlp(**{**low, "x": x}), (low["x"],), (low["x"],))
    mlp(**low)
    assert len(fused) == calls


def test_without_gradients_under_autocast_and_a_compiler(fused):
    low = {name: a.float().to(DEVICE) for name, a in make(3, 17, 24, hidden=54).items()}
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.float16):
        y = mlp(**low)
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")(**low)
    assert y.dtype == compiled.dtype == torch.float16
    wanted = oracle(**{name: a.double() for name, a in low.items()})
    assert relative_error(y, wanted) <= 1e-3
    assert relative_error(compiled, wanted) <= 1e-3


def without_biases(x, w1, w2):
    return mlp(x, w1, None, w2, None)


SIZES = [((4, 17, 24), 96), ((2, 276, 8), 27), ((1, 1, 12), 2730), ((3, 48), 130), ((2, 3, 2, 5), 3)]


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("shape", "hidden"), SIZES)
def test_against_float64(shape, hidden, dtype, bound):
    assert_dual(mlp, oracle, make(*shape, hidden=hidden), duals=["x"], dtype=dtype, bound=bound, device=DEVICE)


def test_without_biases_and_other_width():
    inputs = make(2, 17, 24, hidden=50, out=7)
    inputs = {name: inputs[name] for name in ("x", "w1", "w2")}
    inputs["x"] = inputs["x"].mT.contiguous().mT
    assert_dual(without_biases, oracle, inputs, duals=["x"], dtype=torch.float32, bound=3e-7, device=DEVICE)


def test_far_out_on_both_tails():
    """gelu'(h) is 1 and 0 to the last bit; nothing overflows."""
    h = torch.tensor([[-1e20, -60.0, -12.0, -5.0, 0.0, 5.0, 12.0, 60.0, 1e20]], device=DEVICE)
    x = torch.ones(1, 1, device=DEVICE)
    eye = torch.eye(9, device=DEVICE)
    y = mlp(Dual(x, x), h.T.contiguous(), None, eye, None)
    wide = h.double()
    wanted, wanted_dot = torch.func.jvp(lambda h: F.gelu(h, approximate="tanh"), (wide,), (wide,))
    torch.testing.assert_close(y.primal.double(), wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(y.tangent.double(), wanted_dot, rtol=1e-6, atol=1e-6)


def low(inputs):
    return {name: x.float().to(DEVICE) for name, x in inputs.items()}


def test_opcheck():
    inputs = low(make(7, 5, hidden=12))
    x, w1, b1, w2, b2 = (inputs[name] for name in ("x", "w1", "b1", "w2", "b2"))
    x, h, dy = x.flatten(0, -2), torch.randn(7, 12, device=DEVICE), torch.randn(7, 5, device=DEVICE)
    x = x[:7]
    for biases in ((b1, b2), (None, None), (b1, None)):
        leaves = [a if a is None else a.detach().requires_grad_() for a in (x, w1, biases[0], w2, biases[1])]
        for x_dot in (torch.randn(3, x.shape[1], device=DEVICE), None):
            for dtype in (torch.float32, torch.float16):
                torch.library.opcheck(op._forward.custom_op, (leaves[0], x_dot, *leaves[1:], dtype))
        args = (dy, x, h, w1, biases[0], w2, biases[1] is not None, torch.float32)
        torch.library.opcheck(op._backward.custom_op, args)


def test_forward_mode_ad():
    assert_forward_mode(mlp, oracle, make(2, 5, 24, hidden=50), ["x"], bound=1e-6)


def test_a_gradient_through_the_tangent_is_an_error():
    inputs = low(make(2, 5, 8, hidden=12))
    x = inputs.pop("x").requires_grad_()
    out, out_dot = torch.func.jvp(lambda x: mlp(x, **inputs), (x,), (torch.randn_like(x.detach()),))
    with pytest.raises(RuntimeError, match="mlp: a gradient was asked for through its forward-mode tangent"):
        (out.sum() + out_dot.sum()).backward()


def test_compiles_as_one_graph():
    inputs = low(make(3, 5, 24, hidden=50))
    x = inputs.pop("x")
    assert_compiles(mlp, [Dual(x, torch.randn_like(x[:2])), *inputs.values()])


def test_backward_keeps_the_input_and_the_pre_activation():
    net, x = Mlp(24, 96).to(DEVICE), torch.randn(4, 7, 24, device=DEVICE, requires_grad=True)
    x_dot = torch.randn(4, 7, 24, device=DEVICE)
    parameters = net.fc1.weight.nbytes + net.fc1.bias.nbytes + net.fc2.weight.nbytes
    wanted = parameters + 4 * 4 * 7 * (24 + 96)
    assert saved_bytes(lambda: net(x)) == wanted
    assert saved_bytes(lambda: net(Dual(x, x_dot))) == wanted
    with use_backend("reference"):
        assert saved_bytes(lambda: net(x)) >= wanted + 4 * 4 * 7 * 96 - net.fc1.bias.nbytes  # the activation as well


def test_autocast():
    net, x = Mlp(24, 96).to(DEVICE), torch.randn(4, 7, 24, device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        net.zero_grad()
        with use_backend(backend), torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = net(Dual(x, x[:2]))
        y.primal.float().square().sum().backward()
        results.append([y.primal, y.tangent, *(p.grad.clone() for p in net.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= 1.5e-2


def test_what_it_does_not_serve_is_refused_by_name():
    inputs = {name: x.to(DEVICE) for name, x in make(2, 3, 8, hidden=12).items()}
    with pytest.raises(NotImplementedError, match=r"mlp: the triton backend cannot serve.*torch.float64"):
        mlp(**inputs)
    inputs = low(inputs)
    w1 = inputs.pop("w1")
    with pytest.raises(NotImplementedError, match="a forward-mode tangent of a parameter is not supported"):
        torch.func.jvp(lambda w1: mlp(w1=w1, **inputs), (w1,), (w1,))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty(shape):
    inputs = {name: a.requires_grad_() for name, a in low(make(*shape, hidden=12)).items()}
    x = inputs.pop("x")
    out = mlp(Dual(x, x.detach()), **inputs)
    assert out.primal.shape == out.tangent.shape == shape
    grads = torch.autograd.grad(out.primal.sum(), [x, *inputs.values()])
    assert all(g.abs().sum() == 0 for g in grads)
