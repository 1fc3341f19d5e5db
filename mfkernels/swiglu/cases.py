"""What `python -m mfkernels.check` runs of swiglu."""

from __future__ import annotations

import torch

from ..check.case import channel_cases
from .op import swiglu

CASES = {
    "swiglu": channel_cases(
        swiglu, lambda a, b: a / (1 + torch.exp(-a)) * b, "a b", timed=((2, 64, 384), (32, 256, 2730))
    )
}
