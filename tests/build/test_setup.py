"""What setup.py decides to compile, and what it says where it cannot. It compiles nothing here."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[2]
WATCHDOG = "MFKERNELS_CUDA_WATCHDOG"


def python(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Code, or a script and its arguments."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MFKERNELS_CUDA", "CUDA_"))}
    what = arguments if arguments[0].endswith(".py") else ("-c", *arguments)
    command = [sys.executable, *what]
    return subprocess.run(command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("setup.py", *arguments, **environment)


def fake_nvcc(folder: Path, archs: str) -> str:
    """A PATH whose nvcc can compile for `archs`."""
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nprintf '{archs}'\n")
    nvcc.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


HAS_EXTENSION = """
import runpy, setuptools
setuptools.setup = lambda **kw: print(len(kw["ext_modules"]))
runpy.run_path("setup.py", run_name="__main__")
"""


def extensions(**environment: str) -> tuple[int, str]:
    """How many extensions setup.py asks for, and what it says."""
    done = python(HAS_EXTENSION, **environment)
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
        ({"MFKERNELS_CUDA_WATCHDOG": "on"}, "MFKERNELS_CUDA_WATCHDOG: expected 0 or 1 (or nothing), got 'on'"),
        ({"MFKERNELS_CUDA_ARCHS": "sm_70"}, "MFKERNELS_CUDA_ARCHS: expected any of sm_90a, got 'sm_70'"),
    ],
)
def test_wishes_that_make_no_sense_are_errors(environment: dict[str, str], words: str) -> None:
    done = run("--version", **environment)
    assert done.returncode != 0
    assert words in done.stderr


@pytest.mark.parametrize(("wish", "on"), [({}, False), ({WATCHDOG: "0"}, False), ({WATCHDOG: "1"}, True)])
def test_the_watchdog_is_off_unless_asked_for(wish: dict[str, str], on: bool) -> None:
    pytest.importorskip("pybind11")
    code = "import pathlib, setup; print(*setup.flags(pathlib.Path('toolkit'))['nvcc'])"
    done = python(code, **wish)
    assert done.returncode == 0, done.stderr
    assert ("-DMF_WATCHDOG" in done.stdout.split()) == on


def test_without_setuptools(tmp_path: Path) -> None:
    """`import setup` and its `build_in_place` need none: that of a machine without a registry may be too old."""
    (tmp_path / "ninja.py").write_text(f"BIN_DIR = {str(tmp_path)!r}\n")
    ninja = tmp_path / "ninja"
    ninja.write_text('#!/bin/sh\nshift\ngrep "link csrc" "$1/build.ninja"\n')
    ninja.chmod(0o755)
    root = tmp_path / "copy"  # the plan is written there
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copy(ROOT / "setup.py", root)
    code = "import sys; sys.modules['setuptools'] = None; import setup; print(setup.build_in_place())"
    environment = {"PATH": fake_nvcc(tmp_path, "compute_90\\n"), "PYTHONPATH": str(tmp_path)}
    done = python(code, folder=root, **environment)
    assert done.returncode == 0, done.stderr
    target = str(root / "mfkernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    planned, said = done.stdout.splitlines()
    assert planned.startswith(f"build {target}: link ")
    assert said == target
    done = python(code, folder=root, MFKERNELS_CUDA="0", **environment)
    assert done.returncode != 0
    assert "the CUDA extension was not compiled" in done.stderr


SERIALIZED = "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"


def test_products_that_ptxas_serializes_fail_the_build(tmp_path: Path) -> None:
    """Each time: the object that nvcc has written does not count."""
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    root = tmp_path / "copy"
    (root / "csrc").mkdir(parents=True)
    (root / "csrc" / "kernel.cu").touch()
    shutil.copy(ROOT / "setup.py", root)
    path = fake_nvcc(tmp_path, "compute_90\\n")
    nvcc = tmp_path / "nvcc"
    compiles = """
while [ $# -gt 1 ]; do shift; [ "$1" = -o ] && touch "$2" && echo "$REMARK" >&2; done; exit 0
"""
    nvcc.write_text(nvcc.read_text() + compiles)
    code = "import pathlib, setup; setup.build(pathlib.Path('library.so').resolve(), ['csrc/kernel.cu'])"
    for _ in range(2):
        done = python(code, folder=root, PATH=path, REMARK=SERIALIZED)
        assert done.returncode != 0
        said = done.stdout + done.stderr
        assert "expected kernels whose products overlap, but ptxas says:\n  (C7512) Potential Performance Loss" in said
        assert "MFKERNELS_CUDA=0 installs without it" in said
        assert not (root / "library.so").exists()
    done = python(code, folder=root, PATH=path, REMARK="ptxas info    : 0 bytes gmem")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / "library.so").exists()


def test_every_source_is_compiled_and_shipped() -> None:
    """A new kernel file needs no list: setup.py and MANIFEST.in take what is in csrc/."""
    code = "import setup; print(*setup.SOURCES)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    on_disk = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cpp")}
    assert set(done.stdout.split()) == on_disk
    assert "graft csrc" in (ROOT / "MANIFEST.in").read_text()
