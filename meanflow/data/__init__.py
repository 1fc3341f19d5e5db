"""What a training step is fed."""

from .digits import load_digits_data
from .folder import load_folder, read_image
from .images import ImageData, ImageSource, TensorImages, stratified_split
from .left_out import LeftOut, UnreadableImage
from .loader import load_data, located, micro_batches
from .order import StepOrder, StepSampler, generator_for, shard

__all__ = [
    "ImageData",
    "ImageSource",
    "LeftOut",
    "StepOrder",
    "StepSampler",
    "TensorImages",
    "UnreadableImage",
    "generator_for",
    "load_data",
    "load_digits_data",
    "load_folder",
    "located",
    "micro_batches",
    "read_image",
    "shard",
    "stratified_split",
]
