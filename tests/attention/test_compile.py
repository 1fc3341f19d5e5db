"""The shipped configurations, compiled for GPUs that need not be there: they fit, spill nothing and overlap."""

from collections.abc import Callable

import pytest
from ahead_of_time import Report, reports_of

pytest.importorskip("triton", minversion="3.4")

from mfkernels.inspect import SHARED_LIMIT, TENSOR_MEMORY_LIMIT
from mfkernels.launch import triton_minor


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    return reports_of("attention", tmp_path_factory.mktemp("no_table"))


def failing(reports: list[Report], bad: Callable[[Report], bool]) -> list[Report]:
    return [report for report in reports if bad(report)]


def test_nothing_spills(reports: list[Report]) -> None:
    assert not failing(reports, lambda report: report["spill_stores"] or report["spill_loads"])


def test_everything_fits_shared_memory(reports: list[Report]) -> None:
    assert not failing(reports, lambda report: report["shared_bytes"] > SHARED_LIMIT[report["arch"]])


def test_everything_fits_tensor_memory(reports: list[Report]) -> None:
    assert not failing(reports, lambda report: report["tensor_memory"] > TENSOR_MEMORY_LIMIT)


def test_every_product_runs_on_tensor_cores(reports: list[Report]) -> None:
    assert not failing(reports, lambda report: report["tensor_instructions"] == 0)


def blocks(report: Report) -> int:
    """How many a multiprocessor holds. Registers come by 8 a thread; each block takes 1 KB of shared memory more."""
    warps = report["config"]["num_warps"]
    registers = 65536 // (-(-report["registers"] // 8) * 8 * 32 * warps)
    return min(registers, (SHARED_LIMIT[report["arch"]] + 1024) // (report["shared_bytes"] + 1024))


def test_two_blocks_share_a_multiprocessor(reports: list[Report]) -> None:
    """Where the tiles were chosen for it: without a tangent, and narrow keys and their gradients."""
    widest = {
        "attention_forward_primal": 80,
        "attention_backward_dkdv": 64,
        "attention_backward_dkdv of a packed qkv": 64,
    }
    chosen = [r for r in reports if r["arch"] == "sm_90" and r["head_dim"] <= widest.get(r["op"], 0)]
    assert {r["op"] for r in chosen} == set(widest)
    assert not failing(chosen, lambda report: blocks(report) < 2)


def test_a_launch_of_their_own_gives_primal_rows_more_blocks(reports: list[Report]) -> None:
    """Of long sequences; the table has them apart up to this head dim."""
    held = {(r["op"], r["head_dim"]): blocks(r) for r in reports if r["arch"] == "sm_90" and r["tokens"] == 1024}
    for head_dim in (64, 72, 80):
        assert held["attention_forward_primal", head_dim] > held["attention_forward", head_dim]


def test_hopper_overlaps_its_wgmmas(reports: list[Report]) -> None:
    """Where ptxas gives up on overlap it waits for each wgmma on its own, and says so in no other way."""
    hopper = [r for r in reports if r["arch"] == "sm_90" and r["head_dim"] <= 128]
    wanted = [r for r in hopper if r["op"].startswith("attention_forward") or r["op"].endswith("in tf32")]
    without = {(r["op"], r["head_dim"]) for r in failing(wanted, lambda report: report["wgmmas"] == 0)}
    # every tile that has them spills there with Triton 3.9
    assert without == ({("attention_forward in tf32", 128)} if triton_minor() == "3.9" else set())
    assert not failing(reports, lambda report: 0 < report["wgmmas"] <= report["wgmma_waits"])
