"""The meters that need no GPU: bytes by hand, totals that are the sums of their rows, and commands that write files."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfkernels import ada_layer_norm, mlp

pytest.importorskip("triton", minversion="3.4")

ROOT = Path(__file__).parents[1]
CLASSES = {"gemm", "attention", "elementwise"}


@pytest.fixture(scope="module")
def count():
    """bench/bytes/count.py as a module."""
    spec = importlib.util.spec_from_file_location("bytes_count", ROOT / "bench" / "bytes" / "count.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run(script: str, *arguments: object) -> str:
    """A command in a process of its own, whose Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "bench" / script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_bytes_of_a_norm(count):
    B, N, D = 8, 6, 64

    def norm(meter):
        x, shift, scale = torch.empty(B, N, D), torch.empty(B, D), torch.empty(B, D)
        with meter:
            ada_layer_norm(x, shift, scale)

    (event,) = count.meter(norm)
    assert event.kind == "elementwise"
    assert event.bytes == 4 * (2 * B * N * D + 2 * B * D + 2 * B * N)  # x and h; shift and scale; mean and rstd


def test_what_is_inside_an_op_is_seen(count):
    M, D, H = 24, 32, 128

    def perceptron(meter):
        x, w1, b1 = torch.empty(4, 6, D), torch.empty(H, D), torch.empty(H)
        w2, b2 = torch.empty(D, H), torch.empty(D)
        with meter:
            mlp(x, w1, b1, w2, b2)

    events = count.meter(perceptron)
    assert [event.kind for event in events] == ["gemm", "elementwise", "gemm"]
    assert [event.flops for event in events] == [2 * M * D * H, 0, 2 * M * D * H]
    assert events[1].bytes == 4 * (2 * M * H + H)


def test_bytes_of_operators(count):
    n = 1000

    def operators(meter):
        x, y, z = torch.empty(n), torch.empty(n, dtype=torch.bfloat16), torch.empty(n)
        with meter:
            x.view(10, 100).T[:3].expand(2, 3, 10).unsqueeze(0)  # views
            torch.empty_like(x)  # an allocation
            x + y  # reads 4 and 2 bytes, writes 4
            x * x  # reads it once
            x[: n // 2] + x[n // 2 :]  # reads two halves
            x[:1].expand(n) + x  # reads one more
            x.add_(y)  # reads 4 and 2, writes 4
            x.copy_(y)  # reads 2, writes 4
            x.zero_()  # writes 4
            torch.mul(z, z, out=x)  # reads 4, writes 4

    events = count.meter(operators)
    assert [event.bytes for event in events] == [10 * n, 8 * n, 6 * n, 8 * n + 4, 10 * n, 6 * n, 4 * n, 8 * n]


def test_bytes_command(tmp_path):
    """At the sizes of DiT-B/2; shapes alone are computed."""
    written = tmp_path / "folder" / "bytes.json"
    printed = run("bytes/count.py", "--json", written)
    found = json.loads(written.read_text())
    assert {"torch", "date", "processor"} <= found["environment"].keys()
    for way, of in (("flow_matching", found), ("meanflow", found["meanflow"]), ("plain", found["plain"])):
        rows = of["rows"]
        assert {row["class"] for row in rows} == CLASSES
        assert of["launches"] == sum(row["launches"] for row in rows) == sum(of["launches_by_class"].values())
        elementwise = sum(row["mb"] for row in rows if row["class"] == "elementwise")
        assert of["elementwise_gb"] == pytest.approx(elementwise / 1e3, rel=1e-12)
        assert of["gemm_gflop"] == pytest.approx(sum(row["gflop"] for row in rows if row["class"] == "gemm"), rel=1e-12)
        assert f"{way}: {of['launches']} launches" in printed
    # multiply-adds: 12 D² a token (qkv, proj, fc1, fc2) and 6 D² a sample (modulation), once forward, twice backward
    tokens, D = 256 * 256, 768
    products = 3 * 2 * (tokens * 12 * D**2 + 256 * 6 * D**2)  # FLOPs
    assert found["gemm_gflop"] == pytest.approx(products / 1e9, rel=1e-12)
    assert found["plain"]["gemm_gflop"] == pytest.approx(products / 1e9, rel=1e-12)
    assert found["elementwise_gb"] < found["meanflow"]["elementwise_gb"]


def test_host_command(tmp_path):
    """That it runs; it is no test of speed."""
    written = tmp_path / "host.json"
    run("host/measure.py", "--json", written, "--rounds", 1, "--depth", 1)
    found = json.loads(written.read_text())
    assert {"torch", "date", "processor"} <= found["environment"].keys()
    rows = {row["way"]: row for row in found["rows"]}
    assert set(rows) == {"plain", "flow_matching", "meanflow"}
    assert all(row["ms"] > 0 for row in rows.values())
    assert found["flow_matching"] == rows["flow_matching"]["ratio"] > 0
    assert found["meanflow"] == rows["meanflow"]["ratio"] > 0
    assert rows["plain"]["triton_launches"] == 0 < rows["flow_matching"]["triton_launches"]
