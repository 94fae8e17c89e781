"""`AdapterPool`: adapters by name, as many as host memory holds, over a model that has slots for some of them at a time.

pool = AdapterPool(model); pool.add("legal", "adapters/legal")
with pool.use(["legal", None, "sales"]): model.generate(**batch)      three sequences, each through its own
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from . import files
from .apply import some
from .serving import Layers, by_sequence, exclusive, give, layers_of

_CHANGING = threading.Lock()  # pools' adapters and slots: one thread may load while another serves


class AdapterPool:
    """Reads and checks adapter files once, keeps them in host memory, and puts into slots what a batch names.

    A batch's adapter that has no slot takes a free one, or that of the adapter that was named longest ago; nothing else is moved. To put
    one in is to copy its A and B to the device, on the current stream, which is to be the one that reads the slots, or to come after it.

    Args:
        model: A module with `MultiLoRALinear` layers (``apply_lora(model, config, num_adapters=E)``).
        slots: Those that are the pool's; None: all of them. Where others write to them (another pool, `load_adapter`, a state dict),
            every adapter is put in anew when it is named. What is written to one layer alone, or to its tensors, is not noticed.
        pin_memory: Whether adapters of a model on a GPU are kept in page-locked memory, from where they come at the bus's speed and the
            host need not wait for them.
    Raises:
        ValueError, IndexError, TypeError: no such layers; no slots, one twice, or one that a layer does not have.
    """

    def __init__(self, model: nn.Module, slots: Collection[int] | None = None, *, pin_memory: bool = True):
        self._layers = list(layers_of(model).values())
        least = min(layer.num_adapters for layer in self._layers)
        slots = list(range(least) if slots is None else slots)
        for slot in slots:
            if isinstance(slot, bool) or not isinstance(slot, int):
                raise TypeError(f"slots: wanted ints, got {slot!r}")
            if not 0 <= slot < least:
                raise IndexError(f"slots: wanted those from 0 to {least - 1}, which every layer has, got {slot}")
        if not slots or len(set(slots)) < len(slots):
            raise ValueError(f"slots: wanted at least one, and each once, got {slots}")
        self.model = model
        self._adapters: dict[str, files.Adapter] = {}
        self._slots: dict[str, int] = {}  # the adapter named longest ago first
        self._free = slots[::-1]
        self._own = slots
        self._writes = self._written()
        self._pins = pin_memory and any(layer.lora_A.is_cuda for layer in self._layers)

    @property
    def names(self) -> list[str]:
        """The adapters of the pool, in the order in which they came."""
        return list(self._adapters)

    @property
    def resident(self) -> dict[str, int]:
        """The adapters that have a slot, and which; the one named longest ago first."""
        return dict(self._slots) if self._written() == self._writes else {}

    def add(self, name: str, folder: str | os.PathLike, *, partial: bool = False, cast: bool = False) -> None:
        """Read an adapter's files, which are not needed afterwards. One of that name is replaced, from the next batch on.

        Args:
            name: By which batches name it.
            folder, partial, cast: As in `load_adapter`.
        Raises:
            As `load_adapter`, with the pool as it was. TypeError: the name is no str.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: wanted a str, got {type(name).__name__}")
        adapter = files.read(self.model, folder, slot=self._own[0], partial=partial, cast=cast)  # they have the same room
        # copied: what safetensors gives is the file itself, in memory
        own = torch.Tensor.pin_memory if self._pins else torch.Tensor.clone
        values = {layer: {part: own(t) for part, t in parts.items()} for layer, parts in adapter.values.items()}
        with _CHANGING:
            self._leave(name)
            self._adapters[name] = adapter._replace(values=values)

    def remove(self, name: str) -> None:
        """Forget an adapter; its slot is free for the next batch.

        Raises:
            KeyError: there is none of that name.
        """
        with _CHANGING:
            del self._adapters[self._known(name)]
            self._leave(name)

    def slots(self, names: Sequence[str | None]) -> list[int]:
        """The slot of each adapter, put in where it had none, and -1 for None: ids for a `Segments` of one's own, until the next call.

        Raises:
            KeyError: a name that the pool does not know. ValueError: more adapters at once than slots. TypeError: a str in the place of
            names. RuntimeError: the model is in use, and an adapter might lose its slot; or has other layers than when the pool was made.
        """
        with exclusive(self.model) as layers:
            return self._take(names, layers)

    @contextlib.contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, each sequence of the batch goes through the adapter that it names, None: the base alone; see `use_adapters`.

        Raises:
            As `slots`, and in a call as `use_adapters`, by which it may not be captured in a CUDA graph either.
        """
        with exclusive(self.model) as layers:
            give(layers, by_sequence(layers, self._take(names, layers)))
            yield

    def _take(self, names: Sequence[str | None], layers: Layers) -> list[int]:
        if isinstance(names, str):
            raise TypeError(f"names: wanted one for each sequence, got a str, {names!r}")
        names = list(names)
        if list(layers.values()) != self._layers:
            raise RuntimeError("model: wanted the layers with which the pool was made, got others; make a new pool")
        with _CHANGING:
            if self._written() != self._writes:
                self._slots, self._free = {}, self._own[::-1]
            wanted = dict.fromkeys(self._known(name) for name in names if name is not None)
            if len(wanted) > len(self._own):
                raise ValueError(f"names: wanted at most {len(self._own)} adapters at once, for so many slots, got {len(wanted)}")
            for name in wanted:  # first those that are there, so that none of them loses its slot to another
                if name in self._slots:
                    self._slots[name] = self._slots.pop(name)
            for name in wanted:
                if name not in self._slots:
                    slot = self._free.pop() if self._free else self._slots.pop(next(iter(self._slots)))
                    self._free.append(slot)  # free until all of it is written
                    try:
                        files.put(self._adapters[name], slot, reset=False, non_blocking=True)  # a reset draws from the answers' generator
                    finally:
                        self._writes = self._written()
                    self._slots[name] = self._free.pop()
            return [-1 if name is None else self._slots[name] for name in names]

    def _written(self) -> list[int]:
        """How often the first layer's slots were, for whoever writes to one layer's writes to all."""
        return [self._layers[0].writes[slot] for slot in self._own]

    def _leave(self, name: str) -> None:
        if name in self._slots:
            self._free.append(self._slots.pop(name))

    def _known(self, name: str) -> str:
        if name not in self._adapters:
            raise KeyError(f"name: wanted one of the pool's {len(self._adapters)} adapters ({some(self._adapters)}), got {name!r}")
        return name

    def __repr__(self) -> str:
        return f"AdapterPool({len(self._adapters)} adapters, {len(self._slots)} of them in {len(self._own)} slots)"
