"""Dialogues on disk: the journal while they run, the finished prediction file (docs/multi_turn.md).

    PREDICTIONS/<name>.rank<r>.jsonl  journal of rank r (0 too): a line per turn and one per end, flushed as they come
    PREDICTIONS/<name>.jsonl          finished dialogues, one line each, sorted by index

    turn   {"index": 0, "turn": 1, "output": "..", "calls": [CALL], "fault": ""}
    CALL   {"name": "f", "arguments": {}, "feedback": "..", "executor": "local"}; null and "" for `finish`
    end    {"index": 0, "end": "finish", "error": ""}
    whole  {"index": 0, "turns": [{"output", "calls", "fault"}], "end": "finish", "error": "", "format": "tl"}

A kill leaves at most one partial line per journal, which is dropped; any number of ranks can continue.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data.formats.table import DEFAULT_FORMAT, PROMPT_FORMATS
from data.json_records import DataError, kind_of, read_json_lines, write_json_lines
from eval.predict.journals import Journal, journal_file, journal_files, read_index, read_rows
from printable import shown

END_REASONS = ("finish", "max_turns", "prompt_too_long", "refused")
# Who answered a call: a tool runtime, the fixed reply to ask_to_user, or no one (finish).
EXECUTORS = ("local", "simulated", "recorded", "user", "")


@dataclass(slots=True)
class RecordedDialogue:
    """One dialogue so far."""

    index: int
    turns: list[dict] = field(default_factory=list)  # {"output", "calls", "fault"}
    end: str = ""  # one of END_REASONS, "" while it runs
    error: str = ""  # the endpoint's words where it refused
    format: str = ""  # of the outputs; "" in a journal
    line: int = 0  # its line in the file, for messages


# ---------------------------------------------------------------------------------------------------------------------
# Prediction files


def dialogue_row(dialogue: RecordedDialogue, prompt_format: str) -> dict:
    """The line of a finished dialogue."""
    return {
        "index": dialogue.index,
        "turns": dialogue.turns,
        "end": dialogue.end,
        "error": dialogue.error,
        "format": prompt_format,
    }


def read_dialogues(path: Path) -> tuple[list[RecordedDialogue], bool]:
    """The dialogues of a prediction file, and whether a partial last line was dropped.

    Raises DataError with `file:line` for anything malformed, including a repeated index.
    """
    rows, has_dropped = read_json_lines(path, drop_partial_last_line=True)
    dialogues: dict[int, RecordedDialogue] = {}
    for line, row in rows:
        dialogue = _dialogue(row, line, f"{path}:{line}")
        if dialogue.index in dialogues:
            raise DataError(
                f"{path}:{line}: found index {dialogue.index} again, expected it once (first in line "
                f"{dialogues[dialogue.index].line})"
            )
        dialogues[dialogue.index] = dialogue
    return list(dialogues.values()), has_dropped


def _dialogue(row: dict, line: int, where: str) -> RecordedDialogue:
    turns = row.get("turns")
    if not isinstance(turns, list):
        raise DataError(f"{where}: found {kind_of(turns)} as 'turns', expected a list of turns")
    output_format = row.get("format", DEFAULT_FORMAT)
    if output_format not in PROMPT_FORMATS:
        raise DataError(f"{where}: found format {shown(output_format)}, expected one of {', '.join(PROMPT_FORMATS)}")
    return RecordedDialogue(
        index=read_index(row, where),
        turns=[_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(turns, 1)],
        end=_end(row, where),
        error=_text_of(row, "error", where),
        format=output_format,
        line=line,
    )


def _turn(turn: object, where: str) -> dict:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: found {kind_of(turn)}, expected an object")
    calls = turn.get("calls")
    if not isinstance(turn.get("output"), str):
        raise DataError(f"{where}: found {kind_of(turn.get('output'))} as 'output', expected the raw model text")
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        raise DataError(
            f"{where}: found other 'calls', expected a list of objects with name, arguments, feedback, "
            f"executor ({', '.join(EXECUTORS[:-1])} or empty)"
        )
    fault = _text_of(turn, "fault", where)
    if bool(fault) == bool(calls):
        raise DataError(
            f"{where}: found {len(calls)} calls and the fault {shown(fault)}, expected either calls or a fault"
        )
    return {
        "output": turn["output"],
        "calls": [{key: call.get(key) for key in _CALL_KEYS} for call in calls],
        "fault": fault,
    }


_CALL_KEYS = ("name", "arguments", "feedback", "executor")


def _is_call(call: object) -> bool:
    if (
        not isinstance(call, dict)
        or not isinstance(call.get("name"), str)
        or not isinstance(call.get("arguments"), dict)
        or call.get("executor") not in EXECUTORS
    ):
        return False
    return call.get("feedback") is None if call["executor"] == "" else isinstance(call.get("feedback"), str)


def _end(row: dict, where: str) -> str:
    if row.get("end") not in END_REASONS:
        raise DataError(f"{where}: found end {shown(row.get('end'))}, expected one of {', '.join(END_REASONS)}")
    return row["end"]


def _text_of(row: dict, key: str, where: str) -> str:
    if not isinstance(row.get(key, ""), str):
        raise DataError(f"{where}: found {kind_of(row[key])} as {key!a}, expected text")
    return row.get(key, "")


# ---------------------------------------------------------------------------------------------------------------------
# Journals


def read_journals(path: Path) -> tuple[dict[int, RecordedDialogue], int]:
    """The dialogues of all journals of `path`, by index, and how many partial lines killed writers left.

    Dialogues that the prediction file itself holds are left out: their journals were about to be removed. Raises
    DataError for malformed lines, a turn with two different records and a turn without the one before it.
    """
    finished = {dialogue.index for dialogue in read_dialogues(path)[0]} if path.exists() else set()
    turns: dict[tuple[int, int], dict] = {}
    ends: dict[int, tuple[str, str]] = {}
    rows, n_dropped = read_rows(journal_files(path))
    for where, row in rows:
        index = row["index"]
        if "end" in row:
            end = (_end(row, where), _text_of(row, "error", where))
            is_new = ends.setdefault(index, end) == end
        else:
            number = row.get("turn")
            if type(number) is not int or number < 1:
                raise DataError(f"{where}: found turn {shown(number)}, expected an integer from 1")
            turn = _turn(row, where)
            is_new = turns.setdefault((index, number), turn) == turn
        if not is_new:  # equal ones come from a kill while journals were merged
            raise DataError(f"{where}: found a second, different record of this turn of index {index}")
    return _in_order(path, turns, ends, finished), n_dropped


def _in_order(
    path: Path, turns: dict[tuple[int, int], dict], ends: dict[int, tuple[str, str]], finished: set[int]
) -> dict[int, RecordedDialogue]:
    dialogues = {index: RecordedDialogue(index) for index in sorted({index for index, _ in turns} | set(ends))}
    for index, number in sorted(turns):
        if len(dialogues[index].turns) != number - 1:
            raise DataError(
                f"{path}: found turn {number} of index {index} in its journals, expected turn "
                f"{len(dialogues[index].turns) + 1} before it"
            )
        dialogues[index].turns.append(turns[index, number])
    for index, (end, error) in ends.items():
        dialogues[index].end, dialogues[index].error = end, error
    return {index: dialogue for index, dialogue in dialogues.items() if index not in finished}


def rewrite_journals(path: Path, dialogues: Iterable[RecordedDialogue]) -> None:
    """Write what read_journals returned to the journal of rank 0 and remove the other ranks' journals."""
    rows: list[dict] = []
    for dialogue in dialogues:
        rows += [{"index": dialogue.index, "turn": number, **turn} for number, turn in enumerate(dialogue.turns, 1)]
        rows += [{"index": dialogue.index, "end": dialogue.end, "error": dialogue.error}] if dialogue.end else []
    if rows:
        write_json_lines(journal_file(path, 0), rows)
    for source in journal_files(path):
        if not rows or source != journal_file(path, 0):
            source.unlink()


