"""Without a GPU the kernels run in Triton's interpreter, which must be asked for before they are defined, or, compiled for the GPU that
PTX_MACHINE names, on the machine of tests/machine.
"""

import importlib.util
import os

import pytest
import torch

PTX_MACHINE = "" if torch.cuda.is_available() else os.environ.get("PTX_MACHINE", "")
if PTX_MACHINE:
    from machine import stand_in

    seed = os.environ.get("PTX_MACHINE_SEED")
    stand_in.install(PTX_MACHINE, seed=int(seed) if seed else None, races=bool(seed))
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        import quick_interpreter

        quick_interpreter.install()


# What an optional extra brings, and the tests that come with it.
NEEDS = {
    "test_peft.py": "peft",
    "test_peft_states.py": "peft",
    "test_peft_mixed.py": "peft",
    "test_peft_formulas.py": "peft",
    "test_peft_dora.py": "peft",
    "test_peft_shared.py": "peft",
    "test_peft_gated.py": "peft",
    "test_peft_bias.py": "torchao",
    "test_peft_qdora.py": "torchao",
    "test_peft_quantised.py": "torchao",
    "test_dequantize.py": "torchao",
    "test_files.py": "peft",
    "test_from_peft.py": "peft",
    "test_packed_files.py": "peft",
    "test_pool.py": "safetensors",
    "test_pool_writes.py": "safetensors",
    "test_files_refusals.py": "peft",
    "test_experts_files.py": "peft",
    "test_peft_experts.py": "peft",
    "test_huggingface.py": "peft",
    "test_inspect.py": "peft",
    "test_trainer.py": "peft",
    "test_bench_peft.py": "peft",
    "test_bench_model.py": "peft",
    "test_bench_slots.py": "peft",
    "test_rehearsal.py": "peft",
    "test_plot.py": "matplotlib",
}
collect_ignore = [file for file, package in NEEDS.items() if importlib.util.find_spec(package) is None]

# The longest files, which begin first, so that one of two workers does not wait for the other's last.
LONGEST = tuple(
    f"test_{name}.py" for name in "compile_only machine kernels segments expand_sum huggingface packed projections distributed".split()
)


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


@pytest.fixture
def launched():
    """Makes a call and names the kernels that it launched, in order."""
    from lora_kernels import launch

    def call(step) -> list[str]:
        seen = []

        def record(kernel, grid, args, options):
            seen.append(kernel.__name__)
            kernel[grid](*args, **options)

        with launch.intercept(record):
            step()
        return seen

    return call


@pytest.fixture
def groups(monkeypatch) -> list[int]:
    """How many layers of one x each call computed together."""
    from lora_kernels import projections

    seen: list[int] = []
    run = projections._forward
    monkeypatch.setattr(projections, "_forward", lambda *args: (seen.append(len(args[1])), run(*args))[1])
    return seen


@pytest.fixture
def without_waiting():
    """Calls a function twice; whatever waits for the GPU in the second call is an error."""

    def call(step):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Tests marked cuda are collected where a GPU is, those marked interpreted where the interpreter is: no skip, it is another suite."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    others = {"interpreted"} if torch.cuda.is_available() else {"interpreted", "cuda"} if PTX_MACHINE else {"cuda"}
    kept, gone = [], []
    for item in items:
        (gone if any(mark.name in others for mark in item.iter_markers()) else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=gone)


@pytest.fixture
def nodes(monkeypatch) -> list:
    """A mark for each call of a gated MLP that was one node."""
    from lora_kernels import gated

    made, apply = [], gated.GatedFunction.apply
    monkeypatch.setattr(gated.GatedFunction, "apply", lambda *args: made.append(1) or apply(*args))
    return made


@pytest.fixture
def stacks(monkeypatch) -> list:
    """The stacks of a mixture's experts that were computed: ("alone", its `Stack`), or ("node", its weight)."""
    from lora_kernels import experts_node

    made, product, apply = [], experts_node.Stack.product, experts_node.ExpertsFunction.apply

    def alone(stack, *args):
        made.append(("alone", stack))
        return product(stack, *args)

    def node(*args):
        made.append(("node", args[6]))
        return apply(*args)

    monkeypatch.setattr(experts_node.Stack, "product", alone)
    monkeypatch.setattr(experts_node.ExpertsFunction, "apply", node)
    return made
