"""Which arm a call takes, and why: the kernels ("triton") or the chain of library calls ("torch").

Without a measured row the choice follows what is known of the parts. The kernels win where the chain pays extra passes or
launches: dropout (the chain makes a mask and a second x), and few tokens (one launch against three). Elsewhere the
chain's vendor matmul is the safe choice until a measurement on the device says otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import chain, problem
from .operands import aligned, as_matrix, many, matrix
from .problem import Problem, UnsupportedError
from .segments import CPU, Adapters
from .tuning import Arch, Config, lookup, resolve, why_not

FEW_TOKENS = 256
KEPT = 8192  # calls whose arm is remembered, by all that the choice sees of them: to describe one again takes ten times as long
_found: dict[tuple, tuple] = {}
INTERPRETED_NUMPY = "the interpreter of Triton before 3.7 takes no NumPy from 2.4 on (it makes numbers of arrays); install numpy<2.4"
INTERPRETED_BFLOAT16 = "Triton's interpreter multiplies bfloat16 bit patterns (triton #11584), so bfloat16 needs a GPU"


@dataclass(frozen=True)
class Choice:
    """``arm``: "triton", "torch" or "reference"; ``config``: the kernels' or None; ``why``: a sentence for each arm that was weighed."""

    arm: str
    config: Config | None
    why: dict[str, str]

    def __str__(self) -> str:
        lines = [f"impl={self.arm!r}"] + [f"  {arm}: {sentence}" for arm, sentence in self.why.items()]
        if self.config is not None:
            lines.append(f"  config: {self.config}")
        return "\n".join(lines)


@functools.cache
def interpreting() -> bool:
    """Whether Triton's interpreter is on in this process (TRITON_INTERPRET=1): Triton itself reads it once, when kernels are decorated."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None."""
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def version(package: str) -> str:
    return importlib.metadata.version(package)


def _release(package: str) -> tuple[int, ...]:
    """The first two numbers of its version."""
    return tuple(int(number) for number in version(package).split(".")[:2])


