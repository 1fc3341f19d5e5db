"""Recipes of papers: their values, what they cost, and `meanflow recipes`."""

from __future__ import annotations

import importlib.util
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow import cli, registry
from meanflow.commands.recipes import details
from meanflow.comparison.cost import Step
from meanflow.comparison.estimate import (
    COUNTS,
    Estimate,
    counted,
    described,
    estimate_of,
    flops_per_image,
    rows_of,
)
from meanflow.config import Config, merged
from meanflow.config_file import read_values
from meanflow.recipes import Published, PublishedRecipe, published, recipe
from meanflow.registry import names
from meanflow.training import parameter_count
from meanflow.training.folder import RunFolder

ROOT = Path(__file__).parents[1]
PAPERS = [name for name in names("recipes") if published(name)]
COMMON = {"grad_clip": 0.0, "weight_decay": 0.0, "beta1": 0.9, "accumulate": 1}
MEANFLOW = {
    "objective": "meanflow", "batch_size": 256, "lr": 1e-4, "beta2": 0.95, "warmup_steps": 0, "schedule": "constant",
    "ema_decay": 0.9999, "ratio": 0.25, "time_mean": -0.4, "time_std": 1.0, "norm_p": 1.0, "norm_eps": 0.01,
    "label_dropout": 0.1, "flip": True, "sampler": "jumps",
}  # fmt: skip
IMPROVED = {
    "objective": "imf", "cfg_beta": 1.0, "batch_size": 1024, "lr": 1e-4, "beta2": 0.95, "warmup_steps": 12512,
    "steps": 800_800, "ema_decay": 0.9999, "ratio": 0.5, "omega_max": 8.0, "label_dropout": 0.1, "flip": True,
    "aux_head_depth": 8,
}  # fmt: skip
SIT = {
    "objective": "flow_matching", "batch_size": 256, "lr": 1e-4, "beta2": 0.999, "warmup_steps": 0, "norm_p": 0.0,
    "schedule": "constant", "time_sampler": "uniform", "label_dropout": 0.1, "flip": True, "ema_decay": 0.9999,
    "sampler": "ode", "sample_method": "heun", "sample_steps": 125,
}  # fmt: skip
SHORTCUT = {
    "objective": "shortcut", "form": "shortcut", "batch_size": 256, "steps": 810_000, "lr": 1e-4, "beta2": 0.999,
    "weight_decay": 0.1, "ratio": 1 / 8, "timesteps": 128, "guidance": 1.5, "target_ema": 0.999, "flip": True,
    "label_dropout": 0.1,
}  # fmt: skip
ECT = {
    "objective": "ect", "batch_size": 128, "steps": 100_000, "stage_steps": 25_000, "stage_factor": 4.0, "huber": 0.06,
    "gap_scale": 8.0, "gap_slope": 1.0, "time_mean": -0.8, "time_std": 1.6, "beta2": 0.99, "ema_decay": 0.9999,
    "flip": False, "image_size": 64,
}  # fmt: skip
SCT = {
    "objective": "sct", "batch_size": 2048, "beta2": 0.99, "time_std": 1.6, "normalisation": 0.1, "norm": "sum",
    "warm_up_steps": 10_000, "flip": False, "sigma_data": 0.5,
}  # fmt: skip
# from the papers' tables and the authors' configuration files, apart from those that are shared
VALUES = {
    "DiT-B/4": {**MEANFLOW, "steps": 400_400, "omega": 2.0, "kappa": 0.0, "guidance_interval": (0.0, 1.0)},
    "DiT-B/2": {**MEANFLOW, "steps": 1_201_200, "omega": 1.0, "kappa": 0.5, "guidance_interval": (0.0, 1.0)},
    "DiT-M/2": {**MEANFLOW, "steps": 1_201_200, "omega": 1.0, "kappa": 0.5, "guidance_interval": (0.0, 1.0)},
    "DiT-L/2": {**MEANFLOW, "steps": 1_201_200, "omega": 0.2, "kappa": 0.92, "guidance_interval": (0.0, 0.8)},
    "DiT-XL/2": {**MEANFLOW, "steps": 1_201_200, "omega": 0.2, "kappa": 0.92, "guidance_interval": (0.0, 0.75)},
    "DiT-XL/2+": {
        **MEANFLOW, "model": "DiT-XL/2", "steps": 5_005_000, "omega": 1.0, "kappa": 0.5,
        "guidance_interval": (0.3, 0.8), "sample_steps": 2,
    },
    "iMF-DiT-B/2": {**IMPROVED, "depth": 12, "sample_omega": 8.0, "sample_t_min": 0.4, "sample_t_max": 0.65},
    "iMF-DiT-M/2": {**IMPROVED, "depth": 24, "sample_omega": 10.5, "sample_t_min": 0.4, "sample_t_max": 0.6},
    "iMF-DiT-L/2": {**IMPROVED, "depth": 32, "sample_omega": 10.5, "sample_t_min": 0.4, "sample_t_max": 0.6},
    "iMF-DiT-XL/2": {**IMPROVED, "depth": 48, "sample_omega": 8.0, "sample_t_min": 0.42, "sample_t_max": 0.62},
    "SiT-S/2": {**SIT, "model": "DiT-S/2", "steps": 400_000, "sample_guidance_scale": 1.0},
    "SiT-B/2": {**SIT, "model": "DiT-B/2", "steps": 400_000, "sample_guidance_scale": 1.0},
    "SiT-L/2": {**SIT, "model": "DiT-L/2", "steps": 400_000, "sample_guidance_scale": 1.0},
    "SiT-XL/2": {**SIT, "model": "DiT-XL/2", "steps": 7_000_000, "sample_guidance_scale": 1.5},
    "Shortcut-DiT-B/2": {**SHORTCUT, "model": "DiT-B/2"},
    "Shortcut-DiT-XL/2": {**SHORTCUT, "model": "DiT-XL/2"},
    "ECT-DiT-M/4": {**ECT, "model": "DiT-M/4", "lr": 1e-3},
    "ECT-DiT-L/4": {**ECT, "model": "DiT-L/4", "lr": 9e-4},
    "ECT-DiT-XL/4": {**ECT, "model": "DiT-XL/4", "lr": 8e-4},
    "sCT-DiT-M/4": {**SCT, "model": "DiT-M/4", "lr": 1e-4, "time_mean": -1.0, "steps": 400_000, "image_size": 64},
    "sCT-DiT-L/4": {**SCT, "model": "DiT-L/4", "lr": 9e-5, "time_mean": -1.0, "steps": 400_000, "image_size": 64},
    "sCT-DiT-XL/4": {**SCT, "model": "DiT-XL/4", "lr": 8e-5, "time_mean": -1.0, "steps": 400_000, "image_size": 64},
    "sCT-512-DiT-M/2": {**SCT, "model": "DiT-M/2", "lr": 1e-4, "time_mean": -0.8, "steps": 100_000},
    "sCT-512-DiT-L/2": {**SCT, "model": "DiT-L/2", "lr": 9e-5, "time_mean": -0.8, "steps": 100_000},
    "sCT-512-DiT-XL/2": {**SCT, "model": "DiT-XL/2", "lr": 8e-5, "time_mean": -0.8, "steps": 100_000},
}  # fmt: skip
# in millions: of the network that the paper counts
PARAMETERS = {
    "DiT-B/4": 131, "DiT-B/2": 131, "DiT-M/2": 308, "DiT-L/2": 459, "DiT-XL/2": 676, "DiT-XL/2+": 676,
    "iMF-DiT-B/2": 89, "iMF-DiT-M/2": 174, "iMF-DiT-L/2": 409, "iMF-DiT-XL/2": 610,
    "SiT-S/2": 33, "SiT-B/2": 130, "SiT-L/2": 458, "SiT-XL/2": 675,
}  # fmt: skip


