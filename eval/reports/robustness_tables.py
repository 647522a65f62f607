"""Tables and plot of `python -m eval.robustness`: Figure 4's shape, and how far each level falls from clean."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from charts import interval_chart
from data.json_records import write_text
from eval.confidence import Z_95, sign_flip_p_value, wilson_interval
from eval.predict.prediction_files import DTYPE_NAMES
from eval.rates import METRICS
from eval.reports.ablation_tables import Results, difference_rows, format_interval, mean_and_interval, rate_rows
from eval.reports.report import format_table
from svg import sheet
from toolbox.noise import HALVES, LEVELS

CLEAN = LEVELS[0]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def level_rows(split: str, by_level: Mapping[str, Results]) -> list[dict]:
    """rate_rows of each level, with the level and `prompts_95`: Wilson's interval of the mean over seeds, in percent.

    It is that of one seed's number of prompts, as if further seeds told nothing new about them: rather too wide.
    """
    rows = []
    for level, results in by_level.items():
        for row in rate_rows(split, results):
            n_prompts = row["prompts"]
            bounds = wilson_interval(row["mean"] / 100 * n_prompts, n_prompts, Z_95)
            rows.append({"level": level, **row, "prompts_95": [100 * bound for bound in bounds]})
    return rows


def half_rows(split: str, by_level: Mapping[str, Results]) -> list[dict]:
    """rate_rows of each level's prompts with noise in names of tools (`tool`) and in those of parameters.

    The halves of clean are the same prompts, without noise; in union both halves have both.
    """
    return [
        {"level": level, "half": half, **row}
        for level, results in by_level.items()
        for parity, half in enumerate(HALVES)
        for row in rate_rows(split, _half_of(results, parity))
    ]


def _half_of(results: Results, parity: int) -> Results:
    return {
        method: {
            seed: {index: row for index, row in rows.items() if index % 2 == parity} for seed, rows in by_seed.items()
        }
        for method, by_seed in results.items()
    }


def fall_rows(split: str, by_level: Mapping[str, Results], standard: str) -> list[dict]:
    """difference_rows of each method's levels to clean; a fall is negative.

    Methods but `standard` also have `minus_standard`: their difference minus that of `standard`, with the same seeds.
    It has a mean in points, a 95 % t interval (None for one seed) and the exact sign-flip p over seeds.
    """
    rows, gains = [], {}
    for method in by_level[CLEAN]:
        levels = {level: results[method] for level, results in by_level.items()}
        for row in difference_rows(split, levels, CLEAN):
            level, metric, n_prompts = row.pop("method"), row["metric"], row["prompts"]
            counts = [
                sum(each[metric] for each in levels[level][seed].values())
                - sum(each[metric] for each in levels[CLEAN][seed].values())
                for seed in row["seeds"]
            ]
            gains[method, level, metric] = counts
            rows.append({"split": split, "method": method, "level": level, **row})
            if method != standard:
                more = [mine - other for mine, other in zip(counts, gains[standard, level, metric], strict=True)]
                spread = mean_and_interval([100 * each / n_prompts for each in more])
                rows[-1]["minus_standard"] = {**spread, "p_over_seeds": sign_flip_p_value(more)}
    return rows


def method_rows(split: str, by_level: Mapping[str, Results], standard: str) -> list[dict]:
    """difference_rows of the methods to `standard` at each level."""
    return [
        {"level": level, **row}
        for level, results in by_level.items()
        for row in difference_rows(split, results, standard)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_tables(output: Path, settings: Mapping, dtype: str, results: Mapping[str, Mapping[str, Results]]) -> Path:
    """Write robustness.json, robustness.svg and robustness.md; returns the last. results: split -> level -> Results."""
    standard = settings["methods"][0]
    rates = [row for split, by_level in results.items() for row in level_rows(split, by_level)]
    halves = [row for split, by_level in results.items() for row in half_rows(split, by_level)]
    falls = [row for split, by_level in results.items() for row in fall_rows(split, by_level, standard)]
    differences = [row for split, by_level in results.items() for row in method_rows(split, by_level, standard)]
    content = {"settings": dict(settings), "dtype": dtype, "rates": rates, "halves": halves}
    content |= {"falls": falls, "differences": differences}
    write_text(output / "robustness.json", json.dumps(content, indent=1) + "\n")
    charts = [interval_chart(metric, _bars(rates, metric)) for metric in METRICS]
    title = "Levels of noise: mean over seeds and its 95 % interval over prompts"
    write_text(output / "robustness.svg", sheet(title, charts, columns=len(charts)))
    parts = [
        "# Robustness",
        "Five levels of noise (toolbox/noise.py), the levels of the paper's Figure 4. Greedy predictions in "
        f"{DTYPE_NAMES.get(dtype, 'an unknown type')}: `run_eval.py {settings['eval_flags']}`.",
        "*[prompts]*: Wilson's 95 % interval for one seed's number of prompts, as if further seeds told nothing new. "
        "*[seeds]*: 95 % t interval of the mean over seeds. *p, seeds*: exact sign-flip test, at least 2 / 2^seeds. "
        "*p, prompts*: McNemar's exact test, the prompts of all seeds pooled; it speaks of these trained models only. "
        "No p is corrected for the number of tests.",
    ]
    for split in results:
        parts += [
            f"## {split}, {settings['prompts']} prompts",
            _rate_table([row for row in rates if row["split"] == split]),
            "The half with noise in names of tools, and the half with noise in names of parameters (of clean: the same "
            "prompts; in union both have both), mean over seeds:",
            _half_table([row for row in halves if row["split"] == split]),
            f"From clean to each level, in points, and how much more than `{standard}`:",
            _fall_table([row for row in falls if row["split"] == split], standard),
        ]
        if len({row["method"] for row in rates}) > 1:
            table = _method_table([row for row in differences if row["split"] == split], standard)
            parts += [f"Methods minus `{standard}` at each level:", table]
    write_text(output / "robustness.md", "\n\n".join(parts) + "\n")
    return output / "robustness.md"


def _bars(rates: Sequence[Mapping], metric: str) -> dict[str, list[tuple[str, float, float, float]]]:
    groups: dict[str, list] = {}
    for row in rates:
        if row["metric"] == metric:
            bar = (row["method"], row["mean"], *row["prompts_95"])
            groups.setdefault(f"{row['split']}, {row['level']}", []).append(bar)
    return groups


def _rate_table(rates: Sequence[Mapping]) -> str:
    cells = {(row["method"], row["level"], row["metric"]): row for row in rates}
    head = ["method", "level", "seeds", *(part for metric in METRICS for part in (f"{metric} % [prompts]", "[seeds]"))]
    table = [head]
    for method, level in dict.fromkeys((method, level) for method, level, _ in cells):
        found = [cells[method, level, metric] for metric in METRICS]
        table.append([method, level, str(len(found[0]["seeds"]))])
        for row in found:
            table[-1] += [f"{row['mean']:.1f} {_bounds(row['prompts_95'])}", _bounds(row["interval_95"])]
    return format_table(table)


def _half_table(halves: Sequence[Mapping]) -> str:
    means = {(row["method"], row["level"], row["half"], row["metric"]): row["mean"] for row in halves}
    table = [["method", "level", *(f"{half}: {metric} %" for half in HALVES for metric in METRICS)]]
    for method, level in dict.fromkeys((method, level) for method, level, *_ in means):
        numbers = [f"{means[method, level, half, metric]:.1f}" for half in HALVES for metric in METRICS]
        table.append([method, level, *numbers])
    return format_table(table)


def _bounds(interval: Sequence[float] | None) -> str:
    """An interval of a percentage, cut to what a share can be; "" for none."""
    return f"[{', '.join(f'{min(max(bound, 0), 100):.1f}' for bound in interval)}]" if interval else ""


def _fall_table(falls: Sequence[Mapping], standard: str) -> str:
    head = ["method", "level", "metric", "points [seeds]", "p, seeds", "lost", "won", "p, prompts"]
    table = [[*head, f"minus {standard} [seeds]", "p, seeds"]]
    for row in falls:
        more = row.get("minus_standard")
        table.append([row["method"], row["level"], *_tested(row)])
        table[-1] += [format_interval(more, "+.1f"), f"{more['p_over_seeds']:.2g}"] if more else ["", ""]
    return format_table(table)


def _method_table(differences: Sequence[Mapping], standard: str) -> str:
    head = [f"method - {standard}", "level", "metric", "points [seeds]", "p, seeds", "lost", "won", "p, prompts"]
    return format_table([head, *([row["method"], row["level"], *_tested(row)] for row in differences)])


def _tested(row: Mapping) -> list[str]:
    counts = [f"{row['p_over_seeds']:.2g}", str(row["lost"]), str(row["won"]), f"{row['p_over_prompts']:.2g}"]
    return [row["metric"], format_interval(row, "+.1f"), *counts]
