"""Small plots as inline SVG, made without a plotting library.

Fonts and colors come from the page's CSS, so that one drawing serves light mode, dark mode and print. A mark names its
color by class (`distilled`, `ce`, ...). The same data give the same bytes. Every plot is 480 wide and scales with its
column. Hovering a mark shows its value through SVG's own `<title>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

WIDTH = 480
_LINE_HEIGHT = 14

Number = int | float


@dataclass(frozen=True)
class Series:
    """A curve: its label, its color's class and its points."""

    label: str
    color: str
    points: tuple[tuple[Number, Number], ...]


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare curves with."""

    label: str
    value: Number


@dataclass(frozen=True)
class Interval:
    """A value with its standard error, for a row of a dot plot."""

    label: str
    color: str
    value: Number
    stderr: Number | None


def curves(
    series: Sequence[Series], *, title: str, x_label: str, levels: Sequence[Level] = (), log_y: bool = False
) -> str:
    """Curves over a shared x axis with their names at their ends, and dashed levels."""
    height, left, right, top, bottom = 270, 50, 118, 12, 40
    xs = [x for curve in series for x, _ in curve.points]
    ys = [y for curve in series for _, y in curve.points] + [level.value for level in levels]
    x_ticks = ticks(0, max(xs))
    y_low, y_high, y_ticks = _y_range(ys, log_y)
    to_x = _scale(0, max(xs), left, WIDTH - right)
    to_y = _scale(y_low, y_high, height - bottom, top, log=log_y)
    parts = [_grid_y(y_ticks, to_y, left, WIDTH - right), _axis_x(x_ticks, to_x, height - bottom, x_label)]
    for level in levels:
        parts.append(f'<path class="level" d="M{left} {_n(to_y(level.value))}H{WIDTH - right}"/>')
    ends = [(to_y(level.value), level.label, "muted") for level in levels]
    for curve in series:
        path = "L".join(f"{_n(to_x(x))} {_n(to_y(y))}" for x, y in curve.points)
        last_x, last_y = curve.points[-1]
        parts.append(f'<path class="curve {curve.color}" d="M{path}"/>')
        parts.append(
            f'<circle class="dot {curve.color}" cx="{_n(to_x(last_x))}" cy="{_n(to_y(last_y))}" r="3">'
            f"<title>{escape(curve.label)}: {figure(last_y)}</title></circle>"
        )
        ends.append((to_y(last_y), curve.label, curve.color))
    for y, label, color in _spread(ends, low=top, high=height - bottom):
        parts.append(_text(WIDTH - right + 9, y + 4, label, f"label {color}"))
    return _svg(height, title, parts)


def tracks(series: Sequence[Series], *, title: str, x_label: str, marks: Sequence[Number]) -> str:
    """Curves on a logarithmic y axis that may end early, each with its label at its last point.

    `marks` are values of x with a vertical line, such as the rungs of a tournament. Series are drawn in order, so that
    the last one lies on top.
    """
    height, left, right, top, bottom = 300, 50, 34, 12, 40
    xs = [x for curve in series for x, _ in curve.points]
    y_low, y_high, y_ticks = _y_range([y for curve in series for _, y in curve.points], log=True)
    if len(y_ticks) < 2:  # a range without two of 1, 2, 5, 10, ...
        y_ticks = ticks(y_low, y_high, 4)
    to_x = _scale(0, max(xs), left, WIDTH - right)
    to_y = _scale(y_low, y_high, height - bottom, top, log=True)
    parts = [_grid_y(y_ticks, to_y, left, WIDTH - right), _axis_x(ticks(0, max(xs)), to_x, height - bottom, x_label)]
    parts += [f'<path class="level" d="M{_n(to_x(mark))} {top}V{height - bottom}"/>' for mark in marks]
    ends: dict[Number, list[tuple[Number, str, str]]] = {}
    for curve in series:
        path = "L".join(f"{_n(to_x(x))} {_n(to_y(y))}" for x, y in curve.points)
        parts.append(f'<path class="curve {curve.color}" d="M{path}"/>')
        for x, y in curve.points:
            name = f"{curve.label}: {figure(y)} at {figure(x)}"
            dot = f'<circle class="dot {curve.color}" cx="{_n(to_x(x))}" cy="{_n(to_y(y))}" r="3">'
            parts.append(f"{dot}<title>{escape(name)}</title></circle>")
        last_x, last_y = curve.points[-1]
        ends.setdefault(to_x(last_x), []).append((to_y(last_y), curve.label, curve.color))
    for x, labels in ends.items():
        spread = _spread(labels, low=top, high=height - bottom)
        parts += [_text(x + 8, y + 4, text, f"label {color}") for y, text, color in spread]
    return _svg(height, title, parts)


def dots(rows: Sequence[Interval], *, title: str) -> str:
    """One row per model: a dot at its value, and a whisker of two standard errors to either side."""
    left, right, top, step = 132, 74, 8, 27
    height = top + step * len(rows) + 28
    low = min(row.value - 2 * (row.stderr or 0) for row in rows)
    high = max(row.value + 2 * (row.stderr or 0) for row in rows)
    pad = (high - low or abs(high) or 1) * 0.04
    low, high = (0 if 0 <= low - pad < (high - low) * 0.35 else low - pad), high + pad
    to_x = _scale(low, high, left, WIDTH - right)
    base = height - 24
    parts = [_axis_x(ticks(low, high, 4), to_x, base, "", grid_top=top)]
    for i, row in enumerate(rows):
        y, error = top + step * (i + 0.5), 2 * (row.stderr or 0)
        name = f"{row.label}: {figure(row.value)}" + (f" ± {figure(row.stderr)}" if row.stderr else "")
        parts.append(_text(0, y + 4, row.label, "label"))
        if error:
            x0, x1 = _n(to_x(row.value - error)), _n(to_x(row.value + error))
            parts.append(f'<path class="whisker {row.color}" d="M{x0} {_n(y)}H{x1}"/>')
        parts.append(
            f'<circle class="dot {row.color}" cx="{_n(to_x(row.value))}" cy="{_n(y)}" r="5">'
            f"<title>{escape(name)}</title></circle>"
        )
        parts.append(_text(WIDTH, y + 4, figure(row.value, trim=False), "tick end"))
    return _svg(height, title, parts)


_SHEET_STYLE = """
svg{--ink:#1b1d21;--muted:#646a73;--line:#e4e1da;--panel:#ffffff;--teacher:#7a808a;--distilled:#0f766e}
@media (prefers-color-scheme:dark){svg{--ink:#e9e7e2;--muted:#9aa0a9;--line:#2c3036;--panel:#1a1d21;
--teacher:#8d939d;--distilled:#4fd1c0}}
text{fill:var(--muted);font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.back{fill:var(--panel)}.heading{fill:var(--ink);font-weight:600;font-size:14px}.label{fill:var(--c,var(--muted));
font-weight:600}.middle{text-anchor:middle}.end{text-anchor:end}.grid{stroke:var(--line);fill:none}
.dot{fill:var(--c);stroke:var(--panel);stroke-width:1.5}
.whisker{stroke:var(--c);stroke-width:2.5;stroke-linecap:round;opacity:.45}
.teacher{--c:var(--teacher)}.distilled{--c:var(--distilled)}
"""


def sheet(panels: Sequence[tuple[str, str]], *, title: str) -> str:
    """Plots of this module below each other, each with its heading, as one file with its own style."""
    margin, top = 16, 16
    parts = [f"<style>{_SHEET_STYLE}</style>", '<rect class="back" width="100%" height="100%" rx="12"/>']
    for heading, svg in panels:
        height = float(svg.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1])
        place = f'<svg x="{margin}" y="{_n(top + 24)}" width="{WIDTH}" height="{_n(height)}" '
        parts.append(_text(margin, top + 12, heading, "heading"))
        parts.append(svg.replace("<svg ", place, 1))
        top += math.ceil(height) + 40
    return _svg(top, title, parts, width=WIDTH + 2 * margin) + "\n"


def bars(values: Sequence[Number], kept: Sequence[bool], *, title: str, x_label: str) -> str:
    """One bar per entry. Entries that were cut are outlined."""
    height, left, top, bottom = 190, 50, 12, 40
    high = max(*values, 0.0) or 1.0
    y_ticks = ticks(0, high, 4)
    to_y = _scale(0, max(high, y_ticks[-1]), height - bottom, top)
    pitch = (WIDTH - left - 4) / len(values)
    parts = [_grid_y(y_ticks, to_y, left, WIDTH - 4)]
    label_every = math.ceil(len(values) / 16)
    for i, (value, keep) in enumerate(zip(values, kept, strict=True)):
        x, width, y = left + pitch * (i + 0.14), pitch * 0.72, to_y(max(value, 0))
        state = "kept" if keep else "cut"
        parts.append(
            f'<rect class="bar {state}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}"'
            f' height="{_n(to_y(0) - y)}" rx="1.5">'
            f"<title>{i}: {figure(value)}, {state}</title></rect>"
        )
        if i % label_every == 0:
            parts.append(_text(x + width / 2, height - bottom + 15, str(i), "tick middle"))
    parts.append(_text((left + WIDTH) / 2, height - 6, x_label, "tick middle"))
    return _svg(height, title, parts)


def profile(values: Sequence[Number], kept: int, *, title: str, x_label: str) -> str:
    """Values in descending order as a filled curve. The first `kept` of them were kept."""
    height, left, right, top, bottom = 190, 50, 4, 16, 40
    step = max(1, len(values) // 240)
    ordered = sorted(values, reverse=True)
    points = [(i, ordered[i]) for i in range(0, len(ordered), step)] + [(len(ordered) - 1, ordered[-1])]
    y_ticks = ticks(0, ordered[0], 4)
    to_x = _scale(0, len(ordered) - 1, left, WIDTH - right)
    to_y = _scale(0, ordered[0] * 1.05 or 1.0, height - bottom, top)
    base = height - bottom
    edge = min(kept, len(ordered) - 1)
    parts = [_grid_y(y_ticks, to_y, left, WIDTH - right)]
    for state, part in (
        ("cut", [p for p in [(edge, ordered[edge]), *points] if p[0] >= edge]),
        ("kept", [*(p for p in points if p[0] < edge), (edge, ordered[edge])]),
    ):
        path = "L".join(f"{_n(to_x(x))} {_n(to_y(y))}" for x, y in sorted(part))
        first, last = _n(to_x(min(part)[0])), _n(to_x(max(part)[0]))
        parts.append(f'<path class="area {state}" d="M{path}L{last} {base}L{first} {base}Z"/>')
    if kept < len(values):
        parts.append(_cut_line(to_x(edge), top - 6, base, f"kept {kept} of {len(values)}", to_x(edge) > 300))
    parts.append(_axis_x(ticks(0, len(values), 4), to_x, base, x_label))
    return _svg(height, title, parts)


def ranked(
    rows: Sequence[Sequence[Number]], labels: Sequence[str], *, title: str, x_label: str, cut_at: Number | None
) -> str:
    """Heat map of importance, best first: one row per layer, and columns are shares of its entries.

    `rows` hold values from 0 to 1. A line marks `cut_at`, the share that is kept.
    """
    left, right, top, bottom = 50, 4, 20, 40
    row_height = min(18.0, max(5.0, 260 / len(rows)))
    height = math.ceil(top + row_height * len(rows) + bottom)
    width = (WIDTH - left - right) / len(rows[0])
    parts = []
    label_every = math.ceil(11 / row_height)
    for i, row in enumerate(rows):
        y = top + row_height * i
        for j, value in enumerate(row):
            parts.append(_cell(left + width * j, y, width + 0.3, row_height - 1, value))
        if i % label_every == 0:
            parts.append(_text(left - 7, y + row_height / 2 + 4, labels[i], "tick end"))
    base = top + row_height * len(rows)
    if cut_at is not None:
        x = left + (WIDTH - left - right) * cut_at
        parts.append(_cut_line(x, top - 14, base + 3, f"kept {100 * cut_at:.0f} %", cut_at > 0.5))
    parts.append(_text((left + WIDTH) / 2, height - 6, x_label, "tick middle"))
    return _svg(height, title, parts)


def grid(
    rows: Sequence[Sequence[Number]],
    kept: Sequence[Sequence[bool]],
    labels: Sequence[str],
    *,
    title: str,
    x_label: str,
    group: int,
) -> str:
    """Heat map with one cell per entry and a gap after every `group`. Entries that were cut are outlined."""
    left, right, top, bottom = 50, 4, 4, 40
    row_height = min(18.0, max(6.0, 280 / len(rows)))
    height = math.ceil(top + row_height * len(rows) + bottom)
    count = len(rows[0])
    gap = 6.0 if group > 1 and count <= 48 else 0.0
    width = (WIDTH - left - right - gap * (math.ceil(count / group) - 1)) / count
    parts = []
    label_every = math.ceil(11 / row_height)
    for i, (row, keeps) in enumerate(zip(rows, kept, strict=True)):
        y = top + row_height * i
        for j, (value, keep) in enumerate(zip(row, keeps, strict=True)):
            x = left + width * j + gap * (j // group)
            parts.append(_cell(x + 0.5, y + 0.5, width - 1, row_height - 2, value, keep))
        if i % label_every == 0:
            parts.append(_text(left - 7, y + row_height / 2 + 4, labels[i], "tick end"))
    parts.append(_text((left + WIDTH) / 2, height - 10, x_label, "tick middle"))
    return _svg(height, title, parts)


def ticks(low: Number, high: Number, count: int = 5) -> list[Number]:
    """Round numbers inside [low, high], about `count` of them."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def figure(value: Number, *, trim: bool = True) -> str:
    """A number in readable form: about three significant digits, with k, M and B. `trim` drops zeros.

    >>> [figure(x) for x in (0, 0.01234, 1.5, 23.456, 1234, 7_000_000)]
    ['0', '0.0123', '1.5', '23.5', '1.23k', '7M']
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "n/a"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return _digits(value / size, trim) + unit
    return _digits(value, trim)


def _digits(value: Number, trim: bool) -> str:
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if trim and "." in text else text


def _y_range(ys: Sequence[Number], log: bool) -> tuple[Number, Number, list[Number]]:
    low, high = min(ys), max(ys)
    if not log:
        pad = (high - low or abs(high) or 1) * 0.06
        low, high = low - pad, high + pad
        return low, high, ticks(low, high)
    low, high = low / 1.15, high * 1.15
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    coarse = [t for t in fine if str(t).strip("0.")[:1] == "1"]
    return low, high, fine if len(fine) <= 7 or len(coarse) < 2 else coarse


def _scale(low: Number, high: Number, start: Number, end: Number, *, log: bool = False) -> Callable[[Number], Number]:
    bend = math.log if log else float
    a, b = bend(low), bend(high)
    return lambda value: start + (end - start) * ((bend(value) - a) / (b - a) if b > a else 0.5)


def _spread(ends: list[tuple[Number, str, str]], *, low: Number, high: Number) -> list[tuple[Number, str, str]]:
    """Move labels apart so that none overlaps another: down from the top, then up from the bottom."""
    placed = sorted(ends)
    ys = [y for y, _, _ in placed]
    for i in range(1, len(ys)):
        ys[i] = max(ys[i], ys[i - 1] + _LINE_HEIGHT)
    if ys and ys[-1] > high:
        ys[-1] = high
        for i in range(len(ys) - 2, -1, -1):
            ys[i] = min(ys[i], ys[i + 1] - _LINE_HEIGHT)
    return [(max(y, low), label, color) for y, (_, label, color) in zip(ys, placed, strict=True)]


def _grid_y(values: Sequence[Number], to_y: Callable[[Number], Number], left: Number, right: Number) -> str:
    lines = "".join(f"M{_n(left)} {_n(to_y(v))}H{_n(right)}" for v in values)
    labels = "".join(_text(left - 7, to_y(v) + 4, figure(v), "tick end") for v in values)
    return f'<path class="grid" d="{lines}"/>{labels}'


def _axis_x(
    values: Sequence[Number],
    to_x: Callable[[Number], Number],
    base: Number,
    label: str,
    grid_top: Number | None = None,
) -> str:
    top = base if grid_top is None else grid_top
    lines = "".join(f"M{_n(to_x(v))} {_n(top)}V{_n(base + 4)}" for v in values)
    labels = "".join(_text(to_x(v), base + 16, figure(v), "tick middle") for v in values)
    middle = (to_x(values[0]) + to_x(values[-1])) / 2
    return f'<path class="grid" d="{lines}"/>{labels}' + (
        _text(middle, base + 33, label, "tick middle") if label else ""
    )


def _cut_line(x: Number, top: Number, base: Number, label: str, before: bool) -> str:
    line = f'<path class="cutline" d="M{_n(x)} {_n(top)}V{_n(base)}"/>'
    return line + _text(x + (-6 if before else 6), top + 8, label, f"label accent {'end' if before else ''}")


def _cell(x: Number, y: Number, width: Number, height: Number, value: Number, kept: bool = True) -> str:
    place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
    if not kept:
        return f'<rect class="cell cut" {place}/>'
    return f'<rect class="cell" {place} fill-opacity="{_n(0.06 + 0.94 * min(max(value, 0), 1))}"/>'


def _text(x: Number, y: Number, text: str, classes: str) -> str:
    return f'<text class="{classes.strip()}" x="{_n(x)}" y="{_n(y)}">{escape(text)}</text>'


def _n(value: Number) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _svg(height: Number, title: str, parts: Sequence[str], *, width: Number = WIDTH) -> str:
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width} {_n(height)}" role="img" aria-label={quoteattr(title)}'
        f' xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )
