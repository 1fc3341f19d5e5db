from .op import gated_residual, gated_residual_ada_layer_norm

__all__ = ["gated_residual", "gated_residual_ada_layer_norm"]
