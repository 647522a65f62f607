"""charts.py: numbers worked by hand, and pictures in which nothing covers anything else."""

import json
import math
import re
from xml.etree import ElementTree

import pytest

from charts import (
    SHARE,
    Marks,
    interval_chart,
    mean_interval,
    moving_means,
    nice_ticks,
    ppo_charts,
    reward_trend,
    sft_charts,
    share_chart,
    stretch_means,
    trend_chart,
    trend_of,
    widened,
    write_run_plot,
)
from svg import CHART_PATTERNS, DARK, DARK_AREAS, LIGHT, LIGHT_AREAS, TEXTURES, inline, sheet
from tests.support.pictures import SVG, assert_texts_are_apart, boxes, contrast

CATEGORIES = ("unparsable", "wrong_tool", "correct")


def ppo_rows(n_iterations: int) -> list[dict]:
    """Two optimizer steps per iteration."""
    return [
        {
            "step": 2 * i + half + 1,
            "iteration": i,
            "ppo/score": math.sin(i),
            "ppo/value_loss": 1.0 + half,
            "ppo/clip_fraction": 0.1,
            "ppo/value_clip_fraction": 0.2,
            **{f"{SHARE}{name}": share for name, share in zip(CATEGORIES, (0.25, 0.25, 0.5))},
        }
        for i in range(n_iterations)
        for half in (0, 1)
    ]


def all_charts() -> list:
    evaluation = {"mean_reward": 0.5, "interval_95": [0.25, 0.75]}
    evaluations = [{"step": step, "greedy": evaluation, "sampled": evaluation} for step in (0, 40)]
    samples = [{"iteration": i, "step": 2 * i + 2, "reward": float(r)} for i in range(20) for r in (-2, 1)]
    bars = [("a run with a long name indeed", 50.0, 40.0, 60.0), ("b", 0.0, 0.0, 9.0), ("c", 100.0, 91.0, 100.0)]
    sft = [{"step": step, "sft/loss": 1 / step, "sft/learning_rate": 4e-4} for step in range(1, 1500)]
    return [
        *ppo_charts(ppo_rows(20), samples, evaluations, critic_only_iterations=5),
        *sft_charts(sft),
        interval_chart("CF", {"tiny-seen, n = 40": bars, "tiny-unseen": bars[:1]}),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_means_by_hand():
    assert moving_means([1, 3, 5, 7, 10], 2) == [2, 4, 6, 8.5]
    assert moving_means([1, 3], 1) == [1, 3] and moving_means([1, 3], 3) == []
    assert stretch_means([1, 3, 5, 7, 10], 2) == [2, 6, 10] and stretch_means([], 4) == []
    mean, low, high = mean_interval([-2.0, 1.0, 1.0, 0.0])  # variance 2, so the standard error is sqrt(2 / 4)
    assert mean == 0 and high == -low == pytest.approx(1.959964 * 0.70710678)


def test_ticks_and_ranges_by_hand():
    assert nice_ticks(0, 1, 4) == {0.0: "0", 0.5: "0.5", 1.0: "1"}
    assert list(nice_ticks(1, 1217, 5).values()) == ["500", "1,000"]
    assert list(nice_ticks(0, 4e-4, 4).values()) == ["0", "0.0001", "0.0002", "0.0003", "0.0004"]
    assert widened([3.0, 7.0]) == (0.0, 7.2) and widened([6.0, 7.0]) == (5.95, 7.05)
    assert widened([0.0, 0.0]) == (0.0, 1.0) and widened([2.0]) == (0.0, 3.0) and widened([-2.0]) == (-3.0, 0.0)


def test_reward_has_the_interval_of_the_responses_it_covers():
    rows = ppo_rows(40)  # so the mean covers two iterations
    samples = [{"iteration": i, "step": 2 * i + 2, "reward": float(i)} for i in range(40) for _ in range(3)]
    trend = reward_trend(rows, samples)
    assert trend.n_averaged == 2 and len(trend.points) == 40
    assert trend.means[0] == (4, 0.5) and trend.means[-1] == (80, 38.5)
    spread = 1.959964 * math.sqrt(6 * 0.25 / 5 / 6)  # of three zeros and three ones
    assert trend.band[0] == (4, pytest.approx(0.5 - spread), pytest.approx(0.5 + spread))
    assert not reward_trend(rows, []).band and len(reward_trend(rows, []).means) == 39


def test_a_long_curve_keeps_its_spike():
    points = [(step, 100.0 if step == 7777 else 1.0) for step in range(1, 10_001)]
    chart = trend_chart("x", "y", [trend_of("", points, 500)])
    drawn = max(re.findall(r'class="curve thin a" points="([^"]+)"', inline(chart, "i")), key=len)
    heights = [float(point.split(",")[1]) for point in drawn.split()]
    assert len(heights) <= 502 and heights.count(min(heights)) == 1
    assert min(heights) < 100 < max(heights)


def test_points_are_where_the_axes_say():
    chart = trend_chart("x", "y", [trend_of("", [(0, 0.0), (50, 10.0), (100, 0.0)], 1)])
    root = ElementTree.fromstring(inline(chart, "i"))
    [points] = [each.get("points").split() for each in root.iter("polyline") if len(each.get("points").split()) == 3]
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point.split(","))) for point in points]
    ticks = {element.text: element for element in root.iter("text")}
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y0 == y2
    assert float(ticks["0"].get("x")) in (x0, pytest.approx(50.0)) and float(ticks["100"].get("x")) == x2
    assert float(ticks["10"].get("y")) - 4 == pytest.approx(y1)


