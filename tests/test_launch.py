import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mfkernels import launch, tune

REQUEST = {"op": "a", "arch": "sm_90", "triton": "3.6", "dtype": "bfloat16", "head_dim": 72, "tokens": 256}


def row(name: int, **conditions: object) -> dict[str, object]:
    return {"op": "a", **conditions, "config": {"BLOCK": name}}


def chosen(*rows: dict[str, object], **changes: object) -> int | None:
    best = launch.best_row(rows, {**REQUEST, **changes})
    return None if best is None else best["config"]["BLOCK"]


def test_a_row_without_conditions_is_the_default() -> None:
    assert chosen(row(1)) == 1
    assert chosen({**row(1), "op": "b"}) is None


def test_named_conditions_must_be_equal() -> None:
    for key, value in (("arch", "sm_80"), ("triton", "3.4"), ("dtype", "float32")):
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
    rows = launch.read_table(launch.PACKAGE_TABLE)
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
        ([], "[{", "launch.json is not JSON"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(cache_dir, capsys, arguments, table, told) -> None:
    (cache_dir / "launch.json").write_text(table)
    assert tune.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_a_measured_size_speaks_down_to_the_next_smaller_one() -> None:
    assert tune.ranges([256, 64, 64, 1024]) == [(64, 64), (65, 256), (257, 1024)]


def test_measured_rows_are_kept_one_by_one(cache_dir, monkeypatch) -> None:
    """An interruption in the fourth problem leaves the rows found before, and what the user had."""
    before = [row(9, arch="sm_70")]
    (cache_dir / "launch.json").write_text(json.dumps(before))
    measured = {"p": (tune.config(64, 64, 4, 2), 1.0), "q": None, "r": (tune.config(32, 32, 4, 2), 2.0)}

    def problems(head_dim, tokens, batch, dtype, device, bounds):
        for op in ("p", "q", "r", "s"):
            yield tune.Problem(op, bounds, [], lambda config: None, [])

    monkeypatch.setattr(tune, "attention_problems", problems)
    monkeypatch.setattr(tune, "measure", lambda problem: measured[problem.op])
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(KeyError, match="s"):
        tune.main(["--head-dims", "64", "--tokens", "256"])
    rows = launch.read_table(cache_dir / "launch.json")
    assert [row["op"] for row in rows] == ["a", "p", "r"]
    assert {key: rows[1][key] for key in rows[1] if key[:4] in ("min_", "max_")} == {
        "min_head_dim": 64,
        "max_head_dim": 64,
        "min_tokens": 256,
        "max_tokens": 256,
    }
    assert sorted(path.name for path in cache_dir.iterdir()) == ["launch.json"]


def test_new_rows_replace_those_of_the_same_conditions() -> None:
    old = [{**row(1, arch="sm_90"), "milliseconds": 2.0}, row(2)]
    assert tune.merge(old, [row(3, arch="sm_90")]) == [row(2), row(3, arch="sm_90")]


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_every_problem_that_is_tuned_runs() -> None:
    """In the order in which it would be measured, and it writes all that is compared."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = []
    for problem in tune.attention_problems(16, 32, 1, torch.float32, device, {"max_head_dim": 16}):
        for result in problem.results:
            result.fill_(torch.nan)
        problem.launch(tune.config(32, 32, 4, 1)).run()
        assert all(result.isfinite().all() for result in problem.results)
        ops.append(problem.op)
    assert set(ops) == {row["op"] for row in launch.read_table(launch.PACKAGE_TABLE) if "attention" in row["op"]}
