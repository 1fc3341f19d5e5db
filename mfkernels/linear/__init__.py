from .module import Linear
from .op import linear

__all__ = ["Linear", "linear"]
