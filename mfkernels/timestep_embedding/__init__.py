from .module import TimestepEmbedder
from .op import timestep_embedding

__all__ = ["TimestepEmbedder", "timestep_embedding"]
