"""What a run is, from a preset or a saved run, a YAML file and flags; and what YAML files may say."""

from pathlib import Path

import pytest
import yaml

from meanflow import cli
from meanflow.config import Config, merged
from meanflow.config_file import read_config
from meanflow.errors import UsageError
from meanflow.objectives import FlowMatching
from meanflow.recipes import recipe
from meanflow.registry import names
from meanflow.training import TrainingError


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def configured(monkeypatch):
    """The configuration that `meanflow train LINE` with a YAML file of this text would train."""
    asked: list[Config] = []

    def refuse(config, **kwargs):
        asked.append(config)
        raise TrainingError("not in this test")

    monkeypatch.setattr("meanflow.commands.train.run_training", refuse)

    def configure(line: str, text: str = "") -> Config:
        if text:
            Path("mine.yaml").write_text(text)
            line += " --config mine.yaml"
        assert cli.main(["train", *line.split()]) == 1
        return asked[-1]

    return configure


def saved(**values) -> None:
    """A run with a checkpoint, as far as merging looks."""
    config = recipe("digits").replace(**values)
    checkpoint = Path("runs") / config.run.name / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    text = yaml.safe_dump({"preset": "digits", **config.to_dict()})
    (Path("runs") / config.run.name / "config.yaml").write_text(text)


@pytest.mark.parametrize(("line", "text"), [("--model DiT-B/2", ""), ("", "model: DiT-B/2"), ("--model m:f", "")])
def test_another_model_does_not_take_a_presets_sizes(configured, line, text):
    config = configured(f"digits {line}", text)
    assert config.model == Config.of(model=config.model.name).model  # its own
    assert configured(f"digits {line} --depth 3", text).model.depth == 3
    assert configured(f"digits {line}", f"{text}\ndepth: 3").model.depth == 3
    assert configured("digits --model DiT").model == recipe("digits").model


def test_values_need_to_fit_in_the_end_only(configured):
    assert configured("digits-imf --accumulate 3").optim.accumulate == 3  # 48 samples; the default is 256
    assert configured("--data x --accumulate 5", "batch_size: 60").optim.batch_size == 60
    assert configured("--data x --batch-size 60", "accumulate: 3").optim.accumulate == 3
    saved(batch_size=60)
    config = configured("--resume --name digits --accumulate 5")
    assert (config.optim.batch_size, config.optim.accumulate) == (60, 5)
    with pytest.raises(UsageError, match="batch_size: expected a multiple of accumulate = 7, got 60"):
        merged(Config.of(), {"batch_size": 60}, {"accumulate": 7})


def test_an_objective_that_is_given_counts_though_it_is_the_default(configured):
    assert configured("digits", "objective: imf").run.name == "digits-imf"
    config = configured("digits --objective meanflow", "objective: imf")
    assert config == recipe("digits")


def test_a_file_may_name_its_preset(configured, capsys):
    assert configured("", "preset: digits\nlr: 0.5") == recipe("digits").replace(lr=0.5)
    assert configured("digits", "preset: DiT-B/4") == recipe("digits")
    Path("bad.yaml").write_text("preset: digitz")
    assert cli.main(["train", "--config", "bad.yaml"]) == 2
    assert "preset: expected one of digits" in capsys.readouterr().err


def test_a_resumed_run_is_named_by_its_own_preset_only(configured, capsys):
    saved(name="mine")
    assert configured("digits --resume --name mine").run.name == "mine"
    assert cli.main(["train", "DiT-B/4", "--resume", "--name", "mine"]) == 2
    assert "preset: runs/mine was started from digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "flags", "words"),
    [
        (
            "digits-imf",
            {"kappa": 0.5},
            "kappa: expected only with objective alpha_flow or meanflow or hybrid, got objective imf",
        ),
        ("digits", {"omega_max": 4.0}, "omega_max: expected only with objective imf"),
        (
            "digits",
            {"objective": "flow_matching", "ratio": 0.3},
            "ratio: expected only with objective alpha_flow or lsd or",
        ),
        ("digits", {"time_sampler": "uniform", "time_std": 2.0}, "time_std: expected only with time_sampler logit"),
        ("digits", {"model": "DiT-S/8", "aux_head_depth": 2}, "aux_head_depth: expected only with model iMF-DiT"),
        ("digits", {"image_size": 16}, "image_size: expected only with data folder or hf or wds, got data digits"),
        ("digits", {"compile_mode": "reduce-overhead"}, "compile_mode: expected only with compile"),
        ("digits", {"warmup_steps": 9, "steps": 9}, "warmup_steps: expected less than steps = 9, got 9"),
    ],
)
def test_what_would_have_no_effect_is_refused_where_it_is_asked_for(base, flags, words):
    with pytest.raises(UsageError, match=f"^{words}"):
        merged(recipe(base), {}, flags)
    with pytest.raises(UsageError, match=f"^config: a.yaml: {words}"):
        merged(recipe(base), flags, {}, path=Path("a.yaml"))


