"""torchvision, which timm and diffusers import, beside a CPU build of PyTorch.

PyPI's torchvision is built for CUDA. Without it its compiled operators do not load, and importing it fails where it
describes two of them. Naming those two is enough for what timm and diffusers use of it.
"""

import sys

import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
