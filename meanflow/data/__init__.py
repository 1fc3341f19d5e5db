"""Data sources, their images, and the batches of a training step."""

from .digits import load_digits_data
from .encoded import read_image
from .folder import load_folder
from .hugging_face import HuggingFace
from .images import ImageData, ImageSource, TensorImages, stratified_split
from .latents import LatentImages, LatentIndex, Latents, is_latents
from .left_out import LeftOut, UnreadableImage
from .loader import batches, micro_batches
from .order import StepOrder, StepSampler, Stream, generator_for, shard
from .points import Points
from .sources import DataSource, Digits, EncodedSource, ImageFolder
from .web_dataset import WebDataset

__all__ = [
    "DataSource",
    "Digits",
    "EncodedSource",
    "HuggingFace",
    "ImageData",
    "ImageFolder",
    "ImageSource",
    "LatentImages",
    "LatentIndex",
    "Latents",
    "LeftOut",
    "Points",
    "StepOrder",
    "StepSampler",
    "Stream",
    "TensorImages",
    "UnreadableImage",
    "WebDataset",
    "batches",
    "generator_for",
    "is_latents",
    "load_digits_data",
    "load_folder",
    "micro_batches",
    "read_image",
    "shard",
    "stratified_split",
]
