import numpy as np
import pytest
import torch

from meanflow.convert import dit_from_flax, imf_dit_from_flax, load_dit
from meanflow.models import DiT, IMFDiT

SIZE = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 3,
}


def test_a_public_dit_checkpoint_loads_where_it_fits():
    """DiT has no r_embedder, and twice the output channels (learned sigma), mean first."""
    torch.manual_seed(1)
    theirs = {n: torch.randn_like(p) for n, p in DiT(**SIZE).state_dict().items() if not n.startswith("r_embedder")}
    p, C = 2, 4
    weight = torch.randn(p * p * 2 * C, 16)
    theirs["final_layer.linear.weight"], theirs["final_layer.linear.bias"] = weight, torch.randn(p * p * 2 * C)
    theirs["projectors.0.weight"] = torch.randn(3)  # of SiT with REPA
    net = DiT(**SIZE)
    report = load_dit(net, {"ema": {f"module.{n}": a for n, a in theirs.items()}})
    assert torch.equal(net.blocks[0].attn.qkv.weight, theirs["blocks.0.attn.qkv.weight"])
    kept = weight.view(p * p, 2 * C, 16)[:, :C].reshape(p * p * C, 16)
    assert torch.equal(net.final_layer.linear.weight, kept)
    assert report.missing == [f"r_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    assert report.left_over == ["projectors.0.weight"]
    assert not report.wrong_shape
    assert "missing, kept as initialised (4): r_embedder" in str(report)
    assert "left over, not used (1): projectors.0.weight" in str(report)
    assert "the embedding of t − r starts silent" in str(report)


def test_another_number_of_classes_is_reported():
    theirs = DiT(**{**SIZE, "num_classes": 9}).state_dict()
    report = load_dit(DiT(**SIZE), theirs)
    assert report.wrong_shape == ["y_embedder.embedding_table.weight (10, 16) instead of (4, 16)"]


def test_nothing_fits():
    with pytest.raises(ValueError, match="state: no tensor fits the model; it has names such as encoder"):
        load_dit(DiT(**SIZE), {"encoder.weight": torch.randn(2)})


def test_flax_names_and_layouts():
    kernel, conv = np.random.rand(3, 5).astype(np.float32), np.random.rand(2, 2, 4, 16).astype(np.float32)
    flat = {
        "params/net/x_embedder/proj/kernel": conv,
        "net/final_layer/linear/_flax_linear/kernel": kernel,
        "net/blocks/layers_3/attn/qkv/_flax_linear/bias": kernel[0],
        "net/h_embedder/mlp/layers_2/_flax_linear/kernel": kernel,
        "net/y_embedder/embedding_table/_flax_embedding/embedding": kernel,
    }
    state = dit_from_flax(flat)
    assert sorted(state) == [
        "blocks.3.attn.qkv.bias",
        "final_layer.linear.weight",
        "r_embedder.mlp.2.weight",
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
    ]
    assert np.array_equal(state["final_layer.linear.weight"].numpy(), kernel.T)
    assert np.array_equal(state["x_embedder.proj.weight"].numpy(), conv.transpose(3, 2, 0, 1))
    assert np.array_equal(state["y_embedder.embedding_table.weight"].numpy(), kernel)


def test_flax_mistakes():
    with pytest.raises(ValueError, match="opt_state/mu: not a weight of a MeanFlow DiT"):
        dit_from_flax({"opt_state/mu": np.zeros(3)})
    with pytest.raises(ValueError, match="flat: expected x_embedder/proj"):
        dit_from_flax({"net/final_layer/linear/_flax_linear/kernel": np.zeros((3, 4))})


def test_fixed_positions_may_be_left_out_of_a_state_dict():
    net = DiT(**SIZE)
    state = net.state_dict()
    positions = state.pop("pos_embed").clone()
    other = DiT(**SIZE)
    other.load_state_dict(state)
    assert torch.equal(other.pos_embed, positions)
    del state["blocks.0.attn.qkv.weight"]
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\.weight"):
        other.load_state_dict(state)


IMF_SIZE = {**SIZE, "depth": 2, "aux_head_depth": 1}


def test_the_improved_meanflow_authors_pytorch_weights_load_without_a_v_head():
    torch.manual_seed(1)
    net = IMFDiT(**IMF_SIZE)
    theirs = {}
    for name, a in net.state_dict().items():
        if name.startswith("v_"):
            continue
        for part in ("proj", "mlp.0", "mlp.2", "w1", "w2", "w3", "final_layer.linear"):
            if "x_embedder" not in name:
                name = name.replace(f"{part}.weight", f"{part}._flax_linear.weight")
                name = name.replace(f"{part}.bias", f"{part}._flax_linear.bias")
        name = name.replace("embedding_table.weight", "embedding_table._flax_embedding.weight")
        theirs[f"net.{name}"] = torch.randn_like(a)
    assert "net.shared_blocks.0.attn.q_proj._flax_linear.weight" in theirs
    theirs["net.feat_rope.freqs_cos"] = torch.randn(3)
    sampler = IMFDiT(**IMF_SIZE, v_head=False)
    report = load_dit(sampler, theirs)
    assert not report.missing
    assert not report.wrong_shape
    assert report.left_over == ["feat_rope.freqs_cos"]
    wanted = theirs["net.shared_blocks.0.attn.q_proj._flax_linear.weight"]
    assert torch.equal(sampler.shared_blocks[0].attn.q_proj.weight, wanted)
    report = load_dit(net, theirs)
    assert report.missing
    assert all(name.startswith("v_") for name in report.missing)


def test_flax_names_and_layouts_of_improved_meanflow():
    kernel, conv = np.random.rand(3, 5).astype(np.float32), np.random.rand(2, 2, 4, 16).astype(np.float32)
    flat = {
        "params/net/x_embedder/proj/kernel": conv,
        "net/u_final_layer/linear/_flax_linear/kernel": kernel,
        "net/u_final_layer/norm/kernel": kernel[0],
        "net/shared_blocks_11/attn/q_proj/_flax_linear/kernel": kernel,
        "net/u_heads_0/attn_scale": kernel[0],
        "net/time_tokens": kernel,
        "net/h_embedder/mlp/layers_2/_flax_linear/bias": kernel[0],
    }
    state = imf_dit_from_flax(flat)
    assert sorted(state) == [
        "h_embedder.mlp.2.bias",
        "shared_blocks.11.attn.q_proj.weight",
        "time_tokens",
        "u_final_layer.linear.weight",
        "u_final_layer.norm.weight",
        "u_heads.0.attn_scale",
        "x_embedder.proj.weight",
    ]
    assert np.array_equal(state["shared_blocks.11.attn.q_proj.weight"].numpy(), kernel.T)
    assert np.array_equal(state["time_tokens"].numpy(), kernel)
    assert np.array_equal(state["u_final_layer.norm.weight"].numpy(), kernel[0])
    with pytest.raises(ValueError, match="opt_state/mu: not a weight of an iMF-DiT"):
        imf_dit_from_flax({"opt_state/mu": np.zeros(3)})
    with pytest.raises(ValueError, match="flat: expected x_embedder/proj and u_final_layer/linear"):
        imf_dit_from_flax({"net/time_tokens": kernel})
