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
        (lambda: sample(net, noise, y, steps=7, times=[1, 0]), ValueError, "steps, times: expected one of them, got"),
        (lambda: sample_ode(net, noise, y, steps=7, times=[1, 0]), ValueError, "steps, times: expected one of them"),
        (lambda: sample(net, noise, y, times=[1.0, float("nan")]), ValueError, "times: expected at least two times"),
        (lambda: sample(net, noise.numpy(), y), TypeError, "noise: expected a tensor, got ndarray"),
        (lambda: sample(net, noise.sum(), y), ValueError, "noise: expected"),
        (lambda: sample(net, noise, [0, 0, 0]), TypeError, "y: expected a tensor of labels, got list"),
        (lambda: sample(net, noise, y.float()), TypeError, "y: expected integer labels"),
        (lambda: sample(net, noise, y + 3), ValueError, r"y: expected labels in \[0, 2\], where 2 is .*, got 3 to 3"),
        (lambda: sample_ode(net, noise, y - 1), ValueError, r"y: expected labels in \[0, 2\], .*, got -1 to -1"),
        (lambda: sample_ode(net, noise, y, guidance_scale=float("nan")), ValueError, "guidance_scale: expected a fin"),
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


@pytest.mark.parametrize(
    ("returns", "error", "match"),
    [
        (lambda z: z[:, :, :1], ValueError, r"net: expected u of the shape of z, \(\d, 1, 2, 2\), got \(\d, 1, 1, 2\)"),
        (lambda z: (z[:1], z), ValueError, r"net: expected u of the shape of z, .*, got \(1, 1, 2, 2\)"),
        (lambda z: {"u": z}, TypeError, "net: expected it to return u, a tensor of the shape of z, got dict"),
        (lambda z: (None, z), TypeError, "net: expected it to return u, a tensor of the shape of z, got NoneType"),
        (lambda z: (), TypeError, "net: expected it to return u, a tensor of the shape of z, got tuple"),
    ],
)
def test_a_prediction_that_is_no_velocity_is_refused(returns, error, match):
    """It would be broadcast against z in silence."""

    def wrong(z, r, t, y):
        return returns(z)

    wrong.num_classes = 2
    noise, y = start()
    for draw in (sample, sample_ode, lambda *a: sample_ode(*a, guidance_scale=2.0)):
        with pytest.raises(error, match=match):
            draw(wrong, noise, y)


def test_an_empty_batch_and_labels_of_a_network_that_names_no_number():
    noise, y = start()
    assert sample(net, noise[:0], y[:0]).shape == (0, 1, 2, 2)
    assert sample(lambda z, r, t, y: z, noise, y + 100).shape == noise.shape


def test_sampling_compiles_as_one_graph():
    noise, y = start()
    compiled = torch.compile(lambda z, y: sample(net, z, y, steps=2), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(noise, y), sample(net, noise, y, steps=2))
