"""The authors' own values of the family's methods, and the command that compares with them."""

from pathlib import Path

import golden_family
import numpy as np
import pytest
import torch

FILES = sorted(path for path in (Path(__file__).parent / "golden").glob("*.npz") if "dit" not in path.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_values(path):
    file = golden_family.File(path)
    for name, ours in golden_family.METHODS[path.stem.rpartition("_")[0]](file):
        # measured 5.3e-14 at most; 2.9e-10 where the authors add noise times the root of a rounding error
        assert golden_family.error_of(ours, file[name]) <= (6e-10 if name.startswith("sample_") else 1.2e-13), name


def test_eleven_methods():
    assert {path.stem.rpartition("_")[0] for path in FILES} == golden_family.METHODS.keys()
    assert len(golden_family.METHODS) == 11


def test_the_command(capsys, tmp_path):
    path = FILES[0].parent / "ect_a.npz"
    assert golden_family.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(path)
    assert {"loss", "grad/W1", "target", "sample_2"} <= {line.split()[0] for line in lines[1:]}

    with np.load(path) as arrays:
        wrong = {name: arrays[name] for name in arrays.files}
    wrong["target"] = wrong["target"] * (1 + 1e-8)
    np.savez(tmp_path / "ect_b.npz", **wrong)
    assert golden_family.main([str(path), str(tmp_path / "ect_b.npz")]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "ABOVE" in line] == ["target"]
    wrong["target"][0] = np.nan
    np.savez(tmp_path / "ect_b.npz", **wrong)
    assert golden_family.main([str(tmp_path / "ect_b.npz")]) == 1
    assert golden_family.main([str(tmp_path / "other_b.npz")]) == 1
    assert "expected a file named METHOD_CASE.npz" in capsys.readouterr().out
    assert golden_family.main([]) == 1


def test_errors():
    a = torch.ones(3)
    assert golden_family.error_of(a, a) == 0
    assert golden_family.error_of(a, torch.ones(2)) == float("inf")
    assert golden_family.error_of(a * 1e-12, torch.zeros(3)) < 1e-11
