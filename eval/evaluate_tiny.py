"""Score predictions on the bundled tiny benchmarks: file in, file out, no model.

    python -m eval.evaluate_tiny --answers assets/tiny_data/test_seen.jsonl --predictions FILE [--output DIR]

TS: the name is equal; PI: also the set of argument names; CF: also all values after parsing, types included (3, 3.0 and
"3" differ, so do upper and lower case). An output that is not exactly one call is wrong on all three.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data.formats.table import parse_output
from data.json_records import write_json_lines
from data.tool_calls import ToolCallError
from eval.benchmark_data import BENCHMARK_FILES, EvalExample, load_tiny
from eval.command_line import parse_arguments, run_command
from eval.metrics import equal_strict, score_calls
from eval.predict.prediction_files import Prediction, match_predictions, read_predictions
from eval.reports.report import summarize_results


def evaluate_tiny(examples: Sequence[EvalExample], predictions: Sequence[Prediction]) -> list[dict]:
    """One row per record: index, id, TS, PI, CF (0 or 1), reason ("" if correct, else `<error category>: <detail>`).

    `predictions` are those of `examples`, in order.
    """
    return [_score(example, prediction) for example, prediction in zip(examples, predictions, strict=True)]


def _score(example: EvalExample, prediction: Prediction) -> dict:
    row = {"index": example.index, "id": example.id, "TS": 0, "PI": 0, "CF": 0}
    if prediction.stop == "prompt_too_long":
        return {**row, "reason": "no output: the prompt does not fit the model's positions"}
    try:
        calls = parse_output(prediction.output, prediction.format)
    except ToolCallError as error:
        cut = " (output cut at max_new_tokens)" if prediction.stop == "max_new_tokens" else ""
        return {**row, "reason": f"unparsable: {error}{cut}"}
    score = score_calls(calls, example.gold, values_equal=equal_strict)
    return {**row, "TS": int(score.TS), "PI": int(score.PI), "CF": int(score.CF), "reason": score.reason}


def evaluate_tiny_files(answers: Path, predictions: Path, limit: int | None) -> tuple[list[dict], list[str]]:
    """The rows for an answer file and a prediction file, and notices worth showing. Raises DataError, `file:line`."""
    examples = load_tiny(answers)
    found, has_dropped = read_predictions(predictions)
    matched = match_predictions(found, len(examples), limit, path=predictions)
    notices = [f"{predictions}: dropped a partial last line"] if has_dropped else []
    return evaluate_tiny(examples[:limit], matched), notices


def benchmark_of(answers: Path) -> str:
    """The benchmark's name by its file name: `test_seen.jsonl` -> `tiny-seen`; other files keep their stem."""
    return next((name for name, file_name in BENCHMARK_FILES.items() if file_name == answers.name), answers.stem)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(prog="evaluate_tiny", description="Score predictions on a tiny benchmark.")
    parser.add_argument("--answers", type=Path, required=True, help="test_seen.jsonl or test_unseen.jsonl")
    parser.add_argument(
        "--predictions",
        type=Path,
        required=True,
        help='JSONL of {"index": 0, "output": "text"}, "format": "plain" where it is not tl',
    )
    parser.add_argument("--output", type=Path, help="folder for results/<benchmark>.jsonl (default: none written)")
    parser.add_argument("--limit", type=int, help="score only the first N records (default: all, none may miss)")
    flags = parse_arguments(parser, arguments)
    if flags.limit is not None and flags.limit < 1:
        parser.error(f"--limit: found {flags.limit}, expected at least 1")

    def command() -> None:
        rows, notices = evaluate_tiny_files(flags.answers, flags.predictions, flags.limit)
        for notice in notices:
            print(notice, file=sys.stderr)
        if flags.output is not None:
            write_json_lines(flags.output / "results" / f"{benchmark_of(flags.answers)}.jsonl", rows)
        print(json.dumps(summarize_results(rows)))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
