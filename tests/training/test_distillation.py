"""Runs that learn from a pretrained flow and start from its weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import TINY, losses

from meanflow import cli
from meanflow.config_file import read_config
from meanflow.errors import UsageError
from meanflow.models import create_model
from meanflow.objectives import TeacherVelocity
from meanflow.training import RunFolder, Trainer, list_checkpoints, load_network, make_accelerator, run_training
from meanflow.training.log import read_log
from mfkernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("own_folder")
FLOW = TINY.replace(objective="flow_matching", name="flow")


def trainer(config, **options):
    folder = RunFolder.named(config.run.name)
    return Trainer(config, config.data.load(), folder, make_accelerator(config, folder), **options)


def newest(name):
    return list_checkpoints(Path("runs") / name / "checkpoints")[-1]


@pytest.fixture
def flow():
    """The network of a run of flow matching: its averages."""
    run_training(FLOW.replace(steps=3, warmup_steps=0))
    return load_network(Path("runs/flow")).net


def inputs():
    t = torch.linspace(0.1, 1.0, 6)
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), t, torch.arange(6)


@pytest.mark.parametrize(
    ("source", "objective", "values"),
    [
        ("flow", "meanflow", {}),
        ("runs/flow", "meanflow", {}),
        ("checkpoint", "meanflow", {}),
        ("ema.safetensors", "meanflow", {}),
        ("flow", "alpha_flow", {}),
        ("flow", "shortcut", {"timesteps": 8}),
        ("flow", "ayf", {}),
        ("flow", "scd", {}),
        ("flow", "meanflow", {"model": "DMF-DiT", "hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4}),
    ],
)
def test_a_student_starts_as_its_teacher_whatever_r_is(flow, source, objective, values):
    path = {"checkpoint": newest("flow"), "ema.safetensors": newest("flow") / "ema.safetensors"}.get(source, source)
    config = TINY.replace(objective=objective, teacher="flow", init=str(path), name="student", **values)
    student = trainer(config).model.eval()
    z, t, y = inputs()
    decoupled = config.model.name == "DMF-DiT"  # its last blocks are told r in the place of t
    for r in (t,) if decoupled else (t, 0 * t, 0.3 * t):
        assert relative_error(student(z, r, t, y), flow(z, t, t, y)) <= 1e-6  # measured 2e-7


def test_a_teacher_by_a_flag_is_the_velocity_of_the_target(flow):
    line = "train digits --name student --teacher flow --init flow --velocity-guidance 1.5 --no-evaluate --batch-size 8"
    line += " --hidden-size 16 --depth 1 --num-heads 2 --steps 3 --warmup-steps 0"
    assert cli.main(line.split()) == 0
    loaded = load_network(Path("runs/student"))
    assert loaded.objective.velocity == TeacherVelocity(guidance=1.5)
    line = "train --resume --name student --steps 5 --no-evaluate"
    assert cli.main(line.split()) == 0
    with pytest.raises(UsageError, match="teacher: expected the resumed run's own, flow, got"):
        run_training(read_config(Path("runs/student/config.yaml"), True)[0].replace(teacher="runs/flow"), resume=True)


def test_what_does_not_learn_from_a_teacher_says_what_would(flow):
    for values, words in (
        ({"objective": "sct"}, r"sct does not \(its like with a teacher: scd\); got flow"),
        ({"objective": "lsd"}, r"lsd does not \(its like with a teacher: lmd\); got flow"),
        ({"velocity": "data"}, "meanflow does not unless velocity is teacher; got flow"),
    ):
        with pytest.raises(UsageError, match=f"teacher: expected only with an objective that learns .*{words}"):
            trainer(TINY.replace(teacher="flow", **values))
    with pytest.raises(UsageError, match="teacher: meanflow learns from a pretrained network: expected a run"):
        trainer(TINY.replace(velocity="teacher"))
    with pytest.raises(UsageError, match="velocity_guidance: expected only with velocity teacher"):
        TINY.replace(velocity_guidance=2.0)


def test_weights_trained_with_both_times_start_as_they_are():
    run_training(TINY.replace(name="old"))
    saved = load_network(Path("runs/old")).net.state_dict()
    student = trainer(TINY.replace(init="old", name="student")).model
    assert all(torch.equal(value, saved[name]) for name, value in student.state_dict().items())


def test_a_file_without_an_embedding_of_the_gap_starts_with_a_silent_one():
    sizes = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
    net = create_model("DiT", input_size=8, in_channels=1, num_classes=10, **sizes)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    state = {name: value.clone() for name, value in net.state_dict().items() if not name.startswith("r_embedder")}
    save_file(state, "one_time.safetensors")
    student = trainer(TINY.replace(init="one_time.safetensors", name="student")).model
    z, t, y = inputs()
    assert torch.equal(student(z, 0 * t, t, y), student(z, t, t, y))
    with torch.no_grad():
        [p.zero_() for p in net.r_embedder.parameters()]
    assert torch.equal(student(z, t, t, y), net(z, t, t, y))


def test_first_weights_that_are_none_are_named(flow):
    for source, words in (
        ("nowhere", "init: nowhere does not exist; expected a run folder"),
        ("flow", "init: .*ema.safetensors holds another model's weights"),
    ):
        with pytest.raises(UsageError, match=words):
            trainer(TINY.replace(init=source, name="student", hidden_size=24))


def test_neighbours_are_of_a_group_that_no_cut_parts():
    config = TINY.replace(velocity="neighbours", velocity_group=4, batch_size=16, omega=1.0, kappa=0.0)
    run_training(config.replace(name="whole"))
    run_training(config.replace(name="parts", accumulate=2))
    assert losses("parts") == pytest.approx(losses("whole"), rel=1e-6)
    run_training(config.replace(name="plain", velocity="data"))
    logs = [read_log(Path(f"runs/{name}/log.jsonl")) for name in ("plain", "whole")]
    plain, whole = ([row["squared_error"] for row in log] for log in logs)
    assert plain != pytest.approx(whole, rel=1e-3)
    with pytest.raises(UsageError, match="batch_size: expected a multiple of 32, 16 samples belonging together"):
        run_training(config.replace(name="other", velocity_group=16, accumulate=2))


def test_a_plain_networks_weights_start_a_bounded_one(flow):
    student = trainer(TINY.replace(init="flow", spectral_norm=True, name="student")).model
    original = student.state_dict()["blocks.0.attn.qkv.parametrizations.weight.original"]
    assert torch.equal(original, flow.state_dict()["blocks.0.attn.qkv.weight"])


def test_a_teacher_of_another_path_is_refused():
    run_training(FLOW.replace(steps=1, warmup_steps=0, bridge=0.5))
    with pytest.raises(
        UsageError, match=r"teacher: .* was trained on another path, BridgePath; expected the linear one"
    ):
        trainer(TINY.replace(teacher="flow", name="student"))
