"""Fixtures of the losses' tests."""

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of this process alone."""
    meeting = tmp_path_factory.mktemp("alone") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def traffic(monkeypatch):
    """What the kernels of the loss from logits launch and move from here on."""
    from upstream_traffic import Traffic  # imports triton

    counted = Traffic()
    counted.watch(monkeypatch)
    return counted
