"""The CPU as a device of its own: which tensors would lie there, and an error where the host waits for one.

Of a tensor on a real device the host learns nothing without waiting. Here the device's memory is the host's,
so account is kept of what was sent there and of everything computed from it.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# Operations that read a value back, or whose result has a size that only the device knows.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
METHODS = {"tolist", "numpy", "__array__", "cpu"}  # these reach no operation


class SimulatedDevice:
    """Which tensors would lie on the device, and what it was given to do.

    Attributes:
        operations: names of the operations on them, in order.
    """

    def __init__(self):
        self.operations = []
        self._storages = {}  # by address; kept, so that no other tensor takes it

    def put(self, tensors):
        """These tensors lie on the device from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    def holds(self, tensor):
        return tensor.untyped_storage()._cdata in self._storages

    def copy_back(self, tensor):
        """A copy in the host's memory, which it may read."""
        with _disable_current_modes():
            return tensor.clone()

    @contextmanager
    def no_waits(self):
        """Within it, an error where the host waits for the device."""
        with ExitStack() as stack:
            stack.enter_context(_Operations(self))
            stack.enter_context(_Methods(self))
            yield

    def uses(self, *arguments):
        return any(isinstance(t, Tensor) and self.holds(t) for t in tree_leaves(arguments))

    def refuse(self, name):
        raise AssertionError(f"{name} would wait for the device")


class _Operations(TorchDispatchMode):
    def __init__(self, device):
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        device, kwargs = self._device, kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        is_there = device.uses(args, kwargs)
        if is_there and (name in READS or (name.startswith("index") and _has_bool(args[1:2]))):
            device.refuse(name)
        result = function(*args, **kwargs)
        if is_there:
            device.operations.append(name)
            device.put(t for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


class _Methods(TorchFunctionMode):
    def __init__(self, device):
        super().__init__()
        self._device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in METHODS and self._device.uses(args[:1]):
            self._device.refuse(function.__name__)
        return function(*args, **(kwargs or {}))


def _has_bool(indices):
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(indices))
