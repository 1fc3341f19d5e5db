"""A run has one owner: who comes second is told, and who is killed leaves nothing in the way."""

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tiny_runs import TINY, losses, stop_after

from meanflow.errors import UsageError
from meanflow.files import write_text
from meanflow.training import Trainer, TrainingError, list_checkpoints, run_training
from meanflow.training.owner import owned


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("meanflow.training.run.save_loss_curve", lambda rows, path: None)  # a second each


HOLD = """
import sys
import tempfile
from pathlib import Path
from meanflow.training.owner import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def owner():
    """Another process that owns runs/tiny until its stdin closes."""
    command = [sys.executable, "-c", HOLD, "runs/tiny"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "owned\n"
        yield process
        process.kill()


def test_the_second_is_told_who_the_first_is(owner):
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match=rf"tiny is in use: process {owner.pid} on \S+ trains it since \d{{4}}"):
            run_training(TINY, **how)
    assert os.listdir("runs") == [".tiny.lock"]
    run_training(TINY.replace(name="other", steps=1))
    assert sorted(os.listdir("runs")) == [".tiny.lock", "other"]
    owner.communicate("\n")  # it ends
    run_training(TINY)
    assert sorted(os.listdir("runs")) == ["other", "tiny"]


def test_a_killed_owner_leaves_no_lock(owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert Path("runs/.tiny.lock").exists()
    run_training(TINY)
    assert os.listdir("runs") == ["tiny"]


def test_a_process_does_not_own_a_run_twice():
    with owned(Path("runs/tiny")):
        with pytest.raises(UsageError, match=rf"in use: this very process \({os.getpid()}\)"):
            run_training(TINY)
        assert Path("runs/.tiny.lock").exists()
    assert not Path("runs").exists()


def test_a_file_that_its_last_owner_has_removed_is_no_lock(monkeypatch):
    """The last owner ends between the opening and the locking of the file."""
    lock, calls = fcntl.lockf, []

    def late(handle, how):
        calls.append(handle)
        if len(calls) == 1:
            Path("runs/.tiny.lock").unlink()
        return lock(handle, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with owned(Path("runs/tiny")):
        assert len(calls) == 2
        assert os.stat("runs/.tiny.lock").st_ino == os.fstat(calls[1]).st_ino


def test_a_file_system_without_locks_is_named(monkeypatch, capsys):
    def refuses(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuses)
    with owned(Path("runs/tiny")):
        assert "runs/tiny: its file system has no locks (No locks available)" in capsys.readouterr().err


def test_what_killed_processes_had_begun_to_write_goes(monkeypatch):
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 4)
        run_training(TINY)
    for name in (".log.7.partial.jsonl", ".config.7.partial.yaml", ".report.12.partial.json", ".samples.9.partial.png"):
        Path("runs/tiny", name).write_text("half")
    (Path("runs/tiny/checkpoints/.step_00000099.partial") / "shards").mkdir(parents=True)
    Path("runs/tiny/.mine.7.partial.png").write_text("somebody else's")
    run_training(TINY, resume=True)
    hidden = [path.name for path in Path("runs/tiny").rglob(".*")]
    assert hidden == [".mine.7.partial.png"]


def test_a_run_killed_before_its_config_was_written_is_started_anew():
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/.config.7.partial.yaml").write_text("half")
    run_training(TINY)
    assert losses("tiny")
    assert not list(Path("runs/tiny").glob(".*"))


def test_an_overwrite_that_is_killed_leaves_the_run_or_nothing(monkeypatch):
    """In the middle of the removal of its folder, and of a checkpoint that is not kept."""
    run_training(TINY)
    remove = shutil.rmtree

    def killed(path, **options):
        if Path(path).exists():
            (Path(path) / "config.yaml").unlink(missing_ok=True)
            raise KeyboardInterrupt

    with monkeypatch.context() as kill:
        kill.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training(TINY.replace(steps=2), overwrite=True)
        assert os.listdir("runs") == [".tiny.removed.partial"]
        kill.setattr(shutil, "rmtree", remove)
        run_training(TINY.replace(checkpoint_every=1, keep_checkpoints=2, steps=2))
        assert os.listdir("runs") == ["tiny"]
        kill.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training(TINY.replace(checkpoint_every=1), resume=True)
    assert sorted(os.listdir("runs/tiny/checkpoints")) == [".step_00000001.removed.partial", "step_00000002"]
    run_training(TINY, resume=True)
    assert not list(Path("runs").rglob(".*"))


def test_a_resume_that_leads_nowhere_keeps_the_values_of_the_run(monkeypatch):
    run_training(TINY.replace(steps=3))
    before = Path("runs/tiny/config.yaml").read_bytes()

    def fails(self, batches):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "_train_step", fails)
        with pytest.raises(RuntimeError, match="allocate"):
            run_training(TINY.replace(batch_size=512), resume=True)
    assert Path("runs/tiny/config.yaml").read_bytes() == before
    run_training(TINY, resume=True)
    assert b"steps: 6" in Path("runs/tiny/config.yaml").read_bytes()


def test_a_full_disk_costs_the_new_checkpoint_alone(monkeypatch):
    """A limit on the size of files stands for it: either is an error of the write."""
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 3)
        run_training(TINY)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(TrainingError, match=r"checkpoint of step 6 could not be written.*from .*step_00000003"):
            run_training(TINY, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert os.listdir("runs/tiny/checkpoints") == ["step_00000003"]
    run_training(TINY, resume=True)
    run_training(TINY.replace(name="straight"))
    assert losses("tiny") == losses("straight")


def test_a_read_only_folder_is_named(monkeypatch):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        monkeypatch.chdir(folder)
        os.chmod(folder, 0o555)
        try:
            if user == 0:  # whom permissions do not stop
                os.seteuid(65534)
            with pytest.raises(UsageError, match=r"runs/tiny: cannot write .*/runs: Permission denied"):
                run_training(TINY)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_disk_needs_room_for_as_many_checkpoints_as_are_kept(monkeypatch, keep):
    """And for a second one where one is kept: there is always a whole one."""
    found = []
    write = "meanflow.training.checkpoint.save_file"
    from meanflow.training.checkpoint import save_file

    def counted(*args, **kwargs):
        folder = Path("runs/tiny/checkpoints")
        found.append((len(os.listdir(folder)), len(list_checkpoints(folder))))
        return save_file(*args, **kwargs)

    monkeypatch.setattr(write, counted)
    run_training(TINY.replace(checkpoint_every=1, keep_checkpoints=keep))
    assert max(there for there, _ in found) == max(2, keep)
    assert all(whole >= 1 for _, whole in found[3:])
    assert len(list_checkpoints(Path("runs/tiny/checkpoints"))) == keep


def test_the_lock_names_its_owner():
    with owned(Path("runs/tiny")):
        owner = json.loads(Path("runs/.tiny.lock").read_text())
    assert owner["process"] == os.getpid()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", owner["since"])


def test_a_write_that_fails_names_its_file_and_leaves_the_old_one():
    path = Path("notes.txt")
    write_text(path, "old")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*notes\.txt'"):
            write_text(path, "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert os.listdir() == ["notes.txt"]
    assert path.read_text() == "old"
