import math

import numpy as np
import pytest
import torch
from imf_peers import PlainIMFDiT
from memory import saved_bytes
from peers import math_attention
from torch.utils.checkpoint import checkpoint

from meanflow import sample
from meanflow.models import IMFDiT, IMFDiT_B_2, IMFDiT_XL_2, create_model
from meanflow.registry import find
from mfkernels import Dual, jvp
from mfkernels.testing import relative_error

TOKENS = {"num_class_tokens": 2, "num_time_tokens": 3, "num_cfg_tokens": 1, "num_interval_tokens": 2}
SIZES = {
    "narrow": {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 24,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 5,
        "aux_head_depth": 1,
        **TOKENS,
    },
    "heads_alone": {  # SwiGLU width 50: not a multiple of 8
        "input_size": 6,
        "patch_size": 3,
        "in_channels": 1,
        "hidden_size": 19 * 2,
        "depth": 1,
        "num_heads": 1,
        "num_classes": 2,
        "aux_head_depth": 1,
        **TOKENS,
    },
    "no_head_blocks": {
        "input_size": 4,
        "patch_size": 4,
        "in_channels": 3,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 1,
        "aux_head_depth": 0,
        **TOKENS,
    },
}


def randomized(size, **more):
    net = IMFDiT(**size, **more).double()
    for name, p in net.named_parameters():  # zero-initialised branches would hide everything
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name or "_scale" in name else 0.0, std=0.3)
    return net


def plain_of(net, size):
    plain = PlainIMFDiT(**size).double()
    plain.load_state_dict(net.state_dict())
    plain.attend = math_attention
    return plain


def inputs(size, B=4):
    side, C = size["input_size"], size["in_channels"]
    z, dz = torch.randn(2, B, C, side, side, dtype=torch.float64)
    t = torch.rand(B, dtype=torch.float64)
    y = torch.arange(B) % (size["num_classes"] + 1)
    omega, t_min, t_max = torch.rand(3, B, dtype=torch.float64)
    return z, t * torch.rand(B, dtype=torch.float64), t, y, {"omega": 1 + 7 * omega, "t_min": t_min, "t_max": t_max}, dz


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_output_derivative_and_gradients_against_an_independent_network(size, rows):
    net = randomized(size)
    plain = plain_of(net, size)
    z, r, t, y, guidance, dz = inputs(size)
    dr, dt = torch.randn(2, 4, dtype=torch.float64)
    (u, v), (du, dv) = jvp(net, (z, r, t), (dz, dr, dt), rows=rows, y=y, **guidance)
    w = (guidance["omega"], guidance["t_min"], guidance["t_max"])
    (u_ref, v_ref), (du_ref, _) = torch.func.jvp(lambda z, r, t: plain(z, t - r, *w, y), (z, r, t), (dz, dr, dt))
    # measured: 8.8e-16, 1.7e-15 and 3.1e-15
    assert relative_error(u, u_ref) <= 2e-15
    assert relative_error(v, v_ref) <= 2e-15
    assert dv is None
    assert du.shape[0] == rows
    assert not du.requires_grad
    if rows:
        assert relative_error(du, du_ref[:rows]) <= 4e-15
    u_plain, v_plain = net(z, r, t, y, **guidance)
    assert torch.equal(u_plain, u)  # the dual pass and the plain pass are the same network
    assert torch.equal(v_plain, v)
    cotangents = torch.randn_like(u), torch.randn_like(v)
    torch.autograd.backward((u, v), cotangents)
    torch.autograd.backward(plain(z, t - r, *w, y), cotangents)
    theirs = dict(plain.named_parameters())
    for name, p in net.named_parameters():
        assert relative_error(p.grad, theirs[name].grad) <= 7e-15, name


def test_a_wrong_tangent_is_seen():
    size = SIZES["narrow"]
    net = randomized(size)
    plain = plain_of(net, size)
    z, r, t, y, guidance, dz = inputs(size)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    w = (guidance["omega"], guidance["t_min"], guidance["t_max"])
    _, (du_ref, _) = torch.func.jvp(lambda z, r, t: plain(z, t - r, *w, y), (z, r, t), (dz, zero, one))
    for dr, dt in ((zero, zero), (one, zero), (one, one)):
        _, (du, _) = jvp(net, (z, r, t), (dz, dr, dt), y=y, **guidance)
        assert relative_error(du, du_ref) > 1e-2


