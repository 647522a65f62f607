"""Compare runs of run_eval.py: before/after table with n, 95 % intervals and whether they are disjoint.

    python -m eval.compare runs/eval_base runs/eval_sft [--names base,SFT]
"""
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data.trajectories import DataError
from eval.command_line import parse_arguments, run_command
from eval.report import METRICS, format_comparison

SUMMARY_KEYS = ("n", "answers_sha256", *METRICS, *(f"{metric}_percent" for metric in METRICS),
                *(f"{metric}_interval_95" for metric in METRICS))


def read_run(run_dir: Path) -> dict:
    """summary.json of a run of run_eval.py. Raises DataError if it is missing or not of that shape."""
    path = run_dir / "summary.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: found {error.strerror or error}, expected the summary of a run_eval.py run") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: found no valid JSON, expected the summary of a run_eval.py run") from None
    benchmarks = run.get("benchmarks") if isinstance(run, dict) else None
    if not isinstance(benchmarks, dict) or not all(
            isinstance(summary, dict) and all(key in summary for key in SUMMARY_KEYS)
            for summary in benchmarks.values()):
        raise DataError(f"{path}: found other contents, expected the summary of a run_eval.py run")
    return run


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="compare", description="Compare runs; the first is the baseline.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder with a summary.json")
    parser.add_argument("--names", help="comma-separated column names (default: the folders' names)")
    flags = parse_arguments(parser, arguments)
    names = flags.names.split(",") if flags.names else [run.name for run in flags.runs]
    if len(names) != len(flags.runs):
        parser.error(f"--names: found {len(names)} names, expected {len(flags.runs)}, one per run")
    return run_command(lambda: print(format_comparison(names, [read_run(run) for run in flags.runs])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
