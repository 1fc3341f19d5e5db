"""What of this library needs a newer PyTorch than the oldest one it works with."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

COMPILES = TORCH >= (2, 11)
NO_COMPILE = "torch.compile of this library needs torch 2.11, see README.md"
needs_compile = pytest.mark.skipif(not COMPILES, reason=NO_COMPILE)

SHARDS = TORCH >= (2, 7)  # torch.cpu.Stream lacks record_event before
needs_sharding = pytest.mark.skipif(not SHARDS, reason="FSDP2 on a CPU needs torch 2.7")
