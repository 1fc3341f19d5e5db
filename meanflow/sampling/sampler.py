"""What the samplers have in common: where they start, guidance, and their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from mfkernels.checks import check_number

from ..checks import check_floating, check_label_range, check_labels, check_velocity, no_label_of
from ..errors import UsageError
from ..options import Options, build, choice, component_of, option
from .schedules import karras_times, schedule_of, uniform_times

Start = Literal["unit", "scaled", "sphere"]
Interval = tuple[float, float]
MOST = 2**20  # steps: their times are a list


class Sampling(Protocol):
    """How images are drawn, as a group of options.

    sweep: an option and the values of it that a report compares; None: there is none.

    A sampler may also have the class attributes `outputs`, what the networks return that it draws from, if that is not
    u, and `keywords`, what they are told besides z, r, t and y.
    """

    sweep: ClassVar[tuple[str, tuple[float, ...]] | None]

    def draw(
        self, net: Callable[..., Any], noise: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """(B, C, H, W) images of labels y (B,) from noise (B, C, H, W) by u = net(z, r, t, y).

        `generator` is the source of whatever else is random, on any device; default: PyTorch's global one.
        """
        ...


def check_inputs(net: Any, noise: Tensor, y: Tensor) -> None:
    """Raise unless noise is (B, …) and y has a label that `net` knows for each."""
    check_floating("noise", noise)
    if noise.ndim == 0:
        raise ValueError("noise: expected (B, …), got a single number")
    check_labels(y, noise.shape[0], "noise")
    check_label_range(y, net)


def started(noise: Tensor, t: float, start: Start) -> Tensor:
    """The state at the first time t, (B, …), from standard normal noise (B, …).

    unit: the noise itself (IMM's pushforward from 0.994, DMF). scaled: t·noise, the path of x = 0, which is σ·noise in
    noise levels (consistency models, EDM). sphere: √(t² + (1 − t)²)·noise, which has the variance of z_t where that of
    the data is 1, and is the noise itself at an angle (TrigFlow, rCM). At t = 1 all are the noise.
    """
    if start not in ("unit", "scaled", "sphere"):
        raise ValueError(f"start: expected 'unit', 'scaled' or 'sphere', got {start!r}")
    if t == 1.0 or start == "unit":
        return noise
    return noise * (t if start == "scaled" else (t**2 + (1 - t) ** 2) ** 0.5)


class Velocity:
    """u(z, now, after) of a batch, with classifier-free guidance u_∅ + scale·(u_y − u_∅) (arXiv 2207.12598).

    Args:
        net: u = net(z, r, t, y, **conditions), or a tuple that begins with it.
        y: (B,) labels.
        scale: 1 is none; others double the rows of each evaluation.
        interval: closed interval of times `now` that are guided.
        conditions: passed to `net`.

    Raises:
        TypeError, ValueError: an argument does not fit, or the network names no number of classes.
    """

    def __init__(
        self, net: Callable[..., Any], y: Tensor, scale: float, interval: Interval, conditions: Mapping[str, Any]
    ) -> None:
        check_number("guidance_scale", scale)
        low, high = interval
        check_number("guidance_interval", low)
        check_number("guidance_interval", high)
        self.net, self.y, self.scale, self.interval, self.conditions = net, y, scale, interval, conditions
        self.null = torch.full_like(y, no_label_of(net)) if scale != 1.0 else y  # [B]

    def __call__(self, z: Tensor, now: float, after: float) -> Tensor:
        """(B, …) average velocity from the time `now` to `after`; the instantaneous one where they are equal."""
        low, high = self.interval
        guided = self.scale != 1.0 and low <= now <= high
        y = torch.cat([self.y, self.null]) if guided else self.y
        z = torch.cat([z, z]) if guided else z
        t = z.new_full((z.shape[0],), now)
        r = t if after == now else z.new_full((z.shape[0],), after)
        out = self.net(z, r, t, y, **self.conditions)
        u = check_velocity("u", out[0] if isinstance(out, tuple) and out else out, z)  # [B or 2·B, …]
        if not guided:
            return u
        with_label, without = u.chunk(2)
        return without + self.scale * (with_label - without)


# ------------------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class Steps(Options):
    """Options of every sampler: its times and its start.

    Args:
        steps: network evaluations per image
        schedule: of the times. uniform: equal steps; karras: equal in sigma^(1/7), sigma = t/(1 - t), for t_start < 1
        t_start: first time, that of the noise
        start: the state there. unit: the noise; scaled: t_start times the noise, as consistency models start; sphere:
            scaled to the variance that data of variance 1 have there
        times: the times themselves, such as 1 0.5 0, in the place of steps, schedule and t_start
    """

    sweep: ClassVar[tuple[str, tuple[float, ...]] | None] = None

    steps: int = option(1, low=1, high=MOST)
    _: KW_ONLY
    schedule: Literal["uniform", "karras"] = "uniform"
    t_start: float = option(1.0, low=0.0, high=1.0, above=True)
    start: Start = "unit"
    times: tuple[float, ...] = option((), low=0.0, high=1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(self.times))  # a list would make the options unhashable
        super().__post_init__()
        try:
            self.path()
        except ValueError as error:
            field, _, words = str(error).partition(": ")
            raise UsageError(words, field=field) from error

    def path(self) -> list[float]:
        """The times, from the first to the last."""
        if self.times:
            return schedule_of(None, self.times, 1)
        if self.schedule == "karras":
            return karras_times(self.steps, self.t_start)
        return uniform_times(self.steps, self.t_start)

    def arguments(self) -> dict[str, Any]:
        """Of the function that draws."""
        return {"times": self.path(), "start": self.start}

    def words(self, evaluations: int = 1) -> str:
        """Number of network evaluations, and what is not the usual of them."""
        count = evaluations * (len(self.path()) - 1)
        words = f"{count} network evaluation{'s' if count > 1 else ''}"
        if self.times:
            words += f" at {', '.join(f'{t:g}' for t in self.times)}"
        else:
            words += " of the karras schedule" if self.schedule == "karras" else ""
            words += f" from {self.t_start:g}" if self.t_start < 1 else ""
        return words + (f", {self.start} start" if self.start != "unit" else "")


@dataclass(frozen=True)
class GuidableSteps(Steps):
    """Options of the samplers that take classifier-free guidance.

    Args:
        guidance_scale: classifier-free guidance; 1 is none
        guidance_t_min: guided times, from
        guidance_t_max: guided times, to
    """

    _: KW_ONLY
    guidance_scale: float = 1.0
    guidance_t_min: float = option(0.0, low=0.0, high=1.0)
    guidance_t_max: float = option(1.0, low=0.0, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_t_min > self.guidance_t_max:
            raise UsageError(
                f"expected at most guidance_t_max = {self.guidance_t_max}, got {self.guidance_t_min}",
                field="guidance_t_min",
            )

    def arguments(self) -> dict[str, Any]:
        """Of the function that draws."""
        interval = (self.guidance_t_min, self.guidance_t_max)
        return {**super().arguments(), "guidance_scale": self.guidance_scale, "guidance_interval": interval}

    def guidance_words(self) -> str:
        """The guidance, if there is one."""
        if self.guidance_scale == 1.0:
            return ""
        low, high = self.guidance_t_min, self.guidance_t_max
        inside = "" if (low, high) == (0.0, 1.0) else f" on [{low:g}, {high:g}]"
        return f", guidance scale {self.guidance_scale:g}{inside}"


def sampler_option(default: Callable[[], Sampling]) -> Any:
    """A field that holds a sampler, chosen by `--sampler`, for an objective."""
    return choice("samplers", default, prefix="sample_", methods=("draw",), flat="sampler")


def chosen(own: Any, sampler: str | None = None, **options: Any) -> Any:
    """A sampler with other values for some of its options, or another sampler, which starts from its own defaults.

    Args:
        own: the sampler that there is.
        sampler: name of the one that is wanted; None: `own`.

    Raises:
        UsageError: there is no such sampler or option, or a value is of another type or out of its range.
    """
    cls = type(own) if sampler is None else component_of("samplers", ("draw",), sampler)
    used: set[str] = set()
    unknown = [name for name in options if name not in {field.name for field in dataclasses.fields(cls)}]
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(cls))
        raise UsageError(f"expected {known}, got {unknown[0]}", field="sampling")
    return build(cls, own if cls is type(own) else None, options, used)
