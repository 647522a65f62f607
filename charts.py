"""Charts of runs, from the rows of their journals alone: curves over steps, stacked shares, rates with intervals.

run_sft.py, run_ppo.py and run_eval.py write them into OUTPUT/plots; eval/run_page.py puts them on its page. A legend is
above or below the panel, never inside it, and each curve is told apart by its dashes, each area by its texture.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import NormalDist

from data.json_records import write_text
from data.run_journals import clean_evaluation, clean_metrics, clean_sample, read_journal
from svg import (
    CHARACTER_WIDTH,
    SERIES,
    SMALL,
    TEXTURES,
    Chart,
    Panel,
    axes,
    curve,
    dot,
    line,
    pixels,
    rectangle,
    sheet,
    text,
)

WIDTH, PANEL_HEIGHT = 360, 150
LEFT, RIGHT, MARGIN = 56, 20, 12  # of the panel, and of texts
LEGEND_ROW, SWATCH = 16, 26
MAX_POINTS = 250  # of a curve; of more, the least and the largest of each stretch are drawn
MEAN_SHARE = 20  # the moving mean covers one in so many of the values
N_STRETCHES = 40  # of stacked areas
Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Quantity:
    """What one chart shows of metrics.jsonl (docs/metrics.md)."""

    title: str
    unit: str
    keys: tuple[str, ...]
    is_of_rollout: bool = False  # the same on every line of an iteration: drawn once
    names: tuple[str, ...] = ("",)  # of the keys, where there are several
    is_averaged: bool = True  # with a moving mean


BOTH = ("policy", "value")
SFT_QUANTITIES = (
    Quantity("Loss", "nats", ("sft/loss",)),
    Quantity("Learning rate", "per step", ("sft/learning_rate",), is_averaged=False),
    Quantity("Gradient norm before clipping", "L2", ("sft/grad_norm",)),
    Quantity("Speed", "tokens/s", ("time/tokens_per_second",)),
)
PPO_QUANTITIES = (
    Quantity("Reward of a response, before KL", "reward, -2 to 1", ("ppo/score",), True),
    Quantity("KL to the reference", "nats per response", ("ppo/kl_sequence",), True),
    Quantity("Entropy", "nats per token", ("ppo/entropy",), True),
    Quantity("Explained variance of the critic", "1 = perfect", ("ppo/explained_variance",), True),
    Quantity("Value loss", "reward squared", ("ppo/value_loss",)),
    Quantity("Policy loss", "reward", ("ppo/policy_loss",)),
    Quantity("Tokens clipped", "share, 0 to 1", ("ppo/clip_fraction", "ppo/value_clip_fraction"), names=BOTH),
    Quantity("Response length", "tokens", ("ppo/response_tokens",), True),
    Quantity("Gradient norm before clipping", "L2", ("ppo/policy_grad_norm", "ppo/value_grad_norm"), names=BOTH),
    Quantity("Learning rate", "per step", ("ppo/policy_learning_rate", "ppo/value_learning_rate"), False, BOTH, False),
    Quantity("Speed of sampling", "tokens/s", ("time/generated_tokens_per_second",), True),
)
SHARE = "ppo/share_"  # keys of the reward's categories, in the order of rl.reward.CATEGORIES: the worst first


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def moving_means(values: Sequence[float], width: int) -> list[float]:
    """Means of `width` consecutive values: the first is that of the first `width` values, the last of the last."""
    return [math.fsum(values[end - width : end]) / width for end in range(width, len(values) + 1)]


def stretch_means(values: Sequence[float], width: int) -> list[float]:
    """Means of consecutive stretches of `width` values; the last may be shorter."""
    stretches = [values[start : start + width] for start in range(0, len(values), width)]
    return [math.fsum(stretch) / len(stretch) for stretch in stretches]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): mean of at least two values and its normal 95 % interval."""
    n, mean = len(values), math.fsum(values) / len(values)
    half_width = Z_95 * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, mean - half_width, mean + half_width


