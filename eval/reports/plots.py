"""Figure 4 (TS, PI, CF over RoTBench's five environments) and Figure 5 (general tasks) from summary.json files.

    python -m eval.reports.plots runs/eval_base runs/eval_sft [--names base,SFT] [--output DIR]

Bars with 95 % Wilson intervals, as PNG and SVG. Needs matplotlib, which nothing else does.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from command_line import parse_arguments, run_command
from data.json_records import DataError
from eval.benchmarks import BENCHMARKS
from eval.rates import METRICS
from eval.reports.compare import read_run
from eval.reports.report import metrics_of
from printable import plot_text, terminal_text

NO_MATPLOTLIB = "plots: found no matplotlib, expected it; the tables have the same numbers"


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


def write_plots(names: Sequence[str], runs: Sequence[Mapping], folder: Path) -> tuple[list[Path], list[str]]:
    """(files written, notices): figure4 and figure5, each as .png and .svg, where a run has their benchmarks.

    `runs` as in summary.json, one series each, called `names`. Nothing to draw or no matplotlib: no files, a notice.
    """
    panels4 = {metric: [figure4_bars(run["benchmarks"])[metric] for run in runs] for metric in METRICS}
    panels5 = {"general tasks": [figure5_bars(run["benchmarks"]) for run in runs]}
    figures = {
        name: panels
        for name, panels in (("figure4", panels4), ("figure5", panels5))
        if any(bars for series in panels.values() for bars in series)
    }
    if not figures:
        return [], []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [], [NO_MATPLOTLIB]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, panels in figures.items():
        figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
        for axes, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            draw_bars(axes, title, names, series)
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written, []


def draw_bars(
    axes, title: str, names: Sequence[str], series: Sequence[Sequence[tuple[str, float, float, float]]]
) -> None:
    """Grouped bars: one group per label that any series has, in the order of the longest series."""
    labels = list(dict.fromkeys(bar[0] for bars in sorted(series, key=len, reverse=True) for bar in bars))
    width = 0.8 / len(series)
    for number, (name, bars) in enumerate(zip(names, series)):
        places = [labels.index(bar[0]) + (number - (len(series) - 1) / 2) * width for bar in bars]
        # An interval contains its share; rounding to two digits may leave -0.005, which matplotlib refuses.
        below = [max(0.0, percent - low) for _, percent, low, _ in bars]
        above = [max(0.0, high - percent) for _, percent, _, high in bars]
        axes.bar(places, [bar[1] for bar in bars], width, yerr=[below, above], capsize=2, label=plot_text(name))
    axes.set(title=title, ylim=(0, 100), ylabel="%")
    axes.set_xticks(range(len(labels)), labels)
    axes.legend(fontsize="small")


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
        written, notices = write_plots(
            names, [read_run(run) for run in flags.runs], flags.output or flags.runs[-1] / "plots"
        )
        for notice in notices or ([] if written else ["plots: found no benchmark of Figures 4 and 5 in the runs"]):
            print(terminal_text(notice), file=sys.stderr)
        for path in written:
            print(terminal_text(str(path)))

    return run_command(command, (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
