import pytest
import torch
from memory import saved_bytes
from peers import PlainDiT, math_attention

from meanflow.models import DiT, DiT_B_2, DiT_XL_2, create_model
from meanflow.models.dit import sincos_2d
from meanflow.registry import find
from mfkernels import Dual, jvp, use_backend
from mfkernels.testing import relative_error

SIZES = {
    "narrow": {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    },
    "head_dim_72": {
        "input_size": 6,
        "patch_size": 3,
        "in_channels": 1,
        "hidden_size": 144,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 2,
    },
    "one_token": {
        "input_size": 4,
        "patch_size": 4,
        "in_channels": 3,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 1,
        "num_classes": 1,
    },
}


def randomized(size):
    net = DiT(**size).double()
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)  # adaLN-Zero's zeros would hide everything
    plain = PlainDiT(**size).double()
    plain.load_state_dict(net.state_dict())
    plain.attend = math_attention
    return net, plain


def inputs(size, B=4):
    side, C = size["input_size"], size["in_channels"]
    z, dz = torch.randn(2, B, C, side, side, dtype=torch.float64)
    t = torch.rand(B, dtype=torch.float64)
    return z, t * torch.rand(B, dtype=torch.float64), t, torch.arange(B) % (size["num_classes"] + 1), dz


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_output_derivative_and_gradients_against_an_independent_network(size, rows):
    net, plain = randomized(size)
    z, r, t, y, dz = inputs(size)
    dr, dt = torch.randn(2, 4, dtype=torch.float64)
    u, du = jvp(net, (z, r, t), (dz, dr, dt), rows=rows, y=y)
    ref, ref_dot = torch.func.jvp(lambda *a: plain(*a, y), (z, r, t), (dz, dr, dt))
    # measured: 1.2e-15 and 1.7e-15
    assert relative_error(u, ref) <= 3e-15
    assert du.shape[0] == rows
    assert not du.requires_grad
    if rows:
        assert relative_error(du, ref_dot[:rows]) <= 4e-15
    assert torch.equal(net(z, r, t, y), u)  # the dual pass and the plain pass are the same network
    cotangent = torch.randn_like(u)
    u.backward(cotangent)
    plain(z, r, t, y).backward(cotangent)
    theirs = dict(plain.named_parameters())
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert relative_error(p.grad, theirs[name].grad) <= 5e-13, name  # measured 2.4e-13


def test_a_wrong_tangent_is_seen():
    net, plain = randomized(SIZES["narrow"])
    z, r, t, y, dz = inputs(SIZES["narrow"])
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    _, ref_dot = torch.func.jvp(lambda *a: plain(*a, y), (z, r, t), (dz, zero, one))
    for dr, dt in ((zero, zero), (one, zero), (one, one)):
        _, du = jvp(net, (z, r, t), (dz, dr, dt), y=y)
        assert relative_error(du, ref_dot) > 1e-2


def test_dual_step_keeps_what_the_plain_step_keeps():
    net, _ = randomized(SIZES["narrow"])
    z, r, t, y, dz = inputs(SIZES["narrow"])

    plain = saved_bytes(lambda: net(z, r, t, y))
    for rows in (1, 4):
        dual = saved_bytes(lambda rows=rows: net(Dual(z, dz[:rows]), Dual(r), Dual(t, torch.ones(rows).double()), y))
        assert dual == plain


def test_dual_pass_compiles_as_one_graph():
    net, _ = randomized(SIZES["narrow"])
    z, r, t, y, dz = inputs(SIZES["narrow"])

    def derivative(z, r, t, dz, y):
        return jvp(net, (z, r, t), (dz, torch.zeros_like(r), torch.ones_like(t)), rows=2, y=y)

    u, du = torch.compile(derivative, fullgraph=True, backend="aot_eager")(z, r, t, dz, y)
    u_eager, du_eager = derivative(z, r, t, dz, y)
    assert relative_error(u, u_eager) <= 1e-15
    assert relative_error(du, du_eager) <= 1e-15
    u.square().sum().backward()
    compiled = [p.grad.clone() for p in net.parameters() if p.requires_grad]
    net.zero_grad()
    u_eager.square().sum().backward()
    for g, p in zip(compiled, (p for p in net.parameters() if p.requires_grad), strict=True):
        assert relative_error(g, p.grad) <= 1e-14


def test_state_dict_names_are_dits():
    names = list(DiT(**SIZES["narrow"]).state_dict())
    block = [
        f"blocks.0.{name}.{kind}"
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    ]
    stem = ["pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias"]
    stem += [f"{e}.mlp.{i}.{kind}" for e in ("t_embedder", "r_embedder") for i in (0, 2) for kind in ("weight", "bias")]
    head = [f"final_layer.{n}.{kind}" for n in ("linear", "adaLN_modulation.1") for kind in ("weight", "bias")]
    other = [name.replace("blocks.0", "blocks.1") for name in block]
    assert sorted(names) == sorted([*stem, "y_embedder.embedding_table.weight", *block, *other, *head])


def test_initialisation_is_adaln_zero():
    net = DiT(**SIZES["narrow"])
    z, r, t, y, _ = inputs(SIZES["narrow"])
    assert torch.count_nonzero(net(z.float(), r.float(), t.float(), y)) == 0
    assert all(torch.count_nonzero(b.adaLN_modulation[1].weight) == 0 for b in net.blocks)
    assert not net.pos_embed.requires_grad


