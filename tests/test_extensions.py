"""Components from outside the package, as CONTRIBUTING.md shows them: trained, resumed, sampled and evaluated."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from damage import seal
from safetensors.torch import load_file, save_file

from meanflow import cli, registry
from meanflow.config import Config
from meanflow.errors import UsageError
from meanflow.objectives import Networks
from meanflow.training import list_checkpoints, load_checkpoint, load_network
from meanflow.training.checkpoint import Checkpoint
from meanflow.training.log import read_log

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
MODULES = ("my_objective", "my_weight", "my_backbone", "my_data")
FLAGS = "--device cpu --threads 1 --log-every 1 --checkpoint-every 2"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, and what is registered or imported in the test forgotten after it."""
    monkeypatch.chdir(tmp_path)
    for kind in registry._HOMES:
        registry.names(kind)  # what is this package's own stays
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "_known", {kind: dict(known) for kind, known in registry._known.items()})
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def write_modules(folder: Path) -> None:
    for name in MODULES:
        (source,) = re.findall(rf"```python\n(# {name}\.py.*?)```", TEXT, re.DOTALL)
        (folder / f"{name}.py").write_text(source)


@pytest.fixture
def package(here, monkeypatch):
    """The package of CONTRIBUTING.md, installed."""
    site = here / "site"
    info = site / "my_methods-1.0.dist-info"
    info.mkdir(parents=True)
    write_modules(site)
    (points,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (info / "entry_points.txt").write_text(points.replace('project.entry-points."', "").replace('"', ""))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    return here


def newest(name: str) -> Checkpoint:
    return load_checkpoint(list_checkpoints(Path("runs") / name / "checkpoints")[-1])


def run(line: str) -> int:
    return cli.main(line.split())


def test_an_installed_package_adds_an_objective_a_backbone_a_data_source_and_a_recipe(package, capsys):
    assert run(f"train checkers --width 8 --scale 0.5 --count 32 --ratio 0.5 --time-std 2 {FLAGS}") == 0
    saved = yaml.safe_load(Path("runs/checkers/config.yaml").read_text())
    assert saved["objective"]["name"] == "pseudo-huber"
    assert (saved["objective"]["scale"], saved["objective"]["time_sampler"]["std"]) == (0.5, 2.0)
    assert saved["model"] == {"name": "Conv", "width": 8, "spectral_norm": False}
    assert saved["data"]["count"] == 32
    assert run("train --resume --name checkers --steps 6") == 0
    rows = read_log(Path("runs/checkers/log.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "squared_error"} < row.keys() for row in rows)

    loaded = load_network(Path("runs/checkers"))
    assert (type(loaded.objective).__name__, loaded.objective.scale) == ("PseudoHuber", 0.5)
    assert loaded.class_names == ("even", "odd")
    assert run("sample checkers --labels odd --count 3 --steps 2 --out x.npy") == 0
    assert np.load("x.npy").shape == (3, 1, 8, 8)
    assert run("evaluate checkers") == 0
    report = json.loads(Path("runs/checkers/report.json").read_text())
    assert (report["objective"], report["model"], report["data"]) == ("pseudo-huber", "Conv", "checkers")
    assert report["frechet_distance"] >= 0

    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("train checkers --help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "error at which the loss turns from a square to a norm (default: 1.0)" in text
    assert run("train digits --scale 2") == 2
    said = capsys.readouterr().err
    assert "scale: expected only with objective pseudo-huber or weighted, got objective meanflow" in said


def test_a_resumed_run_of_its_own_objective_has_the_curve_of_one_that_was_not_stopped(package):
    line = f"train checkers {FLAGS} --no-evaluate --name"
    assert run(f"{line} whole") == 0
    assert run(f"{line} parts --steps 2") == 0
    assert run("train --resume --name parts --steps 4") == 0
    whole, parts = ([row["loss"] for row in read_log(Path("runs") / name / "log.jsonl")] for name in ("whole", "parts"))
    assert whole == parts


def test_what_an_objective_learns_is_trained_saved_and_resumed(package, capsys):
    line = f"train checkers --objective weighted {FLAGS} --no-evaluate --name"
    assert run(f"{line} whole") == 0
    assert run(f"{line} parts --steps 2") == 0
    (first,) = list_checkpoints(Path("runs/parts/checkpoints"))
    assert run("train --resume --name parts --steps 4") == 0
    whole, parts = newest("whole"), newest("parts")
    for of in ("model", "ema", "optimizer", "learned"):
        saved, resumed = getattr(whole, of), getattr(parts, of)
        assert saved.keys() == resumed.keys()
        assert all(torch.equal(saved[name], resumed[name]) for name in saved), of
    assert {"learned|of_time.weight|exp_avg", "out.weight|exp_avg"} < whole.optimizer.keys()
    assert whole.learned.keys() == {"of_time.weight", "of_time.bias"}
    assert all((whole.learned[name] != load_checkpoint(first).learned[name]).all() for name in whole.learned)
    assert run("sample parts --count 1 --out x.npy") == 0

    (list_checkpoints(Path("runs/parts/checkpoints"))[-1] / "learned.safetensors").unlink()
    capsys.readouterr()
    assert run("train --resume --name parts --steps 5") == 2
    said = capsys.readouterr().err
    assert "cannot read runs/parts/checkpoints/step_00000004/learned.safetensors" in said
    assert f"{first} is intact" in said


def test_what_an_objective_learns_is_asked_for_where_no_trainer_hands_it_over(package):
    objective = Config.of(objective="weighted", model="Conv").objective
    net = registry.find("models", "Conv")(input_size=8, in_channels=1, num_classes=2)
    net.num_classes = 2
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 2
    with pytest.raises(
        TypeError, match=r"nets: expected Networks\(learned=module\), with the module that Weighted.learned_module"
    ):
        objective(net, x, y)
    learned = objective.learned_module()
    objective(net, x, y, nets=Networks(learned=learned)).loss.backward()
    assert learned.of_time.weight.grad.abs().sum() > 0


def test_an_objective_may_have_nothing_to_learn(package):
    weighted = registry.find("objectives", "weighted")
    plain = type("Plain", (weighted,), {"learned_module": lambda self: None, "terms": weighted.__mro__[1].terms})
    net = registry.find("models", "Conv")(input_size=8, in_channels=1, num_classes=2)
    net.num_classes = 2
    assert plain()(net, torch.randn(4, 1, 8, 8), torch.arange(4) % 2).loss.isfinite()


def test_a_checkpoint_of_an_objective_that_learned_is_not_resumed_by_one_that_does_not(package, capsys, monkeypatch):
    line = f"train checkers --objective weighted {FLAGS} --no-evaluate --steps 2"
    assert run(line) == 0
    weighted = registry.find("objectives", "weighted")
    with monkeypatch.context() as patched:
        patched.setattr(weighted, "learned_module", lambda self: None)
        patched.setattr(weighted, "terms", weighted.__mro__[1].terms)
        assert run("train --resume --name checkers --steps 3") == 2
    assert "objective: runs/checkers/checkpoints/step_00000002 has learned parameters" in capsys.readouterr().err
    path = list_checkpoints(Path("runs/checkers/checkpoints"))[-1]
    learned = load_file(path / "learned.safetensors")
    save_file({**learned, "of_time.bias": learned["of_time.bias"] * torch.nan}, path / "learned.safetensors")
    seal(path, json.loads((path / "state.json").read_text()))
    assert run("train --resume --name checkers --steps 3") == 2
    assert "learned.safetensors: of_time.bias: expected finite numbers" in capsys.readouterr().err


def test_a_module_in_the_working_directory_needs_no_package(here, capsys):
    write_modules(here)
    named = "--objective my_objective:PseudoHuber --model my_backbone:Conv --data my_data:Checkers"
    line = f"train {named} --scale 3 --steps 2 --batch-size 8 --name mine {FLAGS}"
    assert run(line) == 0
    assert run("train --resume --name mine --steps 3") == 2
    assert "--trust-code" in capsys.readouterr().err
    assert run("sample mine") == 2
    assert run("sample mine --labels 0 --count 1 --out x.npy --trust-code") == 0
    assert run("train --resume --name mine --steps 3 --trust-code") == 0
    assert load_network(Path("runs/mine"), trust_code=True).objective.scale == 3.0
    # the options of what a saved run or a file names are flags too
    assert run("train --resume --name mine --steps 4 --scale 5 --trust-code") == 0
    assert load_network(Path("runs/mine"), trust_code=True).objective.scale == 5.0
    Path("mine.yaml").write_text("{objective: 'my_objective:PseudoHuber', model: DiT, data: digits, name: file}")
    assert run(f"train --config mine.yaml --scale 7 --trust-code --steps 0 {FLAGS}") == 2
    assert "steps: expected at least 1, got 0" in capsys.readouterr().err
    assert run("train --config mine.yaml --scale 7") == 2
    assert "mine.yaml names the function 'my_objective:PseudoHuber'" in capsys.readouterr().err


def test_an_installed_package_that_does_not_import_is_left_out_and_named(package, capsys, caplog):
    Path("site/my_objective.py").write_text("1 / 0")
    with pytest.raises(SystemExit):
        run("train digits --help")
    assert "--norm-p" in capsys.readouterr().out
    assert [record.getMessage() for record in caplog.records if "left out" in record.getMessage()] == [
        f"objectives {name} is left out: cannot import {module}, which {name} is: division by zero"
        for name, module in (("pseudo-huber", "my_objective:PseudoHuber"), ("weighted", "my_weight:Weighted"))
    ]
    assert run("train digits --objective pseudo-huber") == 2
    assert "objective: cannot import my_objective:PseudoHuber" in capsys.readouterr().err


def test_a_name_of_two_packages_is_left_out_and_both_are_named(package, capsys, caplog):
    shutil.copytree("site/my_methods-1.0.dist-info", "site/theirs-1.0.dist-info")
    Path("site/theirs-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    with pytest.raises(SystemExit):
        run("sample --help")
    assert "--omega" in capsys.readouterr().out
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("objectives weighted")]
    assert len(said) == 1
    assert "my_weight:Weighted of my-methods" in said[0]
    assert "my_weight:Weighted of theirs" in said[0]


def test_a_run_to_resume_is_not_looked_for_by_the_value_of_a_flag(here, capsys):
    Path("runs/digits").mkdir(parents=True)
    Path("runs/digits/config.yaml").write_text("objective: 'nothing:Here'\n")
    assert run("train --resume --data digits") == 2
    assert "resume: runs/default does not exist" in capsys.readouterr().err
    assert run("train digits --config=") == 2
    assert "cannot read ." in capsys.readouterr().err


def test_a_files_preset_is_checked_where_a_flag_has_another(here, capsys):
    Path("a.yaml").write_text("preset: [digits]\n")
    assert run("train digits --config a.yaml") == 2
    assert "a.yaml: preset: expected one of" in capsys.readouterr().err


def test_the_objective_is_what_it_says(package):
    objective = Config.of(objective="pseudo-huber", scale=0.5, label_dropout=0.0).objective
    net = registry.find("models", "Conv")(input_size=8, in_channels=1, num_classes=2).double()
    net.num_classes = 2
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 2
    t, r = torch.rand(2, 6, dtype=torch.float64).sort(dim=0).values.flip(0)
    e = torch.randn_like(x)
    out = objective.loss_at(net, x=x, noise=e, t=t, r=r, y=y)
    z, h = (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * e, 1e-5

    def u(s):  # along the flow
        return net(z + s * (e - x), r, t + s, y)

    target = (e - x) - (t - r).view(-1, 1, 1, 1) * (u(h) - u(-h)) / (2 * h)
    expected = ((u(0.0) - target).square().sum((1, 2, 3)) + 0.25).sqrt() - 0.5
    torch.testing.assert_close(out.per_sample, expected.detach(), rtol=1e-7, atol=0)


def test_names_are_unique_and_kinds_are_known(here):
    with pytest.raises(ValueError, match="objectives has another component of the name 'meanflow'"):
        registry.register("objectives", "meanflow")(object)
    with pytest.raises(ValueError, match="kind: expected one of codecs, data"):
        registry.register("objective", "x")
    with pytest.raises(UsageError, match=r"objective: expected one of .*meanflow.*, got 'meanflw'"):
        Config.of(objective="meanflw")
    with pytest.raises(UsageError, match="objective: cannot import nothing of 'nothing:Here'"):
        Config.of(objective="nothing:Here")
