"""PyPI's torchvision is built for CUDA: beside a CPU build of PyTorch its compiled operators do not load, and importing
it fails where it describes two of them. Naming those two is enough for what timm and diffusers use of it."""

import torch

try:
    torch.ops.torchvision.nms  # noqa: B018
except AttributeError:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