def test_what_a_preset_says_besides_does_no_harm():
    config = merged(recipe("digits"), {}, {"objective": "flow_matching", "steps": 4})
    assert config.objective == FlowMatching()
    assert config.optim.steps == 4  # warm-up: the preset's 50
    for preset in names("recipes"):
        assert merged(Config(), recipe(preset).values(), {}) == recipe(preset)


def test_yaml_as_people_write_it():
    Path("a.yaml").write_text("precision: no\nlr: 1e-3\nsteps: 1e3\nname: 7\nbatch-size: 8\ncheckpoint_blocks: all\n")
    values = {"precision": "no", "lr": 1e-3, "steps": 1000, "name": "7", "batch_size": 8, "checkpoint_blocks": "all"}
    assert read_config(Path("a.yaml")) == (Config.of(**values), None)
    for preset in map(recipe, names("recipes")):
        Path("b.yaml").write_text(yaml.safe_dump({"preset": "x", **preset.to_dict()}))
        assert read_config(Path("b.yaml")) == (preset, "x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: null", "lr: expected float, got null"),
        ("steps: 1.5", "steps: expected int, got 1.5"),
        ("steps: true", "steps: expected int, got True"),
        ("prefix_tokens: [1, 2]", r"prefix_tokens: expected .*, got \[1, 2\]"),
        ("precision: maybe", "precision: expected .*, got 'maybe'"),
        ("lr: 1\nlr: 2", "lr: expected once, got 2 values"),
        ("batch_size: 8\nbatch-size: 9", "batch_size: expected once, got 2 values"),
    ],
)
def test_yaml_that_is_not_meant_is_refused(text, words, capsys):
    Path("a.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"^config: .*a.yaml: {words}"):
        read_config(Path("a.yaml"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("preset", names("recipes"))
@pytest.mark.parametrize("extra", ["", "--time-sampler uniform", "--objective flow_matching"])
def test_a_runs_own_values_as_a_file_start_a_run_like_it(configured, preset, extra):
    if "flow_matching" in extra and recipe(preset).model.outputs != ("u",):
        extra += " --model DiT-B/4"
    if "time" in extra and "time_sampler" not in recipe(preset).values():
        pytest.skip("an objective without times")
    first = configured(f"{preset} --data there {extra}")
    text = yaml.safe_dump({"preset": preset, **first.to_dict()})
    assert configured("", text) == first
    assert configured(preset, yaml.safe_dump(first.values())) == first
    assert configured("--model m:f", text).model == Config.of(model="m:f").model


def test_none_is_the_default_of_its_place():
    """As in the flat config.yaml of earlier runs, which has every option of every component."""
    for objective, mean in (("flow_matching", 0.0), ("meanflow", -0.4)):
        config = Config.of(objective=objective, time_sampler="logit_normal", time_mean=None, norm_p=None)
        assert config.objective == Config.of(objective=objective).objective
        assert config.objective.time_sampler.mean == mean
    flat = {
        "preset": "digits", "data": "digits", "image_size": 32, "grey": False, "skip_unreadable": False, "model": "DiT",
        "hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "aux_head_depth": None, "prefix_tokens": None,
        "objective": "flow_matching", "ratio": None, "omega": 1.0, "kappa": 0.0, "guidance_interval": [0.0, 1.0],
        "cfg_beta": 1.0, "omega_max": 8.0, "norm_p": None, "time_sampler": "logit_normal", "time_mean": None,
        "time_std": 1.0, "steps": 8, "warmup_steps": 50, "sample_omega": 2.0, "sample_interval": [0.0, 1.0],
    }  # fmt: skip
    Path("old.yaml").write_text(yaml.safe_dump(flat))
    sizes = {"model": "DiT", "hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
    expected = Config.of(data="digits", objective="flow_matching", steps=8, **sizes)
    config, preset = read_config(Path("old.yaml"))
    assert (config.objective, config.model, config.data) == (expected.objective, expected.model, expected.data)
    assert (config.optim.warmup_steps, preset) == (50, "digits")
