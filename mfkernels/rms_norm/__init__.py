from .module import RMSNorm
from .op import rms_norm

__all__ = ["RMSNorm", "rms_norm"]
