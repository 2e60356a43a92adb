"""A vocabulary split over processes that are not there: without contents nobody is asked."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from contents import Contents
from every_loss import IMPLS, V, arguments_of, call


@pytest.fixture
def one_of_three():
    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_of_three")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["meta", "fake", "fake outside its mode"])
def test_a_slice_without_contents_has_results_without_contents_and_asks_nobody(
    impl, kind, monkeypatch, device
):
    def refuse(*_, **__):
        raise AssertionError("a collective")

    for name in ("all_gather_single", "all_gather_into_tensor"):
        if hasattr(dist, name):
            monkeypatch.setattr(dist, name, refuse)
    contents, way = Contents(kind, device), ("parallel", impl)
    arguments = arguments_of(way, device)
    arguments["logits"] = arguments["logits"][:, 3:7].requires_grad_()
    empty = contents.removed(arguments | {"slice_sizes": [3, 4, V - 7]})
    with contents.within:
        loss, cases = call(way, empty, return_cases=True)
        loss.backward()
    contents.check(loss, torch.zeros((), device=device))
    contents.check(cases.nll, torch.zeros(3, 3, device=device))
    contents.check(empty["logits"].grad, arguments["logits"])
