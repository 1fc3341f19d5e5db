"""Consistency trajectory models (CTM, arXiv 2310.02279): consistency of jumps to any level, and denoising."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_velocity
from ..errors import UsageError
from ..options import choice, option
from ..registry import register
from ..sampling import FewSteps, Sampling, sampler_option
from .draws import Draws
from .forms import EDM, Form
from .objective import Networks, Objective, Terms
from .pairs import SIGMA_MAX, karras_levels
from .path import LEVELS
from .rows import Net, Rows, forget_autocast
from .velocities import heun_step
from .weights import mean_square, squared_norm


@register("objectives", "ctm")
@dataclass(frozen=True)
class ConsistencyTrajectory(Objective):
    """‖X⁻_{r→0}(X_{t→r}(z_t)) − X⁻_{r→0}(sg X_{s→r}(z_s))‖²/D + λ_DSM·‖x̂ − x‖²/D, X⁻ of an averaged network.

    z_s is a teacher's solution from z_t, by Heun's method over the grid, or the averaged network's own jump. The
    gradient goes through the averaged network's input. The authors compare images by LPIPS, weigh the two terms by
    their gradients and add a discriminator; here the distance is the mean square, and the weight fixed.

    Args:
        self_learned: z_s is the averaged network's own jump, without a teacher
        sigma_min, sigma_max, rho, scales: the grid of noise levels
        heun_steps: largest number of grid steps from t to s, drawn with weights proportional to it; as many are
            computed in any case, so that every training step is the same graph
        dsm_mean, dsm_std: of ln σ in half of the denoising term
        dsm_share: share of the grid, from its noisy end, in the other half
        dsm_weight: factor of the denoising term
        target_ema: of the averaged network
        label_dropout: share of samples trained without their label, in [0, 1]
        form: what the network returns
        sampling: how images are drawn
    """

    paper = ("2310.02279",)
    formula = "X⁻_{r→0}(X_{t→r}(z_t)) → X⁻_{r→0}(X_{s→r}(z_s)), z_s by a teacher; and x̂ → x"
    ratio = 1.0
    conditions = ("s", "dsm_t", "dsm_noise")

    self_learned: bool = False
    sigma_min: float = option(0.002, low=0.0, above=True)
    sigma_max: float = option(80.0, low=0.0, above=True)
    rho: float = option(7.0, low=1.0)
    scales: int = option(18, low=3)
    heun_steps: int = option(17, low=1)
    dsm_mean: float = -1.2
    dsm_std: float = option(1.2, low=0.0, above=True)
    dsm_share: float = option(0.7, low=0.0, high=1.0)
    dsm_weight: float = option(1.0, low=0.0)
    target_ema: float = option(0.999, low=0.0, high=1.0, below=True)
    label_dropout: float = option(0.0, low=0.0, high=1.0)
    form: Form = choice("forms", lambda: EDM(time_scale=250.0, one_time=False), prefix="form_")
    sampling: Sampling = sampler_option(partial(FewSteps, t_start=SIGMA_MAX, start="scaled"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min >= self.sigma_max:
            raise UsageError(
                f"expected less than sigma_max = {self.sigma_max}, got {self.sigma_min}", field="sigma_min"
            )

    @property
    def teachers(self) -> tuple[str, ...]:
        """Which pretrained networks it needs."""
        return () if self.self_learned else ("frozen",)

    def target_decay(self, step: int) -> float | None:
        """The same at every step."""
        return self.target_ema

    def levels(self, index: Tensor) -> Tensor:
        """Noise levels of the grid by index, (n,) float, the noisiest first."""
        return self.level_at(index / (self.scales - 1))

    def level_at(self, share: Tensor) -> Tensor:
        """Noise levels at shares of the way through the grid, (n,)."""
        return karras_levels(share, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)

    def index_of(self, t: Tensor) -> Tensor:
        """Indices in the grid of times t, (n,)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        share = (LEVELS.of_linear(t.double()) ** (1 / self.rho) - high) / (low - high)  # [n]
        return (share * (self.scales - 1)).round().long()

    def dsm_levels(self, normal: Tensor, uniform: Tensor) -> Tensor:
        """Noise levels of the denoising term, (n + m,), of standard normal numbers (n,) and uniform ones (m,)."""
        return torch.cat([(self.dsm_mean + self.dsm_std * normal).exp(), self.level_at(self.dsm_share * uniform)])

    def draw_times(
        self, n: int, *, step: int = 0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Uniform numbers, of which `draw` makes times."""
        shares = torch.rand(2, n, generator=generator, device=device)  # [2, B]
        return shares[0], shares[1]

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Uniform numbers for s, and the times of the denoising term."""
        place: dict[str, Any] = {"generator": generator, "device": t.device}
        half = len(t) // 2
        normal, uniform = torch.randn(half, **place), torch.rand(len(t) - half, **place)
        dsm_t = LEVELS.to_linear(self.dsm_levels(normal, uniform))  # [B]
        return {"s": torch.rand(len(t), **place), "dsm_t": dsm_t}

    def draw_noises(self, noise: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The noise of the denoising term."""
        return {"dsm_noise": torch.randn(noise.shape, generator=generator, device=noise.device, dtype=noise.dtype)}

    def draw(self, shape: Sequence[int], **options: Any) -> Draws:
        """As `Objective.draw`: t and r of the grid, and s a number of grid steps below t that is the same for all."""
        draws = super().draw(shape, **options)
        share, most = draws.conditions["s"][:1].double(), self._most  # [1]
        steps = (((1 + 4 * share * most * (most + 1)).sqrt() - 1) / 2).ceil().clamp(1, most)  # weights 1, 2, …, most
        i = (draws.t * (self.scales - steps)).floor()  # [B]
        j = i + steps + (draws.r * (self.scales - steps - i)).floor()  # [B]
        t, s, r = (LEVELS.to_linear(self.levels(index)).float() for index in (i, i + steps, j))  # [B] each
        return dataclasses.replace(draws, t=t, r=r, conditions={**draws.conditions, "s": s})

    @property
    def _most(self) -> int:
        """The largest number of grid steps from t to s."""
        return min(self.heun_steps, self.scales - 1)

    def sampled(self, net: Net) -> Net:
        """u that is asked for no time below sigma_min, which is the data's."""
        return Floored(super().sampled(net), self.sigma_min / (1 + self.sigma_min))

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """Consistency and denoising, both predictions in one pass."""
        assert nets.ema is not None
        B, s, ema = len(b.z), b.conditions["s"], nets.ema
        denoised = b.at(b.conditions["dsm_t"], noise=b.conditions["dsm_noise"])
        out = b.joined(denoised).predict()  # [2·B, …]
        u, u_dsm = out[:B], out[B:]
        least = torch.full_like(b.t, self.sigma_min / (1 + self.sigma_min))  # [B]
        to_end = b.column(b.r - least)  # [B, 1, …]
        X = b.z - b.gap * u  # [B, …], X_{t→r}(z_t)
        estimate = X - to_end * check_velocity("u", ema(X, least, b.r, b.y), X)  # [B, …]; the gradient is that of X
        with torch.no_grad():
            z_s = self._solved(b, s, nets)  # [B, …]
            X_s = z_s - b.column(s - b.r) * check_velocity("u", b.net(z_s, b.r, s, b.y), z_s)  # [B, …]
            target = X_s - to_end * check_velocity("u", ema(X_s, least, b.r, b.y), X_s)  # [B, …]
            forget_autocast(X.device)
        consistency = (1 + self.sigma_min) ** 2 * mean_square(estimate - target)  # [B], of images
        sigma = LEVELS.of_linear(denoised.t)  # [B]
        weight = 1 / sigma.square() + 1 / self.form.sigma_data**2  # [B]
        away = denoised.z - b.column(denoised.t) * u_dsm - b.x  # [B, …]
        dsm = weight.to(away.dtype) * mean_square(away)  # [B]
        per_sample = consistency + self.dsm_weight * dsm  # [B]
        images = {"estimate": (1 + self.sigma_min) * estimate, "target": (1 + self.sigma_min) * target}
        metrics = {"squared_error": squared_norm(images["estimate"].detach() - images["target"])}
        return Terms(per_sample, metrics, u, None, b.v, {**images, "z_s": z_s, "consistency": consistency, "dsm": dsm})

    def _solved(self, b: Rows, s: Tensor, nets: Networks) -> Tensor:
        """z_s, (B, …)."""
        if self.self_learned:
            assert nets.ema is not None
            return b.z - b.column(b.t - s) * check_velocity("u", nets.ema(b.z, s, b.t, b.y), b.z)
        assert nets.frozen is not None
        first, last, z = self.index_of(b.t), self.index_of(s), b.z  # [B] each, [B, …]
        for i in range(self._most):  # after s is reached, steps of no length
            now, after = (self.levels(torch.minimum(first + j, last).double()) for j in (i, i + 1))  # [B] each
            z = heun_step(nets.frozen, z, b.y, *(LEVELS.to_linear(level).to(b.t.dtype) for level in (now, after)))
        return z


class Floored:
    """u(z, max(r, least), max(t, least), y) of a network u."""

    def __init__(self, net: Net, least: float) -> None:
        self.module, self.least = net, least

    def __call__(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Any:
        """(B, …)."""
        return self.module(z, r.clamp_min(self.least), t.clamp_min(self.least), y)
