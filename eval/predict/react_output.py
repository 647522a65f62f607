"""The ReAct form (Thought, Action, Action Input) as RoTBench's own scorer reads it, and prediction files of that form.

Where the scorer looks, position by position (https://github.com/Junjie-Ye/RoTBench, Code/Evaluation/evaluate.py):
    name       from 8 characters after the start of the first "Action:" to the first "Action Input:", less a line feed
    arguments  JSON, from 14 characters after the start of the first "Action Input:" to the end of the text
An absent heading counts as found at position -1. So blanks after a name stay part of it, text after the
JSON spoils the arguments, and a text without "Action:" may still hold a call by accident. All of that is kept: the
counts of `--rules official` are those of that scorer.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from data.formats.table import parse_output
from data.json_records import DataError, read_json_list
from data.tool_calls import ToolCall, ToolCallError
from eval.predict.prediction_files import Prediction, match_predictions, read_matched
from eval.records import limited_indices

REACT = "react"  # format of the predictions of an official file; JSONL files have the formats of output_formats
NAME_OFFSET, ARGUMENTS_OFFSET = len("Action: "), len("Action Input: ")


# ---------------------------------------------------------------------------------------------------------------------
# One text


def parse_react(text: str) -> tuple[str, object]:
    """(name, arguments) of a ReAct text; the arguments may be any JSON value except a string.

    Raises ToolCallError where the scorer stops with an exception (an empty name, JSON nested too deeply, integers
    beyond Python's digit limit) or has no arguments to judge (no JSON, a JSON string).
    """
    behind_name = text.find("Action Input:")
    name = text[text.find("Action:") + NAME_OFFSET : behind_name]
    if not name:
        raise ToolCallError("found no tool name between 'Action:' and 'Action Input:', expected one")
    name = name.removesuffix("\n")
    source = text[behind_name + ARGUMENTS_OFFSET :]
    try:
        arguments = json.loads(source)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ToolCallError(f"found {source[:40]!a} as Action Input, expected JSON ({reason})") from None
    if isinstance(arguments, str):
        raise ToolCallError("found a string as Action Input, expected an object")
    return name, arguments


@dataclass(frozen=True, slots=True)
class PredictedCall:
    """What a prediction calls, or why it calls nothing."""

    name: str
    arguments: object  # a dict, or from a ReAct text any JSON value but a string
    fault: str  # "" or the reason for the results row, beginning with its error category


def read_call(prediction: Prediction) -> PredictedCall:
    """The call of a prediction, of several the first; never raises for what a model wrote."""
    if prediction.stop == "prompt_too_long":
        return PredictedCall("", None, "no output: the prompt does not fit the model's positions")
    try:
        if prediction.format == REACT:
            return PredictedCall(*parse_react(prediction.output), fault="")
        call = parse_output(prediction.output, prediction.format)[0]
    except ToolCallError as error:
        cut = " (output cut at max_new_tokens)" if prediction.stop == "max_new_tokens" else ""
        return PredictedCall("", None, f"unparsable: {error}{cut}")
    return PredictedCall(call.name, call.arguments, fault="")


@dataclass(frozen=True, slots=True)
class PredictedCalls:
    """What a prediction calls, or why it calls nothing."""

    calls: tuple[ToolCall, ...]
    fault: str  # "" or the reason for the results row, beginning with its error category


def read_calls(prediction: Prediction) -> PredictedCalls:
    """All calls of a prediction; never raises for what a model wrote."""
    if prediction.format == REACT or prediction.stop == "prompt_too_long":
        call = read_call(prediction)
        if not call.fault and not isinstance(call.arguments, dict):
            return PredictedCalls((), f"unparsable: found {type(call.arguments).__name__} as arguments")
        return (
            PredictedCalls((), call.fault) if call.fault else PredictedCalls((ToolCall(call.name, call.arguments),), "")
        )
    try:
        return PredictedCalls(tuple(parse_output(prediction.output, prediction.format)), "")
    except ToolCallError as error:
        cut = " (output cut at max_new_tokens)" if prediction.stop == "max_new_tokens" else ""
        return PredictedCalls((), f"unparsable: {error}{cut}")


# ---------------------------------------------------------------------------------------------------------------------
# Prediction files


def read_call_predictions(path: Path, count: int, limit: int | None) -> tuple[list[Prediction], list[str]]:
    """The predictions of `limit` (None: all) of a benchmark's `count` records, in order, and notices to show.

    `path` is JSONL as in prediction_files, or the official file of a ReAct benchmark. Raises DataError, `file:line`.
    """
    if _is_json_list(path):
        predictions = read_react_predictions(path)
        if not limited_indices(count, limit)[-1] < len(predictions) <= count:
            raise DataError(f"{path}: found {len(predictions)} predictions, expected {count}, one per record")
        return match_predictions(predictions, count, limit, path=path), []
    return read_matched(path, count, limit)


def read_react_predictions(path: Path) -> list[Prediction]:
    """The predictions of an official file: a JSON list of `{"conversations": [.., {"value": ".."}]}`, one per answer.

    The last value is the model's text. Raises DataError with `file:line`.
    """
    predictions = []
    for index, (line, record) in enumerate(read_json_list(path)):
        turns = record.get("conversations") if isinstance(record, dict) else None
        text = turns[-1].get("value") if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else None
        if not isinstance(text, str):
            found = type(text).__name__ if text is not None else "no conversations with a last value"
            raise DataError(f"{path}:{line}: found {found}, expected the model's text as last conversations value")
        predictions.append(Prediction(index=index, output=text, format=REACT, stop="", line=line))
    return predictions


def _is_json_list(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError as error:
        raise DataError(f"{path}: found {error.strerror or error}, expected a readable prediction file") from None
