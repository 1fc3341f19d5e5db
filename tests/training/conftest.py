"""Runs whose files tests damage, forge or make hostile."""

import shutil
import sys

import pytest
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
