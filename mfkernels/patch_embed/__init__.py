from .module import PatchEmbed
from .op import patch_embed

__all__ = ["PatchEmbed", "patch_embed"]
