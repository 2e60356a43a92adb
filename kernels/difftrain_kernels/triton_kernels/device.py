"""Where kernels run: on the device of their tensors, or in Triton's interpreter."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from .weights import load_penalty

_HERE = nullcontext()


def is_interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, and the kernels run on CPU tensors."""
    return not isinstance(load_penalty, triton.JITFunction)


def on_device(tensor: Tensor):
    """The tensor's device as the current one, as Triton launches where CUDA is."""
    is_here = not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
    return _HERE if is_here else torch.cuda.device(tensor.device)
