"""TarFlow: the authors' values, the inverse, the determinant, and the order in which patches see each other."""

import math

import golden_values
import pytest
import torch

from meanflow.convert import tarflow_state_dict
from meanflow.models import TarFlow, create_model, patchify, unpatchify
from meanflow.objectives import TarFlowLikelihood
from mfkernels.testing import relative_error

SIZE = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 2,
    "hidden_size": 12,
    "depth": 3,
    "layers_per_block": 2,
    "head_dim": 6,
    "num_classes": 3,
}
GOLDEN = 2e-15  # measured: 7.8e-16 at most, of every quantity of both files


def of_authors(data, *, var=False):
    """Their network, in float64; their loss has no variance, their samples do."""
    at = {name: value.item() for name, value in golden_values.part(data, "setting/").items() if value.ndim == 0}
    net = TarFlow(
        input_size=at["img_size"],
        patch_size=at["patch_size"],
        in_channels=at["in_channels"],
        hidden_size=at["channels"],
        depth=at["num_blocks"],
        layers_per_block=at["layers_per_block"],
        head_dim=at["head_dim"],
        mlp_ratio=at["expansion"],
        num_classes=max(at["num_classes"], 1),
        nvp=at["nvp"],
        class_conditional=at["num_classes"] > 0,
    ).double()
    state = golden_values.part(data, "param/") | ({"var": data["var"]} if var and not at["nvp"] else {})
    net.load_state_dict(tarflow_state_dict(state), strict=var or at["nvp"])
    return net, at


def labels_of(data, name, net, rows):
    """Theirs, where −1 is "no label" or there are none, as ours."""
    y = torch.from_numpy(data[name]) if name in data.files else torch.full((rows,), -1)
    return y.masked_fill(y < 0, net.num_classes)


def random_net(**sizes):
    """With nothing at zero, and scales near 1."""
    net = TarFlow(**{**SIZE, **sizes}).double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter += (0.02 if "proj_out" in name else 0.2) * torch.randn_like(parameter)
    return net


def batch(net, B=5):
    C, S = net.in_channels, net.input_size
    return torch.randn(B, C, S, S, dtype=torch.float64), torch.arange(B) % (net.num_classes + 1)


def forward(net, x, y):
    never = torch.zeros(len(x))
    return net(x, never, never, y)


@pytest.fixture(params=["tarflow_a", "tarflow_c"])
def data(request):
    return golden_values.load(request.param)


def test_the_authors_loss_and_gradients(data):
    net, at = of_authors(data)
    x = torch.from_numpy(data["x"])  # with its noise
    y = labels_of(data, "labels", net, len(x))
    z = patchify(x, at["patch_size"])
    for i, block in enumerate(net.blocks):
        z, _ = block(z, y)
        assert relative_error(z, torch.from_numpy(data[f"out_{i}"])) <= GOLDEN
    objective = TarFlowLikelihood(noise_std=0.0)
    drop = y == net.num_classes
    out = objective.loss_at(net, x=x, noise=torch.zeros_like(x), y=y.masked_fill(drop, 0), drop=drop)
    assert relative_error(patchify(out.z, at["patch_size"]), torch.from_numpy(data["z"])) <= GOLDEN
    assert relative_error(out.log_det, torch.from_numpy(data["logdets"])) <= GOLDEN
    assert relative_error(out.loss, torch.from_numpy(data["loss"])) <= GOLDEN
    out.loss.backward()
    wanted = tarflow_state_dict(golden_values.part(data, "grad/"))
    assert set(wanted) == {name for name, _ in net.named_parameters()} - {"log_var"}
    for name, gradient in wanted.items():
        assert relative_error(net.get_parameter(name).grad, gradient) <= GOLDEN, name