def run(line: str) -> int:
    return cli.main(line.split())


# ------------------------------------------------------------------------------------------------------ what they say


def test_every_recipe_of_a_paper_is_in_the_tests():
    assert sorted(PAPERS) == sorted(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_values_are_the_published_ones(name):
    values = recipe(name).values()
    expected = {**COMMON, **VALUES[name]}
    assert {key: values[key] for key in expected} == expected
    RunFolder.named(values["name"])  # is that of a folder


def test_guidance_in_the_target_has_the_published_effective_scale():
    for name, scale in {"DiT-B/2": 2.0, "DiT-M/2": 2.0, "DiT-L/2": 2.5, "DiT-XL/2": 2.5, "DiT-XL/2+": 2.0}.items():
        objective = recipe(name).objective
        assert objective.omega / (1 - objective.kappa) == pytest.approx(scale, rel=1e-6)


def test_no_two_recipes_write_into_one_folder():
    folders = [recipe(name).run.name for name in names("recipes")]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", VALUES)
def test_networks_have_the_published_size(name):
    reported = published(name)
    with torch.device("meta"):
        net = recipe(name).network(described(reported.shape, reported.num_classes))
    assert parameter_count(net) == estimate_of(name).parameters
    left_out = ("v_heads.", "v_final_layer.") if name.startswith("iMF") else ()  # of training only
    left_out = ("r_embedder.",) if name.startswith("SiT") else left_out  # of networks of two times only
    counts = [p.numel() for key, p in net.named_parameters() if p.requires_grad and not key.startswith(left_out)]
    assert reported.parameters == PARAMETERS.get(name)
    if name in PARAMETERS:
        assert sum(counts) / 1e6 == pytest.approx(PARAMETERS[name], abs=1.0)


def test_networks_that_are_not_the_authors_have_no_figures():
    for name in PAPERS:
        foreign = name.startswith(("ECT", "sCT"))
        assert bool(published(name).fid) != foreign
        assert bool(published(name).table) != foreign
        assert ("Not the authors' network" in published(name).differs) == foreign


@pytest.mark.parametrize(
    ("name", "sigma"), [("ECT-DiT-M/4", 1.526), ("sCT-DiT-M/4", 0.5 * math.tan(1.1)), ("sCT-512-DiT-L/2", 0.98238)]
)
def test_the_second_evaluation_is_at_the_published_noise_level(name, sigma):
    first, second, end = recipe(name).objective.sampling.path()
    assert (first / (1 - first), second / (1 - second), end) == pytest.approx((80, sigma, 0), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["DiT-XL/2+", "iMF-DiT-B/2", "SiT-XL/2", "Shortcut-DiT-B/2", "ECT-DiT-M/4", "sCT-DiT-M/4"]
)
def test_a_small_network_learns_and_draws_as_a_recipe_says(name):
    sizes = {**SMALL, "model": "iMF-DiT", "aux_head_depth": 1} if name.startswith("iMF") else SMALL
    config = recipe(name).replace(**sizes, depth=1, batch_size=16)
    step = Step(config, described((3, 8, 8), 10), None, "cpu")
    (phase,) = step.phases
    assert step(phase).isfinite()
    assert all(p.grad.isfinite().all() for p in step.net.parameters() if p.grad is not None)
    noise, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 9])
    drawn = config.objective.sampling.draw(config.objective.sampled(step.net), noise, y)
    assert drawn.shape == noise.shape
    assert drawn.isfinite().all()


