"""Cases that several gloo processes run together on the CPU, each held to one process.

`run_all` starts four processes once; two of them run the cases of two, then all four theirs. Truth is the reference in one process in
float64, and the budget that of `lora_kernels.parity`: twice the error of the reference in the dtype under test, and the roundings.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import lora_kernels.multi
import lora_kernels.nn
from lora_kernels import FusedLoRALinear, chain, lora_linear, parity

WORLDS = (2, 4)
CASES: dict[str, Callable[[], None]] = {}


def load() -> None:
    """Import the files of cases, which register them."""
    for name in ("ranks_data", "ranks_tensor", "ranks_dropout"):
        importlib.import_module(name)


def case(*worlds: int):
    """Register a function as a case of these numbers of processes."""

    def register(function):
        for world in worlds:
            CASES[f"{function.__name__}[{world}]"] = function
        return function

    return register


class Mlp(nn.Module):
    """Two LoRA layers and what lies between; B is not zero, so that every gradient is alive."""

    def __init__(self, K=24, N=40, r=4, **kwargs):
        super().__init__()
        self.up = FusedLoRALinear(K, N, r=r, lora_alpha=6, init_lora_weights=False, **kwargs)
        self.down = FusedLoRALinear(N, K, r=r, lora_alpha=6, init_lora_weights=False, **kwargs)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


def drawn(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    """Normal numbers, the same on every rank and in every dtype, without touching torch's own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def batch(seed: int, *shape: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, dY) of a batch."""
    return drawn(seed, *shape, dtype=dtype), drawn(seed + 1000, *shape, dtype=dtype)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each trained parameter, whole."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


@contextlib.contextmanager
def arm(impl: str, *modules) -> Iterator[None]:
    """Inside, the layers call `lora_linear` by this impl."""
    modules = modules or (lora_kernels.nn, lora_kernels.multi)
    for module in modules:
        module.lora_linear = functools.partial(lora_linear, impl=impl)
    try:
        yield
    finally:
        for module in modules:
            module.lora_linear = lora_linear


def hold(ours: dict, model: nn.Module, step: Callable[[nn.Module], dict]) -> None:
    """Assert that each tensor of ours is within its budget of what ``step`` gives in one process.

    ``step`` takes a plain model and returns a dict of tensors. It is run by the reference, in the model's dtypes and in float64.
    """
    with arm("reference"):
        same, truth = step(copy.deepcopy(model)), step(copy.deepcopy(model).double())
    assert ours.keys() == truth.keys(), f"{sorted(ours)}, {sorted(truth)}"
    for name, true in truth.items():
        assert ours[name].shape == true.shape and true.any(), f"{name}: {list(ours[name].shape)}, {list(true.shape)}"
        used = parity.budget_used(ours[name].detach(), same[name].detach(), true.detach())
        assert used <= 1, f"{name} uses {used:.2f} of its budget"


@contextlib.contextmanager
def library_calls() -> Iterator[dict[str, int]]:
    """Counts the calls of the chain of library calls, the arm of plain tensors on a CPU."""
    count, real = {"forward": 0, "backward": 0}, (chain.forward, chain.backward)

    def counting(name, function):
        def call(*args):
            count[name] += 1
            assert all(type(t) in (torch.Tensor, nn.Parameter) for t in args if isinstance(t, torch.Tensor)), "operators see plain tensors"
            return function(*args)

        return call

    chain.forward, chain.backward = counting("forward", real[0]), counting("backward", real[1])
    try:
        yield count
    finally:
        chain.forward, chain.backward = real


@contextlib.contextmanager
def raises(error: type[Exception], words: str) -> Iterator[None]:
    """pytest.raises for a rank: the message holds the words."""
    try:
        yield
    except error as raised:
        assert words in str(raised), str(raised)
    else:
        raise AssertionError(f"wanted a {error.__name__}: {words}")


def run_rank(rank: int, folder: Path) -> None:
    """Run the wanted cases of this rank in order, until one fails: the others then wait for nobody."""
    torch.set_num_threads(1)
    wanted = json.loads((folder / "wanted").read_text())
    for world in WORLDS:
        if rank >= world:
            continue
        store = f"file://{folder}/store{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
        for name in [name for name in wanted if name.endswith(f"[{world}]")]:
            torch.manual_seed(0)
            error, started = "", time.perf_counter()
            try:
                CASES[name]()
            except Exception:
                error = f"rank {rank}: {traceback.format_exc()}"
            outcome = {"error": error, "seconds": time.perf_counter() - started}
            (folder / f"{name}.{rank}").write_text(json.dumps(outcome))
            if error:
                os._exit(1)
        dist.barrier()
        dist.destroy_process_group()


def run_all(wanted: list[str]) -> dict[str, str]:
    """Each wanted case's errors, "" where every rank passed."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wanted").write_text(json.dumps(wanted))
        with (folder / "log").open("w") as log:
            command = "import sys, pathlib, ranks; ranks.load(); ranks.run_rank(int(sys.argv[1]), pathlib.Path(sys.argv[2]))"
            started = [
                subprocess.Popen([sys.executable, "-c", command, str(rank), name], cwd=here.parent, env=environment, stdout=log, stderr=log)
                for rank in range(max(WORLDS))
            ]
            deadline = time.monotonic() + 300
            while any(p.poll() is None for p in started):
                if any(p.poll() for p in started):  # one failed; the others have this long to notice
                    deadline = min(deadline, time.monotonic() + 10)
                if time.monotonic() > deadline:
                    for p in started:
                        p.kill()
                time.sleep(0.1)
        return {case: outcome(folder, case) for case in wanted}


def outcome(folder: Path, name: str) -> str:
    """What a case's ranks wrote, in words."""
    world = int(name[:-1].rsplit("[", 1)[1])
    files = [folder / f"{name}.{rank}" for rank in range(world)]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    errors = [each["error"] for each in found if each["error"]]
    if len(found) < world:
        errors.append(
            f"{world - len(found)} of {world} ranks did not come to an end; the log ends:\n{(folder / 'log').read_text()[-3000:]}"
        )
    return "\n".join(errors)
