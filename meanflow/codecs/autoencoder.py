"""Latents of a pretrained autoencoder, by diffusers' AutoencoderKL (latent diffusion, arXiv 2112.10752)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UsageError
from ..files import reason
from ..options import Options, option
from ..registry import register

CHUNK = 16  # images at a time: one of 256×256 takes 240 MB in the decoder


@register("codecs", "autoencoder")
@dataclass(frozen=True)
class Autoencoder(Options):
    """A pretrained AutoencoderKL of diffusers, such as stabilityai/sd-vae-ft-mse; its weights stay as they are.

    Latents are (sample of the posterior − shift_factor) · scaling_factor, as diffusers' pipelines have them.

    Args:
        pretrained: a repository on the Hugging Face hub, or a folder that save_pretrained has written
        revision: of the repository: a branch, a tag or a commit; None: its newest
        subfolder: of the repository or folder, such as vae of a whole pipeline
        scaling_factor: what latents are multiplied by; None: as the autoencoder's config says
        shift_factor: what is taken from them first; None: as its config says, 0 where it says nothing
        weights_checksum: of its weights, which are refused if they are others; empty: not compared
    """

    pretrained: str = ""
    revision: str | None = None
    subfolder: str = ""
    scaling_factor: float | None = option(None, low=0.0, above=True)
    shift_factor: float | None = option(None)
    weights_checksum: str = option("", flag=False)

    @property
    def mean(self) -> float:
        """The shift factor."""
        shift = self.config["shift_factor"] if self.shift_factor is None else self.shift_factor
        return shift or 0.0

    @property
    def std(self) -> float:
        """One over the scaling factor."""
        return 1.0 / self._scale

    @property
    def _scale(self) -> float:
        return self.config["scaling_factor"] if self.scaling_factor is None else self.scaling_factor

    @property
    def config(self) -> Mapping[str, Any]:
        """diffusers' own description of the autoencoder.

        Raises:
            UsageError: diffusers is not installed, or there is no such autoencoder.
        """
        return _config(self._source)

    @property
    def _source(self) -> _Source:
        return _Source(self.pretrained, self.revision, self.subfolder)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the latents of images of that shape.

        Raises:
            UsageError: the autoencoder takes other images.
        """
        channels, height, width = image_shape
        if channels != self.config["in_channels"]:
            raise UsageError(
                f"{self.pretrained} takes images of {self.config['in_channels']} channels, got {channels}",
                field="codec",
            )
        for side in (height, width):
            if side % self._factor:
                raise UsageError(
                    f"expected a multiple of {self._factor}, by which {self.pretrained} divides it, got {side}",
                    field="image_size",
                )
        return self.config["latent_channels"], height // self._factor, width // self._factor

    def image_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the images of latents of that shape."""
        _, height, width = latent_shape
        return self.config["out_channels"], height * self._factor, width * self._factor

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 2C, H, W) float32: mean and standard deviation of each latent's posterior, neither shifted nor scaled."""
        net = self._network(images.device)
        parts = [net.encode(some.float()).latent_dist for some in images.split(CHUNK)]
        return torch.cat([torch.cat([part.mean, part.std], dim=1) for part in parts]).contiguous()

    def draw(self, posterior: Tensor, noise: Tensor) -> Tensor:
        """(B, C, H, W) float32: latents from a posterior (B, 2C, H, W) and standard normal noise (B, C, H, W)."""
        mean, std = posterior.float().chunk(2, dim=1)
        return (mean + std * noise - self.mean) * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) float32 images of about [-1, 1]."""
        net = self._network(latents.device)
        raw = latents.float() / self._scale + self.mean  # [B, C, H, W]
        return torch.cat([net.decode(some).sample for some in raw.split(CHUNK)]).contiguous()

    @property
    def identity(self) -> Any:
        """Of its latents: checksum and factors, wherever it is; all of it where the checksum is not known."""
        return (self.weights_checksum, self.scaling_factor, self.shift_factor) if self.weights_checksum else self

    def identified(self) -> Autoencoder:
        """The same with every value of its own filled in, and the checksum of its weights."""
        if self.weights_checksum:
            return self
        return replace(
            self,
            scaling_factor=float(self._scale),
            shift_factor=float(self.mean),
            weights_checksum=_checksum(self._source),
        )

    def _network(self, device: torch.device) -> Any:
        if self.weights_checksum and self.weights_checksum != _checksum(self._source):
            raise UsageError(
                f"{self.pretrained} has other weights than the latents were made with: expected the checksum "
                f"{self.weights_checksum}, got {_checksum(self._source)}",
                field="codec",
            )
        return _network(self._source).to(device)


@dataclass(frozen=True)
class _Source:
    """Where an autoencoder is."""

    pretrained: str
    revision: str | None
    subfolder: str

    def load(self, load: Any, **options: Any) -> Any:
        """What one of diffusers' functions loads from there.

        Raises:
            UsageError: there is no such thing.
        """
        if not self.pretrained:
            raise UsageError("expected a folder, or a repository on the hub, such as OWNER/NAME", field="pretrained")
        folder = Path(self.pretrained).expanduser()
        if not folder.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.pretrained):
            raise UsageError(
                f"expected a folder, or a repository on the hub, such as OWNER/NAME; there is no folder {folder}",
                field="codec",
            )
        where = {"revision": self.revision, **({"subfolder": self.subfolder} if self.subfolder else {})}
        try:
            return load(str(folder) if folder.is_dir() else self.pretrained, **where, **options)
        # of a missing file, of damage, of no network
        except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
            place = "folder" if folder.is_dir() else "repository"
            raise UsageError(
                f"cannot load an AutoencoderKL from the {place} {self.pretrained}: {reason(error)}", field="codec"
            ) from error


def absolute_if_there(pretrained: str) -> str:
    """The name of a repository as it is, that of a folder so that it is the same from any working directory."""
    folder = Path(pretrained).expanduser()
    return str(folder.resolve()) if folder.is_dir() else pretrained


def _class() -> Any:
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise UsageError(
            'an autoencoder is loaded by diffusers, which is not installed: pip install "meanflow[latents]"',
            field="codec",
        ) from error
    except (ImportError, RuntimeError) as error:  # of what it imports, such as a torchvision of another PyTorch
        raise UsageError(f"diffusers cannot be imported: {' '.join(str(error).split())}", field="codec") from error
    return AutoencoderKL


@cache
def _config(source: _Source) -> Mapping[str, Any]:
    """With the defaults of what a config does not say."""
    found = source.load(_class().load_config)
    if found.get("_class_name") != "AutoencoderKL":
        raise UsageError(
            f"expected an AutoencoderKL, got {source.pretrained}, {found.get('_class_name')}", field="codec"
        )
    try:
        with torch.device("meta"):
            config = _class().from_config(found).config
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        raise UsageError(
            f"{source.pretrained}: its config makes no AutoencoderKL: {reason(error)}", field="codec"
        ) from error
    for name in ("latents_mean", "latents_std"):
        if config[name] is not None:
            raise UsageError(
                f"expected an autoencoder with one factor for all channels; {source.pretrained} has {name}",
                field="codec",
            )
    return dict(config)


@cache
def _network(source: _Source) -> Any:
    _config(source)
    # never a pickle, which could run code
    return source.load(_class().from_pretrained, use_safetensors=True).float().requires_grad_(False).eval()


@cache
def _checksum(source: _Source) -> str:
    """CRC-32 of all weights and their names."""
    value = 0
    for name, weight in sorted(_network(source).state_dict().items()):
        value = zlib.crc32(weight.cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"
