import oracles
import pytest
import torch
import torch.nn.functional as F
from both_backends import DEVICE, both, cases, float32
from memory import saved_bytes
from mlp_inputs import make
from op_checks import assert_compiles, assert_forward_mode, assert_no_gradient_through_the_tangent

from mfkernels import Dual, Mlp, mlp, use_backend
from mfkernels.mlp import op
from mfkernels.testing import relative_error

SIZES = [
    ((4, 17, 24), 96),
    ((3, 17, 10), 27),
    ((3, 48), 130),
    ((2, 3, 2, 5), 3),
    ((1, 1, 8), 3),
]
backend = both()
case = cases(
    reference=(1e-15, 5e-7, 7.5e-3),  # measured: 4.8e-16, 2.5e-7, 3.9e-3
    triton=(5e-7, 1e-3, 9.6e-3),  # 2.4e-7, 5.8e-4, 5.0e-3
)
long_sums = cases(
    reference=(1e-15, 1.9e-6, 1.2e-2),  # measured: 4.5e-16, 9.4e-7, 6.2e-3
    triton=(2.2e-6, 1e-3, 9.6e-3),  # 1.2e-6, 5.1e-4, 5.3e-3
)
without_biases = cases(
    reference=(3.6e-16, 3.4e-7, 6.6e-3),  # measured: 1.8e-16, 1.7e-7, 3.3e-3
    triton=(3e-7, 8e-4, 9e-3),  # 1.8e-7, 4.0e-4, 4.5e-3
)
triton_case = cases(triton=(5e-7, 1e-3, 9.6e-3))


@pytest.mark.parametrize(("shape", "hidden"), SIZES)
def test_against_float64(shape, hidden, case):
    case.check(mlp, oracles.mlp, make(*shape, hidden=hidden), ["x"])


@pytest.mark.parametrize(("shape", "hidden"), [((1, 1, 12), 2730), ((2, 276, 8), 27)])
def test_long_sums_against_float64(shape, hidden, long_sums):
    """Over the hidden units, and over the rows for the gradients of weights."""
    long_sums.check(mlp, oracles.mlp, make(*shape, hidden=hidden), ["x"])


def test_without_biases_and_other_width(without_biases):
    inputs = make(2, 17, 24, hidden=50, out=7)
    inputs = {name: inputs[name] for name in ("x", "w1", "w2")}
    inputs["x"] = inputs["x"].mT.contiguous().mT
    without_biases.check(lambda x, w1, w2: mlp(x, w1, None, w2, None), oracles.mlp, inputs, ["x"])


def test_backward_keeps_nothing_of_the_tangent(backend):
    net, x = Mlp(24, 96), torch.randn(4, 7, 24)
    assert saved_bytes(lambda: net(Dual(x, torch.randn(4, 7, 24)))) == saved_bytes(lambda: net(x))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_no_samples_or_no_tokens(shape, backend):
    inputs = {name: a.requires_grad_() for name, a in float32(make(*shape, hidden=12)).items()}
    x = inputs.pop("x")
    out = mlp(Dual(x, x.detach()), **inputs)
    assert out.primal.shape == out.tangent.shape == shape
    grads = torch.autograd.grad(out.primal.sum(), [x, *inputs.values()])
    assert all(g.abs().sum() == 0 for g in grads)


def test_bad_arguments(backend):
    m = float32(make(2, 3, 8, hidden=12))
    with pytest.raises(ValueError, match="w2: expected"):
        mlp(**{**m, "w2": m["w1"]})
    with pytest.raises(ValueError, match="b1: expected shape"):
        mlp(**{**m, "b1": m["b2"]})
    with pytest.raises(ValueError, match="x: expected last size 8"):
        mlp(**{**m, "x": m["x"][..., :5]})


# ----------------------------------------------------------------------------------------------- Triton's kernels alone


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


def test_without_gradients_the_product_ends_in_gelu(triton_case, fused):
    dtype, bound = triton_case
    low = {name: a.to(DEVICE, dtype) for name, a in make(3, 17, 24, hidden=54, out=7).items()}
    wanted = oracles.mlp(**{name: a.double() for name, a in low.items()})
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


