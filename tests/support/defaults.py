"""What libraries change for the whole program while they load models: torch's default dtype and device."""

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


CHANGED = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta for the program": lambda: default_device("meta"),
    "meta in a context": lambda: torch.device("meta"),
}
UNDER_EACH_DEFAULT = pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
