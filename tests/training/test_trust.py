"""Files run no code: a function that only a file names is not called, and no pickle is taken at its word."""

import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from damage import CANARY, HOSTILE, seal
from forged import PLAIN, SHARDS, fails, forge, forge_model, meanflow, newest
from safetensors.torch import load_file, save_file

from meanflow.errors import UsageError
from meanflow.training import load_checkpoint, load_network
from meanflow.training.checkpoint import cure_for_damage
from meanflow.training.shards import read_metadata


@pytest.mark.parametrize("name", ["os:system", "canary:fire"])
@pytest.mark.parametrize("run", [PLAIN, SHARDS])
def test_a_function_that_a_checkpoint_names_is_not_run(here, capsys, name, run):
    forge_model(run, name, command=f"touch {CANARY}")
    for weights in ("ema", "raw"):
        with pytest.raises(UsageError, match=rf"names the function '{name}'.*--trust-code"):
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


@pytest.mark.parametrize(
    "line",
    [
        "--resume --name plain --steps 3",
        "--config runs/plain/config.yaml --name new",
        "--config runs/plain/config.yaml --name new --trust-code=no",
    ],
)
def test_a_function_that_a_configuration_names_is_not_run(here, capsys, line):
    path = PLAIN / "config.yaml"
    path.write_text(path.read_text().replace("name: DiT", "name: canary:fire"))
    fails(f"train {line}", capsys, "config.yaml names the function 'canary:fire'", "--trust-code", "--model")
    assert not Path("runs/new").exists()
    assert "canary" not in sys.modules


@pytest.mark.parametrize(
    "objective",
    [
        "canary:fire",
        {"name": "canary:fire"},
        {"name": "meanflow", "time_sampler": {"name": "canary:fire"}},
        {"name": "meanflow", "time_sampler": "canary:fire"},
        {"name": "meanflow", "data": "canary:fire"},
        {"name": "meanflow", "evaluator": "canary:fire"},
    ],
)
def test_no_word_of_a_file_is_imported(here, capsys, objective):
    config = yaml.safe_load((PLAIN / "config.yaml").read_text())
    Path("hostile.yaml").write_text(yaml.safe_dump({**config, "objective": objective}))
    fails("train --config hostile.yaml --name new", capsys, "hostile.yaml names the function 'canary:fire'")
    forge(PLAIN, objective=objective)
    fails("sample plain", capsys, "names the function 'canary:fire'", "--trust-code")
    (PLAIN / "report.json").unlink(missing_ok=True)
    fails("train --resume --name plain --evaluate", capsys, "names the function 'canary:fire'", "--trust-code")
    (PLAIN / "config.yaml").write_text(Path("hostile.yaml").read_text())
    fails("evaluate plain", capsys, "names the function 'canary:fire'")
    fails("train --resume --name plain --steps 3", capsys, "config.yaml names the function 'canary:fire'")
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
        with pytest.raises(UsageError, match=rf"model.name: expected one of DiT, .*got '{name}'"):
            load_network(PLAIN)


class Fires:
    def __reduce__(self):
        return exec, (HOSTILE,)


def change_metadata(change) -> Path:
    path = newest(SHARDS)
    metadata = pickle.loads((path / "shards/.metadata").read_bytes())
    (path / "shards/.metadata").write_bytes(pickle.dumps(change(metadata) or metadata))
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
    (lambda m: setattr(tensor(m), "size", HUGE), "its shards do not make a tensor of size"),
    (lambda m: setattr(tensor(m), "size", (1e30,)), "expected sizes, got (1e+30,)"),
    (huge, "model|x_embedder.proj.weight: expected (1099511627776, 1, 4, 4) of torch.float32"),
    (lambda m: setattr(tensor(m), "chunks", tensor(m).chunks * 2), "its shards do not make"),
    (lambda m: setattr(tensor(m), "chunks", []), "its shards do not make"),
    (lambda m: m.state_dict_metadata.update({"other": tensor(m)}), "other: expected"),
]


@pytest.mark.parametrize(("change", "words"), METADATA)
def test_the_list_of_shards_runs_nothing_and_is_checked(here, capsys, change, words):
    path = change_metadata(change)
    with pytest.raises(UsageError) as error:
        load_checkpoint(path)
    assert words in str(error.value)
    assert "shards" in str(error.value)
    fails("train --resume --name shards --steps 3", capsys, "shards", "step_00000001 is intact: remove")
    other = path.with_name("step_00000009")  # the search for an intact one meets it too
    shutil.copytree(path, other)
    (path.with_name("step_00000001") / "state.json").unlink()
    assert cure_for_damage(path.parent, other) == ""


@pytest.mark.parametrize("deeper", [b"\x85", b"K\x01\x86", b"q\x01h\x01\x85"], ids=["one", "two", "remembered"])
def test_a_list_of_shards_that_is_too_deep_to_compare_is_refused(here, deeper):
    """Python's C code would run out of stack at the hash of the key, and end the process."""
    path = newest(SHARDS)
    (path / "shards/.metadata").write_bytes(b"\x80\x04})" + deeper * 1_000_000 + b"K\x01s.")
    seal(path, json.loads((path / "state.json").read_text()))
    with pytest.raises(UsageError, match="expected at most 10000 objects in each other"):
        load_checkpoint(path)


def test_tensors_of_shards_run_nothing(here):
    path = newest(SHARDS)
    (file,) = (path / "shards").glob("*.distcp")
    for hostile in (pickle.dumps(Fires()), _saved(Fires())):
        file.write_bytes(hostile + file.read_bytes()[len(hostile) :])
        seal(path, json.loads((path / "state.json").read_text()))
        with pytest.raises(UsageError, match=r"cannot read .*shards"):
            load_checkpoint(path)


def _saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_pickle_changes_no_class_of_pytorch(here):
    """BUILD can set attributes of whatever a pickle can name."""
    from torch.distributed.checkpoint.metadata import Metadata

    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (newest(SHARDS) / "shards/.metadata").write_bytes(b"\x80\x02" + name + b"N}X\x06\x00\x00\x00marked\x88s\x86b.")
    with pytest.raises(UsageError, match=r"cannot read .*\.metadata"):
        read_metadata(newest(SHARDS) / "shards")
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
