"""Damaged and hostile files of a run, and what the program does with them.

PYTHONPATH=.:tests/support python -m damage 1000          # seeds 0 to 999, a table, status 0 or 1
PYTHONPATH=.:tests/support python -m damage --seed 17     # one seed: what was damaged, and what came of it
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny_runs
import torch
import yaml
from safetensors.torch import load_file, save_file

from meanflow import cli
from meanflow.errors import UsageError
from meanflow.models import config_of
from meanflow.training import list_checkpoints, load_checkpoint, load_network, run_training
from meanflow.training.shards import save_shards
from meanflow.training.state import checksum, save_state

TINY = tiny_runs.TINY.replace(
    name="plain", hidden_size=8, steps=2, batch_size=4, warmup_steps=0, checkpoint_every=1, ema_decays=(0.9,)
)
PARTS = ("model", "ema", "averages", "optimizer")
CANARY = Path("CANARY")  # what only code that must not run writes
HOSTILE = f"open({str(CANARY)!r}, 'w').close()\ndef fire(**sizes):\n    raise ValueError('fired')\n"
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 3, 1.5, 1e30, -1e30, 1e308, 10**30, 2**62, float("nan"), float("inf"), "", "x", "\0",
    "\ud800", "é" * 99, "os:system", "canary:fire", "DiT-XL/2", "DiT", "Affine", "Affinity", "iMF-DiT", "flow_matching",
    [], {}, [[]], [1, "a", None], {"a": {"b": 1}}, [None], "../../x",
]  # fmt: skip
ODD_YAML = [
    "null", "yes", "-1", "0", "3", "1.5", "1e30", "1e400", ".nan", "9" * 5000, "0x" + "f" * 5000, "2020-01-01", "'x'",
    "2020-99-99", '"\\0"', '"\\ud800"', "canary:fire", "os:system", "[]", "[1, 2]", "[a, b]", "{a: 1}", "&a [*a]", "*a",
    "!!python/object/apply:os.system [touch CANARY]", "[" * 3000, "{a: " * 3000, "1:30", "@", "\t", "'", "10000000000",
    "DiT-XL/2", "\x07", "iMF-DiT", "cuda", "no", "runs",
]  # fmt: skip


class _Fires:
    """A pickle that runs code."""

    def __reduce__(self) -> Any:
        return exec, (HOSTILE,)


@contextlib.contextmanager
def quiet(folder: Path) -> Iterator[io.StringIO]:
    """In `folder`, with what is said on stderr collected, and on stdout dropped."""
    before, said = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            yield said
    finally:
        os.chdir(before)


def make_runs(folder: Path) -> None:
    """In `folder`: runs/plain, runs/shards (as FSDP2 writes it), a weight file, a module that fires when imported."""
    (folder / "canary.py").write_text(HOSTILE)
    with quiet(folder):
        run_training(TINY)
        plain = Path("runs/plain")
        figures = {"class_accuracy": 0.5, "frechet_distance": None, "seconds": 3.0, "training_seconds": 2.0, "steps": 2}
        (plain / "report.json").write_text(json.dumps(figures))
        shutil.copytree(plain, "runs/shards")
        for path in list_checkpoints(Path("runs/shards/checkpoints")):
            saved = load_checkpoint(path)
            (path / "optimizer.safetensors").unlink()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # there is no process group
                save_shards(path / "shards", saved.tensors)
            seal(path, saved.state)
        newest = list_checkpoints(plain / "checkpoints")[-1]
        model = json.loads((newest / "state.json").read_text())["model"]
        save_file(load_file(newest / "ema.safetensors"), "ours.safetensors", metadata={"model": json.dumps(model)})


def seal(path: Path, state: dict[str, Any]) -> None:
    """Write state.json with the checksums that its folder's files have now, as a forger would."""
    names = [file for file in path.rglob("*") if file.is_file() and file.name != "state.json"]
    values = {key: value for key, value in state.items() if key != "checksums"}
    save_state(path, values, {str(file.relative_to(path)): checksum(file) for file in names})


# ------------------------------------------------------------------------------------------------------------- damages


