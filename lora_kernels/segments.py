"""`Segments`: which adapter each token takes, as the plan that the kernels read.

    order, starts    tokens sorted by adapter: shrink and wgrad gather the rows of one adapter at a time
    tiles            the sorted tokens cut into tiles of one adapter each
    present          for each block of neighbouring rows the adapters in it: expand keeps contiguous rows and walks this list

Everything is built on the ids' device, without a host sync, at sizes that the number of tokens bounds, by the operator
``lora_kernels::plan``: `by_library` here, and on a GPU two launches, or four above 8,192 tokens. So a plan built inside a CUDA-graph
capture is rebuilt at every replay, from whatever the ids' buffer then holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

INTS = (torch.int32, torch.int64)
CPU = torch.device("cpu")  # compared with, since a device's own name is a string that is built anew each time
_TENSORS = ("ids", "order", "starts", "tile_adapter", "tile_first", "present", "counts")
_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "plan(Tensor adapter_ids, int num_adapters, int row_block, int gather_block) -> Tensor[]", tags=[torch.Tag.pt2_compliant_tag]
)


@dataclass(frozen=True, eq=False)
class Segments:
    """The adapters of a batch of tokens; make one by `from_ids`, `from_lengths` or `from_top_k`, once for all layers, both passes.

    Attributes (int32; M tokens, E adapters; slot E stands for "no adapter"):
        ids: ``[M]``, each token's adapter, -1 for the base alone.
        order: ``[M]``, tokens sorted by adapter, stable, those without one last.
        starts: ``[E + 2]``, adapter e owns ``order[starts[e]:starts[e + 1]]``.
        tile_adapter, tile_first: ``[T]``, the slot of each gathered tile and where in ``order`` it begins; -1 where unused.
        present: ``[blocks * row_block]``, for each block of ``row_block`` rows the adapters in it, ascending, from its first row on.
        counts: ``[blocks]``, how many they are.
    top_k: How many of the plan's tokens, neighbours, are one row of x: see `from_top_k`.
    """

    ids: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor
    tile_adapter: torch.Tensor
    tile_first: torch.Tensor
    present: torch.Tensor
    counts: torch.Tensor
    num_adapters: int
    row_block: int
    gather_block: int
    top_k: int = 1

    @property
    def tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def __repr__(self) -> str:
        return f"Segments(tokens={self.tokens}, num_adapters={self.num_adapters}, device='{self.device}')"

    @classmethod
    def from_ids(
        cls,
        adapter_ids: torch.Tensor,
        num_adapters: int,
        *,
        validate: bool = True,
        row_block: int | None = None,
        gather_block: int | None = None,
    ) -> Segments:
        """The plan for tokens with these adapters.

        Args:
            adapter_ids: int32 or int64, one id a token in row-major order of ``x[..., :]``, in any order; -1 is the base alone.
            num_adapters: E, the adapters in the stack; those absent from the batch cost nothing but their zero gradients.
            validate: Whether ids outside [-1, E) raise: ValueError on a CPU, a device assertion (without a sync) on a GPU.
                Without it, and under torch.compile on a CPU, they count as -1.
            row_block, gather_block: Rows of expand's tiles and of the gathered tiles, powers of two from 16; None lets the number
                of tokens decide. A `Config` passed beside the plan must name the same.
        Raises:
            TypeError: not an integer tensor. ValueError: num_adapters, or an id, out of range.
        """
        if not isinstance(adapter_ids, torch.Tensor) or adapter_ids.dtype not in INTS:
            given = adapter_ids.dtype if isinstance(adapter_ids, torch.Tensor) else type(adapter_ids).__name__
            raise TypeError(f"adapter_ids: wanted an int32 or int64 tensor, one id a token, got {given}")
        check_int("num_adapters", num_adapters, 1)
        raw = adapter_ids.reshape(-1)
        M = raw.shape[0]
        row_block = _block("row_block", row_block, _default_row_block(M))
        gather_block = _block("gather_block", gather_block, _default_gather_block(M, num_adapters))
        *tensors, valid = torch.ops.lora_kernels.plan(raw, num_adapters, row_block, gather_block)
        if validate:
            _validate(raw, valid, num_adapters)
        return cls.of(tensors, (num_adapters, row_block, gather_block))

    @classmethod
    def from_lengths(
        cls,
        lengths: torch.Tensor | Sequence[int],
        adapters: torch.Tensor | Sequence[int] | None = None,
        *,
        num_adapters: int | None = None,
        tokens: int | None = None,
        device=None,
        validate: bool = True,
    ) -> Segments:
        """The plan for contiguous runs of tokens, such as packed sequences: ``lengths[i]`` tokens of adapter ``adapters[i]``.

        Args:
            lengths: ints ``[runs]``, zeros allowed.
            adapters: ``[runs]``, any order and repeats, -1 for the base alone; None: run i has adapter i.
            num_adapters: E; None: as many as runs, or one more than the largest of ``adapters`` (of host values, for no sync).
            tokens: The sum of lengths; needed where they are on a GPU, for no sync.
            device: Of the plan; None: of ``lengths``.
            validate: As in `from_ids`.
        Raises:
            As `from_ids`. ValueError: a negative length, not an adapter for each, another sum, or None where it would take a sync.
        """
        lengths = as_ints("lengths", lengths)
        on_host = lengths.device.type == "cpu"
        device = lengths.device if device is None else torch.device(device)
        if adapters is None:
            num_adapters = max(lengths.shape[0], 1) if num_adapters is None else num_adapters
            chosen = torch.arange(lengths.shape[0], dtype=torch.int32, device=lengths.device)
        else:
            chosen = as_ints("adapters", adapters)
            if chosen.shape != lengths.shape:
                raise ValueError(f"adapters: wanted one for each of {lengths.shape[0]} lengths, got {chosen.shape[0]}")
            if num_adapters is None:
                if chosen.device.type != "cpu":
                    raise ValueError("num_adapters: wanted a number where adapters are on a GPU (asking them would wait for it), got None")
                num_adapters = max(int(chosen.max()), 0) + 1 if chosen.numel() else 1
        if on_host:
            if (lengths < 0).any():
                raise ValueError(f"lengths: wanted no negative length, got {int(lengths.min())}")
            total = int(lengths.sum())
            if tokens is not None and tokens != total:
                raise ValueError(f"tokens: wanted the sum of lengths, {total}, got {tokens}")
            tokens = total
        elif tokens is None:
            raise ValueError("tokens: wanted the sum of lengths where they are on a GPU (asking it would wait for it), got None")
        ids = torch.repeat_interleave(chosen, lengths, output_size=tokens)
        return cls.from_ids(ids.to(device, non_blocking=True), num_adapters, validate=validate)

    @classmethod
    def from_top_k(cls, top_k_index: torch.Tensor, num_experts: int) -> Segments:
        """The plan of a mixture's routing: for a stack of weights, ``x [T, K]`` gives ``y [T, k, N]``, and x is not repeated.

        Args:
            top_k_index: ints ``[T, k]``, each token's experts; any other number than 0 to num_experts - 1 is none, and y is 0 there.
            num_experts: E.
        Raises:
            ValueError: no ``[T, k]``, k at least 1, or num_experts below 1. TypeError: not int32 or int64.
        """
        if not isinstance(top_k_index, torch.Tensor) or top_k_index.dim() != 2 or not top_k_index.shape[1]:
            given = list(top_k_index.shape) if isinstance(top_k_index, torch.Tensor) else type(top_k_index).__name__
            raise ValueError(f"top_k_index: wanted a tensor [tokens, k], k at least 1, got {given}")
        if top_k_index.dtype not in INTS:
            raise TypeError(f"top_k_index: wanted int32 or int64, got {top_k_index.dtype}")
        check_int("num_experts", num_experts, 1)
        block = expert_block(top_k_index.numel(), num_experts)
        plan = cls.from_ids(top_k_index, num_experts, validate=False, gather_block=block)
        return replace(plan, top_k=top_k_index.shape[1])

    def each(self) -> Segments:
        """The same plan for an x that has a row for each of its tokens."""
        return replace(self, top_k=1)

    def to(self, device) -> Segments:
        """The same plan on another device."""
        return Segments.of([t.to(device) for t in self.tensors()], self.geometry())

    def tensors(self) -> list[torch.Tensor]:
        """The plan's tensors, in the order `of` takes them."""
        return [getattr(self, name) for name in _TENSORS]

    def geometry(self) -> list[int]:
        """The plan's integers, in the order `of` takes them."""
        return [self.num_adapters, self.row_block, self.gather_block, self.top_k]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], geometry: Sequence[int]) -> Segments:
        """A plan from `tensors` and `geometry`: what an operator's schema can carry."""
        ids, order, starts, tile_adapter, tile_first, present, counts = tensors
        return cls(ids, order, starts, tile_adapter, tile_first, present, counts, *geometry)


