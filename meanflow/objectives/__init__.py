"""Training objectives: pure functions of a network and its draws."""

from .improved_meanflow import ImprovedMeanFlow, ImprovedMeanFlowOutput
from .meanflow import FlowMatching, MeanFlow, ObjectiveOutput
from .time_samplers import LogitNormal, TimeSampler, Uniform

__all__ = [
    "FlowMatching",
    "ImprovedMeanFlow",
    "ImprovedMeanFlowOutput",
    "LogitNormal",
    "MeanFlow",
    "ObjectiveOutput",
    "TimeSampler",
    "Uniform",
]
