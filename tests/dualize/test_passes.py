"""What a dual pass promises beside its numbers: refusals by name and line, randomness, hooks, memory, wrappers."""

import copy
import gc
import pickle
import re
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dualized import Wrapped, assert_same_jvp, duals, forward_mode, mha_operations
from foreign import PlainMLP, SiT, network
from minimum import needs_compile_of_a_pass
from torch import nn
from torch.utils.checkpoint import checkpoint

import mfkernels
from mfkernels import Dual, dualize, jvp
from mfkernels.testing import relative_error


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)

    def forward(self, x):
        return self.norm(x)  # the user's line


@torch.library.custom_op("dualize_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


REFUSALS = {
    "mixes batch rows (batch statistics": Normed(),
    "mean: mixes batch rows": Wrapped(lambda x: x - x.mean()),
    "sum: mixes batch rows": Wrapped(lambda x: x - x.sum(dim=())),
    "var: mixes batch rows": Wrapped(lambda x: x / x.var(False)),
    "softmax: mixes batch rows": Wrapped(lambda x: x.softmax(0)),
    "flip: mixes batch rows": Wrapped(lambda x: x.flip(0)),
    "roll: mixes batch rows": Wrapped(lambda x: x.roll(1, 0)),
    "cumsum: mixes batch rows": Wrapped(lambda x: x.cumsum(0)),
    "matmul: mixes batch rows": Wrapped(lambda x: x @ (x.mT @ x)),
    "einsum: mixes batch rows": Wrapped(lambda x: torch.einsum("bd,be->de", x, x)),
    "layer_norm: mixes batch rows": Wrapped(lambda x: F.layer_norm(x, x.shape)),
    "item: a number taken out": Wrapped(lambda x: x * x[0, 0].item()),
    "numpy: a number taken out": Wrapped(lambda x: x * torch.tensor(x.numpy())),
    "has no forward-mode (JVP) rule": Wrapped(lambda x: torch.cdist(x.view(-1, 2, 2), x.view(-1, 2, 2)).flatten(1)),
    "torch.func.grad and its kin": Wrapped(lambda x: torch.func.grad(lambda y: y.square().sum())(x)),
    "differentiates inside its own forward": Wrapped(lambda x: energy_gradient(x)),
    "twice.default: has no forward-mode": Wrapped(lambda x: twice(x)),
    "out= is not supported": Wrapped(lambda x: torch.add(x, 1, out=torch.empty_like(x))),
    "writes into conj(), which is a copy here": Wrapped(lambda x: write_after_conj(x)),
    "samples in dimension 0": Wrapped(lambda x: x.T),
}


def write_after_conj(x):
    z = torch.complex(x, x)
    y = z.conj()
    z.mul_(2)
    return y.real


def energy_gradient(x):
    y = x * torch.ones(4, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(y.square().sum(1), y, torch.ones(6, dtype=torch.float64))[0]


@pytest.mark.parametrize("message", REFUSALS)
def test_what_has_no_derivative_per_sample_is_refused_with_the_users_line(message):
    x, *_ = duals((6, 4))
    dual = dualize(REFUSALS[message].train())
    with pytest.raises((NotImplementedError, ValueError), match=re.escape(message)) as error:
        dual(x)
    if isinstance(error.value, NotImplementedError):
        assert __file__ in str(error.value)
        assert "`" in str(error.value)


def test_a_refusal_names_the_submodule_and_quotes_its_line():
    with pytest.raises(NotImplementedError, match=r"in BatchNorm1d, .*: `return self.norm\(x\)  # the user's line`"):
        dualize(Normed())(*duals((6, 4)))
    assert torch.equal(Normed().norm.running_mean, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize(
    "layer", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, lambda p: nn.Dropout(p, inplace=True), lambda p: nn.RReLU()]
)
def test_a_random_layer_draws_once_for_value_and_tangent(layer, p):
    x, v = torch.randn(6, 5, 4).double(), torch.randn(6, 5, 4).double()
    net = nn.Sequential(nn.Linear(4, 4), layer(p), nn.Linear(4, 4)).double().train()
    # with one seed PyTorch's forward mode draws the same numbers as the plain module
    assert_same_jvp(net, (x,), (v,))


def test_dropout_inside_attention_draws_once():
    x, v = torch.randn(4, 2, 5, 8).double(), torch.randn(4, 2, 5, 8).double()
    net = Wrapped(lambda x: F.scaled_dot_product_attention(x, x.sin(), x, dropout_p=0.4) + torch.rand(5, 8).double())
    assert_same_jvp(net, (x,), (v,))


def test_the_encoder_layer_in_training_mode():
    net, primals = network("nn.TransformerEncoderLayer")
    assert_same_jvp(net.train(), primals, tuple(torch.randn_like(p) for p in primals))


def test_one_sample_and_scalar_times():
    net, (z, t) = network("SiT-style")
    primals = (z[:1], t[:1])
    assert_same_jvp(net, primals, tuple(torch.randn_like(p) for p in primals))


def test_duals_in_keywords_and_containers_and_outputs_of_every_kind():
    class Net(nn.Module):
        def forward(self, batch, *, scale=None):
            z, t = batch["z"], batch["times"][0]
            return {"u": z * t[:, None] * scale, "flag": 3, "t": t.detach(), "none": None}, [z > 0, z]

    z, t = duals((5, 3), (5,))
    out, (mask, same) = dualize(Net())({"z": z, "times": [t]}, scale=2.0)
    assert isinstance(out["u"], Dual)
    assert out["flag"] == 3
    assert out["none"] is None
    assert isinstance(out["t"], torch.Tensor)
    assert mask.dtype == torch.bool
    assert torch.equal(same.tangent, z.tangent)
    expected = 2 * (z.tangent * t.primal[:2, None] + z.primal[:2] * t.tangent[:, None])
    torch.testing.assert_close(out["u"].tangent, expected)


def test_tangents_of_different_lengths():
    net, (z, t) = network("SiT-style")
    z_dot, t_dot = torch.randn_like(z), torch.ones_like(t)
    out = dualize(net)(Dual(z, z_dot[:1]), Dual(t, t_dot[:3]))
    _, expected = forward_mode(net, (z, t), (torch.cat([z_dot[:1], torch.zeros_like(z[1:])]), t_dot), 3)
    torch.testing.assert_close(out.tangent, expected, rtol=1e-12, atol=1e-13)


def test_nothing_of_the_tangent_outlives_the_pass():
    net, (z, t) = network("SiT-style")
    z_dot = torch.randn_like(z)
    gone = weakref.ref(z_dot)
    gc.collect()  # what earlier tests' exceptions hold
    gc.disable()
    # of earlier tests that compile: see "After a compiled step" in dualize/README.md
    before = {id(x) for x in gc.get_objects() if type(x).__name__ == "DualTensor"}
    try:
        out = dualize(net)(Dual(z, z_dot), Dual(t, torch.ones_like(t)))
        assert not [x for x in gc.get_objects() if type(x).__name__ == "DualTensor" and id(x) not in before]
        u = out.primal
        del z_dot, out
        assert gone() is None
    finally:
        gc.enable()
    u.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_stock_checkpoints_recompute_the_primal_alone(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.calls, self.on = net, [], False

        def block(self, block, x, c):
            self.calls.append(type(x).__name__)
            return block(x, c)

        def forward(self, z, t):
            net = self.net
            x, c = net.x_embedder(z).flatten(2).mT + net.pos_embed, net.t_embedder(t)
            for block in net.blocks:
                x = checkpoint(self.block, block, x, c, use_reentrant=reentrant) if self.on else block(x, c)
            return net.unpatchify(net.linear(net.norm(x)))

    net, primals = network("SiT-style")
    wrapped = Checkpointed(net)
    tangents = tuple(torch.randn_like(p) for p in primals)
    expected = jvp(dualize(wrapped), primals, tangents, rows=2)
    wrapped.on = True
    out, out_dot = jvp(dualize(wrapped), primals, tangents, rows=2)
    assert torch.equal(out, expected[0])
    assert torch.equal(out_dot, expected[1])
    grads = []
    for run in (lambda: wrapped(*primals), lambda: jvp(dualize(wrapped), primals, tangents, rows=2)[0]):
        net.zero_grad()
        wrapped.calls.clear()
        run().square().sum().backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    assert wrapped.calls == ["DualTensor"] * 2 + ["Tensor"] * 2
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_our_checkpoint_of_a_block_and_of_the_whole():
    net, primals = network("SiT-style")
    tangents = tuple(torch.randn_like(p) for p in primals)
    expected = jvp(dualize(net), primals, tangents, rows=2)
    for part in (net.blocks[0], net.blocks[1]):
        mfkernels.checkpoint_module(part)
    out, out_dot = jvp(mfkernels.checkpoint_module(dualize(net)), primals, tangents, rows=2)
    assert torch.equal(out, expected[0])
    assert torch.equal(out_dot, expected[1])
    out.sum().backward()


def test_hooks_see_tensors_and_may_change_them():
    net, primals = network("SiT-style")
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape) or (args[0] * 2, *args[1:]))
    net.register_forward_hook(lambda m, args, out: out + args[1][:, None, None, None])
    net.blocks[1].register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    assert_same_jvp(net, primals, tuple(torch.randn_like(p) for p in primals))
    dualize(net)(*(Dual(p, torch.randn_like(p)) for p in primals)).primal.sum().backward()
    assert seen[-1] == "backward"


def test_parts_that_were_compiled_run_eagerly_in_the_pass():
    net, primals = network("LightningDiT-style")
    compiled = copy.deepcopy(net)
    for block in compiled.blocks:
        block.norm1 = torch.compile(block.norm1, backend="aot_eager")
    dual = dualize(compiled)
    tangents = tuple(torch.randn_like(p) for p in primals)
    expected = jvp(dualize(net), primals, tangents, rows=2)
    out = jvp(dual, primals, tangents, rows=2)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    net, primals = network("SiT-style", torch.float32)
    tangents = tuple(torch.randn_like(p) for p in primals)
    dual = dualize(net)
    exact = jvp(dual, primals, tangents, rows=2)
    with torch.autocast("cpu", dtype):
        value = net(*primals)
        out, out_dot = jvp(dual, primals, tangents, rows=2)
    assert torch.equal(out, value)
    assert out_dot.dtype == out.dtype
    assert relative_error(out_dot, exact[1]) < {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    out.float().sum().backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if p.requires_grad)


def test_the_dualized_module_is_the_module():
    net = SiT()
    dual = dualize(net)
    assert isinstance(dual, SiT)
    assert type(dual).__name__ == "SiT"
    assert mfkernels.is_dual_aware(dual)
    assert not mfkernels.is_dual_aware(net)
    assert dual.state_dict().keys() == net.state_dict().keys()
    assert all(a is b for a, b in zip(dual.parameters(), net.parameters(), strict=True))
    dual.double()
    assert net.linear.weight.dtype == torch.float64
    dual.load_state_dict({n: torch.zeros_like(p) for n, p in net.state_dict().items()})
    assert not net.linear.weight.any()
    x = torch.randn(2, 3, 8, 8).double(), torch.rand(2).double()
    assert torch.equal(dual(*x), net(*x))
    assert dualize(dual) is dual


def test_a_parametrized_module():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()).double()
    assert_same_jvp(net, (torch.randn(5, 4).double(),), (torch.randn(5, 4).double(),))
    assert_same_jvp(net[0], (torch.randn(5, 4).double(),), (torch.randn(5, 4).double(),))