def test_the_authors_samples(data):
    net, at = of_authors(data, var=True)
    z = unpatchify(torch.from_numpy(data["sample_z"]), at["patch_size"], at["img_size"])
    y = labels_of(data, "sample_labels", net, len(z))
    objective = TarFlowLikelihood(noise_std=at["noise_std"])
    ways = {"sample": {"denoise": False}}
    if at["nvp"]:
        ways["sample_cfg"] = {"denoise": False, "guidance_scale": 1 + at["sample_cfg_guidance"], "annealed": False}
        ways["sample_annealed"] = {
            "denoise": False,
            "guidance_scale": 1 + at["sample_annealed_guidance"],
            "annealed": True,
            "guide": "b",
            "attention_temperature": at["sample_annealed_attn_temp"],
        }
        ways["sample_denoised"] = {}
    assert {name for name in data.files if name.startswith("sample")} - {"sample_z", "sample_labels"} == set(ways)
    for name, options in ways.items():
        x = objective.sample(net, z, y, **options)
        assert relative_error(x, torch.from_numpy(data[name])) <= GOLDEN, name


def test_the_authors_rule_for_the_priors_variance():
    data = golden_values.load("tarflow_c")
    net, _ = of_authors(data, var=True)
    x = torch.from_numpy(data["x"])
    net.update_prior(forward(net, x, labels_of(data, "labels", net, len(x)))[0])
    assert relative_error(net.log_var.exp(), torch.from_numpy(data["var_updated"])) <= GOLDEN  # measured: 4.3e-17
    with pytest.raises(ValueError, match=r"rate: expected a number in \[0, 1\], got 2"):
        net.update_prior(x, rate=2)
    with pytest.raises(ValueError, match="nvp: expected a network with nvp=False"):
        TarFlow(**SIZE).update_prior(x)


KINDS = [{}, {"nvp": False}, {"class_conditional": False}, {"patch_size": 1}, {"depth": 0}, {"layers_per_block": 1}]


@pytest.mark.parametrize("sizes", KINDS, ids=lambda sizes: next(iter(sizes), "plain"))
def test_the_inverse(sizes):
    net = random_net(**sizes)
    x, y = batch(net)
    z, log_det = forward(net, x, y)
    assert relative_error(net.reverse(z, y), x) <= 7e-16  # measured: 3.2e-16
    assert relative_error(forward(net, net.reverse(x, y), y)[0], x) <= 7e-16  # measured: 3.0e-16
    assert (z.shape, log_det.shape) == (x.shape, (len(x),))


@pytest.mark.parametrize("sizes", KINDS, ids=lambda sizes: next(iter(sizes), "plain"))
def test_the_determinant(sizes):
    net = random_net(**sizes)
    x, y = batch(net, B=2)
    _, log_det = forward(net, x, y)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda a, i=i: forward(net, a[None], y[i : i + 1])[0][0], x[i])
        sign, exact = torch.linalg.slogdet(jacobian.reshape(x[i].numel(), -1))
        assert sign == 1
        assert abs(log_det[i] - exact / x[i].numel()) <= 4e-16  # measured: 1.6e-16