def test_each_head_alone():
    size = SIZES["narrow"]
    net = randomized(size)
    z, r, t, y, guidance, dz = inputs(size)
    u, v = net(z, r, t, y, **guidance)
    only_u, no_v = net(z, r, t, y, **guidance, heads="u")
    no_u, only_v = net(z, r, t, y, **guidance, heads="v")
    assert no_u is None
    assert no_v is None
    assert torch.equal(only_u, u)
    assert torch.equal(only_v, v)
    (_, v), tangents = jvp(net, (z, r, t), (dz, None, None), y=y, **guidance, heads="v")
    assert torch.equal(v, only_v)
    assert tangents == (None, None)


def test_a_network_for_sampling_has_no_v_head():
    size = SIZES["narrow"]
    net = randomized(size)
    sampler = IMFDiT(**size, v_head=False).double()
    assert not [name for name in sampler.state_dict() if name.startswith("v_")]
    kept = {name: a for name, a in net.state_dict().items() if not name.startswith(("v_heads", "v_final"))}
    sampler.load_state_dict(kept)
    z, r, t, y, guidance, _ = inputs(size)
    u, v = sampler(z, r, t, y, **guidance)
    assert v is None
    assert torch.equal(u, net(z, r, t, y, **guidance)[0])
    with pytest.raises(ValueError, match="heads: the network was built without a v head"):
        sampler(z, r, t, y, heads="v")
    assert torch.equal(sample(sampler, z, y, omega=3.0), sample(net, z, y, omega=3.0))


def test_conditions_as_numbers():
    size = SIZES["narrow"]
    net = randomized(size)
    z, r, t, y, _, _ = inputs(size)
    full = {"omega": torch.full_like(t, 3.0), "t_min": torch.full_like(t, 0.2), "t_max": torch.full_like(t, 0.7)}
    u, v = net(z, r, t, y, **full)
    for way in (float, torch.tensor):
        u2, v2 = net(z, r, t, y, **{name: way(a[0].item()) for name, a in full.items()})
        torch.testing.assert_close(u2, u, rtol=1e-6, atol=1e-6)  # torch.tensor rounds to float32
        torch.testing.assert_close(v2, v, rtol=1e-6, atol=1e-6)
    no_guidance = net(z, r, t, y)
    assert torch.equal(no_guidance[0], net(z, r, t, y, omega=1.0, t_min=0.0, t_max=1.0)[0])
    assert relative_error(no_guidance[0], u) > 1e-2


def test_dual_step_keeps_what_the_plain_step_keeps():
    size = SIZES["narrow"]
    net = randomized(size)
    z, r, t, y, guidance, dz = inputs(size)

    plain = saved_bytes(lambda: net(z, r, t, y, **guidance))
    for rows in (1, 4):
        duals = Dual(z, dz[:rows]), Dual(r), Dual(t, torch.ones(rows).double())
        dual = saved_bytes(lambda duals=duals: net(*duals, y, **guidance))
        assert dual == plain


def test_dual_pass_compiles_as_one_graph():
    size = SIZES["narrow"]
    net = randomized(size)
    z, r, t, y, guidance, dz = inputs(size)

    def derivative(z, r, t, dz, y, guidance):
        tangents = (dz, torch.zeros_like(r), torch.ones_like(t))
        return jvp(net, (z, r, t), tangents, rows=2, y=y, **guidance)

    (u, v), (du, _) = torch.compile(derivative, fullgraph=True, backend="aot_eager")(z, r, t, dz, y, guidance)
    (u_eager, v_eager), (du_eager, _) = derivative(z, r, t, dz, y, guidance)
    for got, ref in ((u, u_eager), (v, v_eager), (du, du_eager)):
        assert relative_error(got, ref) <= 1e-15
    (u.square().sum() + v.square().sum()).backward()
    compiled = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    (u_eager.square().sum() + v_eager.square().sum()).backward()
    for g, p in zip(compiled, net.parameters(), strict=True):
        assert relative_error(g, p.grad) <= 1e-14


