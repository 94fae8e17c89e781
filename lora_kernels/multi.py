"""`MultiLoRALinear`: a frozen base and a stack of adapters, each token through its own.

    y[t] = x[t] W^T + scaling[e] * (dropout(x[t]) A[e]^T) B[e]^T + bias      e = segments.ids[t]; -1: the base alone

The stacks are written in place only, slot by slot, so that one adapter is swapped or trained while the others serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import slots
from .autograd import lora_linear
from .checks import check_number, check_tensor
from .nn import AdaptedLinear, check_linear, check_rank, held, init_adapter, scaling_of
from .problem import UnsupportedError, sharded
from .segments import Segments, check_int
from .slots import Pair, ranks_of, stamp


class MultiLoRALinear(AdaptedLinear):
    """``num_adapters`` low-rank updates over one frozen linear layer, any mix of them in a batch.

    ``weight`` and ``bias`` have nn.Linear's names and layout, as in `FusedLoRALinear`. A slot of the stacks holds one adapter; beyond
    the adapter's rank it holds zeros, which neither change the output nor get a gradient. A slot that no token takes has no effect,
    whatever it holds, and its gradient is zero.

    Args:
        in_features, out_features: K and N.
        bias: Whether the base has a bias.
        num_adapters: E, the slots of the stacks.
        r: Rank of the adapters, 1 to 512, or a list with one for each; the largest is the room of every slot.
        lora_alpha: ``scaling = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``; or a list with one for each.
        lora_dropout, init_lora_weights, device, dtype, adapter_dtype: As in `FusedLoRALinear`, for all adapters.
    Shape:
        x ``[..., in_features]`` and a `Segments` with an id for each of its tokens -> ``[..., out_features]``.
    Attributes:
        lora_A, lora_B: The stacks, parameters ``[E, r, K]`` and ``[E, N, r]``.
        scaling: float32 ``[E]``, a buffer; may be set in place between calls.
        ranks: int32 ``[E]``, a buffer that `load_adapter` and `reset_adapter` keep. The kernels are given it while any adapter has less
            than the stack's rank, which is known without asking the device.
    CUDA graphs:
        Whatever is changed in place (`load_adapter`, ``scaling``, an optimizer's step) holds in the next replay. That goes for ranks
        too: a graph captured while all ranks were full serves and trains a smaller adapter by its zeros.
    Raises:
        The errors of `FusedLoRALinear`. ValueError: no slot, or a list of another length. By methods that take a slot's number: IndexError,
        there is none; TypeError, no int; UnsupportedError, the stacks are sharded.
    """

    scaling: torch.Tensor
    ranks: torch.Tensor
    _seen: tuple = ()  # the `stamp` of ``ranks`` when the host last knew them
    plans: Any = None  # inside `use_segments` and `use_adapters`: what says which plan goes with x

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_adapters: int,
        r: int | list[int] = 8,
        lora_alpha: float | list[float] = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        device=None,
        dtype=None,
        adapter_dtype=None,
    ):
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(base, num_adapters, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        num_adapters: int,
        r: int | list[int] = 8,
        lora_alpha: float | list[float] = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        adapter_dtype=None,
    ) -> MultiLoRALinear:
        """A layer that shares ``linear``'s parameters: nothing is copied, and they are frozen (``requires_grad=False``).

        Args:
            linear: An nn.Linear. The others: as for the class.
        Raises:
            TypeError: As `FusedLoRALinear.from_linear`. The errors of the class.
        """
        check_linear(linear)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(linear, num_adapters, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
        return self

    def _adopt(self, base, num_adapters, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype) -> None:
        check_int("num_adapters", num_adapters, 1)
        E, self.use_rslora = num_adapters, use_rslora
        self._built = _each("r", r, E)
        for e, rank in enumerate(self._built):
            check_rank(f"r[{e}]" if isinstance(r, (list, tuple)) else "r", rank)
        self.num_adapters, self.r, self.lora_alpha = E, max(self._built), _each("lora_alpha", lora_alpha, E)
        like = self._take(base, lora_dropout, adapter_dtype)
        layers = len(self.widths) or 1
        check_rank(f"r of {layers} layers in all" if layers > 1 else "r", self.r * layers)
        self.lora_A = nn.Parameter(like.new_zeros(E, self.r * layers, self.in_features))
        self.lora_B = nn.Parameter(like.new_zeros(E, self.out_features, self.r))
        self.register_buffer("scaling", like.new_zeros(E, dtype=torch.float32))
        self.register_buffer("ranks", like.new_zeros(E, dtype=torch.int32))
        self._fill_tables()
        for e in range(E):
            self._init(e, init_lora_weights)

    def forward(self, x: torch.Tensor, segments: Segments | None = None) -> torch.Tensor:
        """Each token through its adapter; dropout acts in training. Without segments where an adapter is merged: every token through it.

        Raises:
            TypeError: no plan. ValueError: one of other slots or tokens, or one where an adapter is merged; the others of `lora_linear`.
        """
        segments = self.planned(x, segments)
        if self.merged:
            if segments is not None:
                raise ValueError(
                    "segments: wanted None, for an adapter is merged and answers every token, got a plan; call unmerge() first"
                )
            return F.linear(x, self.weight, self.bias)
        if not isinstance(segments, Segments):
            wanted = "a lora_kernels.Segments, Segments.from_ids(adapter_ids, num_adapters) with -1 for the base alone"
            wanted += ", or a call of the model within use_adapters(model, slots), use_segments(model, plan) or pool.use(names)"
            raise TypeError(f"segments: wanted {wanted}, got {type(segments).__name__}")
        if segments.num_adapters != self.num_adapters:
            raise ValueError(f"segments: wanted a plan of this layer's {self.num_adapters} adapters, got one of {segments.num_adapters}")
        A, B, scaling = held(self, "lora_A", "lora_B", "scaling")
        x, weight, bias, base = self._operands(x)
        return lora_linear(
            x,
            weight,
            A,
            B,
            bias,
            base=base,
            scale=scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
            segments=segments,
            ranks=self.ranks if self._mixed else None,
            widths=self.widths or None,
        )

    def planned(self, x: torch.Tensor, segments: Segments | None) -> Segments | None:
        """The plan of a call with x, which `use_adapters` has where none is given."""
        return self.plans.of(x, self.num_adapters) if segments is None and self.plans is not None else segments

    def adapter(self, i: int) -> Pair:
        """A ``[r_i, K]`` and B ``[N, r_i]`` of adapter i as detached views: writing to them changes the adapter, in place."""
        self._check_slot(i)
        r, (A, B) = ranks_of(self)[i], self._slot(i)
        return A[..., :r, :], B[:, :r]

    def _slot(self, i: int) -> Pair:
        """The same at the stack's rank: all of slot i."""
        return self.lora_A.detach()[i], self.lora_B.detach()[i]

    def _parts(self, i: int) -> list[Pair]:
        """Slot i as an A ``[r, K]`` and a B ``[N, r]`` for each layer that the weight packs."""
        return [self._slot(i)]

    def adapter_parameters(self, i: int) -> list[nn.Parameter]:
        """Slot i of lora_A and of lora_B as leaves for an optimizer of adapter i alone: ``AdamW(layer.adapter_parameters(i))``.

        They share the slot's storage, and their ``grad`` is the slot of the stack's gradient: None before a backward pass and after
        zero_grad of the module, zeros after zero_grad of their own optimizer, which leaves other adapters' gradients as they are.

        They are whole slots, ``[r, K]`` and ``[N, r]`` for the stack's r, contiguous: torch's fused optimizers on a CPU write past
        views that are not (torch 2.13). Beyond the adapter's rank values and gradients are zeros, and stay so under optimizers that
        work element by element. On a GPU ask for ``foreach=True`` or ``fused=True``: torch's own choice of them stops at
        subclasses of nn.Parameter.

        Step only the adapters of the batch: the others' gradients are zeros, not None, and AdamW at a zero gradient still applies
        weight decay and momentum. Stepping any adapter between a forward pass and its backward pass is an error of autograd's, since
        the stacks are saved whole. After `load_adapter` take a new optimizer, without the old adapter's state. After the module has
        moved (``.to``, ``load_state_dict(assign=True)``) take the leaves again; a RuntimeError says so.
        """
        self._check_slot(i)
        return [slots.SlotParameter(self, name, i) for name in ("lora_A", "lora_B")]

    @torch.no_grad()
    def load_adapter(self, i: int, A: torch.Tensor, B: torch.Tensor, scale: float | None = None) -> None:
        """Put an adapter into slot i, in place, of any rank that the stack has room for; its gradient is 0, and other slots serve on.

        Args:
            i: The slot, from 0.
            A: ``[r_i, K]``, r_i from 1 to the stack's r, any device; another floating dtype is converted to the stack's.
            B: ``[N, r_i]``, likewise.
            scale: Its scaling; None: ``lora_alpha / r_i`` (or ``/ sqrt(r_i)``) with the slot's lora_alpha.
        Raises:
            ValueError, TypeError: shapes, rank, dtypes, a scale that is not finite, or stacks that are parametrized, pruned, or on
            the meta device; with nothing changed.
        """
        self._check_slot(i)
        self._check_pair(A, B, self.out_features)
        check_slot_scale(scale)
        slots.put(i, [(self, [self._copied(A, B)], scale)])

    def merge(self, i: int, keep: str = "device") -> None:
        """Write adapter i into the weight, ``W + scaling[i] B[i] A[i]``, in one pass over it, also in the place of another merged one.

        From here on every token goes through adapter i, called without segments, at the price of nn.Linear, and to go from one adapter to
        another is one more pass. What the slots hold may change meanwhile; the weight follows at the next `merge`.

        Args:
            i: The slot, from 0.
            keep: Where the base weight waits for `unmerge`, which gives it back bit for bit: "device", or "cpu" to spare its memory.
        Raises:
            ValueError: the result is not finite, and the layer is unmerged; or the weight is no parameter of the layer alone, or another
            ``keep``, and nothing has changed.
        """
        self._merge(keep, *self.adapter(i), float(self.scaling[i]))

    @torch.no_grad()
    def reset_adapter(self, i: int, init_lora_weights: bool = True) -> None:
        """Initialise slot i again, in place, with the rank and scaling it was built with; see ``init_lora_weights``."""
        self.clear_adapter(i)
        self._init(i, init_lora_weights)

    @torch.no_grad()
    def clear_adapter(self, i: int) -> None:
        """Slot i as `reset_adapter` leaves it, but all zeros: no random number is drawn, and no gradient would reach it."""
        self._check_slot(i)
        slots.put(i, [(self, [None] * len(self._parts(i)), None)])

    def adapter_state_dict(self, i: int) -> dict:
        """Adapter i alone: ``lora_A [r_i, K]`` and ``lora_B [N, r_i]``, copies, and ``scaling``, a float."""
        A, B = (t.clone() for t in self.adapter(i))
        return {"lora_A": A, "lora_B": B, "scaling": float(self.scaling[i])}

    def load_adapter_state_dict(self, i: int, state_dict: Mapping) -> None:
        """Put what `adapter_state_dict` returned into slot i, in place; raises like `load_adapter`, with nothing changed."""
        wanted = ("lora_A", "lora_B", "scaling")
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(wanted):
            given = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"state_dict: wanted a mapping with {', '.join(wanted)}, got {given}")
        self.load_adapter(i, *(state_dict[name] for name in wanted))

    def _check_slot(self, i) -> None:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"i: wanted an adapter's number, an int, got {type(i).__name__}")
        if not 0 <= i < self.num_adapters:
            raise IndexError(f"i: wanted an adapter from 0 to {self.num_adapters - 1}, got {i}")
        if sharded(self.lora_A):
            raise UnsupportedError(
                f"i: wanted stacks that are whole on this rank, to take adapter {i} of them, got shards ({self.lora_A.placements}); "
                "do it before fully_shard or parallelize_module, or gather the state"
            )

    def _check_pair(self, A, B, N: int, which: str = "") -> None:
        """Refuse what fits no slot with N outputs; which: of packed layers, behind the names in errors."""
        a, b, K = f"A{which}", f"B{which}", self.in_features
        check_tensor(a, A, f"a tensor [r, {K}]")
        check_tensor(b, B, f"a tensor [{N}, r]")
        if A.dim() != 2 or A.shape[1] != K:
            raise ValueError(f"{a}: wanted shape [r, {K}], got {list(A.shape)}")
        r = A.shape[0]
        if not 1 <= r <= self.r:
            raise ValueError(f"{a}: wanted a rank from 1 to the stack's {self.r}, got {r} (shape {list(A.shape)})")
        if tuple(B.shape) != (N, r):
            raise ValueError(f"{b}: wanted shape [{N}, {r}] to match {a} {list(A.shape)}, got {list(B.shape)}")

    def _scale_for(self, i: int, r: int) -> float:
        return scaling_of(self.lora_alpha[i], r, self.use_rslora)

    def _copied(self, A: torch.Tensor, B: torch.Tensor) -> Pair:
        """As the stacks have them; copied, for they may be views into these stacks."""
        return tuple(t.to(self.lora_A.device, self.lora_A.dtype, copy=True) for t in (A, B))  # type: ignore[return-value]

    def _fill_tables(self) -> None:
        """Buffers and the host's ranks as built."""
        self.ranks.copy_(torch.tensor(self._built, device="cpu"))
        scales = [self._scale_for(e, r) for e, r in enumerate(self._built)]
        self.scaling.copy_(torch.tensor(scales, dtype=torch.float32, device="cpu"))  # torch's defaults are the model's, as it is built
        self._know_ranks(list(self._built))
        self._all_written()

    def _all_written(self) -> None:
        """Count one more adapter put into each slot: by ``writes`` a pool knows whether what it put there still is."""
        self.writes = [number + 1 for number in getattr(self, "writes", [0] * self.num_adapters)]

    def _know_ranks(self, ranks: list[int]) -> None:
        """Keep ``ranks`` on the host, so that no forward pass asks the device."""
        self._ranks, self._mixed, self._seen = ranks, min(ranks) < self.r, stamp(self.ranks)

    def _init(self, i: int, init_lora_weights: bool) -> None:
        init_adapter(*self.adapter(i), init_lora_weights)

    def __getstate__(self) -> dict:  # a copy, or a file, is in nobody's use
        return {name: value for name, value in self.__dict__.items() if name != "plans"}

    def _apply(self, fn, recurse=True):
        scaling, known = self.scaling, self._seen == stamp(self.ranks)
        super()._apply(fn, recurse)
        if known:
            self._seen = stamp(self.ranks)
        if self.scaling.dtype != torch.float32:  # .half() and its like are for weights
            self.scaling = scaling.to(self.scaling.device)
        if scaling.is_meta and not self.scaling.is_meta:  # to_empty fills nothing
            self._fill_tables()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        given = state_dict.get(prefix + "ranks")
        wrong = [] if given is None or given.is_meta else [r for r in given.flatten().tolist() if not 1 <= r <= self.r]
        if wrong:
            error_msgs.append(f"{prefix}ranks: wanted ranks from 1 to the stack's {self.r}, got {wrong[0]}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not self.ranks.is_meta:
            self._know_ranks(self.ranks.tolist())
            self._all_written()

    def extra_repr(self) -> str:
        low, high = min(self._ranks), max(self._ranks)
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}", f"bias={self.bias is not None}"]
        parts += [f"num_adapters={self.num_adapters}", f"r={self.r}", f"lora_dropout={self.lora_dropout:g}"]
        parts += [f"ranks={low}" if low == high else f"ranks={low}..{high}"] if self._mixed else []
        return ", ".join(parts)


def check_slot_scale(scale: float | None) -> None:
    if scale is not None:
        check_number("scale", scale, "a float or None")


def _each(name: str, value, E: int) -> list:
    """One value for each adapter."""
    if not isinstance(value, (list, tuple)):
        return [value] * E
    if len(value) != E:
        raise ValueError(f"{name}: wanted one value or {E}, one for each adapter, got {len(value)}")
    return list(value)
