import math

import pytest
import torch
from imf_peers import PlainIMFDiT, improved_meanflow, step_flops
from peers import math_attention

from meanflow.models import IMFDiT
from meanflow.objectives import ImprovedMeanFlow, LogitNormal
from mfkernels.testing import relative_error

SIZE = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 2,
    "hidden_size": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 3,
    "aux_head_depth": 2,
    "num_class_tokens": 2,
    "num_time_tokens": 1,
    "num_cfg_tokens": 1,
    "num_interval_tokens": 1,
}


@pytest.fixture
def net():
    torch.manual_seed(1)
    net = IMFDiT(**SIZE).double()
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name or "_scale" in name else 0.0, std=0.3)
    return net


@pytest.fixture
def plain(net):
    plain = PlainIMFDiT(**SIZE).double()
    plain.load_state_dict(net.state_dict())
    plain.attend = math_attention
    return plain


def draws(B=8, moved=(1, 4, 6), dropped=(1, 5)):
    x, e = torch.randn(2, B, 2, 4, 4, dtype=torch.float64)
    t, share, omega, t_min, t_max = torch.rand(5, B, dtype=torch.float64)
    r = t.clone()
    r[list(moved)] *= share[list(moved)]
    drop = torch.zeros(B, dtype=torch.bool)
    drop[list(dropped)] = True
    guidance = {"omega": 1 + 7 * omega, "t_min": t_min / 2, "t_max": 0.5 + t_max / 2}
    return {"x": x, "noise": e, "t": t, "r": r, "y": torch.arange(B) % 3, "drop": drop, **guidance}


@pytest.mark.parametrize("objective", [ImprovedMeanFlow(), ImprovedMeanFlow(norm_p=0.75, norm_eps=1e-3)], ids=str)
@pytest.mark.parametrize("moved", [(), (1, 4, 6), range(8)], ids=["none", "some", "all"])
@pytest.mark.parametrize("dropped", [(), (1, 5), range(8)], ids=["kept", "two", "all_dropped"])
def test_against_the_algorithm_with_every_forward_on_every_row(net, plain, objective, moved, dropped):
    d = draws(moved=moved, dropped=dropped)
    out = objective.loss_at(net, **d)
    per_sample, u, du, v_g, v_head = improved_meanflow(plain, **d, norm_p=objective.norm_p, norm_eps=objective.norm_eps)
    rows = d["r"] != d["t"]
    # measured: 1.3e-15, 1.6e-15, 1.1e-15, 5.7e-15, 4.4e-16, 1.3e-16 and 9.9e-15
    assert relative_error(out.u, u) <= 3e-15
    assert relative_error(out.v_head, v_head) <= 3e-15
    assert relative_error(out.v, v_g) <= 3e-15
    if rows.any():
        assert relative_error(out.du_dt[rows], du[rows]) <= 1.2e-14
    assert out.du_dt[~rows].abs().sum() == 0
    assert relative_error(out.per_sample, per_sample) <= 1e-15
    assert relative_error(out.loss, per_sample.mean()) <= 1e-15
    ours = torch.autograd.grad(out.loss, list(net.parameters()))
    gradients = torch.autograd.grad(per_sample.mean(), list(plain.parameters()))
    theirs = dict(zip(dict(plain.named_parameters()), gradients, strict=True))
    for (name, _), g in zip(net.named_parameters(), ours, strict=True):
        assert relative_error(g, theirs[name]) <= 2e-14, name


def test_rows_with_r_equal_t_have_the_whole_interval(net):
    d = draws()
    same = d["r"] == d["t"]
    other = {
        **d,
        "t_min": torch.where(same, d["t_min"] / 3, d["t_min"]),
        "t_max": torch.where(same, 1.0, d["t_max"]),
    }
    out = ImprovedMeanFlow().loss_at(net, **d)
    assert torch.equal(out.loss, ImprovedMeanFlow().loss_at(net, **other).loss)
    assert torch.equal(out.t_min, torch.where(same, 0.0, d["t_min"]))
    assert torch.equal(out.t_max, torch.where(same, 1.0, d["t_max"]))


def test_forwards_that_need_not_be_done(net):
    """Rows of each network call, and of each head's blocks: only r ≠ t rows need the v head twice (design.md §5)."""
    calls, blocks = [], []
    net.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))

    def count(module, args):
        rows = 0 if isinstance(args[0], torch.Tensor) or args[0].tangent is None else args[0].rows
        blocks.append((kind[module], args[0].shape[0], rows))

    kind = {}
    for name in ("shared_blocks", "u_heads", "v_heads"):
        for block in getattr(net, name):
            kind[block] = name
            block.register_forward_pre_hook(count)
    for moved, rows in (((1, 4, 6), 3), ((), 0), (range(8), 8)):
        calls.clear()
        blocks.clear()
        ImprovedMeanFlow().loss_at(net, **draws(moved=moved))
        assert calls == [8 + rows, 8]
        guidance = [("shared_blocks", 8 + rows, 0)] + 2 * [("v_heads", 8 + rows, 0)]
        training = [("shared_blocks", 8, rows)] + 2 * [("v_heads", 8, 0)] + 2 * [("u_heads", 8, rows)]
        assert blocks == guidance + training


