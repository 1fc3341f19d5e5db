"""Every private name of PyTorch that this project uses, and why. No other file may use one (tests/test_torch.py).

A private name may be gone in the next release. Each is looked up once, at import, which never fails: a name that this
PyTorch lacks becomes a `Missing`. It is false, so that code can take another way, and calling it raises an error that
says what cannot be done.
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import enable_reentrant_dispatch


class Missing:
    """Stands for a name that this PyTorch lacks."""

    def __init__(self, name: str, feature: str) -> None:
        self.name, self.feature = name, feature

    def __bool__(self) -> bool:
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{self.feature}: torch {torch.__version__} does not have {self.name.replace(':', '.')}, a private name of "
            "PyTorch that this needs; expected a version that README.md names"
        )


def lookup(name: str, feature: str) -> Any:
    """The object called `name` ("module:attribute"), or a `Missing` that names `feature`."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return Missing(name, feature)


# Structures of tensors (tuples, dicts, …): PyTorch has no public functions for them up to 2.15, and these agree with
# what torch.func, torch.compile and torch.utils.checkpoint take apart.
_STRUCTURES = "nested arguments and outputs"
tree_any = lookup("torch.utils._pytree:tree_any", _STRUCTURES)
tree_flatten = lookup("torch.utils._pytree:tree_flatten", _STRUCTURES)
tree_map = lookup("torch.utils._pytree:tree_map", _STRUCTURES)
tree_leaves = lookup("torch.utils._pytree:tree_leaves", _STRUCTURES)
tree_map_only = lookup("torch.utils._pytree:tree_map_only", _STRUCTURES)
tree_unflatten = lookup("torch.utils._pytree:tree_unflatten", _STRUCTURES)

# The Jacobian of softmax in one pass and without another tensor of scores: the public backward needs a graph.
softmax_backward = lookup("torch:ops.aten._softmax_backward_data", "the tangent of attention on plain PyTorch")

# The backward of fused attention from an output and log-sum-exp that are our own: the public one needs its own forward.
_KERNELS = "the backward of attention by PyTorch's kernels"
attention_backward_cpu = lookup("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", _KERNELS)
attention_backward_cudnn = lookup("torch:ops.aten._scaled_dot_product_cudnn_attention_backward", _KERNELS)
attention_backward_flash = lookup("torch:ops.aten._scaled_dot_product_flash_attention_backward", _KERNELS)
attention_cpu = lookup("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu", _KERNELS)
attention_cudnn = lookup("torch:ops.aten._scaled_dot_product_cudnn_attention", _KERNELS)

# A product that ends in GELU, which has no derivative: the tanh form on CUDA, the other one on a CPU.
addmm_activation = lookup("torch:_addmm_activation", "an mlp without gradients")

# Whether a tensor is one of `torch.func`'s own, of whose values vmap gives none: `torch.func.debug_unwrap` is newer.
is_transformed = lookup("torch:_C._functorch.is_functorch_wrapped_tensor", "checks of values within torch.func")

# Whether anything sees operators before they run: torch.func's transforms, dispatch modes (fake tensors, make_fx …).
_INTERCEPTS = "ops as autograd functions"
_func_level = lookup("torch:_C._functorch.peek_interpreter_stack", _INTERCEPTS)
_modes = lookup("torch:_C._len_torch_dispatch_stack", _INTERCEPTS)
_forward_ad = lookup("torch.autograd:forward_ad", _INTERCEPTS)
_can_tell = bool(_func_level) and bool(_modes) and hasattr(_forward_ad, "_current_level")


def nothing_transforms() -> bool:
    """Whether no torch.func transform and no forward-mode level is active; False if that cannot be determined."""
    return _can_tell and _forward_ad._current_level < 0 and _func_level() is None


def nothing_intercepts() -> bool:
    """Whether operators run as they are called, without forward-mode tangents; False if that cannot be determined."""
    return nothing_transforms() and _modes() == 0


# Whether a tensor is a batch of `torch.autograd.grad(is_grads_batched=True)`, which has a vmap of its own.
is_batched = lookup("torch:_C._functorch.is_legacy_batchedtensor", _INTERCEPTS) or (lambda x: False)

_any_global_hook = lookup("torch.nn.modules.module:_has_any_global_hook", "layers read by their weights")


def is_untouched(module: Any, *kinds: type) -> bool:
    """Whether a module is exactly one of these kinds, without hooks or a `forward` of its own.

    What it would do when called is then known, so that its weights may be read instead.
    """
    if type(module) not in kinds or "forward" in vars(module) or not _any_global_hook or _any_global_hook():
        return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def before_compile(module: Any) -> Any:
    """The module that `torch.compile` wrapped in `module`; None if it did not, or if it keeps it elsewhere."""
    return getattr(module, "_orig_mod", None)


# ---------------------------------------------------------------------------------------------------------- for dualize