def flip(rng: random.Random, path: Path) -> None:
    """Bits."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(rng: random.Random, path: Path) -> None:
    os.truncate(path, rng.choice([0, 1, 7, 8, 9, path.stat().st_size - 1, rng.randrange(path.stat().st_size)]))


def extend(rng: random.Random, path: Path) -> None:
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b"}", b"x" * 100, path.read_bytes()]))


def blank(rng: random.Random, path: Path) -> None:
    """A block of zeros or noise in the middle."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    length = min(rng.choice([1, 16, 512]), len(data) - start)
    data[start : start + length] = rng.choice([bytes(length), rng.randbytes(length)])
    path.write_bytes(data)


def swap(rng: random.Random, path: Path) -> Path:
    """With another file of the run, which is returned."""
    top = next(parent for parent in path.parents if (parent / "canary.py").is_file())
    files = [file for file in (top / "runs").rglob("*") if file.is_file() and file != path]
    other = rng.choice(sorted(files))
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return other


def replace(rng: random.Random, path: Path) -> None:
    """By nothing, a folder, a link or a pipe."""
    path.unlink()
    kind = rng.choice(["nothing", "folder", "loop", "nowhere", "pipe"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to({"loop": path.name, "nowhere": "no/such/place"}[kind])


BYTES = [flip, flip, cut, extend, blank, swap, replace]


def odd_json(rng: random.Random, path: Path) -> None:
    """One of the values of a JSON file, anywhere in it."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = rng.randrange(len(lines))
    lines[at] = _odd(rng, lines[at])
    path.write_text("\n".join(lines) + "\n")


def _odd(rng: random.Random, text: str) -> str:
    value = json.loads(text)
    places = [(value, key) for key in value]
    for node, key in places:
        child = node[key]
        places += [
            (child, i) for i in (child if isinstance(child, dict) else range(len(child) if type(child) is list else 0))
        ]
    node, key = rng.choice(places)
    kind = rng.choice(["value", "value", "value", "value", "gone", "twice", "deep", "whole", "long"])
    if kind == "gone":
        del node[key]
    elif kind == "twice":
        return json.dumps(value).replace("{", '{"step": 1, ', 1)
    else:
        node[key] = rng.choice(ODD) if kind == "value" else "PLACE"
    if kind == "whole":
        return json.dumps(rng.choice(ODD))
    filler = {"deep": rng.choice(["[" * 30 + "]" * 30, '{"a":' * 5000 + "1" + "}" * 5000]), "long": "9" * 5000}
    return json.dumps(value).replace('"PLACE"', filler.get(kind, "1"))


def odd_yaml(rng: random.Random, path: Path) -> None:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    key = lines[at].partition(":")[0]
    lines[at] = rng.choice(
        [f"{key}: {rng.choice(ODD_YAML)}"] * 4
        + [f"{lines[at]}\n{lines[at]}", f"unknown{lines[at]}", "? [a]\n: 1", "- 1"]
    )
    path.write_text("\n".join(lines))


def odd_tensors(rng: random.Random, path: Path) -> None:
    """NaN, infinity, integers, another shape, another name, or a header that says so."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(["nan", "inf", "integer", "complex", "shape", "name", "gone", "more", "header", "header"])
    if kind == "header":
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = rng.choice(
            [
                lambda text: text.replace("F32", rng.choice(["F64", "I32", "F8_E4M3", "XX", "F4", "U8"]), 1),
                lambda text: re.sub(r"\[\d+", rng.choice(["[9999999999999", "[-1", "[0", "[1e30"]), text, count=1),
                lambda text: _odd(rng, text),
            ]
        )(data[8 : 8 + length].decode())
        path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + data[8 + length :])
        return
    value = tensors.pop(name)
    if kind in ("nan", "inf"):
        value = value.clone()
        value.view(-1)[rng.randrange(value.numel())] = float(kind)
    elif kind in ("integer", "complex"):
        value = value.to(torch.int64 if kind == "integer" else torch.complex64)
    elif kind == "shape":
        value = torch.zeros(*value.shape, 2)
    if kind != "gone":
        tensors[f"{name}.more" if kind == "name" else name] = value
    if kind == "more":
        tensors["more"] = value.clone()
    save_file(tensors, path, metadata=None)


def hostile_state(rng: random.Random, path: Path) -> None:
    """A state.json whose model or objective is a function."""
    state = json.loads(path.read_text())
    if rng.random() < 0.3:
        state["objective"] = rng.choice(
            ["canary:fire", {"name": "canary:fire"}, {**state["objective"], "name": "os:system"}]
        )
        path.write_text(json.dumps(state))
        return
    state["model"] = rng.choice(
        [
            {"name": "os:system", "config": {**state["model"]["config"], "command": f"touch {CANARY}"}},
            {"name": "os:system", "config": {"command": f"touch {CANARY}"}},
            {"name": "canary:fire", "config": state["model"]["config"]},
            {"name": f"{rng.choice(['DiT', 'Affine', 'iMF-DiT'])}canary:fire", "config": state["model"]["config"]},
        ]
    )
    path.write_text(json.dumps(state))


def hostile_weights(rng: random.Random, path: Path) -> None:
    """A safetensors file whose metadata name a function."""
    model = rng.choice(
        [
            {"name": "os:system", "config": {"command": f"touch {CANARY}", "num_classes": 1}},
            {"name": "canary:fire", "config": {"input_size": 8, "in_channels": 1, "num_classes": 10}},
        ]
    )
    save_file(load_file(path), path, metadata={"model": json.dumps(model)})


def hostile_config(rng: random.Random, path: Path) -> None:
    """A config.yaml whose model or another component is a function."""
    values = yaml.safe_load(path.read_text())
    group = rng.choice([group for group in values if isinstance(values[group], dict) and "name" in values[group]])
    values[group] = rng.choice([{**values[group], "name": "canary:fire"}, "canary:fire", {"name": "os:system"}])
    path.write_text(yaml.safe_dump(values))


def hostile_metadata(rng: random.Random, path: Path) -> None:
    """A shards/.metadata that runs code, or lists what is not there."""
    metadata = pickle.loads(path.read_bytes())
    name, index = rng.choice(sorted(metadata.state_dict_metadata)), rng.choice(list(metadata.storage_data))
    place, tensor = metadata.storage_data[index], metadata.state_dict_metadata[name]
    kind = rng.randrange(14)
    if kind == 0:
        metadata = _Fires()
    elif kind == 1:
        metadata.planner_data = _Fires()
    elif kind == 2:
        place.relative_path = _Fires()
    elif kind == 3:
        metadata.state_dict_metadata[name] = _record("BytesStorageMetadata")
        (path.parent / place.relative_path).write_bytes(pickle.dumps(_Fires()) * 1000)
    elif kind == 4:
        place.relative_path = rng.choice(["../state.json", "/dev/zero", "..", "", "\0", "a/b", ".metadata", "nowhere"])
    elif kind == 5:
        place.offset = rng.choice([-1, 10**30, 2**62, 1.5, None, True])
    elif kind == 6:
        place.length = rng.choice([-1, 10**30, 2**62, 1.5, None, True, 0])
    elif kind == 7:
        place.transform_descriptors = ["zstd"]
    elif kind == 8:
        tensor.size = rng.choice(
            [torch.Size([2**40]), (1e30,), "x", None, torch.Size([0]), (-1,), torch.Size([2**62, 2**62])]
        )
    elif kind == 9:
        tensor.properties.dtype = rng.choice([torch.int64, torch.complex128, torch.float16, torch.bool])
    elif kind == 10:
        tensor.chunks = rng.choice([[], tensor.chunks * 2, None, [_Fires()], [1]])
    elif kind == 11:
        tensor.chunks[0].offsets = rng.choice([torch.Size([1] * len(tensor.size)), None, ("a",), torch.Size([0] * 9)])
    elif kind == 12:
        del metadata.storage_data[index]
    else:
        metadata.state_dict_metadata = rng.choice(
            [{}, None, {"x": tensor}, {"x|y": tensor}, {1: tensor}, {"model|": tensor}]
        )
    path.write_bytes(pickle.dumps(metadata))


def _record(name: str) -> Any:
    return getattr(sys.modules["torch.distributed.checkpoint.metadata"], name)()


def hostile_share(rng: random.Random, path: Path) -> None:
    """A share whose first tensor is a pickle that runs code, where PyTorch looks for it."""
    hostile = io.BytesIO()
    torch.save(_Fires(), hostile)
    data = path.read_bytes()
    path.write_bytes(
        hostile.getvalue() + data[len(hostile.getvalue()) :] if rng.random() < 0.5 else pickle.dumps(_Fires())
    )


SPECIAL: dict[str, list[Callable[[random.Random, Path], Path | None]]] = {
    "state.json": [odd_json, odd_json, odd_json, hostile_state],
    "report.json": [odd_json],
    "log.jsonl": [odd_json],
    "config.yaml": [odd_yaml, odd_yaml, odd_yaml, hostile_config],
    ".metadata": [hostile_metadata, hostile_metadata],
    "ours.safetensors": [odd_tensors, hostile_weights],
    ".safetensors": [odd_tensors],
    ".distcp": [hostile_share],
}
EDITABLE = ("config.yaml", "report.json", "log.jsonl")  # a user may write other values there


def damage(rng: random.Random, folder: Path) -> tuple[list[Path], str, bool]:
    """Damage files in `folder`; returns them, what was done, and whether that must be told where they are read."""
    run = rng.choice(["plain", "shards", "shards", "file"])
    if run == "file":
        path = folder / "ours.safetensors"
    else:
        newest = list_checkpoints(folder / "runs" / run / "checkpoints")[-1]
        files = [
            *(folder / "runs" / run / name for name in EDITABLE),
            *(file for file in newest.rglob("*") if file.is_file()),
        ]
        weights = [4 if file.name in ("state.json", "config.yaml", ".metadata") else 1 for file in files]
        (path,) = rng.choices(files, weights)
    special = SPECIAL.get(path.name) or SPECIAL.get(path.suffix, [])
    act = rng.choice(BYTES if rng.random() < 0.4 or not special else special)
    checksums = "none" if run == "file" else rng.choice(["kept", "kept", "forged", "none"])
    states = sorted(folder.glob(f"runs/{run}/checkpoints/*/state.json"))
    if checksums == "none":
        for file in states:
            state = json.loads(file.read_text())
            del state["checksums"]
            file.write_text(json.dumps(state))
    other = act(rng, path)
    if checksums == "forged":
        for file in filter(Path.is_file, states):  # not a pipe, which nothing comes out of
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
                seal(file.parent, json.loads(file.read_text()))
    paths = [path, other] if other else [path]
    return paths, f"{act.__name__} of {path.relative_to(folder)}, checksums {checksums}", checksums == "kept"


# ------------------------------------------------------------------------------------------------------------ outcomes


def contents(loaded: Any) -> Any:
    """What was loaded, to be compared."""
    if hasattr(loaded, "net"):
        others = (loaded.class_names, loaded.objective, loaded.step, config_of(loaded.net))
        return loaded.net.state_dict(), others
    state = {key: value for key, value in loaded.state.items() if key != "checksums"}
    return {f"{part}|{k}": v for part in PARTS for k, v in getattr(loaded, part).items()}, state


def same(a: Any, b: Any) -> bool:
    (tensors, others), (tensors_b, others_b) = a, b
    return (
        others == others_b
        and tensors.keys() == tensors_b.keys()
        and all(
            torch.equal(value, tensors_b[key]) and value.dtype == tensors_b[key].dtype for key, value in tensors.items()
        )
    )


LOADS: dict[str, Callable[[str], Any]] = {
    "load_network": lambda run: load_network(Path("runs") / run),
    "load_network raw": lambda run: load_network(Path("runs") / run, "raw"),
    "load_network 0.9": lambda run: load_network(Path("runs") / run, "0.9"),
    "load_checkpoint": lambda run: load_checkpoint(Path("runs") / run / "checkpoints/step_00000002"),
}
COMMANDS = [
    "sample {run} --labels 1 --count 1 --out x.npy",
    "evaluate {run} --samples 20",
    "train --resume --name {run} --steps 3 --threads 1",
    "train --config runs/{run}/config.yaml --name other --steps 1 --threads 1",
]
OF_FILE = [
    "sample ours.safetensors --labels 1 --count 1 --out x.npy",
    "train --data digits --model DiT --hidden-size 8 --depth 1 --num-heads 2 --patch-size 4 --ratio 0.5 --batch-size 4 "
    "--steps 1 --device cpu --no-evaluate --name other --init ours.safetensors",
]


def outcomes(
    rng: random.Random, folder: Path, paths: list[Path], strict: bool, healthy: dict[str, Any], commands: int
) -> list[str]:
    """What the program does with a damaged file: "same", "other", "refused", and faults as "fault: …"."""
    found = []
    run = paths[0].relative_to(folder).parts[1] if paths[0].name != "ours.safetensors" else ""
    loads = LOADS if run else {"load_network file": lambda run: load_network(Path("ours.safetensors"))}
    with quiet(folder) as said:
        for name, load in loads.items():
            try:
                got = contents(load(run))
                equal = same(got, healthy[f"{run} {name}"])
                found.append("same" if equal else f"fault: {name} loaded other values" if strict else "other")
            except UsageError as error:
                found.append(_refused(name, str(error), paths))
            except Exception:
                found.append(f"fault: {name}: {traceback.format_exc()}")
        for line in rng.sample(COMMANDS if run else OF_FILE, commands):
            said.truncate(0)
            said.seek(0)
            words = line.format(run=run)
            try:
                code = cli.main(words.split())
            except SystemExit as stop:
                code = stop.code
            except _Hung:
                raise
            except BaseException:
                found.append(f"fault: {words}: {traceback.format_exc()}")
                continue
            last = said.getvalue().rstrip("\n").rpartition(f"meanflow {words.split()[0]}: ")[2]
            if code == 0:
                found.append("done")
            elif code == 2:
                found.append(_refused(words, last, paths))
            elif code == 1 and "training stopped because" in last:
                found.append("diverged")  # as a learning rate of 1e30 does
            else:
                found.append(f"fault: {words}: code {code}: {said.getvalue()}")
    if (folder / CANARY).exists():
        found.append("fault: code was executed")
    return found


def _refused(what: str, words: str, paths: list[Path]) -> str:
    if "\n" in words or "Traceback" in words or not words.strip():
        return f"fault: {what}: expected one paragraph, got {words!r}"
    # values of a configuration that can be read are refused by their own names
    if any(path.name in words or path.parent.name in words or path.name == "config.yaml" for path in paths):
        return "refused"
    return f"fault: {what}: {paths[0].name} is not named: {words}"


class Fuzzer:
    """Runs to damage copies of, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "healthy").mkdir()
        make_runs(folder / "healthy")
        with quiet(folder / "healthy"):
            self.values = {
                f"{run} {name}": contents(load(run)) for run in ("plain", "shards") for name, load in LOADS.items()
            }
            self.values[" load_network file"] = contents(load_network(Path("ours.safetensors")))

    def check(self, seed: int, commands: int = 1) -> tuple[str, list[str]]:
        """What was damaged with this seed, and the outcomes."""
        rng = random.Random(seed)
        copy = self.folder / "copy"
        shutil.copytree(self.folder / "healthy", copy)
        try:
            paths, what, strict = damage(rng, copy)
            strict = strict and paths[0].name not in EDITABLE
            return what, outcomes(rng, copy, paths, strict, self.values, commands)
        finally:
            shutil.rmtree(copy)
            sys.modules.pop("canary", None)


class _Hung(BaseException):
    pass


def _stop(*_: Any) -> None:
    raise _Hung


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="show and check one seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # what asks for more is told so
    signal.signal(signal.SIGALRM, _stop)
    seeds = range(args.first, args.first + args.count) if args.seed is None else [args.seed]
    counts: collections.Counter[str] = collections.Counter()
    faults, start = 0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for seed in seeds:
            signal.alarm(120)
            try:
                what, found = fuzzer.check(seed)
            except _Hung:
                what, found = "?", [f"fault: hung: {traceback.format_exc()}"]
            signal.alarm(0)
            bad = [words for words in found if words.startswith("fault")]
            counts.update("fault" if words.startswith("fault") else words for words in found)
            if bad or args.seed is not None:
                print(f"seed {seed}: {what}", *found, sep="\n  ", flush=True)
            faults += bool(bad)
    print(f"{len(seeds)} damaged files in {time.time() - start:.0f} s, {faults} with faults: {dict(counts)}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
