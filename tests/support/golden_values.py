"""The authors' own reference values, tests/golden/*.npz, as tensors in our layouts on the tests' device."""

from pathlib import Path

import numpy as np
import torch
from both_backends import DEVICE

# of the networks named *_dit_a
DIT_A = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 10,
}


def load(name):
    return np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz")


def tensor(a):
    return torch.from_numpy(a).to(DEVICE)


def vector(a):
    return tensor(a).flatten()  # [B]


def image(a):
    return tensor(a).permute(0, 3, 1, 2).contiguous()  # [B, C, H, W]


def labels(data):
    """Returns: each sample's label, and whether it was dropped."""
    y = tensor(data["labels"]).long()
    return y, tensor(data["y_in"]).long() != y


def part(data, prefix):
    return {name.removeprefix(prefix): data[name] for name in data.files if name.startswith(prefix)}
