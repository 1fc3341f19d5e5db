"""What random modules are made of: texts of PyTorch operations, one sample at a time by construction.

In a template `{X}` is a live tensor of kind X (`{X2}`, `{X3}`: others of that kind, or constants), `{=X}` a new one,
`{T}` one of any kind, `{D}` one whose last size is D; `{W}`, `{V}`, `{U}` are new parameters of sizes (D, D), (D,) and
(N, D), `{K}` a constant of at least (B, N, D), `{n}` a number, `{nn.…}` a new submodule, `{f}` a function of kind X to
itself. What is no good for some sizes stays out of those programs: random_modules.py tries each line.
"""

KINDS = {
    "X": "(B, N, D)", "C": "(B, D)", "A": "(B,)", "S": "(N, B, D)", "M": "(B·N, D)", "G": "(2·B, N, D)",
    "L": "(B, D, N)", "H": "(B, 2, N, Q)", "R": "(N, D, B)",
}  # fmt: skip
BATCH_FIRST = {
    "X": "{}", "C": "{}", "A": "{}", "L": "{}", "H": "{}", "S": "{}.transpose(0, 1)", "M": "{}.view(B, N, D)",
    "G": "torch.cat({}.chunk(2), 1)", "R": "{}.permute(2, 0, 1)",
}  # fmt: skip


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


