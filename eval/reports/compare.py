"""Compare runs of run_eval.py, or prediction files: rates with n, 95 % intervals, verdicts, McNemar's paired test.

    python -m eval.reports.compare runs/eval_base runs/eval_sft [--names base,SFT] [--mcnemar] [--examples 2]
    python -m eval.reports.compare --answers rotbench/First_Turn/clean.json a.jsonl b.jsonl [--rules fair]

The intervals ignore the pairing of records; the paired test (always shown for prediction files) uses it, and so finds
smaller differences. For DE and CE, which count errors, lower is better.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from command_line import parse_arguments, run_command
from data.json_records import DataError, check_regular_file, read_json_lines, read_json_object
from eval.benchmarks import benchmark_of
from eval.dialogues.metrics import MAX_TURNS
from eval.predict.prediction_files import read_dtype, read_predictions
from eval.rates import CALL_METRICS
from eval.records import ScoreSettings
from eval.reports.report import format_comparison, metrics_of, unattainable_rates
from printable import shown, terminal_text


def read_run(run_dir: Path) -> dict:
    """summary.json of a run of run_eval.py. Raises DataError if it is missing or has another shape."""
    path = run_dir / "summary.json"
    if not path.exists():
        raise DataError(f"{path}: found No such file or directory, expected the summary of a run_eval.py run")
    run = read_json_object(path)
    benchmarks = run.get("benchmarks")
    has_dtype = isinstance(run.get("dtype"), str | None)
    if not has_dtype or not isinstance(benchmarks, dict) or not all(map(_is_summary, benchmarks.values())):
        raise DataError(f"{path}: found other contents, expected the summary of a run_eval.py run")
    return run


def _is_summary(summary: object) -> bool:
    if not isinstance(summary, dict) or not isinstance(summary.get("answers_sha256"), str):
        return False
    metrics = metrics_of(summary)
    has_counts = type(summary.get("n")) is int and summary["n"] > 0 and type(summary.get("n_calls", 0)) is int
    return (
        bool(metrics)
        and has_counts
        and all(
            type(summary.get(metric)) is int
            and isinstance(summary[f"{metric}_interval_95"], list)
            and len(summary[f"{metric}_interval_95"]) == 2
            and all(map(_is_percentage, (summary[f"{metric}_percent"], *summary[f"{metric}_interval_95"])))
            for metric in metrics
        )
    )


def _is_percentage(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 100


def read_results(run_dir: Path, run: dict) -> dict[str, dict[int, dict]]:
    """Benchmark -> index -> row of results/<benchmark>.jsonl. Raises DataError where rows and summary disagree."""
    results = {}
    for name, summary in run["benchmarks"].items():
        path = run_dir / "results" / f"{name}.jsonl"
        metrics = [metric for metric in metrics_of(summary) if metric not in CALL_METRICS]  # rows have counts of those
        rows: dict[int, dict] = {}
        check_regular_file(path)
        for line, row in read_json_lines(path, drop_partial_last_line=False)[0]:
            if (
                type(row.get("index")) is not int
                or row["index"] in rows
                or not all(type(row.get(metric)) is int and row[metric] in (0, 1) for metric in metrics)
            ):
                raise DataError(
                    f"{path}:{line}: found another row, expected an index once and {', '.join(metrics)}, each 0 or 1"
                )
            rows[row["index"]] = row
        if len(rows) != summary["n"]:
            raise DataError(f"{path}: found {len(rows)} rows, expected {summary['n']} as in summary.json")
        for metric in metrics:
            if (count := sum(row[metric] for row in rows.values())) != summary[metric]:
                raise DataError(
                    f"{path}: found {count} rows with {metric}, expected {summary[metric]} as in summary.json"
                )
        results[name] = rows
    return results


def score_files(answers: Path, predictions: Sequence[Path], rules: str) -> tuple[list[dict], list[dict], list[str]]:
    """(runs, results, notices) of prediction files for one answer file, in the shapes of read_run and read_results."""
    benchmark = benchmark_of(answers)
    name, records = benchmark.name, benchmark.load(answers)
    settings = ScoreSettings(None, benchmark.resolve_rules(rules), execute_code=False, max_turns=MAX_TURNS)
    runs, results, notices = [], [], []
    for path in predictions:
        rows, summary, found = benchmark.score(records, path, settings)
        runs.append({"dtype": read_dtype(path), "benchmarks": {name: {**summary, "answers_sha256": ""}}})
        results.append({name: {row["index"]: row for row in rows}})
        notices += found
    return runs, results, notices


def format_examples(
    names: Sequence[str], run_dirs: Sequence[Path], results: Sequence[Mapping], count: int
) -> list[str]:
    """Lines for `count` records of each benchmark that the last run has right and the first wrong, spread evenly.

    Both outputs, and why the first is wrong. For benchmarks of single calls. Raises DataError.
    """
    lines = []
    for benchmark, rows in results[0].items():
        last = results[-1].get(benchmark, {})
        won = [index for index, row in rows.items() if row.get("CF") == 0 and last.get(index, {}).get("CF") == 1]
        path = f"predictions/{benchmark}.jsonl"
        outputs = [read_predictions(run_dir / path)[0] for run_dir in (run_dirs[0], run_dirs[-1])] if won else []
        first, second = ({each.index: each.output.strip() for each in found} for found in outputs or ([], []))
        for index in won[:: max(1, len(won) // count)][:count]:
            lines += [
                f"{benchmark}, record {index}",
                f"  {names[0]}: {shown(first.get(index, ''), 200)}, {rows[index].get('reason')}",
                f"  {names[-1]}: {shown(second.get(index, ''), 200)}, right",
            ]
    return lines


def compare(flags: argparse.Namespace, names: Sequence[str]) -> None:
    """Print the table; notices and warnings of percentages that cannot be k/n go to stderr. Raises DataError."""
    results, notices = None, []
    if flags.answers is not None:
        runs, results, notices = score_files(flags.answers, flags.runs, flags.rules)
    else:
        runs = [read_run(run_dir) for run_dir in flags.runs]
        if flags.mcnemar or flags.examples:
            results = [read_results(run_dir, run) for run_dir, run in zip(flags.runs, runs)]
    for name, run in zip(names, runs):
        notices += [
            f"{name}: {benchmark} {line}"
            for benchmark, summary in run["benchmarks"].items()
            for line in unattainable_rates(summary)
        ]
    table = format_comparison(names, runs, results if flags.mcnemar or flags.answers is not None else None)
    if flags.examples:
        none = [f"no call that {names[-1]} has right and {names[0]} wrong"]
        examples = format_examples(names, flags.runs, results, flags.examples) or none
    else:
        examples = []
    for notice in notices:
        print(terminal_text(notice), file=sys.stderr)
    print(table)
    for line in examples:
        print(terminal_text(line))


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.reports.compare", description="Compare runs; the first is the baseline."
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder with a summary.json; with --answers a prediction file"
    )
    parser.add_argument(
        "--names", help="comma-separated column names (default: the folders' or files' names, or their paths)"
    )
    parser.add_argument("--mcnemar", action="store_true", help="also McNemar's exact test, from the runs' results")
    parser.add_argument(
        "--examples",
        type=int,
        default=0,
        metavar="N",
        help="also N calls that the last run has right and the first wrong",
    )
    parser.add_argument("--answers", type=Path, help="a benchmark's own file: score and compare predictions for it")
    parser.add_argument(
        "--rules", choices=("default", "official", "fair"), default="default", help="rules for --answers"
    )
    flags = parse_arguments(parser, arguments)
    names = flags.names.split(",") if flags.names else [run.name for run in flags.runs]
    if not flags.names and len(set(names)) < len(names):
        names = [str(run) for run in flags.runs]
    if flags.examples < 0 or (flags.examples and flags.answers is not None):
        parser.error(f"--examples: found {flags.examples}, expected 0 or more, and folders instead of --answers")
    if len(names) != len(flags.runs):
        parser.error(f"--names: found {len(names)} names, expected {len(flags.runs)}, one per run")
    return run_command(lambda: compare(flags, names), (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
