"""Charts as SVG text, with no plotting package: text, lines, bars, curves and axes for the pictures in docs/.

Every picture has a title and a description for screen readers, its own background, and colours for light and dark
pages. Nothing is told by colour alone: curves differ in their dashes, bars in their hatching, and each has a label.
The font is monospaced, so the width of a text is known: tests/test_figures.py checks that texts do not overlap.
Lengths are in pixels; y grows downwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

CHARACTER_WIDTH = 0.6  # of the font size, for the usual monospaced fonts
FONT_SIZE = 12
SMALL = 10
SERIES = ("a", "b", "c")  # a: solid and full, b: dashed and hatched, c: dotted and hollow

# Text has a contrast of 4.5:1 with the page, marks one of 3:1, in both schemes (tests/test_figures.py).
LIGHT = {"page": "#ffffff", "ink": "#1a1c20", "faint": "#5f6368", "rule": "#d5d8dd"} | {
    "a": "#0b57d0",
    "b": "#b3480a",
    "c": "#1b6e3c",
}
DARK = {"page": "#14161a", "ink": "#e8eaed", "faint": "#a9b0bb", "rule": "#3a3f47"} | {
    "a": "#8ab4f8",
    "b": "#f5a35c",
    "c": "#7fd6a0",
}


def _scheme(colors: dict[str, str]) -> str:
    rules = [
        f".page{{fill:{colors['page']}}}",
        f"text{{fill:{colors['ink']}}}text.faint{{fill:{colors['faint']}}}",
        f".axis,.box{{stroke:{colors['ink']}}}.rule{{stroke:{colors['rule']}}}.box{{fill:{colors['page']}}}",
    ]
    for name in SERIES:
        rules.append(f".curve.{name},.mark.{name},.bar.{name}{{stroke:{colors[name]}}}")
        rules.append(f"text.{name}{{fill:{colors[name]}}}")
    rules.append(
        f".bar.a,.mark.full{{fill:{colors['a']}}}.bar.b{{fill:url(#hatch)}}#hatch path{{stroke:{colors['b']}}}"
    )
    rules.append(f".mark.b.full{{fill:{colors['b']}}}.bar.c,.mark.hollow{{fill:{colors['page']}}}")
    return "".join(rules)


STYLE = (
    f"text{{font-family:ui-monospace,Menlo,'DejaVu Sans Mono',Consolas,monospace;font-size:{FONT_SIZE}px}}"
    f"text.small{{font-size:{SMALL}px}}text.bold{{font-weight:bold}}"
    ".axis,.rule,.curve,.box,.bar,.mark{stroke-width:1}.curve{fill:none;stroke-width:2}.mark{stroke-width:1.5}"
    ".curve.b{stroke-dasharray:7 4}.curve.c{stroke-dasharray:2 3}.mark.c,.bar.c{stroke-dasharray:none}"
    + _scheme(LIGHT)
    + f"@media (prefers-color-scheme:dark){{{_scheme(DARK)}}}"
)
HATCH = (
    '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<path d="M0 5L5 0M-1 1L1 -1M4 6L6 4" stroke-width="1.5"/></pattern></defs>'
)


# ---------------------------------------------------------------------------------------------------------------------
# Elements


def pixels(value: float) -> str:
    """A length to a tenth of a pixel: coarse enough that rounding errors of the CPU do not change the file."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")  # + 0.0 makes -0.0 a plain 0


