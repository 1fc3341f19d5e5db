"""Activation checkpointing on Tensor | Dual that recomputes the primal alone."""

from .checkpoint import checkpoint, checkpoint_module

__all__ = ["checkpoint", "checkpoint_module"]
