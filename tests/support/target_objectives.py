"""Objectives that evaluate networks beside the one in training, each in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from meanflow.objectives import (
    AveragedVelocity,
    ConsistencyTraining,
    ConsistencyTrajectory,
    LogitNormal,
    MeanFlow,
    Networks,
    Objective,
    Rows,
    ShortcutModel,
    TeacherVelocity,
    TerminalVelocityMatching,
    Terms,
    TimeSampler,
)
from meanflow.objectives.forms import EDM, Form
from meanflow.options import choice, group, option
from meanflow.sampling import FewSteps


@dataclass(frozen=True)
class _OfOne(Objective):
    ratio: float = option(0.5, low=0.0, high=1.0)
    label_dropout: float = option(0.0, low=0.0, high=1.0)
    time_sampler: TimeSampler = choice("time_samplers", LogitNormal, prefix="time_")
    sampling: FewSteps = group(FewSteps, prefix="sample_")

    def against(self, u: Tensor, target: Tensor, b: Rows) -> Terms:
        error = (u - target).square().flatten(1).mean(1)  # [B]
        return Terms(error, {"squared_error": error.detach()}, u, None, b.v)


@dataclass(frozen=True)
class Averaged(_OfOne):
    """Between the velocity and that of the averaged copy, whose decay changes with the step.

    Args:
        decay: of the copy after the first step; that one copies the network
    """

    decay: float = option(0.75, low=0.0, high=1.0)

    def target_decay(self, step: int) -> float | None:
        return 0.0 if step == 0 else self.decay

    def terms(self, b: Rows, nets: Networks) -> Terms:
        with torch.no_grad():
            made = nets.ema(b.z, b.t, b.t, b.y)  # [B, …]
        return self.against(b.net(b.z, b.r, b.t, b.y), 0.5 * (b.v + made), b)


@dataclass(frozen=True)
class Through(Averaged):
    """The copy's velocity at the point that the network reaches: the gradient flows through the copy's input."""

    def terms(self, b: Rows, nets: Networks) -> Terms:
        u = b.net(b.z, b.r, b.t, b.y)  # [B, …]
        reached = b.z - b.column(b.t - b.r + 0.1) * u  # [B, …]
        return self.against(nets.ema(reached, b.r, b.r, b.y) + u, b.v, b)


@dataclass(frozen=True)
class Taught(_OfOne):
    """Towards the teacher's velocity, guided by a worse one's."""

    teachers: ClassVar[tuple[str, ...]] = ("frozen", "weak")

    def terms(self, b: Rows, nets: Networks) -> Terms:
        with torch.no_grad():
            good, bad = (net(b.z, b.t, b.t, b.y) for net in (nets.frozen, nets.weak))  # [B, …] each
        return self.against(b.net(b.z, b.r, b.t, b.y), good + 0.5 * (good - bad), b)


@dataclass(frozen=True)
class Phased(Averaged):
    """Other formulas from a step on: without the copy, which is kept all the same.

    Args:
        change: the first step of the second phase
    """

    change: int = option(3, low=0)

    def phase_at(self, t: Tensor, r: Tensor, conditions: Mapping[str, Tensor], step: int | None = None) -> str:
        return "late" if step is not None and step >= self.change else "early"

    def terms(self, b: Rows, nets: Networks) -> Terms:
        if b.phase == "early":
            return super().terms(b, nets)
        return self.against(b.net(b.z, b.r, b.t, b.y), b.v, b)


@dataclass(frozen=True)
class InForm(_OfOne):
    """Plain velocity, of a network that returns something else."""

    form: ClassVar[Form] = EDM()  # type: ignore[misc]

    def terms(self, b: Rows, nets: Networks) -> Terms:
        return self.against(b.net(b.z, b.r, b.t, b.y), b.v, b)


@dataclass(frozen=True)
class Grouped(_OfOne):
    """Four samples make one loss: each is compared with the mean of its group."""

    @property
    def group_size(self) -> int:
        return 4

    def terms(self, b: Rows, nets: Networks) -> Terms:
        return self.against(b.net(b.z, b.r, b.t, b.y), b.v, b)


OBJECTIVES: dict[str, Any] = {"averaged": Averaged(), "through": Through(), "taught": Taught()}
# of the family, those with an averaged copy; a teacher's velocity, and samples that belong together
METHODS: dict[str, Any] = {
    "distilled": MeanFlow(ratio=0.5, velocity=TeacherVelocity(guidance=1.5)),
    "neighbours": MeanFlow(ratio=0.5, velocity=AveragedVelocity(group=4)),
    "ct": ConsistencyTraining(total_steps=4, end_scales=12),
    "ctm": ConsistencyTrajectory(self_learned=True, scales=6, target_ema=0.5),
    "shortcut": ShortcutModel(ratio=0.5, timesteps=8, target_ema=0.5),
    "tvm": TerminalVelocityMatching(target_ema=0.5),
}
NAME = "target_objectives:"  # of this module, before a class's
