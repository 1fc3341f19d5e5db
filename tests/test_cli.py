"""The command line, from flags to files: what it writes, what it says, and its exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from meanflow import __version__, cli
from meanflow.commands.sample import labels_of
from meanflow.config import Config
from meanflow.errors import UsageError
from meanflow.models import DiT, IMFDiT
from meanflow.recipes import recipe
from meanflow.registry import names
from meanflow.training import TrainingError, list_checkpoints
from meanflow.training.log import read_log
from mfkernels import backend

TINY = "--model DiT --hidden-size 16 --depth 1 --num-heads 2 --patch-size 4 --batch-size 8 --log-every 1 --device cpu"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_training(monkeypatch):
    """Commands stop where training would start; the list holds what would have been trained."""
    asked: list[Config] = []

    def refuse(config, **kwargs):
        asked.append(config)
        raise TrainingError("not in this test")

    monkeypatch.setattr("meanflow.commands.train.run_training", refuse)
    return asked


def run(line: str) -> int:
    """Exit code of `meanflow LINE`."""
    try:
        return cli.main(line.split())
    except SystemExit as stop:  # the parsers' way out
        return int(stop.code or 0)


def fails(line: str, capsys, *words: str) -> None:
    """`meanflow LINE` ends with code 2 and one paragraph on stderr that has these words."""
    capsys.readouterr()
    assert run(line) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


def picture(path: Path | str) -> tuple[tuple[int, int], str]:
    """Size and mode of a picture file."""
    with Image.open(path) as image:
        return image.size, image.mode


def make_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def test_a_run_of_the_preset_from_end_to_end(capsys):
    assert run(f"train digits {TINY} --steps 4 --sample-every 2") == 0
    said = capsys.readouterr().out
    assert "runs/digits/samples.png" in said
    assert "class accuracy" in said
    assert "pixel-space Frechet distance" in said
    folder = Path("runs/digits")
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "log.jsonl",
        "samples.png",
        "loss.png",
        "report.json",
        "checkpoints",
    }
    report = json.loads((folder / "report.json").read_text())
    for key in ("class_accuracy", "frechet_distance", "held_out_class_accuracy", "held_out_frechet_distance"):
        assert isinstance(report[key], float)
    assert report["steps"] == 4
    assert report["images_per_second"] > 0
    assert report["seconds"] >= report["training_seconds"] > 0
    assert report["parameters"] > 1000
    assert picture(folder / "samples.png") == ((422, 422), "L")
    assert len(read_log(folder / "log.jsonl")) == 4
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["model"]["hidden_size"], saved["objective"]["kappa"]) == (16, recipe("digits").objective.kappa)

    fails(f"train digits {TINY}", capsys, "runs/digits exists already", "--name", "--resume", "--overwrite")
    assert run("train digits --resume --steps 6") == 0  # the tiny model comes from the saved run, not the preset
    assert len(read_log(folder / "log.jsonl")) == 6

    assert run("sample digits --labels 3,7,1 --count 4 --out grid.png") == 0
    assert picture("grid.png") == ((2 + 4 * 42, 2 + 3 * 42), "L")
    assert run("sample runs/digits --labels 3 --count 4 --steps 2 --seed 5 --out a.npy") == 0
    assert (
        run(f"sample {list_checkpoints(folder / 'checkpoints')[-1]} --labels 3 --count 4 --weights raw --out b.npy")
        == 0
    )
    a, b = np.load("a.npy"), np.load("b.npy")
    assert a.shape == b.shape == (4, 1, 8, 8)
    assert not np.array_equal(a, b)

    capsys.readouterr()
    assert run("evaluate digits") == 0
    assert "held-out real images: 0.9" in capsys.readouterr().out
    after = json.loads((folder / "report.json").read_text())
    assert after["samples"] == 2000
    assert after["steps"] == 6  # what training wrote stays
    for flags in ("--samples 100", "--seed 1", "--steps 2", "--weights raw"):
        assert run(f"evaluate digits {flags}") == 0
        assert "keeps the figures of the standard evaluation" in capsys.readouterr().out
        assert json.loads((folder / "report.json").read_text()) == after

    fails("sample digits --labels 3,11", capsys, "labels: expected class names (0, 1", "'11'")
    fails("sample digits --labels ²", capsys, "'²'")
    fails("sample digits --count 0", capsys, "count: expected at least 1, got 0")
    fails("sample digits --steps 0", capsys, "steps: expected at least 1, got 0")
    fails("sample digits --guidance-scale nan", capsys, "guidance_scale: expected a finite number, got nan")
    fails("evaluate digits --samples 1", capsys, "samples: expected at least 2, got 1")
    fails("sample digits --method euler", capsys, "method: expected only with --sampler ode; jumps, the sampler of")
    fails("sample digits --out nowhere/grid.png", capsys, "no folder", "nowhere")
    fails("sample digits --out grid.xyz", capsys, "cannot write grid.xyz")
    fails("sample nothing", capsys, "nothing does not exist")
    fails("evaluate nothing", capsys, "nothing does not exist")
    fails(f"evaluate {list_checkpoints(folder / 'checkpoints')[-1]}", capsys, "run: expected a run folder")
    fails(f"evaluate {folder / 'config.yaml'}", capsys, "run: expected a run folder")
    Path("folder.png").mkdir()
    fails("sample digits --out folder.png", capsys, "out: expected a file, got the folder folder.png")


def test_a_finished_run_is_left_alone_and_its_seconds_add_up(capsys):
    assert run(f"train digits {TINY} --steps 4") == 0
    folder = Path("runs/digits")
    kept = [folder / name for name in ("config.yaml", "report.json", "log.jsonl")]
    before = [path.read_text() for path in kept]
    for steps in (2, 4):
        capsys.readouterr()
        assert run(f"train --resume --name digits --lr 0.5 --steps {steps}") == 0
        assert f"has 4 steps already, and --steps asks for {steps}: nothing was trained" in capsys.readouterr().out
        assert [path.read_text() for path in kept] == before
    report = json.loads(before[1])
    (folder / "report.json").write_text(json.dumps({**report, "seconds": report["seconds"] + 1000}))
    assert run("train --resume --name digits --steps 5") == 0
    after = json.loads((folder / "report.json").read_text())
    assert after["steps"] == 5
    assert after["seconds"] > report["seconds"] + 1000
    assert after["training_seconds"] < 1000


def test_a_folder_of_images_trains_a_flow_matching_model(tmp_path, capsys):
    make_folder(tmp_path / "pets")
    line = f"train --data pets --image-size 8 --flip --objective flow_matching --name pets {TINY} --steps 2"
    assert run(line) == 0
    report = json.loads(Path("runs/pets/report.json").read_text())
    assert "Heun" in report["sampler"]
    assert report["held_out_class_accuracy"] is None
    assert run("sample pets --labels dog --count 3 --steps 2 --method euler --guidance-scale 2 --out dogs.png") == 0
    assert picture("dogs.png")[1] == "RGB"
    fails("sample pets --labels bird", capsys, "cat, dog", "'bird'")

    (tmp_path / "pets" / "cat" / "broken.png").write_bytes(b"no picture")
    fails(line.replace("--name pets", "--name again"), capsys, "cannot read the image", "broken.png")
    assert not Path("runs/again").exists()


def test_flags_come_before_the_file_and_the_file_before_the_preset(no_training):
    Path("mine.yaml").write_text("lr: 0.5\nsteps: 7\nguidance-interval: [0.2, 0.8]\nflip: true\nhidden_size: null\n")
    assert run("train digits --config mine.yaml --steps 9") == 1
    (config,) = no_training
    expected = recipe("digits").replace(lr=0.5, steps=9, guidance_interval=(0.2, 0.8), flip=True, hidden_size=None)
    assert config == expected


def test_a_saved_configuration_is_a_configuration_file(no_training):
    for preset in map(recipe, names("recipes")):
        Path("saved.yaml").write_text(yaml.safe_dump(preset.to_dict()))
        assert run("train --config saved.yaml") == 1
        assert no_training[-1] == preset


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 3", ["stepz: unknown option", "is it steps?"]),
        ("steps: many", ["steps: expected int", "'many'"]),
        ("steps: 0", ["steps: expected at least 1, got 0"]),
        ("batch_size: 9\naccumulate: 2", ["batch_size: expected a multiple of accumulate = 2"]),
        ("guidance_interval: [0.5]", ["guidance_interval: expected", "[0.5]"]),
        ("flip: 3", ["flip: expected true or false"]),
        ("- 3", ["expected keys and values"]),
        ("a: [", ["cannot read bad.yaml"]),
    ],
)
def test_mistakes_in_a_file_are_named(no_training, capsys, text, words):
    Path("bad.yaml").write_text(text)
    fails("train digits --config bad.yaml", capsys, "bad.yaml", *words)
    assert not no_training


def test_mistakes_on_the_command_line_end_with_code_2(capsys):
    fails("train digits --stepz 3", capsys, "stepz")
    fails("train digits --steps 0", capsys, "steps: expected at least 1, got 0")
    fails("train digits --ratio 3", capsys, "ratio: expected a number in [0, 1]")
    fails("train nothing", capsys, "nothing")
    fails("train None", capsys, "None")  # the default of the field, but no name of a preset
    fails("train", capsys, "meanflow train digits")
    fails("train --data nowhere", capsys, "no folder nowhere")
    fails("train digits --config none.yaml", capsys, "cannot read none.yaml")
    fails("train digits --resume", capsys, "runs/digits does not exist")
    fails("train --resume --name nope", capsys, "runs/nope does not exist; start the run without --resume")
    fails("nonsense", capsys, "nonsense")
    fails("train digits --seed 4294967296", capsys, "seed: expected less than 2**32")
    fails("train digits --weight-decay nan", capsys, "weight_decay: expected a finite number, got nan")
    fails("train digits --guidance-interval 0 inf", capsys, "guidance_interval: expected a finite number, got inf")
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", [*cli.COMMANDS, "data check"])
def test_every_option_has_a_line_of_help(capsys, command):
    assert run(f"{command} --help") == 0
    text = capsys.readouterr().out
    if command == "train":
        assert "values to start from. digits: 8x8" in " ".join(text.replace("│", " ").split())
        for name in ("preset", "--config", "--resume", "--overwrite", "--objective", "average velocity"):
            assert name in text
    if command == "data":
        assert "check" in text
        return
    assert "(default" in text or command == "convert"
    for name in ARGUMENTS[command]:
        assert name in text.lower()


ARGUMENTS = {
    "train": ["--steps", "--model", "--hidden-size", "--time-std", "--sample-steps", "--evaluator"],
    "sample": ["--steps", "--labels", "--omega", "--guidance-scale", "--trust-code", "--device"],
    "evaluate": ["--samples", "--data", "--omega", "--weights"],
    "compare": ["methods", "--preset", "--steps", "--seeds", "--out", "--teacher", "--overwrite"],
    "recipes": ["name", "--gpus", "--tflops"],
    "encode": ["--codec", "--image-size", "--out", "mirrored", "--precision", "--device"],
    "convert": ["--out", "--num-heads", "--input-size", "--overwrite"],
    "info": ["--device"],
    "data check": ["--image-size", "--grey"],
}


def test_the_help_of_a_preset_shows_its_values(capsys):
    assert run("train digits --help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"optimiser steps (default: {recipe('digits').optim.steps})" in text
    assert "values to start from. digits: 8x8" in text


def test_training_that_fails_ends_with_code_1(no_training, capsys):
    assert run("train digits") == 1
    assert "not in this test" in capsys.readouterr().err


TINY_IMF = TINY.replace("--model DiT", "--objective imf --depth 2 --aux-head-depth 1").replace("--depth 1 ", "")


def test_digits_with_improved_meanflow_at_any_guidance_scale(capsys):
    assert run(f"train digits {TINY_IMF} --steps 2") == 0
    folder = Path("runs/digits-imf")
    report = json.loads((folder / "report.json").read_text())
    assert report["objective"] == "imf"
    assert report["sampler"] == "flow map, 1 network evaluation, omega 2 on [0, 1]"
    assert [row["omega"] for row in report["guidance"]] == [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]
    assert picture(folder / "samples.png") == ((2 + 10 * 42, 2 + 7 * 42), "L")  # omega down the side

    def images(flags):
        assert run(f"sample digits-imf --labels 1,2 --count 2 --out x.npy {flags}") == 0
        return np.load("x.npy")

    assert images("").shape == (4, 1, 8, 8)
    assert np.array_equal(images(""), images("--omega 2 --t-min 0 --t-max 1"))
    assert run("sample digits-imf --omega 3.5 --t-min 0.2 --t-max 0.8 --out grid.png") == 0
    before = (folder / "report.json").read_text()
    assert run("evaluate digits-imf --omega 4 --samples 20") == 0
    assert "keeps the figures" in capsys.readouterr().out
    assert (folder / "report.json").read_text() == before
    fails("sample digits-imf --omega 0.5", capsys, "omega: expected a number >= 1")
    fails("sample digits-imf --t-min 0.9 --t-max 0.1", capsys, "t_min: expected at most t_max = 0.1, got 0.9")
    assert run(f"train digits {TINY} --steps 1 --no-evaluate") == 0
    fails("sample digits --omega 3", capsys, "omega: expected only with --sampler guided; jumps, the sampler of")
    fails(
        f"train digits {TINY} --objective imf --name x", capsys, "objective: imf trains a network that returns (u, v)"
    )


def test_info_names_every_op_and_its_backend(capsys, monkeypatch):
    assert run("info --device cpu") == 0
    text = capsys.readouterr().out
    for word in ("torch", "reference", "bfloat16", *backend.OPS):
        assert word in text
    monkeypatch.setattr(backend, "_requested", "tritn")
    for line in ("info", "sample x", "evaluate x"):
        fails(line, capsys, "MFKERNELS_BACKEND: expected one of", "'tritn'")
    assert capsys.readouterr().out == ""


def test_the_command_alone_says_what_there_is(capsys):
    assert run("") == 0
    assert "commands:" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out == f"meanflow {__version__}\n"


def test_converted_weights_can_be_sampled_and_trained_on(capsys, monkeypatch):
    net = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10)
    torch.save({"ema": {f"module.{name}": value for name, value in net.state_dict().items()}}, "theirs.pt")
    assert run("convert theirs.pt --out ours.safetensors --num-heads 2") == 0
    assert "loaded" in capsys.readouterr().out
    with safe_open("ours.safetensors", "pt") as file:
        assert json.loads(file.metadata()["model"])["config"] == net.config
    ours = load_file("ours.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in net.state_dict().items())
    fails("convert theirs.pt --out ours.safetensors", capsys, "exists already", "--overwrite")
    assert run("sample ours.safetensors --labels 1,2 --count 2 --out grid.png") == 0
    assert run(f"train digits {TINY} --steps 1 --init ours.safetensors --no-evaluate") == 0

    Path("half.pt").write_bytes(b"half")
    save_file({"w": torch.zeros(1)}, "other.safetensors")
    fails("convert half.pt --out x.safetensors", capsys, "cannot read half.pt")
    fails("convert other.safetensors --out x.safetensors", capsys, "expected the weights of a DiT")
    fails("convert none.npz --out x.safetensors", capsys, "none.npz")
    fails("convert theirs.bin --out x.safetensors", capsys, "expected a .npz")
    fails("sample other.safetensors", capsys, "meanflow convert")
    assert not Path("x.safetensors").exists()

    fails("sample ours.safetensors --weights raw", capsys, "weights: ours.safetensors holds one set")
    for text in ("{half", "[]", '{"name": "DiT"}'):
        save_file({"w": torch.zeros(1)}, "damaged.safetensors", metadata={"model": text})
        fails("sample damaged.safetensors", capsys, "its metadata names no model")
    Path("folder").mkdir()
    fails("convert theirs.pt --out folder --overwrite", capsys, "out: expected a file, got the folder")
    fails("convert theirs.pt --out theirs.pt/x.safetensors", capsys, "theirs.pt")
    with monkeypatch.context() as full:

        def half(tensors, path, metadata):
            path.write_bytes(b"half")
            raise SafetensorError("No space left on device")

        full.setattr("meanflow.weight_files.save_file", half)
        fails("convert theirs.pt --out folder/x.safetensors", capsys, "out: cannot write folder/x", "No space left")
    assert list(Path("folder").iterdir()) == []


def test_weights_of_the_jax_program_are_converted():
    net = DiT(input_size=32, patch_size=4, in_channels=4, hidden_size=64, depth=1, num_heads=1, num_classes=5)
    flat = {}
    for name, value in net.state_dict().items():
        if name == "pos_embed":
            continue
        path = "net/" + name.replace(".", "/").replace("r_embedder", "h_embedder").replace("blocks/", "blocks/layers_")
        array = value.numpy()
        if path.endswith("weight") and "embedding_table" not in path:
            path = path.removesuffix("weight") + "kernel"
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        flat[path] = array
    np.savez("jax.npz", **flat)
    assert run("convert jax.npz --out ours.safetensors") == 0
    ours = load_file("ours.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in net.state_dict().items())


def test_improved_meanflow_weights_are_converted(capsys):
    net = IMFDiT(
        input_size=8, patch_size=4, in_channels=1, hidden_size=20, depth=2, num_heads=2, num_classes=10,
        aux_head_depth=1, num_class_tokens=1, num_time_tokens=2, num_cfg_tokens=3, num_interval_tokens=4, v_head=False,
    )  # fmt: skip
    theirs = {f"net.{name.replace('_proj.', '_proj._flax_linear.')}": value for name, value in net.state_dict().items()}
    torch.save(theirs, "theirs.pt")
    assert run("convert theirs.pt --out ours.safetensors --input-size 8") == 0
    assert "iMF-DiT (" in capsys.readouterr().out
    with safe_open("ours.safetensors", "pt") as file:
        assert json.loads(file.metadata()["model"]) == {"name": "iMF-DiT", "config": net.config}
    ours = load_file("ours.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in net.state_dict().items())
    assert run("sample ours.safetensors --labels 1,2 --count 2 --omega 4 --out grid.png") == 0
    save_file({"u_final_layer.linear.bias": torch.zeros(1)}, "other.safetensors")
    fails("convert other.safetensors --out x.safetensors", capsys, "expected the weights of an iMF-DiT")


def test_a_checkpoint_of_another_model_is_refused(capsys):
    assert run(f"train digits {TINY} --steps 1 --no-evaluate") == 0
    fails("train digits --resume --steps 2 --depth 2", capsys, "depth: ", "another model's weights: expected 1, got 2")
    newest = list_checkpoints(Path("runs/digits/checkpoints"))[-1]
    (newest / "ema.safetensors").write_bytes(b"half")
    fails("sample digits", capsys, "cannot read", "ema.safetensors")


def test_a_damaged_newest_checkpoint_names_an_older_one_that_is_intact(capsys):
    assert run(f"train digits {TINY} --steps 3 --checkpoint-every 1 --keep-checkpoints 3 --no-evaluate") == 0
    first, second, third = list_checkpoints(Path("runs/digits/checkpoints"))
    (third / "optimizer.safetensors").write_bytes((third / "optimizer.safetensors").read_bytes()[:-1])
    fails(
        "train digits --resume --steps 4",
        capsys,
        "cannot read",
        "step_00000003/optimizer.safetensors",
        "step_00000002 is intact",
    )
    (second / "ema.safetensors").unlink()
    fails("train digits --resume --steps 4", capsys, f"{first} is intact: remove {third} and {second} to")
    shutil.rmtree(third)
    shutil.rmtree(second)
    assert run("train digits --resume --steps 4") == 0
    assert [row["step"] for row in read_log(Path("runs/digits/log.jsonl"))] == [1, 2, 3, 4]


def test_only_the_data_of_a_network_is_compared_with_it(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "pets")
    line = f"--image-size 8 --name pets {TINY} --steps 2"
    assert run(f"train --data pets {line}") == 0
    monkeypatch.chdir("pets")  # the data are found from anywhere
    assert run("evaluate ../runs/pets --samples 20") == 0
    monkeypatch.chdir("..")
    shutil.copytree("pets", "more")
    (tmp_path / "more" / "cat").rename(tmp_path / "more" / "bird")
    fails("evaluate pets --data more", capsys, "more has other classes", "it lacks cat; it has besides bird")
    shutil.copytree("more/dog", "pets/bird")
    fails("train --resume --name pets --steps 3", capsys, "has other classes", "it has besides bird")
    shutil.rmtree("pets/bird")
    fails("train --resume --name pets --steps 3 --image-size 16", capsys, "was trained with input_size 8", "has 16")
    fails("train --resume --name pets --steps 3 --data more", capsys, "data: expected the resumed run's own")
    assert run("train --resume --name pets --steps 3 --data pets") == 0


def test_a_resumed_run_says_what_is_new_and_reads_no_initial_weights(capsys):
    assert run(f"train digits {TINY} --steps 2 --no-evaluate") == 0
    save_file(load_file(list_checkpoints(Path("runs/digits/checkpoints"))[-1] / "model.safetensors"), "w.safetensors")
    line = f"train digits {TINY} --name second --init w.safetensors --no-evaluate"
    assert run(f"{line} --steps 2") == 0
    Path("w.safetensors").unlink()
    capsys.readouterr()
    assert run(f"{line} --steps 4 --lr 0.5 --resume") == 0
    said = capsys.readouterr().err.splitlines()
    assert "digits: 1438 images in 10 classes, 359 kept apart; DiT, " in said[0]
    assert said[1] == "resumed after step 2 with steps 4 (was 2), lr 0.5 (was 0.002)"
    for flag, words in (("--init other", "init: expected"), ("--objective flow_matching", "objective: expected")):
        fails(f"train --resume --name second --steps 5 {flag}", capsys, words, "resumed run's own")


def test_a_report_is_of_the_newest_step(capsys, monkeypatch):
    line = f"train digits {TINY_IMF}"
    report = Path("runs/digits-imf/report.json")
    assert run(f"{line} --steps 2") == 0
    assert json.loads(report.read_text())["guidance"]
    with monkeypatch.context() as interrupted:

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        interrupted.setattr("meanflow.training.run.evaluate_network", stop)
        assert run("train --resume --name digits-imf --steps 3") == 130
    assert not report.exists()
    assert run("train --resume --name digits-imf --steps 3") == 0
    assert "nothing was trained" in capsys.readouterr().out
    after = json.loads(report.read_text())
    assert (after["steps"], len(after["guidance"])) == (3, 7)

    report.write_text(json.dumps({**after, "steps": 2}))  # such as a copy from before
    assert run("evaluate digits-imf") == 0
    again = json.loads(report.read_text())
    assert again["steps"] == 3
    assert "guidance" not in again
    report.write_text("{half")
    fails("evaluate digits-imf", capsys, "cannot read runs/digits-imf/report.json")
    fails("train --resume --name digits-imf --steps 4", capsys, "cannot read runs/digits-imf/report.json")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("checkpoints/step_00000002/state.json", "{half"),
        ("checkpoints/step_00000002/state.json", "[]"),
        ("checkpoints/step_00000002/state.json", '{"format": 1}'),
        ("checkpoints/step_00000002/optimizer.safetensors", "half"),
        ("checkpoints/step_00000002/optimizer.safetensors", {"x_embedder.proj.weight|exp_avg": torch.zeros(1)}),
        ("checkpoints/step_00000002/ema.safetensors", {"w": torch.zeros(1)}),
        ("config.yaml", "steps: [half"),
        ("config.yaml", b"\xff\xfe\x00"),
        ("log.jsonl", '{"step": 1}\n{ha\n{"step": 2}\n'),
    ],
)
def test_a_damaged_file_of_a_run_is_named_and_nothing_is_lost(capsys, file, text):
    assert run(f"train digits {TINY} --steps 2 --no-evaluate") == 0
    path = Path("runs/digits") / file
    if isinstance(text, dict):
        save_file(text, path)
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    fails("train --resume --name digits --steps 3", capsys, str(path) if path.suffix != ".json" else str(path.parent))
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_what_the_machine_refuses_is_one_line(capsys, monkeypatch):
    Path("runs").write_text("")
    fails(f"train digits {TINY}", capsys, "is a file; expected a folder")
    Path("runs").unlink()

    def refuse(error):
        def stop(*args, **kwargs):
            raise error

        monkeypatch.setattr("meanflow.commands.train.run_training", stop)

    refuse(OSError(28, "No space left on device"))
    fails("train digits", capsys, "No space left on device")
    refuse(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    fails("train digits", capsys, "out of memory", "--batch-size")
    refuse(torch.OutOfMemoryError("CUDA out of memory"))
    fails("train digits", capsys, "out of memory", "--batch-size")
    refuse(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run("train digits")


def test_a_backend_that_cannot_serve_a_network_is_named(capsys):
    assert run(f"train digits {TINY} --steps 1 --no-evaluate") == 0
    with backend.use_backend("cuda"):
        fails("sample digits", capsys, "backend: this network cannot be served", "cuda")
        fails("evaluate digits", capsys, "backend: this network cannot be served", "cuda")


def test_images_too_large_for_figures_are_not_even_drawn(tmp_path, monkeypatch):
    make_folder(tmp_path / "pets")
    monkeypatch.setattr("meanflow.evaluation.MAX_FEATURES", 100)
    assert run(f"train --data pets --image-size 8 --name pets {TINY} --steps 1") == 0
    report = json.loads(Path("runs/pets/report.json").read_text())
    assert report["samples"] == 0
    assert "images of 192 values are too large" in report["note"]


def test_labels_are_numbers_only_where_no_name_is_one():
    assert labels_of("dog,0", ("cat", "dog")) == [1, 0]
    assert labels_of("10,7", ("7", "10")) == [1, 0]
    for text, classes in (("0", ("7", "10")), ("2", ("cat", "dog")), ("", ("cat", "dog"))):
        with pytest.raises(UsageError, match="labels: expected class names"):
            labels_of(text or ",", classes)


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "meanflow", "--help"], capture_output=True, text=True, check=True)
    for command in cli.COMMANDS:
        assert command in done.stdout
