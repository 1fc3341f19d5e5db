"""A network of the user's, by the name of the function that makes it: errors, and a run through the whole trainer."""

import pytest
import torch

import mfkernels
from meanflow.config import Config
from meanflow.data import load_digits_data
from meanflow.errors import UsageError
from meanflow.models import config_of, create_model
from meanflow.training import load_network, run_training

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_channels, num_classes, width):
        super().__init__()
        self.label = nn.Embedding(num_classes + 1, width)
        self.inp, self.out = nn.Conv2d(in_channels + 2, width, 3, padding=1), nn.Conv2d(width, in_channels, 1)

    def forward(self, z, r, t, y):
        times = torch.stack([t, t - r], 1)[:, :, None, None].expand(-1, -1, *z.shape[2:])
        h = torch.tanh(self.inp(torch.cat([z, times], 1)) + self.label(y)[:, :, None, None])
        return self.out(h)

def network(input_size, in_channels, num_classes, hidden_size=8, **sizes):
    return Net(in_channels, num_classes, hidden_size)

def late(input_size, in_channels, num_classes, hidden_size=8):
    import users_sizes  # beside this file

    return Net(in_channels, num_classes, users_sizes.WIDTH)

def another(input_size, in_channels, num_classes, hidden_size=8):
    net = Net(in_channels, num_classes, hidden_size)
    net.num_classes = 0
    return net

def unused(input_size, in_channels, num_classes, hidden_size=8):
    net = Net(in_channels, num_classes, hidden_size)
    net.left_over = nn.Linear(2, 2)
    return net

class Wrapping(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.blocks = net, nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(3)))

    def forward(self, z, r, t, y):
        return self.blocks(self.net(z, r, t, y))

def with_blocks(input_size, in_channels, num_classes, hidden_size=8):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Wrapping(Net(in_channels, num_classes, hidden_size))

        def forward(self, z, r, t, y):
            return self.inner(z, r, t, y)

    return Outer()

def number(**sizes):
    return 3

def unconditional(**sizes):
    return nn.Identity()

def strict(input_size):
    return nn.Identity()

VALUE = 3
"""

TINY = Config.of(
    data="digits",
    name="mine",
    model="users_network:network",
    hidden_size=8,
    steps=4,
    batch_size=16,
    device="cpu",
    checkpoint_every=2,
    sample_every=0,
    evaluate=False,
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "users_network.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "users_network", raising=False)
    return tmp_path


def test_it_is_dualized_and_remembers_its_sizes(here):
    net = create_model("users_network:network", input_size=4, in_channels=1, num_classes=3, hidden_size=6)
    assert mfkernels.is_dual_aware(net)
    assert net.num_classes == 3
    assert net.label.weight.shape == (4, 6)
    again = create_model("users_network:network", **config_of(net))
    assert again.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no such:thing", r'expected "package.module:function", got'),
        ("no_such_module:thing", "cannot import no_such_module of 'no_such_module:thing'"),
        ("users_network:thing", "users_network has no thing, .*; expected a function of input_size=, in_channels="),
        ("users_network:VALUE", "users_network:VALUE is a int"),
        ("users_network:number", r"to return a torch.nn.Module, got int"),
        ("users_network:another", r"has num_classes = 0, which would be its label for \"no label\"; expected 3"),
        ("users_network:unconditional", r"with forward\(z, r, t, y\), got Identity.forward\(input"),
    ],
)
def test_names_that_lead_nowhere(here, name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, input_size=4, in_channels=1, num_classes=3)


def test_the_trainer_trains_samples_and_loads_it(here):
    run_training(TINY)
    loaded = load_network(here / "runs" / "mine", trust_code=True)
    assert loaded.step == 4
    assert (loaded.net.num_classes, loaded.net.label.weight.shape) == (10, (11, 8))
    z = torch.randn(2, *loaded.image_shape)
    assert loaded.net(z, torch.zeros(2), torch.ones(2), torch.zeros(2, dtype=torch.long)).shape == z.shape


def test_the_trainer_names_a_size_that_it_does_not_take(here):
    config = TINY.replace(model="users_network:strict")
    with pytest.raises(UsageError, match=r"model: users_network:strict cannot be built for digits.*in_channels"):
        config.network(load_digits_data(0.0))


def test_what_the_function_imports_is_looked_for_in_the_working_directory_too(here):
    (here / "users_sizes.py").write_text("WIDTH = 5")
    net = create_model("users_network:late", input_size=4, in_channels=1, num_classes=3)
    assert net.label.weight.shape == (4, 5)


def test_a_parameter_without_gradient_does_not_stop_a_resume(here):
    config = TINY.replace(model="users_network:unused", steps=2)
    run_training(config)
    assert run_training(config.replace(steps=4), resume=True).step == 4


def test_blocks_are_found_within_a_wrapper_and_missed_by_name(here):
    run_training(TINY.replace(model="users_network:with_blocks", checkpoint_blocks="all", steps=1))
    with pytest.raises(UsageError, match="checkpoint_blocks: expected 'all' or a number up to 3"):
        run_training(TINY.replace(name="b", model="users_network:with_blocks", checkpoint_blocks=4))
    with pytest.raises(UsageError, match=r"checkpoint_blocks: .* has no blocks"):
        run_training(TINY.replace(name="c", checkpoint_blocks="all"))
