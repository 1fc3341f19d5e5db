import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.4")

from mfkernels import launch, tune, tune_problems
from mfkernels.adaptive_squared_error.tuning import CANDIDATES
from mfkernels.folders import modules_of_ops
from mfkernels.timing import Timing
from mfkernels.tune_problems import Sizes, tile

REQUEST = {
    "op": "a",
    "arch": "sm_90",
    "triton": "3.6",
    "dtype": "bfloat16",
    "precision": "ieee",
    "head_dim": 72,
    "tokens": 256,
}


def row(name: int, **conditions: object) -> dict[str, object]:
    return {"op": "a", **conditions, "config": {"BLOCK": name}}


def chosen(*rows: dict[str, object], **changes: object) -> int | None:
    best = launch.best_row(rows, {**REQUEST, **changes})
    return None if best is None else best["config"]["BLOCK"]


def test_a_row_without_conditions_is_the_default() -> None:
    assert chosen(row(1)) == 1
    assert chosen({**row(1), "op": "b"}) is None


def test_named_conditions_must_be_equal() -> None:
    for key, value in (("arch", "sm_80"), ("triton", "3.4"), ("dtype", "float32"), ("precision", "tf32")):
        assert chosen(row(1), row(2, **{key: value})) == 1
        assert chosen(row(1), row(2, **{key: REQUEST[key]})) == 2
    assert chosen(row(1), row(2, dtype=["float16", "float32"])) == 1
    assert chosen(row(1), row(2, dtype=["float16", "bfloat16"])) == 2
    assert chosen(row(1, arch="sm_90"), row(2, arch="sm_90", dtype="bfloat16")) == 2
    assert chosen(row(1, max_head_dim=72), row(2, arch="sm_90")) == 2


def test_the_smallest_size_that_is_large_enough_wins() -> None:
    rows = [row(1), row(2, max_head_dim=64), row(3, max_head_dim=128), row(4, max_head_dim=80)]
    assert [chosen(*rows, head_dim=d) for d in (64, 72, 80, 96, 136)] == [2, 4, 4, 3, 1]
    assert chosen(row(1, max_head_dim=80, max_tokens=64), row(2, max_head_dim=80)) == 2


def test_a_row_does_not_speak_for_sizes_below_its_own() -> None:
    rows = [row(1), row(2, min_tokens=65, max_tokens=256)]
    assert [chosen(*rows, tokens=n) for n in (64, 65, 256, 257)] == [1, 2, 2, 1]


def test_a_size_that_the_request_lacks_never_holds() -> None:
    assert chosen(row(1), row(2, max_width=8)) == 1


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MFKERNELS_CACHE_DIR", str(tmp_path))
    launch.clear_cache()
    yield tmp_path
    launch.clear_cache()


def test_the_users_table_lies_over_the_packages(cache_dir: Path) -> None:
    def find(head_dim: int) -> dict[str, int]:
        launch.clear_cache()
        return launch.find_config("attention_forward", "sm_90", torch.bfloat16, head_dim=head_dim, tokens=1024)

    shipped, wider = find(64), find(72)
    mine = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 2, "num_stages": 7}
    mine_row = {
        "op": "attention_forward",
        "arch": "sm_90",
        "triton": launch.triton_minor(),
        "dtype": "bfloat16",
        "max_head_dim": 64,
        "config": mine,
        "milliseconds": 0.1,
    }
    (cache_dir / "launch.json").write_text(json.dumps([mine_row]))
    assert find(64) == mine != shipped
    assert find(72) == wider


@pytest.mark.parametrize("text", ["{", "{}", '[{"op": "a"}]'])
def test_a_broken_table_is_named(cache_dir: Path, text: str) -> None:
    (cache_dir / "launch.json").write_text(text)
    with pytest.raises(ValueError, match=str(cache_dir)):
        launch.find_config("attention_forward", "sm_90", torch.bfloat16, head_dim=64, tokens=1024)


def test_an_unknown_op_is_an_error(cache_dir: Path) -> None:
    with pytest.raises(LookupError, match=r"no launch configuration for .*nothing"):
        launch.find_config("nothing", "sm_90", torch.bfloat16)


def test_every_op_has_a_default(cache_dir: Path) -> None:
    rows = launch.shipped()
    for op in {row["op"] for row in rows}:
        for dtype in (torch.bfloat16, torch.float32):
            assert launch.find_config(op, "sm_999", dtype, head_dim=256, tokens=1)


