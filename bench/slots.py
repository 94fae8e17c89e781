"""Section ``slots``: another adapter for a model that serves, of the model's own layers and files.

model     the frozen model from its file to the device: what an adapter of one's own would cost without LoRA
hotswap   PEFT's `hotswap_adapter`: an adapter from its file into the place of another
add       `AdapterPool.add`: the file read, checked and kept in host memory
copy      as many bytes from host memory to the device in one piece: the floor of what follows
put       `AdapterPool.use` of an adapter that has no slot: into that of another
slot      `AdapterPool.use` of one that has a slot

Wall time until the device has done it; files lie in the system's cache. What put writes is held against the file before anything is timed.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lora_kernels import AdapterPool, LoRAConfig, MultiLoRALinear, apply_lora

from .model import NEEDS, SHAPES, ModelPoint
from .session import Budget, Session, lacks, say, share
from .table import rounded, text_table
from .timing import HostClock, Step, interleave

ARMS = ("model", "hotswap", "add", "copy", "put", "slot")


def points(quick: bool) -> list[ModelPoint]:
    """The whole of a model of 1.2 billion parameters, whose file a machine writes in seconds."""
    shape, ranks = ("tiny", (4,)) if quick else ("1B", (16, 64))
    hidden, mlp, *_, layers = SHAPES[shape]
    return [ModelPoint("slots", f"{shape}, {layers} layers", 0, hidden, mlp, r, shape=shape, built=layers, adapters=3) for r in ranks]


def run(session: Session) -> int:
    """Writes a row for each point and arm, with the adapter's bytes; returns the number of arms that failed."""
    recorder = session.recorder("slots")
    if lacks(recorder, "slots", NEEDS):
        return 0
    table, budget, failed, found = [], Budget(session.seconds), 0, points(session.quick)
    seconds = 0.1 if session.quick else share(session.seconds, len(found), 30.0)
    for point in budget.walk(found):
        with tempfile.TemporaryDirectory() as folder:
            moved, arms, wrong = build(point, session.device, Path(folder))
            if wrong:
                arms, failed = {}, failed + 1
                recorder.add(**point.fields(), arm="put", launch="check", error=wrong)
                say(f"slots FAILED {point}: {wrong}")
            steps = {name: Step(partial(_done, arm, session.device)) for name, arm in arms.items()}
            times, errors = interleave(steps, HostClock(), seconds=seconds, least=3)
        for name, error in errors.items():
            recorder.add(**point.fields(), what="slots", arm=name, launch=HostClock.launch, error=error)
            say(f"slots FAILED {point} {name}: {error}")
        for name, passes in times.items():
            t = passes["forward"]
            recorder.add(
                **point.fields(), what="slots", arm=name, launch=HostClock.launch, ms=t.ms(), rounds=t.rounds, moved_bytes=moved,
                gbs=rounded(moved / t.p50 / 1e6) if name in ("copy", "put") else None,
            )  # fmt: skip
        table.append([f"{point.layer} r={point.r}", *(times[name]["forward"].p50 if name in times else None for name in ARMS)])
        failed += len(errors)
    budget.record(recorder)
    print(text_table(["slots, ms", *ARMS], table), flush=True)
    return failed


def _done(arm: Callable[[], object], device: torch.device) -> None:
    arm()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(point: ModelPoint, device: torch.device, folder: Path) -> tuple[int, dict[str, Callable[[], object]], str]:
    """The bytes of an adapter, the arms, and what is wrong with them. The pool has two slots, and three adapters by turns."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.hotswap import hotswap_adapter
    from transformers import LlamaConfig, LlamaModel

    hidden, mlp, heads, kv_heads, _ = SHAPES[point.shape]
    sizes = dict(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads)
    torch.manual_seed(0)
    with torch.device(device):
        base = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=point.built, vocab_size=8)).to(point.dtype)
    base.save_pretrained(folder / "base")
    config = LoraConfig(r=point.r, lora_alpha=2 * point.r, target_modules="all-linear", init_lora_weights=False)
    own = LlamaModel.from_pretrained(folder / "base", dtype=point.dtype).to(device).requires_grad_(False)
    theirs = get_peft_model(own, config, adapter_name="adapter0", autocast_adapter_dtype=False)
    for i in range(point.adapters):
        if i:
            theirs.add_adapter(f"adapter{i}", config, autocast_adapter_dtype=False)
        theirs.save_pretrained(str(folder), selected_adapters=[f"adapter{i}"])
    for i in range(1, point.adapters):
        theirs.delete_adapter(f"adapter{i}")
    apply_lora(base, LoRAConfig(target_modules="all-linear", r=point.r), num_adapters=2)
    pool = AdapterPool(base)
    for i in range(point.adapters):
        pool.add(f"adapter{i}", folder / f"adapter{i}")
    stacks = [t for m in base.modules() if isinstance(m, MultiLoRALinear) for t in m.adapter(0)]
    moved = sum(t.numel() * t.element_size() for t in stacks)
    host = torch.empty(moved, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(moved, dtype=torch.uint8, device=device)
    places = [torch.empty_like(p, device=device) for name, p in theirs.named_parameters() if "lora_" not in name]
    puts, swaps = itertools.count(), itertools.count()

    def use(name: str) -> None:
        with pool.use([name]):
            pass

    def put() -> None:
        use(f"adapter{next(puts) % point.adapters}")

    def slot() -> None:
        use(next(reversed(pool.resident)))

    def load() -> None:
        model = LlamaModel.from_pretrained(folder / "base", dtype=point.dtype)
        for place, t in zip(places, model.parameters(), strict=True):
            place.copy_(t)  # on a CPU, too, where the file would only be mapped

    arms = {
        "model": load,
        "hotswap": lambda: hotswap_adapter(theirs, str(folder / f"adapter{next(swaps) % point.adapters}"), "adapter0", str(device)),
        "add": lambda: pool.add("new", folder / "adapter0"),
        "copy": lambda: there.copy_(host, non_blocking=True),
        "put": put,
        "slot": slot,
    }
    return moved, arms, wrong(pool, folder)


def wrong(pool: AdapterPool, folder: Path) -> str:
    """What a slot holds that is not in its adapter's file, of each in its turn."""
    from safetensors.torch import load_file

    for name in pool.names:
        (slot,) = pool.slots([name])
        kept = load_file(folder / name / "adapter_model.safetensors")
        for layer, m in pool.model.named_modules():
            if isinstance(m, MultiLoRALinear):
                for part, t in zip("AB", m.adapter(slot), strict=True):
                    if not torch.equal(t.cpu(), kept.pop(f"base_model.model.{layer}.lora_{part}.weight")):
                        return f"check: lora_{part} of {layer} is not {name}'s"
        if kept:
            return f"check: no layer for {sorted(kept)} of {name}"
    return ""
