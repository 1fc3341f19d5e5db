"""Relative errors of a MeanFlow step against float64, for each precision policy, next to torch.func.jvp.

    python bench/precision.py            # on a GPU the real widths; on a CPU a sixth of them at the real depths

Prints the table of docs/precision.md. Weights are drawn so that no branch is silent; errors are ‖a − ref‖/‖ref‖, the
mean over seeds, and both networks have the same weights and the same inputs.
"""

from __future__ import annotations

import contextlib
import math

import torch
from peers import PlainDiT, math_attention
from torch import Tensor, nn

from meanflow.models import DiT
from mfkernels import jvp
from mfkernels.testing import relative_error

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = {"S/4": (384, 12, 6), "B/4": (768, 12, 12), "XL/4": (1152, 28, 16)}
SEEDS = 3
B, ROWS = 8, 4

# name, as of --precision: dtype of the weights, dtype of autocast, tf32
POLICIES: dict[str, tuple[torch.dtype, torch.dtype | None, bool]] = {
    "no": (torch.float32, None, False),
    "tf32": (torch.float32, None, True),
    "bf16": (torch.float32, torch.bfloat16, False),
    "bf16-weights": (torch.bfloat16, None, False),
    "fp16": (torch.float32, torch.float16, False),
}


def network(cls: type[nn.Module], size: tuple[int, int, int], seed: int) -> nn.Module:
    width, depth, heads = size if CUDA else (size[0] // 6, size[1], size[0] // 96)
    side = 32 if CUDA else 16
    net = cls(
        input_size=side, patch_size=4, in_channels=4, hidden_size=width, depth=depth, num_heads=heads, num_classes=10
    )
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(net.named_parameters()):
        if p.requires_grad:
            fan_in = p[0].numel() if p.ndim > 1 else 1
            std = 0.02 if p.ndim == 1 or "embedding_table" in name else 0.5 / math.sqrt(fan_in)
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return net


def step(net: nn.Module, ours: bool, policy: tuple[torch.dtype, torch.dtype | None, bool], seed: int) -> list[Tensor]:
    """u, du/dt of the rows with r ≠ t, loss, gradients."""
    weights, autocast, tf32 = policy
    wide = weights == torch.float64
    generator = torch.Generator().manual_seed(100 + seed)
    side = 32 if CUDA else 16
    x, e = torch.randn(2, B, 4, side, side, generator=generator)  # [B, C, H, W]
    t = torch.sigmoid(torch.randn(B, generator=generator) - 0.4)  # [B]
    r = torch.cat([t[:ROWS] * torch.rand(ROWS, generator=generator), t[ROWS:]])  # [B]
    y = torch.randint(11, (B,), generator=generator).to(DEVICE)  # [B]
    t_ = t.view(-1, 1, 1, 1)  # [B, 1, 1, 1]
    z, v = (1 - t_) * x + t_ * e, e - x  # [B, C, H, W]
    times = torch.float64 if wide else torch.float32  # the times stay in float32 under every policy
    z, v = z.to(DEVICE), v.to(DEVICE, times)  # [B, C, H, W]
    r, t = r.to(DEVICE, times), t.to(DEVICE, times)  # [B]
    net = net.to(DEVICE, weights)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # of the peer, whose patch embedding is a convolution
    cast = torch.autocast(DEVICE, dtype=autocast) if autocast else contextlib.nullcontext()
    scale = 2.0**10 if autocast == torch.float16 else 1.0  # what a gradient scaler does
    with cast:
        if ours:
            zero, one = torch.zeros_like(r[:ROWS]), torch.ones_like(t[:ROWS])
            u, du = jvp(net, (z.to(weights), r, t), (v[:ROWS].to(weights), zero, one), y=y)  # [B, …], [ROWS, …]
        else:
            plain_times = (r.to(weights), t.to(weights))  # PyTorch's layers take one dtype
            net.attend = math_attention
            u, du = torch.func.jvp(
                lambda z, r, t: net(z, r, t, y),
                (z.to(weights), *plain_times),
                (v.to(weights), torch.zeros_like(plain_times[0]), torch.ones_like(plain_times[1])),
            )
            du = du[:ROWS].detach()
    u, du = u.to(times), du.to(times)
    target = torch.cat([v[:ROWS] - (t - r)[:ROWS].view(-1, 1, 1, 1) * du, v[ROWS:]]).detach()  # [B, C, H, W]
    loss = (u - target).square().flatten(1).sum(1).mean()
    parameters = dict(sorted((n, p) for n, p in net.named_parameters() if p.requires_grad))
    grads = torch.autograd.grad(loss * scale, list(parameters.values()))
    flat = torch.cat([g.double().flatten() for g in grads]) / scale
    return [u.detach(), du, loss.detach(), flat]


def main() -> None:
    print(
        f"{DEVICE}, torch {torch.__version__}"
        + ("" if CUDA else ", a sixth of the width, heads of 16, 16 tokens, the real depths")
    )
    print("| network | policy | u | du/dt | loss | gradients | torch.func.jvp: u | du/dt | loss | gradients |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, size in SIZES.items():
        for policy, setting in POLICIES.items():
            if setting[2] and not CUDA:
                print(f"| {name} | {policy} | not measured: a format of NVIDIA GPUs |")
                continue
            errors = errors_against_float64(size, setting, seeds=SEEDS)
            cells = " | ".join(f"{value:.1e}" for value in errors.flatten().tolist())
            print(f"| {name} | {policy} | {cells} |", flush=True)


def errors_against_float64(
    size: tuple[int, int, int], policy: tuple[torch.dtype, torch.dtype | None, bool], *, seeds: int
) -> Tensor:
    """(2, 4): of ours and of torch.func.jvp, the mean relative errors of u, du/dt, loss and gradients."""
    errors = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(seeds):
        reference = step(network(PlainDiT, size, seed), False, (torch.float64, None, False), seed)
        for way, cls in enumerate((DiT, PlainDiT)):
            out = step(_with_positions(network(cls, size, seed)), way == 0, policy, seed)
            errors[way] += torch.tensor([relative_error(a, b) for a, b in zip(out, reference, strict=True)])
    return errors / seeds


def _with_positions(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        net.pos_embed.zero_()  # `PlainDiT` starts without them
    return net


if __name__ == "__main__":
    main()
