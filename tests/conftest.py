"""Without a GPU the kernels run in Triton's interpreter, which must be asked for before they are defined."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU by the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """CUDA-marked tests are collected only where a GPU is: a missing GPU is no skip, it is another suite."""
    if not torch.cuda.is_available():
        gone = [item for item in items if item.get_closest_marker("cuda")]
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=gone)