class Adapters(NamedTuple):
    """What goes with the stacks: the plan, a float32 scale for each adapter on the device, and their ranks; None for what is absent.

    widths: The outputs of each layer that the weight packs; () where it is one layer's.
    """

    segments: Segments | None = None
    scales: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    widths: tuple[int, ...] = ()

    def gather(self) -> tuple | None:
        """What a kernel needs to gather the tokens of a tile."""
        s = self.segments
        return None if s is None else (s.tile_adapter, s.tile_first, s.starts, s.order)

    def rows(self) -> tuple | None:
        """What a kernel needs to know of its row block: each row's adapter, and those present."""
        s = self.segments
        return None if s is None else (s.ids, s.present, s.counts)

    def flat(self) -> tuple:
        """(scales, ranks, plan, geometry): what an operator's schema can carry. geometry: the plan's integers, then the widths."""
        s = self.segments
        geometry = [0, 0, 0, 1] if s is None else s.geometry()
        return self.scales, self.ranks, [] if s is None else s.tensors(), [*geometry, *self.widths] if s or self.widths else []

    @classmethod
    def from_flat(cls, scales, ranks, plan, geometry) -> Adapters:
        if not plan and scales is None and not geometry:
            return ONE
        return cls(Segments.of(plan, geometry[:4]) if plan else None, scales, ranks, tuple(geometry[4:]))

    @property
    def top_k(self) -> int:
        return self.segments.top_k if self.segments else 1

    @property
    def number(self) -> int:
        return self.segments.num_adapters if self.segments else 1

    @property
    def layers(self) -> int:
        return len(self.widths) or 1


