"""What holds for every objective of the family, with any network."""

import re
from pathlib import Path

import family
import pytest
import torch

from meanflow import registry
from meanflow.config import Config
from meanflow.errors import UsageError
from meanflow.objectives import FlowMatching, Networks, PixelMeanFlow

NAMES = family.NAMES


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def prepared(name, **options):
    objective = family.objective_of(name, **options)
    net = family.network(objective)
    return objective, net, family.networks(objective, net)


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, materialize_grads=True)


def test_the_loss_is_finite_and_has_gradients_of_the_network_and_of_what_is_learned(name):
    objective, net, nets = prepared(name)
    x, y = family.batch()
    out = objective.evaluate(net, x, y, family.draw(name, objective), nets)
    assert out.per_sample.isfinite().all()
    assert any(g.abs().sum() > 0 for g in gradients(out.loss, [p for p in net.parameters() if p.requires_grad]))
    if nets.learned is not None:
        out = objective.evaluate(net, x, y, family.draw(name, objective), nets)
        assert all(g.abs().sum() > 0 for g in gradients(out.loss, list(nets.learned.parameters())))
    loss = objective.loss(net, x, y, family.draw(name, objective), nets)
    assert torch.equal(loss.per_sample, out.per_sample)
    assert loss.metrics.keys() == set(objective.metrics)


