"""What is measured: layers K -> N of published models, token counts, ranks and dropout, most informative points first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from lora_kernels.segments import ONE, Adapters

LLAMA_8B = {"8B q,o": (4096, 4096), "8B gate,up": (4096, 14336), "8B down": (14336, 4096), "8B k,v": (4096, 1024)}
LLAMA_70B = {"70B q,o": (8192, 8192), "70B gate,up": (8192, 28672), "70B down": (28672, 8192), "70B k,v": (8192, 1024)}
TOKENS = (8192, 2048, 512)
FEW_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Point:
    """One problem: x ``[M, K]``, weight ``[N, K]``, rank r; ``grid``: "train", "decode" (forward alone) or "lorafusion"."""

    grid: str
    layer: str
    M: int
    K: int
    N: int
    r: int = 16
    p: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.grid} {self.M}x{self.K}->{self.N} r={self.r} p={self.p:g} {str(self.dtype).removeprefix('torch.')}"

    def fields(self) -> dict:
        """The point's part of a row."""
        dtype = str(self.dtype).removeprefix("torch.")
        return dict(grid=self.grid, layer=self.layer, M=self.M, N=self.N, K=self.K, r=self.r, p=self.p, dtype=dtype)

    @property
    def forward_alone(self) -> bool:
        return self.grid == "decode"

    @property
    def weights(self) -> int:
        """How many weights ``[N, K]`` are read."""
        return 1

    @property
    def packed_layers(self) -> int:
        """How many layers the weight packs, each with its own u."""
        return 1

    @property
    def low_rank(self) -> tuple[int, int, int]:
        """(elements of u, the ranks of the adapters in use added up, those of all that are loaded)."""
        return self.M * self.r, self.r, self.r

    def empty_operands(self, device: torch.device) -> Operands:
        """Operands whose values do not matter; device "meta": without storage."""
        M, K, N, r = self.M, self.K, self.N, self.r
        shapes = ((M, K), (N, K), (r, K), (N, r), (M, N))
        x, weight, lora_A, lora_B, dy = (torch.empty(s, dtype=self.dtype, device=device) for s in shapes)
        return Operands(x, weight, lora_A, lora_B, dy, scale=2.0, p=self.p)

    def operands(self, device: torch.device) -> Operands:
        """Random operands, the same for the same point."""
        o = self.empty_operands(device)
        generator = torch.Generator(device).manual_seed(0)
        for t, std in ((o.x, 1.0), (o.weight, self.K**-0.5), (o.lora_A, self.K**-0.5), (o.lora_B, self.r**-0.5), (o.dy, 1.0)):
            t.normal_(0.0, std, generator=generator)
        for t in (o.x, o.lora_A, o.lora_B):
            t.requires_grad_(True)
        return o


@dataclass
class Operands:
    """A point's tensors: random normal, scaled so that y is of order one; gradients wanted for x, A and B.

    ``base``: what another layer makes of x, where there is no weight.
    """

    x: torch.Tensor
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    dy: torch.Tensor
    scale: float
    p: float
    adapters: Adapters = ONE
    base: torch.Tensor | None = None


def train(layers: dict, tokens: Iterable[int], ranks: Iterable[int], grid: str = "train", dropouts=(0.1, 0.0), dtype=torch.bfloat16):
    """tokens x ranks x layers x dropout, in this order."""
    return [Point(grid, name, M, K, N, r, p, dtype) for M in tokens for r in ranks for name, (K, N) in layers.items() for p in dropouts]


