"""What of this library needs a newer PyTorch than the oldest one it works with."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

COMPILES = TORCH >= (2, 11)
NO_COMPILE = "torch.compile of this library needs torch 2.11, see README.md"
needs_compile = pytest.mark.skipif(not COMPILES, reason=NO_COMPILE)

needs_compile_of_a_pass = pytest.mark.skipif(TORCH < (2, 12), reason="needs torch 2.12, see dualize/README.md")

SHARDS = TORCH >= (2, 7)  # torch.cpu.Stream lacks record_event before
needs_sharding = pytest.mark.skipif(not SHARDS, reason="FSDP2 on a CPU needs torch 2.7")
