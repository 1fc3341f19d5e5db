"""What holds for every objective of the family, with any network."""

import re
from pathlib import Path

import family
import pytest
import torch

from meanflow import registry
from meanflow.objectives import FlowMatching, Networks

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
        if name == "dmf":
            continue
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


@pytest.mark.parametrize("role", ["ema", "frozen", "weak"])
def test_other_networks_change_the_loss_and_get_no_gradient(name, role):
    objective, net, nets = prepared(name)
    other = getattr(nets, role)
    if other is None:
        return
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


SHARED = [n for n in NAMES if 0 < family.objective_of(n).ratio < 1 and n not in ("imf", "pmf", "shortcut")]


@pytest.mark.parametrize("name", SHARED)
def test_rows_with_equal_times_are_flow_matching(name):
    plain = {"omega": 1.0, "kappa": 0.0} if name in ("meanflow", "alpha_flow") else {}
    plain |= {"distil": False} if name == "split_meanflow" else {}
    options = {**family.OPTIONS.get(name, {}), **plain}
    objective = type(family.objective_of(name))(**options)
    if objective.teachers:
        return
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
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["images"].shape == (4, 1, 8, 8)
    assert names["loss"].isfinite()
