"""JSONL files and JSON lists: reading with file:line errors, atomic writing."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from data.trajectories import DataError


def read_json_lines(path: Path, *, drop_partial_last_line: bool) -> tuple[list[tuple[int, dict]], bool]:
    """The objects of a JSONL file as (line number from 1, object), and whether a partial last line was dropped.

    Blank lines are skipped. With `drop_partial_last_line`, a last line that has no line feed and is not JSON - what a
    killed writer leaves - is left out instead of being an error. Raises DataError with `file:line`.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: found {error.strerror or error}, expected a readable JSONL file") from None
    lines = raw.split(b"\n")
    rows: list[tuple[int, dict]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError and too long integers too
            if drop_partial_last_line and number == len(lines):
                return rows, True
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise DataError(f"{path}:{number}: found no valid JSON ({reason}), expected one JSON object") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: found {type(row).__name__}, expected one JSON object")
        rows.append((number, row))
    return rows, False


def read_json_list(path: Path) -> list[tuple[int, object]]:
    """The items of a file that is one JSON list, as (line where the item begins, from 1; item).

    Raises DataError with `file:line`.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: found {error.strerror or error}, expected a readable JSON file") from None
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise DataError(f"{path}: found {found}, expected UTF-8") from None
    position, line, counted = _skip_whitespace(text, 0), 1, 0
    if not text.startswith("[", position):
        raise DataError(f"{path}:1: found {text[position : position + 20]!a}, expected a JSON list")
    items: list[tuple[int, object]] = []
    mark = "["
    while True:
        position = _skip_whitespace(text, position + 1)
        line, counted = line + text.count("\n", counted, position), position
        if mark == "[" and text.startswith("]", position):
            break
        try:
            item, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
            line += text.count("\n", counted, getattr(error, "pos", counted))
            raise DataError(f"{path}:{line}: found no valid JSON ({reason}), expected a JSON list") from None
        items.append((line, item))
        position = _skip_whitespace(text, position)
        mark = text[position : position + 1]
        if mark != ",":
            break
    if not text.startswith("]", position) or _skip_whitespace(text, position + 1) != len(text):
        line += text.count("\n", counted, position)
        raise DataError(f"{path}:{line}: found {text[position : position + 20]!a}, expected ',' or the list's end")
    return items


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write one ASCII JSON object per line; the file appears whole or not at all. Makes the folder."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write `text` next to `path`, then move it there, so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _skip_whitespace(text: str, position: int) -> int:
    return _WHITESPACE.match(text, position).end()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_WHITESPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
