"""Run a function in several gloo processes and bring back what each returned."""

import multiprocessing
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(n, function, folder):
    """``function(rank)`` in ``n`` processes joined by gloo; what they returned, in the order of ranks.

    ``function`` must stand at the top of a module; what it returns must be savable by torch. An
    error in one process ends all and is raised here. The processes meet in a file of ``folder``:
    no port is taken.
    """
    # A server that has imported torch once forks them all: half the time of a start from nothing each.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed.tensor"])
    mp.start_processes(_enter, (n, function, str(folder)), nprocs=n, start_method="forkserver")
    return [torch.load(f"{folder}/result-{rank}.pt", weights_only=False) for rank in range(n)]


def _enter(rank, n, function, folder):
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.make_faithful()
    os.environ["LOCAL_RANK"] = str(rank)  # read by device meshes, which warn where it is missing
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    try:
        torch.save(function(rank), f"{folder}/result-{rank}.pt")
    finally:
        dist.destroy_process_group()