def mean_width(n_values: int) -> int:
    """How many values the moving mean covers."""
    return max(1, round(n_values / MEAN_SHARE))


def points_of(rows: Sequence[Mapping], quantity: Quantity) -> dict[str, list[tuple[float, float]]]:
    """Key -> (step, value) of each row that has it; one row per iteration for what belongs to a rollout."""
    if quantity.is_of_rollout:
        rows = rollouts_of(rows)
    return {key: [(row["step"], row[key]) for row in rows if key in row] for key in quantity.keys}


def rollouts_of(rows: Sequence[Mapping]) -> list[Mapping]:
    """The last line of each iteration."""
    return list({row.get("iteration"): row for row in rows}.values())


def format_number(value: float) -> str:
    """Four significant digits, with thousands separated: 0.1234, 12,345."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.4g}"


def nice_ticks(low: float, high: float, count: int) -> dict[float, str]:
    """About `count` round numbers from low to high, with their labels."""
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    unit = magnitude * min(factor for factor in (1, 2, 5, 10) if factor * magnitude >= rough * (1 - 1e-9))
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return {number * unit: format_number(number * unit) for number in range(first, last + 1)}


def widened(values: Sequence[float]) -> tuple[float, float]:
    """A range around all values, with a margin; never empty, and from 0 on where that is near."""
    low, high = min(values), max(values)
    if low == high:
        return min(0.0, 1.5 * low), max(0.0, 1.5 * low) or float(low == 0)
    margin = 0.05 * (high - low)
    return (0.0 if 0 <= low < 0.5 * high else low - margin), high + margin


def step_range(steps: Sequence[float]) -> tuple[float, float]:
    """The first and the last step; never empty."""
    low, high = min(steps), max(steps)
    return (low, high) if low < high else (low - 1, high + 1)


def _drawn(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about 2 * MAX_POINTS of the points: of longer curves the extremes of each stretch."""
    width = math.ceil(len(points) / MAX_POINTS)
    if width <= 2:
        return list(points)
    kept = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        ends = (min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1]))
        kept += sorted(set(ends))
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Curves over steps


@dataclass(frozen=True, slots=True)
class Trend:
    """One quantity over steps: its values, and where it has one the mean of some of them with an interval."""

    name: str  # "" where the chart has only this one
    points: Sequence[tuple[float, float]]  # (step, value)
    means: Sequence[tuple[float, float]]  # (step, moving mean)
    n_averaged: int
    unit_averaged: str = "steps"
    band: Sequence[tuple[float, float, float]] = ()  # (step, low, high) of the moving mean


@dataclass(frozen=True, slots=True)
class Marks:
    """Single measurements with intervals."""

    name: str
    points: Sequence[tuple[float, float, float, float]]  # (step, value, low, high)


def trend_of(name: str, points: Sequence[tuple[float, float]], width: int, unit: str = "steps") -> Trend:
    """Values with the moving mean of `width` of them; 1 = none."""
    means = moving_means([value for _, value in points], width)
    return Trend(name, points, [(points[width - 1 + i][0], mean) for i, mean in enumerate(means)], width, unit)


