"""From noise to images: steps of a flow map, with noise put back or without, and solvers along the velocity."""

from .consistency import ConsistencySteps, sample_consistency
from .gamma import GammaSteps, sample_gamma
from .jumps import FewSteps, GuidedSteps, sample
from .ode import OdeSteps, sample_ode
from .renoise import renoise
from .sampler import GuidableSteps, Sampling, Steps, chosen, sampler_option
from .schedules import karras_times, uniform_times
from .sde import SdeSteps, sample_sde

__all__ = [
    "ConsistencySteps",
    "FewSteps",
    "GammaSteps",
    "GuidableSteps",
    "GuidedSteps",
    "OdeSteps",
    "Sampling",
    "SdeSteps",
    "Steps",
    "chosen",
    "karras_times",
    "renoise",
    "sample",
    "sample_consistency",
    "sample_gamma",
    "sample_ode",
    "sample_sde",
    "sampler_option",
    "uniform_times",
]
