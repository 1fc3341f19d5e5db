from .op import patch_sdpa, scaled_dot_product_attention

__all__ = ["patch_sdpa", "scaled_dot_product_attention"]
