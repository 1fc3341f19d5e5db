"""Samplers with fresh noise, their laws at the exact flow map, and what they have in common."""

import dataclasses
import itertools

import pytest
import torch

from meanflow.errors import NetworkError, UsageError
from meanflow.models import gaussian_average_velocity
from meanflow.registry import available
from meanflow.sampling import (
    ConsistencySteps,
    FewSteps,
    GammaSteps,
    GuidedSteps,
    OdeSteps,
    SdeSteps,
    chosen,
    karras_times,
    renoise,
    sample,
    sample_consistency,
    sample_gamma,
    sample_ode,
    sample_sde,
    uniform_times,
)


def name_of(a):
    """An id of a test that is the same in every process."""
    return getattr(a, "__name__", str(a))


MEAN, STD = 0.5, 0.4
RANDOM = [sample_consistency, sample_gamma, sample_sde]


def net(z, r, t, y):
    """The exact flow map of N(MEAN, STD²), of which label 1 is another."""
    return gaussian_average_velocity(z, r, t, MEAN, STD) + 0.1 * y.view(-1, 1)


net.num_classes = 2


def law(draw, count, network=net, **options):
    """Mean and deviation of what a sampler makes of standard normal noise and `count` fresh noises.

    A sampler of an affine network is affine in its noises: row 0 has none, row j + 1 has a 1 in the j-th alone.
    """
    ones = torch.eye(count + 2, dtype=torch.float64)[1:, :, None]  # [count + 1, rows, 1]
    more = {"noises": list(ones[1:])} if draw in RANDOM else {}
    x = draw(network, ones[0], torch.zeros(count + 2, dtype=torch.long), **options, **more)[:, 0]  # [rows]
    return float(x[0]), float((x[1:] - x[0]).norm())


def start(B=3):
    return torch.randn(B, 2, dtype=torch.float64), torch.zeros(B, dtype=torch.long)


TIMES = {"uniform": uniform_times(4), "uneven": [1.0, 0.9, 0.3, 0.29, 0.0]}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize(
    ("draw", "options"),
    [
        (sample, {}),
        (sample_consistency, {}),
        *((sample_gamma, {"gamma": gamma, "rule": rule}) for gamma in (0.3, 0.9) for rule in ("noise_level", "time")),
    ],
    ids=name_of,
)
def test_at_the_exact_flow_map_the_law_is_that_of_the_data(draw, options, times):
    assert law(draw, 3, times=times, **options) == pytest.approx((MEAN, STD), rel=1e-12)


def test_the_program_of_decoupled_meanflow_adds_too_little_noise():
    mean, std = law(sample_gamma, 3, times=TIMES["uniform"], gamma=0.9, rule="dmf")
    assert mean == pytest.approx(MEAN, rel=1e-12)
    assert std < 0.9 * STD


@pytest.mark.parametrize("T", [0.994, 0.9])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("times", [uniform_times, karras_times])
def test_noise_at_a_time_below_one(T, steps, times):
    """Standard normal noise is not the law of z_T: the bias of IMM's start."""
    of_T = ((1 - T) ** 2 * STD**2 + T**2) ** 0.5
    assert law(sample, 0, times=times(steps, T)) == pytest.approx((MEAN * (1 - STD * (1 - T) / of_T), STD / of_T))


def test_the_starts_are_the_laws_of_the_data_that_they_suppose():
    def of(mean, std):
        return lambda z, r, t, y: gaussian_average_velocity(z, r, t, mean, std)

    for T in (0.7, 1.0):
        assert law(sample, 0, of(0.0, 1.0), times=[T, 0.0], start="sphere") == pytest.approx((0.0, 1.0))
        noise, y = start()
        levels = sample(of(0.0, 1e-6), noise, y, times=[T, 0.0], start="scaled")
        torch.testing.assert_close(levels, 1e-6 * noise, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("r", "t"), [(0.0, 0.6), (0.2, 0.3), (0.5, 0.5), (0.4, 1.0)])