def test_flops_of_a_step():
    """At B/2's proportions of shared blocks, heads, tokens and width; B/2 itself, in bench/imf: 4.254."""
    net = IMFDiT(input_size=16, hidden_size=256, depth=12, num_heads=4, num_classes=3)
    step, forward = step_flops(net, ImprovedMeanFlow())
    assert step <= 4.4 * forward  # counted: 4.249; with every forward on every row it would be 5.4


def test_call_draws_what_it_says(net):
    objective = ImprovedMeanFlow(label_dropout=0.5, time_sampler=LogitNormal(-0.4, 1.0))
    x, y = torch.randn(16, 2, 4, 4, dtype=torch.float64), torch.arange(16) % 3
    out = objective(net, x, y, generator=torch.Generator().manual_seed(3))
    again = objective(net, x, y, generator=torch.Generator().manual_seed(3))
    other = objective(net, x, y, generator=torch.Generator().manual_seed(4))
    assert torch.equal(out.loss, again.loss)
    assert not torch.equal(out.loss, other.loss)
    moved = out.r != out.t
    assert int(moved.sum()) == int((other.r != other.t).sum()) == 8
    assert not torch.equal(moved, other.r != other.t)  # which rows is drawn too
    assert bool((out.r <= out.t).all())
    assert bool((out.t_min[~moved] == 0).all())
    assert bool((out.t_max[~moved] == 1).all())
    assert bool(((out.t_min >= 0) & (out.t_min <= 0.5) & (out.t_max >= 0.5) & (out.t_max <= 1)).all())
    assert len(set(out.t_min[moved].tolist()) | set(out.t_max[moved].tolist())) == 16
    assert bool(((out.omega >= 1) & (out.omega <= 8)).all())


@pytest.mark.parametrize(("beta", "largest"), [(1.0, 8.0), (2.0, 8.0), (0.0, 4.0), (0.5, 3.0), (1.0 + 1e-9, 8.0)])
def test_omega_has_density_omega_to_the_minus_beta(beta, largest):
    omega = ImprovedMeanFlow(cfg_beta=beta, omega_max=largest).draw_omega(
        200_000, generator=torch.Generator().manual_seed(0)
    )
    assert omega.dtype == torch.float32
    assert omega.min() >= 1
    assert omega.max() <= largest * (1 + 1e-6)
    grid = torch.linspace(1, largest, 100_001, dtype=torch.float64)
    density = grid**-beta
    cumulative = torch.cumulative_trapezoid(density, grid)
    cumulative = cumulative / cumulative[-1]
    for share in (0.1, 0.5, 0.9):
        quantile = grid[1:][torch.searchsorted(cumulative, share)].item()
        assert abs((omega <= quantile).double().mean().item() - share) < 0.004  # 3.6 standard deviations at most
    # the authors' draw at β = 1
    if beta == 1.0:
        share = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(omega, torch.exp(share * math.log1p(largest - 1)))


def test_omega_max_of_one_is_no_guidance(net):
    objective = ImprovedMeanFlow(omega_max=1.0)
    x, y = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.arange(4) % 3
    out = objective(net, x, y, generator=torch.Generator().manual_seed(0))
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    assert bool((out.omega == 1).all())
    assert torch.equal(out.v, e - x)


def test_gradients_under_autocast(net):
    """Weights that autocast caches during the no_grad guidance forward must not serve the training pass."""
    net = net.float()
    d = {k: v.float() if v.is_floating_point() else v for k, v in draws().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ImprovedMeanFlow().loss_at(net, **d)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    exact = ImprovedMeanFlow().loss_at(net, **d)
    moved = d["r"] != d["t"]
    for name in ("u", "v_head", "v"):
        assert relative_error(getattr(out, name), getattr(exact, name)) <= 4e-2, name  # measured 1.6e-2
    assert relative_error(out.du_dt[moved], exact.du_dt[moved]) <= 8e-2  # measured 3.9e-2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ratio": 1.5}, r"ratio: expected a number in \[0, 1\], got 1.5"),
        ({"label_dropout": -0.1}, "label_dropout: expected"),
        ({"cfg_beta": math.inf}, "cfg_beta: expected a finite number"),
        ({"omega_max": 0.5}, "omega_max: expected a number >= 1, got 0.5"),
        ({"norm_p": -1.0}, "norm_p: expected"),
        ({"norm_eps": 0.0}, "norm_eps: expected"),
    ],
)
def test_bad_objectives(changes, match):
    with pytest.raises(ValueError, match=match):
        ImprovedMeanFlow(**changes)


def test_bad_draws(net):
    d = draws()
    for changes, error, match in (
        ({"noise": d["noise"][:2]}, ValueError, "noise: expected the shape of x"),
        ({"t": d["t"][:, None]}, ValueError, r"t: expected shape \(8,\)"),
        ({"r": d["t"] + 0.1}, ValueError, "r: expected r <= t"),
        ({"drop": d["drop"].long()}, TypeError, "drop: expected bool"),
        ({"omega": d["omega"][:3]}, ValueError, r"omega: expected shape \(8,\)"),
        ({"omega": d["omega"] - 7}, ValueError, "omega: expected at least 1"),
        ({"t_max": d["t_max"][:, None]}, ValueError, r"t_max: expected shape \(8,\)"),
    ):
        with pytest.raises(error, match=match):
            ImprovedMeanFlow().loss_at(net, **{**d, **changes})
    with pytest.raises(TypeError, match="net: expected an attribute num_classes"):
        ImprovedMeanFlow().loss_at(lambda *a, **k: a, **d)
