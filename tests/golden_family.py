"""The authors' own values of the other methods: python -m tests.golden_family FILE.npz…

Takes every constant from the file, drives the public objectives, forms and samplers with its data, draws and weights in
float64, and prints each quantity's relative error ‖ours − theirs‖/‖theirs‖. The exit code is 0 if all are at most 1e-9,
1 otherwise. What the arrays are: golden/README.md of the project's notes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meanflow.convert import tarflow_state_dict
from meanflow.models import TarFlow, patchify, unpatchify
from meanflow.objectives import (
    EDM,
    AlphaFlow,
    Angle,
    AverageVelocity,
    ConsistencyTraining,
    ConsistencyTrajectory,
    ContinuousConsistencyDistillation,
    ContinuousConsistencyTraining,
    Cosine,
    DecoupledMeanFlow,
    EasyConsistency,
    Linear,
    LinearPath,
    LogitNormal,
    Networks,
    NoiseLevel,
    RegularizedConsistency,
    ScaledVelocity,
    Shortcut,
    ShortcutModel,
    TarFlowLikelihood,
    TerminalVelocityMatching,
    TrigFlow,
)
from meanflow.objectives.rules import flow_map
from meanflow.sampling import karras_times, sample, sample_consistency, sample_gamma, uniform_times

BOUND = 1e-9
PATH, LEVELS = LinearPath(), NoiseLevel()
Quantities = Iterator[tuple[str, Any]]


class Tiny(nn.Module):
    """The network of golden/README.md, which sees of its times what `times` makes of (r, t)."""

    def __init__(self, file: File, part: str, times: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        weights = file.weights(part)
        self.W = nn.ParameterDict({name: nn.Parameter(weights[name]) for name in ("W1", "b1", "W2", "b2", "W3", "b3")})
        self.num_classes, self.times = int(file.setting["num_classes"]), times
        self.requires_grad_(part == "param")

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor, beta: Tensor | None = None) -> Tensor:
        seen = [*self.times(r, t), *([] if beta is None else [beta])]
        labels = len(self.W["W1"]) - z[0].numel() - len(seen)
        one_hot = torch.eye(self.num_classes + 1, dtype=z.dtype)[y][:, :labels]
        h = torch.cat([z.flatten(1), torch.stack(seen, dim=1), one_hot], dim=1)
        for i in "12":
            h = torch.tanh(h @ self.W[f"W{i}"] + self.W[f"b{i}"])
        return (h @ self.W["W3"] + self.W["b3"]).view_as(z)


def one_time(r: Tensor, t: Tensor) -> list[Tensor]:
    return [t]


def two_times(r: Tensor, t: Tensor) -> list[Tensor]:
    return [t, r]


def time_and_gap(r: Tensor, t: Tensor) -> list[Tensor]:
    return [t, t - r]


class File:
    """A file's arrays as tensors, and its settings."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.setting = {
            name.removeprefix("setting/"): bytes(a).decode() if a.dtype == np.uint8 and a.ndim else a.item()
            for name, a in self.arrays.items()
            if name.startswith("setting/")
        }

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def weights(self, part: str) -> dict[str, Tensor]:
        names = [name for name in self.arrays if name.startswith(f"{part}/")]
        return {name.removeprefix(f"{part}/"): self[name] for name in names}

    def samples(self, prefix: str) -> list[str]:
        """Names of the samples that begin so, without what belongs to them."""
        belongs = ("_latents", "_noise", "_times", "_mid", "_labels", "_ts", "_steps")
        names = [name for name in self.arrays if name.startswith(f"sample_{prefix}")]
        return [name for name in names if not any(mark in name for mark in belongs)]

    def of(self, name: str, what: str, otherwise: Any = None) -> Any:
        """A setting of one sample."""
        return self.setting.get(f"{name}_{what}", otherwise)

    def noises(self, name: str) -> list[Tensor]:
        """The noises of a sample, in their order."""
        found = [other for other in self.arrays if other.startswith(f"{name}_noise_")]
        return [self[other] for other in sorted(found, key=lambda other: int(other.rpartition("_")[2]))]