def test_renoise_has_the_law_of_the_later_time(r, t):
    a = renoise(torch.ones(1), r, t, torch.zeros(1)).double().item()
    spread = renoise(torch.zeros(1), r, t, torch.ones(1)).double().item()
    assert a == pytest.approx((1 - t) / (1 - r))
    assert a**2 * r**2 + spread**2 == pytest.approx(t**2)
    z, n = torch.randn(2, 3, 2, 2)
    rows = renoise(z, torch.full((3,), r), torch.full((3,), t), n)
    torch.testing.assert_close(rows, renoise(z, r, t, n))
    with pytest.raises(ValueError, match="r, t: expected 0 <= r <= t <= 1 and r < 1, got r=1"):
        renoise(z, 1.0, 1.0, n)


@pytest.mark.parametrize("times", [*TIMES.values(), [0.9, 0.5, 0.1], [1.0, 1.0, 0.5, 0.0]], ids=str)
@pytest.mark.parametrize("rule", ["noise_level", "time", "dmf"])
def test_gamma_is_between_jumps_and_consistency(times, rule):
    noise, y = start()
    fresh = list(torch.randn(len(times) - 2, *noise.shape, dtype=torch.float64))
    none = sample_gamma(net, noise, y, times=times, gamma=0.0, rule=rule, noises=fresh)
    assert torch.equal(none, sample(net, noise, y, times=times))
    every = sample_gamma(net, noise, y, times=times, gamma=1.0, rule=rule, noises=fresh)
    there = sample_consistency(net, noise, y, times=times, noises=fresh)
    if rule == "dmf":
        if times[-1] == 0.0:  # a·x̂ + (1 − a)·noise
            torch.testing.assert_close(every, there)
    else:
        assert torch.equal(every, there)


def test_a_stochastic_sampler_without_diffusion_is_the_ode():
    noise, y = start()
    assert torch.equal(
        sample_sde(net, noise, y, steps=7, diffusion_scale=0.0), sample_ode(net, noise, y, steps=7, method="euler")
    )


@pytest.mark.parametrize("diffusion", ["t", "sin2", "constant", lambda t: 2 * t * (1 - t)], ids=name_of)
def test_the_sde_converges_to_the_law_of_the_data(diffusion):
    errors = []
    for steps in (100, 200):
        mean, std = law(sample_sde, steps - 1, steps=steps, diffusion=diffusion)
        errors.append(abs(mean - MEAN) + abs(std - STD))
    assert errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)


def test_clean_images_are_cut_and_have_the_least_noise_level():
    noise, y = start()
    n = torch.randn_like(noise)
    times, least = [0.9, 0.5, 0.0], 0.1
    x = (0.9 * noise - 0.9 * net(0.9 * noise, y.double(), y + 0.9, y)).clamp(-1, 1)
    z = (x + (1.0 - least**2) ** 0.5 * n) / 2  # noise level 1
    x = (z - 0.5 * net(z, y.double(), y + 0.5, y)).clamp(-1, 1)
    drawn = sample_consistency(net, noise, y, times=times, start="scaled", sigma_min=least, clip=True, noises=[n])
    torch.testing.assert_close(drawn, x)


@pytest.mark.parametrize("draw", [sample, *RANDOM, lambda *a, **b: sample_ode(*a, method="euler", **b)])
def test_guidance_is_that_of_the_velocity_within_its_interval(draw):
    noise, y = start()
    times, interval = [1.0, 0.6, 0.0], (0.0, 0.6)

    def mixed(z, r, t, y):
        if t[0] > 0.6:
            return net(z, r, t, y)
        null = net(z, r, t, torch.full_like(y, 2))
        return null + 1.8 * (net(z, r, t, y) - null)

    more = {"noises": [torch.randn_like(noise)]} if draw in RANDOM else {}
    drawn = draw(net, noise, y + 1, times=times, guidance_scale=1.8, guidance_interval=interval, **more)
    torch.testing.assert_close(drawn, draw(mixed, noise, y + 1, times=times, **more))
    assert not torch.equal(drawn, draw(net, noise, y + 1, times=times, **more))


