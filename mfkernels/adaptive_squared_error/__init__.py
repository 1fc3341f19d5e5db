from .op import AdaptiveSquaredError, adaptive_squared_error

__all__ = ["AdaptiveSquaredError", "adaptive_squared_error"]
