"""Checkpointing recomputes the primal alone, and changes neither values nor gradients nor what is kept."""

import copy
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from memory import saved_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as stock_checkpoint

import mfkernels.dual
from meanflow.models import DiT
from meanflow.objectives import MeanFlow
from mfkernels import Dual, Linear, SiLU, checkpoint, checkpoint_module, jvp, use_backend
from mfkernels.linear import op as linear_op

SIZE = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 2,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 3,
}


def network(dtype=torch.float64):
    torch.manual_seed(1)
    net = DiT(**SIZE).to(dtype)
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return net


def inputs(B=8, dtype=torch.float64):
    z, dz = torch.randn(2, B, 2, 8, 8, dtype=dtype)
    t = torch.rand(B, dtype=dtype)
    return z, t * 0.5, t, torch.arange(B) % 4, dz


def derivative(net, rows, B=8, dtype=torch.float64):
    torch.manual_seed(2)
    z, r, t, y, dz = inputs(B, dtype)
    return jvp(net, (z, r, t), (dz, torch.zeros_like(r), torch.ones_like(t)), rows=rows, y=y)


def gradients(net, u):
    return torch.autograd.grad(u.square().sum(), [p for p in net.parameters() if p.requires_grad])


@pytest.mark.parametrize("rows", [0, 2, 8])
def test_values_and_gradients_are_the_plain_runs(rows):
    net = network()
    u, du = derivative(net, rows)
    expected = gradients(net, u)
    for block in net.blocks:
        checkpoint_module(block)
    u_kept, du_kept = derivative(net, rows)
    assert torch.equal(u, u_kept)
    assert torch.equal(du, du_kept)
    for g, g_ref in zip(gradients(net, u_kept), expected, strict=True):
        assert torch.equal(g, g_ref)


def test_the_objectives_gradients_are_the_plain_runs():
    """Guidance runs the checkpointed blocks under no_grad first."""
    net = network()
    x, y = torch.randn(8, 2, 8, 8, dtype=torch.float64), torch.arange(8) % 3

    def step():
        return MeanFlow(omega=0.8, kappa=0.5)(net, x, y, generator=torch.Generator().manual_seed(3)).loss

    expected = torch.autograd.grad(step(), [p for p in net.parameters() if p.requires_grad])
    for block in net.blocks:
        checkpoint_module(block)
    for g, g_ref in zip(
        torch.autograd.grad(step(), [p for p in net.parameters() if p.requires_grad]), expected, strict=True
    ):
        assert torch.equal(g, g_ref)


def test_stock_checkpointing_gives_the_same_gradients():
    net = network()
    u, _ = derivative(net, 2)
    expected = gradients(net, u)
    for block in net.blocks:
        plain = block.forward
        block.forward = lambda *args, plain=plain: stock_checkpoint(plain, *args, use_reentrant=False)
    u, _ = derivative(net, 2)
    for g, g_ref in zip(gradients(net, u), expected, strict=True):
        assert torch.equal(g, g_ref)


class Counting(nn.Module):
    """Identity that counts the calls with and without a tangent."""

    def __init__(self):
        super().__init__()
        self.duals = self.tensors = 0

    def forward(self, x):
        if isinstance(x, Dual) and x.tangent is not None:
            self.duals += 1
        else:
            self.tensors += 1
        return x


