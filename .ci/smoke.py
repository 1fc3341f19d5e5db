"""Whether the packages work with the PyTorch that is installed, in half a minute on a CPU. One line for each part."""

import copy
import time

import torch
import torch.nn.functional as F
from torch import nn

import meanflow
import mfkernels
from meanflow.models import DiT
from meanflow.objectives import MeanFlow
from mfkernels.testing import relative_error

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


class Foreign(nn.Module):
    """Knows nothing of tangents."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.conv, self.time = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(1, 16)

    def forward(self, z, t):
        x = self.conv(z).flatten(2).mT + F.silu(self.time(t[:, None]))[:, None]  # [B, 16, 16]
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)  # [B, 2, 16, 8] each
        s = torch.softmax(q @ k.mT / 8**0.5, dim=-1)  # [B, 2, 16, 16]
        return x + (s @ v).transpose(1, 2).flatten(2)  # [B, 16, 16]


def dit() -> DiT:
    size = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "num_heads": 4, "num_classes": 3}
    net = DiT(**size, depth=2).double()
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return net


torch.manual_seed(0)
z, dz = torch.randn(2, 6, 3, 8, 8, dtype=torch.float64)
t = torch.rand(6, dtype=torch.float64)
y = torch.arange(6) % 3
primals, tangents = (z, t / 2, t), (dz, torch.zeros_like(t), torch.ones_like(t))


def derivative(net: DiT, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return mfkernels.jvp(net, primals, tangents, rows=rows, y=y)


def gradients(net: DiT) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(derivative(net)[0].square().sum(), [p for p in net.parameters() if p.requires_grad])


def same(a, b, bound: float) -> None:
    for x, x_ref in zip(a, b, strict=True):
        error = relative_error(x, x_ref)
        assert error <= bound, f"expected an error of at most {bound:.0e}, got {error:.1e}"


def jvp_of_a_dit() -> None:
    net = dit()
    out, out_dot = torch.func.jvp(lambda z, r, t: net(z, r, t, y), primals, tangents)
    u, du_dt = derivative(net)
    same((u, du_dt), (out, out_dot[:2]), 1e-13)


def dualized_network() -> None:
    net = Foreign().double()
    out, out_dot = torch.func.jvp(net, (z, t), (dz, torch.ones_like(t)))
    u, du_dt = mfkernels.jvp(mfkernels.dualize(net), (z, t), (dz, torch.ones_like(t)), rows=2)
    assert torch.equal(u, out), "the value is not the network's own"
    same((du_dt,), (out_dot[:2],), 1e-13)
    u.square().sum().backward()


def checkpointing() -> None:
    net = dit()
    expected = gradients(net)
    for block in net.blocks:
        mfkernels.checkpoint_module(block)
    assert all(map(torch.equal, gradients(net), expected)), "the gradients are not the plain run's"


def compiled_step() -> str | None:
    if TORCH < (2, 11):
        return "not tried: torch.compile needs torch 2.11"
    net = dit()
    compiled = copy.deepcopy(net)
    compiled.compile(backend="aot_eager", fullgraph=True)
    same(gradients(compiled), gradients(net), 1e-12)
    return None


def three_training_steps() -> None:
    net, objective = dit().float(), MeanFlow()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = objective(net, z.float(), y, generator=torch.Generator().manual_seed(1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0], f"the loss does not fall: {losses}"
    x = meanflow.sample(net, z.float(), y)
    assert x.isfinite().all()


if __name__ == "__main__":
    print(f"torch {torch.__version__}, mfkernels {mfkernels.__version__}")
    for part in (jvp_of_a_dit, dualized_network, checkpointing, compiled_step, three_training_steps):
        start = time.perf_counter()
        said = part()
        print(f"  {part.__name__.replace('_', ' ')}: {said or 'passed'} ({time.perf_counter() - start:.1f} s)")
