"""Flow matching and MeanFlow mixed per row, and the bridge: against formulas, closed forms and float64 gradients."""

import dataclasses

import family
import pytest
import torch
from torch import nn

from meanflow.config import Config
from meanflow.errors import UsageError
from meanflow.objectives import BridgePath, FlowMatching, Hybrid, LinearPath, MeanFlow

MEAN, STD, SIGMA = 0.3, 0.7, 0.8


def prepared(**options):
    objective = Hybrid(**options)
    return objective, family.network(objective), *family.batch(), family.draw("hybrid", objective)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("options", [{"mix": 0.3}, {"mix": 0.3, "mix_schedule": "gap"}, {"mix": 0.5, "norm_p": 0.0}])
def test_the_loss_and_its_gradient_are_those_of_the_two_methods(ratio, options):
    objective, net, x, y, draws = prepared(ratio=ratio, **options)
    parameters = [p for p in net.parameters() if p.requires_grad]
    weight = {"norm_p": objective.norm_p, "norm_eps": objective.norm_eps}
    mf = MeanFlow(ratio=ratio, **weight).loss(net, x, y, draws)
    fm = FlowMatching(**weight).loss(
        net, x, y, dataclasses.replace(draws, r=draws.t, moved=~draws.moved & False, rows=0)
    )
    out = objective.loss(net, x, y, draws)
    t, r = draws.t.double(), draws.r.double()
    w = torch.full_like(t, 0.3) if options["mix"] == 0.3 else torch.full_like(t, 0.5)
    w = 1 - 0.7 * (t - r) if "mix_schedule" in options else w
    expected = w * fm.per_sample + (1 - w) * mf.per_sample
    # times and their weights are of single precision
    torch.testing.assert_close(out.per_sample, expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(out.metrics["squared_error"], mf.metrics["squared_error"], rtol=1e-12, atol=0)
    torch.testing.assert_close(out.metrics["squared_error_fm"], fm.metrics["squared_error"], rtol=1e-12, atol=0)

    # the gradient: written out, with target and weight as constants
    whole = MeanFlow(ratio=ratio, **weight).evaluate(net, x, y, draws)
    labels = y if draws.drop is None else y.masked_fill(draws.drop, 3)
    path = LinearPath()
    z, v = path.point(x, draws.noise, draws.t), path.velocity(x, draws.noise, draws.t)
    u_tgt = v - (t - r).view(-1, 1, 1, 1) * whole.du_dt

    def error(r, target):
        square = (net(z, r, t, labels) - target).square().flatten(1).sum(1)
        return square / (square.detach() + objective.norm_eps) ** objective.norm_p

    loss = (w * error(t, v) + (1 - w) * error(r, u_tgt)).mean()
    found, expected = (torch.cat([g.flatten() for g in torch.autograd.grad(a, parameters)]) for a in (out.loss, loss))
    assert (found - expected).norm() <= 2e-7 * expected.norm()


@pytest.mark.parametrize("guidance", [{}, {"omega": 0.8, "kappa": 0.5}, {"omega": 2.0}])
def test_at_its_ends_it_is_one_of_them(guidance):
    """Also guided: with mix 0 MeanFlow, with mix 1 its velocity at one time."""
    objective, net, x, y, draws = prepared(mix=0.0, ratio=0.5, **guidance)
    mf = MeanFlow(ratio=0.5, **guidance).evaluate(net, x, y, draws)
    out = objective.evaluate(net, x, y, draws)
    for key in ("per_sample", "u", "du_dt", "v"):
        torch.testing.assert_close(getattr(out, key), getattr(mf, key), rtol=1e-11, atol=1e-11)
    one = dataclasses.replace(objective, mix=1.0).evaluate(net, x, y, draws)
    labels = y if draws.drop is None else y.masked_fill(draws.drop, 3)
    z, t = LinearPath().point(x, draws.noise, draws.t), draws.t.double()
    with torch.no_grad():
        square = (net(z, t, t, labels) - one.v).square().flatten(1).sum(1)
    torch.testing.assert_close(one.others["squared_error_fm"], square, rtol=4e-8, atol=0)  # t of single precision
    torch.testing.assert_close(one.per_sample, square / (square + 0.01), rtol=1e-11, atol=0)


def test_no_row_moved():
    objective, net, x, y, _ = prepared()
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    out = objective.loss_at(net, x=x, noise=x.flip(0), t=t, r=t, y=y)
    other = FlowMatching(norm_p=1.0).loss_at(net, x=x, noise=x.flip(0), t=t, y=y)
    torch.testing.assert_close(out.per_sample, other.per_sample, rtol=1e-12, atol=0)


def test_a_mix_that_is_none_is_refused():
    for field, value in {"mix": 1.5, "mix_schedule": "cosine", "ratio": -0.1}.items():
        with pytest.raises(UsageError) as caught:
            Config.of(objective="hybrid", **{field: value})
        assert caught.value.field == field


# ---------------------------------------------------------------------------------------------------------- the bridge


class Gaussian(nn.Module):
    """The average velocity of N(MEAN, STD²) data over a bridge, with a parameter that scales it away from that."""

    num_classes = 2

    def __init__(self, path):
        super().__init__()
        self.path, self.scale = path, nn.Parameter(torch.ones(1, dtype=torch.float64))

    def std(self, t):
        """The marginal's standard deviation, and its derivative."""
        γ, rate = self.path.gamma(t)
        σ = ((1 - t) ** 2 * STD**2 + t**2 + γ**2).sqrt()
        return σ, (-(1 - t) * STD**2 + t + γ * rate) / σ

    def forward(self, z, r, t, y):
        r, t = r[:, None], t[:, None]
        (σ_r, _), (σ_t, rate) = self.std(r), self.std(t)
        ζ, still = z - (1 - t) * MEAN, r == t
        over = ζ * (1 - σ_r / σ_t) / torch.where(still, 1.0, t - r)
        return self.scale * (torch.where(still, rate / σ_t * ζ, over) - MEAN)


def test_the_rate_of_the_bridge_is_its_derivative_and_finite():
    path = BridgePath(sigma=SIGMA, end=0.05)
    t = torch.tensor([0.0, 0.01, 0.049, 0.051, 0.3, 0.5, 0.8, 0.96, 1.0], dtype=torch.float64, requires_grad=True)
    γ, rate = path.gamma(t)
    torch.testing.assert_close(torch.autograd.grad(γ.sum(), t)[0], rate, rtol=1e-12, atol=1e-14)
    inner = t[3:7]
    torch.testing.assert_close(γ[3:7], SIGMA * (inner * (1 - inner)).sqrt(), rtol=1e-14, atol=0)
    assert γ[0] == γ[-1] == 0
    assert rate.abs().max() <= SIGMA * 19**0.5 + 1e-12
    half = BridgePath(sigma=1.0, end=0.5).gamma(t)[0]
    torch.testing.assert_close(half, torch.minimum(t, 1 - t), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("sigma", [0.0, SIGMA])
def test_points_of_the_bridge(sigma):
    path, (x, _) = BridgePath(sigma=sigma), family.batch()
    e, ξ = torch.randn(2, *x.shape, dtype=torch.float64)
    given = path.given({"bridge_noise": ξ})
    ones = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(given.point(x, e, 0 * ones), x)
    torch.testing.assert_close(given.point(x, e, ones), e)
    t, s, h = 0.6 * ones, 0.35 * ones, 1e-6
    difference = (given.point(x, e, t + h) - given.point(x, e, t - h)) / (2 * h)
    torch.testing.assert_close(given.velocity(x, e, t), difference, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(given.between(x, given.point(x, e, t), t, s), given.point(x, e, s))
    if sigma == 0:
        assert torch.equal(given.point(x, e, t), LinearPath().point(x, e, t))
    with pytest.raises(ValueError, match=r"bridge_noise: expected the shape of x, \(8, 2, 4, 4\), got none"):
        path.point(x, e, t)


def test_a_bridge_without_noise_is_the_linear_path():
    assert MeanFlow().path is MeanFlow.path
    assert MeanFlow().conditions == ()
    assert MeanFlow(bridge=0.5).conditions == ("bridge_noise",)


METHODS = [
    FlowMatching(norm_p=0.0, bridge=SIGMA),
    MeanFlow(ratio=1.0, norm_p=0.0, bridge=SIGMA),
    Hybrid(norm_p=0.0, bridge=SIGMA),
]


@pytest.mark.parametrize("objective", METHODS, ids=lambda o: type(o).__name__)
def test_the_closed_form_is_the_minimiser(objective):
    """E of the gradient by the scale of the exact map is zero, and grows in proportion to the distance from it."""
    n = 1_000_000
    generator = torch.Generator().manual_seed(0)
    net = Gaussian(objective.path)
    draws = objective.draw((n, 1), generator=generator, dtype=torch.float64)
    draws = draws.map(lambda a: a.double() if a.is_floating_point() else a)
    x, y = MEAN + STD * torch.randn(n, 1, generator=generator, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
    slopes = {}
    for scale in (1.0, 1.1, 0.9):
        with torch.no_grad():
            net.scale.fill_(scale)
        (slope,) = torch.autograd.grad(objective.loss(net, x, y, dataclasses.replace(draws, drop=None)).loss, net.scale)
        slopes[scale] = float(slope)
    assert abs(slopes[1.0]) <= 0.04 * abs(slopes[1.1] - slopes[0.9]) / 2
    assert slopes[1.1] > 0 > slopes[0.9]


def test_the_identity_of_meanflow_holds_for_the_bridge():
    """u + (t − r)·du/dt along the marginal velocity is that velocity, row by row."""
    path = BridgePath(sigma=SIGMA)
    net = Gaussian(path)
    t = torch.tensor([0.95, 0.8, 0.7, 0.6, 0.45, 0.3], dtype=torch.float64)
    r = torch.tensor([0.1, 0.5, 0.02, 0.55, 0.2, 0.05], dtype=torch.float64)
    z = torch.randn(6, 1, dtype=torch.float64)
    v = net(z, t, t, None)
    along = (v, torch.zeros_like(r), torch.ones_like(t))
    u, du_dt = torch.func.jvp(lambda z, r, t: net(z, r, t, None), (z, r, t), along)
    torch.testing.assert_close(u + (t - r)[:, None] * du_dt, v, rtol=1e-12, atol=1e-12)
    samples = net(z, torch.zeros_like(t), torch.ones_like(t), None)
    torch.testing.assert_close(z - samples, MEAN + STD * z)  # one step from noise to data, as on the linear path
