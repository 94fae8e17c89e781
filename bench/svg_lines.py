"""Line charts as SVG text: panels in a grid, a line and its points for each name, the x axis logarithmic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .svg import BOTTOM, HEIGHT, LEFT, RIGHT, RULE, TOP, WIDTH, document, scale

COLUMNS = 3
LEGEND = 18  # height of a line of it
COLOURS = ("#1f4e9c", "#d1495b", "#2e8b57", "#b8860b", "#7b4ea3", "#3b9ab2", "#8c564b", "#e377c2", "#555555", "#9aa02c")
WIDEST = 8.0  # a greater ratio of the largest value to the smallest asks for a logarithmic y axis


@dataclass(frozen=True)
class Lines:
    """A panel: the points (x, y) of each name, x ascending. Panels of equal ``scale`` share their axes."""

    title: str
    lines: dict[str, Sequence[tuple[float, float]]]
    scale: str = ""


@dataclass(frozen=True)
class Axis:
    """``place`` maps a value to 0 .. 1; ``marks`` are where it is labelled."""

    marks: tuple[float, ...]
    place: Callable[[float], float]


def log_axis(low: float, high: float, marks: Sequence[float]) -> Axis:
    """From low to high, at equal ratios equally far; at most nine of the marks."""
    spread = math.log(high / low)
    every = -(-len(marks) // 9)
    return Axis(tuple(marks[::every]), lambda value: math.log(value / low) / spread if spread else 0.5)


def linear_axis(low: float, high: float) -> Axis:
    below, above, step = scale(low, high)
    marks = tuple(below + i * step for i in range(round((above - below) / step) + 1))
    return Axis(marks, lambda value: (value - below) / (above - below))


def y_axis(values: Sequence[float]) -> Axis:
    """Linear, or where the values are far apart logarithmic with powers of two."""
    low, high = min(values), max(values)
    if high <= WIDEST * low:
        return linear_axis(low, high)
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return log_axis(2.0**first, 2.0**last, [2.0**i for i in range(first, last + 1)])


def charts(panels: Sequence[Lines], xlabel: str, ylabel: str, columns: int = COLUMNS) -> str:
    """The panels, and below them what each colour is."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    axes = {each: _axes([panel for panel in panels if panel.scale == each]) for each in {panel.scale for panel in panels}}
    columns = min(columns, len(panels))
    width, rows = WIDTH * columns, -(-len(panels) // columns)
    styles = {name: _style(i) for i, name in enumerate(names)}
    parts = [_panel(p, (i % columns) * WIDTH, (i // columns) * HEIGHT, axes[p.scale], styles, xlabel, ylabel) for i, p in enumerate(panels)]
    legend, height = _legend(styles, width, rows * HEIGHT)
    return document([*parts, *legend], width, height)


def _axes(panels: Sequence[Lines]) -> tuple[Axis, Axis]:
    points = [point for panel in panels for line in panel.lines.values() for point in line]
    xs = sorted({x for x, _ in points})
    return log_axis(xs[0], xs[-1], xs), y_axis([y for _, y in points])


def _style(i: int) -> str:
    dashes = ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 2"')[i // len(COLOURS) % 3]
    return f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.4"{dashes}'


def _panel(panel: Lines, left: float, top: float, axes: tuple[Axis, Axis], styles: dict[str, str], xlabel: str, ylabel: str) -> str:
    x_axis, y_axis = axes
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, top + HEIGHT - BOTTOM, top + TOP

    def x(value: float) -> float:
        return x0 + (x1 - x0) * x_axis.place(value)

    def y(value: float) -> float:
        return y0 + (y1 - y0) * y_axis.place(value)

    lines = [f'<text x="{x0}" y="{top + 16}" font-size="12">{escape(panel.title)}</text>']
    for value in y_axis.marks:
        lines.append(f'<path d="M{x0} {y(value):.1f}H{x1}" stroke="{RULE}"/>')
        lines.append(f'<text x="{x0 - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    lines += [f'<text x="{x(value):.1f}" y="{y0 + 14}" text-anchor="middle">{value:g}</text>' for value in x_axis.marks]
    lines.append(f'<text x="{(x0 + x1) / 2:.1f}" y="{y0 + 29}" text-anchor="middle">{escape(xlabel)}</text>')
    turned, middle = left + 12, (y0 + y1) / 2
    turn = f'transform="rotate(-90 {turned} {middle:.1f})"'
    lines.append(f'<text x="{turned}" y="{middle:.1f}" text-anchor="middle" {turn}>{escape(ylabel)}</text>')
    for name, points in panel.lines.items():
        places = [(x(a), y(b)) for a, b in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        lines.append(
            f'<polyline points="{path}" fill="none" {styles[name]} stroke-linejoin="round"><title>{escape(name)}</title></polyline>'
        )
        lines += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="1.8" fill="white" {styles[name]}/>' for a, b in places]
    return "\n".join(lines)


def _legend(styles: dict[str, str], width: float, top: float) -> tuple[list[str], float]:
    """A line and a name each, as many beside each other as there is room for; and where they end."""
    lines, left = [], LEFT
    for name, style in styles.items():
        wanted = 40 + 6.2 * len(name)
        if left > LEFT and left + wanted > width:
            left, top = LEFT, top + LEGEND
        lines.append(f'<path d="M{left:.1f} {top + 6}h18" {style}/>')
        lines.append(f'<text x="{left + 23:.1f}" y="{top + 10}">{escape(name)}</text>')
        left += wanted
    return lines, top + LEGEND