# ---------------------------------------------------------------------------------------------------------------------
# Layout


@pytest.mark.parametrize("chart", all_charts(), ids=lambda chart: chart.title)
def test_texts_are_apart_and_none_covers_the_panel(chart):
    root = ElementTree.fromstring(inline(chart, "i"))
    assert_texts_are_apart(root, "")
    if "Categories" in chart.title or chart.title == "CF":
        return  # these have their texts below the panel, or in columns of their own
    axis = [float(each.get("y1")) for each in root.iter("line") if each.get("class") == "axis"]
    left = min(float(each.get("x1")) for each in root.iter("line") if each.get("class") == "axis")
    for name, _, top, right, bottom in boxes(root, ""):
        assert bottom <= min(axis) or top >= max(axis) - 5 or right <= left, name


def test_marks_of_two_kinds_are_beside_each_other():
    marks = [Marks("one", [(1, 0.5, 0.0, 1.0)]), Marks("two", [(1, 0.5, 0.0, 1.0)])]
    chart = trend_chart("x", "y", [trend_of("", [(0, 0.0), (2, 1.0)], 1)], marks)
    dots = [each.get("cx") for each in ElementTree.fromstring(inline(chart, "i")).iter("circle")]
    assert len(dots) == len(set(dots)) == 4  # two in the legend


def test_areas_differ_without_colour_and_textures_are_visible():
    assert len(set(TEXTURES)) == len(LIGHT_AREAS) == len(DARK_AREAS) == CHART_PATTERNS.count('id="area') == 8
    for colors, tints in ((LIGHT, LIGHT_AREAS), (DARK, DARK_AREAS)):
        assert all(contrast(colors["ink"], tint) >= 4.5 for tint in tints)


def test_shares_fill_the_panel():
    layers = {"bad": [0.25, 0.5], "good": [0.75, 0.5]}
    root = ElementTree.fromstring(inline(share_chart("x", [1, 2], layers, 1), "i"))
    bad, good = [[float(point.split(",")[1]) for point in each.get("points").split()] for each in root.iter("polygon")]
    top, bottom = 44, 194
    assert bad == [bottom - 37.5, bottom - 75, bottom, bottom] and good == [top, top, bottom - 75, bottom - 37.5]
    assert [text.text for text in root.iter("text")][-2:] == ["good", "bad"]


@pytest.mark.parametrize("name", ["</text><script>x</script>", "\x00\x1b[2J\u202e", "\ud800", "\"&'", "$x_1$"])
def test_hostile_names_are_text(name):
    page = sheet(name, [interval_chart(name, {name: [(name, 50.0, 40.0, 60.0)]})], columns=1)
    root = ElementTree.fromstring(page.encode("utf-8"))
    assert "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) in [
        each.text for each in root.iter(f"{SVG}text")
    ]
    assert not list(root.iter(f"{SVG}script"))


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_short_runs_have_charts(n_steps, tmp_path):
    rows = [{"step": step, "sft/loss": 1.0, "sft/learning_rate": 0.0} for step in range(1, n_steps + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "sft/lo')
    assert write_run_plot(tmp_path) == f"plot: {tmp_path / 'plots' / 'loss.svg'}"
    drawn = (tmp_path / "plots" / "loss.svg").read_bytes()
    ElementTree.fromstring(drawn)
    write_run_plot(tmp_path)
    assert drawn == (tmp_path / "plots" / "loss.svg").read_bytes() and b"nan" not in drawn
    assert ppo_charts(ppo_rows(1)[:n_steps], [], [], 0)
