"""The most memory that torch's tensors hold at one time while something runs, whatever the allocator keeps."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _LiveBytes(TorchDispatchMode):
    """The most bytes that storages made under it hold at one time."""

    def __init__(self):
        super().__init__()
        self.seen, self.live, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # A view's storage was seen before, unless it is an input's.
        inputs = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage(), inputs)
        return result

    def _follow(self, storage, inputs: set) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or key in inputs:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def end():
            self.live -= size
            self.seen.discard(key)

        weakref.finalize(storage, end)


def peak_mib(run: Callable[[], object]) -> float:
    """MiB of the storages made while this runs; NumPy's are not seen."""
    with _LiveBytes() as followed:
        run()
    return followed.peak / 2**20
