"""A folder of its own for each test, and runs whose files tests damage, forge or make hostile."""

import shutil
import sys

import pytest
import torch
from damage import CANARY, make_runs


@pytest.fixture(scope="session")
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


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("meanflow.training.run.save_loss_curve", lambda rows, path: None)  # a second each
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
