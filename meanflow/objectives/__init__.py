"""Training objectives: pure functions of a network and its draws."""

from .draws import Draws
from .improved_meanflow import ImprovedMeanFlow, ImprovedMeanFlowOutput
from .meanflow import FlowMatching, MeanFlow
from .objective import Objective, ObjectiveOutput
from .time_samplers import LogitNormal, TimeSampler, Uniform

__all__ = [
    "Draws",
    "FlowMatching",
    "ImprovedMeanFlow",
    "ImprovedMeanFlowOutput",
    "LogitNormal",
    "MeanFlow",
    "Objective",
    "ObjectiveOutput",
    "TimeSampler",
    "Uniform",
]
