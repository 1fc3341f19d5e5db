"""Bounded linears: the bound, what passes by the weights, and a run that is saved and goes on."""

import json

import pytest
import torch
from torch import nn

from meanflow.config import Config
from meanflow.errors import UsageError
from meanflow.models import MLP, Affine, DiT, config_of, create_model, spectral_norm_linears
from meanflow.training import load_network, run_training
from mfkernels import checkpoint_module, dualize, jvp
from mfkernels.testing import relative_error

TINY = Config.of(
    data="points",
    count=200,
    model="MLP",
    hidden_size=8,
    depth=1,
    spectral_norm=True,
    name="bounded",
    steps=2,
    batch_size=16,
    device="cpu",
    sample_every=0,
    evaluate=False,
)


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, z, r, t, y):
        return self.out(torch.tanh(self.inp(torch.cat([z.flatten(1), r[:, None], t[:, None]], 1))))[:, :, None, None]


def large(net, std=0.5):
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=std)
    return net.double()


NETS = {
    "MLP": lambda: (MLP(1, 2, hidden_size=12, depth=2, num_classes=2), 2, 1),
    "DiT": lambda: (DiT(4, 2, 1, hidden_size=16, depth=2, num_heads=2, num_classes=2), 1, 4),
    "foreign": lambda: (dualize(Foreign()), 2, 1),
}


def inputs(channels, side, B=5):
    z, t = torch.randn(B, channels, side, side, dtype=torch.float64), torch.rand(B, dtype=torch.float64)
    return z, t * torch.rand(B, dtype=torch.float64), t, torch.arange(B) % 2


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
@pytest.mark.parametrize("bound", [0.5, 1.0, 30.0])
def test_the_largest_singular_value_is_the_bound_or_below_and_then_the_weight_is_as_it_was(shape, bound):
    linear = nn.Linear(*shape, dtype=torch.float64)
    nn.init.normal_(linear.weight)
    before = linear.weight.detach().clone()
    norm = torch.linalg.matrix_norm(before, 2)
    spectral_norm_linears(nn.Sequential(linear), bound)
    assert relative_error(linear.weight.detach(), before * min(1.0, bound / norm.item())) <= 1e-14
    assert bound < 30 or torch.equal(linear.weight, before)