def drawn(file: File, prefix: str, draw: Callable[..., Tensor], **options: Any) -> Quantities:
    """The samples whose name begins so: draw(noise, y, name=, noises=) with their own noise."""
    for name in file.samples(prefix):
        first = next(f"{name}_{word}" for word in ("latents", "noise", "noise_0") if f"{name}_{word}" in file)
        y = file[f"{name}_labels"] if f"{name}_labels" in file else file["labels"][: len(file[name])]
        fresh = [noise for i, noise in enumerate(file.noises(name)) if i or first != f"{name}_noise_0"]
        yield name, draw(file[first], y, name=name, noises=fresh, **options)


def levels_as_times(levels: Any) -> list[float]:
    """Noise levels as times of the linear path."""
    return LEVELS.to_linear(torch.as_tensor(levels, dtype=torch.float64)).tolist()


def gradients(
    net: Tiny, loss: Tensor, learned: nn.Module | None = None, *, prefix: str = "grad", by: int = 1
) -> Quantities:
    """Gradients of `by` times the loss."""
    own = {name.removeprefix("W."): p for name, p in net.named_parameters()}
    if learned is not None:
        own["logvar"] = learned.weight
    found = torch.autograd.grad(by * loss, list(own.values()), retain_graph=True, materialize_grads=True)
    yield from ((f"{prefix}/{name}", a) for name, a in zip(own, found, strict=True))


def shortcut(file: File) -> Quantities:
    s, B = file.setting, len(file["x"])
    rows = B // s["bootstrap_every"]
    guidance = s["cfg_scale"] if s["bootstrap_cfg"] else 1.0
    objective = ShortcutModel(
        timesteps=s["denoise_timesteps"],
        guidance=guidance,
        target_ema=0.999 if s["bootstrap_ema"] else 0.0,
        form=Shortcut(timesteps=s["denoise_timesteps"]),
    )
    net, ema = (Tiny(file, part, lambda r, t: [t, r]) for part in ("param", "ema"))

    def arranged(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first[:rows], second[: B - rows]])

    x, y = arranged(file["x"], file["x"]), arranged(file["labels"], file["labels"])
    noise = arranged(file["noise_bst"], file["noise_fm"])
    drop = arranged(torch.zeros(rows, dtype=torch.bool), file["drop"].bool())
    steps = arranged(objective.composed(torch.arange(rows), rows), torch.full((B,), s["denoise_timesteps"])).double()
    t, r = objective.times(arranged(file["t_index_bst"], file["t_index_fm"]).double(), steps)
    nets = Networks(ema=ema if s["bootstrap_ema"] else None)
    out = objective.loss_at(net, x=x, noise=noise, t=t, r=r, y=y, drop=drop, nets=nets)
    z, form = objective.path.point(x, noise, t), objective.form
    k, tau = form.told(r, t)
    yield from {"x_t": z, "t": tau, "dt_base": k}.items()
    yield "labels_in", torch.where(objective.dropped(drop, t, r), net.num_classes, y)
    yield "v_t", form.output_of(out.others["u_tgt"], z, t)
    yield "v_prime", form.output_of(out.u, z, t)
    yield "loss_per_row", out.per_sample
    yield "loss_bootstrap", out.per_sample[:rows].mean()
    yield "loss_flow", out.per_sample[rows:].mean()
    yield "loss", out.loss
    yield from gradients(net, out.loss)

    def draw(noise: Tensor, y: Tensor, name: str, noises: Any) -> Tensor:
        steps = int(name.removesuffix("_cfg").rpartition("_")[2])
        return objective.sample(ema, noise, y, steps=steps, guidance_scale=file.of(name, "scale", 1.0))

    yield from drawn(file, "", draw)


def ect(file: File) -> Quantities:
    s = file.setting
    objective = EasyConsistency(
        stage_factor=s["q"],
        gap_scale=s["k"],
        gap_slope=s["b"],
        huber=s["c"],
        time_sampler=LogitNormal(s["P_mean"], s["P_std"]),
        form=EDM(sigma_data=s["sigma_data"]),
        eval_sigma_min=s["sigma_min"],
    )
    net = Tiny(file, "param", one_time)
    t = objective.time_sampler.of(file["normal_t"])
    pairs = objective.partner(t, s["stage"])
    partner = pairs["s"]
    x, noise = file["x"], file["noise"]
    draws = {"x": x, "noise": noise, "t": t, "r": torch.zeros_like(t), **pairs}
    out = objective.loss_at(net, y=file["labels"], **draws)
    for name, time in (("t", t), ("r", partner)):
        level = LEVELS.of_linear(time)
        yield name, level
        yield f"x_{name}", LEVELS.state(PATH.point(x, noise, time), level)
    yield "F_t", objective.form.output_of(out.u, PATH.point(x, noise, t), t)
    yield from {"D_t": out.others["f"], "target": out.others["f_tgt"]}.items()
    yield from {"loss_per_row": out.per_sample, "loss": out.loss}.items()
    yield from gradients(net, out.loss)

    def draw(noise: Tensor, y: Tensor, name: str, noises: list[Tensor]) -> Tensor:
        times = [*levels_as_times(file[f"{name}_times"]), 0.0]
        return sample_consistency(objective.sampled(net), noise, y, times=times, start="scaled", noises=noises)

    yield from drawn(file, "", draw)


