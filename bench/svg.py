"""A row of line charts as SVG text: pairs of curves that are to lie on each other, the first broad and pale, the second thin above it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 300, 250  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 34, 40
PALE, DARK, INK, RULE = "#f2b27a", "#1f4e9c", "#222222", "#dddddd"


@dataclass(frozen=True)
class Panel:
    """``curves``: two names and their values, one a step."""

    title: str
    curves: dict[str, Sequence[float]]


def charts(panels: Sequence[Panel], xlabel: str, ylabel: str) -> str:
    """The panels beside each other on one scale."""
    values = [value for panel in panels for curve in panel.curves.values() for value in curve]
    low, high, step = scale(min(values), max(values))
    parts = [_panel(panel, i * WIDTH, low, high, step, xlabel, ylabel) for i, panel in enumerate(panels)]
    return document(parts, WIDTH * len(panels), HEIGHT)


def document(parts: Sequence[str], width: float, height: float) -> str:
    """The file that holds these elements, on white."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="{INK}">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def scale(low: float, high: float) -> tuple[float, float, float]:
    """Ends and step of a scale with four to eight marks at round values."""
    spread = (high - low) or 1.0
    step = next(m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5) if spread / (m * 10.0**e) <= 6)
    below, above = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)  # 1 // 0.2 is 4
    return below * step, above * step, step


def _panel(panel: Panel, left: float, low: float, high: float, step: float, xlabel: str, ylabel: str) -> str:
    last = max(len(curve) for curve in panel.curves.values())
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, HEIGHT - BOTTOM, TOP

    def x(i: float) -> float:
        return x0 + (x1 - x0) * (i - 1) / max(last - 1, 1)

    def y(value: float) -> float:
        return y0 + (y1 - y0) * (value - low) / (high - low)

    lines = [f'<text x="{x0}" y="16" font-size="12">{panel.title}</text>']
    for mark in range(round((high - low) / step) + 1):
        value = low + mark * step
        lines.append(f'<path d="M{x0} {y(value):.1f}H{x1}" stroke="{RULE}"/>')
        lines.append(f'<text x="{x0 - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    lines += [f'<text x="{x(i):.1f}" y="{y0 + 14}" text-anchor="middle">{i}</text>' for i in (1, last)]
    middle = (y0 + y1) / 2
    lines.append(f'<text x="{(x0 + x1) / 2:.1f}" y="{y0 + 14}" text-anchor="middle">{xlabel}</text>')
    lines.append(
        f'<text x="{left + 12}" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 {left + 12} {middle:.1f})">{ylabel}</text>'
    )
    for i, ((name, curve), (colour, width)) in enumerate(zip(panel.curves.items(), ((PALE, 5), (DARK, 1.2)), strict=True)):
        points = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in enumerate(curve, 1))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>')
        at = x0 + 100 * i
        lines.append(f'<path d="M{at} {HEIGHT - 9}h18" stroke="{colour}" stroke-width="{width}"/>')
        lines.append(f'<text x="{at + 23}" y="{HEIGHT - 5}">{name}</text>')
    return "\n".join(lines)
