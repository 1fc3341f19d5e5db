"""Every objective of the family on a small network, with all that it needs beside it."""

import copy

import torch

from meanflow import registry
from meanflow.models import DiT, IMFDiT
from meanflow.objectives import Networks

SIZE = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
SHAPE = (8, 2, 4, 4)
# options with which something of every method is in a batch of eight
OPTIONS = {
    "alpha_flow": {"omega": 0.6, "kappa": 0.3, "alpha_end": 100},
    "ayf": {"autoguidance": 2.0},
    "ctm": {"heun_steps": 2, "scales": 6},
    "dmf": {"omega": 0.5},
    "hybrid": {"omega": 0.8, "kappa": 0.5, "ratio": 0.5},
    "imf": {"ratio": 0.5},
    "meanflow": {"omega": 0.8, "kappa": 0.5, "ratio": 0.5},
    "scd": {"guidance": 2.0},
    "shortcut": {"ratio": 0.5, "timesteps": 8},
    "split_meanflow": {"distil": True, "guidance": 1.5},
}
# where something happens in the training that is not there at its beginning
STEPS = {"alpha_flow": 30, "sct": 4000, "scd": 4000, "rcm": 400, "ayf": 3000, "ect": 60_000}
NAMES = [name for name in registry.names("objectives") if name != "tarflow"]


def objective_of(name, **options):
    return registry.find("objectives", name)(**OPTIONS.get(name, {}), **options)


def network(objective, seed=1, dtype=torch.float64):
    torch.manual_seed(seed)
    two = objective.outputs == ("u", "v")
    net = IMFDiT(depth=2, aux_head_depth=1, **SIZE) if two else DiT(depth=1, **SIZE)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return net.to(dtype)


def networks(objective, net, dtype=torch.float64):
    """An averaged copy, teachers and learned parameters, where the objective needs them, with weights of their own."""
    ema = None
    if objective.target_decay(0) is not None:
        ema = copy.deepcopy(net).requires_grad_(False)
        with torch.no_grad():
            for p in ema.parameters():
                p.add_(0.02 * torch.randn_like(p))
    teachers = {role: network(objective, seed).requires_grad_(False) for seed, role in enumerate(objective.teachers, 7)}
    learned = objective.learned_module()
    if learned is not None:
        learned = learned.to(dtype)
        torch.nn.init.normal_(learned.weight, std=0.3)
    return Networks(ema=ema, learned=learned, **teachers)


def draw(name, objective, seed=0, shape=SHAPE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return objective.draw(shape, step=STEPS.get(name, 0), generator=generator, dtype=dtype, spread=True)


def batch(seed=0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.arange(shape[0]) % 3
