"""What targets start from: a teacher's velocity, guided or not, and averages over neighbours."""

import copy

import family
import pytest
import torch
from minimum import needs_compile

from meanflow import registry
from meanflow.config import Config
from meanflow.errors import UsageError
from meanflow.models import gaussian_average_velocity
from meanflow.objectives import (
    AlphaFlow,
    AveragedVelocity,
    Control,
    DataVelocity,
    FlowMatching,
    Hybrid,
    MeanFlow,
    Networks,
    ShortcutModel,
    SplitMeanFlow,
    TeacherVelocity,
)
from mfkernels.testing import relative_error

MEAN, STD = 0.3, 0.7
NAMES = ["meanflow", "flow_matching", "imf", "alpha_flow", "ect", "shortcut"]


def prepared(objective, seed=3):
    """The objective, a network, and a teacher with weights of its own."""
    net = family.network(objective, seed)
    teacher = family.network(MeanFlow(), seed + 1).requires_grad_(False)
    ema = copy.deepcopy(net) if objective.target_decay(0) is not None else None
    return net, Networks(frozen=teacher, ema=ema)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_with_a_velocity_learns_from_a_teacher(name):
    """The data's velocity is that of the loss where a teacher returns it, and the teacher's everywhere else."""
    cls = registry.find("objectives", name)
    plain, taught = cls(label_dropout=0.0), cls(label_dropout=0.0, velocity=TeacherVelocity())
    net, nets = prepared(taught)
    x, y = family.batch()
    draws = family.draw(name, plain)
    assert (taught.teachers, taught.group_size) == (("frozen",), 1)
    v = plain.path.velocity(x, draws.noise, draws.t)  # [B, …]

    def data(z, r, t, y):
        assert torch.equal(t, r)
        order = draws.order
        return v[order]

    same, wanted = taught.evaluate(net, x, y, draws, nets._replace(frozen=data)), plain.evaluate(net, x, y, draws, nets)
    torch.testing.assert_close(same.per_sample, wanted.per_sample, rtol=0, atol=0)
    other = taught.evaluate(net, x, y, draws, nets)
    assert not torch.allclose(other.per_sample, wanted.per_sample)
    with pytest.raises(TypeError, match=r"nets: expected Networks\(frozen=network\)"):
        taught(net, x, y, nets=nets._replace(frozen=None))


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6)])
def test_the_teacher_is_guided_within_its_times_and_unguided_without_a_label(interval):
    low, high = interval
    objective = MeanFlow(velocity=TeacherVelocity(guidance=2.5, t_min=low, t_max=high), ratio=0.5)
    net, nets = prepared(objective)
    x, y = family.batch()
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    r, drop = t * (torch.arange(8) % 2), torch.arange(8) == 3
    out = objective.loss_at(net, x=x, noise=x.flip(0), t=t, r=r, y=y, drop=drop, nets=nets)
    z = objective.path.point(x, x.flip(0), t)
    told = y.masked_fill(drop, 3)
    with_label, without = nets.frozen(z, t, t, told), nets.frozen(z, t, t, torch.full_like(y, 3))
    scale = torch.where((t >= low) & (t <= high), 2.5, 1.0).view(-1, 1, 1, 1)
    wanted = without + scale * (with_label - without)
    torch.testing.assert_close(out.v, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.v[3], without[3], rtol=1e-12, atol=1e-12)
    u_tgt = wanted - (t - r).view(-1, 1, 1, 1) * out.du_dt
    torch.testing.assert_close(out.squared_error, (out.u - u_tgt).square().sum((1, 2, 3)), rtol=1e-11, atol=0)


class Gaussian(torch.nn.Module):
    """The average velocity of N(MEAN, STD²) data."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z, r, t, y):
        return self.scale * gaussian_average_velocity(z, r, t, MEAN, STD)


@pytest.mark.parametrize(
    ("objective", "conditions"),
    [
        (MeanFlow(ratio=1.0, norm_p=0.0, velocity=TeacherVelocity()), {}),
        (AlphaFlow(ratio=1.0, velocity=TeacherVelocity()), {"s": "t"}),  # in its last phase
        (SplitMeanFlow(ratio=0.5, distil=True), {"s": "r"}),
        (ShortcutModel(guidance=1.0, clip=100.0, noise_floor=0.0, target_ema=0.0, velocity=TeacherVelocity()), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_at_the_exact_flow_map_nothing_is_left_in_any_sample(objective, conditions):
    """A teacher's velocity has no noise of the data in it: the residual is zero, not zero in the mean."""
    x, y = family.batch()
    t = torch.linspace(0.2, 1.0, 8, dtype=torch.float64)
    moved = torch.arange(8) % 2 == 0
    r = torch.where(moved, t - 0.2, t)
    if isinstance(objective, ShortcutModel):  # every sample has a step; the smallest is taken for none
        r = torch.where(moved, t - 0.125, t - 1e-9)
    times = {"t": t, "r": r}
    named = {name: times[which] for name, which in conditions.items()}
    out = objective.loss_at(Gaussian(), x=x, noise=x.flip(0), y=y, nets=Networks(frozen=Gaussian()), **times, **named)
    assert out.squared_error.max() <= 1e-14
    assert FlowMatching().loss_at(Gaussian(), x=x, noise=x.flip(0), t=t, y=y).squared_error.min() > 1


