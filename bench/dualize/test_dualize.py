"""The MeanFlow step of other people's networks, dualized, next to their own flow-matching step and to `torch.func.jvp`.

A quarter of the rows have r ≠ t. Every figure is a multiple of the same network's flow-matching step, timed in turns in
the same process. A way whose derivative does not agree with float64 is not timed.
"""

from __future__ import annotations

import copy
import os
from functools import partial

import foreign
import pytest
import torch
import torchvision_stub  # noqa: F401
from measure import median_ratio
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mfkernels
from mfkernels.measuring import interleaved_seconds, peak_bytes
from mfkernels.testing import relative_error

BATCH, ROWS, WIDTH, DEPTH, HEADS = 16, 4, 256, 4, 4
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "8"))


class TimmViT(nn.Module):
    """Times as two more channels."""

    def __init__(self):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        sizes = {"img_size": 16, "patch_size": 2, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
        self.vit, self.head = VisionTransformer(in_chans=6, num_classes=0, **sizes), nn.Linear(WIDTH, 16)

    def forward(self, z, t):
        times = torch.stack([t, t.square()], 1)[:, :, None, None].expand(-1, -1, 16, 16)
        x = self.head(self.vit.forward_features(torch.cat([z, times], 1))[:, 1:])
        return nn.functional.pixel_shuffle(x.mT.unflatten(2, (8, 8)), 2)


class Diffusers(foreign.Diffusers):
    """With the conditions of the samples that it is given."""

    def forward(self, z, t):
        conditions = {name: getattr(self, name)[: len(z)] for name in self.names}
        return self.net(z, timestep=t, return_dict=False, **conditions)[0]


def diffusers_dit():
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "num_layers": DEPTH, "sample_size": 16}
    net = DiTTransformer2DModel(in_channels=4, patch_size=2, num_embeds_ada_norm=10, **sizes)
    return Diffusers(net, class_labels=torch.arange(BATCH) % 10)


def diffusers_sd3():
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=DEPTH, attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS, joint_attention_dim=64, caption_projection_dim=WIDTH, pooled_projection_dim=32,
        out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    text = {"encoder_hidden_states": torch.randn(BATCH, 16, 64), "pooled_projections": torch.randn(BATCH, 32)}
    return Diffusers(net, **text)


class Lightning(foreign.LightningDiT):
    def forward(self, z, t):
        return super().forward(z, t * 0.5, t)


IMAGES, TOKENS = (BATCH, 4, 16, 16), (BATCH, 64, 16)
NETWORKS = {
    "SiT-style": (lambda: foreign.SiT(WIDTH, DEPTH, HEADS, 2, 4, 16), IMAGES),
    "LightningDiT-style": (lambda: Lightning(WIDTH, DEPTH, HEADS, 16, 64), TOKENS),
    "timm ViT": (TimmViT, IMAGES),
    "diffusers DiT": (diffusers_dit, IMAGES),
    "diffusers SD3": (diffusers_sd3, IMAGES),
}


def flow_matching(net, z, v, t):
    return net(z, t), None


def dualized(net, z, v, t, rows=ROWS):
    return mfkernels.jvp(net, (z, t), (v, torch.ones_like(t)), rows=rows)


def func_jvp(net, z, v, t):
    with sdpa_kernel(SDPBackend.MATH):
        u, du = torch.func.jvp(net, (z, t), (v, torch.ones_like(t)))
    return u, du.detach()


def primal_then_jvp(net, z, v, t):
    """What `mfkernels.jvp` does with a network that is not dualized; PyTorch's fused attention has no rule."""
    with sdpa_kernel(SDPBackend.MATH):
        return mfkernels.jvp(net, (z, t), (v, torch.ones_like(t)), rows=ROWS)


def step(way, net, z, v, t):
    net.zero_grad(set_to_none=True)
    u, du = way(net, z, v, t)
    target = v if du is None else torch.cat([v[: len(du)] - 0.5 * du, v[len(du) :]])
    (u - target).square().mean().backward()


def kept_bytes(way, net, z, v, t):
    """Bytes of the distinct memory that the tape keeps."""
    kept = {}

    def keep(x):
        bare = x
        while torch._C._functorch.is_functorch_wrapped_tensor(bare):
            bare = torch._C._functorch.get_unwrapped(bare)
        if not bare._is_zerotensor():  # has no memory
            kept[bare.untyped_storage().data_ptr()] = bare.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = way(net, z, v, t)
    del out
    return sum(kept.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_dualize(name, device, figures, benchmark):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net = make().to(device)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    z, v, t = torch.randn(shape, device=device), torch.randn(shape, device=device), torch.rand(BATCH, device=device)
    net.eval()  # their dropout of labels would draw anew in torch.func.jvp
    dual = mfkernels.dualize(net)

    exact = copy.deepcopy(net).double()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        exact_dot = torch.func.jvp(exact, (z.double(), t.double()), (v.double(), torch.ones_like(t).double()))[1]
    ways = {
        "flow matching": (flow_matching, net),
        "MeanFlow, dualized (25 % of rows)": (dualized, dual),
        "MeanFlow, dualized (every row)": (partial(dualized, rows=BATCH), dual),
        "primal + no_grad torch.func.jvp (25 %)": (primal_then_jvp, net),
        "torch.func.jvp with its graph": (func_jvp, net),
    }
    for label, (way, module) in ways.items():
        du = way(module, z, v, t)[1]
        if du is not None:
            assert relative_error(du, exact_dot[: len(du)]) < 1e-4, f"{label} is wrong, so it is not timed"

    steps = {label: partial(step, way, module, z, v, t) for label, (way, module) in ways.items()}
    times = interleaved_seconds(steps, rounds=ROUNDS)
    kept = {label: kept_bytes(way, module, z, v, t) for label, (way, module) in ways.items()}
    peak = {}
    for label, fn in steps.items():
        net.zero_grad(set_to_none=True)  # the gradients are part of every step's peak
        peak[label] = peak_bytes(fn)
    base = "flow matching"
    for label in ways:
        figures.append(
            {
                "table": f"{name}: width {WIDTH}, depth {DEPTH}, 64 tokens, batch {BATCH}, forward + backward, float32",
                "way": label,
                "ms": 1e3 * min(times[label]),
                "× flow matching": median_ratio(times[label], times[base]),
                "× kept by the tape": kept[label] / kept[base],
                "× peak memory": peak[label] / peak[base],
            }
        )
    benchmark.pedantic(steps["MeanFlow, dualized (25 % of rows)"], rounds=1)
