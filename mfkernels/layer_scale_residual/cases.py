"""What `python -m mfkernels.check` runs of layer_scale_residual."""

from __future__ import annotations

from ..check.case import channel_cases
from .op import layer_scale_residual

CASES = {"layer_scale_residual": channel_cases(layer_scale_residual, lambda x, y, scale: x + y * scale, "x y", "scale")}
