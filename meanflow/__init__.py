"""MeanFlow: train and sample one-step generative models."""

from .sampling import sample, sample_ode

__version__ = "0.1.0"

__all__ = ["sample", "sample_ode"]
