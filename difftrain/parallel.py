"""Several processes on one model: a replica in each (DDP), or a share of the weights in each (FSDP2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from difftrain.config import Config
from difftrain.model import Transformer
from difftrain.runtime import Runtime


def shard(model: Transformer, config: Config, runtime: Runtime) -> None:
    """Where the configuration wants it, share the parameters out among the processes, in place.

    A block's weights are gathered while it computes; those outside the blocks, the embedding and
    the head among them, stay gathered from the forward pass to the end of the backward pass.
    """
    if config.parallel == "fsdp" and runtime.world_size > 1:
        mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def replicate(model: nn.Module, runtime: Runtime) -> nn.Module:
    """The model as training calls it: with several processes a replica, unless it is sharded already."""
    if runtime.world_size == 1 or is_sharded(model):
        return model
    return DistributedDataParallel(model)


def gradient_sync(network: nn.Module, is_last: bool) -> AbstractContextManager:
    """The context of a micro-batch's passes: gradients meet those of other processes in the last one only."""
    if is_sharded(network):
        network.set_requires_gradient_sync(is_last)
    elif isinstance(network, DistributedDataParallel) and not is_last:
        return network.no_sync()
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights, which an update leaves behind, so that the parameters are the shares."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it where each process holds a part; then every process must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
