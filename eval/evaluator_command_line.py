"""The command line that the evaluators share: --answers, --predictions, --output, --limit; the summary to stdout."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from command_line import parse_arguments, run_command
from data.json_records import DataError, write_json_lines
from eval.benchmarks import Benchmark, count_notice
from eval.dialogues.metrics import MAX_TURNS
from eval.records import Record, Scores, ScoreSettings
from printable import json_line, terminal_text

CALL_PREDICTIONS = (
    'JSONL of {"index": 0, "output": "text"}, "format" where it is not tl; or a JSON list of records whose last '
    "conversations value is a ReAct text"
)


def evaluator_parser(prog: str, description: str, *, answers: str, predictions: str) -> argparse.ArgumentParser:
    """The flags of every evaluator. `answers` and `predictions` say what those files are."""
    parser = argparse.ArgumentParser(prog=f"python -m eval.{prog}", description=description)
    parser.add_argument("--answers", type=Path, required=True, help=answers)
    parser.add_argument("--predictions", type=Path, required=True, help=predictions)
    parser.add_argument("--output", type=Path, help="folder for results/<benchmark>.jsonl (default: none written)")
    parser.add_argument(
        "--limit", type=int, help="score only N records, evenly spread (default: all, none may be missing)"
    )
    return parser


def add_rules(parser: argparse.ArgumentParser, default: str, *, official: str, fair: str) -> None:
    """The flag --rules; `official` and `fair` say what the two are."""
    parser.add_argument(
        "--rules",
        choices=("official", "fair"),
        default=default,
        help=f"official: {official}; fair: {fair} (default: %(default)s)",
    )


def read_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The flags; wrong ones end the program with one line and exit code 2."""
    flags = parse_arguments(parser, arguments)
    if flags.limit is not None and flags.limit < 1:
        parser.error(f"--limit: found {flags.limit}, expected at least 1")
    return flags


def run_evaluator(
    flags: argparse.Namespace,
    benchmark: Benchmark,
    load: Callable[[Path], list[Record]],
    score: Callable[[list[Record], Path, ScoreSettings], Scores],
) -> int:
    """Score and report; the exit code is 0, or 2 after one line on stderr.

    The last line of stdout is the summary, one JSON object. Notices go to stderr, rows to
    --output/results/<benchmark>.jsonl.
    """

    def command() -> None:
        settings = ScoreSettings(
            limit=flags.limit,
            rules=getattr(flags, "rules", benchmark.rules),
            execute_code=getattr(flags, "execute_code", False),
            max_turns=MAX_TURNS,
        )
        records = load(flags.answers)
        scores = score(records, flags.predictions, settings)
        for notice in [*scores.notices, *count_notice(benchmark, flags.answers, records)]:
            print(terminal_text(notice), file=sys.stderr)
        if flags.output is not None:
            write_json_lines(flags.output / "results" / f"{benchmark.name}.jsonl", scores.rows)
        sys.stdout.write(json_line(scores.summary) + "\n")

    return run_command(command, (DataError, OSError))