def test_this_packages_layers_in_somebodys_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = mfkernels.Attention(8, 2), mfkernels.Mlp(8, 16)

        def forward(self, x, c):
            x = mfkernels.gated_residual(x, self.attention(mfkernels.ada_layer_norm(x, c, c)), c)
            return self.mlp(x)

    primals = torch.randn(5, 4, 8).double(), torch.randn(5, 8).double()
    assert_same_jvp(Net().double(), primals, tuple(torch.randn_like(p) for p in primals))


def test_copies_and_pickles_are_dual_aware():
    net, primals = network("SiT-style")
    tangents = tuple(torch.randn_like(p) for p in primals)
    dual = dualize(net)
    for again in (copy.deepcopy(dual), pickle.loads(pickle.dumps(dual))):
        assert mfkernels.is_dual_aware(again)
        assert again.linear.weight is not net.linear.weight
        assert torch.equal(jvp(again, primals, tangents)[1], jvp(dual, primals, tangents)[1])


def test_a_report_of_what_has_no_rule_of_its_own():
    net = Wrapped(lambda x: torch.special.i0(x.sin()) + x[torch.arange(6), :].cosh())
    dual = dualize(net, report=True)
    dual(*duals((6, 4)))
    report = dual.dual_report
    assert set(report.jvp) == {"i0", "cosh"}
    assert report.jvp["i0"].calls == 1
    assert set(report.zero_filled) == {"index", "add"}  # samples picked by a tensor, then added to samples in a row
    assert "sin" in report.rules
    assert 0 < report.jvp_share < 1
    assert "i0, torch.func.jvp" in str(report)
    report.clear()
    assert not report.jvp


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        dualize(lambda x: x)
    with pytest.raises(ValueError, match="got it wrapped in OptimizedModule; dualize it first"):
        dualize(torch.compile(PlainMLP()))
    with pytest.raises(ValueError, match="same batch in every Dual"):
        dualize(Wrapped(lambda x, y: x))(*duals((5, 2)), *duals((4, 2)))
    with pytest.raises(ValueError, match="tangent: expected"):
        dualize(Wrapped(lambda x: x))(Dual(torch.zeros(3, 2), torch.zeros(2, 3)))
    x = torch.zeros(3, 2)
    with pytest.raises(NotImplementedError, match="cannot be mixed"):
        torch.func.jvp(lambda x: dualize(Wrapped(torch.sin))(Dual(x, torch.ones(3, 2))).primal, (x,), (x,))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_that_hides_every_key_gives_zero_as_pytorchs_attention_does(kind):
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    if kind == "float":
        mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    x, x_dot = torch.randn(2, 6, 1, 4, 8, dtype=torch.float64)
    out, out_dot = jvp(dualize(Wrapped(lambda x: F.scaled_dot_product_attention(x, x, x, mask))), (x,), (x_dot,))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, expected = torch.func.jvp(lambda x: F.scaled_dot_product_attention(x, x, x, mask), (x,), (x_dot,))
    assert out[:, :, 1].eq(0).all()
    torch.testing.assert_close(out_dot[:, :, 1], torch.zeros_like(out_dot[:, :, 1]))
    keep = [0, 2, 3]
    torch.testing.assert_close(out_dot[:, :, keep], expected[:, :, keep], rtol=1e-13, atol=1e-14)  # 4e-16 measured


