"""Each example is short and runs; the README's section does what it says when it is pasted into a file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"timm_vit": ("torchvision_stub", "timm"), "diffusers_dit": ("torchvision_stub", "diffusers")}


def run(source, folder, *arguments, needs=()):
    """A fresh interpreter that defines what a CPU build of PyTorch lacks, then runs the file as `python file` does."""
    for package in needs:
        pytest.importorskip(package)
    code = f"import {', '.join((*needs, 'runpy', 'sys'))}; sys.argv = {[str(source), *arguments]!r}; "
    code += f"sys.path[0] = {str(source.parent)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    support = os.pathsep.join([str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": support}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(example, tmp_path):
    assert len(example.read_text().splitlines()) < 40
    printed = run(example, tmp_path, "2", needs=NEEDS.get(example.stem, ()))
    loss = re.match(r"loss (\d+\.\d+)", printed)
    assert loss, printed
    if example.stem == "two_moons":
        assert (tmp_path / "two_moons.png").stat().st_size > 10_000
    if "torch.func.jvp" in printed:  # every operation of these networks has a rule of its own
        raise AssertionError(printed)


def test_the_examples_are_the_ones_the_readme_names():
    text = (ROOT / "README.md").read_text()
    assert {path.stem for path in EXAMPLES} == set(re.findall(r"examples/(\w+)\.py", text))


def test_the_readmes_section_works_when_pasted(tmp_path):
    section = (ROOT / "README.md").read_text().split("## With your own network\n")[1].split("\n## ")[0]
    assert len(section.strip().splitlines()) < 30
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "pasted.py").write_text(block)
    assert "one-step" in run(tmp_path / "pasted.py", tmp_path)
