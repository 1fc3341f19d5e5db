"""Training objectives: pure functions of a network and its draws."""

from .draws import Draws
from .flow_matching import FlowMatching
from .forms import EDM, AverageVelocity, DataPrediction, Form, ScaledVelocity, Shortcut, TrigFlow
from .improved_meanflow import ImprovedMeanFlow, ImprovedMeanFlowOutput
from .likelihood import LikelihoodOutput, NoisyFlow, TarFlowLikelihood, TarFlowSampler, density, score
from .meanflow import MeanFlow
from .objective import Loss, Networks, Objective, ObjectiveOutput, Terms
from .path import Angle, Clock, Cosine, LinearPath, NoiseLevel
from .rows import Net, Rows
from .time_samplers import LogitNormal, TimeSampler, Uniform
from .weights import adaptive_error

__all__ = [
    "EDM",
    "Angle",
    "AverageVelocity",
    "Clock",
    "Cosine",
    "DataPrediction",
    "Draws",
    "FlowMatching",
    "Form",
    "ImprovedMeanFlow",
    "ImprovedMeanFlowOutput",
    "LikelihoodOutput",
    "LinearPath",
    "LogitNormal",
    "Loss",
    "MeanFlow",
    "Net",
    "Networks",
    "NoiseLevel",
    "NoisyFlow",
    "Objective",
    "ObjectiveOutput",
    "Rows",
    "ScaledVelocity",
    "Shortcut",
    "TarFlowLikelihood",
    "TarFlowSampler",
    "Terms",
    "TimeSampler",
    "TrigFlow",
    "Uniform",
    "adaptive_error",
    "density",
    "score",
]
