import math

import pytest
import torch

from meanflow.models import DiT
from meanflow.objectives import FlowMatching, LogitNormal, MeanFlow, Uniform
from mfkernels.testing import relative_error

SIZE = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 2,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 3,
}


@pytest.fixture
def net():
    torch.manual_seed(1)
    net = DiT(**SIZE).double()
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return net


def draws(B=8):
    x, e = torch.randn(2, B, 2, 4, 4, dtype=torch.float64)
    t, share = torch.rand(2, B, dtype=torch.float64)
    r = t * share
    r[[0, 2, 3, 5, 7]] = t[[0, 2, 3, 5, 7]]  # rows with r ≠ t are not the first ones
    drop = torch.tensor([0, 1, 0, 0, 0, 1, 0, 0], dtype=torch.bool)[:B]
    return {"x": x, "noise": e, "t": t, "r": r, "y": torch.arange(B) % 3, "drop": drop}


def algorithm_1(net, o, x, noise, t, r, y, drop):
    """The paper's algorithm with torch.func.jvp on every row and every forward written out."""
    c = [a.view(-1, 1, 1, 1) for a in (t, r, drop)]
    z, v = (1 - c[0]) * x + c[0] * noise, noise - x
    null = torch.full_like(y, net.num_classes)
    with torch.no_grad():
        inside = (c[0] >= o.guidance_interval[0]) & (c[0] <= o.guidance_interval[1])
        guided = o.omega * v + o.kappa * net(z, t, t, y) + (1 - o.omega - o.kappa) * net(z, t, t, null)
        v_g = torch.where(inside & ~c[2], guided, v)
    y_in = torch.where(drop, null, y)
    u, du = torch.func.jvp(lambda *a: net(*a, y_in), (z, r, t), (v_g, torch.zeros_like(r), torch.ones_like(t)))
    error = (u - (v_g - (c[0] - c[1]) * du).detach()).square().sum((1, 2, 3))
    return (error / (error.detach() + o.norm_eps) ** o.norm_p), u, du, v_g


@pytest.mark.parametrize(
    "objective",
    [
        MeanFlow(),
        MeanFlow(omega=2.0, kappa=0.0),
        MeanFlow(omega=1.0, kappa=0.5),
        MeanFlow(omega=0.5, kappa=0.5),
        MeanFlow(omega=0.2, kappa=0.92, guidance_interval=(0.3, 0.8), norm_p=0.75, norm_eps=1e-3),
        MeanFlow(norm_p=0.0, label_dropout=0.0),
    ],
    ids=str,
)
def test_against_algorithm_1(net, objective):
    d = draws()
    out = objective.loss_at(net, **d)
    per_sample, u, du, v_g = algorithm_1(net, objective, **d)
    moved = d["r"] != d["t"]
    assert relative_error(out.u, u) <= 2e-15
    assert relative_error(out.v, v_g) <= 2e-15
    assert relative_error(out.du_dt[moved], du[moved]) <= 4e-15
    assert out.du_dt[~moved].abs().sum() == 0
    assert relative_error(out.per_sample, per_sample) <= 7e-16  # measured 3.3e-16
    assert relative_error(out.loss, per_sample.mean()) <= 2.4e-16  # measured 1.2e-16
    ours = torch.autograd.grad(out.loss, [p for p in net.parameters() if p.requires_grad])
    theirs = torch.autograd.grad(per_sample.mean(), [p for p in net.parameters() if p.requires_grad])
    for g, g_ref in zip(ours, theirs, strict=True):
        assert relative_error(g, g_ref) <= 3.6e-15  # measured 1.8e-15


@pytest.mark.parametrize("which", ["none", "all"])
def test_no_row_and_every_row_with_r_below_t(net, which):
    d = draws()
    d["r"] = d["t"].clone() if which == "none" else d["t"] / 2
    objective = MeanFlow(omega=1.0, kappa=0.5)
    out = objective.loss_at(net, **d)
    per_sample, _, du, _ = algorithm_1(net, objective, **d)
    assert relative_error(out.per_sample, per_sample) <= 9e-16  # measured 4.3e-16
    if which == "all":
        assert relative_error(out.du_dt, du) <= 4e-15


def test_forwards_that_need_not_be_done(net):
    """Rows of each network call: design.md §5. Guidance reuses the training prediction where r = t."""
    calls = []
    net.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]), with_kwargs=False)
    d = draws()
    for objective, rows in (
        (MeanFlow(), [8]),
        (MeanFlow(omega=2.0), [8, 8]),  # without labels
        (MeanFlow(omega=1.0, kappa=0.5), [8 + 3, 8]),  # without labels, and with them where r ≠ t
        (MeanFlow(omega=0.5, kappa=0.5), [3, 8]),  # 1 − ω − κ = 0: no unconditional forward
    ):
        calls.clear()
        objective.loss_at(net, **d)
        assert calls == rows, objective


