"""Files of a run that are damaged, forged or hostile: none runs code, each is refused by name."""

import io
import json
import os
import pickle
import random
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import CANARY, HOSTILE, Fuzzer, make_runs, outcomes, seal
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from meanflow import cli
from meanflow.errors import UsageError
from meanflow.models import IMFDiT, family_of
from meanflow.training import TrainConfig, list_checkpoints, load_checkpoint, load_network, run_training
from meanflow.training.checkpoint import cure_for_damage, load_tensors
from meanflow.training.config_file import read_values
from meanflow.training.log import read_log
from meanflow.training.run import read_report
from meanflow.training.shares import read_metadata
from meanflow.training.state import load_state


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder)
    return folder


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("canary", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    assert not CANARY.exists()


PLAIN, SHARES = Path("runs/plain"), Path("runs/shares")


def newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


def forge(run: Path, **values) -> Path:
    """Other values in the newest state.json, with checksums that fit."""
    path = newest(run)
    state = json.loads((path / "state.json").read_text())
    seal(path, {**state, **values})
    return path


def forge_model(run: Path, name: str | None = None, **sizes) -> Path:
    model = json.loads((newest(run) / "state.json").read_text())["model"]
    return forge(run, model={"name": name or model["name"], "config": {**model["config"], **sizes}})


def meanflow(line: str) -> int:
    """Exit code of `meanflow LINE`."""
    return cli.main(line.split())


def fails(line: str, capsys, *words: str) -> None:
    """`meanflow LINE` ends with code 2 and one line on stderr that has these words."""
    capsys.readouterr()
    assert meanflow(line) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1, said
    for word in words:
        assert word in said


# ------------------------------------------------------------------------------------------------ files run no code


@pytest.mark.parametrize("name", ["os:system", "canary:fire"])
@pytest.mark.parametrize("run", [PLAIN, SHARES])
def test_a_function_that_a_checkpoint_names_is_not_run(here, capsys, name, run):
    forge_model(run, name, command=f"touch {CANARY}")
    for weights in ("ema", "raw"):
        with pytest.raises(UsageError, match=rf"names the function '{name}' as its model.*--trust-code"):
            load_network(run, weights)
    with pytest.raises(UsageError, match="names the function"):
        load_network(run, trust_code="another:function")
    fails(f"sample {run.name}", capsys, name, "--trust-code")
    fails(f"evaluate {run.name}", capsys, name, "--trust-code")
    assert "canary" not in sys.modules


def test_a_function_that_a_weight_file_names_is_not_run(here, capsys):
    model = {
        "name": "os:system",
        "config": {"input_size": 8, "in_channels": 1, "num_classes": 10, "command": "touch CANARY"},
    }
    save_file(load_file("ours.safetensors"), "theirs.safetensors", metadata={"model": json.dumps(model)})
    fails("sample theirs.safetensors", capsys, "theirs.safetensors names the function 'os:system'", "--trust-code")


@pytest.mark.parametrize("line", ["--resume --name plain --steps 3", "--config runs/plain/config.yaml --name new"])
def test_a_function_that_a_configuration_names_is_not_run(here, capsys, line):
    path = PLAIN / "config.yaml"
    path.write_text(path.read_text().replace("model: DiT", "model: canary:fire"))
    fails(f"train {line}", capsys, "config.yaml names the function 'canary:fire'", "--trust-code", "--model")
    assert not Path("runs/new").exists()
    assert "canary" not in sys.modules


def test_a_trusted_function_is_run(here):
    Path("mine.py").write_text("from meanflow.models import DiT\n\ndef net(**sizes):\n    return DiT(**sizes)\n")
    line = "--steps 1 --hidden-size 8 --depth 1 --num-heads 2 --patch-size 4 --data digits --device cpu --no-evaluate"
    assert meanflow(f"train --name mine --model mine:net {line}") == 0
    run = Path("runs/mine")
    for trust in (True, "mine:net"):
        assert load_network(run, trust_code=trust).step == 1
    assert meanflow("sample mine --labels 1 --out x.npy --trust-code") == 0
    assert meanflow("train --resume --name mine --steps 2 --trust-code") == 0
    assert meanflow("train --resume --name mine --steps 3 --model mine:net") == 0


def test_a_function_is_asked_what_it_takes_before_it_is_called(here):
    Path("mine.py").write_text(f"def net(input_size):\n    open({str(CANARY)!r}, 'w')\n")
    forge_model(PLAIN, "mine:net")
    with pytest.raises(UsageError, match=r"mine:net\(input_size\) does not take input_size, patch_size"):
        load_network(PLAIN, trust_code=True)


@pytest.mark.parametrize("name", ["DiTanic", "Affinity", "iMF-DiT-Q", "", "dit"])
def test_a_name_without_a_colon_is_one_of_ours_or_an_error(here, name):
    forge_model(PLAIN, name or None)
    if name:
        with pytest.raises(UsageError, match=rf"model.name: expected one of DiT, Affine, iMF-DiT, .*got '{name}'"):
            load_network(PLAIN)
    assert [family_of(name) for name in ("DiT-B/2", "iMF-DiT-XL/2", "Affine")] == ["DiT", "iMF-DiT", "Affine"]


class Fires:
    def __reduce__(self):
        return exec, (HOSTILE,)


def change_metadata(change) -> Path:
    path = newest(SHARES)
    metadata = pickle.loads((path / "shares/.metadata").read_bytes())
    (path / "shares/.metadata").write_bytes(pickle.dumps(change(metadata) or metadata))
    seal(path, json.loads((path / "state.json").read_text()))
    return path


def first(metadata):
    return next(iter(metadata.storage_data.values()))


def tensor(metadata):
    return metadata.state_dict_metadata["model|x_embedder.proj.weight"]


class Bytes:
    """Pickled as an entry that PyTorch would unpickle."""

    def __reduce__(self):
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        return BytesStorageMetadata, ()


def huge(metadata) -> None:
    tensor(metadata).size = tensor(metadata).chunks[0].sizes = torch.Size([2**40, *tensor(metadata).size[1:]])


HUGE = torch.Size([2**40])
METADATA = [
    (lambda m: Fires(), "it asks for builtins.exec, which no checkpoint holds"),
    (lambda m: setattr(m, "planner_data", {"x": Fires()}), "it asks for builtins.exec"),
    (lambda m: setattr(m, "planner_data", pickle.loads), "it asks for _pickle.loads"),
    (
        lambda m: m.state_dict_metadata.update({"model|y_embedder.embedding_table.weight": Bytes()}),
        "expected TensorStorageMetadata",
    ),
    (lambda m: setattr(first(m), "relative_path", "../state.json"), "expected the name of a file beside it"),
    (lambda m: setattr(first(m), "relative_path", "/dev/zero"), "expected the name of a file beside it"),
    (lambda m: setattr(first(m), "relative_path", "nothing"), "nothing"),
    (lambda m: setattr(first(m), "transform_descriptors", ["zstd"]), "got transforms ['zstd']"),
    (lambda m: setattr(first(m), "offset", 10**30), "expected sizes, got"),
    (lambda m: setattr(first(m), "length", 2**62), "bytes long, and should have"),
    (lambda m: setattr(tensor(m), "size", HUGE), "its pieces do not make a tensor of size"),
    (lambda m: setattr(tensor(m), "size", (1e30,)), "expected sizes, got (1e+30,)"),
    (huge, "model|x_embedder.proj.weight: expected (1099511627776, 1, 4, 4) of torch.float32"),
    (lambda m: setattr(tensor(m), "chunks", tensor(m).chunks * 2), "its pieces do not make"),
    (lambda m: setattr(tensor(m), "chunks", []), "its pieces do not make"),
    (lambda m: m.state_dict_metadata.update({"other": tensor(m)}), "other: expected"),
]


@pytest.mark.parametrize(("change", "words"), METADATA)
def test_the_list_of_shares_runs_nothing_and_is_checked(here, capsys, change, words):
    path = change_metadata(change)
    with pytest.raises(UsageError) as error:
        load_checkpoint(path)
    assert words in str(error.value)
    assert "shares" in str(error.value)
    fails("train --resume --name shares --steps 3", capsys, "shares", "step_00000001 is intact: remove")
    other = path.with_name("step_00000009")  # the search for an intact one meets it too
    shutil.copytree(path, other)
    (path.with_name("step_00000001") / "state.json").unlink()
    assert cure_for_damage(path.parent, other) == ""


@pytest.mark.parametrize("deeper", [b"\x85", b"K\x01\x86", b"q\x01h\x01\x85"], ids=["one", "two", "remembered"])
def test_a_list_of_shares_that_is_too_deep_to_compare_is_refused(here, deeper):
    """Python's C code would run out of stack at the hash of the key, and end the process."""
    path = newest(SHARES)
    (path / "shares/.metadata").write_bytes(b"\x80\x04})" + deeper * 1_000_000 + b"K\x01s.")
    seal(path, json.loads((path / "state.json").read_text()))
    with pytest.raises(UsageError, match="expected at most 10000 objects in each other"):
        load_checkpoint(path)


def test_tensors_of_shares_run_nothing(here):
    path = newest(SHARES)
    (file,) = (path / "shares").glob("*.distcp")
    for hostile in (pickle.dumps(Fires()), _saved(Fires())):
        file.write_bytes(hostile + file.read_bytes()[len(hostile) :])
        seal(path, json.loads((path / "state.json").read_text()))
        with pytest.raises(UsageError, match=r"cannot read .*shares"):
            load_checkpoint(path)


def _saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_pickle_changes_no_class_of_pytorch(here):
    """BUILD can set attributes of whatever a pickle can name."""
    from torch.distributed.checkpoint.metadata import Metadata

    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (newest(SHARES) / "shares/.metadata").write_bytes(b"\x80\x02" + name + b"N}X\x06\x00\x00\x00marked\x88s\x86b.")
    with pytest.raises(UsageError, match=r"cannot read .*\.metadata"):
        read_metadata(newest(SHARES) / "shares")
    assert not hasattr(Metadata, "marked")


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_weights_of_others_run_nothing(here, capsys, suffix):
    if suffix == ".pt":
        torch.save({"w": Fires()}, "theirs.pt")
    else:
        np.savez("theirs.npz", w=np.array([Fires()], dtype=object))
    fails(f"convert theirs{suffix} --out out.safetensors", capsys, f"cannot read theirs{suffix}")


WEIGHTS = [
    {"x_embedder.proj.weight": torch.zeros(2), "y_embedder.embedding_table.weight": torch.zeros(3, 2)},
    {"x_embedder.proj.weight": torch.zeros(0, 1, 4, 4), "blocks.0.mlp.fc1.weight": torch.zeros(2, 2)},
    {"x_embedder.proj.weight": torch.zeros(8, 1, 4, 4), f"blocks.{10**11}.x": torch.zeros(2)},
    {"x_embedder.proj.weight": torch.zeros(8, 1, 4, 4), "blocks.0.x": torch.zeros(2), "pos_embed": torch.zeros(2)},
    {"u_final_layer.x": torch.zeros(2), "x_embedder.proj.weight": torch.zeros(8, 1, 4, 4)},
    {"x_embedder.proj.weight": [1, 2], "blocks.0.x": 3},
    {3: torch.zeros(2)},
    [1, 2],
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_of_others_that_make_no_model_are_refused(here, capsys, weights):
    if isinstance(weights, dict) and "x_embedder.proj.weight" in weights:
        weights = {"y_embedder.embedding_table.weight": torch.zeros(11, 8), **weights}
    torch.save(weights, "theirs.pt")
    fails("convert theirs.pt --out out.safetensors", capsys, "theirs.pt")
    assert not Path("out.safetensors").exists()


def test_what_convert_cannot_read_is_refused(here, capsys):
    np.savez_compressed("theirs.npz", **{"x_embedder/proj/kernel": np.zeros((99, 99))})
    data = bytearray(Path("theirs.npz").read_bytes())
    data[len(data) // 2] ^= 255
    Path("theirs.npz").write_bytes(data)
    fails("convert theirs.npz --out out.safetensors", capsys, "weights: cannot read theirs.npz")
    os.mkfifo("pipe.pt")
    fails("convert pipe.pt --out out.safetensors", capsys, "pipe.pt: expected a file, got a device")


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("run", [PLAIN, SHARES])
def test_a_flipped_bit_anywhere_is_told_and_an_older_checkpoint_is_named(here, capsys, run):
    path = newest(run)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) == 5 if run == SHARES else 4
    for file in files:
        before = file.read_bytes()
        middle = len(before) * 3 // 4
        file.write_bytes(before[:middle] + bytes([before[middle] ^ 4]) + before[middle + 1 :])
        loaded = {"ema.safetensors": "ema", "model.safetensors": "raw", "state.json": "ema"}.get(file.name)
        if loaded:
            with pytest.raises(UsageError, match=rf"{file.name}.*step_00000001 is intact: remove .*step_00000002"):
                load_network(run, loaded)
        if run == PLAIN or file.suffix not in (".safetensors"):
            with pytest.raises(UsageError, match=str(file.name)):
                load_checkpoint(path)
            fails(f"train --resume --name {run.name} --steps 3", capsys, file.name, "step_00000001 is intact")
        file.write_bytes(before)
    assert load_checkpoint(path).step == 2


def test_a_checkpoint_without_checksums_loads(here):
    for run in (PLAIN, SHARES):
        path = newest(run)
        state = json.loads((path / "state.json").read_text())
        assert state["checksums"].keys() == {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        whole = load_checkpoint(path)
        del state["checksums"]
        (path / "state.json").write_text(json.dumps(state))
        again = load_checkpoint(path)
        assert all(torch.equal(again.shares[key], value) for key, value in whole.shares.items())
        assert load_network(run).step == 2
        assert meanflow(f"train --resume --name {run.name} --steps 3") == 0


def test_a_newest_checkpoint_without_its_state_is_not_passed_over(here, capsys):
    (newest(PLAIN) / "state.json").unlink()
    with pytest.raises(UsageError, match=r"step_00000002 is not a checkpoint.*state\.json.*step_00000001 is intact"):
        load_network(PLAIN)
    fails("train --resume --name plain", capsys, "step_00000002 is not a checkpoint", "step_00000001 is intact")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, None])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_tensors_that_are_no_finite_numbers_are_refused(here, capsys, part, value):
    file = newest(PLAIN) / f"{part}.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if value is None:
        tensors[name] = tensors[name].long()
    else:
        tensors[name].view(-1)[0] = value
    save_file(tensors, file)
    forge(PLAIN)
    if part != "optimizer":
        with pytest.raises(UsageError, match=name):
            load_network(PLAIN, "ema" if part == "ema" else "raw")
    fails("train --resume --name plain --steps 3", capsys, name, "step_00000002")


def test_buffers_of_integers_and_with_infinity_are_the_networks_own(here):
    Path("mine.py").write_text(
        """
import torch
from meanflow.models import DiT

class Net(DiT):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.full((2,), -torch.inf))

    def forward(self, z, r, t, y):
        return super().forward(z, r, t, y)

def net(**sizes):
    return Net(**sizes)
"""
    )
    config = TrainConfig(
        data="digits", name="mine", model="mine:net", hidden_size=8, depth=1, num_heads=2, patch_size=4, steps=1,
        batch_size=4, device="cpu", evaluate=False,
    )  # fmt: skip
    run_training(config)
    path = newest(Path("runs/mine"))
    assert load_network(path, trust_code=True).net.mask.isinf().all()
    file = path / "ema.safetensors"
    tensors = load_file(file)
    tensors["count"] = tensors["count"].float()
    save_file(tensors, file)
    forge(Path("runs/mine"))
    with pytest.raises(UsageError, match=r"has other kinds 1: count torch\.float32 instead of torch\.int64"):
        load_network(path, trust_code=True)


# ---------------------------------------------------------------------------------------------------------- odd values

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
    *(("format", value) for value in (True, 1.0, "1", None, 2)),
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
        "report.json": lambda: read_report(PLAIN),
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
    ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "line 2: b: expected a value or a list of values, got a list"),
    ("<<: {steps: 3}", "line 1: <<: expected a value or a list of values, got keys"),
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
        read_values(Path("bad.yaml"))
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


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzzer"))


