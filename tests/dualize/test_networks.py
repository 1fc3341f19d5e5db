"""Whole networks that know nothing of tangents."""

import pytest
import torch
from dualized import assert_same_jvp
from foreign import NETWORKS, network
from minimum import needs_compile_of_a_pass

import mfkernels

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def ready(name):
    if name.startswith(("timm", "diffusers")):
        pytest.importorskip("torchvision_stub")
        pytest.importorskip(name.split()[0])
    net, primals = network(name)
    return net, primals, tuple(torch.randn_like(p) for p in primals)


@pytest.mark.parametrize("name", NETWORKS)
def test_tangents_are_those_of_forward_mode(name):
    net, primals, tangents = ready(name)
    # dropout would draw anew in PyTorch's forward mode; test_passes.py has it
    assert_same_jvp(net.eval(), primals, tangents)  # at most 2e-15 measured


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_and_the_tape_are_a_plain_steps(name):
    net, primals, tangents = ready(name)
    net.train()
    dual = mfkernels.dualize(net)

    def step(run):
        torch.manual_seed(7)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(signature(x)) or x, lambda x: x):
            loss = run().square().mean()
        net.zero_grad()
        loss.backward()
        return loss, kept, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}

    loss, kept, grads = step(lambda: net(*primals))
    for rows in (0, 2, len(primals[0])):
        loss2, kept2, grads2 = step(lambda rows=rows: mfkernels.jvp(dual, primals, tangents, rows=rows)[0])
        assert torch.equal(loss, loss2)
        assert kept == kept2
        assert grads.keys() == grads2.keys()
        assert all(torch.equal(grads[n], grads2[n]) for n in grads)


def signature(x):
    return tuple(x.shape), x.stride(), x.dtype


@needs_compile_of_a_pass
@pytest.mark.parametrize("name", ["LightningDiT-style", "diffusers DiT"])
def test_compiled_whole(name):
    net, primals, tangents = ready(name)
    blocks = net.net.transformer_blocks if name == "diffusers DiT" else net.blocks
    del blocks[1:]  # a second would double the time and show nothing new
    dual = mfkernels.dualize(net.eval())

    def step(primals, tangents):
        u, u_dot = mfkernels.jvp(dual, primals, tangents, rows=2)
        return (u - u_dot.mean()).square().mean(), u_dot

    loss, u_dot = step(primals, tangents)
    loss.backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    torch._dynamo.reset()
    loss2, u_dot2 = torch.compile(step, backend="aot_eager", fullgraph=True)(primals, tangents)
    loss2.backward()
    close = {"rtol": 1e-12, "atol": 1e-13}  # 4e-16 measured
    torch.testing.assert_close(u_dot2, u_dot, **close)
    for n, g in grads.items():
        torch.testing.assert_close(net.get_parameter(n).grad, g, **close)


@needs_compile_of_a_pass
def test_compiled_with_tables_in_plain_attributes():
    class Rotary(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.angles, self.caches = torch.rand(4, 8).double(), [torch.rand(8).double()]
            self.linear = torch.nn.Linear(8, 8).double()

        def forward(self, x):
            return self.linear(x * self.angles + self.caches[0]) * self.angles.cos()

    net, x = Rotary(), torch.randn(5, 4, 8).double()
    dual = mfkernels.dualize(net)

    def step(x):
        u, u_dot = mfkernels.jvp(dual, (x,), (torch.ones_like(x),), rows=2)
        return u.square().mean(), u_dot

    torch._dynamo.reset()
    loss, u_dot = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    loss.backward()
    got, net.linear.weight.grad = net.linear.weight.grad, None
    expected, expected_dot = step(x)
    expected.backward()
    torch.testing.assert_close(u_dot, expected_dot, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(got, net.linear.weight.grad, rtol=1e-13, atol=1e-14)
