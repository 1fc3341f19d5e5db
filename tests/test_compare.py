"""`meanflow compare`: one budget for several methods, runs that go on, table and figure, and the page of methods."""

import dataclasses
import importlib.util
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import TINY

from meanflow import cli, registry
from meanflow.commands.compare import seeds_of
from meanflow.comparison import runs
from meanflow.comparison.figure import SMALL, draw_figure, save_figure
from meanflow.comparison.methods import budgeted, default_names, method_of, methods_of, preset_of
from meanflow.comparison.runs import sampled_at
from meanflow.comparison.table import markdown, words
from meanflow.errors import UsageError
from meanflow.sampling import FewSteps, OdeSteps
from meanflow.training import Trainer, list_checkpoints

ROOT = Path(__file__).parents[1]
WORDS = ["meanflow", "ect", "lmd", "--preset", "tiny", "--steps", "12", "--samples", "40"]


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._known["recipes"], "tiny", lambda: TINY)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    """The folder of a comparison that went through at once."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("meanflow.training.run.save_loss_curve", lambda rows, path: None)
        assert cli.main(["compare", *WORDS]) == 0
    return folder


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("meanflow.training.run.save_loss_curve", lambda rows, path: None)
    return tmp_path


def compare(*args):
    return cli.main(["compare", *args])


def weights(folder, method):
    paths = sorted((folder / "runs" / f"compare-{method}-seed0" / "checkpoints").glob("*/ema.safetensors"))
    return paths[-1].read_bytes()


# ---------------------------------------------------------------------------------------------------- what it writes


def test_each_method_makes_as_many_products(compared):
    found = json.loads((compared / "runs/compare/compare.json").read_text())
    rows = found["methods"]
    assert [row["name"] for row in rows] == ["flow_matching", "meanflow", "ect", "lmd"]
    assert [row["steps"] for row in rows] == [round(12 / row["cost"]) for row in rows]
    assert rows[0]["cost"] == 1
    assert rows[2]["cost"] == pytest.approx(4 / 3, rel=0.05)
    for row in rows:
        assert row["steps"] * row["flops"] == pytest.approx(found["budget_flops"], abs=row["flops"] / 2)
        assert row["config"]["optim"]["steps"] == row["steps"]
        assert row["recipe_steps"] == TINY.optim.steps
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 0
        assert row["time_ratio"] > 0


def test_the_results_are_at_one_two_and_four_evaluations(compared):
    found = json.loads((compared / "runs/compare/compare.json").read_text())
    for row in found["methods"]:
        assert [result["evaluations"] for result in row["results"]] == [1, 2, 4]
        for result in row["results"]:
            assert re.search(rf"\b{result['evaluations']} (network )?evaluation", result["sampler"])
            assert 0 <= result["class_accuracy"][0] <= 1
            assert result["frechet_distance"][0] > 0
    assert found["titles"] == dict(TINY.run.evaluator.titles)
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["held_out"]) == set(found["titles"])
    assert found["cpu_seconds"] > 0


def test_the_runs_are_ordinary_ones_and_flow_matching_teaches(compared, monkeypatch, capsys):
    monkeypatch.chdir(compared)
    found = json.loads((compared / "runs/compare/compare.json").read_text())
    assert found["methods"][3]["teacher"] == "runs/compare-flow_matching-seed0"
    assert found["methods"][1]["teacher"] is None
    assert cli.main(["sample", "compare-lmd-seed0", "--count", "1", "--out", "grid.png"]) == 0


def test_table_and_figure_have_each_method(compared):
    text = (compared / "runs/compare/compare.md").read_text()
    assert re.findall(r"^\| `(\w+)`", text, re.M) == ["flow_matching", "meanflow", "ect", "lmd"]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    with Image.open(compared / "runs/compare/compare.png") as picture:
        assert picture.width > 1000
        assert picture.height > 300


# ----------------------------------------------------------------------------------------------------------- going on


def test_what_is_trained_is_not_trained_again(compared, monkeypatch):
    monkeypatch.chdir(compared)
    before = json.loads((compared / "runs/compare/compare.json").read_text())
    monkeypatch.setattr(runs, "run_training", None)
    assert compare(*WORDS, "--out", "again") == 0
    after = json.loads((compared / "again/compare.json").read_text())
    for row, other in zip(before["methods"], after["methods"], strict=True):
        assert row["results"] == other["results"]
        assert row["cost"] == other["cost"]


@pytest.mark.parametrize("after", [2, 5])
def test_a_comparison_that_was_stopped_goes_on(compared, here, monkeypatch, capsys, after):
    ordinary = runs.run_training

    def stopped(config, **options):
        if "meanflow" not in config.run.name:
            return ordinary(config, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_stop", lambda self, signals: self.step >= after)
            return dataclasses.replace(ordinary(config, **options), signal=15)

    monkeypatch.setattr(runs, "run_training", stopped)
    assert compare(*WORDS) == 128 + 15
    assert "Stopped by SIGTERM" in capsys.readouterr().out
    assert not (here / "runs/compare").exists()
    if after == 2:  # as if it had been killed before its first checkpoint
        shutil.rmtree("runs/compare-meanflow-seed0/checkpoints")
    asked = []
    monkeypatch.setattr(
        runs, "run_training", lambda config, **options: (asked.append(config.run.name), ordinary(config, **options))[1]
    )
    assert compare(*WORDS) == 0
    assert asked == [f"compare-{name}-seed0" for name in ("meanflow", "ect", "lmd")]
    for method in ("flow_matching", "meanflow", "ect", "lmd"):
        assert weights(here, method) == weights(compared, method), method


def test_runs_of_another_comparison_are_refused_and_replaced(here, capsys):
    assert compare("--preset", "tiny", "flow_matching", "--steps", "3", "--samples", "20") == 0
    assert compare("--preset", "tiny", "flow_matching", "--steps", "4", "--samples", "20") == 2
    said = capsys.readouterr().err
    assert "it has steps 3, and this one 4" in said
    assert "--name" in said
    assert "--overwrite" in said
    assert compare("--preset", "tiny", "flow_matching", "--steps", "4", "--samples", "20", "--overwrite") == 0
    assert json.loads(Path("runs/compare/compare.json").read_text())["methods"][0]["steps"] == 4


def test_several_seeds(here):
    assert compare("meanflow", "--preset", "tiny", "--steps", "2", "--samples", "20", "--seeds", "0,3") == 0
    row = json.loads(Path("runs/compare/compare.json").read_text())["methods"][1]
    assert row["runs"] == ["compare-meanflow-seed0", "compare-meanflow-seed3"]
    assert all(len(result["frechet_distance"]) == 2 for result in row["results"])
    assert "±" in Path("runs/compare/compare.md").read_text()


def test_every_method_starts_from_the_weights_that_one_has(compared, here, monkeypatch, capsys):
    flow = str(compared / "runs/compare-flow_matching-seed0")
    args = ["lmd", "--preset", "tiny", "--steps", "1", "--samples", "20", "--teacher", flow, "--init", flow]
    assert compare(*args) == 0
    rows = json.loads(Path("runs/compare/compare.json").read_text())["methods"]
    assert [row["config"]["run"]["init"] for row in rows] == [flow, flow]
    before = load_file(list_checkpoints(Path(flow) / "checkpoints")[-1] / "ema.safetensors")
    for method in ("flow_matching", "lmd"):
        (first,) = list_checkpoints(Path(f"runs/compare-{method}-seed0/checkpoints"))
        after = load_file(first / "ema.safetensors")
        moved = {key: (after[key] - before[key]).abs().max().item() for key in before if "r_embedder" not in key}
        assert max(moved.values()) <= TINY.optim.lr * 1.01, method  # one step of Adam from there
    monkeypatch.setitem(registry._known["recipes"], "tiny-ect", lambda: TINY.replace(objective="ect", hidden_size=32))
    assert compare("ect", *args[1:], "--name", "other") == 2
    assert f"init: ect cannot start from {flow}: " in capsys.readouterr().err
    assert not Path("runs/other-flow_matching-seed0").exists()


# ----------------------------------------------------------------------------------------------------------- refusals

WRONG = {
    "unknown": (["nonsense"], "methods: expected an objective .* got 'nonsense'"),
    "twice": (["ect", "ect"], "methods: expected each once, got ect twice"),
    "the same": (["meanflow", "tiny"], "methods: expected each once, got tiny, which is meanflow"),
    "other data": (["DiT-B/4"], "methods: expected recipes of the same data as tiny, got DiT-B/4"),
    "flow map": (["pfmm"], "methods: pfmm learns from a flow map.*--teacher"),
    "steps": (["--steps", "0"], "steps: expected at least 1, got 0"),
    "samples": (["--samples", "1"], "samples: expected at least 2, got 1"),
    "seeds": (["--seeds", "0,x"], "seeds: expected numbers .* got '0,x'"),
    "seed twice": (["--seeds", "1,01"], "seeds: expected each once"),
    "name": (["--name", "a/b"], "name: expected letters"),
    "out": (["--out", "file"], "out: expected a folder, got the file"),
    "teacher": (["lmd", "--teacher", "nowhere"], "teacher: nowhere does not exist"),
    "init": (["lmd", "--init", "nowhere"], "init: flow_matching cannot start from nowhere: .* does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_trained(here, capsys, case):
    args, message = WRONG[case]
    Path("file").write_text("")
    assert compare("--preset", "tiny", *args) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("runs").exists()


def test_unknown_preset(here, capsys):
    assert compare("--preset", "nonsense") == 2
    assert "preset: expected one of" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- methods and their budget


def test_names_are_recipes_or_objectives_of_a_preset():
    assert preset_of(["ect"], None) == "digits" == preset_of(["digits-imf"], None) == preset_of([], None)
    assert preset_of(["DiT-B/4"], None) == "DiT-B/4"
    assert method_of("ect", "digits").config == method_of("digits-ect", "digits").config
    assert method_of("sct", "digits").config.objective.warm_up_steps == 10_000  # no recipe: the authors' values
    names = default_names("digits")
    assert len(names) >= 20
    assert "sct" not in names
    methods, left_out = methods_of([], "digits", taught=False)
    assert [method.name for method in methods] == ["flow_matching", *(name for name in names if name != "pfmm")]
    assert list(left_out) == ["pfmm"]
    assert "pfmm" in [method.name for method in methods_of([], "digits", taught=True)[0]]


def test_a_weaker_teacher_is_not_there(monkeypatch):
    config = method_of("ayf", "digits").config.replace(autoguidance=2.0)
    monkeypatch.setitem(registry._known["recipes"], "digits-ayf", lambda: config)
    assert "ayf" in methods_of([], "digits", taught=True)[1]
    with pytest.raises(UsageError, match="methods: ayf learns from a weaker teacher"):
        methods_of(["ayf"], "digits", taught=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ect", {"stage_steps": 100, "warmup_steps": 25}),
        ("ct", {"total_steps": 500}),
        ("ict", {"total_steps": 500}),
        ("alpha_flow", {"alpha_start": 0, "alpha_end": 350}),
        ("ayf", {"warm_up_steps": 111, "teacher": "runs/fm"}),
        ("scd", {"warm_up_steps": 83}),
    ],
)
def test_what_counts_steps_is_scaled_with_them(name, expected):
    method = method_of(name, "digits")
    config = budgeted(method, 500, name="x", seed=3, teacher="runs/fm")
    values, before = config.values(), method.config.values()
    assert {key: values[key] for key in expected} == expected
    changed = {key for key in values if values[key] != before[key]}
    free = {"steps", "warmup_steps", "name", "seed", "sample_every", "evaluate", "teacher"}
    assert changed <= free | set(config.objective.curriculum)


def test_every_option_that_counts_training_steps_is_in_a_curriculum():
    for name in registry.names("objectives"):
        cls = registry.find("objectives", name)
        options = {field.name for field in dataclasses.fields(cls)}
        counting = {option for option in options if re.search(r"(_steps|^alpha_(start|end))$", option)} - {"heun_steps"}
        assert set(cls.curriculum) == counting, name
        assert cls.paper, name
        assert cls.formula, name


def test_a_budget_that_is_too_small_for_a_curriculum_is_named():
    method = method_of("alpha_flow", "digits")
    method = dataclasses.replace(method, config=method.config.replace(alpha_start=600))
    with pytest.raises(UsageError, match="steps: the budget leaves alpha_flow 1 steps, too few"):
        budgeted(method, 1, name="x", seed=0, teacher=None)


def test_samplers_are_asked_for_evaluations():
    assert sampled_at(OdeSteps()) == [(n, {"steps": n, "times": (), "method": "euler"}) for n in (1, 2, 4)]
    assert sampled_at(FewSteps(times=(1, 0.5, 0)))[2] == (4, {"steps": 4, "times": ()})
    assert sampled_at(method_of("tarflow", "digits").config.objective.sampling) == [(None, {})]


def test_seeds_are_numbers():
    assert seeds_of("0, 12,4") == (0, 12, 4)
    for text in ("", "-1", "1,,2", "1.5", "²", str(2**32)):
        with pytest.raises(UsageError, match="seeds: "):
            seeds_of(text)


def test_words_of_figures():
    assert words("class_accuracy", [0.5, 0.6, 0.7]) == "0.600 ± 0.100"
    assert words("frechet_distance", [1.234]) == "1.23"
    assert words("energy_distance", [0.0123]) == "0.012"
    assert words("frechet_distance", [None]) == "–"


# --------------------------------------------------------------------------------------------------------- the figure


def made_up(methods, seeds=1, colour=False, names=None):
    """A comparison of as many methods, with long names and large numbers among them."""
    titles = {"class_accuracy": "class accuracy", "frechet_distance": "pixel-space Frechet distance"}
    rows, strips = [], {}
    for i in range(methods):
        name = (names or ["flow_matching", "my_package.module:ALongNameOfAMethod", "ect", "split_meanflow"])[i % 4]
        name = f"{name}{i}"
        figures = {"class_accuracy": [0.1234] * seeds, "frechet_distance": [123.4567] * seeds}
        results = [{"evaluations": n, "sampler": "x", **figures} for n in (1, 2, 4)]
        if i == 1:
            results = [{"evaluations": None, "sampler": "inverse flow, guidance scale 1.75 of ab " * 4, **figures}]
        row = {"name": name, "batch_size": 128, "cost": 13.37, "time_ratio": 14.72, "peak_bytes": 1234567890}
        rows.append({**row, "steps": 123456, "results": results})
        strips[name] = [Image.new("RGB" if colour else "L", (422, 44), 128) for _ in results]
    strips[rows[0]["name"]][0] = None  # images that make no picture
    held_out = {"class_accuracy": 0.967, "frechet_distance": 0.41}
    comparison = {"data": "digits", "budget_steps": 600, "seeds": list(range(seeds)), "titles": titles, "note": "note"}
    return {**comparison, "held_out": held_out, "methods": rows, "left_out": {"pfmm": "has no teacher"}}, strips


@pytest.mark.parametrize(("methods", "seeds"), [(1, 1), (2, 1), (20, 1), (24, 3)])
def test_no_text_of_the_figure_overlaps(methods, seeds):
    figure = draw_figure(*made_up(methods, seeds))
    width, height = figure.bbox.width, figure.bbox.height
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.texts]
    boxes += [("a picture", axes.get_window_extent()) for axes in figure.axes]
    assert len(figure.texts) >= 5 + methods * 4
    for (text, box), (other, there) in itertools.combinations(boxes, 2):
        apart = box.x1 <= there.x0 or there.x1 <= box.x0 or box.y1 <= there.y0 or there.y1 <= box.y0
        assert apart, f"{text!r} and {other!r} overlap"
    for text, box in boxes:
        inside = min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text!r} is cut off"
    assert all(text.get_fontsize() >= SMALL >= 7 for text in figure.texts)
    assert figure.get_figwidth() <= 8.27
    assert figure.get_figheight() <= 11.69


def test_pictures_of_another_shape_get_higher_rows():
    comparison, strips = made_up(3)
    square = {name: [Image.new("L", (300, 300)) for _ in several] for name, several in strips.items()}
    figure, usual = draw_figure(comparison, square), draw_figure(comparison, strips)
    assert figure.get_figheight() > usual.get_figheight() + 2
    box = figure.axes[0].get_window_extent()
    assert box.width == pytest.approx(box.height)


def test_the_figure_is_small_and_grey_where_its_pictures_are(tmp_path):
    save_figure(*made_up(20), tmp_path / "a.png")
    save_figure(*made_up(2, colour=True), tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as grey, Image.open(tmp_path / "b.png") as colour:
        assert grey.mode == "P"
        assert colour.mode == "RGB"
        channels = grey.convert("RGB").split()
        assert channels[0].tobytes() == channels[1].tobytes() == channels[2].tobytes()
    assert (tmp_path / "a.png").stat().st_size < 300_000


def test_the_table_names_what_is_not_in_its_columns():
    text = markdown(made_up(3)[0])
    assert "`pfmm` is left out: it has no teacher." in text
    assert "inverse flow" in text


# ------------------------------------------------------------------------------------------------ the page of methods


def test_the_page_of_methods_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = generate.PAGE.read_text()
    comparison = json.loads(generate.RESULTS.read_text()) if generate.RESULTS.exists() else {}
    assert text.count(generate.BEGIN) == text.count(generate.END) == 1
    assert generate.page(text, comparison) == text, "run: python docs/generate.py"