def test_every_cut_gives_the_losses_of_the_whole_batch(name):
    objective, net, nets = prepared(name)
    x, y = family.batch()
    draws = family.draw(name, objective)
    whole = objective.evaluate(net, x, y, draws, nets)
    pieces = [objective.evaluate(net, *(a.chunk(2)[i] for a in (x, y)), draws.part(i, 2), nets) for i in range(2)]
    for key in ("u", "per_sample", "squared_error", "v", "t", "r"):
        together = torch.cat([getattr(piece, key) for piece in pieces])
        torch.testing.assert_close(together, getattr(whole, key), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(sum(piece.loss for piece in pieces) / 2, whole.loss, rtol=1e-12, atol=0)


def test_permuted_rows_give_permuted_losses(name):
    objective, net, nets = prepared(name)
    x, y = family.batch()
    draws = family.draw(name, objective)
    whole = objective.evaluate(net, x, y, draws, nets).per_sample
    # the samples of a group stay together
    order = torch.arange(8).view(-1, objective.group_size).flip(0, 1).flatten()
    permuted = objective.evaluate(net, x[order], y[order], draws.map(lambda a: a[order]), nets).per_sample
    torch.testing.assert_close(permuted, whole[order], rtol=1e-11, atol=1e-11)


BESIDE = [
    (name, role)
    for name in NAMES
    for role in (*family.objective_of(name).teachers, *(["ema"] if family.objective_of(name).target_decay(0) else []))
]


@pytest.mark.parametrize(("method", "role"), BESIDE)
def test_other_networks_change_the_loss_and_get_no_gradient(method, role):
    name = method
    objective, net, nets = prepared(name)
    other = getattr(nets, role)
    x, y = family.batch()
    draws = family.draw(name, objective)
    other.requires_grad_(True)
    before = objective.loss(net, x, y, draws, nets).loss
    if name != "ctm" or role != "ema":  # whose gradient goes through its input, and would go to its parameters
        assert all(not g.any() for g in gradients(before, list(other.parameters())))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    after = objective.loss(net, x, y, draws, nets).loss
    assert (after - before).abs() > 1e-11 * before.abs()  # a normalised loss hardly changes


def test_missing_networks_are_named(name):
    objective, net, nets = prepared(name)
    x, y = family.batch()
    if nets == Networks():
        objective(net, x, y)
        return
    with pytest.raises(TypeError, match=r"nets: expected Networks\("):
        objective(net, x, y)


@pytest.mark.parametrize("name", ["meanflow", "alpha_flow", "lsd", "esd", "psd", "split_meanflow"])
def test_rows_with_equal_times_are_flow_matching(name):
    objective = type(family.objective_of(name))()
    net = family.network(objective)
    x, y = family.batch()
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    conditions = dict.fromkeys(objective.conditions, t)
    nets = family.networks(objective, net)
    out = objective.loss_at(net, x=x, noise=x.flip(0), t=t, r=t, y=y, nets=nets, **conditions)
    other = FlowMatching(label_dropout=0.0).loss_at(net, x=x, noise=x.flip(0), t=t, y=y)
    torch.testing.assert_close(out.squared_error, other.squared_error, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.u, other.u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["meanflow", "alpha_flow", "sct", "ayf", "esd", "psd", "ect", "ict", "ct", "split_meanflow"]
)
def test_the_gradient_stops_at_the_target(name):
    """The gradient is not that of the loss as a function of the parameters."""
    objective, net, nets = prepared(name)
    slope, difference = along_a_direction(name, objective, net, nets)
    if name == "ct":  # its target is another network's
        assert abs(slope - difference) <= 1e-6 * abs(difference)
    else:
        assert abs(slope - difference) > 1e-3 * abs(difference)


FIXED = ["psd", "pfmm", "esd", "emd", "lsd", "lmd", "split_meanflow", "ayf", "sct", "scd", "rcm", "dmf", "alpha_flow"]


@pytest.mark.parametrize("name", FIXED)
def test_the_gradient_is_that_towards_a_fixed_target(name):
    """The loss written out with its target, and what is off the tape, as constants."""
    objective, net, nets = prepared(name)
    x, y = family.batch()
    draws = family.draw(name, objective)
    out = objective.evaluate(net, x, y, draws, nets)
    parameters = [p for p in net.parameters() if p.requires_grad]
    found = gradients(out.loss, parameters)
    t, r, u_tgt = draws.t, draws.r, out.others["u_tgt"]
    z = objective.path.point(x, draws.noise, t)
    labels = y if draws.drop is None else y.masked_fill(objective.dropped(draws.drop, t, r), 3)
    u = objective.form.wrap(net)(z, r, t, labels)
    if name in ("lsd", "lmd"):
        u = u - (t - r).double().view(-1, 1, 1, 1) * out.du_dt
    square, λ = (u - u_tgt).square().flatten(1), None
    if nets.learned is not None:
        λ = nets.learned(t, r if name != "sct" else t).detach()
    if name in ("psd", "pfmm", "esd", "emd", "lsd", "lmd"):
        per_sample = (-λ).exp() * square.mean(1)
    elif name in ("split_meanflow", "ayf"):
        per_sample = square.sum(1)
    elif name in ("sct", "scd", "rcm"):
        sigma = objective.sigma_data
        factor = ((1 - t.double()) ** 2 * sigma**2 + t.double() ** 2) / sigma**2
        weight = 100 * 32 if name == "rcm" else (-nets.learned(t, t).detach()).exp()
        per_sample = weight * factor * square.mean(1)
    elif name == "alpha_flow":
        q = square.mean(1)
        alpha = torch.where(draws.moved, torch.tensor(objective.alpha(family.STEPS[name])).double(), 1.0)
        per_sample = alpha * q / (q.detach() + 1e-3)
    else:  # dmf: the half with u; the other one is the same without a derivative
        fm = net(
            objective.path.point(x, draws.conditions["noise_fm"], tf := draws.conditions["t_fm"].double()),
            tf,
            tf,
            labels,
        )
        other = (fm - out.others["v_g_fm"]).square().flatten(1).mean(1)
        terms = [(square.mean(1), λ), (other, nets.learned(tf, tf).detach())]
        per_sample = sum((q * (-a).exp() + 0.01).log() for q, a in terms) / 2
    expected = gradients(per_sample.mean(), parameters)
    found, expected = (torch.cat([g.flatten() for g in a]) for a in (found, expected))
    # measured 1.2e-7 with alpha_flow, 3.3e-8 with others: times are of single precision
    assert (found - expected).norm() <= 2.5e-7 * expected.norm()


@pytest.mark.parametrize("name", ["tvm", "lmd"])
def test_a_gradient_through_the_tangent(name):
    """Of a network of plain PyTorch: that of the loss, where the target does not depend on the network's jump."""
    net = Plain().double()
    still = lambda z, r, t, y: torch.full_like(z, 0.3)  # noqa: E731
    for detach in (True, False):
        objective = family.objective_of(name, detach_tangent=detach)
        nets = family.networks(objective, net)
        nets = nets._replace(ema=still if nets.ema else None, frozen=still if nets.frozen else None)
        slope, difference = along_a_direction(name, objective, net, nets)
        error = abs(slope - difference) / abs(difference)
        assert error > 1e-2 if detach else error <= 1e-7  # measured 3e-9


def test_a_gradient_through_the_tangent_of_our_own_layers_is_refused():
    objective, net, nets = prepared("tvm", detach_tangent=False)
    x, y = family.batch()
    loss = objective.loss(net, x, y, family.draw("tvm", objective), nets).loss
    with pytest.raises(RuntimeError, match="a gradient was asked for through its forward-mode tangent"):
        loss.backward()


class Plain(torch.nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(34, 24), torch.nn.Tanh(), torch.nn.Linear(24, 32))

    def forward(self, z, r, t, y):
        h = torch.cat([z.flatten(1), t[:, None], r[:, None]], dim=1)
        return self.layers(h).view_as(z)


def along_a_direction(name, objective, net, nets):
    """The gradient along a direction in the parameters, and the central difference of the loss along it."""
    x, y = family.batch()
    draws = family.draw(name, objective)
    parameters = [p for p in net.parameters() if p.requires_grad]
    torch.manual_seed(5)
    direction = [torch.randn_like(p) for p in parameters]
    found = gradients(objective.loss(net, x, y, draws, nets).loss, parameters)
    slope = float(sum((g * d).sum() for g, d in zip(found, direction, strict=True)))
    losses, h = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(sign * h * d)
        losses.append(float(objective.loss(net, x, y, draws, nets).loss.detach()))
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(sign * h * d)
    return slope, (losses[0] - losses[1]) / (2 * h)


def test_the_page_of_methods_has_them_all_and_its_code_runs():
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(registry.names("objectives"))
    torch.manual_seed(0)
    for block in text.split("```python\n")[1:]:
        names: dict = {}
        exec(block.split("```")[0], names)
        assert names["loss"].isfinite()
    assert names["images"].shape == (4, 1, 8, 8)


def test_ties_of_the_times_are_finite():
    """Two draws of single precision can be equal; so can a partner that is very near."""
    x, y = family.batch()
    t = torch.full((8,), 0.5, dtype=torch.float64)
    for name in ("alpha_flow", "ect", "ict", "cd", "split_meanflow", "psd", "dmf", "ayf", "sct"):
        objective, net, nets = prepared(name)
        draws = family.draw(name, objective)
        ties = {"s": t} if "s" in objective.conditions else {}
        draws = type(draws)(
            draws.noise, t, t, draws.moved, draws.rows, conditions={**draws.conditions, **ties}, phase=draws.phase
        )
        assert objective.loss(net, x, y, draws, nets).per_sample.isfinite().all(), name


@pytest.mark.parametrize("name", ["ayf", "sct", "rcm", "dmf", "imm", "tvm"])
def test_given_times_may_be_equal_in_some_rows(name):
    objective, net, nets = prepared(name)
    x, y = family.batch()
    draws = family.draw(name, objective)
    some = torch.arange(8) < 4
    r = torch.where(some, draws.t, draws.r).double()
    options = {"x": x, "noise": draws.noise, "t": draws.t.double(), "r": r, "y": y, "nets": nets, **draws.conditions}
    for rows in (r, draws.t.double()):
        assert objective.loss_at(net, **options | {"r": rows}).per_sample.isfinite().all()


REFUSED = {
    "form_sigma_data": ("sct", {"sigma_data": 1.0}),
    "form_sigma_min": ("ct", {"sigma_min": 0.01}),
    "sigma_min": ("ctm", {"sigma_min": 90.0}),
    "start_scales": ("ict", {"start_scales": 20, "end_scales": 10}),
    "start_ema": ("ct", {"start_ema": 0.0}),
    "form_timesteps": ("shortcut", {"timesteps": 64, "form": "shortcut"}),
    "guidance_interval": ("alpha_flow", {"guidance_interval": (0.8, 0.2)}),
    "kappa": ("alpha_flow", {"kappa": 1.5}),
    "t_min": ("imm", {"t_min": 0.9, "t_max": 0.4}),
    "omega_max": ("tvm", {"omega": 2.0, "omega_max": 3.0}),
    "alpha_end": ("alpha_flow", {"alpha_start": 10, "alpha_end": 10}),
    "sampler": ("ect", {"sampler": "guided"}),
}


@pytest.mark.parametrize("field", REFUSED)
def test_options_that_do_not_fit_are_named(field):
    name, options = REFUSED[field]
    with pytest.raises(UsageError) as caught:
        Config.of(objective=name, **options)
    assert caught.value.field == field


def test_every_sampler_draws_finite_images_or_is_refused_by_name():
    noise, y = torch.randn(3, *family.SHAPE[1:], dtype=torch.float64), torch.arange(3)
    for name in NAMES:
        objective = family.objective_of(name)
        net = family.network(objective)
        for sampler in registry.names("samplers"):
            fits = sampler != "tarflow" and (sampler != "guided" or name in ("imf", "pmf"))
            if fits:
                assert objective.sample(net, noise, y, sampler=sampler, steps=2).isfinite().all(), (name, sampler)
                continue
            with pytest.raises(UsageError, match="draws from networks") as caught:
                objective.sample(net, noise, y, sampler=sampler)
            assert caught.value.field == "sampler"


def test_a_sampler_tells_no_time_that_was_not_trained():
    """CTM's least noise level is sigma_min, not zero."""
    objective = family.objective_of("ctm")
    told = []

    def net(z, r, t, y):
        told.extend([*r.tolist(), *t.tolist()])
        return torch.zeros_like(z)

    noise = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    for sampler in ("jumps", "gamma", "consistency"):
        objective.sample(net, noise, torch.zeros(2, dtype=torch.long), sampler=sampler, steps=3)
    least = 250 * torch.tensor(objective.sigma_min, dtype=torch.float64).log()
    assert min(told) >= float(least) - 1e-9


def test_noise_of_pixel_meanflow_is_scaled():
    """The network sees the noise that it was trained with, and the flow map of Gaussian pixels ends at the data."""
    objective = PixelMeanFlow(noise_scale=2.0)
    seen = []

    def net(z, r, t, y, **conditions):
        seen.append(z)
        return torch.full_like(z, 0.3), torch.full_like(z, 0.3)  # images

    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    images = objective.sample(net, noise, torch.zeros(4, dtype=torch.long))
    assert torch.equal(seen[0], 2 * noise)
    torch.testing.assert_close(images, torch.full_like(noise, 0.3))


def test_guidance_and_labels_of_terminal_velocity_matching():
    objective, net, _ = prepared("tvm")
    noise, y = torch.randn(3, *family.SHAPE[1:], dtype=torch.float64), torch.arange(3)
    assert not torch.equal(objective.sample(net, noise, y, guidance_scale=2.0), objective.sample(net, noise, y))
    with pytest.raises(ValueError, match="y: expected labels"):
        objective.sample(net, noise, y + 5)
