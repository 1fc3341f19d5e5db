"""The stream between a block's parts: two updates, each with a bias and a norm, the first of them never written."""

import oracles
import pytest
import torch
from both_backends import DEVICE, both, cases, float32
from memory import saved_bytes

from meanflow.models import DiTBlock, FinalLayer
from mfkernels import Dual, ResidualStream, checkpoint, use_backend
from mfkernels.dual import primal_of
from mfkernels.testing import relative_error

# reference, then Triton; twice what was measured
case = cases(reference=(7.6e-16, 3.5e-7, 1.1e-2), triton=(3e-7, 8.2e-4, 1.1e-2))
backend = both()
SIZES = [(4, 17, 24), (2, 1, 2730), (1, 5, 1152), (3, 67, 40)]
BIASES = ["bias", "next_bias"]


def oracle(x, y, gate, bias, shift, scale, next_y, next_gate, next_bias, next_shift, next_scale):
    x = oracles.gated_residual(x, y + bias, gate)
    h = oracles.ada_layer_norm(x, shift, scale)
    x = oracles.gated_residual(x, next_y + next_bias, next_gate)
    return torch.cat([h, oracles.ada_layer_norm(x, next_shift, next_scale), x], dim=1)


def two_updates(x, y, gate, bias, shift, scale, next_y, next_gate, next_bias, next_shift, next_scale):
    h, stream = ResidualStream(x).updated(y, gate, bias).normed(shift, scale)
    next_h, stream = stream.update_and_norm(next_y, next_gate, next_bias, next_shift, next_scale)
    outs = (h, next_h, stream.value())
    primal = torch.cat([primal_of(a) for a in outs], dim=1)
    if not any(isinstance(a, Dual) for a in outs):
        return primal
    return Dual(primal, torch.cat([a.tangent for a in outs], dim=1))


def make(B, N, D):
    streams = dict(zip(("x", "y", "next_y"), torch.randn(3, B, N, D, dtype=torch.float64), strict=True))
    names = ("gate", "shift", "scale", "next_gate", "next_shift", "next_scale")
    modulation = dict(zip(names, torch.randn(B, 6 * D, dtype=torch.float64).chunk(6, dim=1), strict=True))
    biases = dict(zip(BIASES, torch.randn(2, D, dtype=torch.float64), strict=True))
    return streams | modulation | biases


@pytest.mark.parametrize("size", SIZES)
def test_two_updates(size, case):
    inputs = make(*size)
    duals = [name for name in inputs if name not in BIASES]
    case.check(two_updates, oracle, inputs, duals)


@pytest.mark.parametrize("some", [["x"], ["gate", "next_y"], ["next_shift"], ["y", "next_scale"]])
def test_some_tangents_are_zero(some, backend):
    inputs = float32(make(3, 5, 24))
    dots = {name: torch.randn_like(inputs[name]) for name in some}
    duals = {name: Dual(a, dots[name][:2]) if name in some else a for name, a in inputs.items()}
    h, stream = (
        ResidualStream(duals["x"])
        .updated(duals["y"], duals["gate"], duals["bias"])
        .normed(duals["shift"], duals["scale"])
    )
    next_h, stream = stream.update_and_norm(
        *(duals[name] for name in ("next_y", "next_gate", "next_bias", "next_shift", "next_scale"))
    )
    wide = {name: a.double() for name, a in inputs.items()}
    cut = {name: torch.where(torch.arange(3, device=DEVICE).view(-1, *[1] * (a.ndim - 1)) < 2, a, 0).double()
           for name, a in dots.items()}  # fmt: skip
    _, wanted = torch.func.jvp(
        lambda *xs: oracle(**{**wide, **dict(zip(some, xs, strict=True))}),
        tuple(wide[name] for name in some),
        tuple(cut[name] for name in some),
    )
    for out, ref in zip((h, next_h, stream.value()), wanted.split(5, dim=1), strict=True):
        if isinstance(out, Dual) and out.tangent is not None:
            assert relative_error(out.tangent, ref[:2], floor=1e-3) <= 2e-6
        else:
            assert ref.abs().max() == 0


def test_the_first_sum_is_not_written(backend):
    inputs = float32(make(2, 7, 24))
    stream = ResidualStream(inputs["x"]).updated(inputs["y"], inputs["gate"], inputs["bias"])
    _, normed = stream.normed(inputs["shift"], inputs["scale"])
    if backend == "reference":
        assert normed.y is None
        return
    assert normed.x is inputs["x"]
    assert normed.seen.isnan().all()
    assert normed.seen.untyped_storage().nbytes() == 4
    with pytest.raises(ValueError, match="unwritten"):
        normed.value()
    with pytest.raises(ValueError, match="between two norms"):
        normed.normed(inputs["shift"], inputs["scale"])