@pytest.mark.parametrize("ours", [True, False])
def test_no_tangent_rule_runs_in_the_recompute(ours, monkeypatch):
    rules = []
    rule = linear_op._linear.tangent
    monkeypatch.setattr(linear_op._linear, "tangent", lambda *a: rules.append(1) or rule(*a))
    block = nn.Sequential(Linear(6, 6), Counting(), Linear(6, 6), Counting(), SiLU()).double()
    x = Dual(torch.randn(4, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64))
    out = checkpoint(block, x) if ours else stock_checkpoint(block, x, use_reentrant=False)
    assert len(rules) == 2
    assert out.tangent.shape == (2, 6)
    out.primal.square().sum().backward()
    assert len(rules) == (2 if ours else 4)
    assert block[1].tensors == (1 if ours else 0)
    assert block[1].duals == (1 if ours else 2)


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_every_backend_recomputes_what_it_kept(backend, autocast):
    """Also where a dispatch mode sees the forward and not the recompute."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    if backend == "triton":
        pytest.importorskip("triton", minversion="3.4")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    block = DiT(**{**SIZE, "depth": 1}).to(device, dtype).blocks[0]
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    x, c = (torch.randn(*s, dtype=dtype).to(device) for s in ((2, 16, 32), (2, 32)))
    x_dot, c_dot = torch.randn_like(x[:1]), torch.randn_like(c[:1])
    checkpointed = partial(checkpoint, block)
    results = []
    with use_backend(backend):
        for run, mode in (
            (block, nullcontext()),
            (checkpointed, nullcontext()),
            (checkpointed, Looks()),
        ):
            with mode, torch.autocast(device, dtype=torch.float16, enabled=autocast):
                out = run(Dual(x, x_dot), Dual(c, c_dot))
            results.append((*out, *torch.autograd.grad(out.primal.square().sum(), list(block.parameters()))))
    for tensors in zip(*results, strict=True):
        assert all(torch.equal(a, tensors[0]) for a in tensors)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_dual_step_keeps_the_bytes_of_a_plain_step(checkpointed):
    net = network()
    if checkpointed:
        for block in net.blocks:
            checkpoint_module(block)
    z, r, t, y, _ = inputs()
    plain = saved_bytes(lambda: net(z, r, t, y))
    for rows in (2, 8):  # 25 % and 100 %
        assert saved_bytes(lambda rows=rows: derivative(net, rows)[0]) == plain


def test_it_keeps_less():
    net = network()
    whole = saved_bytes(lambda: derivative(net, 8)[0])
    checkpoint_module(net.blocks[0])
    some = saved_bytes(lambda: derivative(net, 8)[0])
    for block in net.blocks[1:]:
        checkpoint_module(block)
    least = saved_bytes(lambda: derivative(net, 8)[0])
    assert least < some < whole
    assert least < whole / 3


def test_tangents_are_freed_after_the_forward():
    block = Linear(6, 6).double()
    tangent = torch.randn(2, 6, dtype=torch.float64)
    gone = weakref.ref(tangent)
    x = Dual(torch.randn(4, 6, dtype=torch.float64, requires_grad=True), tangent)
    out = checkpoint(block, x).primal
    del x, tangent
    assert gone() is None
    out.sum().backward()


def test_dropout_draws_the_same_mask():
    block = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 1)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    grads = []
    for run in (block, lambda x: checkpoint(block, x)):
        torch.manual_seed(5)
        out = run(x).sum()
        torch.manual_seed(6)  # what comes between the forward and the backward
        grads.append(torch.autograd.grad(out, list(block.parameters())))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_keyword_arguments_and_structures_pass():
    def fn(pair, *, shift):
        return {"sum": pair[0] + pair[1], "shifted": pair[0] + shift}

    a = torch.randn(3, 2, requires_grad=True)
    out = checkpoint(fn, (Dual(a, torch.ones(1, 2)), torch.ones(3, 2)), shift=Dual(a, torch.ones(2, 2)))
    assert out["sum"].tangent.shape == (1, 2)
    assert torch.equal(out["shifted"].tangent, torch.tensor([[2.0, 2], [1, 1]]))
    out["shifted"].primal.sum().backward()
    assert torch.equal(a.grad, torch.full((3, 2), 2.0))


def test_it_compiles_as_one_graph():
    net = network()
    u, du = derivative(net, 2)
    expected = gradients(net, u)
    for block in net.blocks:
        checkpoint_module(block)
    torch.manual_seed(2)
    z, r, t, y, dz = inputs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(z, r, t, dz, y):
        return jvp(net, (z, r, t), (dz, torch.zeros_like(r), torch.ones_like(t)), rows=2, y=y)

    u_compiled, du_compiled = run(z, r, t, dz, y)
    torch.testing.assert_close(u_compiled, u, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(du_compiled, du, rtol=1e-13, atol=1e-13)
    for g, g_ref in zip(gradients(net, u_compiled), expected, strict=True):
        torch.testing.assert_close(g, g_ref, rtol=1e-12, atol=1e-12)


def test_a_checkpointed_module_keeps_its_names_and_can_be_copied():
    net = network()
    names = list(net.state_dict())
    checkpoint_module(net.blocks[0])
    assert list(net.state_dict()) == names
    assert mfkernels.dual.is_dual_aware(net.blocks[0])
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.blocks[0].parameters():
            p.zero_()
    u, _ = derivative(other, 2)
    assert torch.equal(u, derivative(network(), 2)[0])  # the copy runs its own weights


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got function"):
        checkpoint_module(lambda x: x)
    block = checkpoint_module(Linear(2, 2))
    with pytest.raises(ValueError, match="module: this Linear is checkpointed already"):
        checkpoint_module(block)
