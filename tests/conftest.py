"""Without a GPU the kernels run in Triton's interpreter, which must be asked for before they are defined."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# What an optional extra brings, and the tests that come with it.
NEEDS = {
    "test_peft.py": "peft",
    "test_peft_states.py": "peft",
    "test_peft_mixed.py": "peft",
    "test_peft_formulas.py": "peft",
    "test_files.py": "peft",
    "test_files_refusals.py": "peft",
    "test_huggingface.py": "peft",
    "test_inspect.py": "peft",
    "test_trainer.py": "peft",
    "test_bench_peft.py": "peft",
    "test_plot.py": "matplotlib",
}
collect_ignore = [file for file, package in NEEDS.items() if importlib.util.find_spec(package) is None]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU by the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def as_on_a_users_cpu(monkeypatch):
    """Without Triton's interpreter, which the other tests ask for; one thread, for the tensors are small."""
    from lora_kernels import dispatch

    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Tests marked cuda are collected where a GPU is, tests marked interpreted where none is: no skip, it is another suite."""
    other = "interpreted" if torch.cuda.is_available() else "cuda"
    gone = [item for item in items if item.get_closest_marker(other)]
    items[:] = [item for item in items if not item.get_closest_marker(other)]
    config.hook.pytest_deselected(items=gone)
