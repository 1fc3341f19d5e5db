"""Several averages of one run: what they are, how they are saved, resumed and drawn from."""

from pathlib import Path

import pytest
import torch
from forged import fails, meanflow
from safetensors.torch import load_file
from tiny_runs import TINY, losses, stop_after

from meanflow.config import Config
from meanflow.errors import UsageError
from meanflow.training import Trainer, list_checkpoints, load_checkpoint, load_network, run_training
from mfkernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("own_folder")
SEVERAL = TINY.replace(ema_decays=(0.15, 0.3))
RUN = Path("runs/tiny")


@pytest.fixture
def history(monkeypatch):
    """The first weights, and those after every step."""
    weights = []
    step = Trainer._train_step

    def keep(trainer):
        weights.append({name: p.detach().double() for name, p in trainer.model.named_parameters()})

    def recorded(self, batches):
        if self.step == 0:
            weights.clear()
            keep(self)
        figures = step(self, batches)
        keep(self)
        return figures

    monkeypatch.setattr(Trainer, "_train_step", recorded)
    return weights


def newest(name="tiny"):
    return list_checkpoints(Path("runs") / name / "checkpoints")[-1]


def test_each_average_has_its_own_decay_and_no_effect_on_the_others(history):
    run_training(TINY.replace(name="alone"))
    run_training(SEVERAL)
    assert losses("tiny") == losses("alone")
    alone, several = load_file(newest("alone") / "ema.safetensors"), load_file(newest() / "ema.safetensors")
    assert all(torch.equal(alone[name], several[name]) for name in alone)
    assert not (newest("alone") / "averages.safetensors").exists()
    for decay in SEVERAL.optim.ema_decays:
        drawn = dict(load_network(RUN, str(decay)).net.named_parameters())
        for name, average in history[0].items():
            for step, weights in enumerate(history[1:]):
                d = min(decay, (1 + step) / (10 + step))
                average = d * average + (1 - d) * weights[name]
            assert relative_error(drawn[name], average) <= 8e-8, name  # measured 3.7e-8


def test_averages_are_resumed_to_the_bit_and_a_resumed_run_keeps_them(monkeypatch, capsys):
    run_training(SEVERAL.replace(name="whole"))
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 4)
        run_training(SEVERAL)
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    for others, words in (((0.15,), "averages of 0.15"), ((), "no further averages"), ((0.15, 0.31), "0.15, 0.31")):
        with pytest.raises(
            UsageError, match=rf"ema_decays, power_ema: .* has averages of 0\.15, 0\.3, .*; got .*{words}"
        ):
            run_training(SEVERAL.replace(ema_decays=others), resume=True)
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before
    run_training(SEVERAL.replace(ema_decays=(0.3, 0.15)), resume=True)  # in any order
    whole, parts = load_checkpoint(newest("whole")).tensors, load_checkpoint(newest()).tensors
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    run_training(TINY.replace(name="without", steps=3))
    with pytest.raises(
        UsageError, match=r"ema_decays, power_ema: .* has no further averages, .*; got averages of 0\.9$"
    ):
        run_training(TINY.replace(name="without", ema_decays=(0.9,)), resume=True)


def test_weights_are_chosen_by_their_decay(capsys):
    run_training(SEVERAL)
    assert meanflow("sample tiny --weights 0.150 --labels 1 --count 1 --out a.npy") == 0
    assert "averages.safetensors" in capsys.readouterr().out
    assert meanflow("sample tiny --labels 1 --count 1 --out b.npy") == 0
    assert Path("a.npy").read_bytes() != Path("b.npy").read_bytes()
    fails("sample tiny --weights 0.99", capsys, "weights: ", "has ema, raw, 0.15, 0.3; expected one of them, got 0.99")
    fails(
        "evaluate tiny --weights best", capsys, "weights: ", "has ema, raw, 0.15, 0.3; expected one of them, got best"
    )
    run_training(TINY.replace(name="plain", steps=1))
    fails("sample plain --weights 0.15", capsys, "weights: ", "has ema, raw; expected one of them, got 0.15")


@pytest.mark.parametrize(
    ("decays", "words"), [((0.9, 0.9), "expected different ones"), ((1.0,), r"expected a number in \[0, 1\), got 1\.0")]
)
def test_decays_are_different_numbers_below_one(decays, words):
    with pytest.raises(UsageError, match=f"ema_decays: {words}"):
        Config.of(ema_decays=decays)
