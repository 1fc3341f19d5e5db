"""Odd values in the files of a run: each is refused by name."""

import json
import os
from pathlib import Path

import pytest
from damage import seal
from forged import PLAIN, fails, forge, forge_model, meanflow, newest
from safetensors.torch import save_file

from meanflow.config_file import read_config
from meanflow.errors import UsageError
from meanflow.models import IMFDiT
from meanflow.training import RunFolder, load_checkpoint, load_network
from meanflow.training.checkpoint import load_tensors
from meanflow.training.log import read_log
from meanflow.training.state import load_state

STATES = [
    *(("step", value) for value in (None, -1, 1e30, True, "x", 1.0, 2**64, [])),
    *(("seconds", value) for value in ("x", None, -1, True, [], 10**30)),
    *(
        ("class_names", value)
        for value in (1.5, None, "0123456789", [1] * 10, ["a", 2], ["a"] * 10, ["a"], {}, {"a": 1})
    ),
    *(("objective", value) for value in (None, "x", ["meanflow"], "imf", 3)),
    *(("guidance", value) for value in ([], {"omega": 2.0}, {"omega": 0.5, "t_min": 0.0, "t_max": 1.0}, "x")),
    *(("scaler", value) for value in ("x", [1], {"scale": "x"})),
    *(("model", value) for value in (None, "DiT", [], {}, {"name": "DiT"}, {"name": 3, "config": {}})),
    *(("model", {"name": "DiT", "config": value}) for value in ("x", [], None, {}, {"input_size": 8})),
    *(("format", value) for value in (True, 1.0, "1", None, 3)),
    *(("checksums", value) for value in ([], None, {"state.json": 3}, "x", {})),
]


@pytest.mark.parametrize(("name", "value"), STATES)
def test_odd_values_of_a_state_are_refused_by_name(here, capsys, name, value):
    path = newest(PLAIN)
    state = {**json.loads((path / "state.json").read_text()), name: value}
    if name == "checksums":
        (path / "state.json").write_text(json.dumps(state))
    else:
        seal(path, state)
    if name == "format":  # which is written with each
        state.pop("checksums")
        (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UsageError, match=r"step_00000002") as error:
        load_checkpoint(path)
    assert name in str(error.value)
    fails("train --resume --name plain --steps 3", capsys, name, "step_00000002", "step_00000001 is intact")


@pytest.mark.parametrize("size", [0, -1, 1.5, 1e30, True, None, "8", [8], 2**31, 10**30, 3, 10**6])
@pytest.mark.parametrize("name", ["input_size", "hidden_size", "depth", "num_classes", "mlp_ratio"])
def test_odd_sizes_are_refused_before_there_is_memory_for_them(here, capsys, name, size):
    forge_model(PLAIN, **{name: size}) if name != "num_classes" else forge(
        PLAIN, model={"name": "DiT", "config": {**load_state(newest(PLAIN), "model")["model"]["config"], name: size}}
    )
    with pytest.raises(UsageError, match="step_00000002"):
        load_network(PLAIN)
    fails("train --resume --name plain --steps 3", capsys, "step_00000002")


