"""The 8×8 digits with other methods, in about three minutes of one core: `meanflow train digits --objective NAME`.

Methods with a teacher want `--teacher runs/RUN`: of `meanflow train digits --objective flow_matching --name RUN`; pfmm
a run of lmd. docs/methods.md has what they reach.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ..config import Config
from ..registry import register
from .digits import digits

# Curricula are those of the papers in a thousand steps, averaged targets follow faster than in the papers' long runs;
# what else is said was tried on seed 0 alone.
OPTIONS: dict[str, dict[str, Any]] = {
    "alpha_flow": {"kappa": 0.3, "alpha_end": 700},
    "ayf": {"warm_up_steps": 200, "steps": 900},
    "ct": {"total_steps": 1000, "end_scales": 20, "start_ema": 0.3, "sample_steps": 2},
    "dmf": {"omega": 0.6, "steps": 500},
    "ect": {"stage_steps": 200, "sample_steps": 2},
    "emd": {"ratio": 0.75, "steps": 900},
    "esd": {"ratio": 0.5},
    "hybrid": {"kappa": 0.3, "ratio": 0.5},
    "ict": {"total_steps": 1000, "start_scales": 10, "end_scales": 40},
    "imm": {},
    "lmd": {"ratio": 0.75, "steps": 900},
    "lsd": {"ratio": 0.5, "steps": 900},
    "pfmm": {"ratio": 0.75, "steps": 900},
    "psd": {"ratio": 0.5},
    "rcm": {"form_time_scale": 1.0, "guidance": 1.5, "warm_up_steps": 100, "steps": 600, "lr": 1e-3},
    "scd": {"warm_up_steps": 100, "guidance": 1.5, "steps": 600},
    "shortcut": {"ratio": 0.25, "timesteps": 8, "target_ema": 0.95, "steps": 600},
    "split_meanflow": {"steps": 900},
    "tvm": {"omega": 2.0, "target_ema": 0.9, "steps": 480},
}


def with_method(objective: str) -> Config:
    """The digits of MeanFlow's recipe with another objective."""
    return digits().replace(name=f"digits-{objective}", objective=objective, **OPTIONS[objective])


for objective in OPTIONS:
    register("recipes", f"digits-{objective}")(partial(with_method, objective))
