"""Ctrl-C and SIGTERM: answered at once, saved after the step, and a second one says what it costs."""

import os
import signal

import pytest
from tiny_runs import TINY, losses

from meanflow.cli import main
from meanflow.training import Trainer, run_training


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("meanflow.training.run.save_loss_curve", lambda rows, path: None)  # a second each


def signalled(monkeypatch, capfd, step: int, *numbers: int) -> list[str]:
    """In the middle of the step after `step`, these signals; returns what stderr says right after the first one."""
    said = []
    train = Trainer._train_step

    def interrupted(self, batches):
        if self.step == step:
            for number in numbers:
                capfd.readouterr()
                os.kill(os.getpid(), number)
                said.append(capfd.readouterr().err)
        return train(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    return said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_says_at_once_what_happens(monkeypatch, capfd, number):
    said = signalled(monkeypatch, capfd, 4, number)
    result = run_training(TINY)
    name = signal.Signals(number).name
    assert said == [
        f"{name}: the run stops after the step at hand and saves a checkpoint. Once more: it stops at once, unsaved\n"
    ]
    assert result.step == 5
    assert result.signal == number


def test_the_second_signal_says_what_is_lost(monkeypatch, capfd):
    signalled(monkeypatch, capfd, 5, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_training(TINY)
    assert str(stopped.value) == (
        "stopped by a second SIGINT after step 5: steps 4 to 5 are lost; --resume --name tiny goes on from "
        "runs/tiny/checkpoints/step_00000003"
    )
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("step", "words"),
    [(0, "the step at hand is lost; there is no checkpoint yet"), (1, "step 1 is lost; there is no"), (3, "at hand")],
)
def test_the_second_signal_counts_right(monkeypatch, capfd, step, words):
    signalled(monkeypatch, capfd, step, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=words):
        run_training(TINY)


def test_the_command_line_passes_it_on(monkeypatch, capfd):
    signalled(monkeypatch, capfd, 1, signal.SIGINT, signal.SIGINT)
    sizes = "--hidden-size 16 --depth 1 --num-heads 2 --patch-size 4"
    code = main(f"train digits --batch-size 8 --steps 4 --warmup-steps 0 {sizes}".split())
    assert code == 130
    assert "meanflow train: stopped by a second SIGINT after step 1: step 1 is lost" in capfd.readouterr().err


def test_interrupting_the_report_loses_no_step(monkeypatch):
    def interrupted(trainer, result, started):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr("meanflow.training.run._finish", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"all 6 steps are saved.*--resume --name tiny writes them"):
            run_training(TINY)
    assert len(losses("tiny")) == 6
    assert run_training(TINY.replace(evaluate=False), resume=True).new_steps == 0