def test_damaged_files_are_told_or_do_not_matter(fuzzer):
    @settings(max_examples=20, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(st.integers(0, 2**32))
    def check(seed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that a file makes a run with
            what, found = fuzzer.check(seed)
        assert not [words for words in found if words.startswith("fault")], (seed, what, found)

    check()


def test_the_fuzzer_sees_other_values_and_code_that_runs(fuzzer, tmp_path, monkeypatch):
    def found(name, act):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(fuzzer.folder / "healthy", tmp_path / "copy")
        path = newest(tmp_path / "copy/runs/plain") / name
        act(path)
        return outcomes(random.Random(0), tmp_path / "copy", [path], True, fuzzer.values, 0)

    def flip(path):
        path.write_bytes(path.read_bytes()[:-1] + b"\x3f")

    def name_a_function(path):
        model = json.loads(path.read_text())["model"]
        seal(path.parent, {**json.loads(path.read_text()), "model": {**model, "name": "canary:fire"}})

    assert found("ema.safetensors", flip) == ["refused", "same", "refused"]
    assert found("state.json", name_a_function)[:2] == ["refused", "refused"]
    monkeypatch.setattr("meanflow.training.network.check_files", lambda *args: None)
    monkeypatch.setattr("meanflow.training.network.check_trusted", lambda *args: None)
    assert found("ema.safetensors", flip)[0] == "fault: load_network loaded other values"
    assert found("state.json", name_a_function)[-1] == "fault: code was executed"
