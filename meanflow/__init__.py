"""MeanFlow: train and sample one-step generative models."""

from typing import TYPE_CHECKING

from .lazy import imported_late

if TYPE_CHECKING:
    from .sampling import sample, sample_ode

__version__ = "0.1.0"

__all__ = ["sample", "sample_ode"]

# PyTorch takes two seconds, which `meanflow --help` has no use for
__getattr__, __dir__ = imported_late(__name__, {"sampling": ["sample", "sample_ode"], "objectives": []})
