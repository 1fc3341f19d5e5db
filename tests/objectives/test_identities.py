"""Gaussian data, whose flow map is known in closed form, and the limits in which one rule becomes another."""

import family
import pytest
import torch
from torch import nn

from meanflow.models import gaussian_average_velocity
from meanflow.objectives import (
    EDM,
    AlignYourFlow,
    AlphaFlow,
    Angle,
    AverageVelocity,
    ConsistencyTraining,
    ConsistencyTrajectory,
    ContinuousConsistencyDistillation,
    DataPrediction,
    EasyConsistency,
    EulerianDistillation,
    EulerianSelfDistillation,
    ImprovedConsistencyTraining,
    InductiveMomentMatching,
    LagrangianDistillation,
    LagrangianSelfDistillation,
    LinearPath,
    LogVariance,
    MeanFlow,
    Networks,
    ProgressiveFlowMapMatching,
    ProgressiveSelfDistillation,
    RegularizedConsistency,
    ScaledVelocity,
    ShortcutModel,
    SplitMeanFlow,
    TerminalVelocityMatching,
    TrigFlow,
)
from meanflow.objectives.rows import Rows
from meanflow.objectives.rules import composition, finite_difference, flow_map, moment_matching, total_derivative
from meanflow.objectives.weights import power, pseudo_huber, squared_norm

MEAN, STD = 0.3, 0.7
B, SHAPE = 6, (6, 2, 3, 3)
PATH = LinearPath()


