"""Other values in the files of the runs that `make_runs` makes, and what the command line says of them."""

import json
from pathlib import Path

from damage import seal

from meanflow import cli
from meanflow.training import list_checkpoints

PLAIN, SHARDS = Path("runs/plain"), Path("runs/shards")


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
