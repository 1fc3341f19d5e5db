"""A flow's likelihood: its optimum and its denoising in closed form, and runs of it by the command line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from minimum import needs_compile
from safetensors.torch import load_file
from tiny_runs import TINY, losses, stop_after
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from meanflow import cli
from meanflow.data import load_digits_data
from meanflow.errors import NetworkError, UsageError
from meanflow.models import DiT, TarFlow
from meanflow.objectives import NoisyFlow, TarFlowLikelihood, TarFlowSampler, density, score
from meanflow.training import list_checkpoints, run_training
from mfkernels.testing import relative_error

MEAN, STD, NOISE = 0.7, 0.3, 0.2
SPREAD = math.sqrt(STD**2 + NOISE**2)  # of the noisy images
RUN = TINY.replace(
    model="TarFlow",
    hidden_size=16,
    depth=2,
    layers_per_block=1,
    head_dim=8,
    patch_size=4,
    objective="tarflow",
    sample_guidance_scale=1.5,
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class GaussianFlow(nn.Module):
    """z = (x − mean)/std."""

    num_classes = 1

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, x, r, t, y):
        return (x - self.mean) / self.log_std.exp(), -self.log_std.expand(len(x))

    def reverse(self, z, y, **options):
        return self.mean + self.log_std.exp() * z


def standardised(*shape):
    """Of mean 0 and variance 1, up to rounding."""
    a = torch.randn(*shape, dtype=torch.float64)
    return (a - a.mean()) / a.std(correction=0)


def gaussian_batch(B=50):
    """Data and noise whose sum has exactly the mean and the spread of the noisy images."""
    x, e = standardised(B, 1, 4, 4), standardised(B, 1, 4, 4)
    e = e - (e * x).mean() * x
    e = e / e.std(correction=0)
    return MEAN + STD * x, e, torch.zeros(B, dtype=torch.long)


def test_the_optimum_for_gaussian_data():
    """Its loss is ½ + ½·ln(s² + σ²) per dimension, and no parameter has a gradient there."""
    x, e, y = gaussian_batch()
    net = GaussianFlow(MEAN, SPREAD)
    out = TarFlowLikelihood(noise_std=NOISE).loss_at(net, x=x, noise=e, y=y)
    assert abs(out.loss - (0.5 + math.log(SPREAD))) <= 5e-16  # measured: 2.2e-16
    for gradient in torch.autograd.grad(out.loss, list(net.parameters())):
        assert abs(gradient) <= 1.2e-15  # measured: 5.6e-16
    clean = TarFlowLikelihood(noise_std=0.0).loss_at(GaussianFlow(MEAN, STD), x=x, noise=e, y=y)
    assert abs(clean.loss - (0.5 + math.log(STD))) <= 5e-16


def test_denoising_gives_the_mean_of_the_images():
    """E[x | x + σe] = (s²·y + σ²·mean)/(s² + σ²)."""
    net = GaussianFlow(MEAN, SPREAD)
    z, y = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    noisy = MEAN + SPREAD * z
    assert relative_error(score(net, noisy, y), -(noisy - MEAN) / SPREAD**2) <= 3e-16  # measured: 1.3e-16
    objective = TarFlowLikelihood(noise_std=NOISE)
    wanted = (STD**2 * noisy + NOISE**2 * MEAN) / SPREAD**2
    assert relative_error(objective.sample(net, z, y), wanted) <= 5e-16  # measured: 2.4e-16
    assert torch.equal(objective.sample(net, z, y, denoise=False), noisy)
    assert torch.equal(TarFlowLikelihood(noise_std=0.0).sample(net, z, y), noisy)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_network_whose_scales_are_constant_is_a_gaussian():
    """Four patches of one pixel, two blocks: the first patch of each block is left alone, so those in the middle are
    scaled and shifted twice."""
    a, b = 0.4, -0.3
    net = TarFlow(2, 1, 1, hidden_size=4, depth=2, layers_per_block=1, head_dim=4, num_classes=1).double()
    for block in net.blocks:
        block.proj_out.bias.data.copy_(torch.tensor([a, b], dtype=torch.float64))
    std = torch.tensor([a, 2 * a, 2 * a, a], dtype=torch.float64).exp().view(1, 1, 2, 2)
    mean = torch.tensor([b, b + b * math.exp(a), b + b * math.exp(a), b], dtype=torch.float64).view(1, 1, 2, 2)
    x, y = torch.randn(7, 1, 2, 2, dtype=torch.float64), torch.zeros(7, dtype=torch.long)
    found = density(net, x, y)
    normal = torch.distributions.Normal(mean, std)
    wanted = -normal.log_prob(x).flatten(1).mean(dim=1) - math.log(2 * math.pi) / 2
    assert relative_error(found.nll, wanted) <= 3e-16  # measured: 1.4e-16
    assert relative_error(score(net, x, y), (mean - x) / std**2) <= 7e-16  # measured: 3.3e-16


def test_draws_and_dropped_labels():
    seen = {}

    class Recorded(GaussianFlow):
        num_classes = 5

        def forward(self, x, r, t, y):
            seen.update(x=x, r=r, t=t, y=y)
            return super().forward(x, r, t, y)

    net = Recorded(0.0, 1.0)
    x, y = torch.randn(400, 1, 2, 2, dtype=torch.float64), torch.arange(400) % 5
    objective = TarFlowLikelihood(noise_std=0.3, label_dropout=0.25)
    draws = objective.draw(x.shape, dtype=torch.float64)
    out = objective.evaluate(net, x, y, draws)
    assert (draws.rows, draws.t.abs().sum(), seen["t"].abs().sum(), seen["r"].abs().sum()) == (0, 0, 0, 0)
    assert torch.equal(seen["x"], x + 0.3 * draws.noise)
    assert torch.equal(seen["y"], y.masked_fill(draws.drop, 5))
    assert 60 < draws.drop.sum() < 140
    loss = objective.loss(net, x, y, draws)
    assert set(loss.metrics) == set(objective.metrics)
    assert torch.equal(loss.loss, out.loss)
    assert torch.equal(loss.per_sample, loss.metrics["z_square"] / 2 - loss.metrics["log_det"])
    assert torch.equal(out.z, seen["x"])
    assert torch.equal(out.log_det, torch.zeros_like(out.log_det))


def test_what_does_not_fit():
    x, y = torch.randn(4, 3, 4, 4), torch.zeros(4, dtype=torch.long)
    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 8, "num_classes": 3}
    net, dit = TarFlow(depth=1, layers_per_block=1, head_dim=4, **sizes), DiT(depth=1, num_heads=2, **sizes)
    objective = TarFlowLikelihood()
    for call, error, match in (
        (lambda: objective(dit, x, y), NetworkError, r"net: expected it to return \(z, log_det\), got Tensor"),
        (
            lambda: density(lambda x, r, t, y: (x, x), x, y),
            NetworkError,
            r"log_det of shape \(4,\), got \(4, 3, 4, 4\)",
        ),
        (lambda: density(lambda x, r, t, y: (y, y), x, y), NetworkError, "expected z of the shape of z"),
        (lambda: objective.sample(dit, x, y), NetworkError, r"a flow with a method reverse \(TarFlow\), got DiT"),
        (
            lambda: TarFlowSampler().draw(net, x, y),
            NetworkError,
            r"net: expected objective.sampled\(net\), .* denoise=F",
        ),
        (lambda: objective.sample(net, x, y + 4), ValueError, r'y: expected labels in \[0, 3\], where 3 is "no label"'),
        (lambda: objective.sample(net, x, y[:2]), ValueError, r"y: expected shape \(4,\), the batch of noise"),
        (lambda: TarFlowLikelihood(noise_std=-1.0), UsageError, "noise_std: expected a number >= 0, got -1.0"),
        (lambda: TarFlowSampler(guidance_scale=-1.0), UsageError, "guidance_scale: expected a number >= 0"),
        (lambda: TarFlowSampler(attention_temperature=0.0), UsageError, "attention_temperature: expected a number > 0"),
        (lambda: RUN.replace(sample_guide="c"), UsageError, "sample_guide: expected Literal"),
        (
            lambda: TINY.replace(objective="tarflow").check_fit(),
            UsageError,
            r"trains a network that returns \(z, log_det\), such as TarFlow; got model DiT, which returns \(u\)",
        ),
        (
            lambda: RUN.replace(objective="flow_matching").check_fit(),
            UsageError,
            r"returns \(u\), such as DiT.* got model TarFlow, which returns \(z, log_det\)",
        ),
    ):
        with pytest.raises(error, match=match):
            call()
    assert torch.equal(TarFlowSampler(denoise=False).draw(net, x, y), net.reverse(x, y))
    assert NoisyFlow(net, 0.1).num_classes == 3


def test_in_words():
    assert str(TarFlowSampler()) == "inverse flow, denoised"
    sampler = TarFlowSampler(guidance_scale=2.0, guide="a", attention_temperature=0.5, denoise=False)
    assert str(sampler) == "inverse flow, guidance scale 2 of a annealed, attention temperature 0.5"
    assert str(TarFlowSampler(guidance_scale=2.0, annealed=False)) == "inverse flow, guidance scale 2 of ab, denoised"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("nvp", [True, False])
def test_a_resumed_run_continues_the_same_curve(monkeypatch, accumulate, nvp):
    config = RUN.replace(accumulate=accumulate, nvp=nvp)
    run_training(config.replace(name="whole"))
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 4)
        run_training(config.replace(name="parts"))
    run_training(config.replace(name="parts"), resume=True)
    assert losses("parts") == losses("whole")
    whole, parts = (list_checkpoints(Path("runs") / name / "checkpoints")[-1] for name in ("whole", "parts"))
    for file in ("model", "ema"):
        a, b = load_file(whole / f"{file}.safetensors"), load_file(parts / f"{file}.safetensors")
        assert ("log_var" in a) == (not nvp)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), file


def test_parts_of_a_batch_and_recomputed_blocks_change_nothing():
    run_training(RUN.replace(name="plain"))
    run_training(RUN.replace(name="parts", accumulate=4))
    run_training(RUN.replace(name="recomputed", checkpoint_blocks="all"))
    assert losses("parts") == pytest.approx(losses("plain"), rel=1e-5)
    assert losses("recomputed") == losses("plain")


@needs_compile
def test_a_compiled_run_gives_the_same_losses_and_compiles_once(monkeypatch):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compile(fn, backend=counter, **options))
    run_training(RUN.replace(name="eager"))
    run_training(RUN.replace(name="compiled", compile=True))
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-5)
    assert counter.frame_count == 1


def test_a_step_reads_nothing_on_the_host():
    """On tensors without values, where that is an error: such a step can be recorded as a CUDA graph."""
    data = load_digits_data()
    with FakeTensorMode():
        net, objective = RUN.network(data), RUN.objective
        draws = objective.draw((16, 1, 8, 8), generator=torch.Generator(), spread=True)
        x, y = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)
        objective.loss(net, x, y, draws.part(1, 2)).loss.backward()


def run(line: str) -> int:
    return cli.main(line.split())


def test_by_the_command_line(capsys):
    sizes = "--model TarFlow --hidden-size 16 --depth 2 --layers-per-block 1 --head-dim 8 --patch-size 4"
    line = f"train --data digits --objective tarflow {sizes} --noise-std 0.2 --sample-guidance-scale 1.5"
    assert run(f"{line} --name flow --steps 2 --batch-size 8 --log-every 1 --device cpu") == 0
    assert run("train --resume --name flow --steps 4") == 0
    report = json.loads(Path("runs/flow/report.json").read_text())
    assert (report["objective"], report["model"], report["steps"]) == ("tarflow", "TarFlow", 4)
    assert report["sampler"] == "inverse flow, guidance scale 1.5 of ab annealed, denoised"
    assert report["frechet_distance"] >= 0
    rows = [json.loads(row) for row in Path("runs/flow/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == pytest.approx(row["z_square"] / 2 - row["log_det"], rel=1e-5)

    def images(flags=""):
        assert run(f"sample flow --labels 1,2 --count 2 --out x.npy {flags}") == 0
        return np.load("x.npy")

    assert images().shape == (4, 1, 8, 8)
    assert np.array_equal(images(), images("--guidance-scale 1.5 --annealed --denoise"))
    assert not np.array_equal(images(), images("--no-denoise"))
    assert run("evaluate flow --guidance-scale 1 --samples 20") == 0
    capsys.readouterr()
    assert run("sample flow --steps 2 --out x.npy") == 2
    assert "steps: expected only with --sampler consistency or" in capsys.readouterr().err
