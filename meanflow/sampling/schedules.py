"""Times at which samplers evaluate the network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor


def uniform_times(steps: int, t_start: float = 1.0, t_end: float = 0.0) -> list[float]:
    """steps + 1 times from `t_start` to `t_end` at equal distances.

    Raises:
        ValueError: steps < 1, or not 0 <= t_end < t_start <= 1.
    """
    _check(steps, t_start, t_end)
    return [*(t_start + (t_end - t_start) * i / steps for i in range(steps)), t_end]


def karras_times(steps: int, t_start: float, t_end: float = 0.0, *, rho: float = 7.0) -> list[float]:
    """steps + 1 times from `t_start` to `t_end` at equal distances in σ^(1/rho), σ = t/(1 − t) the noise level.

    Karras et al. (arXiv 2206.00364, eq. 5); the grid of consistency models (arXiv 2303.01469) and, with rho = 7, the
    "edm" times of IMM's program (arXiv 2503.07565).

    Raises:
        ValueError: steps < 1, rho is not above 0, or not 0 <= t_end < t_start < 1 (σ is infinite at t = 1).
    """
    _check(steps, t_start, t_end)
    if t_start == 1.0:
        raise ValueError("t_start: expected less than 1, such as 0.994, where times are drawn by noise level, got 1")
    if not rho > 0:
        raise ValueError(f"rho: expected a number > 0, got {rho}")
    first, last = ((t / (1 - t)) ** (1 / rho) for t in (t_start, t_end))
    levels = [(first + (last - first) * i / steps) ** rho for i in range(1, steps)]
    return [t_start, *(level / (1 + level) for level in levels), t_end]


def _check(steps: int, t_start: float, t_end: float) -> None:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 <= t_end < t_start <= 1:
        raise ValueError(f"t_start, t_end: expected 0 <= t_end < t_start <= 1, got {t_start} and {t_end}")


def schedule_of(steps: int | None, times: Sequence[float] | Tensor | None, default: int) -> list[float]:
    """The times of a sampler that was given their number, or the times themselves.

    Raises:
        ValueError: it was given both, or such times as are none.
    """
    if times is None:
        return uniform_times(default if steps is None else steps)
    if steps is not None:
        raise ValueError(f"steps, times: expected one of them, got steps={steps} and times={times}")
    schedule = [float(a) for a in times]
    if len(schedule) < 2 or not all(a >= b for a, b in itertools.pairwise(schedule)):
        raise ValueError(f"times: expected at least two times that never increase, such as [1, 0.5, 0], got {schedule}")
    if schedule[0] > 1 or schedule[-1] < 0:
        raise ValueError(f"times: expected times in [0, 1], got {schedule}")
    return schedule