ONE = Adapters()


def plan_of(adapters: torch.Tensor, tokens: int, num_adapters: int) -> Segments:
    """The plan of sequences of so many tokens each, for ids ``[sequences]`` that were checked."""
    each = adapters.repeat_interleave(tokens, output_size=adapters.shape[0] * tokens)
    return Segments.from_ids(each, num_adapters, validate=False)


def _default_row_block(tokens: int) -> int:
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64 if tokens <= 256 else 128


def _default_gather_block(tokens: int, adapters: int) -> int:
    # A tile of one adapter is rarely full where each has few tokens; 32 keeps dropped tiles out of wgmma's register operand.
    return 16 if tokens < 32 * adapters or tokens <= 256 else 32


def expert_block(tokens: int, experts: int) -> int:
    """The gathered tiles are those of the whole product beside a stack of weights: half as many rows again as an expert has on average.

    Then most experts with few rows have one tile, and their weight is read once.
    """
    block = 16  # by comparisons, of which a compiler guards a range of tokens, not their number
    while block < 128 and 2 * experts * block < 3 * tokens:
        block *= 2
    return block


def lengths(tokens: int, num_adapters: int, row_block: int, gather_block: int) -> list[int]:
    """How long a plan's tensors are, in the order of `Segments.tensors`."""
    blocks, tiles = -(-tokens // row_block), _most_tiles(tokens, num_adapters, gather_block)
    return [tokens, tokens, num_adapters + 2, tiles, tiles, blocks * row_block, blocks]


def _most_tiles(M: int, E: int, block: int) -> int:
    """Each slot in use may leave one tile unfilled."""
    used = min(E + 1, M)
    return (M + used * (block - 1)) // block


@torch.library.impl(_library, "plan", "CompositeExplicitAutograd")
def by_library(adapter_ids: torch.Tensor, num_adapters: int, row_block: int, gather_block: int) -> list[torch.Tensor]:
    """The tensors of a plan for ids ``[M]``, and whether all ids were from -1 to num_adapters - 1 (bool ``[]``)."""
    M = adapter_ids.shape[0]
    valid = ((adapter_ids >= -1) & (adapter_ids < num_adapters)).all()
    slot = torch.where((adapter_ids < 0) | (adapter_ids >= num_adapters), num_adapters, adapter_ids).to(torch.int32)
    sorted_slot, order = torch.sort(slot, stable=True)
    slots = torch.arange(num_adapters + 2, dtype=torch.int32, device=slot.device)
    starts = torch.searchsorted(sorted_slot, slots, out_int32=True)
    tile_adapter, tile_first = _tiles(starts, M, num_adapters, gather_block)
    ids = torch.where(slot == num_adapters, -1, slot)
    present, counts = _present(ids, row_block)
    return [ids, order.to(torch.int32), starts, tile_adapter, tile_first, present, counts, valid]


@torch.library.register_fake("lora_kernels::plan")
def _plan_fake(adapter_ids, num_adapters, row_block, gather_block):
    sizes = lengths(adapter_ids.shape[0], num_adapters, row_block, gather_block)
    return [*(adapter_ids.new_empty(size, dtype=torch.int32) for size in sizes), adapter_ids.new_empty((), dtype=torch.bool)]


def _tiles(starts: torch.Tensor, M: int, E: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each slot's tokens cut into tiles of ``block``: (slot, first position) for each, -1 past the last."""
    bound = _most_tiles(M, E, block)
    tiles = (starts[1:] - starts[:-1] + (block - 1)) // block
    ends = torch.cumsum(tiles, 0, dtype=torch.int32)
    index = torch.arange(bound, dtype=torch.int32, device=starts.device)
    slot = torch.searchsorted(ends, index, right=True, out_int32=True)
    unused = slot > E
    inside = slot.clamp(max=E)
    first = starts[inside] + (index - (ends - tiles)[inside]) * block
    return torch.where(unused, -1, slot), torch.where(unused, 0, first)


def _present(ids: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of rows its distinct adapters, ascending, packed to the block's front; and their number."""
    M = ids.shape[0]
    blocks = -(-M // block)
    padded = torch.nn.functional.pad(ids, (0, blocks * block - M), value=-1).view(blocks, block)
    ordered = torch.sort(padded, dim=1).values
    new = ordered >= 0
    new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    place = torch.where(new, torch.cumsum(new, 1) - 1, block)
    present = ordered.new_zeros(blocks, block + 1).scatter_(1, place, ordered)[:, :block]
    return present.reshape(-1), new.sum(1, dtype=torch.int32)


def readable(t: torch.Tensor) -> bool:
    """Whether values can be looked at without waiting for a device: on the CPU, and neither traced nor fake."""
    return t.device == CPU and type(t) is torch.Tensor and not torch.compiler.is_compiling()


def _validate(ids: torch.Tensor, valid: torch.Tensor, num_adapters: int) -> None:
    if ids.is_cuda:
        torch._assert_async(valid, f"adapter_ids: wanted ids from -1 to {num_adapters - 1}")
    elif readable(ids) and not valid:
        wrong = ids[(ids < -1) | (ids >= num_adapters)]
        raise ValueError(f"adapter_ids: wanted ids from -1 to {num_adapters - 1}, got {wrong[0].item()} ({wrong.numel()} out of range)")


def check_int(name: str, value, least: int) -> None:
    """Raises TypeError or ValueError unless ``value`` is an int and at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: wanted at least {least}, got {value}")


def _block(name: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    check_int(name, value, 16)
    if value & (value - 1):
        raise ValueError(f"{name}: wanted a power of two, got {value}")
    return value


def as_ints(name: str, values) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        if values.dtype not in INTS:
            raise TypeError(f"{name}: wanted int32 or int64, got {values.dtype}")
        if values.dim() != 1:
            raise ValueError(f"{name}: wanted one dimension, got shape {list(values.shape)}")
        return values
    values = list(values)
    wrong = [v for v in values if not isinstance(v, int) or isinstance(v, bool)]
    if wrong:
        raise TypeError(f"{name}: wanted ints, got {wrong[0]!r}")
    return torch.tensor(values, dtype=torch.int64, device=CPU)  # not torch.set_default_device's
