"""From noise to images: MeanFlow sampling in one or a few evaluations, and ODE sampling for flow matching."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from mfkernels.checks import check_number

from .checks import check_floating, check_label_range, check_labels, check_velocity, no_label_of
from .errors import UsageError
from .options import Options, option


def _schedule(steps: int | None, times: Sequence[float] | Tensor | None, default: int) -> list[float]:
    if times is None:
        steps = default if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        return [1.0 - i / steps for i in range(steps + 1)]
    if steps is not None:
        raise ValueError(f"steps, times: expected one of them, got steps={steps} and times={times}")
    schedule = [float(a) for a in times]
    if len(schedule) < 2 or not all(a >= b for a, b in itertools.pairwise(schedule)):
        raise ValueError(f"times: expected at least two times that never increase, such as [1, 0.5, 0], got {schedule}")
    if schedule[0] > 1 or schedule[-1] < 0:
        raise ValueError(f"times: expected times in [0, 1], got {schedule}")
    return schedule


def _first(out: Any, z: Tensor) -> Tensor:
    """u of a network that returned u at `z`, or a tuple that begins with it."""
    return check_velocity("u", out[0] if isinstance(out, tuple) and out else out, z)


def _check(net: Any, noise: Tensor, y: Tensor) -> None:
    check_floating("noise", noise)
    if noise.ndim == 0:
        raise ValueError("noise: expected (B, …), got a single number")
    check_labels(y, noise.shape[0], "noise")
    check_label_range(y, net)


@torch.no_grad()
def sample(
    net: Callable[..., Any],
    noise: Tensor,
    y: Tensor,
    *,
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    **conditions: Any,
) -> Tensor:
    """MeanFlow sampling, z_r = z_t − (t − r)·u(z_t, r, t) (arXiv 2505.13447, Algorithm 2): `steps` network evaluations.

    Args:
        net: u = net(z, r, t, y, **conditions), or a tuple whose first entry is u (`IMFDiT`).
        noise: (B, C, H, W) standard normal noise, the state at the first time.
        y: (B,) integer labels; the network's `num_classes` means "no label".
        steps: number of equal steps from t = 1 to 0; 1, the default, is one-step generation.
        times: the schedule instead of `steps`, never increasing, such as [1, 0.5, 0].
        **conditions: passed to `net`, for instance omega=, t_min= and t_max= (numbers) for `IMFDiT`.

    Returns:
        (B, C, H, W), the state at the last time.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check(net, noise, y)
    schedule = _schedule(steps, times, 1)
    z = noise
    for now, after in itertools.pairwise(schedule):
        t, r = z.new_full((z.shape[0],), now), z.new_full((z.shape[0],), after)  # [B]
        z = z - (now - after) * _first(net(z, r, t, y, **conditions), z)  # [B, C, H, W]
    return z


