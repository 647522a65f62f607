"""Score dialogues with tools, ToolEyes' or the bundled ones: DE, CE and VA. File in, file out, no model.

    python -m eval.evaluate_tooleyes --answers tooleyes/Test_Data/scenario_data_zero_processed.json --predictions FILE
    python -m eval.evaluate_tooleyes --answers assets/tiny_data/test_multi.jsonl --predictions FILE [--output DIR]

What counts as what: docs/multi_turn.md. --predictions has one dialogue per line with the feedback of every call, as
run_eval.py writes them, or is the file of ToolEyes' own loop, unchanged. Nothing is called here.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data.json_records import read_json_lines, write_json_lines
from eval.benchmark_data import benchmark_of, load_tiny_multi
from eval.command_line import parse_arguments, run_command
from eval.dialogues.journal import DialogueTask, match_dialogues, read_dialogues
from eval.dialogues.metrics import score_dialogues
from eval.tooleyes_data import load_tooleyes, read_official_dialogues


def load_tasks(answers: Path) -> list[DialogueTask]:
    """The tasks of ToolEyes' own file (.json) or of a file with a task per line. Raises DataError with `file:line`."""
    return load_tooleyes(answers) if answers.suffix == ".json" else load_tiny_multi(answers)


def evaluate_tooleyes_files(answers: Path, predictions: Path, limit: int | None) -> tuple[list[dict], dict, list[str]]:
    """(rows, summary, notices) for an answer file and a file of dialogues. Raises DataError with `file:line`."""
    tasks = load_tasks(answers)
    rows, _ = read_json_lines(predictions, drop_partial_last_line=True)
    is_official = bool(rows) and "conversations" in rows[0][1]
    dialogues, has_dropped = read_official_dialogues(predictions, tasks) if is_official else read_dialogues(predictions)
    matched = match_dialogues(dialogues, len(tasks), limit, path=predictions)
    rows, summary = score_dialogues(matched, tasks[: len(matched)])
    return rows, summary, [f"{predictions}: dropped a partial last line"] if has_dropped else []


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(prog="evaluate_tooleyes", description="Score dialogues with tools: DE, CE, VA.")
    parser.add_argument(
        "--answers",
        type=Path,
        required=True,
        help="the benchmark's own file: ToolEyes' .json, or .jsonl with one task per line",
    )
    parser.add_argument(
        "--predictions",
        type=Path,
        required=True,
        help='JSONL of {"index": 0, "turns": [..], "end": "finish", "format": "tl"}, or of '
        'ToolEyes\' own {"id", "conversations": [..], "path"}',
    )
    parser.add_argument("--output", type=Path, help="folder for results/<benchmark>.jsonl (default: none written)")
    parser.add_argument("--limit", type=int, help="score only the first N records (default: all, none may miss)")
    flags = parse_arguments(parser, arguments)
    if flags.limit is not None and flags.limit < 1:
        parser.error(f"--limit: found {flags.limit}, expected at least 1")

    def command() -> None:
        rows, summary, notices = evaluate_tooleyes_files(flags.answers, flags.predictions, flags.limit)
        for notice in notices:
            print(notice, file=sys.stderr)
        if flags.output is not None:
            write_json_lines(flags.output / "results" / f"{benchmark_of(flags.answers)}.jsonl", rows)
        print(json.dumps(summary))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
