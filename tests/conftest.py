"""Shared fixtures: the device the loss is tested on, and reproducible random numbers."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA where there is one, else the CPU; the same tests run on both."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(1234)
