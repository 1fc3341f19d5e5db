from .op import gated_residual, gated_residual_ada_layer_norm
from .stream import ResidualStream

__all__ = ["ResidualStream", "gated_residual", "gated_residual_ada_layer_norm"]
