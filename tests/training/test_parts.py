"""The parts of the trainer by themselves: schedule, averages, checkpoints, pictures."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from meanflow.config import Config, Optim
from meanflow.errors import UsageError
from meanflow.files import replaced, write_text
from meanflow.training import (
    EMA,
    Checkpoint,
    learning_rate,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from meanflow.training import checkpoint as checkpoint_module
from meanflow.training import state as state_module
from meanflow.training.checkpoint import load_optimizer_tensors, load_weights, optimizer_tensors
from meanflow.training.ema import ema_decay_at
from meanflow.training.log import read_log
from meanflow.training.pictures import image_grid


def test_the_warm_up_is_linear_and_ends_at_the_peak():
    config = Optim(lr=1.0, warmup_steps=4, steps=12)
    assert [learning_rate(step, config) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_cosine_falls_from_the_peak_towards_zero():
    config = Optim(lr=2.0, warmup_steps=2, steps=10, schedule="cosine")
    rates = [learning_rate(step, config) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    assert rates[-1] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    assert learning_rate(10, config) == 0.0


def test_averages_follow_their_formula_in_float32():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    ema = EMA(model, decay=0.5)
    expected = model.weight.detach().float().clone()
    for step in range(12):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update(model, step)
        d = min(0.5, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.weight.detach().float()
    assert ema.weights["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.weights["weight"], expected, rtol=1e-6, atol=1e-6)


def test_the_averages_warm_up_ends_at_the_decay():
    assert ema_decay_at(0, 0.999) == 0.1
    assert ema_decay_at(10**6, 0.999) == 0.999


def test_no_averaging_is_a_copy():
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.0)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model, 0)
    assert torch.equal(ema.weights["weight"], model.weight)


def saved(step: int) -> Checkpoint:
    tensors = {"w": torch.full((3,), float(step))}
    return Checkpoint(step=step, model=tensors, ema=tensors, optimizer=tensors, state={"seconds": 1.5})


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path, saved(7), keep=2)
    back = load_checkpoint(tmp_path / "step_00000007")
    assert back.step == 7
    assert back.state["seconds"] == 1.5
    for part in (back.model, back.ema, back.optimizer):
        assert torch.equal(part["w"], torch.full((3,), 7.0))


@pytest.mark.parametrize("file", ["model", "ema", "optimizer", "state", "rename"])
def test_a_crash_in_the_middle_of_a_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, file):
    save_checkpoint(tmp_path, saved(1), keep=1)

    def crash(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        if file == "rename":
            broken.setattr(checkpoint_module.os, "replace", crash)
        elif file == "state":
            broken.setattr(state_module.json, "dumps", crash)
        else:

            def save_some(tensors, path, **kwargs):
                if path.stem == file:
                    path.write_bytes(b"half")
                    crash()
                save_file(tensors, path, **kwargs)

            broken.setattr(checkpoint_module, "save_file", save_some)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path, saved(2), keep=1)
    (found,) = list_checkpoints(tmp_path)
    assert load_checkpoint(found).step == 1
    save_checkpoint(tmp_path, saved(2), keep=1)  # what the crash left is no obstacle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002"]


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, file):
    path = save_checkpoint(tmp_path, saved(1), keep=1)
    (path / file).write_bytes(b"{half")
    with pytest.raises(UsageError, match=r"step_00000001"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, saved(1), keep=1)
    (path / "state.json").write_text(json.dumps({"format": 99, "step": 1}))
    with pytest.raises(UsageError, match="format 2, got 99"):
        load_checkpoint(path)


def test_weights_of_another_model_are_told_apart(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    other = {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3), "2.bias": torch.zeros(1)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words = r"lacks 2: 1\.weight, 1\.bias; it has too many 1: 2\.bias; it has other sizes 1: 0\.weight \(3, 4\)"
    with pytest.raises(UsageError, match=words):
        load_weights(model, other, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_optimisers_state_goes_by_parameter_name():
    def stepped(model: nn.Module, steps: int) -> torch.optim.AdamW:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(steps):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    optimizer = stepped(model, 3)
    tensors = optimizer_tensors(model, optimizer)
    assert "1.weight|exp_avg" in tensors
    assert not any(name.startswith("0.bias") for name in tensors)
    fresh = stepped(model, 0)
    load_optimizer_tensors(model, fresh, tensors)
    for p in model.parameters():
        if p.requires_grad:
            assert all(torch.equal(value, fresh.state[p][key]) for key, value in optimizer.state[p].items())
    assert fresh.param_groups[0]["lr"] == 0.1


def test_a_log_cut_short_is_read_up_to_there(tmp_path):
    rows = [{"step": step, "loss": 0.5, "squared_error": 3.0} for step in (1, 2)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    assert read_log(tmp_path / "log.jsonl") == rows
    assert read_log(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("damage", ["{half", "3", '{"loss": 1}', '{"step": 2}', "\0\0"])
def test_damage_in_the_middle_of_a_log_is_told(tmp_path, damage):
    row = '{"step": 1, "loss": 0.5, "squared_error": 3.0}'
    (tmp_path / "log.jsonl").write_text(f"{row}\n{damage}\n{row}\n")
    with pytest.raises(UsageError, match=r"log\.jsonl: line 2 is damaged"):
        read_log(tmp_path / "log.jsonl")


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def fail() -> None:
        with replaced(path) as partial:
            partial.write_text("half")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.txt", "before")]


def test_a_grid_enlarges_pixels_without_smoothing():
    images = torch.tensor([-1.0, 1.0, 3.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    grid = image_grid(images, columns=2, gap=2)
    assert grid.size == (2 + 2 * 42, 2 + 2 * 42)
    assert [grid.getpixel((10, 10)), grid.getpixel((60, 10)), grid.getpixel((10, 60))] == [0, 255, 255]
    assert image_grid(torch.zeros(1, 3, 64, 64), columns=1).size == (68, 68)
    with pytest.raises(ValueError, match="images: expected"):
        image_grid(torch.zeros(2, 4, 8, 8), columns=2)


def test_a_configuration_is_plain_values():
    config = Config.of(guidance_interval=(0.1, 0.9))
    values = json.loads(json.dumps(config.to_dict()))
    assert values["objective"]["guidance_interval"] == [0.1, 0.9]
    assert set(values) == {f.name for f in dataclasses.fields(Config)}