_DUALIZE = "mfkernels.dualize"

# A mode below autograd: `torch.overrides` has public modes, which see functions, above it.
_mode = lookup("torch.utils._python_dispatch:TorchDispatchMode", _DUALIZE)


class _NoMode:
    def __init__(self) -> None:
        _mode()  # raises the error that names what is missing


TorchDispatchMode = _mode or _NoMode

# The only way to make a tensor that has no memory of its own.
make_wrapper_subclass = lookup("torch:Tensor._make_wrapper_subclass", _DUALIZE)

# `__torch_function__` of a tensor subclass that leaves PyTorch's functions alone.
disabled_torch_function = lookup("torch:_C._disabled_torch_function_impl", _DUALIZE)

# transpose_, unsqueeze_ … change the shape of the tensor itself, which must not reach `__torch_dispatch__`.
no_dispatch = lookup("torch:_C._DisableTorchDispatch", _DUALIZE)

# Forward mode is off inside the forward of an autograd.Function, which shows that a thread is in one.
forward_mode_enabled = lookup("torch:_C._is_fwd_grad_enabled", _DUALIZE)
forward_mode = lookup("torch.autograd.forward_ad:_set_fwd_grad_enabled", _DUALIZE)

# One graph of a whole dual pass. torch 2.11 has it too, but takes no module as an argument.
_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
_COMPILE = "dualize: torch.compile of a dualized module"


def compiler_loaded() -> bool:
    """Whether anything can have been compiled."""
    return "torch._dynamo" in sys.modules


def nonstrict_trace(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as one call of a graph, of which the compiler sees the operators that it executes."""
    if _VERSION < (2, 12):
        return Missing("torch._dynamo.nonstrict_trace of a module", _COMPILE)
    return lookup("torch._dynamo:nonstrict_trace", _COMPILE)(fn)  # loads Dynamo, which takes a second


# The hooks on saved tensors that are set around a pass, which ours must call.
_top_hooks = lookup("torch:_C._autograd._top_saved_tensors_default_hooks", _DUALIZE) or None
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def saved_tensors_hooks_in_force(inner: Callable[[], saved_tensors_hooks]) -> Hooks | None:
    """The (pack, unpack) of the innermost `saved_tensors_hooks`, which hooks pushed after them replace.

    `inner` returns the hooks that will be pushed. A PyTorch without a query for the outer hooks is made to call them,
    by saving a tensor with `inner` set aside.
    """
    if _top_hooks:
        return _top_hooks(True)
    anchor = torch.empty(0, requires_grad=True)

    def pack(x: Tensor) -> Any:
        inner().__exit__(None, None, None)
        try:
            with torch.enable_grad():
                return _Saver.apply(anchor, x)
        finally:
            inner().__enter__()

    return pack, lambda y: y.grad_fn.saved_tensors[0]


class _Saver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()


# What is on and off below autograd, where `__torch_dispatch__` runs.
_force_keys = lookup("torch:_C._ForceDispatchKeyGuard", _DUALIZE)
_at_rest = [lookup(f"torch:_C._dispatch_tls_local_{kind}_set", _DUALIZE) for kind in ("include", "exclude")]
_at_rest = [keys() for keys in _at_rest] if all(_at_rest) else []


def autograd_again() -> AbstractContextManager[Any]:
    """Inside `__torch_dispatch__`, where autograd's keys are off: operators run from the top again.

    The public `enable_reentrant_dispatch` also restores the dispatch key of the Python mode. Where no mode is
    active, an operator with that key stops with an internal error.
    """
    return enable_reentrant_dispatch() if _modes() else _force_keys(*_at_rest)


def functions_by_code() -> dict[Any, list[Any]]:
    """Every autograd.Function there is, by the code of its forward."""
    found: dict[Any, list[Any]] = {}
    classes = list(torch.autograd.Function.__subclasses__())
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        found.setdefault(getattr(inspect.unwrap(cls.forward), "__code__", None), []).append(cls)
    return found


def memory_of(x: Tensor) -> int:
    """A number that tensors share if and only if they share memory."""
    return x.untyped_storage()._cdata if x.layout is torch.strided else -id(x)


def writes_to(x: Tensor) -> int:
    """How often the memory of `x` was written to in place; 0 in inference mode, which does not count."""
    return 0 if x.is_inference() else x._version


def viewed(x: Tensor) -> Tensor:
    """The tensor that `x` is a view of; itself if it is none."""
    return x if x._base is None else x._base


def schema_of(operator: Any) -> Any:
    """An OpOverload's schema."""
    return operator._schema


def is_view(operator: Any) -> bool:
    """Whether an output of an OpOverload is a view of an input, or the input itself, without having been written to."""
    returns = schema_of(operator).returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def overload_of(operator: Any) -> str:
    """ "Tensor" of aten.add.Tensor."""
    return operator._overloadname
