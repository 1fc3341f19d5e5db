from .module import Mlp
from .op import mlp

__all__ = ["Mlp", "mlp"]