def ct(file: File) -> Quantities:
    s = file.setting
    objective = ConsistencyTraining(
        sigma_min=s["sigma_min"],
        sigma_max=s["sigma_max"],
        rho=s["rho"],
        start_scales=s["schedule_start_scales"],
        end_scales=s["schedule_end_scales"],
        total_steps=s["schedule_total_steps"],
        start_ema=s["schedule_start_ema"],
        distance=s["loss_norm"],
        weight=s["weight_schedule"],
        form=EDM(sigma_data=s["sigma_data"], sigma_min=s["sigma_min"], time_scale=250.0),
    )
    net, target = (Tiny(file, part, one_time) for part in ("param", "target"))
    index = file["indices"].double()
    levels = [objective.levels(index + i, s["num_scales"]) for i in (0, 1)]
    t, partner = (LEVELS.to_linear(level) for level in levels)
    x, noise = file["x"], file["noise"]
    draws = {"x": x, "noise": noise, "t": t, "r": torch.zeros_like(t), "s": partner}
    out = objective.loss_at(net, y=file["labels"], nets=Networks(ema=target), **draws)
    for name, time, level in zip(("t", "t2"), (t, partner), levels, strict=True):
        yield name, level
        yield f"x_{name}", LEVELS.state(PATH.point(x, noise, time), level)
    yield from {"f_t": out.others["f"], "f_t2": out.others["f_tgt"]}.items()
    yield from {"loss_per_row": out.per_sample, "loss": out.loss}.items()
    yield from gradients(net, out.loss)
    steps = [int(k) for k in file["schedule_step"]]
    yield "schedule_scales", torch.tensor([objective.scales(k) for k in steps])
    yield "schedule_ema", torch.tensor([objective.target_decay(k) for k in steps], dtype=torch.float64)

    def draw(noise: Tensor, y: Tensor, name: str, noises: list[Tensor]) -> Tensor:
        indices, scales = torch.zeros(1), 2
        if f"{name}_ts" in file:
            # at the last of them, the least level, no noise is put back
            indices, scales = file[f"{name}_ts"][:-1].double(), int(file[f"{name}_steps"])
        times = [*levels_as_times(objective.levels(indices.double(), scales)), 0.0]
        options: Any = {"sigma_min": s["sigma_min"], "clip": True, "noises": noises[: len(indices) - 1]}
        return sample_consistency(objective.sampled(net), noise, y, times=times, start="scaled", **options)

    yield from drawn(file, "", draw)


def trigonometric(file: File, out: Any, clock: Angle, form: TrigFlow, names: dict[str, str], t: Tensor) -> Quantities:
    """What sCM and rCM have in common, under each file's names."""
    z = PATH.point(file["x"], file["noise"], t)
    theta, a = clock.of_linear(t), out.others["a"]
    yield "theta", theta
    yield names["x"], clock.state(z, theta)
    yield "dx_dt", clock.velocity(a, z, t)
    yield "F", form.output_of(out.u, z, t)
    yield "F_tangent", clock.tangent(out.u, out.du_dt, a, z, t)
    yield "x0_pred", PATH.denoised(out.u, z, t)


