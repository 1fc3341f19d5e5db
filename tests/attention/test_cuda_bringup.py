"""What a new GPU runs first: bench/attention/bringup.cu, which names the part that has a mistake, and ragged.py."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cuda_emulator
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "attention"
KERNEL, LAYOUT = "attention/forward_kernel.cuh", "hopper/layout.h"

# file, what is right, what is put in its place, the part that fails first
MISTAKES = {
    "none": (KERNEL, "", "", ""),
    "the tail's columns": (KERNEL, "barrier, Columns::MAIN, head", "barrier, Columns::MAIN + 8, head", "tma"),
    "bytes that never come": ("bringup.cu", "+ ValueTile::LOADED_BYTES", "+ ValueTile::LOADED_BYTES + 16", "tma"),
    "groups of rows are too close": (LAYOUT, "16, 8 * swizzle_bytes", "16, 4 * swizzle_bytes", "rows"),
    "the tail's keys": (KERNEL, "k + KeyTile::TAIL_OFFSET", "k + QueryTile::TAIL_OFFSET", "rows"),
    "the values' columns": (KERNEL, "Tile::WIDTH * block", "Tile::WIDTH * block / 2", "tma"),
    "the values' blocks": (KERNEL, "ValueTile::BLOCK_BYTES, Value", "ValueTile::BLOCK_BYTES / 2, Value", "columns"),
    "the values' groups of rows": (LAYOUT, "block_bytes, 8 * swizzle", "block_bytes, 4 * swizzle", "columns"),
    "16 bits in the wrong order": (KERNEL, "s[2 * i], s[2 * i + 1]", "s[2 * i + 1], s[2 * i]", "columns"),
}


@pytest.fixture(scope="module")
def bringup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bringup", FOLDER / "bringup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = sys.path.copy()
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_in_its_part(name: str, tmp_path: Path) -> None:
    file, right, wrong, part = MISTAKES[name]
    csrc = shutil.copytree(cuda_emulator.CSRC, tmp_path / "csrc")
    source = Path(shutil.copy(FOLDER / "bringup.cu", csrc))
    text = (csrc / file).read_text()
    assert right in text
    (csrc / file).write_text(text.replace(right, wrong) if right else text)
    program = tmp_path / "bringup"
    command = cuda_emulator.command(source, program, "-w", "-O0", "-DMF_HEAD_DIMS=72", csrc=csrc)
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()[1:]
    assert len(lines) == 4, done.stdout  # two dtypes, primal and dual
    assert done.returncode == (1 if part else 0)
    for line in lines:
        verdicts = dict(re.findall(r" (tma|rows|columns) (ok|FAIL)", line))
        assert verdicts
        if part:
            assert next(name for name, verdict in verdicts.items() if verdict == "FAIL") == part, line
            assert re.search(r"FAIL \((emulator: deadlock|\d+ of \d+ wrong; \w+ \d+, column \d+: got )", line), line
        else:
            assert verdicts == {"tma": "ok", "rows": "ok", "columns": "ok"}


def test_the_command_runs_every_case_in_the_emulator() -> None:
    cuda_emulator.compiler()
    command = [sys.executable, FOLDER / "bringup.py", "--emulator"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tma ok  rows ok  columns ok\n") == 20  # two dtypes, five head dims, primal and dual
    for d in (64, 72, 80, 96, 128):
        assert len(re.findall(rf"d={d} .* keys=", done.stdout)) == 4


def program(folder: Path, body: str) -> Path:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_it_goes_on_in_a_new_process(bringup: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As after an error of CUDA in cases 0, 1 and 2, of which the program says 100 + the next case."""
    fails = program(tmp_path, "echo from $1; [ $1 -lt 3 ] && exit $((101 + $1)); exit 0")
    assert bringup.run_program(fails) == 1
    assert capfd.readouterr().out.split("\n")[:-1] == [f"from {i}" for i in range(4)]
    assert bringup.run_program(program(tmp_path, "exit 0")) == 0
    assert bringup.run_program(program(tmp_path, "exit 2")) == 2


