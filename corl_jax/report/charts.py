"""Draws charts as SVG text: lines with bands, a path of points, a bar of parts.

Colors are those of Okabe and Ito, which color-blind readers can tell apart; lines of several runs
also differ in their dashes.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Callable, Sequence

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2")
WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, BOTTOM = 54, 14, 42
FONT = "font-family=\"system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif\""
INK, FAINT, GRID = "#1c2430", "#5b6675", "#e3e7ec"
MAX_POINTS = 400  # of a line
TITLE_CHARACTERS, LEGEND_CHARACTERS = 50, 40
CHARACTER = 6.6  # width of a character of the legend in pixels, on average

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart."""

    label: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()  # (x, low, high)
    faint: Sequence[Point] = ()  # the values that a smoothed line was computed from
    has_dots: bool = False


@dataclasses.dataclass(frozen=True)
class Axes:
    """Places values on a chart."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    top: float

    def place_x(self, x: float) -> float:
        """Returns the pixel of a value of x."""
        return LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def place_y(self, y: float) -> float:
        """Returns the pixel of a value of y."""
        low = HEIGHT - BOTTOM
        return low - (y - self.y_low) / (self.y_high - self.y_low) * (low - self.top)

    def join(self, points: Sequence[Point]) -> str:
        """Returns points as the value of an SVG attribute."""
        return " ".join(f"{self.place_x(x):.1f},{self.place_y(y):.1f}" for x, y in points)


def escape_text(text: str) -> str:
    """Returns a text for SVG and HTML, without the characters that XML does not allow."""
    return html.escape(re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text))


def choose_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def thin_out(points: Sequence, most: int = MAX_POINTS) -> list:
    """Returns at most `most` of the points, evenly chosen, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(at * (len(points) - 1) / (most - 1))] for at in range(most)]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Returns the mean of each point and its neighbours, `window` points in all."""
    half = window // 2
    means = []
    for at, (x, _) in enumerate(points):
        near = [y for _, y in points[max(at - half, 0) : at + half + 1]]
        means.append((x, sum(near) / len(near)))
    return means


# ---- lines over steps


def draw_lines(
    title: str, lines: Sequence[Line], is_rate: bool = False, x_label: str = "step"
) -> str:
    """Draws lines with their bands over steps. Rates have an axis in percent from 0 on."""
    legend, top = _draw_legend(lines)
    axes = _choose_axes(lines, is_rate, top)
    parts = [_draw_frame(title, axes, is_rate, x_label), legend]
    for at, line in enumerate(lines):
        parts.append(_draw_line(line, at, axes, is_rate) if line.points else "")
    return _wrap_svg(title, parts)


def _choose_axes(lines: Sequence[Line], is_rate: bool, top: float) -> Axes:
    xs = [x for line in lines for x, _ in line.points] or [0]
    ys = [y for line in lines for _, y in (*line.points, *line.faint)]
    ys += [y for line in lines for _, *ends in line.band for y in ends]
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    if is_rate:
        low, high = min(0.0, low), max(min(1.0, 1.12 * high), high, 0.1)
    else:
        room = 0.08 * (high - low) or 0.1 * abs(high) or 0.5
        low, high = low - room, high + room
    x_low, x_high = min(xs), max(xs)
    return Axes(x_low, x_high if x_high > x_low else x_low + 1, low, high, top)


def _draw_line(line: Line, at: int, axes: Axes, is_rate: bool) -> str:
    color = COLORS[at % len(COLORS)]
    parts = []
    if line.band:
        band = thin_out(line.band)
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        parts.append(f'<polygon points="{axes.join(edge)}" fill="{color}" opacity="0.15"/>')
    if line.faint:
        faint = axes.join(thin_out(line.faint))
        parts.append(f'<polyline points="{faint}" fill="none" stroke="{color}" opacity="0.3"/>')
    dash = f' stroke-dasharray="{DASHES[at % len(DASHES)]}"' if at else ""
    points = thin_out(line.points)
    parts.append(
        f'<polyline points="{axes.join(points)}" fill="none" stroke="{color}" stroke-width="2.2" '
        f'stroke-linejoin="round"{dash}/>'
    )
    for x, y in points if line.has_dots or len(points) == 1 else ():
        value = format_tick(y, is_rate) if not is_rate else f"{100 * y:.1f}%"
        parts.append(
            f'<circle cx="{axes.place_x(x):.1f}" cy="{axes.place_y(y):.1f}" r="3.2" '
            f'fill="{color}"><title>{escape_text(line.label)}: {value} at {x:g}</title></circle>'
        )
    return "".join(parts)


def _draw_frame(
    title: str, axes: Axes, is_rate: bool, x_label: str, y_label: str = "", x_is_rate: bool = False
) -> str:
    """Draws title, grid and the numbers of both axes."""
    parts = [_write(LEFT - 44, 19, _shorten(title, TITLE_CHARACTERS), size=14.5, weight=600)]
    for y in choose_ticks(axes.y_low, axes.y_high):
        place = axes.place_y(y)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}" '
            f'stroke="{GRID}"/>'
        )
        parts.append(_write(LEFT - 8, place + 4, format_tick(y, is_rate), "end", color=FAINT))
    low = HEIGHT - BOTTOM
    for x in choose_ticks(axes.x_low, axes.x_high, 6):
        place = axes.place_x(x)
        parts.append(_write(place, low + 18, format_tick(x, x_is_rate), "middle", color=FAINT))
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{low}" y2="{low}" stroke="{FAINT}"/>')
    parts.append(_write((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 7, x_label, "middle", color=FAINT))
    if y_label:
        parts.append(_write(LEFT - 44, 38, y_label, color=FAINT))
    return "".join(parts)


def _draw_legend(lines: Sequence[Line]) -> tuple[str, float]:
    """Draws the names of several lines below the title; returns also where the chart begins.

    A line without points is left out, and the others keep their colors.
    """
    if len(lines) < 2:
        return "", 34
    parts, x, y = [], float(LEFT), 40.0
    for at, line in enumerate(lines):
        if not line.points:
            continue
        text = _shorten(line.label, LEGEND_CHARACTERS)
        width = 30 + CHARACTER * len(text) + 14
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, y = float(LEFT), y + 17
        color, dash = COLORS[at % len(COLORS)], DASHES[at % len(DASHES)]
        parts.append(
            f'<line x1="{x:.0f}" x2="{x + 24:.0f}" y1="{y - 4:.0f}" y2="{y - 4:.0f}" '
            f'stroke="{color}" stroke-width="2.6"{f" stroke-dasharray={dash!r}" if dash else ""}/>'
        )
        parts.append(_write(x + 30, y, text, color=INK))
        x += width
    return "".join(parts), y + 14


# ---- other charts


def draw_path(
    title: str, paths: Sequence[tuple[str, Sequence[tuple[int, float, float]]]],
    x_label: str, y_label: str,
) -> str:  # fmt: skip
    """Draws one value against another as a path over steps; `paths`: label, (step, x, y)."""
    lines = [Line(label, [(x, y) for _, x, y in path], has_dots=True) for label, path in paths]
    legend, top = _draw_legend(lines)
    axes = _choose_axes(lines, True, max(top, 52) if len(lines) < 2 else top + 16)
    room = 0.08 * (axes.x_high - axes.x_low)
    axes = dataclasses.replace(axes, x_low=axes.x_low - room, x_high=axes.x_high + room)
    # The legend stands where the name of the axis would be.
    name = y_label if len(lines) < 2 else ""
    parts = [_draw_frame(title, axes, True, x_label, name), legend]
    for at, (line, (_, path)) in enumerate(zip(lines, paths, strict=True)):
        parts.append(_draw_line(line, at, axes, True))
        for step, x, y in path if len(path) < 3 else (path[0], path[-1]):
            place = (axes.place_x(x), axes.place_y(y) - 9)
            parts.append(_write(*place, f"step {step}", "middle", color=INK))
    return _wrap_svg(title, parts)


@dataclasses.dataclass(frozen=True)
class Cross:
    """A point with the ends of its intervals, which are equal to it where none is known."""

    label: str
    x: tuple[float, float, float]  # low, value, high
    y: tuple[float, float, float]


def draw_crosses(
    title: str, crosses: Sequence[Cross], x_label: str, y_label: str, is_rate: bool = False
) -> str:
    """Draws one value against another, a cross of its two intervals and a name for each point."""
    ends = [Line("", [(x, y) for x in cross.x for y in cross.y]) for cross in crosses]
    # Rates too without the 0 of other charts, because only the places of points are compared.
    axes = _choose_axes(ends, False, 52)
    # Room for the names, which stand to the right of their points.
    room = 0.06 * (axes.x_high - axes.x_low)
    axes = dataclasses.replace(axes, x_low=axes.x_low - room, x_high=axes.x_high + 4 * room)
    parts = [_draw_frame(title, axes, is_rate, x_label, y_label, x_is_rate=is_rate)]
    points = [(axes.place_x(cross.x[1]), axes.place_y(cross.y[1])) for cross in crosses]
    names = place_names(points, [CHARACTER * 1.15 * len(cross.label) for cross in crosses])
    for at, cross in enumerate(crosses):
        color = COLORS[at % len(COLORS)]
        (left, x, right), (low, y, high) = map(axes.place_x, cross.x), map(axes.place_y, cross.y)
        parts.append(
            f'<path d="M{left:.1f} {y:.1f}H{right:.1f}M{x:.1f} {low:.1f}V{high:.1f}" '
            f'stroke="{color}" stroke-width="1.6" opacity="0.7"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
        )
        parts.append(_write(*names[at], cross.label, color=color, weight=600))
    return _wrap_svg(title, parts)


def place_names(points: Sequence[Point], widths: Sequence[float]) -> list[Point]:
    """Returns where the names of points begin, in pixels, so that few lie on each other.

    A name stands above or below its point, to the right or to the left of it.
    """
    height, places, boxes = 13.0, [], [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for (x, y), width in zip(points, widths, strict=True):
        corners = [(x + 7, y - 6), (x + 7, y + 16), (x - 7 - width, y - 6), (x - 7 - width, y + 16)]
        corners += [(x + 7, y - 20), (x - 7 - width, y + 30)]
        options = [(left, low - height, left + width, low) for left, low in corners]
        # A name that leaves the chart is cut off, which is worse than any overlap.
        overlaps = [
            sum(is_overlapping(box, other) for other in boxes)
            + len(boxes) * (box[0] < 0 or box[2] > WIDTH)
            for box in options
        ]
        best = overlaps.index(min(overlaps))
        boxes.append(options[best])
        places.append(corners[best])
    return places


def is_overlapping(
    box: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    """Returns whether two boxes (left, top, right, bottom) share an area."""
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def tile_charts(charts: Sequence[str], most_columns: int) -> str:
    """Returns charts side by side as one SVG file on white."""
    columns, parts = min(most_columns, len(charts)), []
    for at, chart in enumerate(charts):
        row, column = divmod(at, columns)
        place = f'<svg x="{column * WIDTH}" y="{row * HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(chart.replace("<svg ", place, 1))
    width, height = columns * WIDTH, -(-len(charts) // columns) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def draw_parts(parts: Sequence[tuple[str, float]], format_part: Callable[[float], str]) -> str:
    """Draws a bar of the parts of a sum, with their names and values below."""
    total = sum(value for _, value in parts) or 1.0
    shapes, x, row = [], 0.0, 0
    for at, (label, value) in enumerate(parts):
        width = value / total * WIDTH
        color = COLORS[at % len(COLORS)]
        shapes.append(
            f'<rect x="{x:.1f}" y="0" width="{max(width - 1, 0.5):.1f}" height="26" fill="{color}">'
            f"<title>{escape_text(label)}: {escape_text(format_part(value))}</title></rect>"
        )
        x += width
        row = 46 + 20 * at
        shapes.append(f'<rect x="0" y="{row - 11}" width="12" height="12" fill="{color}"/>')
        shapes.append(_write(20, row, label))
        shapes.append(_write(150, row, f"{format_part(value)}, {value / total:.0%}", color=FAINT))
    return _wrap_svg("parts of a step", shapes, height=row + 10)


# ---- pieces


def format_tick(value: float, is_rate: bool = False) -> str:
    """Returns a short text for a number of an axis."""
    if is_rate:
        return f"{100 * value:.4g}%"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def _shorten(text: str, characters: int) -> str:
    return text if len(text) <= characters else "…" + text[-characters + 1 :]


def _write(
    x: float, y: float, text: str, anchor: str = "start", size: float = 12.5, color: str = INK,
    weight: int = 400,
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}" font-weight="{weight}">{escape_text(text)}</text>'
    )


def _wrap_svg(title: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape_text(title)}" {FONT}>{"".join(parts)}</svg>'
    )