def gpu_single(quick: bool) -> list[Point]:
    if quick:
        layer = {"8B k,v": (4096, 1024)}
        return [*train(layer, (512,), (16,)), *train(layer, (1, 16), (16,), "decode", (0.0,))]
    square = {f"{n}": (n, n) for n in (4096, 5120, 8192)}
    q_o = {"8B q,o": LLAMA_8B["8B q,o"]}
    found = [
        *train(LLAMA_8B, TOKENS[:1], (16,)),
        *train(q_o, FEW_TOKENS, (16,), "decode", (0.0,)),
        *train(LLAMA_70B, TOKENS[:1], (16,)),
        *train(square, (2048, 4096, 6144, 8192), (16,), "lorafusion", (0.1,)),
        *train(LLAMA_8B, TOKENS, (16,)),
        *train(LLAMA_8B, FEW_TOKENS, (16,), "decode", (0.0,)),
        *train(LLAMA_70B, TOKENS, (16,)),
        *train(LLAMA_8B, TOKENS, (64,)),
        *train(q_o, (8192, 2048), (8, 256)),
        *train(LLAMA_70B, FEW_TOKENS, (16,), "decode", (0.0,)),
        *train(LLAMA_70B, TOKENS, (64,)),
        *train(LLAMA_8B, FEW_TOKENS, (64,), "decode", (0.0,)),
    ]
    return list(dict.fromkeys(found))


def cpu_single(quick: bool) -> list[Point]:
    """The same path on a machine without a GPU."""
    if quick:
        layer = {"small": (64, 96)}
        return [*train(layer, (32,), (8,), dtype=torch.float32), *train(layer, (1,), (8,), "decode", (0.0,), torch.float32)]
    layers = {"1024->1024": (1024, 1024), "1024->4096": (1024, 4096)}
    return [*train(layers, (512, 128), (16,), dtype=torch.float32), *train(layers, (1, 16), (16,), "decode", (0.0,), torch.float32)]


def tune(cuda: bool, quick: bool) -> list[Point]:
    """Points whose configurations are tuned: training with and without dropout, and few tokens."""
    if not cuda:
        layer = {"small": (32, 48)}
        tokens, few = train(layer, (80,), (8,), dropouts=(0.1,)), train(layer, (2,), (8,), "decode", (0.0,))
        return [replace(point, dtype=torch.float32) for point in (*tokens, *few)]
    if quick:
        return gpu_single(quick)
    few, q_o = (16, 64, 128, 1), {"8B q,o": LLAMA_8B["8B q,o"]}
    found = [
        *train(q_o, (8192,), (16,)),
        *train(q_o, few, (16,), "decode", (0.0,)),
        *train(LLAMA_8B, (8192,), (16,)),
        *train(LLAMA_8B, few, (16,), "decode", (0.0,)),
        *train(LLAMA_70B, (8192,), (16,)),
        *train(LLAMA_8B, (2048,), (16,)),
        *train(LLAMA_70B, (2048,), (16,)),
        *train(LLAMA_70B, few, (16,), "decode", (0.0,)),
    ]
    return list(dict.fromkeys(found))


def memory(device: torch.device, quick: bool) -> list[Point]:
    if device.type != "cuda":
        layers = {"small": (64, 96)} if quick else {"1024->1024": (1024, 1024), "1024->4096": (1024, 4096)}
        return train(layers, (32,) if quick else (512,), (16,), dtype=torch.float32)
    return train({"8B k,v": LLAMA_8B["8B k,v"]} if quick else LLAMA_8B | LLAMA_70B, (512,) if quick else (8192, 2048), (16,))


def host(device: torch.device) -> list[Point]:
    """So small that the device is never what a call waits for."""
    small = Point("host", "small", 16, 32, 32, 8, 0.0, torch.float32)
    if device.type == "cuda":
        small = replace(small, K=256, N=256, r=16, dtype=torch.bfloat16)
    return [small, replace(small, p=0.1)]


def cpu_chain(quick: bool) -> list[Point]:
    """The points of `bench.cpu`; p = 0 first, dropout as extra rows."""
    layers = {"1024->1024": (1024, 1024), "1024->4096": (1024, 4096), "4096->4096": (4096, 4096)}
    tokens: tuple[int, ...] = (512, 2048)
    if quick:
        layers, tokens = {"64->64": (64, 64)}, (32,)
    dtypes = (torch.float32, torch.bfloat16)
    return [point for p in (0.0, 0.1) for dtype in dtypes for point in train(layers, tokens, (16,), "cpu", (p,), dtype)]