def scm(file: File) -> Quantities:
    s = file.setting
    distil = bool(s["use_cd"])
    objective = (ContinuousConsistencyDistillation if distil else ContinuousConsistencyTraining)(
        sigma_data=s["sigma_data"],
        warm_up_steps=s["tangent_warmup_steps"],
        normalisation=s["tangent_warmup_const"],
        norm="mean" if s["g_norm_spatial_invariance"] else "sum",
        prior_weight=bool(s["prior_weighting_enabled"]),
        divide_by_size=bool(s["divide_x_0_spatial_dim"]),
        guidance=s.get("guidance_scale", 1.0),
        form=AverageVelocity(one_time=True),
    )
    net, learned = Tiny(file, "param", one_time), objective.learned_module().double()
    learned.load_state_dict({"weight": file["param/logvar"]})
    frozen = Tiny(file, "teacher", one_time) if distil else None
    t = file["t"]
    draws = {"x": file["x"], "noise": file["noise"], "t": t, "r": torch.zeros_like(t)}
    warm_up = torch.full_like(t, objective.warm_up(s["iteration"]))
    nets = Networks(frozen=frozen, learned=learned)
    out = objective.loss_at(net, y=file["labels"], warm_up=warm_up, nets=nets, **draws)
    form = TrigFlow(sigma_data=s["sigma_data"])
    yield from trigonometric(file, out, objective.clock, form, {"x": "x_hat"}, t)
    yield "logvar", learned(t, t)
    yield "loss_unweighted", out.others["mean_square"]
    yield from {"loss_per_row": out.per_sample, "loss": out.loss}.items()
    yield from gradients(net, out.loss, learned)


def rcm(file: File) -> Quantities:
    s, distil = file.setting, "teacher/W1" in file
    objective = RegularizedConsistency(
        distil=distil,
        warm_up_steps=s["tangent_warmup"],
        guidance=s["teacher_guidance"],
        loss_scale=s["loss_scale"],
        time_sampler=LogitNormal(s["p_mean"], s["p_std"]),
        form=AverageVelocity(time_scale=s["time_scale"], one_time=True),
    )
    net = Tiny(file, "param", one_time)
    frozen = objective.form.wrap(Tiny(file, "teacher", one_time)) if distil else None
    t = objective.time_sampler.of(file["normal_theta"])
    draws = {"x": file["x"], "noise": file["noise"], "t": t, "r": torch.zeros_like(t)}
    warm_up = torch.full_like(t, objective.warm_up(s["iteration"]))
    out = objective.loss_at(net, y=file["labels"], warm_up=warm_up, nets=Networks(frozen=frozen), **draws)
    form = TrigFlow(sigma_data=1.0)
    yield from trigonometric(file, out, objective.clock, form, {"x": "x_theta"}, t)
    yield "loss_per_row", out.per_sample
    yield "loss", len(t) * out.loss  # the authors' is a sum
    yield from gradients(net, out.loss, by=len(t))

    def draw(noise: Tensor, y: Tensor, name: str, noises: list[Tensor]) -> Tensor:
        first = objective.clock.of_linear(torch.tensor(levels_as_times([s["sigma_max"]]), dtype=torch.float64))
        times = [*objective.clock.to_linear(torch.cat([first, file[f"{name}_mid"]])).tolist(), 0.0]
        return sample_consistency(objective.sampled(net), noise, y, times=times, start="sphere", noises=noises)

    yield from drawn(file, "", draw)


def alphaflow(file: File) -> Quantities:
    s = file.setting
    objective = AlphaFlow(
        ratio=1 - s["ratio_fm"],
        omega=s["omega"],
        kappa=s["kappa"],
        guidance_interval=(s["t_min"], s["t_max"]),
        label_dropout=s["label_dropout"],
        clip=s["clamp_utgt"],
        norm_eps=s["adaptive_loss_weight_eps"],
        alpha_start=s["alpha_change_init_steps"],
        alpha_end=s["alpha_change_end_steps"],
        alpha_gamma=s["alpha_gamma"],
        alpha_clamp=s["alpha_clamp_value"],
    )
    net = Tiny(file, "param", two_times)
    x, noise, t, r, y = (file[name] for name in ("x", "noise", "t", "r", "labels"))
    drop = file["drop"].bool() if "drop" in file else torch.zeros(len(t), dtype=torch.bool)
    between = objective.draw_conditions(t, r, step=s["step"])["s"]
    out = objective.loss_at(net, x=x, noise=noise, t=t, r=r, y=y, drop=drop, s=between)
    yield "alpha", torch.tensor(objective.alpha(s["step"]), dtype=torch.float64)
    yield "dt", t - between
    yield "labels_dropped", objective.dropped(drop, t, r)
    yield from {"v_g": out.v, "u_tgt": out.others["u_tgt"], "u": out.u}.items()
    yield from {"loss_per_row": out.per_sample, "loss": out.loss}.items()
    yield from gradients(net, out.loss)
    steps = [int(k) for k in file["schedule_step"]]
    yield "schedule_alpha", torch.tensor([objective.alpha(k) for k in steps], dtype=torch.float64)