def test_dual_pass_under_activation_checkpointing():
    size = SIZES["narrow"]
    net = randomized(size)
    z, r, t, y, guidance, dz = inputs(size)

    def step():
        net.zero_grad()
        (u, v), (du, _) = jvp(net, (z, r, t), (dz, None, torch.ones_like(t)), rows=2, y=y, **guidance)
        (u.square().sum() + v.square().sum()).backward()
        return u, du, [p.grad.clone() for p in net.parameters()]

    u, du, grads = step()
    for blocks in (net.shared_blocks, net.u_heads, net.v_heads):
        for block in blocks:
            inner = block.forward
            block.forward = lambda *a, inner=inner: checkpoint(inner, *a, use_reentrant=False)
    u2, du2, grads2 = step()
    assert torch.equal(u, u2)
    assert torch.equal(du, du2)
    for g, g2 in zip(grads, grads2, strict=True):
        assert torch.equal(g, g2)


def test_state_dict_names_are_the_authors():
    names = set(IMFDiT(**SIZES["narrow"]).state_dict())
    block = {f"attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "out_proj", "q_norm", "k_norm")}
    block |= {"norm1.weight", "norm2.weight", "mlp.w1.weight", "mlp.w2.weight", "mlp.w3.weight"}
    block |= {"attn_scale", "mlp_scale"}
    blocks = ("shared_blocks.0", "shared_blocks.1", "u_heads.0", "v_heads.0")
    kinds = ("weight", "bias")
    embedders = ("h_embedder", "omega_embedder", "cfg_t_start_embedder", "cfg_t_end_embedder")
    wanted = {f"{b}.{name}" for b in blocks for name in block}
    wanted |= {f"{e}.mlp.{i}.{kind}" for e in embedders for i in (0, 2) for kind in kinds}
    wanted |= {
        f"{head}_final_layer.{name}" for head in "uv" for name in ("norm.weight", "linear.weight", "linear.bias")
    }
    wanted |= {f"{name}_tokens" for name in ("class", "omega", "t_min", "t_max", "time")}
    wanted |= {"x_embedder.proj.weight", "x_embedder.proj.bias", "y_embedder.embedding_table.weight"}
    assert names == wanted


def test_initialisation():
    net = IMFDiT(input_size=8, hidden_size=256, depth=2, num_heads=4, aux_head_depth=1, num_classes=500)
    z, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    u, v = net(z, t, t, torch.tensor([0, 500]))
    assert torch.count_nonzero(u) == torch.count_nonzero(v) == 0
    block = net.shared_blocks[0]
    assert torch.count_nonzero(block.attn_scale) == torch.count_nonzero(block.mlp_scale) == 0
    # standard deviations, to a twentieth
    for weight, std in (
        (block.attn.q_proj.weight, 0.32 / 16),
        (block.mlp.w1.weight, 0.32 / 16),
        (block.mlp.w2.weight, 0.32 / math.sqrt(682)),
        (net.h_embedder.mlp[0].weight, 1 / 16),
        (net.omega_embedder.mlp[2].weight, 1 / 16),
        (net.y_embedder.embedding_table.weight, 1 / 16),
        (net.class_tokens, 1 / 16),
        (net.x_embedder.proj.weight, math.sqrt(2 / (16 + 256))),
    ):
        assert abs(weight.std().item() / std - 1) < 0.05
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert torch.count_nonzero(p) == 0, name
        elif "norm" in name:
            assert bool((p == 1).all()), name


def test_sizes_by_name():
    # blocks to u times (4 D² + 3 D·int(8 D / 3)), in millions
    blocks = {"B": 84.9, "M": 169.9, "L": 402.6, "XL": 603.9}
    with torch.device("meta"):
        for size, millions in blocks.items():
            net = find("models", f"iMF-DiT-{size}/2")(v_head=False)
            linears = [
                m for b in (*net.shared_blocks, *net.u_heads) for m in b.modules() if isinstance(m, torch.nn.Linear)
            ]
            assert abs(sum(m.weight.numel() for m in linears) / 1e6 - millions) < 0.1, size
        assert IMFDiT_B_2().config["aux_head_depth"] == 8
        assert len(IMFDiT_XL_2().shared_blocks) == 40
        assert create_model("iMF-DiT-B/2", input_size=16, depth=9).config["depth"] == 9
        assert create_model("iMF-DiT", **SIZES["narrow"]).config["hidden_size"] == 24
        net = IMFDiT_B_2()
        assert net.num_prefix_tokens + (32 // 2) ** 2 == 276


def test_bad_arguments():
    size = SIZES["narrow"]
    for changes, match in (
        ({"input_size": 7}, "input_size: expected a multiple of patch_size = 2"),
        ({"num_heads": 5}, "num_heads: expected a divisor of hidden_size = 24"),
        ({"num_heads": 8}, "num_heads: expected a divisor of hidden_size = 24 that leaves heads of even width"),
        ({"aux_head_depth": 4}, r"aux_head_depth: expected a number in \[0, 3\]"),
        ({"num_time_tokens": 0}, "num_time_tokens: expected at least 1"),
        ({"num_classes": 0}, "num_classes: expected at least 1"),
        ({"hidden_size": 0}, "hidden_size: expected at least 1, got 0"),
        ({"in_channels": 0}, "in_channels: expected at least 1, got 0"),
        ({"num_heads": 0}, "num_heads: expected at least 1, got 0"),
        ({"patch_size": 0}, "patch_size: expected at least 1, got 0"),
        ({"depth": -1, "aux_head_depth": 0}, "depth: expected at least 0, got -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio: expected a finite number > 0, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            IMFDiT(**{**size, **changes})
    net = IMFDiT(**size)
    z, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"z: expected shape \(B, 4, 8, 8\)"):
        net(z[:, :3], t, t, y)
    with pytest.raises(TypeError, match="y: expected integer labels"):
        net(z, t, t, y.float())
    with pytest.raises(ValueError, match=r"omega: expected a number or shape \(2,\)"):
        net(z, t, t, y, omega=torch.ones(3))
    with pytest.raises(ValueError, match="heads: expected 'uv', 'u' or 'v', got 'w'"):
        net(z, t, t, y, heads="w")


def test_guidance_that_is_out_of_range():
    """Numbers are checked; tensors are not read, so that nothing waits for the GPU."""
    size, nan = SIZES["narrow"], float("nan")
    net = IMFDiT(**size)
    z, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    for guidance, error, match in (
        ({"omega": 0.5}, ValueError, "omega: expected a finite number >= 1, got 0.5"),
        ({"omega": nan}, ValueError, "omega: expected a finite number >= 1, got nan"),
        ({"omega": "2"}, TypeError, "omega: expected a number or a tensor, got str"),
        ({"t_min": None}, TypeError, "t_min: expected a number or a tensor, got NoneType"),
        ({"t_min": 0.7, "t_max": 0.2}, ValueError, "expected 0 <= t_min <= t_max <= 1, got 0.7 and 0.2"),
        ({"t_max": 1.5}, ValueError, "t_min, t_max: expected 0 <= t_min <= t_max <= 1, got 0.0 and 1.5"),
        ({"t_min": nan, "t_max": torch.ones(2)}, ValueError, "t_min, t_max: expected 0 <= t_min <= t_max <= 1"),
    ):
        for call in (lambda g: net(z, t, t, y, **g), lambda g: sample(net, z, y, **g)):
            with pytest.raises(error, match=match):
                call(guidance)
    net(z, t, t, y, omega=2, t_min=np.float32(0.25), t_max=torch.tensor(0.5))
    with torch.no_grad():
        compiled = torch.compile(lambda z, y: sample(net, z, y, omega=2.0, t_min=0.25), fullgraph=True, backend="eager")
        assert torch.equal(compiled(z, y), sample(net, z, y, omega=2.0, t_min=0.25))