def trend_chart(
    title: str, unit: str, trends: Sequence[Trend], marks: Sequence[Marks] = (), critic_only_until: float = 0
) -> Chart:
    """Thin lines of the values and bold ones of their means over the optimizer steps; intervals as bands and whiskers.

    critic_only_until: last step of a stretch that trains the critic alone, shaded; 0 = none.
    """
    steps = [step for trend in trends for step, _ in trend.points] + [
        step for mark in marks for step, *_ in mark.points
    ]
    values = [value for trend in trends for _, value in trend.points]
    values += [bound for trend in trends for _, *bounds in trend.band for bound in bounds]
    values += [number for mark in marks for _, *numbers in mark.points for number in numbers]
    legend, legend_height = _legend(_trend_entries(trends, marks, critic_only_until), 34)
    top = 34 + legend_height + 18
    x_range = step_range(steps)
    panel = Panel(LEFT, top, WIDTH - LEFT - RIGHT, PANEL_HEIGHT, x_range, widened(values))
    parts = [text(MARGIN, 18, f"{title}, {unit}", "bold"), *legend]
    if critic_only_until:
        right = panel.x(min(critic_only_until, x_range[1]))
        parts.append(_shade(panel.left, panel.top, right - panel.left, panel.height))
        parts.append(line(right, panel.top, right, panel.top + panel.height))
    parts += axes(panel, nice_ticks(*x_range, 5), nice_ticks(*panel.y_range, 4), "optimizer step", "")
    for trend, series in zip(trends, SERIES):
        parts += _trend_parts(panel, trend, series)
    for number, (mark, series) in enumerate(zip(marks, SERIES[1:])):
        for step, value, low, high in mark.points:
            x = panel.x(step) + 8 * number  # next to each other
            parts += _whisker(x, panel.y(low), x, panel.y(high), series)
            parts.append(dot(x, panel.y(value), f"{series} {'hollow' if series == 'c' else 'full'}", 3.5))
    return Chart(title, _describe(unit, trends, marks, critic_only_until), WIDTH, top + PANEL_HEIGHT + 44, parts)


def _trend_parts(panel: Panel, trend: Trend, series: str) -> list[str]:
    if len(trend.points) == 1:
        return [dot(panel.x(trend.points[0][0]), panel.y(trend.points[0][1]), f"{series} full", 3)]
    parts = []
    if trend.band:
        steps = [step for step, *_ in trend.band]
        edge = panel.points(steps, [high for *_, high in trend.band])
        edge += reversed(panel.points(steps, [low for _, low, _ in trend.band]))
        parts.append(_polygon(edge, "band"))
    if trend.n_averaged > 1:
        parts.append(curve(panel.points(*zip(*_drawn(trend.points))), f"thin {series}"))
    return [*parts, curve(panel.points(*zip(*_drawn(trend.means))), series)]


def _trend_entries(trends: Sequence[Trend], marks: Sequence[Marks], critic_only_until: float) -> list[tuple[str, str]]:
    """(swatch, text) of each entry of the legend."""
    entries = []
    for trend, series in zip(trends, SERIES):
        name = f"{trend.name}, " if trend.name else ""
        if trend.n_averaged == 1:
            entries.append((f"curve {series}", name + f"each of {len(trend.points)} {trend.unit_averaged}"))
        else:
            entries.append((f"curve {series}", f"{name}mean of {trend.n_averaged} {trend.unit_averaged}"))
            if not trend.name:
                entries.append((f"curve thin {series}", f"each of {len(trend.points)}"))
        if trend.band:
            entries.append(("band", "its 95 % interval"))
    entries += [(f"dot {series}", f"{mark.name}, 95 %") for mark, series in zip(marks, SERIES[1:])]
    return [*entries, *([("shade", f"critic alone, to step {critic_only_until:g}")] if critic_only_until else [])]


def _describe(unit: str, trends: Sequence[Trend], marks: Sequence[Marks], critic_only_until: float) -> str:
    """The chart in words."""
    sentences = []
    for trend in trends:
        (first_step, first), (last_step, last) = trend.means[0], trend.means[-1]
        values = [value for _, value in trend.points]
        averaged = f"Means of {trend.n_averaged} {trend.unit_averaged}" if trend.n_averaged > 1 else "Values"
        sentences.append(
            f"{trend.name + ': ' if trend.name else ''}{averaged}, {unit}: {format_number(first)} up to step "
            f"{first_step:g}, {format_number(last)} up to step {last_step:g}; {len(values)} values from "
            f"{format_number(min(values))} to {format_number(max(values))}."
        )
    for mark in marks:
        listed = ", ".join(f"{format_number(value)} at step {step:g}" for step, value, *_ in mark.points)
        sentences.append(f"{mark.name}: {listed}.")
    if critic_only_until:
        sentences.append(f"Up to step {critic_only_until:g} only the critic is trained.")
    return " ".join(sentences)