def dmf(file: File) -> Quantities:
    s = file.setting
    omega = s["omega"] if s["g_type"] == "mg" else 0.0
    net = Tiny(file, "param", two_times)
    t, r = file["t_mf"], file["r_mf"]
    draws = {
        "x": file["x"],
        "noise": file["noise_mf"],
        "t": t,
        "r": r,
        "t_fm": file["t_fm"],
        "noise_fm": file["noise_fm"],
    }
    for released in (False, True):
        interval = (s["g_min"], s["g_max"])
        objective = DecoupledMeanFlow(omega=omega, guidance_interval=interval, released=released)
        learned = objective.learned_module().double()
        learned.load_state_dict({"weight": file["param/logvar"]})
        nets = Networks(learned=learned)
        out = objective.loss_at(net, y=file["labels"], drop=file["drop"].bool(), nets=nets, **draws)
        if released:
            yield "released_loss", out.loss
            yield from gradients(net, out.loss, learned, prefix="released_grad")
            break
        others = out.others
        yield from {"u": out.u, "u_tgt": others["u_tgt"], "v_g_mf": out.v}.items()
        yield from {"v_fm": others["v_fm"], "v_g_fm": others["v_g_fm"]}.items()
        yield from ((f"logvar_{half}", others[f"log_variance_{half}"]) for half in ("fm", "mf"))
        yield from ((f"loss_{half}", others[f"loss_{half}"]) for half in ("fm", "mf"))
        yield from {"loss_per_row": out.per_sample, "loss": out.loss}.items()
        yield from gradients(net, out.loss, learned)

    def euler(noise: Tensor, y: Tensor, name: str, noises: Any) -> Tensor:
        steps = int(name.removesuffix("_cfg").rpartition("_")[2])
        scale, high = file.of(name, "cfg_scale", 1.0), file.of(name, "g_max", 1.0)
        return sample(net, noise, y, steps=steps, guidance_scale=scale, guidance_interval=(0.0, high))

    def restart(noise: Tensor, y: Tensor, name: str, noises: list[Tensor]) -> Tensor:
        return sample_consistency(net, noise, y, steps=len(noises) + 1, noises=noises)

    def gamma(noise: Tensor, y: Tensor, name: str, noises: list[Tensor]) -> Tensor:
        # 0.9 in golden/README.md, which the file does not hold
        return sample_gamma(net, noise, y, steps=len(noises) + 1, gamma=0.9, rule="dmf", noises=noises)

    yield from drawn(file, "euler", euler)
    yield from drawn(file, "restart", restart)
    yield from drawn(file, "ctm", gamma)


def tvm(file: File) -> Quantities:
    s = file.setting
    lowest = s["cfg"] if "cfg" in s else s["min_cfg"]
    objective = TerminalVelocityMatching(
        omega=lowest,
        omega_max=s.get("max_cfg", 0.0),
        conditioned=True,
        scaled=bool(s["do_scale_param"]),
        detach_tangent=bool(s["detach_jvp"]),
    )
    net, target = (Tiny(file, part, time_and_gap) for part in ("param", "target"))
    t, end = file["t"], file["s"]
    draws = {"x": file["x"], "noise": file["noise"], "t": t, "r": end, "q": file["s_prime"], "beta": file["beta"]}
    nets = Networks(ema=target)
    out = objective.loss_at(net, y=file["labels"], drop=file["drop"].bool(), nets=nets, **draws)
    others = out.others
    yield "z_t", PATH.point(file["x"], file["noise"], t)
    yield "z_s_prime", PATH.point(file["x"], file["noise"], file["s_prime"])
    yield from {"f": others["X"], "df_ds": others["dX_dr"]}.items()
    yield from {"loss_terminal": others["terminal"], "loss_fm": others["instantaneous"]}.items()
    yield from {"loss_per_row": out.per_sample, "loss": out.loss}.items()
    yield from gradients(net, out.loss)
    scale = s["sample_cfg_scale"]
    guided = objective.sampled_at(net, scale)

    def draw(noise: Tensor, y: Tensor, name: str, noises: Any) -> Tensor:
        return sample(guided, noise, y, steps=int(name.rpartition("_")[2]))

    yield from drawn(file, "", draw)


