"""Normalizing flows: trained by the likelihood of noisy images, sampled in one pass and denoised (arXiv 2412.06329)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..checks import check_floating, check_label_range, check_labels, check_velocity, num_classes_of
from ..errors import NetworkError
from ..options import Options, option
from ..registry import register
from ..sampling import Sampling, sampler_option
from .draws import Draws
from .objective import Networks, Objective, Terms
from .rows import Net, Rows


class Density(NamedTuple):
    """What a flow says of a batch.

    z: (B, …) the noise that the images are mapped to.
    log_det: (B,) logarithm of the Jacobian's determinant, per dimension.
    nll: (B,) −log p per dimension, less ½·ln 2π: ½·mean z² − log_det.
    """

    z: Tensor
    log_det: Tensor
    nll: Tensor


def density(net: Callable[..., Any], x: Tensor, y: Tensor) -> Density:
    """The density of images x (B, …) with labels y (B,) under a flow z, log_det = net(x, r, t, y).

    Raises:
        NetworkError: the network returns something else.
    """
    never = torch.zeros(x.shape[0], device=x.device)  # [B] a flow has no times
    out = net(x, never, never, y)
    if not isinstance(out, tuple) or len(out) != 2:
        raise NetworkError(f"net: expected it to return (z, log_det), got {type(out).__name__}")
    z, log_det = check_velocity("z", out[0], x), out[1]  # [B, …], [B]
    if not isinstance(log_det, Tensor) or log_det.shape != x.shape[:1]:
        found = tuple(log_det.shape) if isinstance(log_det, Tensor) else type(log_det).__name__
        raise NetworkError(f"net: expected log_det of shape ({x.shape[0]},), got {found}")
    return Density(z, log_det, z.square().flatten(1).mean(dim=1) / 2 - log_det)


def score(net: Callable[..., Any], x: Tensor, y: Tensor) -> Tensor:
    """∇ log p(x | y) of a flow, (B, …), by autograd; the weights get no gradient.

    Args:
        net, x, y: as in `density`.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_p = -density(net, x, y).nll * x[0].numel()  # [B]
        (gradient,) = torch.autograd.grad(log_p.sum(), x)  # [B, …]
    return gradient


@dataclass(frozen=True)
class NoisyFlow:
    """A flow and what its images hold beside the data, as `TarFlowSampler` needs it.

    net: z, log_det = net(x, r, t, y), with a method `reverse`.
    noise_std: standard deviation of the noise on the images that it was trained with.
    """

    net: Net
    noise_std: float

    @property
    def num_classes(self) -> int | None:
        """Of the network; None: it names none."""
        return num_classes_of(self.net)


@register("samplers", "tarflow")
@dataclass(frozen=True)
class TarFlowSampler(Options):
    """The inverse of a flow, patch by patch, and one step of denoising (arXiv 2412.06329, §3.3 and §3.4).

    Args:
        guidance_scale: classifier-free guidance; 1 is none (the paper's w is this less 1)
        annealed: guidance grows from patch to patch, up to its scale at the last one
        guide: what is guided, log-scale and shift (ab), or one of them
        attention_temperature: of the attention without label that guidance moves away from
        denoise: remove the noise that the flow was trained with, by one step along the score
    """

    sweep: ClassVar[tuple[str, tuple[float, ...]] | None] = None
    outputs: ClassVar[tuple[str, ...]] = ("z", "log_det")

    guidance_scale: float = option(1.0, low=0.0)
    annealed: bool = True
    guide: Literal["ab", "a", "b"] = "ab"
    attention_temperature: float = option(1.0, low=0.0, above=True)
    denoise: bool = True

    @torch.no_grad()
    def draw(self, net: Any, noise: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, H, W) images of labels y (B,) from standard normal noise (B, C, H, W).

        The density p is of images with noise of standard deviation σ on them, so by Tweedie's formula x + σ²·∇ log p(x)
        is the mean of the images that x may be a noisy version of.

        Args:
            net: what `TarFlowLikelihood.sampled` gives; with denoise=False a network with a method `reverse` as well.
            generator: not read: all that is random is in `noise`.

        Raises:
            NetworkError: `net` is none of these.
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        check_floating("noise", noise)
        check_labels(y, noise.shape[0] if noise.ndim else 0, "noise")
        check_label_range(y, net)
        flow = net.net if isinstance(net, NoisyFlow) else net
        reverse = getattr(flow, "reverse", None)
        if reverse is None:
            raise NetworkError(f"net: expected a flow with a method reverse (TarFlow), got {type(flow).__name__}")
        if self.denoise and not isinstance(net, NoisyFlow):
            raise NetworkError(
                "net: expected objective.sampled(net), which knows the noise that it was trained with, or denoise=False"
            )
        x: Tensor = reverse(
            noise,
            y,
            guidance_scale=self.guidance_scale,
            annealed=self.annealed,
            guide=self.guide,
            attention_temperature=self.attention_temperature,
        )  # [B, C, H, W]
        if self.denoise and net.noise_std > 0:
            x = x + net.noise_std**2 * score(flow, x, y)  # [B, C, H, W]
        return x

    def __str__(self) -> str:
        words = "inverse flow"
        if self.guidance_scale != 1.0:
            words += f", guidance scale {self.guidance_scale:g} of {self.guide}{' annealed' if self.annealed else ''}"
            if self.attention_temperature != 1.0:
                words += f", attention temperature {self.attention_temperature:g}"
        return words + (", denoised" if self.denoise else "")


