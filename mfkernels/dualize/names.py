"""What PyTorch's functions are called, whichever way they are reached, and which of them behave alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# x += y and y - x reach Python as __iadd__ and __rsub__
_OPERATORS = {
    "__truediv__": "div",
    "__div__": "div",
    "__itruediv__": "div_",
    "__idiv__": "div_",
    "__rtruediv__": "rdiv",
    "__rdiv__": "rdiv",
    "__invert__": "bitwise_not",
    "__getitem__": "getitem",
    "__setitem__": "setitem_",
    "__radd__": "add",
    "__rmul__": "mul",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "true_divide_": "div_",
    "divide_": "div_",
    "multiply_": "mul_",
    "subtract_": "sub_",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "broadcast_to": "expand",
    "_softmax": "softmax",
}
_IN_PLACE = ("add", "sub", "mul", "pow", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift", "matmul")


_KEPT = _names("len repr str format hash bool int float index iter array complex contains dlpack")


@lru_cache(maxsize=4096)
def name_of(func: Callable[..., Any]) -> str:
    """One name for a function, a method and an operator that do the same; in-place ones end in "_"."""
    name = getattr(func, "__name__", None) or type(func).__name__
    if name == "__get__":
        return "get:" + func.__self__.__name__  # type: ignore[attr-defined]
    if name == "__set__":
        return "set:" + func.__self__.__name__  # type: ignore[attr-defined]
    for prefix in ("special_", "fft_", "linalg_"):
        name = name.removeprefix(prefix)
    if name in _OPERATORS:
        return _OPERATORS[name]
    if name.startswith("__") and name.endswith("__"):
        bare = name[2:-2]
        if bare[0] == "i" and bare[1:] in _IN_PLACE:
            return bare[1:] + "_"
        return name if bare in _KEPT else bare
    return name


# Elementwise with broadcasting: row i of the result depends on row i of each operand.
ELEMENTWISE = _names("""
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh
    atan atan2 atanh celu clamp clamp_max clamp_min clip complex conj conj_physical copysign cos cosh deg2rad digamma
    div elu erf erfc erfinv exp exp2 expm1 fmax fmin fmod frac gelu hardshrink hardsigmoid hardswish hardtanh
    heaviside hypot i0 i0e i1 i1e imag leaky_relu lerp lgamma log log10 log1p log2 log_sigmoid logaddexp
    logaddexp2 logit logsigmoid masked_fill maximum minimum mish mul mvlgamma nan_to_num neg nextafter polar polygamma
    positive pow prelu rad2deg rdiv real reciprocal relu relu6 remainder
    resolve_conj resolve_neg rpow rsqrt rsub selu sgn sigmoid
    silu sin sinc sinh softplus softshrink softsign sqrt square sub tan tanh tanhshrink threshold where
    xlogy get:real get:imag rmul rmod ldexp erfcx ndtr log_ndtr expit entr xlog1py float_power
    """)

# Zero derivative wherever there is one: the result is a plain tensor.
CONSTANT = _names("""
    argmax argmin bernoulli bucketize ceil detach empty_like fix floor floor_divide floordiv full_like get:data histc
    isclose new_empty new_full new_ones new_tensor new_zeros ones_like rand_like randint_like randn_like round
    rfloordiv searchsorted sign signbit trunc zeros_like multinomial one_hot new new_empty_strided count_nonzero
    """)

# Questions about a tensor, answered by its primal.
INSPECT = _names("""
    size dim ndimension numel nelement stride storage_offset is_contiguous element_size get_device is_floating_point
    is_complex is_nonzero data_ptr register_hook retain_grad requires_grad_ is_same_size result_type can_cast __len__
    __repr__ __str__ __format__ __bool__ __int__ __index__ equal allclose is_tensor is_shared is_pinned is_inference
    is_conj is_neg has_names dim_order untyped_storage storage is_signed contains __contains__ is_coalesced
    register_post_accumulate_grad_hook _is_view is_set_to type_name nonzero argsort
    """)

# name: (position, keyword, default) of the dimensions that the function works along; None is all of them.
ALONG: dict[str, tuple[int, str, Any]] = {
    **dict.fromkeys(
        _names("""sum mean nanmean nansum var std var_mean std_mean amax amin aminmax logsumexp prod flip all any
        median nanmedian max min cummax cummin"""),
        (1, "dim", None),
    ),
    "flip": (1, "dims", None),
    "norm": (2, "dim", None),
    "vector_norm": (2, "dim", None),
    "roll": (2, "dims", None),
    "quantile": (2, "dim", None),
    **dict.fromkeys(
        _names("""softmax log_softmax softmin cumsum cumprod logcumsumexp"""),
        (1, "dim", -1),
    ),
    "glu": (1, "dim", -1),
    "sort": (1, "dim", -1),
    "msort": (9, "dim", 0),
    "mode": (1, "dim", -1),
    "topk": (2, "dim", -1),
    "kthvalue": (2, "dim", -1),
    "diff": (2, "dim", -1),
    "unfold": (1, "dimension", -1),
    **dict.fromkeys(_names("fft ifft rfft irfft hfft ihfft"), (2, "dim", -1)),
    **dict.fromkeys(_names("fft2 ifft2 rfft2 irfft2"), (2, "dim", (-2, -1))),
    **dict.fromkeys(_names("fftn ifftn rfftn irfftn"), (2, "dim", None)),
    **dict.fromkeys(_names("fftshift ifftshift"), (1, "dim", None)),
    **dict.fromkeys(_names("tril triu"), (9, "dim", (-2, -1))),
    **dict.fromkeys(_names("view_as_real"), (9, "dim", ())),
    **dict.fromkeys(_names("view_as_complex"), (9, "dim", -1)),
}

# Batch in dimension 0, and each sample on its own.
BATCH_FIRST = _names("""
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d max_pool1d
    max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d
    lp_pool2d group_norm instance_norm pixel_shuffle pixel_unshuffle channel_shuffle interpolate upsample grid_sample
    fold im2col col2im local_response_norm upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d
    upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    native_channel_shuffle unfold_image
    """)

# The same values in another shape and the same order.
RESHAPE = _names("reshape view flatten unflatten view_as reshape_as ravel squeeze unsqueeze atleast_2d atleast_3d")

PERMUTE = _names("permute transpose movedim t adjoint get:T get:mT get:H get:mH")

# Elementwise casts and copies, done alike to primal and tangent.
CAST = _names("""
    clone contiguous to type type_as float double half bfloat16 cuda cpu alias cfloat cdouble positive
    pin_memory
    """)

SPLIT = _names("chunk split tensor_split split_with_sizes unbind unsafe_chunk unsafe_split")

# Random in themselves: the tangent is taken with the draws of the primal.
RANDOM = _names("""
    dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout rrelu
    """)

# Why a function cannot be served.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        _names("item tolist numpy __float__ __complex__ __array__ __dlpack__"),
        "a number taken out of a tensor has no derivative, so what is computed from it would lack one; keep it a "
        "tensor, or detach() it if it is a constant by design",
    ),
    **dict.fromkeys(
        _names("as_strided as_strided_ set_ resize_ resize_as_ swap_dims share_memory_"),
        "it sees memory, not values",
    ),
    **dict.fromkeys(
        _names("backward grad"),
        "a network that differentiates inside its own forward needs torch.func.jvp",
    ),
    **dict.fromkeys(
        _names("squeeze_ unsqueeze_ transpose_ t_ swapaxes_ swapdims_ unflatten_"),
        "it changes a tensor's shape in place; use the same function without the underscore",
    ),
}