class Gaussian(nn.Module):
    """The average velocity of N(MEAN, STD²) data, with a parameter that scales it away from that."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z, r, t, y):
        return self.scale * gaussian_average_velocity(z, r, t, MEAN, STD)


class InForm(nn.Module):
    """A network of that form, told t and r as they are, whose average velocity is that of `net`."""

    num_classes = 2

    def __init__(self, form, net):
        super().__init__()
        self.form, self.net = form, net

    def forward(self, z_in, r, t, y):
        z = z_in / torch.as_tensor(self.form.coefficients(t)[0]).view(-1, 1, 1, 1)
        return self.form.output_of(self.net(z, r, t, y), z, t)


def problem(seed=0):
    g = torch.Generator().manual_seed(seed)
    x = MEAN + STD * torch.randn(SHAPE, generator=g, dtype=torch.float64)
    e = torch.randn(SHAPE, generator=g, dtype=torch.float64)
    t = torch.tensor([0.95, 0.8, 0.7, 0.6, 0.45, 0.3], dtype=torch.float64)
    r = torch.tensor([0.1, 0.5, 0.0, 0.55, 0.2, 0.05], dtype=torch.float64)
    return x, e, t, r, torch.zeros(B, dtype=torch.long)


def rows(net, *, moved=B, seed=0, **changes):
    x, e, t, r, y = problem(seed)
    fields = {"x": x, "noise": e, "r": r, "t": t, "labels": y, "y": y, "drop": None, "conditions": {}} | changes
    ends = fields["x"], fields["noise"], fields["t"]
    z, v = PATH.point(*ends), PATH.velocity(*ends)
    return Rows(net=net, path=PATH, z=z, v=v, moved=moved, **fields)


def exact(net, b):
    """The marginal velocity at the rows."""
    return net(b.z, b.t, b.t, b.y).detach()


# ---------------------------------------------------------------------------- at the exact map nothing is left to learn

S = torch.tensor([0.5, 0.6, 0.3, 0.58, 0.4, 0.2], dtype=torch.float64)
ZERO = {
    "psd": (ProgressiveSelfDistillation(ratio=1.0), {"s": S}),
    "pfmm": (ProgressiveFlowMapMatching(ratio=1.0), {"s": S}),
    "split": (SplitMeanFlow(ratio=1.0), {"s": S}),
    "lsd": (LagrangianSelfDistillation(ratio=1.0), {}),
    "lmd": (LagrangianDistillation(ratio=1.0), {}),
    "esd": (EulerianSelfDistillation(ratio=1.0), {}),
    "emd": (EulerianDistillation(ratio=1.0), {}),
    "tvm": (TerminalVelocityMatching(omega=1.0), {"q": S, "beta": torch.ones_like(S)}),
    "ayf": (AlignYourFlow(), {"warm_up": torch.ones_like(S)}),
}


@pytest.mark.parametrize("name", ZERO)
def test_the_residual_is_zero_row_by_row(name):
    objective, conditions = ZERO[name]
    net = Gaussian()
    nets = Networks(ema=net, frozen=net, learned=LogVariance().double())
    x, e, t, r, y = problem()
    out = objective.loss_at(net, x=x, noise=e, t=t, r=r, y=y, nets=nets, **conditions)
    assert out.squared_error.max() <= 1e-28  # measured 8e-30


@pytest.mark.parametrize("trigflow", [False, True])
@pytest.mark.parametrize("kind", [ContinuousConsistencyDistillation, RegularizedConsistency])
def test_the_tangent_of_continuous_consistency_is_zero(kind, trigflow):
    sigma_data = kind.__dataclass_fields__["sigma_data"].default
    form = TrigFlow(sigma_data, times="t", one_time=False) if trigflow else AverageVelocity()
    objective = kind(form=form, guidance=1.0)
    net = Gaussian()
    nets = Networks(frozen=net, learned=LogVariance(1).double())
    x, e, t, _, y = problem()
    r, ones = torch.zeros_like(t), torch.ones_like(t)
    inside = net if form == AverageVelocity() else InForm(form, net)
    out = objective.loss_at(inside, x=x, noise=e, t=t, r=r, y=y, nets=nets, warm_up=ones)
    assert out.others["g"].abs().max() <= 1e-14  # measured 2e-15


def test_ayf_leaves_the_share_that_is_not_warm():
    net = Gaussian()
    x, e, t, r, y = problem()
    warm_up = torch.full_like(t, 0.6)
    options = {"x": x, "noise": e, "t": t, "r": r, "y": y, "warm_up": warm_up, "nets": Networks(frozen=net)}
    out = AlignYourFlow().loss_at(net, **options)
    left = 0.4 * (out.u - out.v)
    torch.testing.assert_close(out.squared_error, squared_norm(left), rtol=1e-12, atol=0)


def test_the_trajectory_loss_is_zero():
    """CTM: its two sides are the same point of one trajectory where the averaged network knows it."""
    net = Gaussian()
    objective = ConsistencyTrajectory(self_learned=True, form=AverageVelocity(), dsm_weight=0.0)
    draws = objective.draw(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = draws.map(lambda a: a.double() if a.is_floating_point() else a)
    x, _, _, _, y = problem()
    out = objective.evaluate(net, x, y, draws, Networks(ema=net))
    assert out.others["consistency"].max() <= 1e-28  # measured 1e-30


def test_shortcuts_of_the_exact_map():
    net = Gaussian()
    objective = ShortcutModel(ratio=1.0, timesteps=16, guidance=1.0, target_ema=0.0, clip=1e9)
    draws = objective.draw(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = draws.map(lambda a: a.double() if a.is_floating_point() else a)
    x, _, _, _, y = problem()
    out = objective.evaluate(net, x, y, draws)
    assert out.squared_error.max() <= 1e-28
    assert ((out.t - out.r) >= 1 / 8).all()
    assert (out.r >= 0).all()


def test_what_the_data_leave():
    """MeanFlow's residual is −(σ_r/σ_t)(v_c − v), iMF's v − v_c: their gradients are zero in the mean alone."""
    net = Gaussian()
    b = rows(net)
    v = exact(net, b)
    sigma_t, sigma_r = (((1 - a) ** 2 * STD**2 + a**2).sqrt().view(-1, 1, 1, 1) for a in (b.t, b.r))
    pair = total_derivative(b, b.v)
    torch.testing.assert_close(pair.u - pair.u_tgt, -(sigma_r / sigma_t) * (b.v - v), rtol=1e-11, atol=1e-13)
    u, du_dt = b.with_derivative(v)
    torch.testing.assert_close(u + b.gap * du_dt - b.v, v - b.v, rtol=1e-11, atol=1e-13)


def test_a_composition_with_the_data_has_the_error_of_an_euler_step():
    """O((t − s)²/(t − r)) in the mean: at the mean velocity, since the average velocity is affine in z."""
    net = Gaussian()
    b = rows(net)
    errors = []
    for gap in (0.02, 0.01, 0.005):
        pair = composition(b, exact(net, b), b.t - gap * (b.t - b.r), second=net)
        errors.append(float((pair.u - pair.u_tgt).detach().norm()))
    assert 3.8 < errors[0] / errors[1] < 4.2
    assert 3.8 < errors[1] / errors[2] < 4.2


@pytest.mark.parametrize("gap", [0.2, 0.05])
def test_moment_matching_attracts_its_own_pairs_alone(gap):
    """The gradient at the exact map falls with the number of samples in a group, and with the gap of the times."""
    g = torch.Generator().manual_seed(0)
    n = 16_384
    x, e = MEAN + STD * torch.randn(n, 1, generator=g), torch.randn(n, 1, generator=g)
    t, s, r = (torch.full((n,), a) for a in (0.8, 0.8 - gap, 0.1))
    net = lambda z, r, t, y: gaussian_average_velocity(z, r, t, MEAN, STD)  # noqa: E731
    slopes = []
    for group in (2, 4, 16):
        shift = torch.ones((), requires_grad=True)
        y_t = PATH.point(x, e, t) - (t - r)[:, None] * shift * net(PATH.point(x, e, t), r, t, None)
        y_s = flow_map(net, PATH.point(x, e, s), r, s, None)
        distance = moment_matching(y_t, y_s, group=group, scale=1 / (t - r)).mean()
        slopes.append(abs(float(torch.autograd.grad(distance, shift)[0])))
    assert slopes[2] < slopes[1] < slopes[0]
    assert slopes[2] < 0.3 * slopes[0]


# --------------------------------------------------------------------------------------------- limits, with any network


def any_network():
    return family.network(MeanFlow(), seed=4)


def any_rows(net, **changes):
    torch.manual_seed(1)
    x, e = torch.randn(2, 6, 2, 4, 4, dtype=torch.float64)
    return rows(net, x=x, noise=e, **changes)


def test_compositions_become_the_total_derivative():
    net = any_network()
    b = any_rows(net)
    pair = total_derivative(b, b.v)
    limit = pair.u - pair.u_tgt
    errors = []
    for alpha in (1e-3, 1e-4):
        at = composition(b, b.v, b.t - alpha * (b.t - b.r), second=net)
        errors.append(float((((at.u - at.u_tgt) / alpha - limit).norm() / limit.norm()).detach()))
    assert errors[0] <= 2e-2
    assert 8 < errors[0] / errors[1] < 12


def test_finite_differences_become_the_total_derivative():
    net = any_network()
    b = any_rows(net)
    exact = total_derivative(b, b.v).du_dt
    errors = [float((finite_difference(b, b.v, h=h).du_dt - exact).norm() / exact.norm()) for h in (1e-3, 5e-4)]
    assert errors[0] <= 2.3e-3  # measured 1.1e-3
    assert 3.5 < errors[0] / errors[1] < 4.5
    none = any_rows(net, moved=0)
    assert finite_difference(none, none.v).du_dt is None


def test_at_its_ends_a_composition_is_the_network_or_the_velocity():
    net = any_network()
    b = any_rows(net)
    at_t = composition(b, b.v, b.t, second=net)
    torch.testing.assert_close(at_t.u_tgt, at_t.u.detach(), rtol=1e-13, atol=1e-13)
    assert torch.equal(composition(b, b.v, b.r, second=net).u_tgt, b.v)


def test_a_tangent_in_r():
    net = any_network()
    b = any_rows(net)
    _, du_dr = b.with_derivative(None, dr=1.0, dt=0.0)
    h = 1e-5
    with torch.no_grad():
        after, before = (net(b.z, b.r + sign * h, b.t, b.y) for sign in (1, -1))
    torch.testing.assert_close(du_dr, (after - before) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_the_tangent_of_trigflow_is_the_residual_of_the_total_derivative(sigma_data):
    """g = −(1 − t)·Q·(u − a + t·du/dt), as if written in TrigFlow's own terms."""
    form = TrigFlow(sigma_data)
    objective = ContinuousConsistencyDistillation(sigma_data=sigma_data, form=form, guidance=1.0)
    net, teacher = any_network(), family.network(MeanFlow(), seed=8)
    b = any_rows(form.wrap(net), r=torch.zeros(B, dtype=torch.float64))
    nets = Networks(frozen=teacher, learned=LogVariance(1).double())
    draws = {"x": b.x, "noise": b.noise, "t": b.t, "r": b.r, "y": b.y}
    for warm_up in (1.0, 0.4):
        out = objective.loss_at(net, **draws, nets=nets, warm_up=torch.full_like(b.t, warm_up))
        t = b.t.view(-1, 1, 1, 1)
        Q = ((sigma_data * (1 - t)) ** 2 + t**2).sqrt()
        a = out.others["a"]
        if warm_up == 1.0:
            residual = out.u - a + t * out.du_dt
            torch.testing.assert_close(out.others["g"], -(1 - t) * Q * residual, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.others["g"], in_angles(form, b, a, warm_up), rtol=1e-6, atol=1e-6)