def test_without_gradients_under_autocast_and_a_compiler(triton, fused):
    low = float32(make(3, 17, 24, hidden=54))
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.float16):
        y = mlp(**low)
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")(**low)
    assert y.dtype == compiled.dtype == torch.float16
    wanted = oracles.mlp(**{name: a.double() for name, a in low.items()})
    assert relative_error(y, wanted) <= 1e-3
    assert relative_error(compiled, wanted) <= 1e-3


def test_far_out_on_both_tails(triton):
    """gelu'(h) is 1 and 0 to the last bit; nothing overflows."""
    h = torch.tensor([[-1e20, -60.0, -12.0, -5.0, 0.0, 5.0, 12.0, 60.0, 1e20]], device=DEVICE)
    x = torch.ones(1, 1, device=DEVICE)
    y = mlp(Dual(x, x), h.T.contiguous(), None, torch.eye(9, device=DEVICE), None)
    wide = h.double()
    wanted, wanted_dot = torch.func.jvp(lambda h: F.gelu(h, approximate="tanh"), (wide,), (wide,))
    torch.testing.assert_close(y.primal.double(), wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(y.tangent.double(), wanted_dot, rtol=1e-6, atol=1e-6)


def test_autocast(triton):
    net, x = Mlp(24, 96).to(DEVICE), torch.randn(4, 7, 24, device=DEVICE)
    results = []
    for name in ("triton", "reference"):
        net.zero_grad()
        with use_backend(name), torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = net(Dual(x, x[:2]))
        y.primal.float().square().sum().backward()
        results.append([y.primal, y.tangent, *(p.grad.clone() for p in net.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= 1.5e-2


def test_forward_mode_ad(triton):
    assert_forward_mode(mlp, oracles.mlp, make(2, 5, 24, hidden=50), ["x"], bound=1e-6)


def test_a_gradient_through_the_tangent_is_an_error(triton):
    assert_no_gradient_through_the_tangent("mlp", mlp, float32(make(2, 5, 8, hidden=12)), ["x"])


def test_compiles_as_one_graph(triton):
    inputs = float32(make(3, 5, 24, hidden=50))
    x = inputs.pop("x")
    assert_compiles(mlp, [Dual(x, torch.randn_like(x[:2])), *inputs.values()])


def test_backward_keeps_the_input_and_the_pre_activation(triton):
    net, x = Mlp(24, 96).to(DEVICE), torch.randn(4, 7, 24, device=DEVICE, requires_grad=True)
    parameters = net.fc1.weight.nbytes + net.fc1.bias.nbytes + net.fc2.weight.nbytes
    wanted = parameters + 4 * 4 * 7 * (24 + 96)
    assert saved_bytes(lambda: net(x)) == wanted
    assert saved_bytes(lambda: net(Dual(x, torch.randn_like(x)))) == wanted
    with use_backend("reference"):
        assert saved_bytes(lambda: net(x)) >= wanted + 4 * 4 * 7 * 96 - net.fc1.bias.nbytes  # the activation as well


def test_what_they_do_not_serve_is_refused_by_name(triton):
    with pytest.raises(NotImplementedError, match=r"mlp: the triton backend cannot serve.*torch.float64"):
        mlp(**{name: a.to(DEVICE) for name, a in make(2, 3, 8, hidden=12).items()})
    inputs = float32(make(2, 3, 8, hidden=12))
    w1 = inputs.pop("w1")
    with pytest.raises(NotImplementedError, match="a forward-mode tangent of a parameter is not supported"):
        torch.func.jvp(lambda w1: mlp(w1=w1, **inputs), (w1,), (w1,))


def test_the_operators_obey_pytorchs_rules(triton):
    x, w1, b1, w2, b2 = float32(make(7, 5, hidden=12)).values()
    h, dy = torch.randn(7, 12, device=DEVICE), torch.randn(7, 5, device=DEVICE)
    for biases in ((b1, b2), (None, None), (b1, None)):
        leaves = [a if a is None else a.detach().requires_grad_() for a in (x, w1, biases[0], w2, biases[1])]
        for x_dot in (torch.randn(3, 5, device=DEVICE), None):
            for dtype in (torch.float32, torch.float16):
                torch.library.opcheck(op._forward.custom_op, (leaves[0], x_dot, *leaves[1:], dtype))
        args = (dy, x, h, w1, biases[0], w2, biases[1] is not None, torch.float32)
        torch.library.opcheck(op._backward.custom_op, args)
