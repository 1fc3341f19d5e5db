"""Every kind of operation that a module may be made of, one at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from dualized import Wrapped, assert_same_jvp

B, N, D = 6, 4, 8


torch.manual_seed(0)
GRU = torch.nn.GRU(D, D).double().requires_grad_(False)
BATCH_FIRST_GRU = torch.nn.GRU(D, 3, batch_first=True, bidirectional=True).double().requires_grad_(False)


def inputs():
    x, c, a = torch.randn(B, N, D), torch.randn(B, D), torch.rand(B) + 0.5
    return tuple(v.double() for v in (x, c, a))


W = torch.linspace(-1, 1, D * D, dtype=torch.float64).view(D, D)
P = torch.linspace(-2, 1, B * N * D, dtype=torch.float64).view(B, N, D)
V = torch.linspace(0.2, 1, D, dtype=torch.float64)
M = (torch.arange(N * N).view(N, N) % 3 != 1) | torch.eye(N, dtype=torch.bool)
IDS = torch.tensor([0, 2, 1, 2, 0, 1])
K = torch.linspace(-1, 1, 5 * N * 3, dtype=torch.float64).view(5, N, 3)
FREQS = torch.polar(
    torch.ones(N, D // 2, dtype=torch.float64), torch.linspace(0, 2, N * D // 2).double().view(N, D // 2)
)


def buffer_of_pairs(x):
    out = torch.empty_like(x)
    out[..., ::2] = x[..., ::2].cos()
    out[..., 1::2] = x[..., 1::2].sin()
    return out


def rotary_complex(x):
    pairs = torch.view_as_complex(x.reshape(B, N, D // 2, 2))
    return torch.view_as_real(pairs * FREQS).flatten(2)


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return x * FREQS.real.repeat(1, 2) + torch.cat([-b, a], -1) * FREQS.imag.repeat(1, 2)


def timestep(a):
    freqs = torch.exp(-math.log(100) * torch.arange(4, dtype=torch.float64) / 4)
    args = a[:, None].double() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


def windows(x):
    y = x.view(B, 2, 2, 2, D // 2).permute(0, 2, 1, 3, 4).contiguous().view(-1, 2, D)
    return y.softmax(-1).view(B, N, D)


def in_place(x, c):
    y = x * 1
    y += c[:, None]
    y[:, 0] *= 2
    y[:, 1:3].mul_(c[:, None])
    y.clamp_(min=-1).add_(1).div_(c.square()[:, None] + 1)
    return y


def in_place_parts(x):
    y = x.exp()
    q, k = y.chunk(2, -1)
    q *= 0.5
    return torch.cat([q, k, y], -1)


def write_behind(x):
    y = x.sin()
    z = y.view_as(y)
    w = y + 0
    z.mul_(2)
    return y + w


def write_the_base(x):
    y = x * 1
    z = y.view(B, -1)
    a, b = y.chunk(2, 1)
    y *= 3
    a.add_(b)
    b.copy_(a.sin())
    y[:, :, ::2].zero_()
    return y * z.view(B, N, D)


def zeros_filled(x, by_sample):
    out = torch.zeros(B, N, D, dtype=x.dtype)
    seen = out.view(B, -1)
    if by_sample:
        for i in range(B):
            out[i] = x[i].cos()
    else:
        out[:, 1:3] = x[:, :2]
        out[:, 0].copy_(x[:, 3])
    early = seen + 1
    out.mul_(x)
    return out * early.view(B, N, D) + seen.view(B, N, D) * out.detach()


def tokens_first(x):
    out = torch.zeros(N, B, D + 1, dtype=x.dtype)
    out.permute(1, 0, 2)[..., :D].copy_(x)
    return out.permute(1, 0, 2)[..., 1:] * out[0][:, None, :D]


def turned(x):
    y = x * 1
    y.transpose_(1, 2).mul_(2)
    y[:, 0] += 1
    return y.mT.unsqueeze(1).clone().squeeze_(1) + (x * y.mT).swapaxes_(0, 1).transpose(0, 1)


def samples_moved(x):
    y = x * 1
    y[2:5] = x[:3].exp()
    y[0] *= 3
    y[IDS.argsort()] = y.sin()
    return y * x


def scatter_in(x):
    out = torch.zeros(B, N, 3, dtype=x.dtype)
    return out.scatter_add_(2, IDS.view(B, 1, 1).expand(B, N, 1), x[..., :1])


def sdpa(x, **kwargs):
    q, k, v = torch.stack([x, x * 2, x.sin()]).reshape(3, B, N, 2, D // 2).transpose(2, 3)
    return F.scaled_dot_product_attention(q, k, v, **kwargs).transpose(1, 2).flatten(2)


def modulate(x, c):
    shift, scale = (c @ W).repeat(1, 2).chunk(2, dim=1)
    return F.layer_norm(x, (D,)) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


OPS = {
    "numbers": lambda x, c, a: 2 - 3 / (1.5 * x.square() + 1) + (-x) / 4 - x**3 + 2.0 ** (x / 4),
    "broadcast": lambda x, c, a: x * c[:, None] - c.unsqueeze(1) / (1 + a[:, None, None]) + a.view(-1, 1, 1) * P,
    "plain first": lambda x, c, a: P * x + (P - c[:, None]) / (2 + x.square()),
    "alpha": lambda x, c, a: torch.sub(torch.add(x, P, alpha=2), c[:, None], alpha=0.5),
    "rounding": lambda x, c, a: torch.div(x, 0.3, rounding_mode="floor") + torch.fmod(x, 0.7) + x.round() + x % 0.9,
    "activations": lambda x, c, a: (
        sum(f(x) for f in (F.silu, F.gelu, F.relu, torch.tanh, torch.sigmoid, F.softplus, F.elu, F.mish, F.hardswish))
        + F.gelu(x, approximate="tanh")
        + F.leaky_relu(x, 0.1)
        + F.prelu(x, V[:N])
        + F.glu(x.repeat(1, 1, 2))
    ),
    "functions": lambda x, c, a: (
        x.exp()
        + x.sin() * x.cos()
        + x.abs().sqrt()
        + (x.square() + 1).rsqrt()
        + x.erf()
        + torch.log1p(x.square())
        + torch.atan2(x, P)
        + torch.hypot(x, P)
        + x.abs().pow(P)
        + x.lerp(P, 0.3)
    ),
    "three operands": lambda x, c, a: (
        torch.addcmul(x, c[:, None], P, value=0.5) + torch.addcdiv(P, x, 2 + a[:, None, None])
    ),
    "where": lambda x, c, a: torch.where(x > 0, x, c[:, None]) + torch.where(P > 0, 0.0, x) + x.where(P > -1, P),
    "masks": lambda x, c, a: (
        x.masked_fill(P > 0, -3.0) + x.clamp(-1, 1) + torch.maximum(x, P) + x.clamp(min=P, max=P + 1)
    ),
    "masks with a value that has a tangent": lambda x, c, a: torch.stack(
        [xi.masked_fill(P[0] > 0, ai) + xi.detach().masked_fill(P[0] < -1, ai) for xi, ai in zip(x, a, strict=True)]
    ),
    "comparison": lambda x, c, a: (x > 0).double() * c[:, None] + torch.sign(x) * x + (x == x).to(x.dtype),
    "dtypes": lambda x, c, a: x.to(torch.float64) + x.type_as(P) + x.double().clone().contiguous().to("cpu"),
    "likes": lambda x, c, a: torch.ones_like(x) * x + x.new_zeros(B, N, D) + torch.full_like(x, 2) * c[:, None],
    "detach": lambda x, c, a: x.detach() * x + c[:, None].data,
    "no_grad": lambda x, c, a: _under_no_grad(x),
    "reductions": lambda x, c, a: (
        x.sum(1)
        + x.mean(dim=(1,))
        + x.amax(1)
        + x.var(1)
        + x.std(1)
        + x.logsumexp(1)
        + x.norm(dim=1)
        + x.prod(1)
        + x.max(1).values
        + x.min(dim=1)[0]
        + torch.linalg.vector_norm(x, dim=1)
    ),
    "keepdim": lambda x, c, a: (
        x - x.mean(-1, keepdim=True) + x.var(-1, keepdim=True, unbiased=False) + x.sum((1, 2), True)
    ),
    "cumulative": lambda x, c, a: x.cumsum(1) + x.cumprod(2) + x.flip(1) + x.roll(2, dims=-1) + x.roll((1, 1), (1, 2)),
    "softmax": lambda x, c, a: x.softmax(-1) + F.softmax(x, dim=1) + torch.log_softmax(x, 2) + F.softmin(x, dim=-1),
    "normalize": lambda x, c, a: F.normalize(x, dim=-1) + F.cosine_similarity(x, P, dim=-1)[..., None],
    "sorting": lambda x, c, a: x.sort(-1).values + x.topk(N, dim=1).values + torch.gather(x, 1, x.argsort(1)),
    "pooling": lambda x, c, a: F.avg_pool1d(x, 2) + F.max_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 4),
    "shapes": lambda x, c, a: (
        x.reshape(B, -1).view(B, 2, -1).flatten(1).unflatten(1, (N, D)).squeeze().unsqueeze(1)[:, 0]
    ),
    "heads": lambda x, c, a: (x.view(B, N, 2, -1).permute(2, 0, 3, 1).unbind(0)[1] * P.mT[:, :4]).transpose(-1, -2),
    "batch second": lambda x, c, a: (
        (x.transpose(0, 1).contiguous().view(N, B * 2, D // 2) * 2).view(N, B, D).transpose(0, 1)
    ),
    "batch inside": lambda x, c, a: (x.transpose(0, 1).reshape(N * B, D) @ W).sin().view(N, B, D).permute(1, 0, 2),
    "merged": lambda x, c, a: F.linear(x.reshape(-1, D).tanh(), W).view(B, N, D) + x.flatten(0, 1).unflatten(0, (B, N)),
    "movedim": lambda x, c, a: x.movedim(0, -1).swapaxes(0, 1).permute(2, 1, 0) + torch.einsum("bnd->bdn", x).mT,
    "windows": lambda x, c, a: windows(x),
    "expand": lambda x, c, a: (
        c[:, None].expand(-1, N, -1) + c.unsqueeze(1).expand_as(x) + a[:, None, None].broadcast_to(B, N, D)
    ),
    "repeat": lambda x, c, a: (
        c[:, None].repeat(1, N, 1) + c.repeat_interleave(N, 0).view(B, N, D) + c[:, None].tile(1, N, 1)
    ),
    "repeated batch": lambda x, c, a: (
        torch.cat([x, x * 2]).sin().chunk(2)[1] + x.repeat(2, 1, 1).cos().view(2, B, N, D)[0]
    ),
    "cat": lambda x, c, a: torch.cat([x, c[:, None], P[:, :1], V.expand(B, 1, D)], dim=1),
    "stack": lambda x, c, a: (
        torch.stack([x, P, c[:, None].expand(B, N, D)]).sum(0) + torch.stack((x, P), -1).flatten(2)[..., :D]
    ),
    "split": lambda x, c, a: (
        torch.cat(x.split([1, 3], dim=1)[::-1], 1)
        + torch.stack(x.unbind(1)[::-1], 1)
        + x.tensor_split(2, 2)[0].repeat(1, 1, 2)
    ),
    "index": lambda x, c, a: (
        x[:, 1:3, ::2] + x[:, [0, 2], 4:] * x[..., -1:, :4] + x[:, None, 0, :4] + x[:, torch.tensor([1, 0])][:, :, :4]
    ),
    "index first": lambda x, c, a: x[torch.arange(B), IDS] + x[:, 0] + x.select(1, 2) + x.narrow(2, 0, D)[:, -1],
    "bool index": lambda x, c, a: x[:, M[0]].sum(1) + x[:, :, M.flatten()[:D]].sum((1, 2))[:, None],
    "batch slice": lambda x, c, a: torch.cat([x[:2] * 2, x[2:]]) + torch.stack([x[i] for i in range(B)]),
    "batch order": lambda x, c, a: x[IDS.argsort()].sin(),
    "gather": lambda x, c, a: (
        x.gather(1, IDS.view(B, 1, 1).expand(B, 1, D))
        + x.index_select(1, IDS[:2]).take_along_dim(torch.ones(B, 1, 1, dtype=torch.long), 1)
    ),
    "scatter": lambda x, c, a: scatter_in(x),
    "pad": lambda x, c, a: (
        F.pad(x, (1, 2))
        + F.pad(x, (2, 1), value=3.0)
        + F.pad(x, (1, 2), mode="replicate")
        + torch.constant_pad_nd(x, (1, 2), 0.5)
    ),
    "pad batch": lambda x, c, a: F.pad(x, (0, 0, 0, 0, 1, 1)).cos()[1:-1],
    "roll pieces": lambda x, c, a: torch.cat([x[:, 1:], x[:, :1]], 1) + x.diff(dim=1, prepend=P[:, :1]),
    "triangle": lambda x, c, a: (x @ x.mT).tril() + x @ x.transpose(1, 2) @ torch.eye(N).double(),
    "matmul": lambda x, c, a: x @ W + P @ (x.mT @ x),
    "vectors": lambda x, c, a: (
        (x @ V)[..., None] + torch.matmul(c, W)[:, None] + (W @ c[..., None]).mT + x.matmul(V).unsqueeze(-1)
    ),
    "bmm": lambda x, c, a: (
        torch.bmm(x, x.mT) + torch.baddbmm(torch.bmm(P, P.mT), x, P.mT) + torch.einsum("bnd,bmd->bnm", P, x)
    ),
    "addmm": lambda x, c, a: torch.addmm(V, c, W, beta=2, alpha=0.5) + c.addmm(c, W) + torch.mm(c, W),
    "einsum": lambda x, c, a: (
        torch.einsum("bnd,bd,de->bne", x, c, W)
        + torch.einsum("...d,de", x, W)
        + torch.einsum("b n d, b -> b n d", x, a)
        + torch.einsum("bnd,...->bnd", x, torch.tensor(2.0).double())
    ),
    "einsum heads": lambda x, c, a: torch.einsum(
        "bhqk,bkhd->bqhd",
        torch.einsum("bqhd,bkhd->bhqk", *[x.view(B, N, 2, D // 2)] * 2).softmax(-1),
        P.view(B, N, 2, -1),
    ).flatten(2),
    "linear": lambda x, c, a: F.linear(x, W, V) + torch.nn.functional.bilinear(x, P, torch.ones(D, D, D).double()),
    "own weights": lambda x, c, a: (
        F.linear(c, W)
        + (x * F.linear(V, W)).sum(1)
        + torch.stack([F.linear(x[i], c[i].outer(V)) for i in range(B)]).sum(1)
    ),
    "norms": lambda x, c, a: (
        F.layer_norm(x, (D,), V, V)
        + F.rms_norm(x, (D,), V)
        + F.rms_norm(x, (D,))
        + F.layer_norm(x, (N, D))
        + F.group_norm(x, 2, V[:N], V[:N])
        + F.instance_norm(x)
        + F.rms_norm(x, (N, D))
    ),
    "batch norm": lambda x, c, a: F.batch_norm(x, V[:N], V[:N], V[:N], V[:N]),
    "modulate": lambda x, c, a: modulate(x, c),
    "conv": lambda x, c, a: F.conv1d(x, K, bias=V[:5], padding=1) + F.conv1d(input=x, weight=K, padding=1),
    "images": lambda x, c, a: (
        F.pixel_shuffle(F.interpolate(x.view(B, N, 2, 4), scale_factor=2, mode="bilinear"), 2).flatten(1)
        + F.unfold(x.view(B, N, 4, 2), 2, padding=1).sum((1, 2))[:, None]
        + F.avg_pool2d(x.view(B, N, 4, 2), 2).mean((1, 2, 3))[:, None]
    ),
    "attention": lambda x, c, a: sdpa(x) + sdpa(x, is_causal=True) + sdpa(x, scale=0.3),
    "masked attention": lambda x, c, a: (
        sdpa(x, attn_mask=M)
        + sdpa(x, attn_mask=torch.where(M, 0.1, -9.0).double())
        + sdpa(x, attn_mask=((P[:, :, :N] > -1.9) | M)[:, None])
        + sdpa(x, attn_mask=a.view(B, 1, 1, 1) * M)
    ),
    "grouped attention": lambda x, c, a: F.scaled_dot_product_attention(
        x.view(B, N, 4, 2).transpose(1, 2),
        x[..., :4].reshape(B, N, 2, 2).transpose(1, 2),
        P[..., :4].view(B, N, 2, 2).transpose(1, 2),
        enable_gqa=True,
    ).flatten(1),
    "flat attention": lambda x, c, a: (
        F.scaled_dot_product_attention(x, P, x) + F.scaled_dot_product_attention(P, x, P[..., :3]).sum(-1, True)
    ),
    "multi-head": lambda x, c, a: F.multi_head_attention_forward(
        *[x.transpose(0, 1)] * 3, D, 2, W.repeat(3, 1), V.repeat(3), None, None, False, 0.0, W, V
    )[0].transpose(0, 1),
    "rotary complex": lambda x, c, a: rotary_complex(x),
    "rotate half": lambda x, c, a: rotate_half(x),
    "buffer": lambda x, c, a: buffer_of_pairs(x),
    "timestep": lambda x, c, a: timestep(a),
    "embedding": lambda x, c, a: F.embedding(IDS, W) * a[:, None] + W[IDS] * c,
    "in place": lambda x, c, a: in_place(x, c),
    "in place parts": lambda x, c, a: in_place_parts(x),
    "in place behind a view": lambda x, c, a: write_behind(x),
    "in place before a view": lambda x, c, a: write_the_base(x),
    "zeros filled by tokens": lambda x, c, a: zeros_filled(x, False),
    "zeros filled by samples": lambda x, c, a: zeros_filled(x, True),
    "zeros with the tokens first": lambda x, c, a: tokens_first(x),
    "samples moved in place": lambda x, c, a: samples_moved(x),
    "into a view of a plain tensor": lambda x, c, a: torch.zeros(B, 2 * N, D).double().chunk(2, 1)[0].copy_(x) * x,
    "filled and plain factors": lambda x, c, a: (
        torch.stack([x[i] @ P[i].mT for i in range(B)]) + x[IDS.argsort()].bmm(x.mT) + torch.baddbmm(x @ P.mT, P, x.mT)
    ),
    "expanded": lambda x, c, a: (
        c[:, None].expand(B, N, D).i0() + torch.linalg.vector_norm(a[:, None, None].expand(B, N, D), dim=1)[:, None]
    ),
    "diagonal": lambda x, c, a: (x @ x.mT).diagonal(dim1=1, dim2=2) + x.diagonal(dim1=-1, dim2=-2),
    "python": lambda x, c, a: (
        x * len(x) * x.shape[1] * x.size(-1) * x.dim() if x.is_floating_point() and bool((x == x).all()) else 0
    ),
    "iteration": lambda x, c, a: sum(row for row in x.transpose(0, 1)) + torch.stack(list(x)).sum(1),
    "fft": lambda x, c, a: (
        torch.fft.ifft(torch.fft.fft(x, dim=-1) * V, dim=-1).real + torch.fft.irfft2(torch.fft.rfft2(x))
    ),
    "conjugates": lambda x, c, a: (
        (torch.fft.fft(x).conj() * torch.fft.fft(P)).real
        + torch.fft.irfft(torch.fft.rfft(x).conj(), n=D)
        + torch.fft.fft(x).conj().imag
        + torch.cat([torch.fft.fft(x), torch.fft.fft(x).conj()]).chunk(2)[1].exp().real
        + torch.linalg.vecdot(torch.fft.fft(x), torch.fft.fft(P)).real[..., None]
    ),
    "every third token": lambda x, c, a: x.repeat(1, 3, 1).transpose(0, 1)[::3].softmax(0).transpose(0, 1),
    "flags in place": lambda x, c, a: (x * 1).gt_(0) * x + (x * 1).sign_() * x,
    "no tokens": lambda x, c, a: torch.cat([x[:, :0].flatten(0, 1), x.flatten(0, 1)]).view(B, N, D),
    "many dimensions": lambda x, c, a: x.view(B, *[1] * 11, N, D).transpose(-1, -2).flatten(1),
    "samples as heads in groups": lambda x, c, a: F.scaled_dot_product_attention(
        x[None], (9 * P[None, :3]).sin(), (7 * P[None, :3]).cos(), enable_gqa=True
    )[0],
    "turned in place": lambda x, c, a: turned(x),
    "quantile": lambda x, c, a: torch.quantile(x, 0.3, dim=2),
    "vmap": lambda x, c, a: torch.vmap(lambda y, w: y.sin() * w - y.mean(0))(x, c),
    "recurrent, batch first": lambda x, c, a: BATCH_FIRST_GRU(x)[0],
    "recurrent": lambda x, c, a: GRU(x.transpose(0, 1))[0].transpose(0, 1),
    "packed": lambda x, c, a: {"out": (x * 2,)}["out"][0],
    "meshes": lambda x, c, a: (
        torch.broadcast_tensors(c[:, None], P)[0] + torch.atleast_3d(x) + torch.ravel(x).view(B, N, D)
    ),
    "solve": lambda x, c, a: (
        torch.linalg.solve(x @ x.mT + torch.eye(N).double(), x) + torch.linalg.inv(x @ x.mT + torch.eye(N).double()) @ x
    ),
    "one sample's weights": lambda x, c, a: x * x[0].sum().detach() + c[:, None],
}


def _under_no_grad(x):
    with torch.no_grad():
        y = x * 2
    return x - y


@pytest.mark.parametrize("name", OPS)
def test_tangents_are_those_of_forward_mode(name):
    primals = inputs()
    tangents = tuple(torch.randn_like(p) for p in primals)
    assert_same_jvp(Wrapped(OPS[name]), primals, tangents)  # at most 4e-15 measured
