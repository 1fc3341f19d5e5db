"""bench/gpu.sh, rehearsed on a CPU: every stage runs, and what goes wrong in a row costs that row alone."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4")

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
PLANTED = {
    "test_backward[4x9x1x16-SDPA]": ("hang", "its process hung or died"),
    "test_forward[eager torch.func.jvp-gated_residual-40]": ("fail", "AssertionError: planted"),
    "test_whole_step[DiT-4-not guided-mf-all]": ("memory", "out of memory"),
    "test_whole_step[DiT-4-not guided-mf-graphs]": ("die", "its process hung or died"),
}
# what a CPU cannot serve is told, too
NOT_HERE = ("cuda", "cublaslt", "cudnn", "flash-attn", "jvp-flash", "test_jax")


def gpu_sh(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # bytecode is kept: two dozen processes import the same modules
    other = ("PYTEST_", "MFKERNELS_", "PYTHONDONTWRITEBYTECODE")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(other)}
    environment |= {"PYTHON": sys.executable, **variables}
    return subprocess.run([ROOT / "bench" / "gpu.sh", *arguments], env=environment, capture_output=True, text=True)


def figures(path: Path) -> list[dict]:
    told = json.loads(path.read_text())
    assert told["environment"]["rehearsal"] == "no figure means anything"
    return told["figures"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out, absent = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("absent")
    for name in ("tyro", "diffusers"):  # the GPU machine lacks them
        (absent / f"{name}.py").write_text('raise ImportError("absent")\n')
    done = gpu_sh(
        "--rehearse",
        str(out),
        PYTHONPATH=f"{absent}:{SUPPORT}",
        PYTEST_ADDOPTS="-p planted",
        PLANTED=",".join(f"{kind}:{name}" for name, (kind, _) in PLANTED.items()),
        BENCH_ROW_SECONDS="20",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


def test_every_stage_runs_and_everything_is_packed(out):
    stages = [line.split("\t")[:3] for line in (out / "stages.tsv").read_text().splitlines()]
    spoilt = {("kernels", "attention"), ("kernels", "ops"), ("step", "step"), ("sizes", "sizes")}
    assert [(part, name) for part, name, _ in stages] == [
        ("right", "check"),
        ("right", "bringup"),
        ("right", "ragged"),
        ("right", "tests"),
        ("right", "train"),
        ("step", "step"),
        ("step", "profile"),
        ("step", "tune"),
        ("step", "step_tuned"),
        ("kernels", "attention"),
        ("kernels", "ops"),
        ("kernels", "cuda"),
        ("sizes", "sizes"),
        ("sizes", "sizes_cuda"),
        ("jax", "jax"),
    ]
    for part, name, said in stages:
        assert said == f"exit code {int((part, name) in spoilt)}", (part, name)
    with tarfile.open(out / "all.tgz") as packed:
        names = {Path(name).name for name in packed.getnames()}
    assert names >= {path.name for path in out.iterdir()} - {"all.tgz"}
    assert json.loads((out / "check.json").read_text())["ok"] is True


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("attention", 10),
        ("ops", 40),
        ("cuda", 0),
        ("step", 10),
        ("step_tuned", 2),
        ("sizes", 3),
        ("sizes_cuda", 0),
        ("jax", 0),
    ],
)
def test_what_is_spoilt_is_named_and_every_other_row_is_there(out, name, measured):
    rows = figures(out / f"{name}.json")
    not_measured = {row["row"]: row["why"] for row in rows if row["table"] == "Not measured"}
    expected = {row for row in not_measured if any(word in row for word in NOT_HERE)}
    spoilt = {
        row: why for row, why in not_measured.items() for end in PLANTED if row.endswith(end) and why == PLANTED[end][1]
    }
    assert not_measured.keys() == expected | spoilt.keys()
    assert len(spoilt) == int(name in ("attention", "ops", "step", "sizes"))
    assert len(rows) - len(not_measured) == measured


def test_stages_beside_each_other_have_logs_of_their_own(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text("#!/usr/bin/env bash\nsleep 1; echo did $*; case $* in *bringup*) exit 3;; esac\n")
    python.chmod(0o755)
    done = gpu_sh("--rehearse", str(out), "right", PYTHON=str(python), BENCH_BESIDE="1")
    assert done.returncode == 0, done.stderr
    stages = dict(line.split("\t")[1:3] for line in (out / "stages.tsv").read_text().splitlines())
    assert stages == {"bringup": "exit code 3", **dict.fromkeys(("check", "ragged", "tests", "train"), "exit code 0")}
    for name, words in (("check", "--no-times"), ("pieces", "ragged.py"), ("tests", "pytest"), ("train", "precisions")):
        assert words in (out / f"right-{name}.log").read_text()
    with tarfile.open(out / "all.tgz") as packed:
        assert {"stages.tsv", "right-check.log", "right-train.log"} <= set(packed.getnames())


def test_a_part_ends_by_its_own_deadline(tmp_path):
    done = gpu_sh("--rehearse", str(tmp_path), "jax", BENCH_SECONDS="9")
    assert done.returncode == 0
    assert "jax\tjax\tleft out: the part's time is over" in (tmp_path / "stages.tsv").read_text()
    done = gpu_sh("--rehearse", str(tmp_path), "sizes", BENCH_SECONDS="10")  # pytest has barely begun
    assert done.returncode == 0
    assert "sizes\tsizes\texit code 124" in (tmp_path / "stages.tsv").read_text()


def test_mistakes_are_told(tmp_path):
    for arguments, told in (([], "usage"), (["--rehearse"], "usage"), ([str(tmp_path), "kernel"], "no part kernel")):
        done = gpu_sh(*arguments)
        assert done.returncode == 2
        assert told in done.stderr
