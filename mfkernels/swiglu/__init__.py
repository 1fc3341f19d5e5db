from .module import SwiGLU
from .op import swiglu

__all__ = ["SwiGLU", "swiglu"]
