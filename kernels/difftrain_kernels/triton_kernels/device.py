"""Where kernels run: on the device of their tensors, or in Triton's interpreter."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from .weights import load_penalty


def is_interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, and the kernels run on CPU tensors."""
    return not isinstance(load_penalty, triton.JITFunction)


def on_device(tensor: Tensor):
    """The tensor's device as the current one, as Triton launches where CUDA is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
