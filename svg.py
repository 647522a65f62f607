"""SVG as text, with no plotting package: text, lines, bars, curves and axes, for docs/ and for charts.py.

Every picture has a title and a description for screen readers, its own background, and colours for light and dark
pages. Nothing is told by colour alone: curves differ in their dashes, bars and areas in their hatching, and each has a
label. The font is monospaced, so the width of a text is known: tests check that texts do not overlap. A text from
outside is escaped, and characters without a picture are shown as escapes. Lengths are in pixels; y grows downwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from printable import terminal_text

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
# Stacked areas, the worst first: a tint and a texture each; the best one has no texture.
LIGHT_AREAS = ("#f2b8b5", "#f6cbb0", "#fbdcae", "#fdeab0", "#f1f1b5", "#dcefb8", "#c2e7bd", "#9ad8a6")
DARK_AREAS = ("#6b2a27", "#6e3a22", "#6b4a1f", "#66561f", "#56591f", "#435a25", "#2f5930", "#1f6b3a")
TEXTURES = ("M0 0L8 8M0 8L8 0", "M0 8L8 0", "M0 0L8 8", "M0 4L8 4", "M4 0L4 8", "M2 4L6 4", "M4 2L4 6", "")


def _area_scheme(ink: str, faint: str, tints: Sequence[str]) -> str:
    """Rules for areas, bands and shaded stretches in one scheme."""
    fills = "".join(f".tint{number}{{fill:{tint}}}" for number, tint in enumerate(tints))
    return f"{fills}.texture{{stroke:{ink}}}.area{{stroke:{ink}}}.band{{fill:{faint}}}.shade path{{stroke:{faint}}}"


# For charts of runs (charts.py), in addition to STYLE.
CHART_STYLE = (
    ".curve.thin{stroke-width:1;opacity:.55;stroke-dasharray:none}.band{opacity:.25}.area{stroke-width:.75}"
    ".texture{stroke-width:1;fill:none}.shade path{stroke-width:1}.whisker{stroke-width:1.5}"
    + _area_scheme(LIGHT["ink"], LIGHT["faint"], LIGHT_AREAS)
    + f"@media (prefers-color-scheme:dark){{{_area_scheme(DARK['ink'], DARK['faint'], DARK_AREAS)}}}"
)
CHART_PATTERNS = (
    '<defs><pattern id="shade" class="shade" width="6" height="6" patternUnits="userSpaceOnUse">'
    '<path d="M0 6L6 0" opacity=".5"/></pattern>'
    + "".join(
        f'<pattern id="area{number}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<rect class="tint{number}" width="8" height="8"/><path class="texture" d="{texture}"/></pattern>'
        for number, texture in enumerate(TEXTURES)
    )
    + "</defs>"
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
    content = terminal_text(content)
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


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture that can be one of several in a file or a page."""

    title: str
    description: str  # what it shows, in words, for screen readers
    width: int
    height: int
    parts: Sequence[str]  # elements


def inline(chart: Chart, identifier: str) -> str:
    """The chart as an element of a page, which has STYLE, CHART_STYLE, HATCH and CHART_PATTERNS once."""
    return "\n".join(
        [
            f'<svg viewBox="0 0 {chart.width} {chart.height}" width="{chart.width}" height="{chart.height}" '
            f'role="img" aria-labelledby="{identifier}-title {identifier}-description">',
            f'<title id="{identifier}-title">{escape(terminal_text(chart.title))}</title>',
            f'<desc id="{identifier}-description">{escape(terminal_text(chart.description))}</desc>',
            *chart.parts,
            "</svg>",
        ]
    )


def sheet(title: str, charts: Sequence[Chart], columns: int) -> str:
    """A file with several charts in a grid, under one title."""
    width, parts, top = columns * max(chart.width for chart in charts), [], 36
    for start in range(0, len(charts), columns):
        row = charts[start : start + columns]
        for column, chart in enumerate(row):
            left = column * width // columns
            parts += [f'<g transform="translate({left} {top})">', *chart.parts, "</g>"]
        top += max(chart.height for chart in row)
    description = " ".join(f"{chart.title}: {chart.description}" for chart in charts)
    parts = [f"<style>{CHART_STYLE}</style>", CHART_PATTERNS, *parts]
    return picture(terminal_text(title), terminal_text(description), width, top, parts)


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