def averaged(x, e, t, y, drop, group, count):
    """The mean over the samples of a group, one by one."""
    out = torch.empty_like(x)
    for i in range(len(x)):
        z = (1 - t[i]) * x[i] + t[i] * e[i]
        first = i - i % group
        others = [j for j in range(first, first + group) if y[j] == y[i] or drop[i]]
        noises = {j: (z - (1 - t[i]) * x[j]) / t[i] for j in others}
        log_w = {j: -noises[j].square().sum() / 2 for j in others}
        kept = sorted(others, key=lambda j: -log_w[j])[: count or None]
        w = torch.stack([log_w[j] for j in kept]).softmax(0)
        out[i] = sum(a * (noises[j] - x[j]) for a, j in zip(w, kept, strict=True))
    return out


@pytest.mark.parametrize(("group", "count"), [(8, 0), (4, 0), (8, 2), (2, 1)])
def test_the_mean_over_neighbours_is_the_one_that_is_written_out(group, count):
    objective = MeanFlow(velocity=AveragedVelocity(group=group, count=count), ratio=0.5)
    assert objective.group_size == group
    net = family.network(objective)
    x, y = family.batch()
    x = 0.5 * x
    t = torch.linspace(0.2, 0.97, 8, dtype=torch.float64)  # at 1 all are equally probable
    r, drop = t * (torch.arange(8) % 2), torch.arange(8) == 5
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    out = objective.loss_at(net, x=x, noise=e, t=t, r=r, y=y, drop=drop)
    wanted = averaged(x, e, t, y, drop, group, count)
    torch.testing.assert_close(out.v, wanted, rtol=1e-9, atol=1e-9)
    if count != 1:
        assert not torch.allclose(out.v, e - x)


def test_the_mean_over_neighbours_is_the_samples_own_velocity_near_the_data():
    objective = FlowMatching(velocity=AveragedVelocity(group=8), label_dropout=0.0)
    x, y = family.batch()
    for dtype in (torch.float32, torch.float64):
        for time in (0.0, 1e-6, 1e-3):
            t = torch.full((8,), time, dtype=dtype)
            net = family.network(objective, dtype=dtype)
            out = objective.loss_at(net, x=x.to(dtype), noise=x.flip(0).to(dtype), t=t, y=y)
            torch.testing.assert_close(out.v, (x.flip(0) - x).to(dtype), rtol=0, atol=1e-3 if time else 1e-6)