# ---------------------------------------------------------------------------------------------------------------------
# Stacked shares, rates with intervals


def share_chart(title: str, steps: Sequence[float], layers: Mapping[str, Sequence[float]], n_averaged: int) -> Chart:
    """Shares that add up to 1 as stacked areas, the first layer at the bottom; the legend below has the same order."""
    x_range = step_range(steps)
    panel = Panel(LEFT, 44, WIDTH - LEFT - RIGHT, PANEL_HEIGHT, x_range, (0.0, 1.0))
    parts = [text(MARGIN, 18, f"{title}, share", "bold")]
    xs = [panel.x(step) for step in steps] if len(steps) > 1 else [panel.left, panel.left + panel.width]
    floor = [0.0] * len(xs)
    for number, shares in enumerate(layers.values()):
        shares = shares if len(steps) > 1 else [*shares, *shares]
        ceiling = [low + share for low, share in zip(floor, shares, strict=True)]
        edge = [(x, panel.y(y)) for x, y in zip(xs, ceiling)] + [(x, panel.y(y)) for x, y in zip(xs, floor)][::-1]
        parts.append(_polygon(edge, "area", f' style="fill:url(#area{number})"'))
        floor = ceiling
    parts += axes(panel, nice_ticks(*x_range, 5), {y / 4: f"{y / 4:g}" for y in range(5)}, "optimizer step", "")
    bottom = panel.top + panel.height + 44
    names = list(layers)[::-1]  # as stacked, from the top
    for place, name in enumerate(names):
        column, row = divmod(place, math.ceil(len(names) / 2))
        x, y = MARGIN + column * (WIDTH - MARGIN) / 2, bottom + row * (LEGEND_ROW + 2)
        number = len(names) - 1 - place
        parts.append(
            f'<rect class="area" x="{pixels(x)}" y="{pixels(y)}" width="{SWATCH}" height="13" '
            f'style="fill:url(#area{number})"/>'
        )
        parts.append(text(x + SWATCH + 6, y + 10, _cut(name, 24), "small"))
    ends = ", ".join(f"{name} {shares[0]:.2f} then {shares[-1]:.2f}" for name, shares in layers.items())
    description = f"Means of {n_averaged} iterations, from the first to the last: {ends}."
    return Chart(title, description, WIDTH, round(bottom + math.ceil(len(names) / 2) * (LEGEND_ROW + 2) + 8), parts)