def test_a_patch_sees_itself_and_those_before_it():
    """In blocks of even number; in the others those after it. The scale is of patches before, so it has its own."""
    net = random_net(depth=2, patch_size=1, in_channels=1)
    N = 16
    x, y = torch.randn(1, N, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    for block, above in zip(net.blocks, (False, True), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda a, block=block: block(a, y)[0], x).view(N, N)
        sees = torch.ones(N, N, dtype=torch.bool)
        sees = sees.triu() if above else sees.tril()
        assert jacobian[~sees].abs().max() == 0
        assert jacobian[sees].abs().min() > 1e-9


def by_hand(net, z, y, scale, *, annealed, guide, temperature):
    """Without a cache: every patch from all before it, by as many passes as there are patches. Logits of the pass
    without label are divided by the temperature: so are its queries."""
    N = (net.input_size // net.patch_size) ** 2
    x = patchify(z, net.patch_size)
    if net.log_var is not None:
        x = x * (net.log_var / 2).exp()

    def affine(block, x, y, temperature):
        h = block.embed(x, block.in_order(block.pos_embed[None]), y)
        for layer in block.layers:
            h = layer(h, sharpness=torch.full((len(x), 1, 1, 1), 1 / temperature, dtype=x.dtype))
        return block.affine(h, x)

    for block in reversed(net.blocks):
        x = block.in_order(x)
        for i in range(N - 1):
            with_label = affine(block, x, y, 1.0)
            without = affine(block, x, torch.full_like(y, net.num_classes), temperature)
            w = (scale - 1) * ((i + 1) / (N - 1) if annealed else 1)
            a, b = (
                u[:, i] + w * (u[:, i] - u_null[:, i]) if name in guide else u[:, i]
                for name, u, u_null in zip("ab", with_label, without, strict=True)
            )
            x = torch.cat([x[:, : i + 1], (x[:, i + 1] * a.exp() + b)[:, None], x[:, i + 2 :]], dim=1)
        x = block.in_order(x)
    return unpatchify(x, net.patch_size, net.input_size)


@pytest.mark.parametrize("sizes", [{}, {"nvp": False}, {"class_conditional": False}], ids=["nvp", "vp", "no labels"])
@pytest.mark.parametrize(
    ("scale", "annealed", "guide", "temperature"),
    [(1.0, False, "ab", 1.0), (2.5, False, "ab", 1.0), (2.0, True, "a", 0.7), (0.5, True, "b", 1.4)],
)
def test_the_cache_and_both_passes_in_one_batch(sizes, scale, annealed, guide, temperature):
    net = random_net(**sizes)
    z, y = batch(net)
    found = net.reverse(z, y, guidance_scale=scale, annealed=annealed, guide=guide, attention_temperature=temperature)
    with torch.no_grad():
        wanted = by_hand(net, z, y, scale, annealed=annealed, guide=guide, temperature=temperature)
    assert relative_error(found, wanted) <= 1e-15  # measured: 4.5e-16


def test_what_guidance_leaves_alone():
    """A scale of 1, whatever the temperature; any scale where there is no label; the log-scale where there is none."""
    net = random_net()
    z, y = batch(net)
    plain = net.reverse(z, y)
    assert torch.equal(net.reverse(z, y, guidance_scale=1.0, annealed=True, attention_temperature=0.5), plain)
    guided = net.reverse(z, y, guidance_scale=3.0)
    unlabelled = y == net.num_classes
    assert relative_error(guided[unlabelled], plain[unlabelled]) <= 1e-15  # measured: 4.7e-16
    assert relative_error(guided[~unlabelled], plain[~unlabelled]) > 0.05
    additive = random_net(nvp=False)
    assert relative_error(additive.reverse(z, y, guidance_scale=3.0, guide="a"), additive.reverse(z, y)) <= 1e-15


def test_a_fresh_network_is_the_identity():
    for nvp in (True, False):
        net = TarFlow(**SIZE, nvp=nvp)
        x, y = (a.float() if a.is_floating_point() else a for a in batch(net))
        z, log_det = forward(net, x, y)
        assert torch.equal(z, x)
        assert torch.equal(log_det, torch.zeros(len(x)))


def test_no_label_is_the_mean_of_the_classes():
    net = random_net()
    x, y = batch(net)
    mean = random_net(num_classes=1)
    state = net.state_dict()
    for name in state:
        if name.endswith("class_embed"):
            state[name] = state[name].mean(dim=0, keepdim=True)
    mean.load_state_dict(state)
    found, wanted = forward(net, x, torch.full_like(y, 3))[0], forward(mean, x, torch.zeros_like(y))[0]
    assert relative_error(found, wanted) <= 1e-15  # measured: 0
    bare = random_net(class_conditional=False)
    assert not any("class_embed" in name for name in bare.state_dict())
    assert torch.equal(forward(bare, x, y)[0], forward(bare, x, (y + 1) % 3)[0])


def test_half_precision_weights_keep_the_flow_in_float32():
    net = random_net().float()
    x, y = batch(net)
    wanted, of_wanted = forward(net, x.float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, of_rounded = forward(net, x.float(), y)
    half = net.bfloat16()
    for z, log_det in ((rounded, of_rounded), forward(half, x.bfloat16(), y)):
        assert (z.dtype, log_det.dtype) == (torch.float32, torch.float32)
        assert relative_error(z, wanted) <= 0.008  # measured: 0.0037 at most
        assert relative_error(log_det, of_wanted) <= 0.018  # measured: 0.0086 at most
    assert half.reverse(x.bfloat16(), y, guidance_scale=2.0, attention_temperature=0.5).dtype == torch.float32


def test_patches():
    x = torch.arange(2 * 16.0).view(1, 2, 4, 4)
    patches = patchify(x, 2)
    assert patches[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # the second of the first row: C, row, column
    assert torch.equal(unpatchify(patches, 2, 4), x)


def test_by_name():
    net = create_model("TarFlow", **SIZE)
    assert net.config["layers_per_block"] == 2
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in TarFlow(**SIZE).parameters())


def test_bad_arguments():
    for sizes, match in (
        ({"head_dim": 5}, "head_dim: expected a divisor of hidden_size = 12, got 5"),
        ({"patch_size": 4}, "patch_size: expected less than input_size = 4, got 4: one patch"),
        ({"patch_size": 3}, "input_size: expected a multiple of patch_size = 3, got 4"),
        ({"layers_per_block": 0}, "layers_per_block: expected at least 1, got 0"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"mlp_ratio": math.nan}, "mlp_ratio: expected a finite number > 0, got nan"),
    ):
        with pytest.raises(ValueError, match=match):
            TarFlow(**{**SIZE, **sizes})
    net = random_net()
    x, y = batch(net)
    for call, error, match in (
        (lambda: forward(net, x[:, :1], y), ValueError, r"x: expected shape \(B, 2, 4, 4\), got \(5, 1, 4, 4\)"),
        (lambda: forward(net, x, y + 1), ValueError, r'y: expected labels in \[0, 3\], where 3 is "no label"'),
        (lambda: net.reverse(x, y[:2]), ValueError, r"y: expected shape \(5,\), the batch of z"),
        (lambda: net.reverse(x.long(), y), TypeError, "z: expected a floating-point dtype, got torch.int64"),
        (lambda: net.reverse(x, y, guidance_scale=-1), ValueError, "guidance_scale: expected a finite number >= 0"),
        (lambda: net.reverse(x, y, attention_temperature=0), ValueError, "attention_temperature: expected .* > 0"),
        (lambda: net.reverse(x, y, guide="c"), ValueError, "guide: expected 'ab', 'a' or 'b', got 'c'"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_weights_of_others():
    data = golden_values.load("tarflow_c")
    theirs = golden_values.part(data, "param/")
    state = tarflow_state_dict({"model": {f"module.{name}": torch.from_numpy(a) for name, a in theirs.items()}})
    assert state.keys() == tarflow_state_dict(theirs).keys()
    ones = {**golden_values.part(golden_values.load("tarflow_a"), "param/"), "var": torch.ones(16, 12)}
    assert "log_var" not in tarflow_state_dict(ones)
    for state, match in (
        (
            {**theirs, "blocks.0.attn_blocks.0.mlp.main.1.weight": theirs["blocks.0.proj_in.weight"]},
            "main.1.weight: not",
        ),
        ({**theirs, "var": torch.zeros(16, 4)}, r"var: expected positive variances of shape \(N, C·p·p\)"),
        ({**theirs, "blocks.0.class_embed": torch.zeros(3, 8)}, r"blocks.0.class_embed: expected shape \(K, 1, D\)"),
        ({"blocks.1.pos_embed": torch.zeros(16, 8)}, "state: expected blocks.0.proj_out.weight"),
    ):
        with pytest.raises(ValueError, match=match):
            tarflow_state_dict(state)
