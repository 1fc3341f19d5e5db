"""`--sampler`: in training, in sampling and evaluation, from saved runs, and of somebody else's."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from damage import seal

from meanflow import cli, sample
from meanflow.config import Config
from meanflow.config_file import read_config
from meanflow.data import Stream, generator_for
from meanflow.objectives import EDM, MeanFlow
from meanflow.sampling import ConsistencySteps, FewSteps, GammaSteps, GuidedSteps, OdeSteps, sample_gamma
from meanflow.training import list_checkpoints, load_network
from meanflow.training.network import LoadedNetwork

TINY = (
    "--model DiT --hidden-size 16 --depth 1 --num-heads 2 --patch-size 4 --batch-size 8 --log-every 1 --device cpu "
    "--steps 1"
)
MINE = """
from dataclasses import dataclass
import torch
from meanflow.options import Options, option

@dataclass(frozen=True)
class Grey(Options):
    \"\"\"One grey.

    Args:
        value: the grey
    \"\"\"

    sweep = None
    value: float = option(0.5)

    def draw(self, net, noise, y, *, generator=None):
        return torch.full_like(noise, self.value)
"""


def run(line: str) -> int:
    try:
        return cli.main(shlex.split(line))
    except SystemExit as stop:
        return int(stop.code or 0)


def fails(line: str, capsys, *words: str) -> None:
    capsys.readouterr()
    assert run(line) == 2
    err = capsys.readouterr().err
    for word in words:
        assert word in err, err


def images(line: str) -> np.ndarray:
    assert run(f"sample {line} --labels 1,2 --count 2 --out x.npy") == 0
    return np.load("x.npy")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of MeanFlow, which is drawn from by γ-sampling."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert run(f"train digits {TINY} --sampler gamma --sample-steps 3 --sample-gamma 0.25") == 0
        yield folder
        torch.set_num_threads(threads)


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def test_a_run_keeps_its_sampler(here):
    saved = yaml.safe_load(Path("runs/digits/config.yaml").read_text())
    assert saved["objective"]["sampling"]["name"] == "gamma"
    loaded = load_network(Path("runs/digits"))
    assert loaded.objective.sampling == GammaSteps(3, gamma=0.25)
    assert json.loads(Path("runs/digits/report.json").read_text())["sampler"] == (
        "gamma 0.25 by noise_level, 3 network evaluations"
    )
    config, _ = read_config(Path("runs/digits/config.yaml"))
    assert config.objective == loaded.objective
    assert config.replace(sample_gamma=0.5).objective.sampling == GammaSteps(3, gamma=0.5)
    assert config.replace(sampler="ode").objective.sampling == OdeSteps()


@pytest.mark.parametrize(
    "flags",
    [
        "--sampler jumps --steps 2 --guidance-scale 1.5 --guidance-t-max 0.6",
        "--sampler jumps --times 0.994 0.5 0 --start scaled",
        "--sampler jumps --schedule karras --t-start 0.9 --steps 3",
        "--sampler consistency --clip --sigma-min 0.002",
        "--sampler gamma --gamma 0.5 --rule time",
        "--sampler ode --steps 2 --method euler",
        "--sampler sde --steps 3 --diffusion sin2 --diffusion-scale 0.5",
    ],
)
def test_every_sampler_draws_from_a_run(here, flags):
    first = images(f"digits {flags}")
    assert first.shape == (4, 1, 8, 8)
    assert np.isfinite(first).all()
    assert np.array_equal(first, images(f"digits {flags}"))
    assert not np.array_equal(first, images(f"digits {flags} --seed 1"))
    assert not np.array_equal(first, images("digits"))


def test_another_sampler_starts_from_its_own_defaults(here):
    assert np.array_equal(images("digits"), images("digits --sampler gamma --gamma 0.25 --steps 3"))
    assert np.array_equal(images("digits --sampler consistency"), images("digits --gamma 1 --steps 2"))
    assert np.array_equal(images("digits --sampler jumps --steps 3"), images("digits --gamma 0"))
    report = Path("runs/digits/report.json").read_text()
    assert run("evaluate digits --sampler jumps --samples 20") == 0
    assert run("evaluate digits --sampler gamma --samples 20") == 0
    assert Path("runs/digits/report.json").read_text() == report


def test_what_is_wrong_with_a_sampler_is_said(here, capsys):
    fails("sample digits --sampler heun", capsys, "sampler: expected one of", "gamma, jumps", "got 'heun'")
    fails("sample digits --omega 2", capsys, "omega: expected only with --sampler guided; gamma, the sampler of runs")
    fails("sample digits --sampler ode --gamma 1", capsys, "gamma: expected only with --sampler gamma or guided; ode")
    fails("sample digits --times 1 2", capsys, "times: expected a number in [0, 1], got 2.0")
    fails("sample digits --schedule karras", capsys, "t_start: expected less than 1")
    fails("evaluate digits --sampler consistency --sigma-min 9", capsys, "sigma_min: expected at most 1")
    fails("train digits --sampler heun", capsys, "sampler: expected one of")
    fails("train digits --sample-omega 2", capsys, "sample_omega: expected only with sampler guided, got sampler jumps")
    fails("train digits --sample-times 0 1", capsys, "sample_times: expected at least two times that never increase")
    capsys.readouterr()
    for command in ("sample", "evaluate", "train digits"):
        run(f"{command} --help")
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "how images are drawn: consistency, gamma, jumps, guided, ode, sde" in text


def test_a_sampler_of_your_own(here, capsys):
    Path("greys.py").write_text(MINE)
    assert (images("digits --sampler greys:Grey --value 0.25") == 0.25).all()
    assert run(f"train digits {TINY} --no-evaluate --name grey --sampler greys:Grey --sample-value 0.75") == 0
    fails("sample grey", capsys, "greys:Grey", "--trust-code")
    assert (images("grey --trust-code") == 0.75).all()


def older(folder: Path) -> None:
    """A run's files as they were before a sampler had a name, when it had these options alone."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["objective"]["sampling"] = {
        name: config["objective"]["sampling"][name]
        for name in ("steps", "omega", "t_min", "t_max", "method", "guidance_scale")
        if name in config["objective"]["sampling"]
        and not (name == "guidance_scale" and config["objective"]["name"] == "meanflow")
    }
    path.write_text(yaml.safe_dump(config))
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        state = json.loads((checkpoint / "state.json").read_text())
        state["objective"]["sampling"] = config["objective"]["sampling"]
        seal(checkpoint, state)