def test_the_size_of_an_image_is_bounded_where_no_weight_tells_it(here, capsys):
    sizes = {"patch_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3, "aux_head_depth": 0}
    net = IMFDiT(input_size=8, in_channels=1, **sizes)
    for size, word in ((8, None), (2**30, "expected images of less than 2**31 values"), (2**15, "out of memory")):
        model = {"name": "iMF-DiT", "config": {**net.config, "input_size": size}}
        save_file(net.state_dict(), "imf.safetensors", metadata={"model": json.dumps(model)})
        if word:
            fails("sample imf.safetensors --count 1000 --out x.npy", capsys, word)
        else:
            assert meanflow("sample imf.safetensors --count 1 --out x.npy") == 0


def test_unknown_sizes_are_refused(here):
    forge_model(PLAIN, widht=3)
    with pytest.raises(UsageError, match=r"model.config: expected input_size, .*, got 'widht'"):
        load_network(PLAIN)


TEXTS = {
    "deep": "[" * 5000,
    "deeper than ours": '{"a": ' * 30 + "1" + "}" * 30,
    "long": '{"step": ' + "9" * 5000 + "}",
    "twice": '{"step": 1, "step": 2, "seconds": 1}',
    "NUL": '{"step": "\\u0000"}',
    "surrogate": '{"note": "\\ud800"}',
    "list": "[[1, 2]]",
    "null": "null",
    "string": '"x"',
    "not UTF-8": b"\xff\xfe{}",
    "empty": "",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", ["state.json", "report.json", "log.jsonl"])
def test_json_that_is_no_run_s_is_refused(here, capsys, name, text):
    path = (newest(PLAIN) if name == "state.json" else PLAIN) / name
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(data + b"\n" + data + b"\n" if name == "log.jsonl" else data)
    read = {
        "state.json": lambda: load_network(PLAIN),
        "report.json": lambda: RunFolder(PLAIN).read_report(["class_accuracy", "frechet_distance"]),
        "log.jsonl": lambda: read_log(path),
    }
    with pytest.raises(UsageError, match=str(path.parent)):
        read[name]()
    fails("train --resume --name plain --steps 3", capsys, path.parent.name)


@pytest.mark.parametrize("row", ['"x"', "null", "[]", "true", "-1", "1.5"])
def test_a_log_s_steps_are_steps(here, row):
    path = PLAIN / "log.jsonl"
    path.write_text(f'{{"step": {row}, "loss": 1.0, "squared_error": 1.0}}\n{path.read_text()}')
    with pytest.raises(UsageError, match="line 1 is damaged"):
        read_log(path)


@pytest.mark.parametrize("value", ["x", [], True, -1, 1e400])
@pytest.mark.parametrize("name", ["seconds", "class_accuracy", "held_out_frechet_distance"])
def test_a_report_s_figures_are_numbers(here, capsys, name, value):
    (PLAIN / "report.json").write_text(json.dumps({name: value}))
    fails("train --resume --name plain --steps 3", capsys, "report.json", f"{name}: expected a finite number")


YAML = [
    ("a: [", "line 1, column 5: while parsing a flow node expected the node content, but found '<stream end>'"),
    ("steps: 1\n\tx: 2", "line 2, column 1: while scanning for the next token found character '\\t'"),
    ("steps: \x07", "line 1: unexpected character '\\x07'"),
    ("[" * 5000, "it is nested too deeply"),
    ("a: " + "{a: " * 3000, "it is nested too deeply"),
    (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "line 2: b: expected a value, a list of values or a group, got a list",
    ),
    ("<<: {steps: 3}", "<<: unknown option"),
    ("a: &a {x: 1}\nb: &b {x: *a}\nc: &c {x: *b}\nd: &d {x: *c}\ne: &e {x: *d}\nf: {x: *e}", "nested too deeply"),
    ("steps: 2020-99-99", "line 1: steps: expected a value, got '2020-99-99': month must be in 1..12"),
    ("steps: 2020-01-01", "steps: expected int, got datetime.date(2020, 1, 1)"),
    ("seed: " + "9" * 5000, "line 1: seed: expected a value, got '9999"),
    ("lr: " + "9" * 400, "lr: expected float, got 9999"),
    ('data: "\\0"', "line 1: data: expected text, got '\\x00'"),
    ('model: "\\ud800"', "line 1: model: expected text"),
    ("steps: !!python/object/apply:os.system [touch CANARY]", "steps: expected int"),
    ("steps: !!python/name:os.system x", "line 1: steps: expected a value, got 'x'"),
    ("lr: !!bool x", "line 1: lr: expected a value, got 'x'"),
    ("lr: !!timestamp x", "line 1: lr: expected a value, got 'x'"),
    ("[1]: 2", "line 1: expected a key, got a list"),
    ("steps: 1\n---\nsteps: 2", "line 2, column 1: expected a single document in the stream but found another"),
]


@pytest.mark.parametrize(("text", "words"), YAML, ids=[text[:20] for text, _ in YAML])
def test_yaml_that_cannot_be_read_is_one_line(here, capsys, text, words):
    Path("bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        read_config(Path("bad.yaml"))
    fails("train --config bad.yaml", capsys, "config: ", "bad.yaml", words)


@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "1e30", "-1e30"])
def test_numbers_that_no_run_counts_to_are_refused(here, capsys, number):
    Path("bad.yaml").write_text(f"seed: {number}")
    fails("train --config bad.yaml", capsys, "bad.yaml: seed: expected a number of less than 64 bits, got")


@pytest.mark.parametrize("kind", ["folder", "loop", "pipe"])
@pytest.mark.parametrize("name", ["state.json", "ema.safetensors", "config.yaml", "report.json", "log.jsonl"])
def test_what_is_no_file_is_not_waited_for(here, capsys, name, kind):
    path = (newest(PLAIN) if name in ("state.json", "ema.safetensors") else PLAIN) / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name)
    fails("train --resume --name plain --steps 3", capsys, path.parent.name)


def test_safetensors_of_types_that_pytorch_has_not_are_refused(here):
    data = Path("ours.safetensors").read_bytes()
    for dtype in (b"F4_", b"XXX", b"I32"):
        Path("odd.safetensors").write_bytes(data.replace(b"F32", dtype, 1))
        with pytest.raises(UsageError, match=r"odd\.safetensors"):
            load_network(Path("odd.safetensors"))
    with pytest.raises(UsageError, match="expected a file, got a folder"):
        load_tensors(Path("runs"))