# expressions by the kind of their result; T and D: of the operand's
EXPRESSIONS: dict[str, list[str]] = {
    "T": lines("""
        {T}.sin()
        torch.tanh({T})
        {T}.sigmoid() * {T2}
        {T}.square()
        F.silu({T})
        F.gelu({T}, approximate='tanh')
        F.gelu({T}) - F.relu({T2})
        F.softplus({T}) + F.mish({T})
        F.leaky_relu({T}, 0.1)
        F.elu({T}).add(F.hardswish({T}))
        ({T} / 4).exp()
        ({T}.square() + 1).rsqrt()
        ({T}.abs() + 0.1).sqrt()
        {T}.erf() + torch.atan({T})
        torch.log1p({T}.square())
        torch.special.i0e({T}) + torch.sinc({T})
        {T} ** 2 - {T2} ** 3 / 9
        {n} - {T} / {n}
        2.0 ** ({T} / 4)
        {n} / (1 + {T}.square())
        (1 + {T2}.abs()) ** ({T}.tanh())
        -{T}
        {T}.clamp(-1, {n})
        {T}.clamp(min={T2})
        {T}.round() + {T}
        torch.div({T}, 0.3, rounding_mode='floor') * {T2}
        {T} % 0.9 + torch.fmod({T}, 0.7)
        {T}.lerp({T2}, 0.3)
        torch.lerp({T}, {T2}, {T3}.sigmoid())
        {T} + {T2}
        {T} * {T2}
        {T2} - {T}
        {T2} / (1.5 + {T}.square())
        torch.add({T}, {T2}, alpha={n})
        torch.sub({T2}, {T}, alpha=2)
        torch.maximum({T}, {T2})
        torch.where({T} > 0, {T}, {T2})
        torch.where({T2} > 0, 0.5, {T})
        {T}.where({T2} > -1, {T3})
        {T}.masked_fill({T2} > 0, {n})
        torch.addcmul({T}, {T2}, {T3}, value=0.5)
        torch.addcdiv({T2}, {T}, 2 + {T3}.square())
        torch.atan2({T}, 2 + {T2}.abs()) + torch.hypot({T}, 1 + {T2}.abs())
        (({T} > 0) & ({T2} < 1)).to({T}.dtype) * {T}
        {T}.float().sin().to({T}.dtype)
        {T}.double().cos().to({T}.dtype)
        {T}.to(torch.float32).mul({n}).type_as({T})
        {T}.clone()
        {T}.contiguous()
        {T}.detach() * {T2}
        {T}.data + {T2}
        torch.zeros_like({T}) + {T2}
        torch.full_like({T}, 0.5) * {T}
        {T}.new_ones({T}.shape) - {T}
        {T}.view_as({T})
        {T}.reshape({T}.shape)
        {T}[...]
        {T}.unsqueeze(-1).squeeze(-1)
        {T}.transpose(0, -1).mul(2).transpose(0, -1)
        F.dropout({T}, 0.3, True)
        {nn.Dropout(0.4)}({T})
        {nn.SiLU()}({T})
        {nn.Softplus()}({T}) * {T2}
        cube({T}, 0.1)
        same({T})
        same({T}) + {T}
        double({T} * 1)
        gate({T}, {T2})[0]
        tensor_hook({T} * 2)
        sum([{T}, {T2}, {T3}]) / 2
        checkpoint(torch.sin, {T}, use_reentrant=False)
        checkpoint(F.silu, {T}, use_reentrant=True)
    """),
    "D": lines("""
        {D}.softmax(-1)
        torch.log_softmax({D}, dim=-1)
        F.layer_norm({D}, (D,))
        F.layer_norm({D}, (D,), {V}, {V2})
        {nn.LayerNorm(D)}({D})
        {nn.RMSNorm(D)}({D})
        F.rms_norm({D}, (D,), eps=0.01)
        F.normalize({D}, dim=-1)
        {D} - {D}.mean(-1, keepdim=True)
        {D} * torch.rsqrt({D}.pow(2).mean(-1, keepdim=True) + 0.01) * {V}
        {D} / (1 + {D}.var(-1, keepdim=True, unbiased=False))
        {D} * {D}.std(-1, keepdim=True)
        {D} - {D}.logsumexp(-1, keepdim=True)
        {D} - {D}.amax(dim=-1, keepdim=True).detach()
        {D}.sum(-1, keepdim=True) * {D2}
        {D} + {D}.max(-1, keepdim=True).values
        {D} * ({D} @ {V}).unsqueeze(-1)
        {D}.norm(dim=-1, keepdim=True) + {D2}
        torch.linalg.vector_norm({D}, dim=-1, keepdim=True) * {V}
        {D}.prod(-1, keepdim=True) / 4 + {D}
        {D}.cumsum(-1) / 2
        {D}.cumprod(-1)
        {D}.flip(-1)
        {D}.roll(1, dims=-1)
        {D}.sort(-1).values
        {D}.topk(D, dim=-1).values
        {D}.topk(2, dim=-1)[0].repeat(*[1] * ({D}.ndim - 1), D // 2)
        {D}.gather(-1, {D}.argsort(-1))
        torch.cat([{D}[..., Q:], {D2}[..., :Q]], -1)
        torch.cat({D}.chunk(2, -1)[::-1], dim=-1)
        torch.cat({D}.split([1, D - 1], dim=-1)[::-1], -1)
        torch.stack(({D}[..., ::2], -{D}[..., 1::2]), -1).flatten(-2)
        torch.stack({D}.unflatten(-1, (-1, 2)).unbind(-1), -1).flatten(-2)
        torch.view_as_real(torch.view_as_complex({D}.reshape(*{D}.shape[:-1], Q, 2)) * self.turn).flatten(-2)
        torch.fft.ifft(torch.fft.fft({D}, dim=-1) * {V}, dim=-1).real
        torch.fft.irfft(torch.fft.rfft({D}), n=D)
        F.linear({D}, {W}, {V})
        {nn.Linear(D, D)}({D})
        {nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, D))}({D})
        {nn.Sequential(nn.Linear(D, D), nn.SiLU(inplace=True), nn.Dropout(0.2, inplace=True))}({D})
        {nn.utils.parametrizations.weight_norm(nn.Linear(D, D))}({D})
        {nn.utils.parametrizations.orthogonal(nn.Linear(D, D, bias=False))}({D})
        {hooked(nn.Linear(D, D), 'pre')}({D})
        {hooked(nn.Linear(D, D), 'forward')}({D})
        {hooked(nn.Linear(D, D), 'backward')}({D})
        {nn.Bilinear(D, D, D)}({D}, {D2})
        {D} @ {W}
        {D} @ {W}.mT + {V}
        torch.einsum('...d,de->...e', {D}, {W})
        F.glu(torch.cat([{D}, {D2}], -1), dim=-1)
        F.silu({D}) * F.linear({D}, {W})
        {D}.index_select(-1, self.dims)
        {D}[..., self.dims]
        torch.zeros_like({D}).index_add(-1, self.dims, {D})
        torch.zeros_like({D}).scatter_add(-1, self.dims.expand_as({D}), {D})
        {D}.repeat_interleave(2, -1)[..., 1::2]
        {D}.unfold(-1, 2, 2).flatten(-2)
        F.pad({D}, (1, 0))[..., 1:] + F.pad({D}, (0, 2), value=3.0)[..., 2:]
        F.cosine_similarity({D}, {D2}, dim=-1).unsqueeze(-1) * {D}
        {D}.unsqueeze(-2).expand(*{D}.shape[:-1], 2, D).mean(-2)
        {D} + {V} * {n}
        {D}.diff(dim=-1, prepend={D2}[..., :1])
        torch.addmm({V}, {D}.reshape(-1, D), {W}).view({D}.shape)
        checkpoint({nn.Linear(D, D)}, {D}, use_reentrant=False)
    """),
    "X": lines("""
        {X} + {C}[:, None]
        {X} * (1 + {C}.unsqueeze(1)) + {C2}.unsqueeze(1)
        {C}[:, None] - {X} * {A}[:, None, None]
        {A}.view(-1, 1, 1) * {X2}
        {X} + {U}
        {U} * {C}[:, None]
        {U} - {X}
        {X}.add({C}.view(B, 1, D), alpha=0.5)
        {C}[:, None].expand(-1, N, -1)
        {C}.unsqueeze(1).expand_as({X})
        {C}[:, None].repeat(1, N, 1)
        {C}.repeat_interleave(N, 0).view(B, N, D)
        {A}[:, None, None].broadcast_to(B, N, D)
        torch.broadcast_tensors({C}[:, None], {X})[0]
        {X}.masked_fill({C}[:, None] > 0, {n})
        torch.where(self.rows[:, None], {X}, {C}[:, None])
        {X}.softmax(1)
        {X} - {X}.mean(1, keepdim=True)
        {X} + {X}.sum((1, 2), True) / 8
        {X} / (1 + {X}.var((1, 2), keepdim=True, unbiased=False))
        {X}.prod(1, keepdim=True) + {X}
        {X}.amax((1, 2), keepdim=True) * {X2}
        {X}.cumsum(1) / 2
        {X}.flip(1, 2)
        {X}.roll((1, 1), (1, 2))
        {X}.sort(dim=1, descending=True)[0]
        F.layer_norm({X}, (N, D), {U})
        F.group_norm({X}, 1, {U}[:, 0], {U}[:, 1])
        {nn.GroupNorm(N, N)}({X})
        F.group_norm({X}.mT, 2).mT
        F.instance_norm({X})
        {nn.BatchNorm1d(N).eval()}({X})
        F.batch_norm({X}.mT, {V}.detach(), {V}.detach().abs() + 0.5, {V2}, {V}).transpose(1, 2)
        {X} @ ({X2}.mT @ {X3}) / N
        ({X} @ {X2}.mT / Q).softmax(-1) @ {X3}
        {K}[:B] @ ({X}.mT @ {X}) / N
        {X} @ ({K}[:B].mT @ {X2}) / N
        torch.bmm(torch.bmm({X}, {X2}.mT), {K}[:B]) / D
        torch.bmm(self.mask.to({X}.dtype).expand(B, N, N), {X})
        torch.baddbmm({X}, {X2} @ {X3}.mT, {K}[:B], beta=0.5, alpha=0.1)
        torch.baddbmm({U}, {X}, {X2}.mT @ {X3}, alpha=0.1)
        torch.matmul({W}, {X}.mT).mT
        ({X} @ {V})[..., None] * {X2}
        torch.einsum('bnd,bd,de->bne', {X}, {C}, {W})
        torch.einsum('bnd,b->bnd', {X}, {A})
        torch.einsum('bnm,bmd->bnd', torch.einsum('bnd,bmd->bnm', {X}, {X2}).softmax(-1), {X3})
        torch.einsum('nd,bd->bnd', {U}, {C})
        torch.stack([torch.outer({X}[i, :, 0], {C}[i]) for i in range(B)])
        torch.stack([{X}[i] @ {W} for i in range(B)])
        torch.stack([torch.mv({X}[i], {C}[i]) for i in range(B)])[..., None] * {X2}
        torch.stack([xi.softmax(0) + ci for xi, ci in zip({X}, {C})])
        torch.stack([xi.masked_fill(self.rows[:, None], ai) for xi, ai in zip({X}.unbind(0), {A})])
        torch.stack([F.linear(xi, {W}) for xi in {X}])
        torch.cat([xi[None] * 2 for xi in {X}])
        F.conv1d({X}, self.kernel, {U}[:, 0], padding=1)
        {nn.Conv1d(N, N, 3, padding=1)}({X})
        {nn.Conv1d(D, D, 1, groups=2)}({X}.mT).mT
        {nn.Conv2d(N, N, (1, 3), padding=(0, 1))}({X}.view(B, N, 2, Q)).flatten(2)
        {nn.ConvTranspose1d(N, N, 2, stride=2)}({X}[..., ::2])
        {nn.ConvTranspose2d(N, N, 2, stride=2)}({X}.reshape(B, N, 2, Q)).mean((2, 3))[..., None] * {X2}
        F.avg_pool1d({X}, 2).repeat(1, 1, 2)
        F.max_pool1d({X}, 2).repeat_interleave(2, -1)
        F.adaptive_avg_pool1d({X}, D) + F.avg_pool2d({X}.view(B, N, 2, Q), 2).mean((2, 3))[..., None]
        F.max_pool2d({X}.unflatten(2, (2, Q)), (2, 1)).flatten(2).repeat(1, 1, 2)
        F.interpolate({X}, scale_factor=2, mode='nearest')[..., ::2]
        F.interpolate({X}.view(B, N, 2, Q), scale_factor=2, mode='bilinear')[..., ::2, ::2].flatten(2)
        F.interpolate({X}, size=D, mode='linear', align_corners=True)
        F.pad({X}, (1, 2), mode='replicate')[..., 2:-1]
        F.pad({X}, (0, 0, 1, 0))[:, :-1]
        F.pixel_shuffle({X}.view(B, N, D, 1).transpose(1, 2), 2).reshape(B, N, D)
        F.pixel_unshuffle({X}.reshape(B, D // 4, 2 * N, 2), 2).transpose(1, 2).reshape(B, N, D)
        F.unfold({X}.view(B, N, 2, Q), (2, 1)).view(B, N, D)
        F.scaled_dot_product_attention({X}, {X2}, {X3})
        F.scaled_dot_product_attention({X}, {K}[:B], {X2}, is_causal=True)
        F.scaled_dot_product_attention({X}, {X2}, {X3}, attn_mask=self.mask)
        F.scaled_dot_product_attention({X}, {X2}, {X3}, attn_mask={A}.view(B, 1, 1) * self.mask)
        {nn.MultiheadAttention(D, 2, batch_first=True)}({X}, {X2}, {X2}, need_weights=False)[0]
        {nn.MultiheadAttention(D, 2, batch_first=True)}({X}, {X}, {X})[0]
        {nn.MultiheadAttention(D, 1, batch_first=True, bias=False)}({X}, {X}, {X2}, attn_mask=~self.mask)[0]
        {nn.TransformerEncoderLayer(D, 2, 6, batch_first=True, dropout=0.1)}({X})
        {nn.TransformerEncoderLayer(D, 2, 6, batch_first=True, norm_first=True, activation='gelu').eval()}({X})
        {nn.TransformerDecoderLayer(D, 2, 6, 0.0, batch_first=True)}({X}, {X2})
        {nn.GRU(D, D, batch_first=True)}({X})[0]
        {nn.RNN(D, D, batch_first=True, bidirectional=True)}({X})[0][..., ::2] * {X2}
        torch.quantile({X}, 0.3, dim=2, keepdim=True) * {X2}
        torch.vmap(lambda y: y.sin() * y.mean(0))({X})
        {X}.gather(1, self.ids[:B].view(B, 1, 1).expand(B, N, D))
        {X}.take_along_dim(self.order.view(1, N, 1), 1)
        {X}.index_select(1, self.order)
        {X}[:, self.order]
        {X}[torch.arange(B), self.ids[:B]][:, None] + {X2}
        {X}[:, self.rows].sum(1, keepdim=True) + {X2}
        torch.zeros_like({X}).scatter_add(1, self.ids[:B].view(B, 1, 1).expand(B, N, D), {X})
        {X}.scatter(1, self.ids[:B].view(B, 1, 1).expand(B, 1, D), {X2})
        {X}.index_put((torch.arange(B), self.ids[:B]), {C})
        {X}.index_add(1, self.order, {X2})
        {X}.index_copy(1, self.order, {X2})
        {X}.slice_scatter({X2}[..., :2], 2, 0, 2)
        {X}.select_scatter({C}, 1, 0)
        F.embedding(self.ids[:B], {U})[:, None] * {X}
        {nn.Embedding(5, D)}(self.order) * {X}
        torch.cat([{X}[:, 1:], {C}[:, None]], dim=1)
        torch.cat([{X}, {K}[:B]], 1)[:, ::2][:, :N]
        torch.stack([{X}, {X2}, {K}[:B]]).sum(0)
        torch.stack((({X}, {X2})), 2)[:, :, 1]
        torch.stack({X}.unbind(1)[::-1], 1)
        torch.cat([{X}[:, n : n + 1] * n for n in range(N)], 1)
        sum(xn[:, None] for xn in {X}.unbind(1)) / N + {X2}
        {X}.reshape(B, -1).view(B, 2, -1).flatten(1).unflatten(1, (N, D))
        {X}.reshape(-1, D).tanh().view(B, N, D)
        {X}.view(B, N, 2, Q).transpose(1, 2).reshape(B, 2, -1).softmax(-1).view(B, 2, N, Q).transpose(1, 2).flatten(2)
        {X}.view(B, N, 2, Q).transpose(1, 2).reshape(-1, N, Q).cumsum(1).view(B, 2, N, Q).transpose(1, 2).flatten(2)
        {X}.movedim(0, 1).mul(2).movedim(1, 0)
        {X}.expand(2, B, N, D).unbind(0)[1]
        {X}.tril() + {X2}.triu(1)
        torch.cat([{X}[:2] * 2, {X}[2:].sin()])
        torch.cat([{X}[1:], {X2}[:1] * 3])[[-1, *range(B - 1)]]
        {X}.index_select(0, torch.arange(B).flip(0)).sin().index_select(0, torch.arange(B).flip(0))
        {X}[torch.arange(B).flip(0)].mul(2)[torch.arange(B).flip(0)]
        torch.cat([{X}, {X2}]).sin().chunk(2)[1]
        torch.cat([{X}, {K}[:B]]).view(2, B, N, D).sum(0)
        {X}.repeat(2, 1, 1).cos().view(2, B, N, D)[0]
        {X}.repeat_interleave(2, 0).view(B, 2, N, D)[:, 1]
        F.pad({X}, (0, 0, 0, 0, 1, 1))[1:-1]
        torch.linalg.solve({X} @ {X}.mT / D + torch.eye(N, dtype={X}.dtype), {X2})
        {S}.transpose(0, 1)
        {S}.permute(1, 0, 2).contiguous()
        {M}.view(B, N, D)
        {M}.unflatten(0, (B, N)) * 2
        {G}.chunk(2)[1] + {G}.chunk(2)[0]
        {G}[:B] - 1.5 * ({G}[B:] - {G}[:B])
        {G}.unflatten(0, (2, B)).mean(0)
        {L}.mT
        {L}.transpose(1, 2).reshape(B, N, D)
        {H}.transpose(1, 2).flatten(2)
        {H}.permute(0, 2, 1, 3).reshape(B, N, D)
        {R}.permute(2, 0, 1)
        checkpoint({f}, {X}, use_reentrant=False)
        checkpoint({f}, {X}, use_reentrant=True)
        checkpoint(in_place_inside, {X}, use_reentrant=False)
        checkpoint(lambda y: checkpoint({f}, y * 2, use_reentrant=False) + y, {X}, use_reentrant=False)
        ({f})({X})
    """),
    "C": lines("""
        {X}[:, 0]
        {X}.select(1, -1)
        {X}.sum(1) / 2
        {X}.mean(dim=(1,))
        {X}.amax(1)
        {X}.std(1)
        {X}.logsumexp(1)
        {X}.max(1).values + {X}.min(dim=1)[0]
        {X}.prod(1)
        {X}.unbind(1)[0] * {C}
        {X}.transpose(0, 1)[0]
        {X}[torch.arange(B), self.ids[:B]]
        {X}.narrow(1, N - 1, 1).squeeze(1)
        {X}.norm(dim=1)
        torch.einsum('bnd->bd', {X})
        {C} * {A}[:, None]
        {A}.unsqueeze(-1) * {V}
        torch.outer({A}, {V})
        torch.cos({A}[:, None] * self.freqs)
        torch.cat([torch.cos({A}[:, None] * self.freqs[:Q]), torch.sin({A}[:, None] * self.freqs[Q:])], -1)
        {nn.Linear(1, D)}({A}[:, None])
        torch.addmm({V}, {C}, {W}, beta=2, alpha=0.5)
        {C}.addmm({C2}, {W})
        torch.mm({C}, {W})
        ({W} @ {C}[..., None]).squeeze(-1)
        (W_ := {W}) @ W_ @ {V} * {C}
        torch.bmm({X}.mT, {X2})[:, 0] / N
        F.embedding(self.ids[:B], {U}) * {C}
        {U}[self.ids[:B]] + {C}
        F.group_norm({C}, 2)
        {nn.BatchNorm1d(D).eval()}({C})
        {C}.repeat(1, 2).chunk(2, dim=1)[1]
        {C}.unsqueeze(1).expand(B, 3, D).reshape(B * 3, D).view(B, 3, D).sum(1)
        {C}[None].expand(2, B, D).flatten(0, 1).view(2, B, D)[1]
        torch.cat([{C}[:1], {C}[1:] * 2])
        torch.cat([{C}, {C2}]).tanh().split(B)[0]
        {S}[-1]
        {S}.sum(0)
        {M}.view(B, N, D)[:, 0]
        {G}.sum(1).chunk(2)[0]
        {R}.mT[0].mT.T
        F.linear({C}, {W}, {V})
    """),
    "A": lines("""
        {X}.mean((1, 2))
        {C}.sum(-1) / 4
        {C}[:, 0]
        {X}[:, -1, 1] * {A}
        {C} @ {V}
        torch.mv({C}, {V})
        {X}.flatten(1).norm(dim=1)
        {C}.logsumexp(1)
        ({C} * {C2}).sum(-1)
        torch.einsum('bd,bd->b', {C}, {C2})
        {A}.where({A2} > 0, {A2} * 2)
        torch.stack([ai * 2 for ai in {A}])
        torch.cat([{A}[:1], {A}[1:].sin()])
        torch.linalg.det({X} @ {X}.mT / D + torch.eye(N, dtype={X}.dtype)).log()
        {C}.max(-1)[0]
    """),
    "S": lines("""
        {X}.transpose(0, 1)
        {X}.transpose(0, 1).contiguous()
        {X}.permute(1, 0, 2) * 2
        torch.stack({X}.unbind(1))
        {S} + {C}
        {S} * {U}[:, None]
        {S}.softmax(0)
        {S} - {S}.mean(0)
        {S}.flip(0)
        {S}.cumsum(0) / 2
        {S}[self.order]
        torch.cat([{S}[1:], {C}[None]])
        {S}.reshape(N, B * 2, Q).mul(2).view(N, B, D)
        {S}.reshape(N * B, D).sin().view(N, B, D)
        F.linear({S}.flatten(0, 1), {W}).unflatten(0, (N, B))
        {nn.MultiheadAttention(D, 2)}({S}, {S2}, {S2})[0]
        {nn.TransformerEncoderLayer(D, 2, 6, dropout=0.0)}({S})
        {nn.LayerNorm(D)}({S})
        torch.einsum('bnd->nbd', {X})
    """),
    "M": lines("""
        {X}.reshape(-1, D)
        {X}.flatten(0, 1)
        {X}.view(B * N, D) * 2
        {M} @ {W}
        {C}.repeat_interleave(N, 0)
        {C}[:, None].expand(B, N, D).reshape(-1, D)
        {M} + {C}[:, None].repeat(1, N, 1).view(-1, D)
        {M}.view(B, N, D).softmax(1).view(-1, D)
        {M} * {A}.repeat_interleave(N)[:, None]
    """),
    "G": lines("""
        torch.cat([{X}, {X2}])
        torch.cat([{X}, {X}])
        torch.cat([{X} * 2, {K}[:B]], dim=0)
        {X}.repeat(2, 1, 1)
        {G} + torch.cat([{C}, {C2}])[:, None]
        {G} * {U}
        {nn.Linear(D, D)}({G})
        F.scaled_dot_product_attention({G}, {G}, {G2})
        {G} - {G}.mean(1, keepdim=True)
    """),
    "L": lines("""
        {X}.mT
        {X}.transpose(-1, -2).contiguous()
        {X}.swapaxes(1, 2) * 2
        torch.einsum('bnd->bdn', {X})
        {L}.softmax(-1)
        {L} + {C}[..., None]
        {nn.Conv1d(D, D, 3, padding=1)}({L})
        {L}.cumsum(1) / 2
        {W} @ {L}
    """),
    "H": lines("""
        {X}.view(B, N, 2, Q).transpose(1, 2)
        {X}.unflatten(-1, (2, Q)).permute(0, 2, 1, 3)
        torch.stack([{X}, {X2}]).view(2, B, N, 2, Q).transpose(2, 3).unbind(0)[1]
        F.scaled_dot_product_attention({H}, {H2}, {H3})
        F.scaled_dot_product_attention({H}, {H}, {H2}, is_causal=True)
        F.scaled_dot_product_attention({H}, {H2}, {H}, attn_mask=self.mask, scale=0.3)
        F.scaled_dot_product_attention({H}, {H2}, {H}, attn_mask=torch.where(self.mask, 0.1, -9.0).to({H}.dtype))
        F.scaled_dot_product_attention({H}, {H2}, {H}, attn_mask={A}.view(B, 1, 1, 1) * self.mask)
        F.scaled_dot_product_attention({H}, {H2}, {H3}, dropout_p=0.3)
        F.scaled_dot_product_attention({H}, {H2}[:, :1], {H3}[:, :1], enable_gqa=True)
        ({H} @ {H2}.mT / 2).softmax(-1) @ {H3}
        torch.einsum('bhqk,bhkd->bhqd', torch.einsum('bhqd,bhkd->bhqk', {H}, {H2}).softmax(-1), {H3})
        torch.cat([-{H}[..., 1::2], {H}[..., ::2]], -1)
        {H} + {A}[:, None, None, None]
        F.rms_norm({H}, (Q,))
        {H}.cumsum(2) / 2
        {H}.flip(1)
    """),
    "R": lines("""
        {X}.permute(1, 2, 0)
        {X}.movedim(0, -1)
        {R} * {C}.T
        {R} + {A}
        {R} * {U}[..., None]
        {R}.softmax(1)
        {R}.cumsum(0) / 2
        {S}.mT
    """),
}