# ---------------------------------------------------------------------------------------------------- what they cost

SMALL = {"hidden_size": 32, "num_heads": 2, "patch_size": 2, "model": "DiT"}
CASES = {
    "meanflow": {"objective": "meanflow", "ratio": 0.25, "omega": 1.0, "kappa": 0.5},
    "meanflow, no own velocity": {"objective": "meanflow", "ratio": 0.25, "omega": 2.0},
    "flow matching": {"objective": "flow_matching"},
    "ect": {"objective": "ect", "stage_steps": 10},
    "sct": {"objective": "sct"},
    "shortcut": {"objective": "shortcut", "form": "shortcut"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_the_cost_of_a_comparison(case):
    """On a network of five blocks and a whole batch, by the counter of `meanflow compare`."""
    config = Config.of(**{**SMALL, **CASES[case]}, depth=5, batch_size=16, steps=40)
    data = described((3, 8, 8), 10)
    with sdpa_kernel(SDPBackend.MATH):  # flash attention's backward makes one product again
        step = Step(config, data, None, "cpu").flops()
    assert flops_per_image(config, data) * 16 == pytest.approx(step, rel=1e-12)


def test_a_network_with_two_heads_is_continued_in_both():
    config = Config.of(**{**SMALL, "model": "iMF-DiT"}, objective="imf", depth=5, aux_head_depth=3, batch_size=2)
    data = described((3, 8, 8), 10)
    with sdpa_kernel(SDPBackend.MATH):
        whole = Step(config, data, None, "cpu").flops() / 2
    assert flops_per_image(config, data) == pytest.approx(whole, rel=1e-12)


def test_rows_are_as_few_as_the_share_of_moved_ones_allows():
    assert rows_of(recipe("DiT-B/4")) == 4
    assert rows_of(recipe("SiT-B/2")) == 1
    assert rows_of(Config.of(objective="meanflow", ratio=0.3)) == 10
    assert rows_of(Config.of(objective="imm")) == 4  # a group


SIZES = {"S": (12, 384), "B": (12, 768), "M": (16, 1024), "L": (24, 1024), "XL": (28, 1152)}


def forward_of(name: str) -> tuple[float, float, float]:
    """Products of a DiT for one image in FLOPs: in all, in attention's two, in layers whose input needs no gradient."""
    channels, side, _ = published(name).shape
    _, _, word = recipe(name).model.name.rpartition("-")
    size, patch = word.split("/")
    (depth, D), p = SIZES[size], int(patch)
    N, pixels = (side // p) ** 2, p * p * channels
    attention = depth * 4 * N * N * D
    block = 2 * N * D * (3 * D + D + 4 * D + 4 * D) + 2 * D * 6 * D
    first = 2 * N * pixels * D + 2 * 2 * 256 * D  # patches; the two times
    rest = 2 * 2 * D * D + 2 * N * D * pixels + 2 * D * 2 * D  # the two times; the last layer
    return attention + depth * block + first + rest, attention, first


@pytest.mark.parametrize("name", [name for name in VALUES if not name.startswith("iMF")])
def test_counts_that_are_kept_are_those_of_a_formula(name):
    F, A, first = forward_of(name)
    train = 3 * F - first
    tangent = F + 1.5 * A  # attention makes each of its products twice, and the scores once more
    objective = recipe(name).objective
    expected = {
        "SiT": train,
        "ECT": train + F,  # the target's forward
        "sCT": train + tangent,
        "Shortcut": train + 4 * F / 8,  # two halves of a step, with a label and without
    }.get(name.split("-")[0].split("/")[0])
    if expected is None:
        own = 0.0 if objective.kappa == 0 else 0.25 * F
        expected = train + 0.25 * tangent + F + own
    learned = 1e-5 if name.startswith("sCT") else 1e-12  # the log-variance's own layers
    assert estimate_of(name).flops == pytest.approx(expected, rel=learned)


def test_a_count_that_is_kept_is_what_is_counted():
    for name in ("DiT-B/4", "SiT-S/2"):
        assert counted(recipe(name), published(name)) == estimate_of(name)
    assert set(json.loads(COUNTS.read_text())) == set(PAPERS)


def test_hours_are_products_over_rate():
    config = Config.of(batch_size=100, steps=36)
    assert Estimate(1, 1e15).hours(config, gpus=2, tflops=500.0) == pytest.approx(1e15 * 100 * 36 / 1e15 / 3600)


# --------------------------------------------------------------------------------------------------------- the command


def test_all_recipes_are_listed(capsys):
    assert run("recipes") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for name in names("recipes"):
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    (line,) = [line for line in lines if line.startswith("DiT-XL/2+ ")]
    words = "DiT-XL/2+ DiT-XL/2 676 M 256 5,005,000 (1,000) 1071 159 2.2 (2) arXiv 2505.13447, table 2"
    assert " ".join(line.split()) == words
    assert "hours on 8 GPUs" in lines[0]
    assert "nobody measured them" in text
    assert "300 TFLOP/s sustained by each of 8 GPUs" in text
    assert "30 % of an H100's bf16 peak" in text
    assert "VAE" in text
    (line,) = [line for line in lines if line.startswith("points ")]
    assert " ".join(line.split()) == "points MLP 256 1,200 45 s of one core"


def test_hours_are_of_the_rate_and_the_number_of_gpus_that_are_given(capsys):
    assert run("recipes DiT-L/2 --gpus 1 --tflops 600") == 0
    text = capsys.readouterr().out
    hours = estimate_of("DiT-L/2").flops * 256 * 1_201_200 / 600e12 / 3600
    assert f"hours     {hours:.0f} on 1 GPU," in text
    assert "torchrun" not in text
    assert "61 % of" in text


def test_all_about_one(capsys):
    assert run("recipes sCT-512-DiT-M/2") == 0
    text = capsys.readouterr().out
    for words in (
        "https://arxiv.org/abs/2410.11081", "4×64×64 latents", "308 M parameters in training", "160 epochs",
        "none is published for this network", "280.2 million parameters", "meanflow train sCT-512-DiT-M/2 --data",
        "torchrun --nproc-per-node 8 -m meanflow train",
    ):  # fmt: skip
        assert words in text
    assert run("recipes digits-imf") == 0
    text = capsys.readouterr().out
    assert "140 s of one core" in text
    assert "  meanflow train digits-imf\n" in text
    assert "nobody measured" not in text


def block(name: str) -> str:
    """The YAML that `meanflow recipes NAME` prints, as it is indented there."""
    _, _, rest = details(name, gpus=8, tflops=300.0).partition("`meanflow train --config FILE`")
    return rest.partition(":\n")[2].partition("\n\n")[0]


@pytest.mark.parametrize("name", names("recipes"))
def test_the_file_that_is_shown_is_the_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values, config = yaml.safe_load(block(name)), recipe(name)
    assert list(values)[:3] == ["data", "model", "objective"]
    if values["data"] in ("FOLDER", "LATENTS"):  # the user's: put in by hand or by --data
        assert merged(Config(), values, {"data": "mine"}) == config.replace(data="mine")
        config = config.replace(data=values["data"])
    assert Config.of(**values) == config
    (tmp_path / "a.yaml").write_text(block(name))
    assert Config.of(**read_values(tmp_path / "a.yaml")) == config


def test_a_recipe_of_encoded_pixels_says_its_codec(monkeypatch):
    config = Config.of(codec="autoencoder", pretrained="somebody/vae", image_size=64)
    monkeypatch.setitem(registry._known["recipes"], "encoded", lambda: config)
    assert Config.of(**yaml.safe_load(block("encoded"))) == config.replace(data="FOLDER")


@pytest.mark.parametrize("name", ["Shortcut-DiT-B/2", "Shortcut-DiT-XL/2"])
def test_shortcut_says_that_its_figures_are_of_weights_without_averaging(name, capsys):
    assert run(f"recipes {name}") == 0
    assert "evaluates the weights without averaging" in capsys.readouterr().out


def test_a_name_that_is_none(capsys):
    assert run("recipes DiT-B/3") == 2
    assert "meanflow recipes: name: expected one of digits" in capsys.readouterr().err
    assert run("recipes --tflops 0") == 2
    assert "tflops: expected a number > 0, got 0" in capsys.readouterr().err
    assert run("recipes --gpus 0") == 2
    assert "gpus: expected at least 1, got 0" in capsys.readouterr().err


def small() -> Config:
    return Config.of(**SMALL, depth=1, objective="flow_matching", batch_size=8, steps=10, name="mine")


def test_a_recipe_of_ones_own_needs_no_paper_and_may_have_one(monkeypatch, capsys):
    monkeypatch.setitem(registry._known["recipes"], "mine", small)
    assert published("mine") is None
    assert estimate_of("mine") is None
    assert "meanflow train mine\n" in details("mine", gpus=8, tflops=300.0) + "\n"
    reported = Published("0000.00000", "something small", (3, 8, 8), "none", {"1": 7.0}, "table 9", num_classes=10)
    monkeypatch.setitem(registry._known["recipes"], "mine", PublishedRecipe(partial(small), reported))
    assert recipe("mine") == small()
    assert run("recipes mine") == 0
    text = capsys.readouterr().out
    assert "FID       7 (1): table 9" in text
    assert "something small" in text


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_of_recipes_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("generate_recipes", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = generate.RECIPES_PAGE.read_text()
    assert text.count(generate.RECIPES_BEGIN) == text.count(generate.END) == 1
    assert generate.recipes_page(text) == text, "run: python docs/generate.py"
    assert sorted(generate.papers()) == sorted(PAPERS)