def interval_chart(title: str, groups: Mapping[str, Sequence[tuple[str, float, float, float]]]) -> Chart:
    """Rates in percent as marks with whiskers, one row each: group -> (name, percent, low, high)."""
    rows = [(group, *bar) for group, bars in groups.items() for bar in bars]
    left = MARGIN + 10 + max((min(22, len(name)) for _, name, *_ in rows), default=0) * SMALL * CHARACTER_WIDTH + 8
    top, parts = 48, []
    height = len(rows) * 18 + len(groups) * 20
    panel = Panel(left, top, WIDTH - left - 52, height, (0.0, 100.0), (0.0, 1.0))
    parts += axes(panel, {x: f"{x:g}" for x in (0, 25, 50, 75, 100)}, {}, "% and 95 % interval", "")
    parts += [line(panel.x(x), top, panel.x(x), top + height, "rule") for x in (25, 50, 75, 100)]
    y = top
    for group, bars in groups.items():
        y += 14
        parts.append(text(MARGIN, y, _cut(group, 60), "small bold"))
        y += 6
        for number, (name, percent, low, high) in enumerate(bars):
            series, middle = SERIES[number % len(SERIES)], y + 9
            parts.append(text(MARGIN + 10, middle + 4, _cut(name, 22), "small"))
            parts += _whisker(panel.x(low), middle, panel.x(high), middle, series)
            parts.append(dot(panel.x(percent), middle, f"{series} {'hollow' if series == 'c' else 'full'}", 3.5))
            parts.append(text(WIDTH - MARGIN, middle + 4, f"{percent:.1f}", "small", "end"))
            y += 18
    listed = "; ".join(f"{group}, {name}: {p:.1f} [{low:.1f}, {high:.1f}]" for group, name, p, low, high in rows)
    parts.insert(0, text(MARGIN, 18, _cut(title, 46), "bold"))
    return Chart(title, f"{listed}.", WIDTH, round(top + height + 44), parts)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def _legend(entries: Sequence[tuple[str, str]], top: float) -> tuple[list[str], float]:
    """Rows of swatches with their texts, as many to a row as fit, and their height."""
    parts, x, y = [], float(MARGIN), top
    for swatch, label in entries:
        width = SWATCH + 6 + len(label) * SMALL * CHARACTER_WIDTH + 14
        if x > MARGIN and x + width > WIDTH:
            x, y = float(MARGIN), y + LEGEND_ROW
        kind, *rest = swatch.split()
        if kind == "curve":
            parts.append(curve([(x, y - 3), (x + SWATCH, y - 3)], " ".join(rest)))
        elif kind == "dot":
            parts += _whisker(x + 13, y - 9, x + 13, y + 3, rest[0])
            parts.append(dot(x + 13, y - 3, f"{rest[0]} {'hollow' if rest[0] == 'c' else 'full'}", 3.5))
        elif kind == "band":
            parts.append(rectangle(x, y - 8, SWATCH, 10, "band"))
        else:
            parts.append(_shade(x, y - 8, SWATCH, 10))
        parts.append(text(x + SWATCH + 6, y, label, "small"))
        x += width
    return parts, y - top + 4


def _whisker(x1: float, y1: float, x2: float, y2: float, series: str) -> list[str]:
    """An interval: a line with short bars across its ends."""
    across = (3, 0) if x1 == x2 else (0, 3)
    ends = [(x1, y1), (x2, y2)]
    bars = [line(x - across[0], y - across[1], x + across[0], y + across[1], f"mark {series}") for x, y in ends]
    return [line(x1, y1, x2, y2, f"mark {series}"), *bars]


def _polygon(points: Sequence[tuple[float, float]], classes: str, attributes: str = "") -> str:
    joined = " ".join(f"{pixels(x)},{pixels(y)}" for x, y in points)
    return f'<polygon class="{classes}" points="{joined}"{attributes}/>'


def _shade(x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect x="{pixels(x)}" y="{pixels(y)}" width="{pixels(width)}" height="{pixels(height)}" '
        'style="fill:url(#shade)"/>'
    )


def _cut(words: str, limit: int) -> str:
    return words if len(words) <= limit else words[: limit - 3] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# The charts of a run


def sft_charts(rows: Sequence[Mapping]) -> list[Chart]:
    """Loss, learning rate, gradient norm and speed of an SFT run, where its rows of metrics.jsonl have them."""
    return [chart for quantity in SFT_QUANTITIES if (chart := _quantity_chart(rows, quantity, 0))]


def ppo_charts(
    rows: Sequence[Mapping], samples: Sequence[Mapping], evaluations: Sequence[Mapping], critic_only_iterations: int
) -> list[Chart]:
    """Reward, categories, and the other quantities of a PPO run; rows of its three journals.

    The mean reward has an interval where `samples` has the single rewards.
    """
    until = max((row["step"] for row in rows if row.get("iteration", math.inf) < critic_only_iterations), default=0)
    charts = []
    for quantity in PPO_QUANTITIES:
        if quantity.keys == ("ppo/score",):
            if any("ppo/score" in row for row in rows):
                trend = reward_trend(rows, samples)
                charts.append(trend_chart(quantity.title, quantity.unit, [trend], _held_out(evaluations), until))
            charts += _category_charts(rollouts_of(rows))
        elif chart := _quantity_chart(rows, quantity, until):
            charts.append(chart)
    return charts