def test_the_mean_over_neighbours_has_the_variance_of_less_data():
    """Around the marginal velocity of Gaussian data, whose own velocities differ by s²/σ_t² in the mean square."""
    generator = torch.Generator().manual_seed(0)
    B, t = 4096, torch.full((4096,), 0.7, dtype=torch.float64)
    x = MEAN + STD * torch.randn(B, 1, generator=generator, dtype=torch.float64)
    e, y = torch.randn(B, 1, generator=generator, dtype=torch.float64), torch.zeros(B, dtype=torch.long)
    z = 0.3 * x + 0.7 * e
    exact = gaussian_average_velocity(z, t, t, MEAN, STD)
    own = (e - x - exact).square().mean()
    found = {}
    for group in (2, 32):
        objective = FlowMatching(velocity=AveragedVelocity(group=group), label_dropout=0.0)
        out = objective.loss_at(Gaussian(), x=x, noise=e, t=t, y=y)
        found[group] = float((out.v - exact).square().mean() / own)
    assert found[2] < 0.75  # measured 0.52
    assert found[32] < 0.07  # measured 0.035


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_over_neighbours_is_exact_near_others_and_under_autocast(dtype):
    """Pairs of samples that are near each other: the weights are differences of large numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 2, generator=generator, dtype=torch.float64).repeat_interleave(2, 0)
    x = x + 1e-3 * torch.randn(32, 2, generator=generator, dtype=torch.float64)
    e, y = torch.randn(32, 2, generator=generator, dtype=torch.float64), torch.zeros(32, dtype=torch.long)
    t = torch.full((32,), 1e-3, dtype=torch.float64)
    objective, net = FlowMatching(velocity=AveragedVelocity(group=32)), Gaussian()
    x, e, t = (a.float() for a in (x, e, t))
    wanted = objective.loss_at(net, x=x.double(), noise=e.double(), t=t.double(), y=y).v
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = objective.loss_at(net, x=x, noise=e, t=t, y=y).v
    assert relative_error(found, wanted) <= 8e-8  # measured 3.7e-8


def test_values_out_of_range_are_named():
    with pytest.raises(UsageError, match=r"t_min: expected at most t_max = 0\.2, got 0.5"):
        TeacherVelocity(t_min=0.5, t_max=0.2)
    with pytest.raises(UsageError, match="count: expected at most group = 4, got 5"):
        AveragedVelocity(group=4, count=5)
    with pytest.raises(UsageError, match="group: expected at least 2, got 1"):
        AveragedVelocity(group=1)
    with pytest.raises(UsageError, match=r"velocity: expected data with bridge > 0, .*; got teacher"):
        MeanFlow(bridge=0.5, velocity=TeacherVelocity())
    with pytest.raises(UsageError, match="control_monotone: expected 0 where no sample has r != t"):
        FlowMatching(control=Control(monotone=1.0))
    for name in ("velocity", "form"):  # its own
        with pytest.raises(UsageError, match=f"{name}: expected only with objective .*, got objective pmf"):
            Config.of(objective="pmf", model="iMF-DiT-B/2", **{name: "teacher" if name == "velocity" else "edm"})
    x, y = family.batch()
    objective = FlowMatching(velocity=AveragedVelocity(group=3))
    with pytest.raises(ValueError, match="x: expected a multiple of group = 3 samples, got 8"):
        objective(family.network(objective), x, y)


def test_a_teacher_makes_an_objective_learn_from_it():
    run = {"data": "digits", "teacher": "runs/fm"}
    assert type(Config.of(data="digits").objective.velocity) is DataVelocity
    for name in NAMES:
        model = {"model": "iMF-DiT-B/2"} if name == "imf" else {}
        objective = Config.of(objective=name, velocity_guidance=2.0, **model, **run).objective
        assert objective.velocity == TeacherVelocity(guidance=2.0)
    assert Config.of(objective="split_meanflow", **run).objective.distil
    assert Config.of(objective="rcm", **run).objective.distil
    assert type(Config.of(velocity="data", **run).objective.velocity) is DataVelocity
    assert type(Config.of(velocity="neighbours", **run).objective.velocity) is AveragedVelocity
    # nothing that was chosen is lost, by that or by another change
    chosen = Config.of(data="digits", velocity="neighbours", velocity_group=16)
    assert chosen.replace(teacher="runs/fm").objective.velocity == AveragedVelocity(group=16)
    assert type(Config.of(velocity="data", **run).replace(seed=3).objective.velocity) is DataVelocity
    assert Config.of(**run).replace(seed=3).objective.velocity == TeacherVelocity()
    with pytest.raises(UsageError, match="velocity_guidance: expected only with velocity teacher, got velocity data"):
        Config.of(data="digits", velocity_guidance=2.0)


@needs_compile
@pytest.mark.parametrize(
    "objective",
    [
        MeanFlow(ratio=0.5, velocity=TeacherVelocity(guidance=1.5, t_max=0.8)),
        MeanFlow(ratio=0.5, velocity=AveragedVelocity(group=4, count=2)),
        MeanFlow(ratio=0.5, intervals=3, kappa=0.3),
        Hybrid(ratio=0.5, bridge=0.5, control=Control(lipschitz=0.1, monotone=1.0)),
    ],
    ids=["teacher", "neighbours", "intervals", "controlled"],
)
def test_they_compile_as_one_graph(objective):
    net, nets = prepared(objective)
    x, y = family.batch()
    draws = objective.draw(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = [p for p in net.parameters() if p.requires_grad]

    def loss(x, y, draws):
        return objective.loss(net, x, y, draws, nets).loss

    torch.compiler.reset()
    found, wanted = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y, draws), loss(x, y, draws)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(a, parameters, materialize_grads=True) for a in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
