"""Score predictions on the bundled tiny benchmarks: file in, file out, no model.

    python -m eval.evaluate_tiny --answers assets/tiny_data/test_seen.jsonl --predictions FILE [--output DIR]

TS: the name is equal; PI: also the set of argument names; CF: also all values after parsing, types included (3, 3.0 and
"3" differ, so do upper and lower case). An output that is not exactly one call is wrong on all three.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from data.json_records import DataError, field_of
from data.tool_documents import normalize_tools, offered_names
from data.trajectories import Message
from eval.benchmarks import benchmark_of
from eval.evaluator_command_line import evaluator_parser, read_flags, run_evaluator
from eval.metrics import CallScore, GoldAnswer, GoldCall, equal_strict, score_calls
from eval.predict.prediction_files import Prediction, read_matched
from eval.predict.react_output import read_calls
from eval.rates import summarize_results
from eval.records import Record, Scores, ScoreSettings, limited, read_lines

EQUALITY = {"": equal_strict}  # of values, for eval/reports/error_statistics.py


# ---------------------------------------------------------------------------------------------------------------------
# Records


def load_tiny(path: Path) -> list[Record]:
    """Read lines `{"id", "tools", "messages", "gold": [{"calls": [{"name", "arguments"}], "order_free"}], "meta"}`.

    Raises DataError with `file:line`.
    """
    return [_record(row, index, f"{path}:{line}") for index, (line, row) in enumerate(read_lines(path))]


def _record(row: dict, index: int, where: str) -> Record:
    record_id = field_of(row, "id", str, where)
    tools = normalize_tools(field_of(row, "tools", list, where), f"{where}: tools")
    offered = set(offered_names(tools))
    messages = user_messages(row, where)
    gold = tuple(_answer(answer, offered, where) for answer in field_of(row, "gold", list, where))
    if not gold:
        raise DataError(f"{where}: found no gold answer, expected at least one")
    return Record(index=index, id=record_id, tools=tools, messages=messages, gold=gold, meta=row.get("meta", {}))


def user_messages(row: dict, where: str) -> list[Message]:
    """The messages of a line, at least one, all of the user. Raises DataError, prefixed by `where`."""
    messages = [_message(message, where) for message in field_of(row, "messages", list, where)]
    if not messages:
        raise DataError(f"{where}: found no message, expected at least the user's request")
    return messages


def _message(message: object, where: str) -> Message:
    role = field_of(message, "role", str, where)
    if role != "user":
        raise DataError(f"{where}: found a message of role {role!a}, expected user messages only")
    return Message(role="user", content=field_of(message, "content", str, where), call=None)


def _answer(answer: object, offered: set[str], where: str) -> GoldAnswer:
    calls = tuple(_gold_call(call, offered, where) for call in field_of(answer, "calls", list, where))
    if not calls:
        raise DataError(f"{where}: found a gold answer without calls, expected at least one")
    return GoldAnswer(calls=calls, order_free=field_of(answer, "order_free", bool, where))


def _gold_call(call: object, offered: set[str], where: str) -> GoldCall:
    name = field_of(call, "name", str, f"{where}: gold call")
    arguments = field_of(call, "arguments", dict, f"{where}: gold call")
    wildcards = call.get("wildcards", [])
    if name not in offered:
        raise DataError(f"{where}: found gold tool {name!a}, expected one of the record's tools")
    if (
        not isinstance(wildcards, list)
        or not all(key in arguments for key in wildcards if isinstance(key, str))
        or not all(isinstance(key, str) for key in wildcards)
    ):
        raise DataError(f"{where}: found wildcards {wildcards!a}, expected a list of argument names")
    return GoldCall(name=name, arguments=arguments, wildcards=frozenset(wildcards))


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def evaluate_tiny(examples: Sequence[Record], predictions: Sequence[Prediction]) -> list[dict]:
    """One row per record: index, id, TS, PI, CF (0 or 1), reason ("" if correct, else `<error category>: <detail>`).

    `predictions` are those of `examples`, in order.
    """
    return [_score(example, prediction) for example, prediction in zip(examples, predictions, strict=True)]


def _score(example: Record, prediction: Prediction) -> dict:
    predicted = read_calls(prediction)
    if predicted.fault:
        score = CallScore(predicted.fault)
    else:
        score = score_calls(predicted.calls, example.gold, values_equal=equal_strict)
    return {"index": example.index, "id": example.id, **score.as_row()}


def score_tiny(records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
    """Rows, summary and notices for a prediction file. Raises DataError, `file:line`."""
    matched, notices = read_matched(predictions, len(records), settings.limit)
    rows = evaluate_tiny(limited(records, settings.limit), matched)
    return Scores(rows, summarize_results(rows), notices)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = evaluator_parser(
        "evaluate_tiny",
        "Score predictions on a tiny benchmark.",
        answers="test_seen.jsonl or test_unseen.jsonl",
        predictions='JSONL of {"index": 0, "output": "text"}, "format": "plain" where it is not tl',
    )
    flags = read_flags(parser, arguments)
    return run_evaluator(flags, benchmark_of(flags.answers, "tiny"), load_tiny, score_tiny)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
