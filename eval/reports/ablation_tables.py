"""Tables and plot of `python -m eval.ablation`: Table 5's shape with intervals and tests, from its cells' results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from charts import interval_chart
from data.json_records import DataError, write_text
from eval.confidence import mcnemar_p_value, sign_flip_p_value, t_interval
from eval.predict.prediction_files import DTYPE_NAMES
from eval.rates import METRICS
from eval.reports.compare import read_results, read_run
from eval.reports.paper_tables import read_published
from eval.reports.report import format_table, metrics_of, paired_counts
from svg import sheet

# In the order of Table 5, whose rows in published_results.json they are.
METHODS = ("none", "MAE", "PKT", "IRM", "MAE+PKT", "MAE+IRM", "PKT+IRM", "MAE+PKT+IRM")
STANDARD = METHODS[0]
SPLITS = ("tiny-seen", "tiny-unseen", "tiny-hard", "tiny-alike")
PAPER_BENCHMARKS = ("toolalpaca", "rotbench-clean")

Results = Mapping[str, Mapping[int, Mapping[int, dict]]]  # method -> seed -> index -> row of results/<split>.jsonl


@dataclass(frozen=True, slots=True)
class Cell:
    """One method with one seed."""

    method: str  # of METHODS
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def has_irm(self) -> bool:
        return "IRM" in self.method

    def start(self) -> "Cell":
        """The cell whose SFT model a cell with IRM starts from; for any other cell itself."""
        parts = [part for part in self.method.split("+") if part != "IRM"]
        return Cell("+".join(parts) or STANDARD, self.seed)

    def folder(self, output: Path) -> Path:
        """Its folder, with the runs `sft` or `ppo`, and `eval`."""
        return output / f"seed{self.seed}" / self.method


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def rate_rows(split: str, results: Results) -> list[dict]:
    """Per method and metric: percentages of the seeds, their mean, its 95 % t interval (None for one seed)."""
    rows = []
    for method, by_seed in results.items():
        for metric in METRICS:
            percents = [100 * sum(row[metric] for row in each.values()) / len(each) for each in by_seed.values()]
            rows.append({"split": split, "method": method, "metric": metric, "prompts": _n_prompts(by_seed)})
            rows[-1] |= {"seeds": [*by_seed], "percents": percents, **mean_and_interval(percents)}
    return rows


def difference_rows(split: str, results: Results, standard: str = STANDARD) -> list[dict]:
    """Per method but the standard one, and per metric: its difference to that one, with the same seeds, tested twice.

    Over seeds: mean difference in points, 95 % t interval, exact sign-flip p. Over prompts: those of all seeds pooled,
    how many are lost and won, McNemar's exact p.
    """
    rows = []
    for method, by_seed in results.items():
        for metric in METRICS if method != standard else ():
            pairs = [paired_counts(results[standard][seed], each, metric) for seed, each in by_seed.items()]
            lost, won = (sum(column) for column in zip(*pairs))
            n_prompts, gains = _n_prompts(by_seed), [each_won - each_lost for each_lost, each_won in pairs]
            rows.append({"split": split, "method": method, "minus": standard, "metric": metric, "prompts": n_prompts})
            rows[-1] |= {"seeds": [*by_seed], **mean_and_interval([100 * gain / n_prompts for gain in gains])}
            rows[-1] |= {"p_over_seeds": sign_flip_p_value(gains), "lost": lost, "won": won}
            rows[-1] |= {"p_over_prompts": mcnemar_p_value(lost, won)}
    return rows


def irm_rows(split: str, results: Results) -> list[dict]:
    """difference_rows of what IRM adds to MAE, to PKT and to both: to the same method without it."""
    starts = {method: Cell(method, 0).start().method for method in results if "IRM" in method}
    pairs = [{start: results[start], method: results[method]} for method, start in starts.items() if start != STANDARD]
    return [row for pair in pairs for row in difference_rows(split, pair, next(iter(pair)))]


def _n_prompts(by_seed: Mapping[int, Mapping[int, dict]]) -> int:
    return len(next(iter(by_seed.values())))


def mean_and_interval(values: Sequence[float]) -> dict:
    interval = t_interval(values) if len(values) > 1 else None
    return {"mean": sum(values) / len(values), "interval_95": interval}


def paper_difference(method: str, metric: str, minus: str = STANDARD) -> str:
    """What Table 5 prints for a method minus another one on each of PAPER_BENCHMARKS, in points."""
    published = read_published()["table5"]
    rows = [published[METHODS.index(name)] for name in (method, minus)]
    place = METRICS.index(metric)
    return ", ".join(f"{rows[0][name][place] - rows[1][name][place]:+.1f}" for name in PAPER_BENCHMARKS)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_cells(folders: Mapping[Cell, Path], splits: Sequence[str], n_prompts: int) -> tuple[dict[str, Results], str]:
    """(split -> its results, the type in which the predictions were computed) of the cells' folders of run_eval.py.

    Raises DataError if a result is missing, or the cells scored other prompts or in other types.
    """
    results: dict[str, dict] = {name: {} for name in splits}
    kinds = set()
    for cell, folder in folders.items():
        run = read_run(folder)
        found = read_results(folder, run)
        for name in splits:
            if found.get(name, {}).keys() != {*range(n_prompts)} or metrics_of(run["benchmarks"][name]) != [*METRICS]:
                raise DataError(f"{folder}: found no complete results of {name}, expected those of all prompts")
        kinds.add((run.get("dtype"), *(run["benchmarks"][name]["answers_sha256"] for name in splits)))
        if len(kinds) > 1:
            raise DataError(f"{folder}: found other prompts or another type than in earlier cells, expected the same")
        for name in splits:
            results[name].setdefault(cell.method, {})[cell.seed] = {
                index: {metric: row[metric] for metric in METRICS} for index, row in found[name].items()
            }
    return results, kinds.pop()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_tables(output: Path, settings: Mapping, cells: Sequence[Cell]) -> Path:
    """Write ablation.json, ablation.svg and ablation.md; returns the last. Raises DataError as read_cells."""
    cells = sorted(cells, key=lambda cell: (METHODS.index(cell.method), cell.seed))
    folders = {cell: cell.folder(output) / "eval" for cell in cells}
    splits, dtype = read_cells(folders, SPLITS, settings["prompts"])
    rates = [row for split, results in splits.items() for row in rate_rows(split, results)]
    differences = [
        row for split, results in splits.items() for row in difference_rows(split, results) + irm_rows(split, results)
    ]
    content = {"settings": dict(settings), "dtype": dtype, "rates": rates, "differences": differences}
    write_text(output / "ablation.json", json.dumps(content, indent=1) + "\n")
    charts = [interval_chart(metric, _bars(rates, metric)) for metric in METRICS]
    write_text(output / "ablation.svg", sheet("Mean over seeds and its 95 % t interval", charts, columns=len(charts)))
    path = output / "ablation.md"
    write_text(path, format_tables(settings, dtype, rates, differences))
    return path


def _bars(rates: Sequence[Mapping], metric: str) -> dict[str, list[tuple[str, float, float, float]]]:
    """Split -> (method, mean, low, high), the interval cut to what a share can be; a point for one seed."""
    groups: dict[str, list] = {}
    for row in rates:
        if row["metric"] == metric:
            low, high = row["interval_95"] or (row["mean"], row["mean"])
            groups.setdefault(row["split"], []).append((row["method"], row["mean"], max(low, 0.0), min(high, 100.0)))
    return groups


def format_tables(settings: Mapping, dtype: str, rates: Sequence[Mapping], differences: Sequence[Mapping]) -> str:
    """ablation.md."""
    parts = [
        "# Ablation",
        f"SFT on {settings['trajectories']} trajectories{' about tools that look alike' if settings['alike'] else ''}: "
        f"`run_sft.py {settings['sft_flags']}`; without MAE "
        "`--error_filter none`, without PKT `--key_tokens off`. IRM is PPO from that SFT model, prompts of 1,217 "
        f"such trajectories: `run_ppo.py {settings['ppo_flags']}`. Greedy predictions in "
        f"{DTYPE_NAMES.get(dtype, 'an unknown type')}: `run_eval.py {settings['eval_flags']}`.",
        "Rates: mean over seeds [95 % t interval of the mean, which may reach beyond 100]. Differences are to the row "
        "`none`, and with IRM also to the same method without it, with the same seeds. *p, seeds*: exact sign-flip "
        "test of the seeds' differences, at least 2 / 2^seeds; it asks whether another training would show it. *p, "
        "prompts*: McNemar's exact test, the prompts of all seeds pooled; it speaks of these trained models only. No p "
        "is corrected for the number of tests. *Paper*: the difference in Table 5 on "
        f"{' and '.join(PAPER_BENCHMARKS)}, one seed.",
    ]
    for split in dict.fromkeys(row["split"] for row in rates):
        n_prompts = next(row["prompts"] for row in rates if row["split"] == split)
        parts += [f"## {split}, {n_prompts} prompts", _rate_table(split, rates), _difference_table(split, differences)]
    return "\n\n".join(parts) + "\n"


def _rate_table(split: str, rates: Sequence[Mapping]) -> str:
    cells = {(row["method"], row["metric"]): row for row in rates if row["split"] == split}
    table = [["method", "seeds", *(f"{metric} %" for metric in METRICS)]]
    for method in dict.fromkeys(method for method, _ in cells):
        n_seeds = len(cells[method, METRICS[0]]["seeds"])
        table.append([method, str(n_seeds), *(format_interval(cells[method, metric], ".1f") for metric in METRICS)])
    return format_table(table)


def _difference_table(split: str, differences: Sequence[Mapping]) -> str:
    head = ["difference", "metric", "seeds", "points", "p, seeds", "lost", "won", "p, prompts", "paper"]
    return format_table(
        [head]
        + [
            [
                *(f"{row['method']} - {row['minus']}", row["metric"], str(len(row["seeds"]))),
                format_interval(row, "+.1f"),
                *(f"{row['p_over_seeds']:.2g}", str(row["lost"]), str(row["won"]), f"{row['p_over_prompts']:.2g}"),
                paper_difference(row["method"], row["metric"], row["minus"]),
            ]
            for row in differences
            if row["split"] == split
        ]
    )


def format_interval(row: Mapping, form: str) -> str:
    mean = f"{row['mean']:{form}}"
    return f"{mean} [{', '.join(f'{bound:{form}}' for bound in row['interval_95'])}]" if row["interval_95"] else mean
