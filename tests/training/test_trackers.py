"""What a run logs with trackers: TensorBoard's files read back, and a stand-in for the others."""

import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from tiny_runs import TINY, losses, stop_after

from meanflow.errors import UsageError
from meanflow.training import RunFolder, Trainer, run_training
from meanflow.training.trackers import trackers_of

pytestmark = pytest.mark.usefixtures("own_folder")


class Recorder(GeneralTracker):
    """Keeps what it is told, in a list for each session."""

    name = "recorder"
    requires_logging_directory = False
    sessions: ClassVar[list] = []

    def __init__(self, project, **options):
        super().__init__()
        self.told = [("project", project, options)]
        self.sessions.append(self.told)

    @property
    def tracker(self):
        return self.told

    def store_init_configuration(self, values):
        self.told.append(("config", values))

    def log(self, values, step=None, **kwargs):
        self.told.append(("log", values, step))

    def log_images(self, values, step=None, **kwargs):
        self.told.append(("images", values, step))

    def finish(self):
        self.told.append(("finish",))


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "sessions", [])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    return Recorder


def test_a_tracker_gets_the_configuration_the_rows_the_pictures_and_the_figures(recorder):
    config = TINY.replace(log_with="recorder", sample_every=3, evaluate=True, kappa=0.0)
    run_training(config)
    (told,) = recorder.sessions
    assert told[0] == ("project", "meanflow", {})
    assert told[-1] == ("finish",)
    ((_, values),) = [entry for entry in told if entry[0] == "config"]
    assert values["lr"] == 1e-2
    assert values["model"] == "DiT"
    assert values.keys() == config.values().keys()
    assert {type(value) for value in values.values()} <= {bool, int, float, str}
    rows = [entry for entry in told if entry[0] == "log"]
    assert [step for _, _, step in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert [values["loss"] for _, values, _ in rows[:6]] == losses("tiny")
    assert rows[6][1]["report/steps"] == 6
    assert rows[6][1]["report/class_accuracy"] == RunFolder(Path("runs/tiny")).read_report()["class_accuracy"]
    assert {type(value) for value in rows[6][1].values()} <= {int, float}
    pictures = [entry for entry in told if entry[0] == "images"]
    assert [step for _, _, step in pictures] == [3, 6]
    ((name, batch),) = pictures[-1][1].items()
    assert name == "samples"
    with Image.open("runs/tiny/samples.png") as saved:
        assert np.array_equal(batch, np.asarray(saved.convert("RGB"))[None])


def scalars(folder):
    """Values of TensorBoard's files by name: {step: value}, each step once."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    found = {}
    for tag in tags["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(set(steps)) == len(steps), tag
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found, {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}, events


def test_the_flag_of_tensorboard_is_short_for_its_name():
    pytest.importorskip("tensorboard")
    both = [{"tensorboard": True}, {"log_with": "tensorboard"}, {"log_with": " tensorboard,", "tensorboard": True}]
    assert [trackers_of(TINY.replace(**option).run) for option in both] == [["tensorboard"]] * 3


def test_tensorboard_has_one_curve_of_a_run_that_was_killed_and_resumed(monkeypatch):
    config = TINY.replace(sample_every=2, tensorboard=True)
    save = Trainer.save
    with monkeypatch.context() as killed:
        stop_after(killed, 5)
        killed.setattr(Trainer, "save", lambda self, seconds: None if self.step > 3 else save(self, seconds))
        run_training(config)  # rows up to step 5, a checkpoint of step 3
    time.sleep(1.0)  # files are read in the order of their names, which have the second
    run_training(config, resume=True)
    found, images, events = scalars("runs/tiny/tensorboard")
    assert list(found["loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(found["loss"].values()) == pytest.approx(losses("tiny"), rel=1e-6)  # float32 there
    assert images == {"samples": [2, 4, 6]}
    sample = events.Images("samples")[-1]
    with Image.open("runs/tiny/samples.png") as saved:
        assert (sample.width, sample.height) == saved.size
    assert list(Path("runs/tiny/tensorboard").rglob("hparams.yml"))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"log_with": "wandb"}, r"log_with: wandb is not installed: pip install wandb"),
        ({"log_with": "tensorboard, wand"}, r"log_with: expected some of .*tensorboard, wandb.*, got 'wand'"),
        ({"log_with": "all"}, r"log_with: expected some of"),
        ({"tensorboard": True}, r'tensorboard: it is not installed: pip install "meanflow\[tensorboard\]"'),
    ],
)
def test_a_tracker_that_is_not_there_is_named_before_anything_is_written(monkeypatch, option, words):
    there = [] if "tensorboard" in option else ["tensorboard"]
    monkeypatch.setattr("meanflow.training.trackers.get_available_trackers", lambda: there)
    with pytest.raises(UsageError, match=words):
        run_training(TINY.replace(**option))
    assert not Path("runs").exists()


def test_a_tracker_that_does_not_start_is_named_with_its_reason(recorder, monkeypatch):
    def refuse(self, *ignored):
        raise RuntimeError("no account\nand a trace")

    monkeypatch.setattr(Recorder, "store_init_configuration", refuse)
    monkeypatch.setattr(Recorder, "finish", refuse)
    with pytest.raises(UsageError, match=r"log_with: cannot log with recorder: no account$"):
        run_training(TINY.replace(log_with="recorder"))


class Wandb(Recorder):
    """A stand-in that is told what Weights & Biases would be."""

    name = "wandb"


def test_a_resumed_run_is_the_same_one_at_weights_and_biases(recorder, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Wandb)
    monkeypatch.setattr("meanflow.training.trackers.get_available_trackers", lambda: ["wandb"])
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run_training(TINY.replace(log_with="wandb", steps=3))
    monkeypatch.setenv("WANDB_PROJECT", "digits")
    run_training(TINY.replace(log_with="wandb"), resume=True)
    run_training(TINY.replace(log_with="wandb"), overwrite=True)
    projects, sessions = zip(*(told[0][1:] for told in recorder.sessions), strict=True)
    assert projects == ("meanflow", "digits", "digits")
    assert sessions[0] == sessions[1]
    assert sessions[0] | {"id": ""} == {"name": "tiny", "id": "", "resume": "allow", "dir": "runs/tiny"}
    assert sessions[2]["id"] != sessions[0]["id"]  # another run of the same name
