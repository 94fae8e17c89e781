"""Random calls: sizes, strides, dtypes, ranks, batches and configurations that nobody thought of together. RANDOM_CASES: how many.

A call of few numbers may pass or miss the usual budget by luck, so it is held to the bound that holds for each element, too:
rounding errors are at most so many units in the last place of the sum of the magnitudes that an element is made of.
"""

import os
import random
from dataclasses import replace

import pytest
import torch

from lora_kernels import dispatch, parity, parity_cases
from lora_kernels.parity import Case
from lora_kernels.problem import MAX_RANK, UnsupportedError
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARCH, _ = dispatch.arch_of(DEVICE)
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (ARCH is not None and ARCH.kind != "interpreter")
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 90)
RANKS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 33, 64, 65, 100, 130)
COUNT = int(os.environ.get("RANDOM_CASES", "60"))


def config(one: random.Random, segments: bool) -> Config:
    """Any, valid or not."""
    pick = one.choice
    expand = Expand(
        pick((16, 16, 32, 64)), pick((16, 32, 64)), pick((16, 32)), pick((1, 2, 3, 8)), pick((1, 1, 2, 3)), 4, pick((1, 2, 3)),
        u=pick(("given", "given", "loop", "awaited")), base=pick(("kernel", "kernel", "library")), tma=pick((False, False, True)),
        persistent=pick((False, True)), pdl=pick((False, False, True)), masked=segments and pick((False, True)),
        each=segments and pick((False, True)),
    )  # fmt: skip
    shrink = Shrink(pick((16, 32)), pick((16, 32, 64)), pick((1, 1, 2, 3, 5)), num_stages=pick((1, 2, 3)))
    wgrad = Wgrad(pick((16, 32, 64)), pick((16, 32)), pick((1, 2, 3, 7)), num_stages=pick((1, 2)), beside=pick(("", "", "stream", "pdl")))
    return Config(shrink, expand, wgrad)


def drawn(one: random.Random) -> Case:
    """Any call, and perhaps a configuration for it."""
    pick, either = one.choice, (True, False)
    M, N, K, R = pick(SIZES), pick(SIZES), pick(SIZES), pick(RANKS)
    adapters, impl = pick((0, 0, 1, 2, 5, 9, 20)), pick(("triton",) * 5 + ("torch", "auto"))
    case = Case(
        M, N, K, R, pick(DTYPES), pick((0.0, 0.1, 0.5)), bias=pick(either), scale=pick((1.7, -0.5, 0.0, 16.0)),
        layout=pick(("contiguous", "contiguous", "transposed", "sliced", "expanded")), impl=impl,
        adapters=adapters, popularity=pick(("mixed", "distinct", "runs", "one", "none")), mixed_ranks=bool(adapters) and pick(either),
    )  # fmt: skip
    if impl == "torch" and case.layout != "sliced" and pick(either):  # sliced: oneDNN reads the poison beside (docs/numerics.md)
        case = replace(case, dtype=torch.bfloat16)
    if case.dtype != torch.float32 and pick((True, False, False)):
        case = replace(case, adapter_dtype=torch.float32)
    if case.impl == "triton" and pick((True, True, False)):
        case = replace(case, config=config(one, bool(adapters)))
    kind = pick(("plain", "plain", "plain", "base", "packed", "layers", "experts"))
    if kind == "experts" and adapters:
        k = pick((1, 2, 3))
        case = replace(case, experts=True, top_k=k, M=M * k)
        if case.config:  # that kernel has one way to run
            e, rows = case.config.expand, pick((16, 32))
            plain = Expand(rows, e.block_n, e.block_k, e.group_m, num_warps=4, num_stages=e.num_stages)
            case = replace(case, config=Config(replace(case.config.shrink, block_m=rows), plain, replace(case.config.wgrad, beside="")))
    elif kind == "layers" and not adapters:
        case = replace(case, layers=pick((2, 3)))
    elif kind == "packed" and N >= 3:
        ends = sorted(one.sample(range(1, N), pick((1, 2))))
        case = replace(case, widths=tuple(b - a for a, b in zip([0, *ends], [*ends, N], strict=True)), base=pick((True, False, False)))
        case = replace(case, R=min(R, MAX_RANK // len(case.widths)))
    elif kind == "base":
        case = replace(case, base=True)
    if case.base and case.config:
        e = replace(case.config.expand, base="library", u="given", tma=False, pdl=False, split=1)
        case = replace(case, config=replace(case.config, expand=e, wgrad=replace(case.config.wgrad, beside="")))
    return case


def within_magnitudes(case: Case) -> bool:
    """Whether no element errs by more than its roundings can make of the magnitudes that it sums."""
    tensors = parity.inputs(case, DEVICE)
    ours, truth = parity.evaluate(case, tensors, case.impl), parity.evaluate(case, tensors, "reference", torch.float64)
    positive = {name: t if t is None else t.abs() for name, t in tensors.items()}
    sizes = parity.evaluate(replace(case, scale=abs(case.scale)), positive, "reference", torch.float64)
    unit, unit32 = torch.finfo(case.dtype).eps, torch.finfo(torch.float32).eps
    for name, own, true, size in zip(parity.TENSORS, ours, truth, sizes, strict=True):
        allowed = 2 * unit + case.terms(name) * unit32
        if own is not None and not ((own.double() - true).abs() <= allowed * size + torch.finfo(case.dtype).tiny).all():
            return False
    return True


@pytest.mark.parametrize("seed", range(COUNT))
def test_any_call(seed):
    one = random.Random(seed)
    for _ in range(100):
        case = drawn(one)
        if not parity_cases._served(case, ARCH):
            continue
        try:
            result = parity.run_case(case, DEVICE)
        except UnsupportedError:  # of the configuration, which `_served` does not see whole
            assert case.config is not None
            continue
        assert result.launches > 0 or case.impl != "triton"
        assert result.ok or within_magnitudes(case), f"{case}: {result.detail} {result.errors}"
        return
    pytest.fail("no call of a hundred was served")