@pytest.mark.parametrize("draw", RANDOM)
def test_where_the_noises_come_from(draw):
    noise, y = start()

    def seeded():
        return torch.Generator().manual_seed(7)

    first = draw(net, noise, y, steps=3, generator=seeded())
    assert torch.equal(first, draw(net, noise, y, steps=3, generator=seeded()))
    generator = seeded()
    given = [torch.randn(noise.shape, dtype=noise.dtype, generator=generator) for _ in range(2)]
    assert torch.equal(first, draw(net, noise, y, steps=3, noises=given))
    torch.manual_seed(1)
    other = draw(net, noise, y, steps=3)
    torch.manual_seed(1)
    assert torch.equal(other, draw(net, noise, y, steps=3))
    assert not torch.equal(first, other)
    for given, error, match in (
        ({"noises": [noise]}, ValueError, "noises: expected 2, one between two steps, got 1"),
        (
            {"noises": [noise, noise[:1]]},
            ValueError,
            r"noises\[1\]: expected the shape of noise, \(3, 2\), got",
        ),
        ({"noises": [noise, None]}, TypeError, r"noises\[1\]: expected a tensor, got NoneType"),
        ({"noises": [noise, noise], "generator": seeded()}, ValueError, "generator, noises: expected one of them"),
    ):
        with pytest.raises(error, match=match):
            draw(net, noise, y, steps=3, **given)


