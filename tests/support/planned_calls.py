"""Run by test_plan.py in a process of its own: planned launches get what unplanned ones get.

Its driver launches nothing, and a plan keeps no tensor alive. Prints how many functions, kinds of calls and launches
were compared.
"""

import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import torch
from without_gpu import as_on_h100, blocks, stub_driver
from without_gpu import inputs as step_inputs

from mfkernels import launch
from mfkernels.ada_layer_norm import kernels as norm
from mfkernels.attention import backward_kernels, kernels
from mfkernels.gated_residual import kernels as residual
from mfkernels.layer_scale_residual import kernels as layer_scale
from mfkernels.mlp import kernels as gelu
from mfkernels.rms_norm import kernels as rms
from mfkernels.rotary import backward_kernels as rotary_backward
from mfkernels.rotary import kernels as rotary
from mfkernels.swiglu import kernels as swiglu
from mfkernels.timestep_embedding import kernels as embedding

B, B_t, N, D, H, d = 3, 2, 5, 24, 3, 8
LOW, WIDE = torch.bfloat16, torch.float32


def new(*shape, dtype=LOW):
    return torch.randn(shape).to(dtype)


def qkv(batch=B):
    return new(batch, N, 3, H, d)


def update():
    return norm.Update(new(B, N, D), new(B, 6 * D).chunk(6, dim=1)[2], new(D, dtype=WIDE))


def tangents():
    return norm.Tangents(new(B_t, N, D, dtype=WIDE), new(B_t, N, D), new(B_t, D), new(B_t, D), new(B_t, D))


def x():
    return new(B, N, D, dtype=WIDE)


def stats():
    return new(B, N, 2, dtype=WIDE)


def normed(base, dots, **options):
    options = {"eps": 1e-6, "x_dtype": WIDE, "h_dtype": LOW, **options}
    return lambda: ((x(), update(), base(), new(B, D), new(B, D), dots()), options)


def attended(dual):
    def call():
        dots = qkv(B_t).unbind(2) if dual else (None,) * 3
        return (*qkv().unbind(2), *dots), {"scale": 0.3, "causal": False, "precision": "ieee"}

    return call


def grads_of_attention():
    lse = new(B, H, N, dtype=WIDE)
    return (new(B, N, H, d), *qkv().unbind(2), new(B, N, H, d), lse), {
        "scale": 0.3,
        "causal": True,
        "precision": "ieee",
    }


def grads_of_packed(bias_dtype):
    return lambda: (
        (new(B, N, H, d), qkv(), new(B, N, H, d), new(B, H, N, dtype=WIDE)),
        {"scale": 0.3, "precision": "ieee", "bias_dtype": bias_dtype},
    )


def none():
    return None


def tables():
    return new(N, d // 2, dtype=WIDE), new(N, d // 2, dtype=WIDE)


def qk():
    return new(B, N, H, d), new(B, N, H, d)


CASES = [
    (norm.norm_forward, normed(none, norm.Tangents)),
    (norm.norm_forward, normed(update, tangents)),
    (norm.norm_forward, normed(none, tangents, defer=True)),
    (norm.norm_backward, lambda: ((new(B, N, D), None, x(), None, new(B, D), stats()), {})),
    (norm.norm_backward, lambda: ((new(B, N, D), x(), x(), update(), new(B, D), stats()), {"deferred": True})),
    (residual.gated_residual_forward, lambda: ((x(), new(B, N, D), new(B, D), *tangents()[:3]), {"dtype": WIDE})),
    (residual.gated_residual_backward, lambda: ((x(), new(B, N, D), new(B, D)), {})),
    (gelu.gelu_forward, lambda: ((new(7, D), new(D, dtype=WIDE), new(3, D)), {})),
    (gelu.gelu_tangent, lambda: ((new(7, D), new(3, D)), {})),
    (gelu.gelu_backward, lambda: ((new(7, D), new(D, dtype=WIDE), new(7, D)), {})),
    (kernels.attention_forward, attended(False)),
    (kernels.attention_forward, attended(True)),
    (backward_kernels.attention_backward, grads_of_attention),
    (backward_kernels.packed_backward, grads_of_packed(WIDE)),
    (backward_kernels.packed_backward, grads_of_packed(None)),
    (rms.rms_norm_forward, lambda: ((new(B, N, D), new(B_t, N, D), new(D)), {"eps": 1e-6})),
    (rms.rms_norm_backward, lambda: ((new(B, N, D), new(B, N, D), new(D)), {"eps": 1e-6})),
    (layer_scale.layer_scale_residual_forward, lambda: ((x(), x(), None, x()[:2], new(D)), {"dtype": WIDE})),
    (layer_scale.layer_scale_residual_backward, lambda: ((x(), x(), new(D)), {})),
    (swiglu.swiglu_forward, lambda: ((new(B, N, D), new(B, N, D), None, new(B_t, N, D)), {})),
    (swiglu.swiglu_backward, lambda: ((new(B, N, D), new(B, N, D), new(B, N, D)), {})),
    (rotary.rotary_forward, lambda: ((*qk(), *(None,) * 4, *tables()), {"interleaved": False})),
    (
        rotary_backward.qk_norm_rotary_backward,
        lambda: ((*qk(), *qk(), new(d), new(d), *tables()), {"eps": 1e-6, "interleaved": True}),
    ),
    (embedding.embedding_forward, lambda: ((new(B, dtype=WIDE), new(B_t, dtype=WIDE), 16, 1e4), {})),
    (embedding.embedding_backward, lambda: ((new(B, 16, dtype=WIDE), new(B, dtype=WIDE), 1e4), {})),
]


def gathers(p):
    """What was noted on the node that gathers the parameter's gradient; a new one has nothing."""
    return p.view_as(p).grad_fn.next_functions[0][0].metadata


def tensors_of(args):
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, tuple):
            yield from tensors_of(a)


