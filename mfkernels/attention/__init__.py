from .module import Attention
from .op import attention

__all__ = ["Attention", "attention"]
