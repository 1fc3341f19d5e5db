"""The same training step in JAX, in a process of its own: `python jax_step.py CASE.npz ROUNDS` prints JSON.

A DiT as the MeanFlow authors' public program computes it (arXiv 2505.13447): one jitted step in which `jax.jvp` carries
the tangents of every sample through the network, matrix products in bfloat16 on request, Adam and an average of the
weights in float32. CASE.npz holds the weights under the names of `meanflow.models.DiT`, a batch and its draws. The
answer holds the loss, the norm of the gradient, the seconds of each step and the peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def linear(p, name, x, dtype):
    return x.astype(dtype) @ p[f"{name}.weight"].T.astype(dtype) + p[f"{name}.bias"].astype(dtype)


def norm(x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


def embed_time(p, name, t, dtype):
    freqs = jnp.exp(-np.log(10000.0) * jnp.arange(128) / 128)
    angles = t[:, None] * freqs  # [B, 128]
    h = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)  # [B, 256]
    return linear(p, f"{name}.mlp.2", jax.nn.silu(linear(p, f"{name}.mlp.0", h, dtype)), dtype)


def dit(p, sizes, z, r, t, y, dtype):
    """(B, C, H, W) -> (B, C, H, W)."""
    patch, depth, heads = sizes
    B, C, side, _ = z.shape
    grid = side // patch
    x = (
        z.reshape(B, C, grid, patch, grid, patch).transpose(0, 2, 4, 1, 3, 5).reshape(B, grid * grid, -1)
    )  # [B, N, C·p·p]
    w = p["x_embedder.proj.weight"]
    x = x.astype(dtype) @ w.reshape(w.shape[0], -1).T.astype(dtype) + p["x_embedder.proj.bias"] + p["pos_embed"]
    c = embed_time(p, "t_embedder", t, dtype) + embed_time(p, "r_embedder", t - r, dtype)  # [B, D]
    c = jax.nn.silu(c + p["y_embedder.embedding_table.weight"][y])
    N, D = x.shape[1:]
    for i in range(depth):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            linear(p, f"{name}.adaLN_modulation.1", c, dtype).astype(jnp.float32), 6, -1
        )
        h = linear(p, f"{name}.attn.qkv", modulate(norm(x), shift1, scale1), dtype).reshape(B, N, 3, heads, D // heads)
        q, k, v = h[:, :, 0], h[:, :, 1], h[:, :, 2]  # [B, N, H, d]
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k).astype(jnp.float32) / np.sqrt(D // heads)  # [B, H, N, N]
        o = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, -1).astype(dtype), v).reshape(B, N, D)
        x = x + gate1[:, None] * linear(p, f"{name}.attn.proj", o, dtype).astype(jnp.float32)
        h = linear(p, f"{name}.mlp.fc1", modulate(norm(x), shift2, scale2), dtype)
        h = linear(p, f"{name}.mlp.fc2", jax.nn.gelu(h, approximate=True), dtype)
        x = x + gate2[:, None] * h.astype(jnp.float32)
    shift, scale = jnp.split(linear(p, "final_layer.adaLN_modulation.1", c, dtype).astype(jnp.float32), 2, -1)
    x = linear(p, "final_layer.linear", modulate(norm(x), shift, scale), dtype).astype(jnp.float32)
    return x.reshape(B, grid, grid, patch, patch, C).transpose(0, 5, 1, 3, 2, 4).reshape(B, C, side, side)


def loss_of(p, net, x, e, t, r, y, kappa, null):
    z = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * e  # [B, C, H, W]
    v = e - x  # [B, C, H, W]
    if kappa:
        both = net(
            p, jnp.concatenate([z, z]), jnp.concatenate([t, t]), jnp.concatenate([t, t]), jnp.concatenate([y, null])
        )
        u_y, u_null = jnp.split(jax.lax.stop_gradient(both), 2)
        v = v + kappa * (u_y - u_null)
    u, du = jax.jvp(lambda z, r, t: net(p, z, r, t, y), (z, r, t), (v, jnp.zeros_like(r), jnp.ones_like(t)))
    error = jnp.square(u - jax.lax.stop_gradient(v - (t - r)[:, None, None, None] * du)).sum((1, 2, 3))  # [B]
    return (error / jax.lax.stop_gradient(error + 0.01)).mean()


def main() -> None:
    case, rounds = dict(np.load(sys.argv[1])), int(sys.argv[2])
    sizes, kappa = tuple(int(n) for n in case.pop("sizes")), float(case.pop("kappa"))
    half = case.pop("half")
    dtype = jnp.bfloat16 if half else jnp.float32
    if not half:
        jax.config.update("jax_default_matmul_precision", "highest")  # as PyTorch's default: JAX's own is TF32
    batch = {name: jnp.asarray(case.pop(name)) for name in ("x", "e", "t", "r", "y", "null")}
    fixed = {"pos_embed": jnp.asarray(case.pop("pos_embed"))}
    params = {name: jnp.asarray(weight) for name, weight in case.items()}
    net = partial(lambda p, *inputs: dit({**p, **fixed}, sizes, *inputs, dtype))
    value_and_grad = jax.value_and_grad(lambda p, b: loss_of(p, net, kappa=kappa, **b))

    @partial(jax.jit, donate_argnums=0)
    def step(state, b):
        p, first, second, average, n = state
        loss, grads = value_and_grad(p, b)
        size = jnp.sqrt(sum(jnp.square(g).sum() for g in grads.values()))
        grads = {name: g / jnp.maximum(size, 1.0) for name, g in grads.items()}
        first = {name: 0.9 * first[name] + 0.1 * g for name, g in grads.items()}
        second = {name: 0.95 * second[name] + 0.05 * g * g for name, g in grads.items()}
        b1, b2 = 1 - 0.9**n, 1 - 0.95**n
        p = {name: w - 1e-6 * (first[name] / b1) / (jnp.sqrt(second[name] / b2) + 1e-8) for name, w in p.items()}
        average = {name: 0.9999 * average[name] + 0.0001 * w for name, w in p.items()}
        return (p, first, second, average, n + 1), (loss, size)

    def zeros():
        return jax.tree.map(jnp.zeros_like, params)

    state = (params, zeros(), zeros(), jax.tree.map(jnp.copy, params), jnp.ones(()))
    state, told = step(state, batch)
    answer = {"loss": float(told[0]), "gradient_norm": float(told[1]), "seconds": []}
    for _ in range(2):
        state, told = step(state, batch)
    for _ in range(rounds):
        jax.block_until_ready(told)
        start = time.perf_counter()
        state, told = step(state, batch)
        jax.block_until_ready(state)
        answer["seconds"].append(time.perf_counter() - start)
    memory = jax.devices()[0].memory_stats() or {}
    print(json.dumps({**answer, "peak": memory.get("peak_bytes_in_use"), "jax": jax.__version__}))


if __name__ == "__main__":
    main()