@pytest.mark.parametrize(
    ("flags", "sampling"),
    [
        ("--objective meanflow --sample-steps 4", FewSteps(4)),
        ("--objective imf --sample-omega 3 --model iMF-DiT --depth 2 --aux-head-depth 1", GuidedSteps(omega=3.0)),
        ("--objective flow_matching --sample-method euler", OdeSteps(method="euler")),
    ],
)
def test_older_runs_load(tmp_path, monkeypatch, flags, sampling):
    monkeypatch.chdir(tmp_path)
    assert run(f"train --data digits {TINY} {flags} --no-evaluate --name old --sample-every 0") == 0
    now = images("old")
    older(Path("runs/old"))
    assert np.array_equal(images("old"), now)
    assert load_network(Path("runs/old")).objective.sampling == sampling
    assert run("train --resume --name old --steps 2") == 0
    saved = yaml.safe_load(Path("runs/old/config.yaml").read_text())
    assert saved["objective"]["sampling"]["steps"] == sampling.steps
    assert load_network(Path("runs/old")).objective.sampling == sampling


@pytest.mark.parametrize(
    ("text", "sampling"),
    [
        ("{sample_steps: 2}", FewSteps(2)),
        ("{objective: imf, sample_interval: [0.1, 0.9]}", GuidedSteps(t_min=0.1, t_max=0.9)),
        ("{sampler: consistency, sample_times: [1, 0.4, 0]}", ConsistencySteps(times=(1.0, 0.4, 0.0))),
        ("objective: {name: flow_matching, sampling: {method: euler}}", OdeSteps(method="euler")),
        ("objective: {name: flow_matching, sampling: {name: gamma, gamma: 1}}", GammaSteps(gamma=1.0)),
        ("objective: {sampling: consistency}", ConsistencySteps()),
    ],
)
def test_files_name_a_sampler_or_none(tmp_path, text, sampling):
    (tmp_path / "mine.yaml").write_text(text)
    config, _ = read_config(tmp_path / "mine.yaml")
    assert config.objective.sampling == sampling
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert read_config(tmp_path / "whole.yaml")[0] == config
    assert Config.of(**config.values()) == config


def small_network(objective) -> LoadedNetwork:
    config = Config.of(data="digits", model="DiT", hidden_size=16, depth=1, num_heads=2, patch_size=4)
    torch.manual_seed(0)
    net = config.network(config.data.load()).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)  # zero-initialised layers would hide the times
    return LoadedNetwork(net, objective, tuple("0123456789"), None, Path("x"))


def test_generated_images_depend_on_the_seed_alone():
    loaded = small_network(MeanFlow(sampling=GammaSteps(3)))
    labels = torch.arange(6)
    before = torch.get_rng_state()
    drawn = loaded.generate(labels, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, loaded.generate(labels, seed=5))
    generator = generator_for(5, Stream.SAMPLES)
    noise = torch.randn(6, *loaded.latent_shape, generator=generator)
    assert torch.equal(drawn, sample_gamma(loaded.net, noise, labels, steps=3, generator=generator))
    jumps = loaded.generate(labels, seed=5, sampler="jumps", steps=2)
    assert torch.equal(jumps, sample(loaded.net, noise, labels, steps=2))


def test_images_are_drawn_from_the_network_in_its_form():
    class Consistency(MeanFlow):
        form = EDM()

    objective = Consistency()
    loaded = small_network(objective)
    labels = torch.arange(4)
    noise = torch.randn(4, *loaded.latent_shape, generator=generator_for(0, Stream.SAMPLES))
    drawn = loaded.generate(labels)
    assert torch.equal(drawn, objective.sample(loaded.net, noise, labels))
    assert not torch.allclose(drawn, sample(loaded.net, noise, labels))