def test_attributes_of_the_users_keep_their_names():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.places = nn.ModuleList([nn.Linear(4, 4).double()])

        def plain_call(self, x):
            return self.places[0](x)

        def forward(self, x):
            return self.plain_call(x)

    (x,) = duals((6, 4))
    net = Places()
    torch.testing.assert_close(dualize(net)(x).tangent, x.tangent @ net.places[0].weight.mT)


def test_hooks_on_what_is_saved_see_primals():
    net, primals = network("SiT-style")
    seen = []
    with (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(type(x)) or x.clone(), lambda x: x),
    ):
        out, _ = jvp(dualize(net), primals, tuple(torch.randn_like(p) for p in primals))
    out.sum().backward()
    assert set(seen) <= {torch.Tensor, nn.Parameter}
    assert len(seen) > 20


def test_another_thread_sees_no_difference():
    """Nothing of PyTorch is replaced while a pass runs."""
    go, done = threading.Event(), threading.Event()

    def look():
        go.wait(10)
        x = torch.randn(3, 4, requires_grad=True)
        seen["apply"] = vars(torch.autograd.Function).get("apply")
        seen["checkpoint"] = dict(vars(torch.utils.checkpoint))
        seen["grad"] = torch.autograd.grad(checkpoint(torch.exp, x, use_reentrant=False).sum(), x)[0] - x.exp()
        done.set()

    def forward(x):
        go.set()
        assert done.wait(10)
        return x.sin()

    seen = {}
    before = vars(torch.autograd.Function).get("apply"), dict(vars(torch.utils.checkpoint))
    thread = threading.Thread(target=look)
    thread.start()
    dualize(Wrapped(forward))(*duals((6, 4)))
    thread.join()
    assert (seen["apply"], seen["checkpoint"]) == before
    assert not seen["grad"].any()


