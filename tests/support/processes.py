"""Run a function in several gloo processes and bring back what each returned."""

import gc
import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(n, function, folder):
    """``function(rank)`` in ``n`` processes joined by gloo; what they returned, in the order of ranks.

    ``function`` must stand at the top of a module; what it returns must be savable by torch. An
    error in one process ends all and is raised here. The processes meet in a file below ``folder``:
    no port is taken.
    """
    folder = tempfile.mkdtemp(prefix="processes-", dir=folder)
    _serve()
    mp.start_processes(_enter, (n, function, folder), nprocs=n, start_method="forkserver")
    return [torch.load(f"{folder}/result-{rank}.pt", weights_only=False) for rank in range(n)]


def _serve():
    """A server that has imported everything once forks all processes: none of them starts from nothing."""
    modules = ["pytest", "torch.distributed.tensor", "difftrain.training.loop"]
    multiprocessing.set_forkserver_preload(modules)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # ours, not an installed copy
        forkserver.ensure_running()


def _enter(rank, n, function, folder):
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.make_faithful()
        interpreter.make_quick()
    # As torchrun says it; device meshes warn where LOCAL_RANK is missing.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    try:
        torch.save(function(rank), f"{folder}/result-{rank}.pt")
    finally:
        gc.collect()  # replicas go before their group
        dist.destroy_process_group()
