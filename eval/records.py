"""What every evaluator takes and gives: the record, the settings of a scoring, the scores (eval/benchmarks.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from data.json_records import DataError, read_json_lines, read_json_list
from data.trajectories import Message
from eval.metrics import GoldAnswer

Each = TypeVar("Each")


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a benchmark: what is asked and what is right.

    A record is asked in one of four ways (`asked` of its benchmark), for which it has these fields:
        call      tools, messages                    the next call of a dialogue
        dialogue  tools, messages, tool_set          a whole dialogue, whose calls are executed
        text      text                               the continuation of a text
        choice    instruction, shots, text, letters  the likeliest of some letters after a text
    `gold` or `answer` is what is right. Every other field is empty.
    """

    index: int  # position in the benchmark's file, from 0; predictions refer to it
    id: str  # the benchmark's own name of the record; need not be unique
    tools: list[dict] = field(default_factory=list)  # offered, OpenAI function dicts, in the benchmark's order
    messages: list[Message] = field(default_factory=list)  # the dialogue up to what the model says
    tool_set: str = ""  # whose tools answer: "toolbox", or ToolEyes' path as in "Random/Random"
    instruction: str = ""  # before the shots
    shots: tuple[str, ...] = ()  # solved questions between instruction and text; the last ones may be left out
    text: str = ""  # to be continued
    letters: str = ""  # to choose from: "ABCD"
    gold: tuple[GoldAnswer, ...] = ()  # accepted calls
    answer: str = ""  # the right text: a number, a letter
    meta: dict = field(default_factory=dict)  # whatever else the record says; the loader names the keys


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """How predictions are scored. A benchmark reads what concerns it."""

    limit: int | None  # only so many records, as limited() picks them; None = all
    rules: str  # "official" or "fair"; "" where the benchmark has one rule only
    execute_code: bool  # whether code that a model wrote may run, in the sandbox
    max_turns: int  # outputs that a model had for one dialogue


class Scores(NamedTuple):
    """What an evaluator finds."""

    rows: list[dict]  # one per record, for results/<benchmark>.jsonl
    summary: dict  # n, each metric with percentage and interval, errors by category
    notices: list[str]  # for the user, one line each


def limited_indices(count: int, limit: int | None) -> list[int]:
    """The positions of `limit` (None: all) of `count` records, evenly spread: benchmarks keep their categories apart.

    3 of 10 are 0, 3 and 6.
    """
    n = count if limit is None else min(limit, count)
    return [place * count // n for place in range(n)]


def limited(records: Sequence[Each], limit: int | None) -> list[Each]:
    """Those of `records` that limited_indices names."""
    return [records[index] for index in limited_indices(len(records), limit)]


# ---------------------------------------------------------------------------------------------------------------------
# Reading answer files


def read_list(path: Path) -> list[tuple[int, object]]:
    """(line, item) of a JSON list with at least one item. Raises DataError with `file:line`."""
    return _some(read_json_list(path), path)


def read_lines(path: Path) -> list[tuple[int, dict]]:
    """(line, object) of a file of JSON lines with at least one. Raises DataError with `file:line`."""
    return _some(read_json_lines(path, drop_partial_last_line=False)[0], path)


def _some(rows: list, path: Path) -> list:
    if not rows:
        raise DataError(f"{path}: found no record, expected at least one")
    return rows
