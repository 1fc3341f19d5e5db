"""Forward-mode ("dual-number") kernels for transformers: output and directional derivative in one pass.

Every function takes tensors or `Dual`s and returns the same kind; only the primal is on the autograd tape.
"""

from .ada_layer_norm import ada_layer_norm
from .adaptive_squared_error import AdaptiveSquaredError, adaptive_squared_error
from .attention import Attention, attention
from .backend import BackendError, requested_backend, use_backend
from .checkpoint import checkpoint, checkpoint_module
from .derivative import jvp
from .dual import Dual, TensorOrDual, dual_aware, is_dual_aware, linear_map, split_map
from .dualize import dualize
from .gated_residual import ResidualStream, gated_residual, gated_residual_ada_layer_norm
from .layer_scale_residual import layer_scale_residual
from .linear import Linear, linear
from .mlp import Mlp, mlp
from .patch_embed import PatchEmbed, patch_embed
from .rms_norm import RMSNorm, rms_norm
from .rotary import qk_norm_rotary, rotary
from .scaled_dot_product_attention import patch_sdpa, scaled_dot_product_attention
from .silu import SiLU, silu
from .swiglu import SwiGLU, swiglu
from .timestep_embedding import TimestepEmbedder, timestep_embedding

__version__ = "0.1.0"

__all__ = [
    "AdaptiveSquaredError",
    "Attention",
    "BackendError",
    "Dual",
    "Linear",
    "Mlp",
    "PatchEmbed",
    "RMSNorm",
    "ResidualStream",
    "SiLU",
    "SwiGLU",
    "TensorOrDual",
    "TimestepEmbedder",
    "ada_layer_norm",
    "adaptive_squared_error",
    "attention",
    "checkpoint",
    "checkpoint_module",
    "dual_aware",
    "dualize",
    "gated_residual",
    "gated_residual_ada_layer_norm",
    "is_dual_aware",
    "jvp",
    "layer_scale_residual",
    "linear",
    "linear_map",
    "mlp",
    "patch_embed",
    "patch_sdpa",
    "qk_norm_rotary",
    "requested_backend",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "silu",
    "split_map",
    "swiglu",
    "timestep_embedding",
    "use_backend",
]
