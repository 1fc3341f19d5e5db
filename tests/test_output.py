"""Commands whose output nobody reads any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import TINY, losses
from tqdm import tqdm

from meanflow import cli
from meanflow.output import handling_broken_pipes


def run(line: str, *, unread: tuple[str, ...], unbuffered: bool) -> tuple[int, str]:
    """Exit code of `meanflow LINE` where these streams have no reader, and what it says on the other one."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {name: writer if name in unread else subprocess.PIPE for name in ("stdout", "stderr")}
    done = subprocess.run(
        [sys.executable, "-m", "meanflow", *line.split()],
        **streams,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else "", "OMP_NUM_THREADS": "1"},
    )
    os.close(writer)
    return done.returncode, (done.stdout or "") + (done.stderr or "")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("line", ["--help", "--version", "sample --help", "data check --help"])
def test_a_reader_that_leaves_ends_a_command_without_a_word(line, unbuffered):
    assert run(line, unread=("stdout",), unbuffered=unbuffered) == (141, "")


def test_training_goes_on_without_readers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY.replace(steps=3).to_dict()))
    assert run("train --config tiny.yaml", unread=("stdout", "stderr"), unbuffered=False) == (141, "")
    assert len(losses("tiny")) == 3
    assert Path("runs/tiny/samples.png").is_file()


@pytest.fixture
def unread():
    """A text stream without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        yield stream


def test_progress_that_nobody_reads_is_dropped(unread, monkeypatch):
    monkeypatch.setattr(sys, "stderr", unread)
    with handling_broken_pipes():
        for _ in range(2):
            print("step 1", file=sys.stderr, flush=True)
        tqdm.write("step 2", file=sys.stderr)
        done = sys.stderr.isatty() is False
    assert done
    assert sys.stderr is unread


def test_a_result_that_nobody_reads_ends_the_command(unread, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", unread)
    with pytest.raises(SystemExit) as stop, handling_broken_pipes():
        print("class accuracy", flush=True)
    assert stop.value.code == 141
    assert cli.main(["sample", "nothing"]) == 2  # says nothing on stdout
    assert "nothing does not exist" in capsys.readouterr().err


def test_a_broken_pipe_elsewhere_is_an_error_like_others():
    with pytest.raises(BrokenPipeError), handling_broken_pipes():
        raise BrokenPipeError
