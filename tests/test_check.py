"""`python -m mfkernels.check`: what it says of right ops and of wrong ones. Planted faults are in FAULTS."""

import json

import pytest
import torch

from mfkernels import Dual
from mfkernels.attention import cases as attention_cases
from mfkernels.backend import OPS
from mfkernels.check import jobs, run
from mfkernels.check.case import Case, cases_by_op, cases_of, random, timed_case

pytest.importorskip("triton", minversion="3.4")

MACHINE = jobs.this_device()
REFERENCE = jobs.Backend("reference", "reference", poison=False)
TRITON = jobs.Backend("triton", "triton", poison=True)

# What processes run, in a module of its own: they import it by name.
FAULTS = """
import os, time
import mfkernels
from mfkernels import Dual
from mfkernels.check import jobs, processes
from mfkernels.check.case import cases_by_op, channel_cases

right = mfkernels.layer_scale_residual

def wrong_tangent(x, y, scale):
    out = right(x, y, scale)
    return Dual(out.primal, 1.01 * out.tangent)

def wrong_gradient(x, y, scale):
    return right(x, y, scale - 0.01 * (scale - scale.detach()))

def out_of_memory(x, y, scale):
    raise __import__("torch").OutOfMemoryError("no memory\\nand a long tale")

PLANTED = {"float32": wrong_tangent, "float16": wrong_gradient, "bfloat16": out_of_memory}

def wrong_job(job):
    if job.op != "layer_scale_residual" or job.backend.name != "triton":
        yield from quick_job(job)
        return
    wrong, formula = PLANTED[job.dtype], lambda x, y, scale: x + y * scale
    cases_by_op()["layer_scale_residual"] = channel_cases(wrong, formula, "x y", "scale")
    yield from jobs.run_job(job)

def quick_job(job):
    if job.timed:
        yield jobs.Timed("timing, small", {"dual_forward": 1.0})
    else:
        yield jobs.Outcome("small", {"primal": (1e-9, 1e-8)})

def lost_job(job):
    yield from quick_job(job)
    if (job.backend.name, job.dtype, job.timed) == ("reference", "float16", False):
        os._exit(7)
    if (job.backend.name, job.dtype, job.timed) == ("triton", "float32", False):
        raise processes.DeviceLostError("gone\\nand a long tale")
    if (job.backend.name, job.dtype, job.timed) == ("reference", "bfloat16", False):
        time.sleep(600)
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    (tmp_path / "planted_faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(tmp_path)
    import planted_faults

    return planted_faults


def test_right_ops_pass_and_the_file_says_what_was_measured(tmp_path, capsys):
    path = tmp_path / "check.json"
    assert run.main(["--ops", "timestep_embedding", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    told = json.loads(path.read_text())
    assert told["ok"] is True
    assert {"date", "torch", "triton", "python", "platform", "gpu", "interpreted", "missing"} <= told[
        "environment"
    ].keys()
    assert [(row["backend"], row["dtype"]) for row in told["rows"]] == [
        *(("reference", dtype) for dtype in ("float64", "float32", "float16", "bfloat16")),
        *(("triton", dtype) for dtype in ("float32", "float16", "bfloat16")),
    ]
    for row in told["rows"]:
        assert row["ok"], row
        assert row["failures"] == []
        assert 0 < row["worst"]["ratio"] <= 1
        assert row["worst"]["quantity"] in ("primal", "tangent", "d_t")
        timed = row["dtype"] != "float64" and (row["backend"] == "reference" or MACHINE.type == "cuda")
        assert (row["microseconds"] is not None) == timed
        if timed:
            assert min(row["microseconds"].values()) > 0
    checks = sum(row["checks"] for row in told["rows"])
    assert said.splitlines()[-1] == f"{checks} checks, all right"
    assert said.count("timestep_embedding  triton") == 3


def test_wrong_ops_are_named_and_the_others_are_still_checked(faults, tmp_path, capsys):
    path = tmp_path / "check.json"
    argv = ["--ops", "layer_scale_residual", "rotary", "--json", str(path)]
    assert run.main(argv, run_job=faults.wrong_job) == 1
    said = capsys.readouterr().out
    told = json.loads(path.read_text())
    assert told["ok"] is False
    rows = {(row["op"], row["backend"], row["dtype"]): row for row in told["rows"]}
    wrong = {
        dtype: " ".join(rows.pop(("layer_scale_residual", "triton", dtype))["failures"]) for dtype in faults.PLANTED
    }
    assert "1 of 3 rows: tangent: error 0.01, bound" in wrong["float32"]
    assert "0 of 3 rows: d_scale: error 0.01, bound" in wrong["float16"]
    assert "primal" not in wrong["float32"] + wrong["float16"]
    assert "0 of 3 rows: OutOfMemoryError: no memory" in wrong["bfloat16"]
    assert "tale" not in said
    assert all(row["ok"] and row["checks"] > 0 for row in rows.values())
    failures, checks = (
        sum(pick(row) for row in told["rows"]) for pick in (lambda r: len(r["failures"]), lambda r: r["checks"])
    )
    assert said.splitlines()[-1] == f"{failures} of {checks} wrong: " + "; ".join(
        f"layer_scale_residual (triton, {dtype})" for dtype in faults.PLANTED
    )
    assert "wrong: layer_scale_residual, triton, float32: B=3 N=63 D=100, 1 of 3 rows: tangent" in said


def test_a_process_that_dies_or_hangs_fails_its_row_alone(faults, tmp_path, capsys):
    path = tmp_path / "check.json"
    assert run.main(["--ops", "mlp", "--json", str(path)], run_job=faults.lost_job, limit=2.0) == 1
    failures = {(row["backend"], row["dtype"]): row["failures"] for row in json.loads(path.read_text())["rows"]}
    assert failures.pop(("reference", "float16")) == ["after small: the process ended with exit code 7"]
    assert failures.pop(("reference", "bfloat16")) == ["after small: no answer within 2 s"]
    assert failures.pop(("triton", "float32")) == ["after small: DeviceLostError: gone"]
    assert not any(failures.values())
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "3 of 10 wrong: mlp (reference, float16); mlp (reference, bfloat16); mlp (triton, float32)"


@pytest.mark.parametrize("argv", [["--ops", "attention", "soft_max"], ["--json", "/nowhere/to/be/found.json"]])
def test_bad_arguments(argv, capsys):
    assert run.main(argv) == 2
    assert f"mfkernels.check: {argv[0]}: " in capsys.readouterr().err


def test_a_mistake_in_the_environment_is_one_of_the_arguments(monkeypatch, capsys):
    monkeypatch.setattr("mfkernels.backend._requested", "bogus")
    assert run.main(["--ops", "mlp"]) == 2
    assert "mfkernels.check: MFKERNELS_BACKEND: expected one of" in capsys.readouterr().err


def test_what_was_found_before_an_interruption_is_told(monkeypatch, tmp_path, capsys):
    def interrupted(asked, *_):
        yield asked[0], jobs.Outcome("small", {"primal": (1e-9, 1e-8)})
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_jobs", interrupted)
    path = tmp_path / "check.json"
    assert run.main(["--ops", "mlp", "--json", str(path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "stopped before the end: 1 checks, all right"
    told = json.loads(path.read_text())
    assert told["ok"] is False
    assert sum(row["checks"] for row in told["rows"]) == 1


def small_case(ours, formula=lambda x: 2 * x):
    return Case("small", lambda generator: {"x": random(generator, 4, 9)}, ["x"], ours, formula)


def checked(case, dtype="float32", op="swiglu", backend=REFERENCE, rows=2):
    return jobs.check_case(jobs.Job(op, backend, dtype, str(MACHINE)), case, rows, "small")


def test_the_bound_is_twice_plain_pytorchs_error_and_a_floor():
    def formula(x):  # in low precision, off by 3e-3
        return 2 * x if x.dtype == torch.float64 else 2 * x * (1 + 3e-3)

    def ours(factor):
        return lambda x: Dual(2 * factor * x.primal, 2 * factor * x.tangent)

    right = checked(small_case(ours(1 + 5e-3), formula))
    assert right.failure == ""
    assert right.errors["primal"] == pytest.approx((5e-3, 6e-3), rel=1e-2)
    wrong = checked(small_case(ours(1 + 7e-3), formula))
    assert wrong.failure.count("bound 0.006") == 3  # primal, tangent, d_x


@pytest.mark.parametrize("fault", ["raises", "overflows"])
def test_without_plain_pytorch_the_bound_is_fixed_and_a_note_says_so(fault):
    def formula(x):
        if x.dtype != torch.float16:
            return 2 * x
        if fault == "raises":
            raise RuntimeError("not implemented for 'Half'")
        return x * 60000 * 60000

    case = small_case(lambda x: Dual(2 * x.primal, 2 * x.tangent), formula)
    outcome = checked(case, "float16")
    assert outcome.failure == ""
    assert outcome.errors["primal"][1] == jobs.FIXED * torch.finfo(torch.float16).eps
    assert "16 eps" in outcome.note


def test_a_refusal_is_a_failure_unless_it_is_a_documented_limit():
    def refuses(x):
        raise NotImplementedError("it has: reference")

    for op, backend, dtype in (("mlp", TRITON, "float16"), ("attention", TRITON, "float32")):
        outcome = checked(small_case(refuses), dtype, op, backend)
        assert outcome.failure == "NotImplementedError: it has: reference"
    others = jobs.Backend("triton, backward flash", "triton,attention_backward=flash", poison=False)
    for backend, dtype in ((jobs.Backend("cuda", "cuda", poison=True), "float32"), (others, "float16")):
        outcome = checked(small_case(refuses), dtype, "attention", backend)
        assert (outcome.failure, outcome.not_served) == ("", "it has: reference")
    assert not jobs.may_refuse("attention", "triton", "bfloat16", "cuda:0")
    assert jobs.may_refuse("attention", "triton", "bfloat16", "cpu")


def test_an_element_that_is_not_written_is_wrong():
    def forgets(x):
        out = torch.empty_like(x.primal)
        out[:-1] = 2 * x.primal.detach()[:-1]
        return Dual(out + 0 * x.primal, 2 * x.tangent)

    assert "primal: error inf" in checked(small_case(forgets), backend=TRITON).failure
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(MACHINE.type == "cuda", reason="of the interpreter")
def test_attentions_backwards_are_rows_of_their_own():
    found = {backend.name: backend for backend in jobs.backends("attention", MACHINE)}
    assert list(found) == ["reference", "triton", "triton, backward flash"]
    case = attention_cases.make(2, 33, 1, 16, causal=True)
    for name, backend in found.items():
        outcome = checked(case, "float32", "attention", backend, rows=1)
        assert (outcome.failure, outcome.not_served) == ("", ""), name
    outcome = checked(case, "bfloat16", "attention", found["triton"], rows=1)
    assert "interpreter gets bfloat16 products wrong" in outcome.not_served


def test_every_op_has_cases_and_a_timing():
    assert set(cases_by_op()) == set(OPS)
    for op, cases in cases_by_op().items():
        assert cases.small
        for device in ("cpu", "cuda"):
            assert timed_case(op, torch.device(device)).size
    parts = {"d=64", "d=72", "d=80", "d=128"}
    for device in ("cpu", "cuda"):
        assert parts == {case.part for case in cases_of("attention", device)}