def launched(function, args, options):
    """Launches' arguments, the results, and which arguments are addresses: none where a plan was followed."""
    made = []
    run, replay = launch.Launch.run, launch.replay

    def ran(this):
        made.append([a.data_ptr() if isinstance(a, torch.Tensor) else a for a in this.values()])
        kept.extend(a for a in this.values() if isinstance(a, torch.Tensor))
        addresses.append([isinstance(a, torch.Tensor) for a in this.values()])
        run(this)

    def ran_again(start, arguments):
        made.append(list(arguments))
        replay(start, arguments)

    kept, addresses = [], []
    launch.Launch.run, launch.replay = ran, ran_again
    try:
        out = function(*args, **options)
    finally:
        launch.Launch.run, launch.replay = run, replay
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    return made, outs, addresses


def named(made, addresses, inputs, outs):
    """Addresses as places; those of scratch memory by the order in which they come."""
    scratch = {}
    places = []
    spans = []
    for kind, of in (("in", inputs), ("out", outs)):
        for i, a in enumerate(of):
            if a is not None and a.numel():
                storage = a.untyped_storage()
                spans.append((storage.data_ptr(), storage.nbytes(), kind, i, a.data_ptr()))
    for arguments, is_address in zip(made, addresses, strict=True):
        row = []
        for value, address in zip(arguments, is_address, strict=True):
            if not address or value is None:
                row.append(value)
                continue
            for start, size, kind, i, first in spans:
                if start <= value < start + size:
                    row.append((kind, i, value - first))
                    break
            else:
                row.append(("scratch", scratch.setdefault(value, len(scratch))))
        places.append(row)
    return places


def main():
    launches = 0
    stub_driver()
    with as_on_h100(chunk=2):
        for function, make in CASES:
            for _ in range(2):  # one kind of arguments: the first call makes the plan, the others follow it
                args, options = make()
                function(*args, **options)
                ours = [weakref.ref(a) for a in tensors_of(args)]
                del args
                assert not any(a() is not None for a in ours), f"{function.__name__}: its plan keeps tensors alive"
            args, options = make()
            inputs = list(tensors_of(args))
            plain, outs, addresses = launched(function.__wrapped__, args, options)
            followed, planned_outs, none_of_them = launched(function, args, options)
            assert not none_of_them, f"{function.__name__}: no plan was followed"
            assert named(followed, addresses, inputs, planned_outs) == named(plain, addresses, inputs, outs), (
                function.__name__
            )
            for ours, theirs in zip(planned_outs, outs, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
            launches += len(plain)

        # the tape of a step ends with it: what a plan kept alive would hold the nodes that gather the gradients, whose
        # stream is that of the first step, and no later step could be recorded on another one
        forward, parameters = blocks("meanflow", depth=2, width=D, heads=H)
        args = step_inputs(4, N, D)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = forward(*args[:4])
        for p in parameters:
            gathers(p)["of this step"] = True
        torch.autograd.grad(y, parameters, args[4])
        assert all(gathers(p) for p in parameters)
        del y
        assert not any(gathers(p) for p in parameters), "the tape of a step is kept alive"

        # inputs that lie otherwise in each other's memory than when the plan was made
        q, k, v = qkv().unbind(2)
        options = {"scale": 0.3, "causal": False, "precision": "ieee"}
        kernels.attention_forward(q, k, v, **options)
        apart = [qkv()[:, :, 0] for _ in range(3)]
        _, _, addresses = launched(kernels.attention_forward, apart, options)
        assert addresses, "a plan was followed that does not fit"

        # a configuration that the tuner forces, and a cleared table, reach the next call
        args, options = normed(none, norm.Tangents)()
        norm.norm_forward(*args, **options)
        with launch.forced_config(
            "ada_layer_norm_forward", {"BLOCK_N": 1, "CHUNK": 4, "num_warps": 8, "num_stages": 1}
        ):
            made, _, addresses = launched(norm.norm_forward, args, options)
            assert addresses
            assert made[0][-2:] == [4, 1]
        launch.clear_cache()
        _, _, addresses = launched(norm.norm_forward, args, options)
        assert addresses
    print(f"{len({f for f, _ in CASES})} functions, {len(CASES)} kinds of calls, {launches} launches")


if __name__ == "__main__":
    main()
