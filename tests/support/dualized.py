"""A dualized module against `torch.func.jvp` of the untouched one, in float64."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mfkernels
from mfkernels.testing import relative_error


class Wrapped(nn.Module):
    """A function as a module."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args, **kwargs):
        return self.fn(*args, **kwargs)


def duals(*shapes, rows=2):
    xs = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    return [mfkernels.Dual(x, torch.randn_like(x)[:rows]) for x in xs]


@contextlib.contextmanager
def mha_operations():
    """nn.TransformerEncoderLayer in its own operations, for PyTorch's fused ones have no forward-mode rule."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def forward_mode(module, primals, tangents, rows, seed=0):
    """Value and tangent of the first `rows` by PyTorch, with tangents of zero on the other rows."""
    full = tuple(torch.cat([t[:rows], torch.zeros_like(t[rows:])]) for t in tangents)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forward-mode rules that batch less than they could
        torch.manual_seed(seed)
        out, out_dot = torch.func.jvp(module, primals, full)
    return out.detach(), out_dot.detach()[: rows * out.shape[0] // primals[0].shape[0]]


def assert_same_jvp(module, primals, tangents, *, bound=8e-15, report=None, call=None):
    """Tangents within `bound` of PyTorch's, primals equal bit for bit, with no, some and all rows carrying tangents.

    call: how to call the module with the primals; default: as it stands.
    """
    call = call or (lambda m: m)
    dual = mfkernels.dualize(module, report=report is not None)
    names = list(module.state_dict())
    assert list(dual.state_dict()) == names
    batch = primals[0].shape[0]
    plain, ours = call(module), call(dual)
    worst = 0.0
    for rows in sorted({0, max(batch // 3, 1), batch}):
        torch.manual_seed(0)
        value = plain(*primals)
        after = torch.get_rng_state()
        with contextlib.ExitStack() as stack:
            torch.manual_seed(0)
            out, out_dot = _jvp(ours, dual, primals, tangents, rows, stack)
        assert torch.equal(out, value), f"{rows} rows: primal differs by {(out - value).abs().max():.1e}"
        assert torch.equal(torch.get_rng_state(), after), f"{rows} rows: random numbers were drawn differently"
        if rows:
            _, expected = forward_mode(plain, primals, tangents, rows)
            assert not out_dot.requires_grad
            error = relative_error(out_dot, expected, floor=1e-3)
            assert error <= bound, f"{rows} rows: tangent error {error:.1e}"
            worst = max(worst, error)
    if report is not None:
        report.append(dual.dual_report)
    return worst


def _jvp(ours, dual, primals, tangents, rows, stack):
    if ours is dual:
        return mfkernels.jvp(dual, primals, tangents, rows=rows)
    out = ours(*(mfkernels.Dual(p, t[:rows]) for p, t in zip(primals, tangents, strict=True)))
    return out.primal, out.tangent
