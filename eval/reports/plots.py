"""Figure 4 (TS, PI, CF over RoTBench's five environments) and Figure 5 (general tasks) from summary.json files.

    python -m eval.reports.plots runs/eval_base runs/eval_sft [--names base,SFT] [--output DIR]

Marks with 95 % Wilson intervals, as SVG (charts.py).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from charts import interval_chart
from command_line import parse_arguments, run_command
from data.json_records import DataError, write_text
from eval.benchmarks import BENCHMARKS
from eval.rates import METRICS
from eval.reports.compare import read_run
from eval.reports.report import metrics_of
from printable import terminal_text
from svg import sheet


def figure4_bars(summaries: Mapping[str, Mapping]) -> dict[str, list[tuple[str, float, float, float]]]:
    """Metric -> bars (environment, percent, low, high) of the RoTBench environments that were run."""
    present = [name for name in _names_of_figure(4) if name in summaries]
    return {metric: [_bar(name.partition("-")[2], summaries[name], metric) for name in present] for metric in METRICS}


def figure5_bars(summaries: Mapping[str, Mapping]) -> list[tuple[str, float, float, float]]:
    """Bars (benchmark, percent, low, high) of the general tasks that were run."""
    return [
        _bar(name, summaries[name], BENCHMARKS[name].metric)
        for name in _names_of_figure(5)
        if BENCHMARKS[name].metric in metrics_of(summaries.get(name, {}))
    ]


def _names_of_figure(figure: int) -> list[str]:
    return [name for name, benchmark in BENCHMARKS.items() if benchmark.figure == figure]


def _bar(label: str, summary: Mapping, metric: str) -> tuple[str, float, float, float]:
    return label, summary[f"{metric}_percent"], *summary[f"{metric}_interval_95"]


def write_plots(names: Sequence[str], runs: Sequence[Mapping], folder: Path) -> list[Path]:
    """The files written: figure4.svg and figure5.svg, each where a run has its benchmarks.

    `runs` as in summary.json, one mark each in every group, called `names`.
    """
    panels4 = {metric: [figure4_bars(run["benchmarks"])[metric] for run in runs] for metric in METRICS}
    panels5 = {"general tasks": [figure5_bars(run["benchmarks"]) for run in runs]}
    written = []
    for name, panels in (("figure4", panels4), ("figure5", panels5)):
        if any(bars for series in panels.values() for bars in series):
            charts = [interval_chart(title, group_bars(names, series)) for title, series in panels.items()]
            written.append(folder / f"{name}.svg")
            write_text(written[-1], sheet(name.replace("figure", "Figure "), charts, columns=len(charts)))
    return written


def group_bars(
    names: Sequence[str], series: Sequence[Sequence[tuple[str, float, float, float]]]
) -> dict[str, list[tuple[str, float, float, float]]]:
    """Label -> (name, percent, low, high) of each run that has it, in the order of the longest series."""
    labels = dict.fromkeys(bar[0] for bars in sorted(series, key=len, reverse=True) for bar in bars)
    return {
        label: [(name, *bar[1:]) for name, bars in zip(names, series, strict=True) for bar in bars if bar[0] == label]
        for label in labels
    }


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.reports.plots", description="Figures 4 and 5 of one or more runs."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder with a summary.json")
    parser.add_argument("--names", help="comma-separated names of the series (default: the folders' names)")
    parser.add_argument("--output", type=Path, help="folder of the figures (default: RUN/plots of the last run)")
    flags = parse_arguments(parser, arguments)
    names = flags.names.split(",") if flags.names else [run.name for run in flags.runs]
    if len(names) != len(flags.runs):
        parser.error(f"--names: found {len(names)} names, expected {len(flags.runs)}, one per run")

    def command() -> None:
        runs = [read_run(run) for run in flags.runs]
        written = write_plots(names, runs, flags.output or flags.runs[-1] / "plots")
        if not written:
            print("plots: found no benchmark of Figures 4 and 5 in the runs", file=sys.stderr)
        for path in written:
            print(terminal_text(str(path)))

    return run_command(command, (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