def imm(file: File) -> Quantities:
    s = file.setting
    clock = {"fm": Linear(), "vp_cosine": Cosine()}[s["noise_schedule"]]
    form = ScaledVelocity(
        sigma_data=s["sigma_data"],
        kind=s["f_type"],
        times="t" if s["noise_schedule"] == "fm" else "cosine",
        time_scale=s["time_scale"],
    )
    net = Tiny(file, "param", two_times if s["temb_type"] == "identity" else time_and_gap)
    u = form.wrap(net)
    x, t, end, y = file["x"], file["t"], file["s"], file["labels"]
    time, least = clock.to_linear(t), clock.to_linear(end)
    z = PATH.point(x, s["sigma_data"] * file["noise"], time)
    yield from {"alpha": clock.alpha(t), "sigma": clock.sigma(t)}.items()
    yield "x_t", clock.state(z, t)
    yield "f_st", clock.state(flow_map(u, z, least, time, y), end)
    yield "ddim", clock.state(PATH.between(x, z, time, least), end)

    def draw(noise: Tensor, y: Tensor, name: str, noises: list[Tensor]) -> Tensor:
        steps = int(next(word for word in name.split("_") if word.isdecimal()))
        first, last = clock.to_linear(torch.tensor([s["T"], s["eps"]], dtype=torch.float64)).tolist()
        times = karras_times(steps, first, last)
        if name.endswith("uniform"):
            even = torch.tensor(uniform_times(steps, s["T"], s["eps"]), dtype=torch.float64)
            times = clock.to_linear(even).tolist()
        start = clock.point(noise, torch.full((len(noise),), s["T"], dtype=torch.float64))
        scale = file.of(name, "scale", 1.0)
        if "restart" in name:
            fresh = [s["sigma_data"] * noise for noise in noises]  # the noise of this path
            return sample_consistency(u, start, y, times=times, noises=fresh, guidance_scale=scale)
        return sample(u, start, y, times=times, guidance_scale=scale)

    yield from drawn(file, "pushforward", draw)
    yield from drawn(file, "restart", draw)


def ctm(file: File) -> Quantities:
    s = file.setting
    objective = ConsistencyTrajectory(
        self_learned=bool(s["self_learn"]),
        sigma_min=s["sigma_min"],
        sigma_max=s["sigma_max"],
        rho=s["rho"],
        scales=s["start_scales"],
        heun_steps=s["num_heun_step"],
        dsm_mean=s["dsm_p_mean"],
        dsm_std=s["dsm_p_std"],
        dsm_share=s["diffusion_mult"],
        form=EDM(sigma_data=s["sigma_data"], time_scale=250.0, one_time=False),
    )
    net, target = (Tiny(file, part, two_times) for part in ("param", "target_param"))
    frozen = objective.form.wrap(Tiny(file, "teacher", two_times)) if "teacher/W1" in file else None
    indices = (file["index_t"], file["index_t"] + file["heun_steps"], file["index_s"])
    levels = [objective.levels(index.double()) for index in indices]
    t, partner, r = (LEVELS.to_linear(level) for level in levels)
    dsm = objective.dsm_levels(file["dsm_normal"], file["dsm_uniform"])
    draws = {"x": file["x"], "noise": file["noise"], "t": t, "r": r, "s": partner}
    draws |= {"dsm_t": LEVELS.to_linear(dsm), "dsm_noise": file["dsm_noise"]}
    out = objective.loss_at(net, y=file["labels"], nets=Networks(ema=target, frozen=frozen), **draws)
    others = out.others
    yield from zip(("t", "u", "s"), levels, strict=True)
    yield "dsm_sigma", dsm
    yield "x_t", LEVELS.state(PATH.point(file["x"], file["noise"], t), levels[0])
    yield "x_u", LEVELS.state(others["z_s"], levels[1])
    yield from {"estimate": others["estimate"], "target": others["target"]}.items()
    yield from {"consistency_per_row": others["consistency"], "dsm_per_row": others["dsm"], "loss": out.loss}.items()
    yield from gradients(net, out.loss)

    def draw(noise: Tensor, y: Tensor, name: str, noises: list[Tensor]) -> Tensor:
        times, least = levels_as_times(file[f"{name}_times"]), torch.full((len(noise),), s["sigma_min"]).double()
        if "gamma" not in name:
            z = sample(objective.sampled(net), noise, y, times=times, start="scaled")
        else:
            options: Any = {"gamma": s["gamma"], "noises": noises}
            z = sample_gamma(objective.sampled(net), noise, y, times=times, start="scaled", **options)
        return LEVELS.state(z, least)

    yield from drawn(file, "exact", draw)
    yield from drawn(file, "gamma", draw)