def test_only_one_of_the_outputs_used(backend):
    """Gradients of what is used alone: of the first norm, of the second, of the sum."""
    inputs = make(2, 7, 24)
    for part in range(3):
        low = {name: a.to(DEVICE, torch.float32).requires_grad_() for name, a in inputs.items()}
        wide = {name: a.detach().double().requires_grad_() for name, a in low.items()}
        out = two_updates(**low).split(7, dim=1)[part]
        ref = oracle(**wide).split(7, dim=1)[part]
        weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
        grads = torch.autograd.grad((out * weight).sum(), list(low.values()), allow_unused=True)
        wanted = torch.autograd.grad((ref * weight).sum(), list(wide.values()), allow_unused=True)
        for name, g, g_ref in zip(inputs, grads, wanted, strict=True):
            if g_ref is None:
                assert g is None or g.abs().max() == 0, name
            else:
                assert relative_error(g, g_ref, floor=1e-3) <= 2e-6, name


def test_what_is_kept_for_the_backward(backend):
    """The stream once for two updates: x, the two y and the sum; nothing of tangents."""
    if backend == "reference":
        pytest.skip("plain PyTorch keeps what it likes")
    inputs = {name: a.to(DEVICE, torch.float32).requires_grad_() for name, a in make(4, 7, 24).items()}
    duals = {name: a if name in BIASES else Dual(a, torch.randn_like(a)) for name, a in inputs.items()}

    def run(of):
        h, stream = ResidualStream(of["x"]).updated(of["y"], of["gate"], of["bias"]).normed(of["shift"], of["scale"])
        rest = [of[name] for name in ("next_y", "next_gate", "next_bias", "next_shift", "next_scale")]
        return h, *stream.update_and_norm(*rest)

    stream_bytes = 4 * 4 * 7 * 24
    plain = saved_bytes(lambda: run(inputs))
    assert plain <= 4 * stream_bytes + 16 * 1024  # vectors and statistics besides
    assert saved_bytes(lambda: run(duals)) == plain


def test_it_goes_through_a_checkpoint(backend):
    inputs = float32(make(2, 7, 24))
    grads = []
    for wrap in (lambda fn, *args: fn(*args), checkpoint):
        x, y = (inputs[name].clone().requires_grad_() for name in ("x", "y"))

        def part(stream):
            h, stream = stream.normed(inputs["shift"], inputs["scale"])
            return stream.update_and_norm(h, inputs["next_gate"], None, inputs["next_shift"], inputs["next_scale"])

        h, stream = wrap(part, ResidualStream(Dual(x, torch.ones_like(x))).updated(y, inputs["gate"]))
        assert isinstance(stream, ResidualStream)
        grads.append(torch.autograd.grad((h.primal * stream.value().primal).sum(), [x, y]))
    for g, wanted in zip(*grads, strict=True):
        assert torch.equal(g, wanted)


def test_what_does_not_fit_is_refused():
    x, y, m = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 8)
    stream = ResidualStream(x)
    with pytest.raises(ValueError, match="still to be added"):
        stream.updated(y, m).updated(y, m)
    for _ in range(2):  # the second time as the first
        with pytest.raises(ValueError, match=r"bias: expected shape \(D,\) of x"):
            stream.updated(y, m, torch.randn(7)).normed(m, m)
        with pytest.raises(ValueError, match="scale: expected shape"):
            stream.updated(y, m).normed(m, m[:, :7])


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_compiled_blocks_leave_sums_unwritten_too(name):
    """Two blocks and the layer after them, one graph: values and gradients as in eager."""
    if name == "triton":
        pytest.importorskip("triton", minversion="3.4")
    torch.manual_seed(1)
    blocks = torch.nn.ModuleList(DiTBlock(16, 2) for _ in range(2)).to(DEVICE)
    last = FinalLayer(16, 2, 1).to(DEVICE)
    parameters = [*blocks.parameters(), *last.parameters()]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.3)
    x, c = torch.randn(3, 5, 16, device=DEVICE), torch.randn(3, 16, device=DEVICE)

    def run(x, x_dot, c, c_dot):
        stream = ResidualStream(Dual(x, x_dot))
        for block in blocks:
            stream = block(stream, Dual(c, c_dot))
        return last(stream, Dual(c, c_dot))

    results = []
    for fn in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        with use_backend(name):
            out = fn(leaf, torch.ones_like(x[:2]), c, torch.ones_like(c[:2]))
        grads = torch.autograd.grad(out.primal.square().sum(), [leaf, *parameters])
        results.append([*out, *grads])
    for eager, compiled in zip(*results, strict=True):
        assert relative_error(compiled, eager) <= 2e-6
