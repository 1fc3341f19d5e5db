from .module import SiLU
from .op import silu

__all__ = ["SiLU", "silu"]
