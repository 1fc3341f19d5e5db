import pytest
import torch

from meanflow import sample, sample_ode
from meanflow.models import gaussian_average_velocity


def net(z, r, t, y):
    return gaussian_average_velocity(z, r, t, 0.5, 0.4) + 0.1 * y.view(-1, 1, 1, 1)


net.num_classes = 2


def start(B=3):
    return torch.randn(B, 1, 2, 2, dtype=torch.float64), torch.zeros(B, dtype=torch.long)


def exact(noise):
    return 0.5 + 0.4 * noise


@pytest.mark.parametrize("schedule", [{"steps": 1}, {"steps": 5}, {"times": [1.0, 0.7, 0.69, 0.0]}])
def test_any_schedule_of_the_true_average_velocity_is_exact(schedule):
    noise, y = start()
    torch.testing.assert_close(sample(net, noise, y, **schedule), exact(noise))


def test_a_schedule_may_stop_early():
    noise, y = start()
    half = sample(net, noise, y, times=[1.0, 0.5])
    torch.testing.assert_close(sample(net, half, y, times=[0.5, 0.0]), exact(noise))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_ode_samplers_converge_at_their_order(method, order):
    noise, y = start()
    errors = [(sample_ode(net, noise, y, steps=n, method=method) - exact(noise)).norm() for n in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_classifier_free_guidance():
    noise, y = start()
    y = y + 1
    guided = sample_ode(net, noise, y, steps=4, method="euler", guidance_scale=3.0)
    by_hand = noise
    for i in range(4):
        t = torch.full((3,), 1 - i / 4, dtype=torch.float64)
        null = net(by_hand, t, t, torch.full((3,), 2))
        by_hand = by_hand - (null + 3 * (net(by_hand, t, t, y) - null)) / 4
    torch.testing.assert_close(guided, by_hand)


def test_bad_arguments():
    noise, y = start()
    for call, error, match in (
        (lambda: sample(net, noise, y, steps=0), ValueError, "steps: expected at least 1"),
        (lambda: sample(net, noise, y, times=[0.0, 1.0]), ValueError, "times: expected at least two times"),
        (lambda: sample(net, noise, y, times=[1.5, 0.0]), ValueError, r"times: expected times in \[0, 1\]"),
        (lambda: sample(net, noise, y[:2]), ValueError, r"y: expected shape \(3,\)"),
        (lambda: sample(net, noise.long(), y), TypeError, "noise: expected a floating-point"),
        (lambda: sample_ode(net, noise, y, method="rk4"), ValueError, "method: expected 'euler' or 'heun'"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_networks_that_return_more_than_u():
    noise, y = start()

    def pair(z, r, t, y):
        return net(z, r, t, y), z

    pair.num_classes = 2
    torch.testing.assert_close(sample(pair, noise, y), exact(noise))
    for scale in (1.0, 2.0):
        wanted = sample_ode(net, noise, y, steps=3, guidance_scale=scale)
        torch.testing.assert_close(sample_ode(pair, noise, y, steps=3, guidance_scale=scale), wanted)
