"""The host's part of a call by compiled kernels, launching nothing: ``python tests/launch_cost.py [--arch sm_90] [--launcher]``

Triton compiles for a GPU that need not be there and looks up what it compiled as it would on one; then nothing is launched. With
``--launcher`` Triton's own C launcher is in the numbers, as gcc builds it, in front of a driver that does nothing (machine/cuda_stub.c);
without it, a Python function in its place. Best of 15 rounds, one thread, bfloat16, 8 tokens, 64 -> 64, r = 16; run by hand. With
backward it is a layer's part of eight in a row, for what autograd does once a step is not a layer's.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ["TRITON_INTERPRET"] = "0"

import torch  # noqa: E402
import triton  # noqa: E402
from machine import cuda_stub, driver, stand_in  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver as runtime  # noqa: E402

from lora_kernels import FusedLoRALinear, Segments, launch, lora_linear  # noqa: E402

K, N, R, M, E = 64, 64, 16, 8, 8
LAYERS = 8


def launch_nothing(arch: str) -> None:
    """Loads a compiled kernel once, as on a GPU, where the stand-in has no handles to keep."""
    stand_in.install(arch)
    own = CompiledKernel._init_handles

    def once(self) -> None:
        if self.module is None:
            own(self)
            self.module = self

    CompiledKernel._init_handles = once
    driver.Launcher.__call__ = lambda self, *args: None


def launch_into_a_stub(arch: str, folder: str) -> ctypes.CDLL:
    """Triton's launcher, built as on a GPU; the library counts its launches (``stub_launches``)."""
    library = cuda_stub.build(folder)
    stub = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)  # what is loaded under this name is what is linked
    stand_in.install(arch)

    class Driver(driver.Driver):
        def __init__(self, capability: int):
            self.capability, self.utils, self.launcher_cls = capability, CudaUtils(), CudaLauncher

        def get_current_device(self):
            return 0

    runtime.set_active(Driver(runtime.active.capability))
    return stub


def best(call: Callable[[], object], calls: int = 200, rounds: int = 15) -> float:
    """Microseconds."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append(1e6 * (time.perf_counter() - start) / calls)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90", help="whose kernels (default sm_90)")
    parser.add_argument("--launcher", action="store_true", help="with Triton's own launcher; needs gcc")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stub = launch_into_a_stub(args.arch, folder) if args.launcher else launch_nothing(args.arch)
        report(stub)


def peft_layers() -> dict[str, torch.nn.Module]:
    """PEFT's layer with E adapters, fused and as it is: its own time has the CPU's arithmetic in it, and no launch, which costs more."""
    import peft

    from lora_kernels.integrations.peft import fuse

    config = peft.LoraConfig(target_modules=["0"], r=R, lora_alpha=R)
    found = []
    for _ in range(2):
        base = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16))
        found.append(peft.get_peft_model(base, config, "0", autocast_adapter_dtype=False).eval())
        for e in range(1, E):
            found[-1].add_adapter(str(e), config, autocast_adapter_dtype=False)
    fuse(found[0])
    return {name: model.base_model.model[0] for name, model in zip(("PEFT's, fused", "PEFT's own"), found, strict=True)}


def report(stub: ctypes.CDLL | None) -> None:
    torch.set_num_threads(1)
    drawn = [torch.randn(shape, dtype=torch.bfloat16) for shape in ((M, 1, K), (N, K), (R, K), (N, R), (E, R, K), (E, N, R))]
    x, weight, A, B, As, Bs = drawn
    segments, scales = Segments.from_ids(torch.arange(M) % E, E), torch.ones(E)
    layer = FusedLoRALinear(K, N, bias=False, r=R, dtype=torch.bfloat16)
    of_peft = peft_layers() if importlib.util.find_spec("peft") else {}
    modules = {"FusedLoRALinear": layer} | of_peft
    named = [str(m % E) for m in range(M)]
    batches = {f"{name}, {E} in a batch": partial(layer, adapter_names=named) for name, layer in of_peft.items()}
    arms = {
        "one adapter": lambda x: lora_linear(x, weight, A, B, impl="triton"),
        "eight adapters": lambda x: lora_linear(x, weight, As, Bs, scale=scales, segments=segments, impl="triton"),
        **modules,
    }
    print(f"Triton {triton.__version__}, torch {torch.__version__}: us a call, and without Triton's part")
    for name, arm in (arms | batches).items():
        with torch.no_grad():
            show(f"{name}, forward", partial(arm, x), stub)
    trained = [x, A, B, As, Bs, *(p for module in modules.values() for p in module.parameters() if p.requires_grad)]
    for t in trained:
        t.requires_grad_()
    for name, arm in arms.items():
        show(f"{name}, and backward", lambda arm=arm: torch.autograd.grad(in_a_row(arm, x), trained, x, allow_unused=True), stub, LAYERS)


def in_a_row(arm: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for _ in range(LAYERS):
        x = arm(x)
    return x


def show(what: str, call: Callable[[], object], stub: ctypes.CDLL | None, layers: int = 1) -> None:
    call()
    before = launch.launches, 0 if stub is None else stub.stub_launches()
    call()
    number = launch.launches - before[0]
    assert stub is None or stub.stub_launches() - before[1] == number
    whole = best(call, 200 // layers) / layers
    with launch.intercept(lambda *launched: None):
        own = best(call, 200 // layers) / layers
    print(f"{what:36} {number // layers} launches  {whole:6.1f}  {own:6.1f}")


if __name__ == "__main__":
    main()
