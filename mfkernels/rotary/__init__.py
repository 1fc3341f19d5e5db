from .op import qk_norm_rotary, rotary

__all__ = ["qk_norm_rotary", "rotary"]