def test_a_second_derivative_is_refused():
    inner = dualize(Wrapped(torch.sin))
    net = Wrapped(lambda x: jvp(inner, (x,), (torch.ones(6, 4).double(),))[1])
    with pytest.raises(NotImplementedError, match="second derivative"):
        dualize(net)(*duals((6, 4)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_this_packages_fused_operations_serve_a_dualized_module():
    pytest.importorskip("triton", minversion="3.4")

    def forward(x, w):
        q, k, v = x.unflatten(-1, (3, 2, 16)).unbind(2)
        o = mfkernels.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)))
        return mfkernels.rms_norm(o.transpose(1, 2).flatten(2), w)

    x, v = torch.randn(2, 4, 5, 96)
    w = torch.rand(32, requires_grad=True)
    net = Wrapped(lambda x: forward(x, w))
    with mfkernels.use_backend("triton"):
        out, out_dot = jvp(dualize(net), (x,), (v,), rows=2)
        value = net(x)
    assert torch.equal(out, value)
    _, expected = torch.func.jvp(lambda x: forward(x, w.double()), (x.double(),), (v.double(),))
    assert relative_error(out_dot, expected[:2]) < 1e-6  # 3e-7 measured
    grads = [torch.autograd.grad(o.square().sum(), w)[0] for o in (out, value)]
    assert torch.equal(*grads)


