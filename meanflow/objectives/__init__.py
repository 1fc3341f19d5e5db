"""Training objectives: pure functions of a network and its draws."""

from .meanflow import FlowMatching, MeanFlow, ObjectiveOutput
from .time_samplers import LogitNormal, TimeSampler, Uniform

__all__ = ["FlowMatching", "LogitNormal", "MeanFlow", "ObjectiveOutput", "TimeSampler", "Uniform"]
