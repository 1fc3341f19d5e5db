"""Penalties on ∂u/∂z: values, the gradient that a central difference makes, and that nothing changes without them."""

import copy
import dataclasses

import family
import pytest
import torch
from torch import nn

from meanflow import registry
from meanflow.config import Config, merged
from meanflow.errors import UsageError
from meanflow.objectives import Control, Controlled, FlowMatching, LinearPath, MeanFlow
from meanflow.objectives.rows import Rows
from meanflow.options import flattened

NAMES = ["flow_matching", "meanflow", "alpha_flow", "hybrid"]
CONTROL = Control(lipschitz=0.7, monotone=1.3, margin=0.9)
PENALTIES = {
    "Lipschitz": Control(lipschitz=0.7),
    "monotone": Control(monotone=1.3, margin=1.0),
    "both": CONTROL,
}


def control_of(name):
    """Without what has no meaning where r = t in every row."""
    return dataclasses.replace(CONTROL, monotone=0.0) if name == "flow_matching" else CONTROL


class Plain(nn.Module):
    """PyTorch alone, so that a second derivative exists."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(34, 24), nn.Tanh(), nn.Linear(24, 32))

    def forward(self, z, r, t, y):
        return self.layers(torch.cat([z.flatten(1), t[:, None], r[:, None]], dim=1)).view_as(z)


class Scaled(nn.Module):
    """u = a·z, whose Jacobian is a·I."""

    num_classes = 3

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a], dtype=torch.float64))

    def forward(self, z, r, t, y):
        return self.a * z


def rows(net, dtype=torch.float64, *, moved=8):
    x, y = family.batch()
    e, probe = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    t = torch.linspace(0.3, 0.95, 8, dtype=torch.float64)
    r = t * torch.linspace(0.0, 0.8, 8, dtype=torch.float64)
    x, e, probe, t, r = (a.to(dtype) for a in (x, e, probe, t, r))
    path = LinearPath()
    z, v = path.point(x, e, t), path.velocity(x, e, t)
    ends = {"x": x, "noise": e, "z": z, "v": v, "r": r, "t": t}
    return Rows(net=net, path=path, labels=y, y=y, drop=None, moved=moved, conditions={}, **ends), probe


def exact(net, b, probe, control):
    """The penalties written out, with the derivative on the tape."""
    J = torch.func.jvp(lambda z: net(z, b.r, b.t, b.y), (b.z,), (probe,))[1].flatten(1)
    e = probe.flatten(1)
    form = (e * (e - (b.t - b.r)[:, None] * J)).sum(1) / e.square().sum(1)
    return control.lipschitz * J.square().mean(1) + control.monotone * (control.margin - form).relu().square()


def flat(loss, net):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)]
    ).double()


@pytest.mark.parametrize("name", PENALTIES)
def test_the_value_is_exact_and_the_gradient_that_of_a_second_derivative(name):
    control, net = PENALTIES[name], Plain().double()
    b, probe = rows(net)
    expected = exact(net, b, probe, control)
    slope = flat(expected.mean(), net)
    found = control.penalty(b, probe)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    errors = []
    for step in (control.step, control.step / 2):
        penalty = dataclasses.replace(control, step=step).penalty(b, probe)[0]
        errors.append(float((flat(penalty.mean(), net) - slope).norm() / slope.norm()))
    assert errors[0] <= 1.6e-4  # measured 7.6e-5
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)
    narrow = copy.deepcopy(net).float()
    penalty = control.penalty(*rows(narrow, torch.float32))[0]
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=1e-7)
    assert (flat(penalty.mean(), narrow) - slope).norm() <= 1.6e-4 * slope.norm()  # measured 7.7e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_transformer_is_that_of_its_penalty(name):
    """Layers of this library: along a direction in the parameters, by differences of the exact values."""
    objective = family.objective_of(name, control=dataclasses.replace(control_of(name), step=1e-3))
    net = family.network(objective)
    x, y = family.batch()
    draws = family.draw(name, objective)
    plain = dataclasses.replace(objective, control=Control())
    parameters = [p for p in net.parameters() if p.requires_grad]
    torch.manual_seed(5)
    direction = [torch.randn_like(p) for p in parameters]

    def penalty():
        added = objective.loss(net, x, y, draws)
        return added.loss - plain.loss(net, x, y, draws).loss

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(penalty(), parameters), direction, strict=True))
    values, h = [], 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(sign * h * d)
        values.append(penalty().detach())
    difference = (values[0] - values[1]) / (2 * h)
    assert abs(slope - difference) <= 1.6e-4 * abs(difference)  # measured 8e-5; 8e-3 with the step of 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_penalty_is_added_and_nothing_else_changes(name):
    plain, x, y = family.objective_of(name), *family.batch()
    objective = dataclasses.replace(plain, control=control_of(name))
    net = family.network(plain)
    draws, before = family.draw(name, objective), family.draw(name, plain)
    assert "probe" not in before.conditions
    assert "probe" not in plain.conditions
    assert set(plain.metrics) == set(type(plain).metrics)
    assert all(torch.equal(a, draws.tensors()[key]) for key, a in before.tensors().items())
    out, without = objective.loss(net, x, y, draws), plain.loss(net, x, y, before)
    assert set(out.metrics) - set(without.metrics) == {"lipschitz", "monotone_violations"}
    n = draws.rows or 8
    picked = draws.order[:n]
    added = (out.per_sample - without.per_sample)[picked] * n / 8
    labels = y if draws.drop is None else y.masked_fill(objective.dropped(draws.drop, draws.t, draws.r), 3)
    t, r = draws.t[picked].double(), draws.r[picked].double()
    z, probe = plain.path.point(x, draws.noise, draws.t)[picked], draws.conditions["probe"][picked]
    # a Jacobian of plain differences, at a step where both errors are small
    h, labels = 1e-4, labels[picked]
    with torch.no_grad():
        after, before = (net(z + sign * h * probe, r, t, labels) for sign in (1, -1))
    J, e = ((after - before) / (2 * h)).flatten(1), probe.flatten(1)
    form = 1 - (t - r) * (e * J).sum(1) / e.square().sum(1)
    expected = 0.7 * J.square().mean(1) + 1.3 * (0.9 - form).relu().square()
    torch.testing.assert_close(added, expected, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(out.metrics["lipschitz"][picked] * n / 8, J.square().mean(1), rtol=2e-5, atol=1e-9)
    assert torch.equal(out.metrics["monotone_violations"][picked] * n / 8, (form < 0).double())


def test_the_metrics_are_the_size_and_the_violations():
    """u = 2z: singular values 2, and X = (1 − 2(t − r))·z turns around where t − r > 1/2."""
    objective = MeanFlow(ratio=1.0, label_dropout=0.0, control=Control(monotone=1.0))
    draws = objective.draw((4096, 64), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = torch.randn(4096, 64, dtype=torch.float64), torch.zeros(4096, dtype=torch.long)
    out = objective.loss(Scaled(2.0), x, y, draws)
    assert out.metrics["lipschitz"].mean() == pytest.approx(4, rel=0.01)
    assert torch.equal(out.metrics["monotone_violations"] > 0, draws.t - draws.r > 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_cuts_and_permutations_of_a_batch(name):
    objective = family.objective_of(name, control=control_of(name))
    net = family.network(objective)
    x, y = family.batch()
    draws = family.draw(name, objective)
    whole = objective.loss(net, x, y, draws)
    pieces = [objective.loss(net, *(a.chunk(2)[i] for a in (x, y)), draws.part(i, 2)) for i in range(2)]
    together = torch.cat([piece.per_sample for piece in pieces])
    torch.testing.assert_close(together, whole.per_sample, rtol=1e-11, atol=1e-11)
    order = torch.arange(8).flip(0)
    permuted = objective.loss(net, x[order], y[order], draws.map(lambda a: a[order]))
    torch.testing.assert_close(permuted.per_sample, whole.per_sample[order], rtol=1e-11, atol=1e-11)


def test_one_of_so_many_rows():
    b, probe = rows(Plain().double())
    every = dataclasses.replace(CONTROL, every=3).penalty(b, probe)[0]
    whole = CONTROL.penalty(b, probe)[0]
    assert torch.equal(every.nonzero().flatten(), torch.tensor([0, 3, 6]))
    torch.testing.assert_close(every.mean(), whole[::3].mean(), rtol=1e-12, atol=0)
    few = rows(Plain().double(), moved=2)[0]
    assert torch.equal(CONTROL.penalty(few, probe)[0].nonzero().flatten(), torch.tensor([0, 1]))
    none = rows(Plain().double(), moved=0)[0]
    assert CONTROL.penalty(none, probe)[0].all()


@pytest.mark.parametrize("name", NAMES)
def test_one_graph(name):
    objective = family.objective_of(name, control=control_of(name))
    net, (x, y) = family.network(objective), family.batch()
    draws = family.draw(name, objective)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, y, draws: objective.loss(net, x, y, draws).loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y, draws), objective.loss(net, x, y, draws).loss, rtol=1e-12, atol=0)


def test_what_does_not_fit_is_named():
    for field, value in {
        "control_lipschitz": -1.0,
        "control_monotone": float("nan"),
        "control_margin": 1.5,
        "control_every": 0,
        "control_step": 0.0,
        "bridge": -0.1,
        "bridge_end": 0.6,
    }.items():
        with pytest.raises(UsageError) as caught:
            Config.of(objective="meanflow", **{field: value})
        assert caught.value.field == field
    with pytest.raises(TypeError, match=r"control: expected a Control, such as .* got 0.1"):
        MeanFlow(control=0.1)
    objective, (x, y) = FlowMatching(control=control_of("flow_matching"), bridge=0.5), family.batch()
    net, t = family.network(objective), torch.full((8,), 0.5, dtype=torch.float64)
    given = {"x": x, "noise": x.flip(0), "t": t, "y": y, "probe": x, "bridge_noise": x}
    assert objective.loss_at(net, **given).loss.isfinite()
    for name in ("probe", "bridge_noise"):
        for bad, match in (
            (t, rf"{name}: expected the shape of x, \(8, 2, 4, 4\), got \(8,\)"),
            (x[:, :1], rf"{name}: expected shape \(8,\)"),
            (x / 0, rf"{name}: expected finite values"),
        ):
            with pytest.raises(ValueError, match=match):
                objective.loss_at(net, **given | {name: bad})
        with pytest.raises(TypeError, match=r"conditions: expected probe=, bridge_noise="):
            objective.loss_at(net, **{key: a for key, a in given.items() if key != name})


def test_dropout_is_refused():
    net = Plain().double()
    net.layers.append(nn.Dropout(0.1))
    x, y = family.batch()
    MeanFlow()(net, x, y)
    with pytest.raises(TypeError, match=r"net: expected a network without dropout, .* got layers.3"):
        MeanFlow(control=CONTROL)(net, x, y)
    MeanFlow(control=CONTROL)(net.eval(), x, y)


def test_options_of_a_run():
    config = Config.of(objective="meanflow", control_lipschitz=0.1, bridge=0.3)
    assert config.objective.control == Control(lipschitz=0.1)
    assert merged(Config(), flattened(Config, config.to_dict()), {}) == config
    tree = Config.of(objective="meanflow").to_dict()
    for key in ("control", "bridge", "bridge_end"):  # as an older run has it
        del tree["objective"][key]
    assert merged(Config(), flattened(Config, tree), {}) == Config.of(objective="meanflow")
    found = {name for name in NAMES if issubclass(registry.find("objectives", name), Controlled)}
    assert found == set(NAMES)