@torch.no_grad()
def sample_ode(
    net: Callable[..., Tensor],
    noise: Tensor,
    y: Tensor,
    *,
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    method: Literal["euler", "heun"] = "heun",
    guidance_scale: float = 1.0,
    **conditions: Any,
) -> Tensor:
    """Integrate dz/dt = u(z, t, t) from noise to data, the sampler of flow matching (arXiv 2210.02747).

    Args:
        net, noise, y, times, **conditions: as in `sample`.
        steps: number of equal steps; default: 50.
        method: "euler" (one evaluation a step) or "heun" (two; second order, the explicit trapezoidal rule).
        guidance_scale: classifier-free guidance u_null + scale·(u_label − u_null) (arXiv 2207.12598); 1 is none. It
            doubles the rows of each evaluation.

    Returns:
        (B, C, H, W), the state at the last time.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check(net, noise, y)
    check_number("guidance_scale", guidance_scale)
    if method not in ("euler", "heun"):
        raise ValueError(f"method: expected 'euler' or 'heun', got {method!r}")
    schedule = _schedule(steps, times, 50)
    null = torch.full_like(y, no_label_of(net)) if guidance_scale != 1.0 else y

    def velocity(z: Tensor, at: float) -> Tensor:
        t = z.new_full((z.shape[0],), at)  # [B]
        if guidance_scale == 1.0:
            return _first(net(z, t, t, y, **conditions), z)
        z2, t2, y2 = torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, null])
        both = _first(net(z2, t2, t2, y2, **conditions), z2)  # [2·B, C, H, W]
        with_label, without = both.chunk(2)
        return without + guidance_scale * (with_label - without)

    z = noise
    for now, after in itertools.pairwise(schedule):
        h = now - after
        v = velocity(z, now)
        z_euler = z - h * v
        z = z_euler if method == "euler" else z - h / 2 * (v + velocity(z_euler, after))
    return z


class Sampling(Protocol):
    """How images are drawn, as a group of options.

    sweep: an option and the values of it that a report compares; None: there is none.
    """

    sweep: ClassVar[tuple[str, tuple[float, ...]] | None]

    def draw(self, net: Callable[..., Any], noise: Tensor, y: Tensor) -> Tensor:
        """(B, C, H, W) images of labels y (B,) from noise (B, C, H, W)."""
        ...


@dataclass(frozen=True)
class FewSteps(Options):
    """Steps of a flow map.

    Args:
        steps: network evaluations per image
    """

    sweep: ClassVar[tuple[str, tuple[float, ...]] | None] = None

    steps: int = option(1, low=1)

    def draw(self, net: Callable[..., Any], noise: Tensor, y: Tensor) -> Tensor:
        """As `sample`."""
        return sample(net, noise, y, steps=self.steps)

    def __str__(self) -> str:
        return f"MeanFlow, {self.steps} network evaluation{'s' if self.steps > 1 else ''}"


@dataclass(frozen=True)
class GuidedSteps(FewSteps):
    """Steps of a flow map that takes its guidance as a condition.

    Args:
        omega: guidance scale, 1 is none
        t_min: guided times, from
        t_max: guided times, to
    """

    sweep: ClassVar[tuple[str, tuple[float, ...]] | None] = ("omega", (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))

    omega: float = option(2.0, low=1.0)
    t_min: float = option(0.0, low=0.0, high=1.0)
    t_max: float = option(1.0, low=0.0, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min > self.t_max:
            raise UsageError(f"expected at most t_max = {self.t_max}, got {self.t_min}", field="t_min")

    def draw(self, net: Callable[..., Any], noise: Tensor, y: Tensor) -> Tensor:
        """As `sample`, of the u head alone."""
        guidance: dict[str, Any] = {"omega": self.omega, "t_min": self.t_min, "t_max": self.t_max}
        return sample(net, noise, y, steps=self.steps, heads="u", **guidance)

    def __str__(self) -> str:
        return f"{super().__str__()}, omega {self.omega:g} on [{self.t_min:g}, {self.t_max:g}]"


@dataclass(frozen=True)
class OdeSteps(Options):
    """An ODE solver along the velocity.

    Args:
        steps: of the ODE solver
        method: the ODE solver: euler has one network evaluation a step, heun two
        guidance_scale: classifier-free guidance; 1 is none
    """

    sweep: ClassVar[tuple[str, tuple[float, ...]] | None] = None

    steps: int = option(50, low=1)
    method: Literal["heun", "euler"] = "heun"
    guidance_scale: float = 1.0

    def draw(self, net: Callable[..., Any], noise: Tensor, y: Tensor) -> Tensor:
        """As `sample_ode`."""
        return sample_ode(net, noise, y, steps=self.steps, method=self.method, guidance_scale=self.guidance_scale)

    def __str__(self) -> str:
        evaluations = 2 * self.steps if self.method == "heun" else self.steps
        guidance = "" if self.guidance_scale == 1.0 else f", guidance scale {self.guidance_scale:g}"
        return f"{self.method.title()}'s method, {self.steps} steps, {evaluations} network evaluations{guidance}"