# statements: in place, through views, into new buffers, and blocks
STATEMENTS = [
    "{T}.mul_({n})",
    "{T}.add_({T2}, alpha=0.5)",
    "{T} += {T2}",
    "{T} *= {n}",
    "{T}.sub_({T2}).div_(2)",
    "{T}.copy_({T2})",
    "{T}.zero_()",
    "{T}.fill_({n})",
    "{T}.clamp_(-1, 1)",
    "{T}.masked_fill_({T2} > 0, {n})",
    "{T}.relu_()",
    "F.silu({T}, inplace=True)",
    "{nn.SiLU(inplace=True)}({T})",
    "F.dropout({T}, 0.3, True, inplace=True)",
    "{T}.tanh_()",
    "{T}.lerp_({T2}, 0.3)",
    "{T}[...] = {T2}",
    "{T}[:] = {n}",
    "{T}.detach().mul(2)\n{T}.mul_(2)",
    "double({T})",
    "{=T} = {T}.view_as({T})\n{T}.mul_(2)",
    "{=T} = {T}[...]\n{=T} += {T2}",
    "{=T}, p = gate({T}, {T2})\n{=T} = {=T} + p",
    "with torch.no_grad():\n    {=T} = {T} * 2",
    "with torch.no_grad():\n    {T}.mul_({T2})",
    "{=T} = torch.empty_like({T})\n{=T}.copy_({T})",
    "{=T} = {T} * 1\n{=T}.add_({T2})",
    "{D}[..., ::2] = {D2}[..., 1::2]",
    "{D}[..., :Q] *= 2",
    "{D}.index_copy_(-1, self.dims, {D2})",
    "{D}[..., 0].mul_(2)",
    "p, q = {D}.chunk(2, -1)\np.mul_(0.5)",
    "p = {D}[..., Q:]\np += 1\n{D}.mul_(2)",
    "{=D} = torch.zeros({D}.shape, dtype={D}.dtype)\n{=D}[..., :Q] = {D}[..., Q:]\n{=D}[..., Q:] = {D2}[..., :Q]",
    "{=D} = torch.empty_like({D})\n{=D}[..., ::2] = {D}[..., ::2].cos()\n{=D}[..., 1::2] = {D}[..., 1::2].sin()",
    "{X}[:, 0] = {C}",
    "{X}[:, -1] *= {A}[:, None]",
    "{X}[:, 1:] += {C}[:, None]",
    "{X}.add_({C}[:, None])",
    "{X}.mul_({U})",
    "{X} -= {A}[:, None, None]",
    "{X}[:, self.rows] = 0.5",
    "{X}[:, 0, ::2] = {C}[:, ::2]",
    "{X}[torch.arange(B), self.ids[:B]] = {C}",
    "{X}.masked_fill_(self.rows[:, None], {n})",
    "{X}.index_put_((torch.arange(B), self.ids[:B]), {C}, accumulate=True)",
    "{X}.scatter_add_(1, self.ids[:B].view(B, 1, 1).expand(B, 1, D), {X2})",
    "{X}.index_add_(1, self.order, {X2})",
    "{X}.transpose(0, 1).mul_({C})",
    "{X}.view(B, -1).mul_(2)",
    "{X}.view(B * N, D)[:, 0] = 1.0",
    "{X}.mT[:, :, 0] += {C}",
    "{=X} = {X} * 1\n{=X}.baddbmm_({X2} @ {X3}.mT, {K}[:B], alpha=0.1)",  # not checked where memory overlaps
    "{X}[:2] = {X2}[:2]",
    "{X}[:1].mul_(2)",
    "{X}[0] += 1",
    "for i in range(B):\n    {X}[i] *= {A}[i]",
    "for xi, ai in zip({X}, {A}):\n    xi.add_(ai)",
    "p = {X}[:, 0]\n{X}[:, -1] = p * 2\n{X}.mul_(0.5)\n{=C} = p + {C}",
    "{=C} = {X}[:, 0]\n{X}.mul_(2)",
    "{=C} = {X}[:, 0]\n{=C}.mul_({C2})",
    "{=S} = {X}.transpose(0, 1)\n{X}.add_(1)",
    "{=M} = {X}.view(B * N, D)\n{=M} += 1",
    "{=L} = {X}.mT\n{=L}[:, 0] = {X2}[..., 0]",
    "{=H} = {X}.view(B, N, 2, Q).transpose(1, 2)\n{X}[..., 0] = 1.0",
    "{=X} = torch.zeros(B, N, D, dtype={X}.dtype)\nfor n in range(N):\n    {=X}[:, n] = {X}[:, n] * n",
    "{=X} = {X}.new_zeros(B, N, D)\n{=X}[:, 0] = {C}\n{=X}[:, 1:] = {X}[:, 1:]",
    "{=X} = torch.empty(B, N, D, dtype={X}.dtype)\nfor i in range(B):\n    {=X}[i] = {X}[i] * {A}[i]",
    "{=X} = torch.zeros_like({X})\nfor i in range(B):\n    {=X}[i].add_({X}[i]).mul_(2)",
    "{=X} = torch.zeros(B, N, D, dtype={X}.dtype)\n{=X}.index_put_((torch.arange(B), self.ids[:B]), {C})",
    "{=X} = torch.zeros(B, N, D, dtype={X}.dtype)\n"
    "{=X}.scatter_add_(1, self.ids[:B].view(B, 1, 1).expand(B, N, D), {X})",
    "{=X} = torch.full((B, N, D), 0.5, dtype={X}.dtype)\n{=X}.addcmul_({X}, {X2})",
    "{=X} = torch.zeros(N, B, D, dtype={X}.dtype).transpose(0, 1)\n{=X}.copy_({X})",
    "p = torch.zeros(B, N, 2, Q, dtype={X}.dtype)\np[:, :, 0] = {X}[..., :Q]\n"
    "p[:, :, 1].copy_({X}[..., Q:])\n{=X} = p.flatten(2)",
    "p = torch.zeros(B, N, D, dtype={X}.dtype)\np.chunk(2, 1)[0].copy_({X}.chunk(2, 1)[0])\n{=X} = p + {X2}",
    "p = torch.zeros(B, N, D, dtype={X}.dtype)\nq = p[:, 0]\nq += {C}\n{=X} = p",
    "p = torch.zeros(B, N, D, dtype={X}.dtype)\nq = p.view(B, -1)\np.copy_({X})\n{=X} = q.view(B, N, D) + p",
    "p = {X}.clone()\nfor part in p.split(1, dim=1):\n    part.mul_(2)\n{=X} = p",
    "{=X} = {K}[:B].clone()\n{=X}[:, 0] = {C}",
    "{=X} = {X}\nfor _ in range(2):\n    {=X} = {=X} + {U}",
    "if bool(({X} == {X}).all()):\n    {=X} = {X} * {X}.shape[1]",
    "p = list({X}.unbind(1))\np[0] = p[0] * 2\n{=X} = torch.stack(p, 1)",
    "{=L} = {X} * 1\n{=L}.transpose_(1, 2)",
    "{=S} = {X} + 0\n{=S}.transpose_(0, 1).mul_({C})",
    "{=X} = {X} * 1\n{=X}.unsqueeze_(1).mul_({C}.view(B, 1, 1, D))\n{=X} = {=X}.squeeze_(1)[:, :, :] + {X2}",
    "{=H} = {X}.view(B, N, 2, Q).clone()\n{=H}.swapaxes_(1, 2)\n{=H}[..., 0] = 1.0",
    "{A}[:1] = 0.5",
    "{=X} = {C}[:, None].expand(B, N, D).clone()\n{=X}[:, 0].zero_()",
    "{=M} = torch.empty(B * N, D, dtype={X}.dtype)\n{=M}.view(B, N, D).copy_({X})",
    "{=G} = torch.zeros(2 * B, N, D, dtype={X}.dtype)\n{=G}[:B] = {X}\n{=G}[B:] = {X2}",
    "{=S} = torch.zeros(N, B, D, dtype={X}.dtype)\n{=S}[0] = {C}",
    "{=X}, p = {G}.chunk(2)\n{=X} = {=X} + p",
]
REFUSED = ["{=T} = clip({T})"]  # no derivative to be had
WEIGHTS = {"T": 4, "D": 4, "X": 6, "C": 2, "A": 1, "S": 2, "M": 1, "G": 1, "L": 1, "H": 2, "R": 1, "": 7}