@pytest.mark.parametrize("fill", [0.0, 0.7, 3.0])
def test_gradients_of_a_bounded_weight(fill):
    """At zero too, where a division by σ gives NaN; against the singular value decomposition."""
    W = torch.randn(3, 5, dtype=torch.float64)
    W = (fill * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
    linear = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    spectral_norm_linears(nn.Sequential(linear))
    linear.parametrizations.weight.original.data.copy_(W.detach())
    cotangent = torch.randn(3, 5, dtype=torch.float64)
    (found,) = torch.autograd.grad(linear.weight, linear.parametrizations.weight.original, cotangent)
    bounded = W if fill <= 1 else W / torch.linalg.matrix_norm(W, 2)
    (expected,) = torch.autograd.grad(bounded * 1.0, W, cotangent)
    assert relative_error(found, expected) <= 1e-13


@pytest.mark.parametrize("name", NETS)
def test_values_tangents_and_gradients_are_those_of_plain_linears_with_the_bounded_weights(name):
    """No fused op reads the weights past the bound."""
    net, channels, side = NETS[name]()
    net = spectral_norm_linears(large(net))
    z, r, t, y = inputs(channels, side)
    tangents = tuple(torch.randn_like(a) for a in (z, r, t))
    u, du = jvp(net, (z, r, t), tangents, rows=3, y=y)
    plain, _, _ = NETS[name]()
    bounded = weights_of(net, plain.double())

    def reference(z, r, t):
        return torch.func.functional_call(plain, bounded, (z, r, t, y))

    ref, ref_dot = torch.func.jvp(reference, (z, r, t), tangents)
    assert relative_error(u, ref) <= 1e-14
    assert relative_error(du, ref_dot[:3]) <= 1e-13
    weight = torch.randn_like(u)
    parameters = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad((u * weight).sum(), parameters)
    expected = torch.autograd.grad((reference(z, r, t) * weight).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= 1e-12
    assert net(z, r, t, y).equal(u)


def weights_of(net, plain):
    """What each parameter of a plain copy is in the bounded network, on its tape."""
    return {
        key: getattr(net.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]) for key in plain.state_dict()
    }


def test_a_recomputed_block_has_the_same_weights():
    nets = [spectral_norm_linears(large(NETS["DiT"]()[0])) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for block in nets[1].blocks:
        checkpoint_module(block)
    z, r, t, y = inputs(1, 4)
    grads = []
    for net in nets:
        u, _ = jvp(net, (z, r, t), (z, torch.zeros_like(r), torch.ones_like(t)), y=y)
        grads.append(torch.autograd.grad(u.square().sum(), [p for p in net.parameters() if p.requires_grad]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_bound_holds_under_autocast_and_for_bfloat16_weights():
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(64, 64)
        nn.init.normal_(linear.weight)
        spectral_norm_linears(nn.Sequential(linear)).to(dtype)
        plain = linear.weight
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear.weight.equal(plain)
        assert plain.dtype == dtype
        assert abs(torch.linalg.matrix_norm(plain.detach().float(), 2) - 1) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_the_mlps_jacobian_is_bounded_as_it_says():
    z, r, t, y = inputs(2, 1)
    for bounded in (False, True):
        net = large(MLP(1, 2, hidden_size=12, depth=2, num_classes=2), std=1.5)
        if bounded:
            spectral_norm_linears(net)
        J = torch.autograd.functional.jacobian(lambda z, net=net: net(z, r, t, y), z)  # [B, 2, 1, 1, B, 2, 1, 1]
        norm = torch.linalg.matrix_norm(J.reshape(5, 2, 5, 2)[range(5), :, range(5)], 2).max()
        assert (norm <= 2.1**2) == bounded


def test_embedders_stay_as_they_are_and_a_silent_start_stays_silent():
    net = create_model(
        "DiT",
        input_size=4,
        patch_size=2,
        in_channels=1,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=2,
        spectral_norm=True,
    )
    bounded = [
        name.removesuffix(".parametrizations.weight.original")
        for name in net.state_dict()
        if "parametrizations" in name
    ]
    assert sorted(bounded) == [
        "blocks.0.adaLN_modulation.1",
        "blocks.0.attn.proj",
        "blocks.0.attn.qkv",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "final_layer.adaLN_modulation.1",
        "final_layer.linear",
    ]
    assert config_of(net)["spectral_norm"] is True
    z, r, t, y = (a.float() if a.is_floating_point() else a for a in inputs(1, 4))
    u = net(z, r, t, y)
    assert not u.any()
    u.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert "spectral_norm" not in config_of(create_model("Affine", input_size=2, in_channels=1, num_classes=2))


def test_what_cannot_be_bounded_is_named():
    with pytest.raises(
        ValueError, match=r"net: expected plain linears, and the weight of final_layer.1 is parametrised"
    ):
        spectral_norm_linears(spectral_norm_linears(Affine(2, 1)))
    with pytest.raises(ValueError, match=r"net: expected linears outside of embedders, found none in Conv2d"):
        spectral_norm_linears(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="bound: expected a finite number > 0, got 0"):
        spectral_norm_linears(nn.Linear(2, 2), 0)
    with pytest.raises(TypeError, match=r"net: expected a torch.nn.Module, got int"):
        spectral_norm_linears(3)


def test_a_run_saves_it_loads_it_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_training(TINY)
    state = json.loads((result.checkpoint / "state.json").read_text())
    assert state["model"]["config"]["spectral_norm"] is True
    loaded = load_network(tmp_path / "runs" / "bounded")
    norm = torch.linalg.matrix_norm(loaded.net.blocks[0].linear.weight, 2)
    assert norm <= 1 + 1e-6
    assert loaded.generate(torch.zeros(3, dtype=torch.long)).shape == (3, 2, 1, 1)
    assert run_training(TINY.replace(steps=4), resume=True).step == 4
    with pytest.raises(UsageError, match=r"spectral_norm: .* holds another model's weights: expected True, got False"):
        run_training(TINY.replace(steps=6, spectral_norm=False), resume=True)
    run_training(TINY.replace(name="plain", spectral_norm=False))
    with pytest.raises(UsageError, match=r"spectral_norm: .* holds another model's weights: expected False, got True"):
        run_training(TINY.replace(name="plain", steps=6), resume=True)
