"""What stands in for ImageNet and a pretrained autoencoder: crops of scikit-learn's two photographs, and a small
AutoencoderKL with random weights."""

from pathlib import Path

import torch
import torchvision_stub  # noqa: F401, before diffusers
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.datasets import load_sample_images

FACTOR = 4  # by which the autoencoder divides the sides of an image


def pictures(folder: Path, count: int = 20, side: int = 24) -> Path:
    """`count` photographs of each of two classes, slightly wider than high."""
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            top, left = 11 * k % (427 - side), 37 * k % (640 - side - 8)
            crop = photograph[top : top + side, left : left + side + 8]
            Image.fromarray(crop).save(folder / name / f"{k:04d}.png")
    return folder


def autoencoder(folder: Path, seed: int = 0, **options) -> Path:
    """Latents of 4 channels, a quarter as wide and high as an image; `options` are AutoencoderKL's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            mid_block_add_attention=False,
            **options,
        )
    net.save_pretrained(folder)
    return folder


def import_site(folder: Path) -> str:
    """A folder for PYTHONPATH, with which Python can import diffusers beside a CPU build of PyTorch."""
    folder.mkdir()
    support = str(Path(__file__).parent)
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.path.append({support!r})\nimport torchvision_stub\n")
    return str(folder)
