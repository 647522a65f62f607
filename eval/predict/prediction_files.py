"""Prediction files: one JSON object `{"index": 0, "output": "raw model text"}` per line, `"format"` where not `tl`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.formats.table import DEFAULT_FORMAT, PROMPT_FORMATS
from data.json_records import DataError, read_json_lines, read_json_object
from eval.predict.journals import read_index
from eval.records import limited_indices

DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16"}  # in tables
# Why generation ended, written as "stop" by run_eval.py; files of other origin need not have it.
# "refused": an endpoint answered this request, and only such, with an error; the output is empty.
STOP_REASONS = ("end", "max_new_tokens", "prompt_too_long", "refused")

Each = TypeVar("Each")  # Prediction, or RecordedDialogue of eval/dialogues/journal.py


@dataclass(frozen=True, slots=True)
class Prediction:
    """One model output."""

    index: int  # position of the record in the benchmark, from 0
    output: str  # raw text, not parsed
    format: str  # one of PROMPT_FORMATS
    stop: str  # one of STOP_REASONS, "" where unknown
    line: int  # line in its file, from 1, for messages


def read_predictions(path: Path) -> tuple[list[Prediction], bool]:
    """The predictions in file order, and whether a partial last line of a killed writer was dropped.

    Raises DataError with `file:line` for anything malformed, also a line that is only partial but not the last.
    """
    rows, has_dropped = read_json_lines(path, drop_partial_last_line=True)
    return [prediction_of(row, f"{path}:{line}") for line, row in rows], has_dropped


def prediction_of(row: dict, where: str) -> Prediction:
    """The prediction in a row of the file and line `where` ("file:line"). Raises DataError for anything malformed."""
    index, output = read_index(row, where), row.get("output")
    if not isinstance(output, str):
        raise DataError(f"{where}: found {type(output).__name__} as 'output', expected the raw model text")
    output_format, stop = row.get("format", DEFAULT_FORMAT), row.get("stop", "")
    if output_format not in PROMPT_FORMATS:
        raise DataError(f"{where}: found format {output_format!a}, expected one of {', '.join(PROMPT_FORMATS)}")
    if stop not in ("", *STOP_REASONS):
        raise DataError(f"{where}: found stop {stop!a}, expected one of {', '.join(STOP_REASONS)}")
    return Prediction(index=index, output=output, format=output_format, stop=stop, line=int(where.rpartition(":")[2]))


def read_dtype(path: Path) -> str:
    """The type in which the predictions of a file were computed, from the settings file next to it; "" = unknown."""
    try:
        dtype = read_json_object(path.with_suffix(".settings.json")).get("dtype")
    except DataError:
        return ""
    return dtype if dtype in DTYPE_NAMES else ""


def match_predictions(
    predictions: Sequence[Each], count: int, limit: int | None, *, path: Path, what: str = "predictions"
) -> list[Each]:
    """The predictions of records 0, 1, ... in order: exactly one for each of the benchmark's `count` records.

    With a `limit`, one for each of the records that limited_indices names; those of others are left aside. `what` they
    are, for messages. Raises DataError for a record twice, an index outside the benchmark, or records without one.
    """
    by_index: dict[int, Each] = {}
    for prediction in predictions:
        if not 0 <= prediction.index < count:
            raise DataError(f"{path}:{prediction.line}: found index {prediction.index}, expected 0 to {count - 1}")
        if prediction.index in by_index:
            first = by_index[prediction.index].line
            raise DataError(
                f"{path}:{prediction.line}: found index {prediction.index} again, expected it once "
                f"(first in line {first})"
            )
        by_index[prediction.index] = prediction
    needed = limited_indices(count, limit)
    missing = [index for index in needed if index not in by_index]
    if missing:
        raise DataError(
            f"{path}: found {len(needed) - len(missing)} of {len(needed)} {what}, expected all "
            f"(first missing index {missing[0]})"
        )
    return [by_index[index] for index in needed]


def read_matched(path: Path, count: int, limit: int | None) -> tuple[list[Prediction], list[str]]:
    """The predictions of records 0, 1, ... of a prediction file, and notices worth showing. Raises DataError."""
    predictions, has_dropped = read_predictions(path)
    return match_predictions(predictions, count, limit, path=path), dropped_notice(path, has_dropped)


def dropped_notice(path: Path, has_dropped: bool) -> list[str]:
    """A notice where the partial last line of a killed writer was left out."""
    return [f"{path}: dropped a partial last line"] if has_dropped else []
