"""Which bytes of CPU tensors hold something, while a session lasts: torch.empty makes bytes that hold nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

EMPTY = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip


def mark(mask: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Set the mask of a storage's bytes where the tensor has elements."""
    _elements(mask, tensor)[...] = True
    return mask


def _elements(mask: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The mask of the tensor's elements, a view (*shape, bytes of an element)."""
    size = tensor.element_size()
    return np.lib.stride_tricks.as_strided(
        mask[tensor.storage_offset() * size :],
        (*tensor.shape, size),
        (*(stride * size for stride in tensor.stride()), 1),
    )


@dataclass
class _New:
    """A storage that came into being in the session."""

    storage: torch.UntypedStorage  # kept, so that no other gets its address
    known: np.ndarray  # which bytes hold something
    passed: np.ndarray  # which were elements of a kernel's argument


class Contents(TorchDispatchMode):
    """Follows what torch makes and writes; launches tell what they wrote."""

    def __init__(self):
        super().__init__()
        self.new: dict[int, _New] = {}
        self.faults: Counter = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is traced in a session; torch would import its whole compiler to mark this, which takes seconds.
        return False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = [r.alias_info for r in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in results)
        is_inplace = any(alias is not None and alias.is_write for alias in results)
        if not (is_view or is_inplace or function in EMPTY):
            for tensor in tree_leaves((arguments, options)):
                if isinstance(tensor, Tensor):
                    self._check_known(tensor, str(function))
        made = function(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not is_view and tensor.layout == torch.strided:
                if function in EMPTY:
                    self.bytes_of(tensor)[:] = 0xFF  # NaN, in every float type
                self._note_made(tensor, is_known=function not in EMPTY)
        return made

    def _note_made(self, tensor: Tensor, is_known: bool) -> None:
        storage = tensor.untyped_storage()
        start, n = storage.data_ptr(), storage.nbytes()
        if start not in self.new:
            self.new[start] = _New(storage, np.zeros(n, bool), np.zeros(n, bool))
        if is_known and tensor.numel():
            mark(self.new[start].known, tensor)

    def _check_known(self, tensor: Tensor, where: str) -> None:
        new = self.new.get(tensor.untyped_storage().data_ptr())
        if new is not None and tensor.numel() and not (known := _elements(new.known, tensor)).all():
            self.faults["undefined read", "", where] += int((~known).sum())

    def is_new(self, tensor: Tensor) -> bool:
        """Whether its storage came into being in the session."""
        return tensor.untyped_storage().data_ptr() in self.new

    def known(self, start: int) -> np.ndarray | bool:
        """Which bytes of a storage hold something; of one from before the session, all."""
        return self.new[start].known if start in self.new else True

    def note_passed(self, tensor: Tensor) -> None:
        if self.is_new(tensor) and tensor.numel():
            mark(self.new[tensor.untyped_storage().data_ptr()].passed, tensor)

    def note_written(self, start: int, was_written: np.ndarray) -> None:
        if start in self.new:
            self.new[start].known |= was_written

    def check_all_written(self) -> None:
        """Every element of a new tensor that a kernel was given holds something in the end."""
        for new in self.new.values():
            if (missing := new.passed & ~new.known).any():
                self.faults["output not written", "", f"{missing.sum()} of {len(missing)} bytes"] += 1

    @staticmethod
    def bytes_of(tensor: Tensor) -> np.ndarray:
        """The bytes of its storage, not copied."""
        with torch.utils._python_dispatch._disable_current_modes():
            return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
