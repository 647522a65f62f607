"""Recorded tools: a file of calls and their feedback, as executor `recorded` replays it (docs/tool_runtime.md)."""

import json
from pathlib import Path

from data.json_records import DataError, read_json_lines


def recording_key(name: str, arguments: object) -> str:
    """What makes two calls the same: name and arguments, the order of keys aside."""
    try:
        return json.dumps([name, arguments], sort_keys=True)
    except (ValueError, TypeError, RecursionError):
        return ""


def read_recording(path: Path) -> dict:
    """A file of recorded calls as {(tool set or None, call, dialogue or None): {attempt: (feedback, line)}}.

    One JSON object per line: "name", "arguments", "feedback"; "tool_set" and "dialogue" where it holds for that one
    alone; "attempt" from 0, without it the next of the same call in the file. Other keys are not read.
    Raises DataError with `file:line` for anything else, also for two different feedbacks to the same attempt.
    """
    recording: dict = {}
    rows, _ = read_json_lines(path, drop_partial_last_line=True)
    for line, row in rows:
        where = f"{path}:{line}"
        for key, types, expected in (
            ("name", str, "a tool's name"),
            ("arguments", dict, "a dict of arguments"),
            ("feedback", str, "the feedback as text"),
        ):
            if not isinstance(row.get(key), types):
                raise DataError(f"{where}: found {type(row.get(key)).__name__} as {key!r}, expected {expected}")
        tool_set, dialogue, attempt = row.get("tool_set"), row.get("dialogue"), row.get("attempt")
        if not isinstance(tool_set, str | None):
            raise DataError(f"{where}: found {type(tool_set).__name__} as 'tool_set', expected text, or no such key")
        for key, number in (("dialogue", dialogue), ("attempt", attempt)):
            if number is not None and (type(number) is not int or number < 0):
                raise DataError(
                    f"{where}: found {ascii(number)[:40]} as {key!r}, expected a number from 0, or no such key"
                )
        key = (tool_set, recording_key(row["name"], row["arguments"]), dialogue)
        feedbacks = recording.setdefault(key, {})
        attempt = max(feedbacks, default=-1) + 1 if attempt is None else attempt
        first = feedbacks.setdefault(attempt, (row["feedback"], line))
        if first[0] != row["feedback"]:
            raise DataError(
                f"{where}: found another feedback for attempt {attempt} of the same call, expected that of "
                f"line {first[1]}"
            )
    return recording
