"""A patched model under DDP and FSDP2: two processes' gradients are those of one, or the head is refused."""

import pytest
import torch
import torch.distributed as dist

from difftrain.errors import UserError
from difftrain.hf import patch
from hf_models import Tiny, V, batch_of
from processes import run_in_processes

MASK_ID = V - 1
WAYS = ["ddp", "sharded after", "sharded before", "head by itself"]


def sharded(way):
    from torch.distributed.fsdp import fully_shard

    model = Tiny().double()
    if way == "ddp":
        return torch.nn.parallel.DistributedDataParallel(patch(model, MASK_ID, pk=0.25, pm=0.5))
    if way != "sharded before":
        patch(model, MASK_ID, pk=0.25, pm=0.5)
    for module in [model.mix, model.head] if way == "head by itself" else [model.mix]:
        fully_shard(module)
    fully_shard(model)
    if way == "sharded before":
        patch(model, MASK_ID, pk=0.25, pm=0.5)
    return model


def gradients_of(rank, way):
    """The whole gradient of each parameter, where each process has rows of its own."""
    model = sharded(way)
    x, y = batch_of((4, 9))
    mine = slice(2 * rank, 2 * rank + 2)
    normalizer = (y != -100).sum() / dist.get_world_size()
    model(input_ids=x[mine], labels=y[mine], normalizer=normalizer)["loss"].backward()
    return [p.grad if way == "ddp" else p.grad.full_tensor() for p in model.parameters()]


def said_to_a_part(rank):
    """What a call says where nobody gathers a split head."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model = patch(Tiny(), MASK_ID)
    split = distribute_tensor(model.head.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    model.head.weight = torch.nn.Parameter(split)
    x, y = batch_of()
    try:
        model(input_ids=x, labels=y)
    except UserError as error:
        return str(error)
    return ""


def work(rank):
    return {way: gradients_of(rank, way) for way in WAYS} | {"part": said_to_a_part(rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_in_processes(2, work, tmp_path_factory.mktemp("processes"))


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_gradients_of_one(way, found):
    model = patch(Tiny().double(), MASK_ID, pk=0.25, pm=0.5)
    x, y = batch_of((4, 9))
    model(input_ids=x, labels=y)["loss"].backward()
    for result in found:
        for ours, alone in zip(result[way], model.parameters(), strict=True):
            torch.testing.assert_close(ours, alone.grad, rtol=0, atol=1e-12)


@pytest.mark.xdist_group("processes")
def test_a_part_of_the_head_is_refused_in_one_line(found):
    for result in found:
        assert "must be whole while the model runs, got a part: DTensor of shape (97, 32)" in result["part"]
        assert "\n" not in result["part"]


def test_an_empty_local_weight_is_refused():
    """What DeepSpeed leaves of a parameter, and FSDP1 of one that another process holds."""
    model = patch(Tiny(), MASK_ID)
    model.head.weight.data = torch.empty(0)
    x, y = batch_of()
    with pytest.raises(UserError, match=r"must be whole while the model runs, got a part: .* \(0,\)"):
        model(input_ids=x, labels=y)