def test_torchscript_keeps_the_tangent_when_it_has_optimised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        script = torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double())
    x, v = torch.randn(2, 6, 4).double()
    _, expected = torch.func.jvp(script, (x,), (v,))
    dual = dualize(Wrapped(lambda x: script(x) + x))
    for _ in range(4):
        torch.testing.assert_close(jvp(dual, (x,), (v,), rows=3)[1], expected[:3] + v[:3], rtol=1e-13, atol=1e-14)


def test_a_tensor_kept_from_an_earlier_pass_is_one_of_the_next():
    class Running(nn.Module):
        kept = None

        def forward(self, x):
            if self.kept is None:
                self.kept = x * 1
            else:
                self.kept.mul_(0.5).add_(x)
                self.kept[:, :1] = 3 * x[:, :1]
            return 2 * self.kept

    x, v = torch.randn(2, 6, 4).double()
    net = dualize(Running())
    for scale in (2, 2):
        _, out_dot = jvp(net, (x,), (v,), rows=3)
        first = scale if net.kept is None else out_dot[:, :1] / v[:3, :1]
        torch.testing.assert_close(out_dot[:, 1:], scale * v[:3, 1:])
    torch.testing.assert_close(first, torch.full_like(first, 6))
    assert type(copy.deepcopy(net).kept) is torch.Tensor
    assert torch.equal(torch.sin(net.kept), net.kept.sin())


def test_quotients_in_half_precision_do_not_overflow():
    x, v = torch.full((4, 2), 300.0).half(), torch.ones(4, 2).half()
    net = Wrapped(lambda x: 300 * torch.ones(4, 2).half() / x + 1 / x)
    _, out_dot = jvp(dualize(net), (x,), (v,))
    assert relative_error(out_dot, torch.full((4, 2), -301 / 300**2)) < 2e-3  # 7e-4 measured