def test_call_draws_what_it_says(net):
    objective = MeanFlow(ratio=0.25, label_dropout=0.5, time_sampler=LogitNormal(-0.4, 1.0))
    x, y = torch.randn(16, 2, 4, 4, dtype=torch.float64), torch.arange(16) % 3
    out = objective(net, x, y, generator=torch.Generator().manual_seed(3))
    again = objective(net, x, y, generator=torch.Generator().manual_seed(3))
    other = objective(net, x, y, generator=torch.Generator().manual_seed(4))
    assert torch.equal(out.loss, again.loss)
    assert not torch.equal(out.loss, other.loss)
    assert int((out.r != out.t).sum()) == 4
    assert bool((out.r <= out.t).all())
    assert int((other.r != other.t).sum()) == 4
    assert not torch.equal(out.r != out.t, other.r != other.t)  # which rows is drawn too
    z_free = (out.u == 0).all()
    assert not z_free


def test_gradients_under_autocast_with_guidance(net):
    """Weights that autocast caches during the no_grad guidance forward must not serve the training pass."""
    net = net.float()
    d = {k: v.float() if v.is_floating_point() else v for k, v in draws().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = MeanFlow(omega=1.0, kappa=0.5).loss_at(net, **d)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.requires_grad)
    exact = MeanFlow(omega=1.0, kappa=0.5).loss_at(net, **d)
    moved = d["r"] != d["t"]
    assert relative_error(out.u, exact.u) <= 2e-2
    assert relative_error(out.du_dt[moved], exact.du_dt[moved]) <= 0.15  # measured 0.072


def test_flow_matching(net):
    d = draws()
    d.pop("r")
    out = FlowMatching().loss_at(net, **d)
    c = d["t"].view(-1, 1, 1, 1)
    y = torch.where(d["drop"], 3, d["y"])
    u = net((1 - c) * d["x"] + c * d["noise"], d["t"], d["t"], y)
    error = (u - (d["noise"] - d["x"])).square().sum((1, 2, 3))
    assert relative_error(out.per_sample, error) <= 1e-15
    assert out.du_dt.abs().sum() == 0
    drawn = FlowMatching(time_sampler=Uniform())(net, d["x"], d["y"], generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn.r, drawn.t)


@pytest.mark.parametrize(
    ("sampler", "median", "spread"),
    [(Uniform(), 0.5, 0.25), (LogitNormal(-0.4, 1.0), 1 / (1 + math.exp(0.4)), 0.154)],
)
def test_time_samplers(sampler, median, spread):
    t = sampler.sample(20000, generator=torch.Generator().manual_seed(0))
    assert t.min() > 0
    assert t.max() < 1
    assert abs(t.median().item() - median) < 0.01
    low, high = t.quantile(0.25).item(), t.quantile(0.75).item()
    assert abs((high - low) / 2 - spread) < 0.01


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ratio": 1.5}, r"ratio: expected a number in \[0, 1\], got 1.5"),
        ({"label_dropout": -0.1}, "label_dropout: expected"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval: expected"),
        ({"kappa": 1.0}, "kappa: expected less than 1"),
        ({"norm_p": -1.0}, "norm_p: expected"),
        ({"norm_eps": 0.0}, "norm_eps: expected"),
    ],
)
def test_bad_objectives(changes, match):
    with pytest.raises(ValueError, match=match):
        MeanFlow(**changes)


def test_bad_draws(net):
    d = draws()
    for changes, error, match in (
        ({"noise": d["noise"][:2]}, ValueError, "noise: expected the shape of x"),
        ({"t": d["t"][:, None]}, ValueError, r"t: expected shape \(8,\)"),
        ({"r": d["t"] + 0.1}, ValueError, "r: expected r <= t"),
        ({"drop": d["drop"].long()}, TypeError, "drop: expected bool"),
    ):
        with pytest.raises(error, match=match):
            MeanFlow().loss_at(net, **{**d, **changes})
    with pytest.raises(TypeError, match="net: expected an attribute num_classes"):
        MeanFlow().loss_at(lambda z, r, t, y: z, **d)
    with pytest.raises(ValueError, match="std: expected"):
        LogitNormal(0.0, 0.0)
