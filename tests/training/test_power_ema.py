"""Post-hoc averages: the maths against exact averages of recorded weights, and the snapshots that they are made of."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from forged import fails, meanflow
from safetensors.torch import load_file, save_file
from tiny_runs import TINY, stop_after

from meanflow.config import Config
from meanflow.errors import UsageError
from meanflow.training import Trainer, TrainingError, list_checkpoints, load_checkpoint, load_network, run_training
from meanflow.training.power_ema import combination, gamma_of, inner_product
from meanflow.training.state import checksum
from mfkernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("own_folder")
KEPT = (0.05, 0.1)
POINTS = Config.of(
    data="points", model="MLP", hidden_size=16, depth=2, name="points", steps=65, batch_size=16, lr=1e-2, device="cpu",
    checkpoint_every=30, sample_every=0, evaluate=False, power_ema=KEPT, power_ema_every=10,
)  # fmt: skip
SMALL = TINY.replace(power_ema=KEPT, power_ema_every=2, checkpoint_every=3, keep_checkpoints=1)
RUN = Path("runs/tiny")


def newest(name="tiny"):
    return list_checkpoints(Path("runs") / name / "checkpoints")[-1]


def snapshots(name="tiny"):
    return sorted(path.name for path in (Path("runs") / name / "averages").iterdir())


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25, 0.288])
def test_a_profile_has_the_length_that_it_is_called_by(sigma_rel):
    gamma = gamma_of(sigma_rel)
    tau = (np.arange(2**20) + 0.5) / 2**20  # midpoints of [0, 1]
    profile = (gamma + 1) * tau**gamma
    mean = (profile * tau).mean()
    assert math.sqrt((profile * (tau - mean) ** 2).mean()) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, 12**-0.5, 0.5, -0.1])
def test_lengths_have_bounds(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel: expected a number in \(0, 0\.2887\)"):
        gamma_of(sigma_rel)
    with pytest.raises(UsageError, match="power_ema: expected a number in"):
        Config.of(power_ema=(0.1, sigma_rel))


@pytest.mark.parametrize("lengths", [(0.05,), (0.05, 0.05), (0.05, 0.1, 0.1)])
def test_two_lengths_are_needed(lengths):
    with pytest.raises(UsageError, match="power_ema: expected two different lengths or more"):
        Config.of(power_ema=lengths)


@pytest.mark.parametrize(("a", "b"), [((0.05, 7.0), (0.1, 9.0)), ((0.1, 9.0), (0.05, 7.0)), ((0.2, 3.0), (0.2, 3.0))])
def test_inner_products_are_those_of_the_integral(a, b):
    tau = (np.arange(2**20) + 0.5) / 2**20 * 9.0

    def profile(sigma_rel, t):
        gamma = gamma_of(sigma_rel)
        return np.where(tau < t, (gamma + 1) * (tau / t) ** gamma / t, 0.0)

    assert inner_product(a, b) == pytest.approx((profile(*a) * profile(*b)).mean() * 9.0, rel=1e-5)


def exact(history, sigma_rel):
    """The weighted mean of the weights after each step, in float64."""
    t, power = len(history), gamma_of(sigma_rel) + 1.0
    shares = [((s + 1) ** power - s**power) / t**power for s in range(t)]
    return torch.stack([share * weights for share, weights in zip(shares, history, strict=True)]).sum(0)


@pytest.fixture
def history(monkeypatch):
    """The weights after every step, one vector each."""
    weights = []
    step = Trainer._train_step

    def recorded(self, batches):
        figures = step(self, batches)
        weights.append(flat(self.model))
        return figures

    monkeypatch.setattr(Trainer, "_train_step", recorded)
    return weights


def flat(net):
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


# relative to an average in float64; measured 4.3e-4, 4.0e-8, 1.3e-4, 5.0e-8, 4.3e-4
# (the averages of 0.05 and 0.1 differ by 2e-2)
BOUNDS = {0.03: 9e-4, 0.05: 1e-7, 0.07: 2.6e-4, 0.1: 1e-7, 0.15: 9e-4}


def test_averages_of_any_length_are_those_of_the_recorded_weights(history, caplog):
    run_training(POINTS)
    assert snapshots("points") == [f"step_{step:08d}.safetensors" for step in range(10, 61, 10)]
    run = Path("runs/points")
    errors = {}
    for sigma_rel in BOUNDS:
        net = load_network(run, f"power:{sigma_rel}").net  # of step 65, after the last snapshot
        errors[sigma_rel] = float(relative_error(flat(net), exact(history, sigma_rel)))
    assert all(errors[sigma_rel] <= bound for sigma_rel, bound in BOUNDS.items()), errors
    assert not caplog.messages
    before = newest("points").with_name("step_00000060")
    load_network(before, "power:0.03")
    assert caplog.messages[0].startswith("weights: the snapshots miss power:0.03 by 13 % of its profile's norm")
    error = relative_error(flat(load_network(before, "power:0.07").net), exact(history[:60], 0.07))
    assert error <= 7.5e-4  # measured 3.7e-4
    kept = load_file(run / "averages/step_00000060.safetensors")
    for sigma_rel in KEPT:
        for name, p in load_network(before, f"power:{sigma_rel}").net.named_parameters():
            assert relative_error(p.detach(), kept[f"power:{sigma_rel}|{name}"]) <= 1e-7


def test_factors_add_up_to_one_and_the_miss_is_what_a_sum_over_steps_says():
    kept = [(length, 10.0 * i) for i in range(1, 7) for length in KEPT]
    for wanted in (0.03, 0.07, 0.15, 0.25):
        factors, missed = combination(kept, (wanted, 60.0))
        assert sum(factors) == pytest.approx(1.0, abs=1e-12)
        tau = (np.arange(2**16) + 0.5) / 2**16 * 60.0

        def profile(sigma_rel, t, tau=tau):
            gamma = gamma_of(sigma_rel)
            return np.where(tau < t, (gamma + 1) * (tau / t) ** gamma / t, 0.0)

        target = profile(wanted, 60.0)
        rest = sum(x * profile(*p) for x, p in zip(factors, kept, strict=True)) - target
        assert missed == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(target), rel=2e-3)


def test_a_resumed_run_has_the_averages_and_the_snapshots_of_one_that_never_stopped(monkeypatch):
    run_training(SMALL.replace(name="whole"))
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 5)
        run_training(SMALL)
    assert snapshots() == ["step_00000002.safetensors", "step_00000004.safetensors"]
    for later in ("step_00000006", "step_00000008", ".step_00000006.99.partial"):  # which a crash left
        (RUN / f"averages/{later}.safetensors").write_bytes(b"half")
    with pytest.raises(
        UsageError, match=r"power_ema: .* has averages of power:0\.05, power:0\.1, .*; got .* power:0\.2$"
    ):
        run_training(SMALL.replace(power_ema=(0.05, 0.2)), resume=True)
    run_training(SMALL, resume=True)
    assert snapshots() == snapshots("whole") == [f"step_0000000{step}.safetensors" for step in (2, 4, 6)]
    for name in snapshots():
        assert (RUN / "averages" / name).read_bytes() == (Path("runs/whole/averages") / name).read_bytes()
    whole, parts = load_checkpoint(newest("whole")), load_checkpoint(newest())
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(value, parts.tensors[key]) for key, value in whole.tensors.items())
    assert parts.state["snapshots"] == whole.state["snapshots"]
    run_training(SMALL.replace(steps=2), overwrite=True)
    assert snapshots() == ["step_00000002.safetensors"]


def test_a_snapshot_that_is_missing_or_damaged_is_named(capsys):
    run_training(SMALL)
    assert meanflow("sample tiny --weights power:0.07 --labels 1 --count 1 --out a.npy") == 0
    file = RUN / "averages/step_00000004.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    fails("sample tiny --weights power:0.07", capsys, f"cannot read {file}: it is damaged: expected the checksum")
    file.unlink()
    words = "runs/tiny/averages lacks 1 of 2, such as step_00000004.safetensors"
    fails("evaluate tiny --weights power:0.07", capsys, "weights: power:0.07", words)
    assert load_network(RUN).step == 6  # which needs none
    run_training(SMALL.replace(steps=7), resume=True)
    with pytest.raises(UsageError, match="averages lacks 1 of 3"):
        load_network(RUN, "power:0.05")


@pytest.mark.parametrize("length", ["", "x", "0", "0.3", "nan"])
def test_a_length_that_is_none_is_refused(length):
    run_training(SMALL.replace(steps=2))
    with pytest.raises(
        UsageError, match=rf"weights: expected power: and a length, such as power:0\.07, got power:{length}"
    ):
        load_network(RUN, f"power:{length}")


def test_a_run_without_power_averages_has_none_of_any_length():
    run_training(TINY.replace(steps=1, ema_decays=(0.9,)))
    with pytest.raises(UsageError, match=r"weights: .*step_00000001 was trained without --power-ema; got power:0\.07"):
        load_network(RUN, "power:0.07")


def test_a_state_that_names_other_files_is_refused():
    run_training(SMALL.replace(steps=3))
    file = newest() / "state.json"
    state = json.loads(file.read_text())
    del state["checksums"]
    file.write_text(json.dumps({**state, "snapshots": {"../../secret.safetensors": "0"}}))
    with pytest.raises(UsageError, match=r"snapshots: expected names such as step_00001000\.safetensors, got"):
        load_network(RUN)


def test_a_snapshot_of_another_network_is_refused():
    run_training(SMALL.replace(steps=3))
    file = RUN / "averages/step_00000002.safetensors"
    tensors = load_file(file)
    save_file({name: value[:1].clone() for name, value in tensors.items()}, file)
    state = json.loads((newest() / "state.json").read_text())
    del state["checksums"]
    (newest() / "state.json").write_text(json.dumps({**state, "snapshots": {file.name: checksum(file)}}))
    with pytest.raises(UsageError, match=rf"{file.name}: .* tensors are missing or of another shape"):
        load_network(RUN, "power:0.07")


def test_a_snapshot_that_the_disk_does_not_take_ends_the_run(monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("meanflow.training.loop.save_snapshot", full)
    with pytest.raises(
        TrainingError, match=r"averages of step 2 could not be written: no space left .*--resume --name tiny"
    ):
        run_training(SMALL)