def reward_trend(rows: Sequence[Mapping], samples: Sequence[Mapping]) -> Trend:
    """Mean reward of each iteration; moving means with the interval over all responses that they cover."""
    points = points_of(rows, PPO_QUANTITIES[0])["ppo/score"]
    trend = trend_of("", points, mean_width(len(points)), "iterations")
    rewards = [
        (max(row["step"] for row in group), [row["reward"] for row in group])
        for group in (list(group) for _, group in groupby(samples, key=lambda row: row["iteration"]))
    ]
    width = trend.n_averaged
    covered = [
        (rewards[end - 1][0], [reward for _, each in rewards[end - width : end] for reward in each])
        for end in range(width, len(rewards) + 1)
    ]
    intervals = [(step, *mean_interval(each)) for step, each in covered if len(each) > 1]
    if not intervals:
        return trend
    means = [(step, mean) for step, mean, *_ in intervals]
    band = [(step, low, high) for step, _, low, high in intervals]
    return Trend("", trend.points, means, width, trend.unit_averaged, band)


def _held_out(evaluations: Sequence[Mapping]) -> list[Marks]:
    """Mean reward on held-out prompts with its interval, greedy and sampled."""
    marks = []
    for name in ("greedy", "sampled"):
        found = [(row["step"], row[name]) for row in evaluations if name in row]
        if found:
            points = [(step, summary["mean_reward"], *summary["interval_95"]) for step, summary in found]
            marks.append(Marks(f"held-out, {name}", points))
    return marks


def _category_charts(rollouts: Sequence[Mapping]) -> list[Chart]:
    """Shares of the reward's categories, averaged over stretches; no chart where a row lacks one."""
    keys = [key for key in rollouts[0] if key.startswith(SHARE)][: len(TEXTURES)] if rollouts else []
    if not keys or not all(key in row for row in rollouts for key in keys):
        return []
    width = max(1, len(rollouts) // N_STRETCHES)
    layers = {
        key.removeprefix(SHARE).replace("_", " "): stretch_means([row[key] for row in rollouts], width) for key in keys
    }
    steps = stretch_means([row["step"] for row in rollouts], width)
    return [share_chart("Categories of the responses", steps, layers, width)]


def _quantity_chart(rows: Sequence[Mapping], quantity: Quantity, critic_only_until: float) -> Chart | None:
    """The chart of one quantity, None where no row has it."""
    unit = "iterations" if quantity.is_of_rollout else "steps"
    found = zip(quantity.names, points_of(rows, quantity).values(), strict=True)
    trends = [
        trend_of(name, points, mean_width(len(points)) if quantity.is_averaged else 1, unit)
        for name, points in found
        if points
    ]
    return trend_chart(quantity.title, quantity.unit, trends, (), critic_only_until) if trends else None


def write_run_plot(output: Path, critic_only_iterations: int = 0) -> str:
    """Draw OUTPUT/plots/loss.svg or ppo.svg from the journals; a line that says where it is, or why there is none."""
    rows = read_journal(output / "metrics.jsonl", clean_metrics)[0]
    if not rows:
        return "no plot: metrics.jsonl holds no step"
    if "ppo/score" in rows[0]:
        path, title = output / "plots" / "ppo.svg", "PPO"
        samples = read_journal(output / "samples.jsonl", clean_sample)[0]
        evaluations = read_journal(output / "evaluations.jsonl", clean_evaluation)[0]
        charts = ppo_charts(rows, samples, evaluations, critic_only_iterations)
    else:
        path, title, charts = output / "plots" / "loss.svg", "SFT", sft_charts(rows)
    write_text(path, sheet(f"{title}, {rows[-1]['step']} optimizer steps", charts, columns=3 if title == "PPO" else 2))
    return f"plot: {path}"