def test_schedules():
    assert uniform_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert uniform_times(3, 0.994)[-1] == 0.0
    levels = [t / (1 - t) for t in karras_times(17, 80 / 81, 0.002 / 1.002)]
    roots = [level ** (1 / 7) for level in levels]
    gaps = [a - b for a, b in itertools.pairwise(roots)]
    assert max(gaps) - min(gaps) < 1e-12
    assert (levels[0], levels[-1]) == pytest.approx((80, 0.002))
    for call, match in (
        (lambda: karras_times(2, 1.0), "t_start: expected less than 1, such as 0.994"),
        (lambda: karras_times(2, 0.9, rho=0.0), "rho: expected a number > 0"),
        (lambda: uniform_times(0), "steps: expected at least 1, got 0"),
        (lambda: uniform_times(2, 0.5, 0.7), "t_start, t_end: expected 0 <= t_end < t_start <= 1, got 0.5 and 0.7"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_bad_arguments():
    noise, y = start()
    for call, match in (
        (lambda: sample(net, noise, y, start="half"), "start: expected 'unit', 'scaled' or 'sphere', got 'half'"),
        (lambda: sample(net, noise, y, guidance_interval=(0.0, float("nan"))), "guidance_interval: expected a finite"),
        (lambda: sample_gamma(net, noise, y, gamma=1.5), r"gamma: expected a number in \[0, 1\], got 1.5"),
        (lambda: sample_gamma(net, noise, y, rule="no"), "rule: expected 'noise_level', 'time' or 'dmf', got 'no'"),
        (
            lambda: sample_sde(net, noise, y, diffusion="no"),
            "diffusion: expected a function or one of t, sin2, const",
        ),
        (
            lambda: sample_sde(net, noise, y, diffusion=lambda t: -1.0),
            "diffusion: expected numbers >= 0, got -1.0 at",
        ),
        (lambda: sample_sde(net, noise, y, diffusion_scale=-1.0), "diffusion_scale: expected a number >= 0, got -1.0"),
        (lambda: sample_consistency(net, noise, y, sigma_min=-1.0), "sigma_min: expected a number >= 0, got -1.0"),
        (lambda: sample_consistency(net, noise, y, sigma_min=2.0), "sigma_min: expected at most 1, the noise level of"),
        (
            lambda: sample_consistency(net, noise, y, times=[1.0, 0.5, 0.1], sigma_min=0.1),
            "sigma_min: expected 0 with times that end at 0.1, got 0.1",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(NetworkError, match="expected an attribute num_classes"):
        sample(lambda z, r, t, y: z, noise, y, guidance_scale=2.0)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("sampler", "by_hand"),
    [
        (FewSteps(steps=3), lambda *a, generator: sample(*a, steps=3)),
        (
            FewSteps(times=[0.9, 0.2], start="scaled", guidance_scale=2.0, guidance_t_max=0.5),
            lambda *a, generator: sample(
                *a, times=[0.9, 0.2], start="scaled", guidance_scale=2.0, guidance_interval=(0.0, 0.5)
            ),
        ),
        (FewSteps(4, schedule="karras", t_start=0.9), lambda *a, generator: sample(*a, times=karras_times(4, 0.9))),
        (OdeSteps(3), lambda *a, generator: sample_ode(*a, steps=3)),
        (ConsistencySteps(3, clip=True), lambda *a, **b: sample_consistency(*a, steps=3, clip=True, **b)),
        (GammaSteps(3, gamma=0.7, rule="time"), lambda *a, **b: sample_gamma(*a, steps=3, gamma=0.7, rule="time", **b)),
        (SdeSteps(5, diffusion="sin2"), lambda *a, **b: sample_sde(*a, steps=5, diffusion="sin2", **b)),
    ],
    ids=name_of,
)
def test_a_sampler_is_its_function(sampler, by_hand):
    noise, y = start()
    drawn = sampler.draw(net, noise, y, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, by_hand(net, noise, y, generator=torch.Generator().manual_seed(3)))
    assert sampler.draw(net, noise, y).shape == noise.shape


def test_a_network_that_is_told_its_guidance():
    def told(z, r, t, y, omega, t_min, t_max, heads):
        assert (t_min, t_max, heads) == (0.0, 0.8, "u")
        return omega * net(z, r, t, y)

    def by_two(z, r, t, y):
        return 2 * net(z, r, t, y)

    noise, y = start()
    sampler = GuidedSteps(3, t_max=0.8)
    assert torch.equal(sampler.draw(told, noise, y), sample(by_two, noise, y, steps=3))
    fresh = dataclasses.replace(sampler, gamma=0.6).draw(told, noise, y, generator=torch.Generator().manual_seed(3))
    wanted = sample_gamma(by_two, noise, y, steps=3, gamma=0.6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(fresh, wanted)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FewSteps(0), "steps: expected at least 1, got 0"),
        (lambda: FewSteps(schedule="karras"), "t_start: expected less than 1, such as 0.994"),
        (lambda: FewSteps(times=[0.0, 1.0]), "times: expected at least two times that never increase"),
        (lambda: FewSteps(times=[1.5, 0.0]), r"times: expected a number in \[0, 1\], got 1.5"),
        (lambda: FewSteps(guidance_t_min=0.9, guidance_t_max=0.1), "guidance_t_min: expected at most guidance_t_max"),
        (lambda: ConsistencySteps(sigma_min=3.0), "sigma_min: expected at most 1, the noise level"),
        (lambda: GammaSteps(gamma=2.0), r"gamma: expected a number in \[0, 1\], got 2.0"),
        (
            lambda: chosen(FewSteps(), "heun"),
            "sampler: expected one of consistency, gamma, jumps, guided, ode, sde, tarflow or",
        ),
        (lambda: chosen(FewSteps(), "meanflow.sampling:sample"), "sampler: expected a frozen dataclass with draw"),
        (lambda: chosen(FewSteps(), gamma=0.5), "sampling: expected steps, schedule, .*, got gamma"),
        (lambda: chosen(FewSteps(), schedule="cosine"), "schedule: expected Literal"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(UsageError, match=match):
        make()


def test_another_sampler_starts_from_its_own_defaults():
    own = FewSteps(7, start="sphere")
    assert chosen(own, steps=2) == FewSteps(2, start="sphere")
    assert chosen(own, "jumps", times=[1, 0.5, 0]) == FewSteps(7, start="sphere", times=(1.0, 0.5, 0.0))
    assert chosen(own, "gamma", gamma=0.1) == GammaSteps(gamma=0.1)


def test_what_a_report_says_of_a_sampler():
    assert str(FewSteps()) == "flow map, 1 network evaluation"
    assert str(OdeSteps()) == "Heun's method, 50 steps, 100 network evaluations"
    assert str(GuidedSteps()) == "flow map, 1 network evaluation, omega 2 on [0, 1]"
    assert str(FewSteps(2, schedule="karras", t_start=0.9, start="scaled", guidance_scale=2.0, guidance_t_max=0.5)) == (
        "flow map, 2 network evaluations of the karras schedule from 0.9, scaled start, guidance scale 2 on [0, 0.5]"
    )
    for name, cls in available("samplers"):
        assert ("inverse flow" if name == "tarflow" else "network evaluation") in str(cls()), name