def test_a_hang_ends(bringup: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bringup.run_program(program(tmp_path, "printf 'd=64  tma '; exec sleep 60"), seconds=0.5) == 1
    assert capfd.readouterr().out.startswith("d=64  tma \nFAIL: not done within 0.5 s")


def test_without_nvcc_it_says_so(bringup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="no nvcc on the PATH, in CUDA_HOME"):
        bringup.for_gpu(tmp_path / "bringup")


def test_it_compiles_for_hopper_without_a_word(
    bringup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    if setup.compiler() is None:
        pytest.skip("no nvcc that compiles for sm_90a")
    capfd.readouterr()
    bringup.compile_program([*bringup.for_gpu(tmp_path / "bringup"), "-DMF_HEAD_DIMS=72"])
    assert capfd.readouterr().out == ""


def test_the_watchdog_takes_no_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest head dim spilled with a clock to count from, and lost part of its overlap."""
    triton = pytest.importorskip("triton", minversion="3.4")
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    nvcc = setup.compiler()
    if nvcc is None:
        pytest.skip("no nvcc that compiles for sm_90a")
    monkeypatch.setenv("MFKERNELS_CUDA_WATCHDOG", "1")
    flags = setup.flags(setup.toolkit_of(nvcc))["nvcc"]
    source, binary = ROOT / "csrc" / "attention" / "forward_128.cu", tmp_path / "forward_128.cubin"
    subprocess.run([nvcc, *flags, "-cubin", source, "-o", binary], check=True, timeout=300)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code = subprocess.run([tool, "--dump-sass", binary], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"Function : ", code)) == 4
    assert "BPT.TRAP" in code
    assert not re.findall(r"\b(?:STL|LDL)\b", code)


# ------------------------------------------------------------------------------------------------------------ ragged.py


def ragged(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """`python bench/attention/ragged.py` in the emulator; `before` changes its functions."""
    cuda_emulator.library()
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import ragged\n{before}\nsys.exit(ragged.main())"
    command = [sys.executable, "-c", code, "--emulator", "--only", "3", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def verdicts(path: Path) -> list[str]:
    report = json.loads(path.read_text())
    assert report["environment"]["torch"]
    return [row["verdict"] for row in report["figures"]]


def test_ragged_writes_every_case(tmp_path: Path) -> None:
    done = ragged("--json", str(tmp_path / "ragged.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 cases right, 0 wrong, 0 not run" in done.stdout
    assert verdicts(tmp_path / "ragged.json") == ["ok"] * 3


def test_ragged_goes_on_after_what_is_wrong(tmp_path: Path) -> None:
    """NaN in the first, an exception in the second."""
    before = """
count = iter(range(3))
forward = ragged.cuda.attention_forward
def attention_forward(*tensors, **options):
    i = next(count)
    if i == 1:
        raise RuntimeError("first line\\nsecond line")
    o, o_dot, lse = forward(*tensors, **options)
    if i == 0:
        o[..., -1, :] = float("nan")
    return o, o_dot, lse
ragged.cuda.attention_forward = attention_forward
"""
    done = ragged("--json", str(tmp_path / "ragged.json"), before=before)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 3 cases right, 2 wrong, 0 not run" in done.stdout
    assert verdicts(tmp_path / "ragged.json") == ["WRONG", "RuntimeError: first line", "ok"]


def test_ragged_stops_when_the_gpu_is_lost(tmp_path: Path) -> None:
    before = """
def attention_forward(*tensors, **options):
    raise RuntimeError("CUDA error: unspecified launch failure")
ragged.cuda.attention_forward = attention_forward
ragged.usable = lambda device: False
"""
    done = ragged("--json", str(tmp_path / "ragged.json"), before=before)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the cases that are left are not run" in done.stdout
    assert "0 of 3 cases right, 1 wrong, 2 not run" in done.stdout
    lost = "RuntimeError: CUDA error: unspecified launch failure"
    assert verdicts(tmp_path / "ragged.json") == [lost, "not run", "not run"]
