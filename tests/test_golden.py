"""The authors' own JAX programs (MeanFlow, arXiv 2505.13447), in float32: same weights, same draws, equal numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from meanflow import sample
from meanflow.convert import dit_from_flax
from meanflow.models import DiT
from meanflow.objectives import MeanFlow
from mfkernels.testing import relative_error

CASES = {
    "meanflow_dit_a": (
        {
            "input_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 48,
            "depth": 3,
            "num_heads": 4,
            "num_classes": 10,
        },
        MeanFlow(ratio=0.25, omega=1.0, kappa=0.5),
    ),
    "meanflow_dit_c": (
        {
            "input_size": 12,
            "patch_size": 2,
            "in_channels": 1,
            "hidden_size": 64,
            "depth": 2,
            "num_heads": 1,
            "num_classes": 5,
        },
        MeanFlow(ratio=1.0, norm_p=0.0, label_dropout=0.0),
    ),
}


def image(a):
    return torch.from_numpy(a).permute(0, 3, 1, 2).contiguous()  # [B, C, H, W]


def part(data, prefix):
    return {name.removeprefix(prefix): data[name] for name in data.files if name.startswith(prefix)}


@pytest.fixture(params=CASES)
def case(request):
    size, objective = CASES[request.param]
    data = np.load(Path(__file__).parent / "golden" / f"{request.param}.npz")
    net = DiT(**size)
    net.load_state_dict(dit_from_flax(part(data, "param/")))
    return net, objective, data


def test_objective_and_gradients(case):
    net, objective, data = case
    x, labels = image(data["x"]), torch.from_numpy(data["labels"]).long()
    t, r = (torch.from_numpy(data[name]).flatten() for name in "tr")
    noise = x + image(data["v"] if "v" in data.files else data["v_g"])
    drop = torch.from_numpy(data["y_in"]).long() != labels
    out = objective.loss_at(net, x=x, noise=noise, t=t, r=r, y=labels, drop=drop)
    moved = r != t
    # measured: 2.1e-7, 7.4e-8, 2.8e-7, 0, 3.7e-7
    assert relative_error(out.u, image(data["u"])) <= 5e-7
    assert relative_error(out.v, image(data["v_g"])) <= 2e-7
    assert relative_error(out.du_dt[moved], image(data["du_dt"])[moved]) <= 6e-7
    assert out.du_dt[~moved].abs().sum() == 0
    assert relative_error(out.loss, torch.from_numpy(data["loss"])) <= 2e-7
    out.loss.backward()
    wanted = dit_from_flax(part(data, "grad/"))
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert relative_error(p.grad, wanted[name]) <= 8e-7, name


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples(case, steps):
    net, _, data = case
    noise, labels = image(data[f"sample_{steps}_noise"]), torch.from_numpy(data["labels"]).long()
    wanted = image(data[f"sample_{steps}"])
    assert relative_error(sample(net, noise, labels, steps=steps), wanted) <= 3e-7
    assert relative_error(sample(net, noise, labels, times=data[f"sample_{steps}_times"]), wanted) <= 3e-7