def in_angles(form, b, a, warm_up):
    """The tangent in the paper's terms, with a derivative of F by differences along the trajectory."""
    clock = Angle(form.sigma_data)
    theta = clock.of_linear(b.t)
    x, dx = clock.state(b.z, theta), clock.velocity(a, b.z, b.t)
    cos, sin = theta.cos().view(-1, 1, 1, 1), theta.sin().view(-1, 1, 1, 1)

    def F(x, theta):
        time, z = clock.to_linear(theta), clock.point(x, theta)
        return form.output_of(b.net(z, torch.zeros_like(time), time, b.y), z, time)

    h = 1e-5
    with torch.no_grad():
        dF = (F(x + h * dx, theta + h) - F(x - h * dx, theta - h)) / (2 * h)
        return -(cos**2) * (form.sigma_data * F(x, theta) - dx) - warm_up * cos * sin * (x + form.sigma_data * dF)


FORMS = {
    "average velocity": AverageVelocity(),
    "data": DataPrediction(),
    "EDM": EDM(times="t", time_scale=1.0, one_time=False),
    "EDM, shifted": EDM(sigma_min=0.002, times="t", time_scale=1.0, one_time=False),
    "TrigFlow": TrigFlow(times="t", one_time=False),
    "IMM": ScaledVelocity(sigma_data=0.5, time_scale=1.0),
    "IMM, simple": ScaledVelocity(kind="simple_edm", time_scale=1.0),
}


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_give_one_velocity_and_derivative(name):
    form, net = FORMS[name], Gaussian()
    b, plain = rows(form.wrap(InForm(form, net))), rows(net)
    for found, expected in zip(b.with_derivative(b.v), plain.with_derivative(b.v), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    dual, b = any_network(), any_rows(any_network())
    wrapped = any_rows(form.wrap(dual))
    slow = any_rows(lambda z, r, t, y: form.wrap(dual)(z, r, t, y))  # not dual-aware: torch.func.jvp of all of it
    for found, expected in zip(wrapped.with_derivative(b.v), slow.with_derivative(b.v), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("times", ["t", "log_sigma", "angle", "cosine"])
def test_the_derivative_of_every_clock(times):
    form = EDM(times=times, time_scale=2.0, one_time=False)
    dual = any_network()
    fast, slow = any_rows(form.wrap(dual)), any_rows(lambda z, r, t, y: form.wrap(dual)(z, r, t, y))
    fast, slow = (a.with_derivative(a.v, dr=0.5) for a in (fast, slow))
    for found, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_shortcuts_are_progressive_self_distillation():
    net = any_network()
    torch.manual_seed(2)
    x, e = torch.randn(2, 6, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([1.0, 0.75, 0.5, 1.0, 0.75, 0.5], dtype=torch.float64)
    draws = {"x": x, "noise": e, "t": t, "r": t - 0.25, "y": torch.zeros(B, dtype=torch.long)}
    options = {"guidance": 1.0, "target_ema": 0.0, "clip": 1e9, "noise_floor": 0.0}
    one = ShortcutModel(timesteps=16, **options).loss_at(net, **draws)
    nets = Networks(learned=LogVariance().double())
    other = ProgressiveSelfDistillation(ratio=1.0).loss_at(net, **draws, s=t - 0.125, nets=nets)
    torch.testing.assert_close(one.others["u_tgt"], other.others["u_tgt"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.per_sample, other.per_sample, rtol=1e-12, atol=0)  # λ = 0


def test_pseudo_huber_has_the_gradient_of_a_power():
    """√(‖Δ‖² + c²) has half the gradient of ‖Δ‖²/sg(‖Δ‖² + c²)^½."""
    delta = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    one = torch.autograd.grad(pseudo_huber(delta, 0.3).sum(), delta)[0]
    other = torch.autograd.grad(power(squared_norm(delta), p=0.5, c=0.09).sum(), delta)[0]
    torch.testing.assert_close(2 * one, other, rtol=1e-12, atol=0)
    zero = torch.zeros(2, 3, requires_grad=True)
    assert not torch.autograd.grad(pseudo_huber(zero, 0.0).sum(), zero)[0].any()


# ---------------------------------------------------------------------------------------------------------- curricula


def test_scales_of_consistency_training():
    ct = ConsistencyTraining(start_scales=2, end_scales=150, total_steps=1000)
    assert (ct.scales(0), ct.scales(1000), ct.scales(5000)) == (2, 151, 151)
    assert ct.target_decay(0) == pytest.approx(0.9**2)
    assert ct.target_decay(1000) > 0.998
    ict = ImprovedConsistencyTraining(start_scales=10, end_scales=1280, total_steps=800)
    assert [ict.scales(k) for k in (0, 99, 100, 799, 800)] == [11, 11, 21, 1281, 1281]


def test_pairs_of_consistency_training_are_neighbours():
    for objective in (ConsistencyTraining(total_steps=100), ImprovedConsistencyTraining(total_steps=100)):
        for step in (0, 50, 100):
            draws = objective.draw((256, 1), step=step, generator=torch.Generator().manual_seed(0))
            scales = objective.scales(step)
            sigma = [(a / (1 - a)).double() for a in (draws.t, draws.conditions["s"])]
            levels = objective.levels(torch.arange(scales, dtype=torch.float64), scales)
            index = [(levels.log()[None] - a.log()[:, None]).abs().argmin(dim=1) for a in sigma]
            assert torch.equal(index[1], index[0] + 1)
            assert (levels[index[0]] / sigma[0] - 1).abs().max() < 1e-4  # of single precision, at σ = 80


def test_the_gap_of_easy_consistency_closes():
    ect = EasyConsistency()
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    sigma, s = t / (1 - t), ect.partner(t, 0)["s"]
    assert torch.equal(s == 0, 8 * torch.sigmoid(-sigma) >= 1)
    gaps = [(sigma - (a / (1 - a))) / sigma for a in (ect.partner(t, stage)["s"] for stage in (4, 5))]
    torch.testing.assert_close(gaps[0], 2 * gaps[1])
    draws = ect.draw((16, 1), step=75_000, generator=torch.Generator().manual_seed(0))
    for name, expected in ect.partner(draws.t, 3).items():
        torch.testing.assert_close(draws.conditions[name], expected)
    late = ect.draw((256, 1), step=10**6, generator=torch.Generator().manual_seed(0))
    assert (late.conditions["s"] <= late.t).all()
    assert (late.conditions["gap"] > 0).all()
    loss = ect.loss(Gaussian(), torch.randn(256, 1), torch.zeros(256, dtype=torch.long), late)
    assert loss.per_sample.isfinite().all()
    assert EasyConsistency(stage_steps=1).draw((4, 1), step=5000).conditions["gap"].isfinite().all()


def test_alpha_falls():
    objective = AlphaFlow(alpha_start=100, alpha_end=200)
    alphas = [objective.alpha(k) for k in (0, 99, 100, 150, 200, 201)]
    assert alphas[:3] == [1, 1, 1]
    assert alphas[3] == 0.5
    assert alphas[4:] == [0, 0]
    draws = [objective.draw((8, 1), step=k) for k in (0, 150, 300)]
    assert [d.phase for d in draws] == ["composed", "composed", "derived"]
    assert torch.equal(draws[2].conditions["s"], draws[2].t)
    moved = draws[1].moved
    half = (draws[1].t + draws[1].r) / 2
    torch.testing.assert_close(draws[1].conditions["s"][moved], half[moved])


def test_times_of_moment_matching():
    objective = InductiveMomentMatching()
    draws = objective.draw((4096, 1), generator=torch.Generator().manual_seed(0))
    t, s, r = draws.t, draws.conditions["s"], draws.r
    assert (r <= s).all()
    assert (t - s >= 0.9e-4).all()
    assert (t <= 0.994).all()
    groups = torch.stack([t, s, r]).view(3, -1, 4)
    assert (groups == groups[..., :1]).all()


def test_times_of_terminal_velocity_matching():
    draws = TerminalVelocityMatching().draw((4096, 1), generator=torch.Generator().manual_seed(0))
    assert (draws.t <= 1).all()
    assert (draws.r < draws.t).all()
    assert (draws.r > 0).all()


def test_half_the_batch_of_a_shortcut_model():
    objective = ShortcutModel(ratio=0.5, timesteps=8)
    draws = objective.draw((16, 1), generator=torch.Generator().manual_seed(0))
    steps = (1 / (draws.t - draws.r)).round().long()
    assert sorted(steps[draws.moved].tolist()) == [1, 1, 1, 1, 2, 2, 4, 4]
    assert (steps[~draws.moved] == 8).all()
    assert torch.equal(objective.is_moved(draws.t, draws.r), draws.moved)
    assert ((draws.t * steps) % 1 == 0).all()
