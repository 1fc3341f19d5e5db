"""What a forward keeps for its backward."""

from collections.abc import Callable

import torch


def saved_bytes(fn: Callable[[], object]) -> int:
    """Bytes that the backward of `fn` keeps; one storage counts once."""
    storages: dict[int, int] = {}
    kept = []

    def pack(a):
        storages[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
        kept.append(a)
        return a

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        kept.append(fn())
    return sum(storages.values())