@dataclass(frozen=True, kw_only=True)
class LikelihoodOutput:
    """All that one evaluation of `TarFlowLikelihood` gives, in the caller's row order.

    loss: () mean of `per_sample`, differentiable.
    per_sample: (B,) ½·mean z² − log_det, detached.
    z: (B, C, H, W) the noise that the noisy images are mapped to, detached.
    log_det: (B,) logarithm of the Jacobian's determinant per dimension, detached.
    """

    loss: Tensor
    per_sample: Tensor
    z: Tensor
    log_det: Tensor


@register("objectives", "tarflow")
@dataclass(frozen=True)
class TarFlowLikelihood(Objective):
    """Negative log-likelihood of noisy images under a normalizing flow, per dimension (arXiv 2412.06329, equation 7).

    Args:
        label_dropout: share of samples trained without their label, in [0, 1]
        noise_std: standard deviation of the noise on the images, whose density is learned; 0: none
        sampling: how images are drawn

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    paper = ("2412.06329",)
    formula = "largest likelihood of noisy images, ½·mean z² − log det"
    ratio = 0.0
    outputs = ("z", "log_det")
    metrics = ("z_square", "log_det")

    label_dropout: float = option(0.1, low=0.0, high=1.0)
    noise_std: float = option(0.05, low=0.0)
    sampling: Sampling = sampler_option(TarFlowSampler)

    def draw_times(
        self, n: int, *, step: int = 0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """A flow has no times: zeros, (n,), twice."""
        t = torch.zeros(n, device=device)  # [B]
        return t, t

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """½·mean z² − log_det at x + noise_std·noise."""
        found = density(b.net, b.x + self.noise_std * b.noise, b.y)
        metrics = {"z_square": found.z.detach().square().flatten(1).mean(dim=1), "log_det": found.log_det.detach()}
        return Terms(found.nll, metrics, found.z, None, found.z)  # no velocity

    def _output(self, net: Net, x: Tensor, y: Tensor, draws: Draws, nets: Networks | None) -> LikelihoodOutput:
        terms, order = self._terms(net, x, y, draws, nets)
        back = order.argsort()
        return LikelihoodOutput(
            loss=terms.per_sample.mean(),
            per_sample=terms.per_sample.detach()[back],
            z=terms.u.detach()[back],
            log_det=terms.metrics["log_det"][back],
        )

    def loss_at(  # type: ignore[override]
        self, net: Net, *, x: Tensor, noise: Tensor, y: Tensor, drop: Tensor | None = None
    ) -> LikelihoodOutput:
        """The loss at given draws; nothing random inside.

        Args:
            net: z, log_det = net(x, r, t, y), such as `TarFlow`.
            x: (B, C, H, W) data.
            noise: (B, C, H, W) standard normal noise.
            y: (B,) integer labels.
            drop: (B,) bool, True where the label is dropped; default: nowhere.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        t = torch.zeros(x.shape[:1], device=x.device)  # [B]
        out: LikelihoodOutput = super().loss_at(net, x=x, noise=noise, t=t, r=t, y=y, drop=drop)
        return out

    def sampled(self, net: Net) -> Any:
        """The network with the noise that it was trained with."""
        return NoisyFlow(net, self.noise_std)