def test_inference_mode():
    net, primals = network("nn.TransformerEncoderLayer")
    net.eval()
    tangents = tuple(torch.randn_like(p) for p in primals)
    expected = jvp(dualize(net), primals, tangents, rows=2)
    with torch.inference_mode(), mha_operations():
        out, out_dot = jvp(dualize(net), primals, tangents, rows=2)
        with pytest.raises(NotImplementedError, match="batch statistics"):
            dualize(Normed().train())(*duals((6, 4)))
    torch.testing.assert_close(out, expected[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(out_dot, expected[1], rtol=1e-13, atol=1e-14)


def test_what_all_threads_share_is_set_back_by_the_last_pass():
    compiled, runs = torch.compile(torch.sin, backend=lambda graph, _: runs.append(1) or graph), []
    torch._dynamo.reset()
    entered, leave, left = (threading.Event() for _ in range(3))

    def other():
        def forward(x):
            entered.set()
            assert leave.wait(20)
            return x.sin()

        dualize(Wrapped(forward))(*duals((6, 4)))
        left.set()

    thread = threading.Thread(target=other)

    def forward(x):
        thread.start()
        assert entered.wait(20)
        return x.sin()

    dualize(Wrapped(forward))(*duals((6, 4)))
    leave.set()
    assert left.wait(20)
    thread.join()
    compiled(torch.ones(3))
    assert runs
    assert torch._C._get_graph_executor_optimize()


@needs_compile_of_a_pass
def test_a_compiled_pass_of_what_has_lost_an_attribute():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.cache, self.flag = {"x": torch.ones(4)}, True

        def forward(self, x):
            return x.sin() * 2

    dual = dualize(Cached())
    dual.cache.clear()
    del dual.flag
    torch._dynamo.reset()
    x, v = torch.randn(2, 6, 4).double()
    _, out_dot = torch.compile(lambda x, v: jvp(dual, (x,), (v,)), backend="aot_eager", fullgraph=True)(x, v)
    torch.testing.assert_close(out_dot, 2 * v * x.cos(), rtol=1e-13, atol=1e-14)


@needs_compile_of_a_pass
def test_a_compiled_pass_follows_flags_and_numbers():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop, self.scale, self.kind = nn.Linear(4, 4).double(), nn.Dropout(0.5), 2, "sin"

        def forward(self, x):
            return self.drop(self.linear(getattr(x, self.kind)())) * self.scale

    net = Scaled()
    dual = dualize(net)
    torch._dynamo.reset()
    step = torch.compile(lambda x, v: jvp(dual, (x,), (v,), rows=2), backend="aot_eager", fullgraph=True)
    x, v = torch.randn(2, 6, 4).double()
    assert (step(x, v)[0] == 0).sum() > 2
    dual.eval()
    for scale, kind in ((2, "sin"), (3, "sin"), (4, "cos"), (4.5, "cos")):
        dual.scale, dual.kind = scale, kind
        for got, expected in zip(step(x, v), jvp(dual, (x,), (v,), rows=2), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dim", [1, 2])
def test_renorm(dim):
    x, x_dot = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    assert_same_jvp(Wrapped(lambda x: x.renorm(2, dim, 0.5)), (x,), (x_dot,))


def test_an_index_of_numpys():
    x, x_dot = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    assert_same_jvp(Wrapped(lambda x: x.transpose(0, 1)[np.int64(1)]), (x,), (x_dot,))


def test_masked_attention_in_half_precision_keeps_its_statistics_wide():
    q, k, v = 3 * torch.randn(3, 2, 4, 33, 16, dtype=torch.float64).bfloat16()
    dots = torch.randn(3, 2, 4, 33, 16, dtype=torch.float64).bfloat16()
    mask = torch.rand(33, 33) > 0.3
    mask[:, 0] = True

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask)

    _, out_dot = jvp(dualize(Wrapped(attend)), (q, k, v), tuple(dots))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, expected = torch.func.jvp(attend, (q.double(), k.double(), v.double()), tuple(dots.double()))
    assert out_dot.dtype == torch.bfloat16
    assert relative_error(out_dot, expected) <= 3.4e-3  # measured 1.7e-3, the result's own rounding
