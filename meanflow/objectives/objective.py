"""What the objectives have in common: random draws, the order of rows, and checks. A subclass holds its paper alone."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_finite, check_takes, no_label_of
from ..options import Options
from ..sampling import Sampling, chosen
from .arguments import check_batch, check_draws, check_sampler, check_times
from .draws import Draws, choose_moved
from .forms import AverageVelocity, Form
from .path import LinearPath
from .rows import Net, Rows
from .time_samplers import TimeSampler
from .velocities import DataVelocity, TargetVelocity


class Loss(NamedTuple):
    """What a training step needs.

    loss: () mean of `per_sample`, differentiable.
    per_sample: (B,) loss of each sample, detached.
    metrics: (B,) numbers of each sample by name, detached; their means are logged.
    """

    loss: Tensor
    per_sample: Tensor
    metrics: dict[str, Tensor]


class Networks(NamedTuple):
    """What an objective evaluates beside the network in training.

    ema: the averaged copy of the network that makes targets, see `Objective.target_decay`.
    frozen, weak: pretrained networks u(z, r, t, y) in the form that they were trained in, see `Objective.teachers`:
        the teacher, and a worse one for autoguidance.
    learned: the module that `Objective.learned_module` made, trained with the network.
    """

    ema: Net | None = None
    frozen: Net | None = None
    weak: Net | None = None
    learned: nn.Module | None = None


class Terms(NamedTuple):
    """What an objective's formulas give, rows with r ≠ t first.

    per_sample: (B,) loss of each sample, differentiable.
    metrics: (B,) numbers of each sample by name, detached.
    u: (B, …) prediction; du_dt: (moved, …) its total derivative, None where there are no such rows; v: (B, …) target
    velocity.
    others: further results by name, (B, …).
    """

    per_sample: Tensor
    metrics: dict[str, Tensor]
    u: Tensor
    du_dt: Tensor | None
    v: Tensor
    others: Mapping[str, Tensor] = {}

    def of_first_interval(self, moved: int, intervals: int) -> Terms:
        """Of rows as `Rows.with_intervals` has them: means of losses and metrics over the intervals of a sample, and
        everything else of the first one."""

        def mean(a: Tensor) -> Tensor:
            n = moved * intervals
            return torch.cat([a[:n].view(intervals, moved).mean(dim=0), a[n:]])  # [B]

        def first(a: Tensor) -> Tensor:
            return torch.cat([a[:moved], a[moved * intervals :]])  # [B, …]

        return Terms(
            per_sample=mean(self.per_sample),
            metrics={name: mean(a) for name, a in self.metrics.items()},
            u=first(self.u),
            du_dt=None if self.du_dt is None else self.du_dt[:moved],
            v=first(self.v),
            others={name: first(a) for name, a in self.others.items()},
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveOutput:
    """All that one evaluation of an objective gives, in the caller's row order.

    loss: () mean of `per_sample`, differentiable.
    per_sample: (B,) weighted loss of each sample, detached.
    squared_error: (B,) ‖u − u_tgt‖² of each sample before weighting, detached.
    u: (B, C, H, W) the network's prediction, detached.
    du_dt: (B, C, H, W) its total derivative, zero where r = t, detached; of terminal velocities ∂u/∂r.
    v: (B, C, H, W) the guided velocity that it is trained towards.
    t, r: (B,) the times.
    others: further results by name, such as "u_tgt" (B, C, H, W), detached.
    """

    loss: Tensor
    per_sample: Tensor
    squared_error: Tensor
    u: Tensor
    du_dt: Tensor
    v: Tensor
    t: Tensor
    r: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective(Options, ABC):
    """A loss of a network, data and labels: a frozen dataclass, whose fields are its options.

    A subclass has the fields `ratio`, `label_dropout` and `time_sampler` (or class attributes of these names), and
    defines `terms`.

    Attributes:
        paper: arXiv number of each paper, for the table in docs/methods.md.
        formula: what is trained towards what, in one line, for the same table.
        curriculum: names of options that count training steps, which a shorter or longer run has to scale.
        outputs: what the network returns.
        metrics: names of what `terms` gives for the log.
        conditions: names of the further draws that `draw_conditions` makes.
        keywords: what the network is called with besides z, r, t and y.
        teacher_jumps: whether its teacher is evaluated at r ≠ t, which flow matching does not train.
        instantaneous: whether u(z, t, t) of a trained network is the velocity, so that it can teach others.
        path: between data and noise.
        form: what the network returns.
        velocity: what the targets start from, in the place of e − x.
        intervals: how many r each sample with r ≠ t has, at one point z.
        Output: the class of what a call returns.
    """

    paper: ClassVar[tuple[str, ...]] = ()
    formula: ClassVar[str] = ""
    curriculum: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("u",)
    metrics: ClassVar[tuple[str, ...]] = ("squared_error",)
    conditions: ClassVar[tuple[str, ...]] = ()
    teacher_jumps: ClassVar[bool] = False
    instantaneous: ClassVar[bool] = True
    path: ClassVar[LinearPath] = LinearPath()
    Output: ClassVar[type[Any]] = ObjectiveOutput

    if TYPE_CHECKING:  # of every subclass; a dataclass would take them for fields of this one

        @property
        def ratio(self) -> float: ...
        @property
        def label_dropout(self) -> float: ...
        @property
        def time_sampler(self) -> TimeSampler: ...
        @property
        def sampling(self) -> Sampling: ...
        @property
        def form(self) -> Form: ...
        @property
        def velocity(self) -> TargetVelocity: ...
        @property
        def intervals(self) -> int: ...
        @property
        def keywords(self) -> tuple[str, ...]: ...

    else:
        intervals = 1
        keywords = ()
        form = AverageVelocity()
        velocity = DataVelocity()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampler(self, self.sampling)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Which pretrained networks it needs, of "frozen" and "weak"."""
        return self.velocity.teachers

    @property
    def group_size(self) -> int:
        """Consecutive samples that belong together: no cut of a batch may part them."""
        return self.velocity.group_size

    @property
    def taught(self) -> Mapping[str, Any]:
        """The options with which it learns from a teacher, where that is a choice; empty where it is none."""
        named = {field.name for field in dataclasses.fields(self) if field.init}
        return {"velocity": "teacher"} if "velocity" in named else {}

    @property
    def two_times(self) -> bool:
        """Whether the network is trained with r ≠ t, and told both."""
        return self.ratio > 0 and not self.form.one_time

    @abstractmethod
    def terms(self, b: Rows, nets: Networks) -> Terms:
        """The paper's formulas. Nothing random, no read on the host: a compiler takes them whole."""

    def penalised(self, terms: Terms, b: Rows) -> Terms:
        """What the formulas gave with what is added to every such loss, see `Controlled`: here nothing."""
        return terms

    def learned_module(self) -> nn.Module | None:
        """A new module of the objective's own parameters, such as a log-variance of its weight; None: it has none.

        The trainer makes it once, puts it into the optimiser (with weight decay) and the checkpoints, and passes it to
        `terms` as `nets.learned`, to be called as a module. It is not averaged. Its parameters have one dimension at
        least, so that FSDP2 can shard them, and its forward keeps no state in Python, which a CUDA graph would not run.
        """
        return None

    def target_decay(self, step: int) -> float | None:
        """Decay of the averaged copy of the network that makes targets (`Networks.ema`) after this step, counted from
        0; None, at every step: there is no such copy. It is not the average that images are drawn from."""
        return None

    def draw_times(
        self, n: int, *, step: int = 0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Times t and r <= t of n samples, (n,) each: here two independent ones, the larger one first."""
        pair = self.time_sampler.sample(2 * n, generator=generator, device=device).view(2, n)  # [2, B]
        return pair.amax(dim=0), pair.amin(dim=0)  # [B]

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Further draws of samples with times t and r, (B,) each, by names in `conditions`."""
        return {}

    def draw_noises(self, noise: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Further noise of the shape of `noise` (B, …), by names in `conditions`."""
        return {}

    def dropped(self, drop: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """(B,) bool: which of the samples whose label is to be dropped, with times t and r, lose it."""
        return drop

    def is_moved(self, t: Tensor, r: Tensor) -> Tensor:
        """(B,) bool: the samples at times t and r that are none of instantaneous velocity."""
        return r != t

    def phase_at(self, t: Tensor, r: Tensor, conditions: Mapping[str, Tensor], step: int | None = None) -> str:
        """The phase of the training (see `Draws.phase`) at a step, or that in which draws like these are made."""
        return ""

    # ------------------------------------------------------------------------------------------------- what users call

    def __call__(
        self, net: Net, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None, nets: Networks | None = None
    ) -> Any:
        """Draw everything random (see `draw`) and evaluate the loss there.

        Args:
            net: as in `loss_at`; with attribute `num_classes` where labels are dropped or the target is guided.
            x: (B, C, H, W) data; any shape (B, …) that the network takes.
            y: (B,) integer labels.
            generator: source of the draws, on the device of `x`; default: PyTorch's global one.
            nets: the modules beside the network, for the objectives that need them.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        check_batch(net, x, y)
        self.check_network(net)
        self._check_networks(nets)
        draws = self.draw(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return self._output(net, x, y, draws, nets)

    def draw(
        self,
        shape: Sequence[int],
        *,
        step: int = 0,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        spread: bool = False,
    ) -> Draws:
        """Everything random of a batch of this shape (B, C, H, W).

        Args:
            step: training step, counted from 0, for objectives whose draws change in the course of training.
            generator: source of the draws, on `device`; default: PyTorch's global one.
            spread: put the rows with r ≠ t at even distances (see `Draws.part`) instead of at random.
        """
        B = shape[0]
        place: dict[str, Any] = {"generator": generator, "device": device}
        e = torch.randn(tuple(shape), dtype=dtype, **place)  # [B, C, H, W]
        t, r = self.draw_times(B, step=step, **place)
        drop = torch.rand(B, **place) < self.label_dropout if self.label_dropout > 0 else None  # [B]
        moved, rows = choose_moved(B, self.ratio, spread=spread, **place)
        r = torch.where(moved, r, t)  # [B]
        conditions = self.draw_conditions(t, r, step=step, generator=generator)
        conditions |= self.draw_noises(e, generator=generator)
        phase = self.phase_at(t, r, conditions, step)
        return Draws(e, t, r, moved, rows, drop=drop, conditions=conditions, phase=phase)

    def loss(self, net: Net, x: Tensor, y: Tensor, draws: Draws, nets: Networks | None = None) -> Loss:
        """The loss at what `draw` gave. Nothing random, no read on the host: a compiler takes it whole.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        check_batch(net, x, y)
        check_draws(x, draws.noise, t=draws.t, r=draws.r, drop=draws.drop, **draws.conditions)
        terms, order = self._terms(net, x, y, draws, nets)
        back = order.argsort()
        return Loss(
            loss=terms.per_sample.mean(),
            per_sample=terms.per_sample.detach()[back],
            metrics={name: terms.metrics[name][back] for name in self.metrics},
        )

    def evaluate(self, net: Net, x: Tensor, y: Tensor, draws: Draws, nets: Networks | None = None) -> Any:
        """The same with prediction, derivative and target."""
        check_batch(net, x, y)
        check_draws(x, draws.noise, t=draws.t, r=draws.r, drop=draws.drop, **draws.conditions)
        return self._output(net, x, y, draws, nets)

    def _output(self, net: Net, x: Tensor, y: Tensor, draws: Draws, nets: Networks | None) -> Any:
        terms, order = self._terms(net, x, y, draws, nets)
        back = order.argsort()
        du_dt = terms.u.new_zeros(terms.u.shape)
        if terms.du_dt is not None:
            du_dt = torch.cat([terms.du_dt, du_dt[len(terms.du_dt) :].to(terms.du_dt.dtype)])  # [B, …]
        error = terms.metrics.get("squared_error", terms.per_sample.detach())  # [B]
        rows = {"u": terms.u.detach(), "du_dt": du_dt, "v": terms.v, "squared_error": error}
        more = {**terms.metrics, **terms.others}
        if self.Output is not ObjectiveOutput:
            rows |= more
        return self.Output(
            loss=terms.per_sample.mean(),
            per_sample=terms.per_sample.detach()[back],
            t=draws.t,
            r=draws.r,
            others={name: a.detach()[back] for name, a in more.items() if name not in rows},
            **{name: a[back] for name, a in rows.items()},
        )

    def loss_at(
        self,
        net: Net,
        *,
        x: Tensor,
        noise: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        drop: Tensor | None = None,
        nets: Networks | None = None,
        **conditions: Tensor,
    ) -> Any:
        """The loss at given draws; nothing random inside.

        Args:
            net: u = net(z, r, t, y), of the shape of z; the labels are given by the name y.
            x: (B, C, H, W) data.
            noise: (B, C, H, W) noise e.
            t, r: (B,) times in [0, 1], r <= t. Their number of rows with r ≠ t is read on the host.
            y: (B,) integer labels.
            drop: (B,) bool, True where the label is dropped; default: nowhere.
            nets: the modules beside the network, for the objectives that need them.
            conditions: further draws, by the names in the attribute `conditions`.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        if set(conditions) != set(self.conditions):
            expected = ", ".join(f"{name}=" for name in self.conditions) or "no further argument"
            raise TypeError(f"conditions: expected {expected}, got {', '.join(conditions) or 'none'}")
        check_batch(net, x, y)
        check_draws(x, noise, t=t, r=r, drop=drop, **conditions)
        check_times(t, r)
        for name in interval_names(self.intervals):
            check_times(t, conditions[name], name)
        check_finite("noise", noise)
        self.check_conditions(conditions)
        self.check_network(net)
        self._check_networks(nets)
        moved = self.is_moved(t, r)  # [B]
        phase = self.phase_at(t, r, conditions)
        draws = Draws(noise, t, r, moved, int(moved.sum()), drop=drop, conditions=conditions, phase=phase)
        return self._output(net, x, y, draws, nets)

    def sample(self, net: Net, noise: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Images of labels y (B,) from noise (B, C, H, W): as `sampling` says, with other values for its options.

        `sampler=` is the name of another sampler, which starts from its own defaults.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        return self.generate(net, noise, y, chosen(self.sampling, **options))

    def generate(
        self, net: Net, noise: Tensor, y: Tensor, sampling: Sampling, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images (B, …) of labels y (B,) from standard normal noise (B, …) by a sampler.

        Raises:
            UsageError: the sampler is of other networks.
        """
        check_sampler(self, sampling)
        return sampling.draw(self.sampled(net), noise, y, generator=generator)

    def sampled(self, net: Net) -> Net:
        """u(z, r, t, y), from which images are drawn, of a network that this objective trains."""
        return self.form.wrap(net)

    # ----------------------------------------------------------------------------------------------------------- checks

    def check_network(self, net: Net) -> None:
        """Raise a NetworkError unless `net` takes what the objective gives it."""
        if self.ratio > 0 or self.keywords:
            check_takes(net, "y", *self.keywords)

    def _check_networks(self, nets: Networks | None) -> None:
        name, given = type(self).__name__, Networks() if nets is None else nets
        if given.learned is None and self.learned_module() is not None:
            raise TypeError(f"nets: expected Networks(learned=module), with the module that {name}.learned_module made")
        if given.ema is None and self.target_decay(0) is not None:
            raise TypeError(f"nets: expected Networks(ema=copy), an averaged copy of the network, for {name}'s target")
        for role in self.teachers:
            if getattr(given, role) is None:
                raise TypeError(f"nets: expected Networks({role}=network), a pretrained u(z, r, t, y), for {name}")

    def check_conditions(self, conditions: Mapping[str, Tensor]) -> None:
        """Raise unless given draws by the names in `conditions` have values in their ranges, which are read."""

    def _terms(self, net: Net, x: Tensor, y: Tensor, draws: Draws, nets: Networks | None) -> tuple[Terms, Tensor]:
        """The formulas on the rows in their order (B,), those with r ≠ t first."""
        order = draws.order
        x, e, t, r, y = (a[order] for a in (x, draws.noise, draws.t, draws.r, y))
        drop = None if draws.drop is None else self.dropped(draws.drop[order], t, r)  # [B]
        nets = Networks() if nets is None else nets
        if nets.ema is not None:
            nets = nets._replace(ema=self.form.wrap(nets.ema))
        conditions = {name: a[order] for name, a in draws.conditions.items()}
        path = self.path.given(conditions)
        batch = Rows(
            net=self.form.wrap(net),
            path=path,
            x=x,
            noise=e,
            z=path.point(x, e, t),
            v=path.velocity(x, e, t),
            r=r,
            t=t,
            labels=y,
            y=y if drop is None else y.masked_fill(drop, no_label_of(net)),
            drop=drop,
            moved=draws.rows,
            conditions=conditions,
            phase=draws.phase,
        )
        if type(self.velocity) is not DataVelocity:
            batch = dataclasses.replace(batch, v=self.velocity.of(batch, order, nets.frozen))
        rows = batch
        if self.intervals > 1:
            rows = batch.with_intervals([conditions[name] for name in interval_names(self.intervals)])
        terms = self.terms(rows, nets)
        if self.intervals > 1:
            terms = terms.of_first_interval(batch.moved, self.intervals)
        return self.penalised(terms, batch), order


@dataclass(frozen=True)
class JumpsToData(Objective, ABC):
    """An objective of u(z, 0, t) alone: its times are t of the time sampler, and r = 0."""

    ratio = 1.0
    instantaneous = False

    def draw_times(
        self, n: int, *, step: int = 0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """t, and r = 0."""
        t = self.time_sampler.sample(n, generator=generator, device=device)  # [B]
        return t, torch.zeros_like(t)


def interval_names(intervals: int) -> tuple[str, ...]:
    """Names of the further draws of an objective with so many `intervals`: r of each beyond the first."""
    return tuple(f"r_{i}" for i in range(2, intervals + 1))
