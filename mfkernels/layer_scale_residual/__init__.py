from .op import layer_scale_residual

__all__ = ["layer_scale_residual"]
