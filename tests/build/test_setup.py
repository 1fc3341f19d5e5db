"""What setup.py decides to compile, and what it says where it cannot. It compiles nothing here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MFKERNELS_CUDA", "CUDA_"))}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True)


def fake_nvcc(folder: Path, archs: str) -> str:
    """A PATH whose nvcc can compile for `archs`."""
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nprintf '{archs}'\n")
    nvcc.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


HAS_EXTENSION = """
import runpy, setuptools
setuptools.setup = lambda **kw: print(len(kw["ext_modules"]))
runpy.run_path("setup.py")
"""


def extensions(**environment: str) -> tuple[int, str]:
    """How many extensions setup.py asks for, and what it says."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MFKERNELS_CUDA", "CUDA_"))}
    command = [sys.executable, "-c", HAS_EXTENSION]
    done = subprocess.run(command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), done.stderr


def test_a_toolkit_is_used_where_there_is_one(tmp_path: Path) -> None:
    path = fake_nvcc(tmp_path, "compute_80\\ncompute_90\\n")
    assert extensions(PATH=path) == (1, "")
    assert extensions(PATH=path, MFKERNELS_CUDA="1") == (1, "")
    assert extensions(PATH=path, MFKERNELS_CUDA="0") == (0, "")
    assert extensions(PATH=path, MFKERNELS_CUDA_ARCHS="sm_90a") == (1, "")


def test_a_toolkit_that_is_too_old(tmp_path: Path) -> None:
    path = fake_nvcc(tmp_path, "compute_70\\ncompute_80\\n")
    count, words = extensions(PATH=path)
    assert count == 0
    assert re.search(r"no CUDA extension: setup.py .*nvcc cannot compile for sm_90a", words)
    done = run("--version", PATH=path, MFKERNELS_CUDA="1")
    assert done.returncode != 0
    assert "MFKERNELS_CUDA=1 asks for the CUDA extension, but setup.py" in done.stderr
    assert "nvcc cannot compile for sm_90a" in done.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MFKERNELS_CUDA": "yes"}, "MFKERNELS_CUDA: expected 0 or 1 (or nothing), got 'yes'"),
        ({"MFKERNELS_CUDA_ARCHS": "sm_70"}, "MFKERNELS_CUDA_ARCHS: expected any of sm_90a, got 'sm_70'"),
    ],
)
def test_wishes_that_make_no_sense_are_errors(environment: dict[str, str], words: str) -> None:
    done = run("--version", **environment)
    assert done.returncode != 0
    assert words in done.stderr


def test_every_source_is_compiled_and_shipped() -> None:
    """A new kernel file needs no list: setup.py and MANIFEST.in take what is in csrc/."""
    code = (
        "import runpy, setuptools; setuptools.setup = lambda **kw: None; print(*runpy.run_path('setup.py')['SOURCES'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    on_disk = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cpp")}
    assert set(done.stdout.split()) == on_disk
    assert "graft csrc" in (ROOT / "MANIFEST.in").read_text()