def test_positions_are_dits():
    # facebookresearch/DiT: the first half of the width encodes the column ("w goes first"), as [sin, cos]
    e = sincos_2d(8, 3)
    assert torch.equal(e[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    angle = torch.tensor([1.0, 0.01])
    torch.testing.assert_close(e[1][:4], torch.cat([angle.sin(), angle.cos()]))
    assert torch.equal(e[1][4:], e[0][4:])
    assert torch.equal(e[3][:4], e[0][:4])


def test_sizes_by_name():
    parameters = {
        "DiT-B/2": 131,
        "DiT-M/2": 308,
        "DiT-L/2": 459,
        "DiT-XL/2": 676,
    }  # millions (paper, table 4)
    with torch.device("meta"):
        for name, millions in parameters.items():
            count = sum(p.numel() for p in find("models", name)().parameters() if p.requires_grad)
            assert round(count / 1e6) == millions, name
        assert DiT_B_2().config["patch_size"] == 2
        assert DiT_XL_2().blocks[0].attn.num_heads == 16
        assert create_model("DiT-S/8", input_size=16).config["depth"] == 12
    with pytest.raises(ValueError, match="model: expected one of DiT, DiT-S/2, DiT-S/4"):
        create_model("DiT-Q/2")


def test_bad_arguments():
    with pytest.raises(ValueError, match="input_size: expected a multiple of patch_size = 2"):
        DiT(input_size=7, patch_size=2)
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        DiT(input_size=8, hidden_size=20, num_heads=3, depth=1)
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of 4"):
        DiT(input_size=8, hidden_size=18, num_heads=3, depth=1)
    for changes, match in (
        ({"hidden_size": 0}, "hidden_size: expected at least 1, got 0"),
        ({"depth": -1}, "depth: expected at least 0, got -1"),
        ({"in_channels": 0}, "in_channels: expected at least 1, got 0"),
        ({"num_heads": 0}, "num_heads: expected at least 1, got 0"),
        ({"patch_size": 0}, "patch_size: expected at least 1, got 0"),
        ({"input_size": 0}, "input_size: expected a multiple of patch_size = 2, got 0"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"mlp_ratio": -1.0}, "mlp_ratio: expected a finite number > 0, got -1"),
    ):
        with pytest.raises(ValueError, match=match):
            DiT(**{**SIZES["narrow"], **changes})
    net = DiT(**SIZES["narrow"])
    z, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"z: expected shape \(B, 4, 8, 8\)"):
        net(z[:, :3], t, t, y)
    with pytest.raises(ValueError, match=r"r: expected shape \(2,\)"):
        net(z, t[:, None], t, y)
    with pytest.raises(TypeError, match="y: expected integer labels"):
        net(z, t, t, y.float())


def test_triton_kernels_under_autocast():
    """The streams, packed gradients and casts of a training step, in float16: as exact as plain PyTorch's autocast."""
    pytest.importorskip("triton", minversion="3.4")
    size = SIZES["narrow"] | {"hidden_size": 48, "num_heads": 2}
    wide, plain = randomized(size)
    with torch.no_grad():
        for both in zip(wide.parameters(), plain.parameters(), strict=True):
            for p in both:
                p *= 0.5  # within float16
    net = DiT(**size)
    net.load_state_dict(wide.state_dict())
    z, r, t, y, dz = inputs(size)
    zeros, ones = torch.zeros_like(t), torch.ones_like(t)
    ref, ref_dot = torch.func.jvp(lambda *a: plain(*a, y), (z, r, t), (dz, zeros, ones))
    plain(z, r, t, y).square().mean().backward()
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    low = [a.float() for a in (z, r, t, dz, zeros, ones)]
    errors = {}
    for backend in ("reference", "triton"):
        net.zero_grad()
        with use_backend(backend), torch.autocast("cpu", dtype=torch.float16):
            u, du = jvp(net, low[:3], low[3:], rows=2, y=y)
        u.float().square().mean().backward()
        found = {"u": relative_error(u, ref), "du": relative_error(du, ref_dot[:2])}
        for name, p in net.named_parameters():
            if p.requires_grad:
                assert p.grad.dtype == torch.float32
                found[name] = relative_error(p.grad, wanted[name])
        errors[backend] = found
    for name, error in errors["triton"].items():
        assert error <= 1.5 * errors["reference"][name] + 1e-3, name


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_hooks_and_replacements_are_called(backend):
    """Layers are read by their weights only where nothing would be passed over; who watches a block sees tensors."""
    if backend == "triton":
        pytest.importorskip("triton", minversion="3.4")
    size = SIZES["narrow"] | {"hidden_size": 48, "num_heads": 2}
    net = randomized(size)[0].float()
    args = [a.float() for a in inputs(size)[:3]] + [inputs(size)[3]]
    block = net.blocks[0]
    with use_backend(backend), torch.no_grad():
        plain = net(*args)
        for module in (block.attn.qkv, block.attn.proj, block.attn, block.mlp, block, net.final_layer):
            seen = []
            handle = module.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o) or o * 1.5)
            assert relative_error(net(*args), plain) > 1e-3
            handle.remove()
            assert isinstance(seen[0], torch.Tensor)
            assert relative_error(net(*args), plain) <= 1e-6
        forward = block.attn.qkv.forward
        block.attn.qkv.forward = lambda x: forward(x) * 1.5
        assert relative_error(net(*args), plain) > 1e-3
        del block.attn.qkv.forward
        block.mlp, block.attn = torch.nn.Identity(), torch.nn.Sequential(torch.nn.Linear(48, 48))
        assert relative_error(net(*args), plain) > 1e-3
