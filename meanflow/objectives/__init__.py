"""Training objectives: pure functions of a network and its draws. One method, one file."""

from .align_your_flow import AlignYourFlow
from .alpha_flow import AlphaFlow
from .consistency_training import ConsistencyDistillation, ConsistencyTraining, ImprovedConsistencyTraining
from .consistency_trajectory import ConsistencyTrajectory
from .controls import Control, Controlled
from .decoupled_meanflow import DecoupledMeanFlow
from .draws import Draws
from .easy_consistency import EasyConsistency
from .flow_map_matching import (
    EulerianDistillation,
    EulerianSelfDistillation,
    LagrangianDistillation,
    LagrangianSelfDistillation,
    ProgressiveFlowMapMatching,
    ProgressiveSelfDistillation,
)
from .flow_matching import FlowMatching
from .forms import EDM, AverageVelocity, DataPrediction, Form, ScaledVelocity, Shortcut, TrigFlow
from .hybrid import Hybrid
from .improved_meanflow import ImprovedMeanFlow, ImprovedMeanFlowOutput
from .inductive_moment_matching import InductiveMomentMatching
from .likelihood import LikelihoodOutput, NoisyFlow, TarFlowLikelihood, TarFlowSampler, density, score
from .meanflow import MeanFlow
from .objective import Loss, Networks, Objective, ObjectiveOutput, Terms
from .path import Angle, BridgePath, Clock, Cosine, Linear, LinearPath, NoiseLevel
from .pixel_meanflow import PixelMeanFlow
from .rows import Net, Rows
from .scm import ContinuousConsistencyDistillation, ContinuousConsistencyTraining, RegularizedConsistency
from .shortcut import ShortcutModel
from .split_meanflow import SplitMeanFlow
from .terminal_velocity import TerminalVelocityMatching
from .time_samplers import LogitNormal, TimeSampler, Uniform
from .velocities import AveragedVelocity, DataVelocity, TargetVelocity, TeacherVelocity, velocity_option
from .weights import LogVariance, adaptive_error

__all__ = [
    "EDM",
    "AlignYourFlow",
    "AlphaFlow",
    "Angle",
    "AverageVelocity",
    "AveragedVelocity",
    "BridgePath",
    "Clock",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ConsistencyTrajectory",
    "ContinuousConsistencyDistillation",
    "ContinuousConsistencyTraining",
    "Control",
    "Controlled",
    "Cosine",
    "DataPrediction",
    "DataVelocity",
    "DecoupledMeanFlow",
    "Draws",
    "EasyConsistency",
    "EulerianDistillation",
    "EulerianSelfDistillation",
    "FlowMatching",
    "Form",
    "Hybrid",
    "ImprovedConsistencyTraining",
    "ImprovedMeanFlow",
    "ImprovedMeanFlowOutput",
    "InductiveMomentMatching",
    "LagrangianDistillation",
    "LagrangianSelfDistillation",
    "LikelihoodOutput",
    "Linear",
    "LinearPath",
    "LogVariance",
    "LogitNormal",
    "Loss",
    "MeanFlow",
    "Net",
    "Networks",
    "NoiseLevel",
    "NoisyFlow",
    "Objective",
    "ObjectiveOutput",
    "PixelMeanFlow",
    "ProgressiveFlowMapMatching",
    "ProgressiveSelfDistillation",
    "RegularizedConsistency",
    "Rows",
    "ScaledVelocity",
    "Shortcut",
    "ShortcutModel",
    "SplitMeanFlow",
    "TarFlowLikelihood",
    "TarFlowSampler",
    "TargetVelocity",
    "TeacherVelocity",
    "TerminalVelocityMatching",
    "Terms",
    "TimeSampler",
    "TrigFlow",
    "Uniform",
    "adaptive_error",
    "density",
    "score",
    "velocity_option",
]