def close_journals(path: Path, prompt_format: str) -> list[RecordedDialogue]:
    """Add the finished dialogues of the journals to the prediction file, sorted by index; remove the journals.

    Dialogues that have not ended stay in the journal of rank 0. Returns all that the prediction file then holds.
    """
    earlier = read_dialogues(path)[0] if path.exists() else []
    dialogues, _ = read_journals(path)
    ended = [dialogue for dialogue in dialogues.values() if dialogue.end]
    rows = [dialogue_row(dialogue, dialogue.format) for dialogue in earlier]
    rows += [dialogue_row(dialogue, prompt_format) for dialogue in ended]
    write_json_lines(path, sorted(rows, key=lambda row: row["index"]))
    rewrite_journals(path, [dialogue for dialogue in dialogues.values() if not dialogue.end])
    return read_dialogues(path)[0]


class DialogueJournal(Journal):
    """The journal that one rank appends to, and what all ranks had recorded when it was opened.

    State: that of Journal, and the recorded dialogues by index.
    """

    def __init__(self, path: Path, *, rank: int, recorded: dict[int, RecordedDialogue]) -> None:
        super().__init__(journal_file(path, rank))
        self.path = path
        self.recorded = recorded

    def recorded_turn(self, index: int, number: int) -> dict | None:
        """Turn `number` (from 1) of a dialogue, if an earlier process made it."""
        dialogue = self.recorded.get(index)
        return dialogue.turns[number - 1] if dialogue is not None and number <= len(dialogue.turns) else None

    def add_turn(self, index: int, number: int, turn: dict) -> None:
        """Append a turn."""
        self.append({"index": index, "turn": number, **turn})

    def add_end(self, index: int, end: str, error: str = "") -> None:
        """Append how a dialogue ended."""
        self.append({"index": index, "end": end, "error": error})
