"""Score predictions on GSM8K: file in, file out, no model.

    python -m eval.evaluate_gsm8k --answers gsm8k/test.jsonl --predictions FILE [--output DIR]

exact_match (primary) is the benchmark's own rule: the first `#### number` of the output, commas removed, equals the
gold text letter by letter. last_number takes the last number before the output goes on to another question, by value.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data.json_records import write_json_lines
from eval.command_line import parse_arguments, run_command
from eval.general_tasks import (
    GSM8K_COUNT,
    MathProblem,
    count_errors,
    count_notice,
    extract_last_number,
    extract_marked,
    is_same_number,
    load_gsm8k,
    match_texts,
    rate_summary,
)
from eval.predict.prediction_files import Prediction

SHOWN_CHARACTERS = 40  # longest quotation of a number in a reason


def evaluate_gsm8k(problems: Sequence[MathProblem], predictions: Sequence[Prediction]) -> list[dict]:
    """One row per record: index, exact_match, last_number (0 or 1), reason ("" if exact_match).

    `predictions` are those of `problems`, in order.
    """
    return [_score(problem, prediction) for problem, prediction in zip(problems, predictions, strict=True)]


def _score(problem: MathProblem, prediction: Prediction) -> dict:
    row = {"index": problem.index, "exact_match": 0, "last_number": 0}
    if prediction.stop == "prompt_too_long":
        return {**row, "reason": "no output: the prompt does not fit the model's positions"}
    marked, last = extract_marked(prediction.output), extract_last_number(prediction.output)
    if marked == problem.answer:
        reason = ""
    elif marked is None:
        cut = " (output cut at max_new_tokens)" if prediction.stop == "max_new_tokens" else ""
        reason = f"no marked number: found no '#### number'{cut}"
    else:
        reason = f"wrong number: {marked[:SHOWN_CHARACTERS]!a}, expected {problem.answer!a}"
    return {
        **row,
        "exact_match": int(not reason),
        "last_number": int(is_same_number(last, problem.answer)),
        "reason": reason,
    }


def summarize_gsm8k(rows: Sequence[dict]) -> dict:
    """n, both rates with 95 % intervals, the name of the primary one, errors by category."""
    summary: dict = {"n": len(rows), "primary": "exact_match"}
    for name in ("exact_match", "last_number"):
        summary |= rate_summary(name, sum(row[name] for row in rows), len(rows))
    return {**summary, "errors": count_errors(rows)}


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(prog="evaluate_gsm8k", description="Score predictions on GSM8K.")
    parser.add_argument("--answers", type=Path, required=True, help="the benchmark's test.jsonl")
    parser.add_argument("--predictions", type=Path, required=True, help='JSONL of {"index": 0, "output": "text"}')
    parser.add_argument("--output", type=Path, help="folder for results/gsm8k.jsonl (default: none written)")
    parser.add_argument("--limit", type=int, help="score only the first N records (default: all, none may miss)")
    flags = parse_arguments(parser, arguments)
    if flags.limit is not None and flags.limit < 1:
        parser.error(f"--limit: found {flags.limit}, expected at least 1")

    def command() -> None:
        problems = load_gsm8k(flags.answers)
        predictions, notices = match_texts(flags.predictions, len(problems), flags.limit)
        rows = evaluate_gsm8k(problems[: flags.limit], predictions)
        for notice in [*notices, *count_notice(flags.answers, len(problems), GSM8K_COUNT)]:
            print(notice, file=sys.stderr)
        if flags.output is not None:
            write_json_lines(flags.output / "results" / "gsm8k.jsonl", rows)
        print(json.dumps(summarize_gsm8k(rows)))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
