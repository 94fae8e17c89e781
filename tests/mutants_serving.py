"""The slips of `mutation.py` in serving a model, and all slips together."""

from __future__ import annotations

from dataclasses import replace

import mutants_packed
from mutants import Mutant

SERVING, POOL, LAYER, FILES, STREAMS, SEGMENTS = "serving.py", "pool.py", "multi.py", "files.py", "streams.py", "segments.py"
STACKS = "slots.py"

SERVED = [
    Mutant("serving: one plan for all lengths", SERVING, "key = tokens, *place,", "key = None, *place,"),
    Mutant("serving: one plan for all numbers of slots", SERVING, "place = x.device, num_adapters", "place = x.device, 5"),
    Mutant("serving: a plan of inference mode's for training", STREAMS,
           "return stream, torch.is_inference_mode_enabled()", "return stream, False"),
    Mutant("serving: a plan for each call", SERVING, "if plan is None:", "if True:"),
    Mutant("serving: tokens in turn", SEGMENTS, "repeat_interleave(tokens, output_size=adapters.shape[0] * tokens)", "repeat(tokens)"),
    Mutant("serving: any number of sequences", SERVING, "x.dim() < 2 or x.shape[0] != sequences", "x.dim() < 2"),
    Mutant("serving: a step's plan for any length", SERVING, "if tokens == 1 and place in self.steps", "if place in self.steps"),
    Mutant("serving: no plan for steps", SERVING, "if tokens == 1 and place in self.steps", "if False"),
    Mutant("serving: captured", SERVING, "if x.is_cuda and torch.cuda.is_current_stream_capturing():", "if False:"),
    Mutant("serving: a second user", SERVING, "if layer.plans is not None]", "if False]"),
    Mutant("serving: in use after an error", SERVING, "    finally:\n        give(layers, None)", "    finally:\n        pass"),
    Mutant("serving: ids unchecked", SERVING, "if not -1 <= i < layer.num_adapters]", "if False]"),
    Mutant("serving: ids above unchecked", SERVING, "if not -1 <= i < layer.num_adapters]", "if not -1 <= i]"),
    Mutant("serving: ids that change", SERVING, "ids.to(torch.int32, copy=True)", "ids.to(torch.int32)"),
    Mutant("serving: truths are numbers", SEGMENTS, "not isinstance(v, int) or isinstance(v, bool)]", "not isinstance(v, int)]"),
    Mutant("serving: a copy is in use", LAYER, 'if name != "plans"}', "if True}"),
    Mutant("serving: a plan given is replaced", LAYER, "if segments is None and self.plans is not None", "if self.plans is not None"),
    Mutant("pool: whoever comes writes", POOL,
           "with exclusive(self.model) as layers:\n            return",
           "for layers in [layers_of(self.model)]:\n            return"),
    Mutant("pool: slots are written before the model is taken", POOL, "        with exclusive(self.model) as layers:\n            give",
           "        self._take(names, layers_of(self.model))\n        with exclusive(self.model) as layers:\n            give"),
    Mutant("pool: the one named last makes room", POOL, "next(iter(self._slots))", "next(reversed(self._slots))"),
    Mutant("pool: first come, first out", POOL, "self._slots[name] = self._slots.pop(name)", "pass"),
    Mutant("pool: a slot is lost where a write fails", POOL, "self._free.append(slot)  # free", "pass  # free"),
    Mutant("pool: half an adapter serves", POOL, "self._free.append(slot)  # free", "self._slots[name] = slot  # free"),
    Mutant("pool: the file itself", POOL, "else torch.Tensor.clone", "else torch.Tensor.detach"),
    Mutant("pool: not page-locked", POOL,
           "own = torch.Tensor.pin_memory if self._pins else torch.Tensor.clone", "own = torch.Tensor.clone"),
    Mutant("pool: a copy is waited for", POOL, "non_blocking=True)", "non_blocking=False)"),
    Mutant("files: a copy is not waited for", FILES, "non_blocking: bool = False) -> None:", "non_blocking: bool = True) -> None:"),
    Mutant("pool: a reset draws", POOL, "reset=False", "reset=True"),
    Mutant("pool: an old adapter stays", POOL, "self._leave(name)\n            self._adapters[name] =", "self._adapters[name] ="),
    Mutant("pool: a removed adapter keeps its slot", POOL, "[self._known(name)]\n            self._leave(name)", "[self._known(name)]"),
    Mutant("pool: a slot is lost", POOL, "self._free.append(self._slots.pop(name))", "self._slots.pop(name)"),
    Mutant("pool: more than there are slots", POOL, "if len(wanted) > len(self._own):", "if False:"),
    Mutant("pool: other layers", POOL, "!= self._layers:", "is None:"),
    Mutant("pool: all slots", POOL, "range(least) if slots is None else slots", "range(least)"),
    Mutant("pool: slots of the largest layer", POOL, "least = min(", "least = max("),
    Mutant("pool: loaded each time", POOL, "if name not in self._slots:\n                    slot", "if 1:\n                    slot"),
    Mutant("pool: None has the last slot", POOL, "[-1 if name is None else", "[len(self._own) - 1 if name is None else"),
    Mutant("pool: a thread that loads does not wait", POOL, "with _CHANGING:\n            if self", "if 1:\n            if self"),
    Mutant("pool: what others wrote serves", POOL, "if self._written() != self._writes:", "if False:"),
    Mutant("pool: what it wrote itself is not known", POOL, "finally:\n                        self._writes = self._written()",
           "finally:\n                        pass"),
    Mutant("pool: into slot 0", FILES, "slots.put(slot, [(whole", "slots.put(0, [(whole"),
]  # fmt: skip

SLOTS = [
    Mutant("slots: the old rank", STACKS, "if r != layer._ranks[i]:", "if False:"),
    Mutant("slots: the rank as built", STACKS, "r = max((own[1].shape[1] for own in parts if own is not None), default=layer._built[i])",
           "r = layer._built[i]"),
    Mutant("slots: the last tenant's ranks", STACKS, "            if held < layer.r:", "            if False:"),
    Mutant("slots: the last tenant's gradient", STACKS, "(layer.lora_A, layer.lora_B) if stack.grad is not None]  # of", "()]  # of"),
    Mutant("slots: the device has the old rank", STACKS, "    _fill(ranks)\n", ""),
    Mutant("slots: the old scaling", STACKS, "    _fill(scalings)\n", ""),
    Mutant("slots: ranks that others wrote", STACKS, "if layer._seen != stamp(layer.ranks) and", "if False and"),
    Mutant("slots: on the meta device", STACKS, "        if any(parts):", "        if False:"),
    Mutant("slots: a write is not counted", STACKS, "        layer.writes[i] += 1\n        for", "        for"),
]  # fmt: skip

EVERY = [*mutants_packed.EVERY, *(replace(m, tests="serving") for m in SERVED), *(replace(m, tests="slots") for m in SLOTS)]