def test_half_precision_rows_are_not_for_float32(cache_dir: Path) -> None:
    """Where the tiles are twice the bytes and the products run without tensor cores."""
    half, single = (
        launch.find_config("attention_forward", "sm_90", dtype, head_dim=64, tokens=1024)
        for dtype in (torch.float16, torch.float32)
    )
    assert half["BLOCK_M"] > single["BLOCK_M"]


def test_tensor_cores_are_given_larger_tiles_than_exact_products(cache_dir: Path) -> None:
    """Products of float32 without tf32 run in registers, and an op that names no precision has no such rows."""
    for op in ("attention_forward", "attention_forward_primal", "attention_backward_dq", "attention_backward_dkdv"):
        tf32, ieee, unsaid = (
            launch.find_config(op, "sm_90", torch.float32, precision=precision, head_dim=72, tokens=256, packed=1)
            for precision in ("tf32", "ieee", None)
        )
        assert tf32["BLOCK_M"] * tf32["BLOCK_N"] > ieee["BLOCK_M"] * ieee["BLOCK_N"]
        assert ieee == unsaid


def test_cache_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MFKERNELS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert launch.user_table() == tmp_path / "mfkernels" / "launch.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_tuning_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "measures on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "table", "told"),
    [
        (["--head-dims", "64", "12"], "[]", "--head-dims: expected multiples of 8 up to 256, got [64, 12]"),
        (["--head-dims", "264"], "[]", "--head-dims: expected multiples of 8"),
        (["--tokens", "0", "64"], "[]", "--tokens: expected at least 1, got [0, 64]"),
        (["--widths", "-3"], "[]", "--widths: expected at least 1, got [-3]"),
        (["--total", "0"], "[]", "--total: expected at least 1, got 0"),
        (["--ops", "swiglu", "gelu"], "[]", "--ops: expected any of ada_layer_norm_backward"),
        ([], "[{", "launch.json is not JSON"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(cache_dir, capsys, arguments, table, told) -> None:
    (cache_dir / "launch.json").write_text(table)
    assert tune.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_a_measured_size_speaks_down_to_the_next_smaller_one() -> None:
    assert tune_problems.ranges([256, 64, 64, 1024]) == [(64, 64), (65, 256), (257, 1024)]


def test_measured_rows_are_kept_one_by_one(cache_dir, monkeypatch) -> None:
    """An interruption in the fourth problem leaves the rows found before, and what the user had."""
    (cache_dir / "launch.json").write_text(json.dumps([row(9, arch="sm_70")]))
    measured = {"p": (tile(64, 64, 4, 2), 1.0), "q": None, "r": (tile(32, 32, 4, 2), 2.0)}
    found = [tune.Problem(op, {"min_width": 65, "max_width": 256}, [], list) for op in ("p", "q", "r", "s")]
    monkeypatch.setattr(tune, "problems", lambda *_: iter(found))
    monkeypatch.setattr(tune, "measure", lambda problem, dry_run: measured[problem.op])
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name in ("stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    with pytest.raises(KeyError, match="s"):
        tune.main([])
    rows = launch.read_table(cache_dir / "launch.json")
    assert [row["op"] for row in rows] == ["a", "p", "r"]
    assert rows[1] == {
        "op": "p",
        "arch": "sm_90",
        "triton": launch.triton_minor(),
        "dtype": "bfloat16",
        "min_width": 65,
        "max_width": 256,
        "config": tile(64, 64, 4, 2),
        "milliseconds": 1.0,
    }
    assert sorted(path.name for path in cache_dir.iterdir()) == ["launch.json"]


def test_the_fastest_candidate_that_runs_and_agrees_is_taken(monkeypatch, capsys) -> None:
    from triton.runtime.errors import OutOfResources

    asked = []

    def run():
        name = launch.launch_config("p", torch.device("cpu"), torch.float32)["BLOCK"]
        asked.append(name)
        if name == 4:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return [torch.full((4,), 2.0 if name == 3 else 1.0)]

    taken = {1: 3e-3, 2: 2e-3, 3: 1e-3}
    monkeypatch.setattr(tune, "busy_time", lambda fn: Timing(fn() and taken[asked[-1]], "graph"))
    assert tune.measure(tune.Problem("p", {}, [{"BLOCK": name} for name in (4, 1, 2, 3)], run)) == ({"BLOCK": 2}, 2.0)
    said = capsys.readouterr().out
    assert "{'BLOCK': 4}: OutOfResources" in said
    assert "{'BLOCK': 3}: its result differs" in said
    assert tune.measure(tune.Problem("p", {}, [{"BLOCK": 4}], run)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_a_dry_run_runs_every_candidate_and_writes_nothing(cache_dir, capsys) -> None:
    sizes = ["--head-dims", "16", "--tokens", "16", "--widths", "24", "--hidden-widths", "40", "--total", "32"]
    arguments = ["--dry-run", "--dtype", "float32", "--ops", "adaptive_squared_error", *sizes]
    assert tune.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("0.0000 ms") == len(CANDIDATES)
    assert "ran 1 problems, wrote nothing" in said
    assert not list(cache_dir.iterdir())
    assert tune.main([*arguments, "--seconds", "0"]) == 0
    assert "left out 1 problems: 0 seconds were over" in capsys.readouterr().out


def test_times_taken_in_two_ways_are_not_compared(monkeypatch, capsys) -> None:
    times = iter([Timing(3e-3, "graph"), Timing(1e-3, "events"), Timing(2e-3, "graph")])
    monkeypatch.setattr(tune, "busy_time", lambda fn: next(times))
    problem = tune.Problem("p", {}, [{"BLOCK": name} for name in (1, 2, 3)], lambda: [torch.ones(4)])
    assert tune.measure(problem) == ({"BLOCK": 3}, 2.0)
    assert "{'BLOCK': 2}: timed by events where the first was by graph" in capsys.readouterr().out


def test_new_rows_replace_those_of_the_same_conditions() -> None:
    old = [{**row(1, arch="sm_90"), "milliseconds": 2.0}, row(2)]
    assert tune.merge(old, [row(3, arch="sm_90")]) == [row(2), row(3, arch="sm_90")]


def test_a_forced_configuration_is_taken_and_forgotten() -> None:
    device = torch.device("cpu")
    usual = launch.launch_config("swiglu", device, torch.float32, width=8)
    with launch.forced_config("swiglu", {"BLOCK_R": 3}):
        assert launch.launch_config("swiglu", device, torch.float32, width=8) == {"BLOCK_R": 3}
        assert "BLOCK_M" in launch.launch_config("gelu_forward", device, torch.float32, width=8)
    assert launch.launch_config("swiglu", device, torch.float32, width=8) == usual


def test_exact_products_are_tuned_for_themselves_alone() -> None:
    found = list(tune.problems(Sizes([16], [24], [40], [16], torch.float32, torch.device("cpu"), total=32)))
    for problem in found:
        assert problem.conditions.get("precision") == ("ieee" if problem.op.startswith("attention") else None)


def test_every_op_of_the_table_is_tuned_on_a_call_that_launches_it() -> None:
    """What a call gives does not depend on the candidate; without its configuration the op's launch fails."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = []
    for problem in tune.problems(Sizes([16], [24], [40], [16], torch.float32, device, total=32)):
        expected = [result.clone() for result in problem.run()]
        with launch.forced_config(problem.op, problem.candidates[-1]):
            results = problem.run()
        assert len(results) == len(expected) > 0
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
        with launch.forced_config(problem.op, {}), pytest.raises(KeyError, match=r"BLOCK|CHUNK|PARTS"):
            problem.run()
        ops.append(problem.op)
    known = {row["op"] for row in launch.shipped()}
    assert sorted(ops) == sorted(op for tuning in modules_of_ops("tuning") for op in tuning.OPS)
    # two that take microseconds, and a limit that is no kernel's
    assert known - set(ops) == {"sum_partials", "timestep_embedding", "attention_forward_apart"}


@pytest.mark.parametrize(
    ("blocks", "length", "chunk"),
    [(256, 256, 64), (32, 64, 8), (1, 7, 8), (1024, 1024, 256), (6, 65536, 256), (6, 2048, 16)],
)
def test_chunks_fill_the_gpu(monkeypatch, blocks, length, chunk):
    """About eight to a multiprocessor of 132, from 8 rows to the table's."""
    config = {"BLOCK_N": 1, "CHUNK": 256, "num_warps": 4, "num_stages": 1}
    assert launch.with_fitting_chunk(config, torch.device("cpu"), blocks, length) == config
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    fitting = launch.with_fitting_chunk(config, torch.device("cpu"), blocks, length)
    assert fitting == {**config, "CHUNK": chunk}
