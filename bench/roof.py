"""Section ``roof``: the ceilings this machine reaches, measured: device-to-device copy and the library's matmul on random data.

time floor of a pass = max(operations / matmul rate, least bytes / copy rate)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .conditions import dtype_name, read_rows
from .session import Budget, Session, say
from .table import text_table
from .timing import Step, Times, clock_for, interleave
from .workloads import LLAMA_8B, LLAMA_70B, Point


@dataclass(frozen=True)
class Roof:
    """Bytes and operations a second."""

    copy: float
    matmul: float

    def floor_ms(self, point: Point, what: str) -> float:
        return self.least_ms(*work(point, what))

    def least_ms(self, operations: float, moved: float) -> float:
        return 1e3 * max(operations / self.matmul, moved / self.copy)


def work(point: Point, what: str) -> tuple[float, float]:
    """(operations, least bytes moved) of a pass: each input in use read once, each output written once."""
    M, K, N, W = point.M, point.K, point.N, point.weights * point.N * point.K
    u, used, loaded = point.low_rank
    both = N + point.packed_layers * K  # B has r columns for each output, A r rows for each layer
    forward = 2 * (M * N * K + u * both), M * K + W + M * N + used * both + (0 if point.forward_alone else u * point.packed_layers)
    # dS, dX, dA and dB: x, dY, W, U and the adapters in use in, dX, dA and dB out; these are whole stacks, zeros included.
    backward = 2 * (M * N * K + 2 * u * both), 2 * M * K + M * N + W + u * point.packed_layers + (used + loaded) * both
    operations, elements = {"forward": forward, "backward": backward, "both": (forward[0] + backward[0], forward[1] + backward[1])}[what]
    return operations, elements * point.dtype.itemsize


def load(session: Session) -> Roof | None:
    """The ceilings an earlier ``roof`` section of this folder measured on this machine, or None."""
    rows = [row for row in read_rows(session.path("roof")) if all(row[k] == session.conditions[k] for k in ("gpu", "cpu", "threads"))]
    copies = [row["gbs"] for row in rows if row["what"] == "copy"]
    products = [row["tflops"] for row in rows if row["what"] == "matmul" and row["layer"] == "square"]
    return Roof(copies[0] * 1e9, products[0] * 1e12) if copies and products else None


def run(session: Session) -> int:
    """Writes the ceilings; returns the number of errors, 0: a machine that cannot copy or multiply has no roof, so they are raised."""
    cuda = session.device.type == "cuda"
    recorder, clock = session.recorder("roof"), clock_for(session.device)
    dtype = torch.bfloat16 if cuda else torch.float32

    moved, copy = _copy(session, clock, dtype, elements=(1 << 30 if cuda else 1 << 24) >> (4 if session.quick else 0))
    gbs = moved / copy.p50 / 1e6
    recorder.add(what="copy", arm="torch", launch=clock.launch, dtype=dtype_name(dtype), ms=copy.ms(), rounds=copy.rounds, gbs=gbs)
    rows: list[list] = [[f"copy {moved / 1e9:.2f} GB read + written", copy.p50, f"{gbs:.0f} GB/s"]]

    for name, M, K, N in Budget(session.seconds).walk(_products(cuda, session.quick)):
        product = _matmul(session, clock, dtype, M, K, N)
        tflops = 2 * M * N * K / product.p50 / 1e9
        recorder.add(
            what="matmul", arm="torch", launch=clock.launch, layer=name, M=M, N=N, K=K, dtype=dtype_name(dtype),
            ms=product.ms(), rounds=product.rounds, tflops=tflops,
        )  # fmt: skip
        say(f"roof {name} {M}x{K}->{N} {tflops:.3g} TFLOP/s")
        rows.append([f"matmul {name} {M}x{K}->{N}", product.p50, f"{tflops:.3g} TFLOP/s"])
    print(text_table([f"roof, {dtype_name(dtype)}", "ms", "rate"], rows), flush=True)
    return 0


def _copy(session: Session, clock, dtype: torch.dtype, elements: int) -> tuple[int, Times]:
    """(bytes read and written, times)."""
    source = torch.empty(elements, dtype=dtype, device=session.device).normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size(), _time(lambda: target.copy_(source), clock)


def _matmul(session: Session, clock, dtype: torch.dtype, M: int, K: int, N: int) -> Times:
    a = torch.empty(M, K, dtype=dtype, device=session.device).normal_()
    b = torch.empty(N, K, dtype=dtype, device=session.device).normal_()
    return _time(lambda: a @ b.t(), clock)


def _time(function, clock) -> Times:
    times, errors = interleave({"it": Step(function)}, clock, seconds=1.0, least=10)
    for error in errors.values():
        raise RuntimeError(f"roof: {error}")
    return times["it"]["forward"]


def _products(cuda: bool, quick: bool) -> list[tuple[str, int, int, int]]:
    if not cuda:
        n = 256 if quick else 1024
        return [("square", n, n, n)]
    square = [("square", 8192, 8192, 8192)]
    return square if quick else square + [(name, 8192, K, N) for name, (K, N) in (LLAMA_8B | LLAMA_70B).items()]
