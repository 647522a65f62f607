"""Score predictions on MMLU: file in, file out, no model.

    python -m eval.evaluate_mmlu --answers mmlu --predictions FILE [--output DIR]

The answer is the letter with the largest of four log-probabilities, or the letter that a text begins with. accuracy is
the share of all questions, as in the benchmark's code, not a mean over its 57 subjects; those stand beside it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data.json_records import write_json_lines
from eval.command_line import parse_arguments, run_command
from eval.general_tasks import (
    MMLU_COUNT,
    ChoiceQuestion,
    count_errors,
    count_notice,
    load_mmlu,
    match_choices,
    rate_summary,
    read_letter,
)
from eval.predict.prediction_files import Prediction


def evaluate_mmlu(questions: Sequence[ChoiceQuestion], predictions: Sequence[Prediction]) -> list[dict]:
    """One row per question: index, subject, accuracy (0 or 1), reason ("" if right).

    `predictions` are those of `questions`, in order; an output holds a letter.
    """
    return [_score(question, prediction) for question, prediction in zip(questions, predictions, strict=True)]


def _score(question: ChoiceQuestion, prediction: Prediction) -> dict:
    letter = read_letter(prediction.output)
    if prediction.stop == "prompt_too_long":
        reason = "no output: the prompt does not fit the model's positions, not even without solved questions"
    elif letter is None:
        reason = "no letter: found text that begins with none of A to D"
    else:
        reason = "" if letter == question.answer else f"wrong letter: {letter}, expected {question.answer}"
    return {"index": question.index, "subject": question.subject, "accuracy": int(not reason), "reason": reason}


def summarize_mmlu(rows: Sequence[dict]) -> dict:
    """n and accuracy with its 95 % interval, over all questions and by subject; errors by category."""
    by_subject: dict[str, list[dict]] = {}
    for row in rows:
        by_subject.setdefault(row["subject"], []).append(row)
    return {
        **_rate(rows),
        "errors": count_errors(rows),
        "by_subject": {subject: _rate(group) for subject, group in by_subject.items()},
    }


def _rate(rows: Sequence[dict]) -> dict:
    return {"n": len(rows), **rate_summary("accuracy", sum(row["accuracy"] for row in rows), len(rows))}


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(prog="evaluate_mmlu", description="Score predictions on MMLU.")
    parser.add_argument("--answers", type=Path, required=True, help="folder with the benchmark's test/ and dev/")
    parser.add_argument(
        "--predictions",
        type=Path,
        required=True,
        help='JSONL of {"index": 0, "output": "B"} or {"index": 0, "logprobs": [4 numbers]}',
    )
    parser.add_argument("--output", type=Path, help="folder for results/mmlu.jsonl (default: none written)")
    parser.add_argument("--limit", type=int, help="score only the first N questions (default: all, none may miss)")
    flags = parse_arguments(parser, arguments)
    if flags.limit is not None and flags.limit < 1:
        parser.error(f"--limit: found {flags.limit}, expected at least 1")

    def command() -> None:
        questions, _ = load_mmlu(flags.answers)
        predictions, notices = match_choices(flags.predictions, len(questions), flags.limit)
        rows = evaluate_mmlu(questions[: flags.limit], predictions)
        for notice in [*notices, *count_notice(flags.answers, len(questions), MMLU_COUNT)]:
            print(notice, file=sys.stderr)
        if flags.output is not None:
            write_json_lines(flags.output / "results" / "mmlu.jsonl", rows)
        print(json.dumps(summarize_mmlu(rows)))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