@functools.cache
def device_arch(device: torch.device) -> Arch:
    """The `Arch` of a CUDA or ROCm device, asked of torch once per device."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Arch.hip(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    return Arch.cuda(properties.major, properties.minor, shared, properties.multi_processor_count)


def arch_of(device: torch.device) -> tuple[Arch | None, str]:
    """The architecture the kernels would run on for tensors of ``device``, or None and why they cannot."""
    missing = triton_missing()
    if missing:
        return None, f"triton cannot be imported ({missing})"
    if device.type == "cuda":
        return (Arch.interpreter() if interpreting() else device_arch(device)), ""
    if device.type == "cpu" and interpreting():
        return Arch.interpreter(), ""
    return None, f"the tensors are on {device.type}; the kernels need a GPU, or TRITON_INTERPRET=1 set before lora_kernels is imported"


def choose(p: Problem, device: torch.device, impl: str, key: str = "") -> Choice:
    """The choice for a problem; raises UnsupportedError where a named impl, or an explicit config, cannot serve it."""
    arch, why_no_arch = arch_of(device)
    config, origin, reason = None, "", why_no_arch
    if arch is not None:
        config, origin = (Config.from_key(key), "explicit") if key else resolve(p, arch, why_not_here)
        reason = why_not_here(config, p, arch) or ""
    if reason and (impl == "triton" or key):
        raise UnsupportedError(f"impl: 'triton' cannot serve this call: {reason}")
    why = {"reference": "the textbook formula; only where it is named"}
    if impl == "triton" or key:
        why["triton"] = f"named; {origin} configuration" if impl == "triton" else "an explicit config names the kernels"
        return Choice("triton", config, why)
    if impl == "torch":
        why["torch"] = "named"
        return Choice("torch", None, why)
    if arch is None or reason:
        why |= {"triton": f"no: {reason}", "torch": "the chain of library calls"}
        return Choice("torch", None, why)
    row = lookup(p, arch)
    arm, sentence = (row.arm, f"measured faster: {row.source}") if row else unmeasured(p, arch)
    why[arm] = sentence
    return Choice(arm, config if arm == "triton" else None, why)


def why_not_here(config: Config, p: Problem, arch: Arch) -> str | None:
    """`why_not`, and what the Triton of this machine cannot do."""
    if arch.kind == "interpreter" and p.dtype == torch.bfloat16:
        return INTERPRETED_BFLOAT16
    if arch.kind == "interpreter" and _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return INTERPRETED_NUMPY
    if config.expand.pdl and arch.kind == "cuda" and _release("triton") < (3, 5):
        return f"expand.pdl is compiled by Triton from 3.5 on and not by {version('triton')} (its own functions fail)"
    return why_not(config, p, arch)


def unmeasured(p: Problem, arch: Arch) -> tuple[str, str]:
    """The arm where no row of the table says otherwise, and why."""
    if arch.kind == "interpreter":
        return "torch", "faster than interpreting the kernels"
    if p.adapters:
        return "triton", "not measured on this device; the chain would wait for the device to tell each adapter's tokens"
    if p.dropout:
        return "triton", "not measured on this device; with dropout the chain would make a mask, in some 125 launches, and a second x"
    if p.itemsize == 2 and any(row % 16 for row in ((p.K,) if p.w_major == "k" else (p.K, p.N))):
        return "torch", "not measured on this device; rows that are no multiple of 16 numbers would be loaded by two bytes each"
    if p.M <= FEW_TOKENS:
        return "triton", f"not measured on this device; up to {FEW_TOKENS} tokens launches dominate"
    return "torch", "not measured on this device; without dropout, at many tokens, the vendor's matmul is the safe choice"


def plainly_chain(device: torch.device, impl: str, key: str) -> bool:
    """Whether `choose` would say "torch" whatever the sizes: then the call need not be described first, which costs microseconds."""
    return impl == "torch" or (impl == "auto" and not key and device == CPU and not interpreting())


def forward_arm(x, weight, lora_A, lora_B, adapters: Adapters, dropout_p: float, impl: str, key: str):
    """(function, config) that computes a forward pass of x ``[M, K]``, or contiguous ``[..., K]``."""
    if plainly_chain(x.device, impl, key):
        return CHAIN_FORWARD
    return _remembered("forward", weight, problem.describe, (x, weight, lora_A, lora_B), adapters, bool(dropout_p), impl, key)


def down_arm(arm: tuple):
    """(function, config) that computes u alone, of an arm that `forward_arm` chose."""
    run, config = arm
    return CHAIN_DOWN if config is None else (functools.partial(arm_of(None).down, **run.keywords), config)


def backward_arm(dy, x, weight, lora_A, lora_B, u, adapters: Adapters, dropout_p: float, impl: str, key: str):
    """(function, config) that computes a backward pass from dY, as `forward_arm`; operands no gradient uses may be None."""
    if plainly_chain(dy.device, impl, key):
        return CHAIN_BACKWARD
    return _remembered("backward", weight, _describe_dx, (dy, x, weight, lora_A, lora_B, u), adapters, bool(dropout_p), impl, key)


def _remembered(which: str, weight, describe: Callable[..., Problem], operands: tuple, adapters: Adapters, dropout: bool, impl, key):
    """(function, config) of a pass, chosen for the problem that ``describe`` makes of its operands, once for calls that look alike.

    The function keeps the layouts of its launches; what they depend on besides is for `launch` to tell apart.
    """
    device = operands[0].device
    call = (which, *map(matrix, operands), aligned(*operands), many(adapters), dropout, device, impl, key, interpreting())
    found = _found.get(call)
    if found is None:
        choice = choose(describe(*operands, dropout=dropout, adapters=adapters), device, impl, key)
        if choice.arm == "torch":
            found = CHAIN_FORWARD if which == "forward" else CHAIN_BACKWARD
        else:
            found = functools.partial(getattr(arm_of(weight), which), kept={}), choice.config
        if len(_found) >= KEPT:
            _found.clear()
        _found[call] = found
    return found


def _describe_dx(dy, x, weight, lora_A, lora_B, u, *, dropout: bool, adapters: Adapters) -> Problem:
    """dX's problem, as `problem.describe` is the forward pass's."""
    dy, x = as_matrix(dy), as_matrix(x)
    K = lora_A.shape[-1] if lora_A is not None else x.shape[1] if x is not None else dy.shape[1]
    R = u.shape[1] if lora_B is None else lora_B.shape[-1] * adapters.layers
    w = dy if weight is None else problem.one_of(weight)
    return Problem(
        M=adapters.segments.tokens if adapters.segments else dy.shape[0],
        N=K,
        K=dy.shape[1],
        R=R,
        dtype=dy.dtype,
        dropout="uv" if dropout else "",
        x_row_major=dy.stride(-1) == 1,
        w_major=problem.contiguous_axis(w, "k", "n"),
        aligned=problem.descriptors_possible(dy, w, lora_A, lora_B),
        wide=problem.offsets_pass_int32(dy, w),
        adapter_dtype=None if lora_A is None and lora_B is None else (lora_B if lora_A is None else lora_A).dtype,
        base=weight is None and lora_A is not None,
        experts=problem.is_stack(weight),
        packed="k" if adapters.widths else "",
        layers=adapters.layers,
        **problem.segment_fields(adapters),
    )


def forget() -> None:
    """Every choice that was made; for tests that change what choices rest on."""
    _found.clear()


def arm_of(weight: torch.Tensor | None):
    """The module whose ``forward`` and ``backward`` launch the kernels beside this weight."""
    if problem.is_stack(weight):
        from . import launch_experts

        return launch_experts
    from . import launch

    return launch


def without_autocast(device: torch.device):
    """Inside, products have their operands' dtype."""
    on = problem.autocasts(device)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def _without_autocast(which: str):
    """The chain's pass of this name for operands that have their dtypes already, whose gradients accumulate in theirs."""

    def run(first, *args, **others):
        with without_autocast(first.device):
            return getattr(chain, which)(first, *args, **others)

    return run


CHAIN_DOWN = _without_autocast("down"), None
CHAIN_FORWARD = _without_autocast("forward"), None
CHAIN_BACKWARD = _without_autocast("backward"), None
