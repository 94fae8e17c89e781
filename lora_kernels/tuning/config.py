"""`Config`: how the three kernels run, as a frozen value."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Shrink:
    """Tiles of ``z = scale (D.x) a``; ``split``: programs that share the K axis of one row block."""

    block_m: int = 32
    block_k: int = 128
    split: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Expand:
    """Tiles of ``y = x w + u v + bias``.

    ``u``: where u comes from, "given" | "loop" | "awaited". ``base``: "kernel" computes x w in the kernel, "library" takes it
    from torch's matmul and adds u v. ``group_m``: row blocks that share columns of w in the L2 cache. ``split``: programs that share the K
    axis of one tile, beside one for its low-rank product; 1: one program does both. ``pdl``: programmatic dependent launch, by which
    expand's base product begins while shrink still runs. ``masked``: with segments, each adapter's product has zeros in the rows of others,
    and needs no accumulator of its own, where else a token selects its product; what an infinite element of B reaches is then NaN.
    ``each``: with segments, each token multiplies v of its own adapter, gathered into registers, where else a row block multiplies v of
    one of its adapters after the other: for tiles of few rows, in which each may be another.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group_m: int = 8
    split: int = 1
    num_warps: int = 8
    num_stages: int = 3
    u: str = "given"
    base: str = "kernel"
    tma: bool = False
    persistent: bool = False
    pdl: bool = False
    masked: bool = False
    each: bool = False


@dataclass(frozen=True)
class Wgrad:
    """Tiles of ``out = scale (D.x)^T g``.

    ``split``: programs that share the token axis of one tile. ``beside``: how dA and dB come to run while dX still does, in the room that
    its programs leave: "stream", on a second stream; "pdl", by programmatic dependent launch, as expand itself begins beside shrink;
    or "", after it.
    """

    block_m: int = 64
    block_j: int = 64
    split: int = 8
    num_warps: int = 4
    num_stages: int = 3
    beside: str = ""


@dataclass(frozen=True)
class Config:
    """One choice for all three kernels. Sizes and counts that do not change the compiled code (split) are free to vary per call."""

    shrink: Shrink = field(default_factory=Shrink)
    expand: Expand = field(default_factory=Expand)
    wgrad: Wgrad = field(default_factory=Wgrad)

    def key(self) -> str:
        """A string from which `from_key` makes the same value."""
        return _key(self)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def from_key(key: str) -> Config:
        return Config.from_dict(json.loads(key))

    @staticmethod
    def from_dict(parts: dict) -> Config:
        """From what `dataclasses.asdict` makes of one."""
        return Config(Shrink(**parts["shrink"]), Expand(**parts["expand"]), Wgrad(**parts["wgrad"]))


@functools.lru_cache(maxsize=1024)
def _key(config: Config) -> str:
    return json.dumps(asdict(config), sort_keys=True)


def rank_block(rank: int, limit: int = 128) -> int:
    """The tile of the rank axis: the next power of two, at least 16 (the least a matmul instruction takes), at most ``limit``."""
    return max(16, min(limit, 1 << (rank - 1).bit_length()))
