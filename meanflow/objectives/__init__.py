"""Training objectives: pure functions of a network and its draws."""

from .draws import Draws
from .flow_matching import FlowMatching
from .improved_meanflow import ImprovedMeanFlow, ImprovedMeanFlowOutput
from .meanflow import MeanFlow
from .objective import Loss, Networks, Objective, ObjectiveOutput, Terms
from .path import LinearPath
from .rows import Net, Rows
from .time_samplers import LogitNormal, TimeSampler, Uniform
from .weights import adaptive_error

__all__ = [
    "Draws",
    "FlowMatching",
    "ImprovedMeanFlow",
    "ImprovedMeanFlowOutput",
    "LinearPath",
    "LogitNormal",
    "Loss",
    "MeanFlow",
    "Net",
    "Networks",
    "Objective",
    "ObjectiveOutput",
    "Rows",
    "Terms",
    "TimeSampler",
    "Uniform",
    "adaptive_error",
]
