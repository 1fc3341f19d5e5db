"""Data sources, their images, and the batches of a training step."""

from .digits import load_digits_data
from .folder import load_folder, read_image
from .images import ImageData, ImageSource, TensorImages, stratified_split
from .left_out import LeftOut, UnreadableImage
from .loader import micro_batches
from .order import StepOrder, StepSampler, Stream, generator_for, shard
from .points import Points
from .sources import DataSource, Digits, ImageFolder

__all__ = [
    "DataSource",
    "Digits",
    "ImageData",
    "ImageFolder",
    "ImageSource",
    "LeftOut",
    "Points",
    "StepOrder",
    "StepSampler",
    "Stream",
    "TensorImages",
    "UnreadableImage",
    "generator_for",
    "load_digits_data",
    "load_folder",
    "micro_batches",
    "read_image",
    "shard",
    "stratified_split",
]