def text(x: float, y: float, content: str, classes: str = "", anchor: str = "start") -> str:
    """One line of text with its baseline at y; anchor: start, middle or end."""
    attributes = f' class="{classes}"' if classes else ""
    attributes += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return (
        f'<text x="{pixels(x)}" y="{pixels(y)}"{attributes} xml:space="preserve">{escape(content, quote=False)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, classes: str = "axis") -> str:
    """A straight line."""
    return f'<line class="{classes}" x1="{pixels(x1)}" y1="{pixels(y1)}" x2="{pixels(x2)}" y2="{pixels(y2)}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head at its second end."""
    angle, parts = math.atan2(y2 - y1, x2 - x1), [line(x1, y1, x2, y2)]
    for turn in (2.6, -2.6):
        parts.append(line(x2, y2, x2 + 7 * math.cos(angle + turn), y2 + 7 * math.sin(angle + turn)))
    return "".join(parts)


def rectangle(x: float, y: float, width: float, height: float, classes: str) -> str:
    """A rectangle with its top left corner at (x, y)."""
    return (
        f'<rect class="{classes}" x="{pixels(x)}" y="{pixels(y)}" width="{pixels(width)}" height="{pixels(height)}"/>'
    )


def curve(points: Sequence[tuple[float, float]], series: str) -> str:
    """Points joined by straight lines."""
    joined = " ".join(f"{pixels(x)},{pixels(y)}" for x, y in points)
    return f'<polyline class="curve {series}" points="{joined}"/>'


def dot(x: float, y: float, classes: str, radius: float = 4) -> str:
    """A round mark."""
    return f'<circle class="mark {classes}" cx="{pixels(x)}" cy="{pixels(y)}" r="{pixels(radius)}"/>'


def picture(title: str, description: str, width: int, height: int, parts: Sequence[str]) -> str:
    """The file: background, title and description around the elements."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'role="img" aria-labelledby="title description">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="description">{escape(description)}</desc>',
            f"<style>{STYLE}</style>",
            HATCH,
            rectangle(0, 0, width, height, "page"),
            text(16, 24, title, "bold"),
            *parts,
            "</svg>\n",
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Axes and bars


@dataclass(frozen=True, slots=True)
class Panel:
    """A rectangle of the picture and the range of the numbers shown in it."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool = False

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.log_y:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.top + self.height * (high - value) / (high - low)

    def points(self, xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
        return [(self.x(x), self.y(y)) for x, y in zip(xs, ys, strict=True)]


def axes(panel: Panel, x_ticks: dict[float, str], y_ticks: dict[float, str], x_label: str, y_label: str) -> list[str]:
    """Rules and labels at the ticks, the two axes, and their names: x below, y above the panel."""
    parts, right, bottom = [], panel.left + panel.width, panel.top + panel.height
    for value, label in y_ticks.items():
        parts.append(line(panel.left, panel.y(value), right, panel.y(value), "rule"))
        parts.append(text(panel.left - 6, panel.y(value) + 4, label, "small faint", "end"))
    for value, label in x_ticks.items():
        parts.append(line(panel.x(value), bottom, panel.x(value), bottom + 4))
        parts.append(text(panel.x(value), bottom + 16, label, "small faint", "middle"))
    parts += [line(panel.left, panel.top, panel.left, bottom), line(panel.left, bottom, right, bottom)]
    parts.append(text(panel.left + panel.width / 2, bottom + 32, x_label, "small", "middle"))
    return [*parts, text(panel.left, panel.top - 8, y_label, "small")]


def bars(panel: Panel, values: Sequence[float], series: str, labels: Sequence[str] = ()) -> list[str]:
    """One bar per unit of x, at 0, 1, ..., from zero to its value, with its label at the free end."""
    parts, zero, unit = [], panel.y(max(0.0, panel.y_range[0])), panel.width / (panel.x_range[1] - panel.x_range[0])
    for index, value in enumerate(values):
        tip = panel.y(value)
        parts.append(
            rectangle(panel.x(index) + 0.15 * unit, min(zero, tip), 0.7 * unit, abs(zero - tip), f"bar {series}")
        )
        if labels:
            parts.append(
                text(panel.x(index) + unit / 2, tip + (-4 if value >= 0 else 12), labels[index], "small", "middle")
            )
    return [*parts, line(panel.left, zero, panel.left + panel.width, zero)]


def names_below(panel: Panel, names: Sequence[str], y: float) -> list[str]:
    """One name per unit of x, centred below its bar."""
    unit = panel.width / (panel.x_range[1] - panel.x_range[0])
    return [text(panel.x(index) + unit / 2, y, name, "small", "middle") for index, name in enumerate(names) if name]
