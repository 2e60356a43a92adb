"""Taking the contents of tensors away: on meta, or as fake tensors, with or without their mode around."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

KINDS = ("meta", "fake", "fake outside its mode", "fake cuda")


class Contents:
    """One of ``KINDS``; ``within`` is the context in which its tensors are used."""

    def __init__(self, kind, device):
        self.device = {"meta": torch.device("meta"), "fake cuda": torch.device("cuda:0")}.get(kind, device)
        self.mode = None if kind == "meta" else FakeTensorMode()
        self.within = self.mode if kind in ("fake", "fake cuda") else nullcontext()

    def removed(self, arguments):
        """The same arguments, tensors without contents and on the device of this kind."""
        return {name: self._empty(v) if isinstance(v, Tensor) else v for name, v in arguments.items()}

    def _empty(self, tensor):
        options = {"dtype": tensor.dtype, "device": self.device}
        with self.mode or nullcontext():
            made = torch.empty_strided(tensor.shape, tensor.stride(), **options)
        return made.requires_grad_(tensor.requires_grad)

    def check(self, found, expected):
        """That a tensor has no contents, and all else of ``expected`` but its device."""
        assert isinstance(found, FakeTensor) == bool(self.mode)
        assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, self.device)