def tarflow(file: File) -> Quantities:
    s = file.setting
    classes = s["num_classes"]
    net = TarFlow(
        input_size=s["img_size"],
        patch_size=s["patch_size"],
        in_channels=s["in_channels"],
        hidden_size=s["channels"],
        depth=s["num_blocks"],
        layers_per_block=s["layers_per_block"],
        head_dim=s["head_dim"],
        mlp_ratio=s["expansion"],
        num_classes=max(classes, 1),
        nvp=bool(s["nvp"]),
        class_conditional=classes > 0,
    ).double()
    net.load_state_dict(tarflow_state_dict(file.weights("param")), strict=False)  # without the prior's variance: 1
    x = file["x"]
    labels = file["labels"] if "labels" in file else torch.full((len(x),), -1)
    draws: Any = {"x": x, "noise": torch.zeros_like(x), "y": labels.clamp_min(0), "drop": labels < 0}
    out = TarFlowLikelihood(noise_std=0.0).loss_at(net, **draws)  # x has its noise already
    yield from {"z": patchify(out.z, s["patch_size"]), "logdets": out.log_det, "loss": out.loss}.items()
    out.loss.backward()
    own = dict(net.named_parameters())
    for name, theirs in tarflow_state_dict(file.weights("grad")).items():
        file.arrays[f"grad/{name}"] = theirs.numpy()  # under our names
        yield f"grad/{name}", own[name].grad
    with torch.no_grad():
        h, y = patchify(x, s["patch_size"]), labels.where(labels >= 0, net.num_classes)
        for i, block in enumerate(net.blocks):
            h, _ = block(h, y)
            yield f"out_{i}", h
    if "var" in file:
        net.load_state_dict(tarflow_state_dict({**file.weights("param"), "var": file["var"]}))
    objective = TarFlowLikelihood(noise_std=s["noise_std"])
    z = unpatchify(file["sample_z"], s["patch_size"], s["img_size"])
    y = file["sample_labels"] if "sample_labels" in file else torch.full((len(z),), -1)
    y = y.where(y >= 0, net.num_classes)
    for name in ("sample", "sample_cfg", "sample_annealed"):
        if name in file:
            options: Any = {
                "guidance_scale": 1 + file.of(name, "guidance", 0.0),
                "annealed": bool(file.of(name, "annealed_guidance", False)),
                "attention_temperature": file.of(name, "attn_temp", 1.0),
                "guide": file.of(name, "guide_what", "ab"),
            }
            yield name, objective.sample(net, z, y, denoise=False, **options)
    if "sample_denoised" in file:
        yield "sample_denoised", objective.sample(net, z, y, guidance_scale=1.0)
    if "var_updated" in file:
        with torch.no_grad():
            net.update_prior(net(x, *torch.zeros(2, len(x)), labels.where(labels >= 0, net.num_classes))[0])
        yield "var_updated", net.log_var.exp()


METHODS = {f.__name__: f for f in (shortcut, ect, ct, scm, rcm, alphaflow, dmf, tvm, imm, ctm, tarflow)}


def error_of(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖/‖theirs‖; without the division where theirs is zero; infinite where the shapes differ."""
    ours, theirs = ours.detach().double(), theirs.double()
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).norm() / (theirs.norm() if theirs.any() else 1.0))


def check(path: Path) -> bool:
    """Print the errors of a file's quantities; whether all are within the bound."""
    method = path.stem.rpartition("_")[0]
    if method not in METHODS:
        print(f"{path}: expected a file named METHOD_CASE.npz with METHOD of {', '.join(METHODS)}")
        return False
    file, fine = File(path), True
    print(path)
    for name, ours in METHODS[method](file):
        error = error_of(ours, file[name])
        within = error <= BOUND  # NaN is not
        fine &= within
        print(f"  {name:32} {error:9.1e}{'' if within else f'  ABOVE {BOUND}'}")
    return fine


def main(arguments: Sequence[str]) -> int:
    """The exit code for these files."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 1
    fine = [check(Path(argument)) for argument in arguments]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
