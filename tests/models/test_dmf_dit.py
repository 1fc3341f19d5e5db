"""Decoupled MeanFlow's network: which blocks are told which time."""

import pytest
import torch

from meanflow.models import DiT, DMFDiT, config_of, create_model
from mfkernels import jvp

SIZE = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 2,
    "hidden_size": 16,
    "depth": 7,
    "num_heads": 2,
    "num_classes": 3,
}


def networks(split=5 / 7):
    torch.manual_seed(0)
    net = DMFDiT(**SIZE, split=split)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return net.double()


def inputs():
    torch.manual_seed(1)
    z = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    return z, torch.rand(5, dtype=torch.float64) / 2, torch.rand(5, dtype=torch.float64) / 2 + 0.5, torch.arange(5) % 4


def test_with_equal_times_it_is_a_network_of_one_time():
    """The weights of a DiT that was told t alone."""
    net, plain = networks(), DiT(**SIZE).double()
    missing = plain.load_state_dict(net.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {name.split(".")[0] for name in missing.missing_keys} == {"r_embedder"}
    for p in plain.r_embedder.parameters():
        torch.nn.init.zeros_(p)
    z, _, t, y = inputs()
    assert torch.equal(net(z, t, t, y), plain(z, t, t, y))


@pytest.mark.parametrize("split_depth", [1, 5, 7])
def test_r_changes_what_comes_after_the_split(split_depth):
    net = networks(split_depth / 7)
    seen = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in net.blocks]
    z, r, t, y = inputs()
    net(z, r, t, y), net(z, t, t, y)
    for hook in hooks:
        hook.remove()
    same = [torch.equal(a, b) for a, b in zip(seen[:7], seen[7:], strict=True)]
    assert same == [True] * split_depth + [False] * (7 - split_depth)


def test_the_derivative():
    net = networks()
    z, r, t, y = inputs()
    v, zero, one = torch.randn_like(z), torch.zeros_like(r), torch.ones_like(t)
    u, du_dt = jvp(net, (z, r, t), (v, zero, one), y=y, rows=3)
    h = 1e-5
    with torch.no_grad():
        after, before = (net(z + s * h * v, r, t + s * h, y) for s in (1, -1))
    torch.testing.assert_close(u, net(z, r, t, y), rtol=0, atol=0)
    torch.testing.assert_close(du_dt, ((after - before) / (2 * h))[:3], rtol=1e-6, atol=1e-7)


def test_its_sizes():
    assert networks().split_depth == 5
    assert create_model("DMF-DiT", **config_of(networks(3 / 7))).split_depth == 3
    with pytest.raises(ValueError, match=r"split: expected a share in \[0, 1\], got 2"):
        DMFDiT(**SIZE, split=2)
