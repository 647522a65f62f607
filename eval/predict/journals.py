"""Journals: what every rank of a run appends while it predicts, and what a killed run leaves to be taken up again.

    PREDICTIONS/<name>.rank<r>.jsonl   one line per item or turn, flushed as it comes
    PREDICTIONS/<name>.jsonl           the finished file, sorted by index, written by an atomic rename

A kill leaves at most one partial line per journal, which is dropped with a notice; any number of ranks can take up the
rest. Single predictions (generate.py) and dialogues (eval/dialogues/journal.py) both use these functions.
"""

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from data.json_records import DataError, JsonLinesFile, read_json_lines
from printable import shown

SHOWN_INDICES = 20  # of the records named in a notice


def journal_file(path: Path, rank: int) -> Path:
    """The journal of rank `rank` while the prediction file `path` is made."""
    return path.with_name(f"{path.stem}.rank{rank:04d}.jsonl")


def journal_files(path: Path) -> list[Path]:
    """The journals that exist."""
    return sorted(path.parent.glob(f"{path.stem}.rank[0-9]*.jsonl"))


def read_rows(files: Iterable[Path]) -> tuple[list[tuple[str, dict]], int]:
    """("file:line", row) of every line of those files that exist, and how many partial last lines were dropped.

    Raises DataError for anything malformed, also a row without index.
    """
    rows: list[tuple[str, dict]] = []
    n_dropped = 0
    for file in files:
        if file.exists():
            found, was_cut = read_json_lines(file, drop_partial_last_line=True)
            n_dropped += was_cut
            rows += [(f"{file}:{line}", row) for line, row in found]
    for where, row in rows:
        read_index(row, where)
    return rows, n_dropped


def read_index(row: dict, where: str) -> int:
    """The number of a row's record. Raises DataError."""
    index = row.get("index")
    if type(index) is not int:  # bool is an int to isinstance
        raise DataError(f"{where}: found index {shown(index)}, expected the record's number, an integer from 0")
    return index


class Journal:
    """A file that rows are appended to, each handed to the system at once.

    State: the open file, and a lock, since threads of an endpoint append side by side.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = JsonLinesFile(file)
        self._lock = threading.Lock()

    def append(self, row: dict) -> None:
        """Write one line. Raises DataError if the disk is full or the file was deleted."""
        with self._lock:
            self._file.write(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def describe_resume(
    path: Path, *, kept: str, n_dropped: int, too_long: Sequence[int], refused: Sequence[tuple[int, str]], what: str
) -> list[str]:
    """Notices for the user: what an earlier run left, and which items have no answer.

    kept: what was taken over, "" for nothing. too_long: indices. refused: (index, the endpoint's words). what: the
    name of the items and what they count as.
    """
    notices = []
    if kept:
        notices.append(f"{path}: kept {kept} of an earlier run")
    if n_dropped:
        notices.append(f"{path}: dropped {n_dropped} partial line(s) of a killed run")
    if too_long:
        listed = ", ".join(map(str, too_long[:SHOWN_INDICES])) + (", .." if len(too_long) > SHOWN_INDICES else "")
        notices.append(f"{path}: {len(too_long)} {what} because the prompt does not fit the model; index {listed}")
    if refused:
        index, words = refused[0]
        notices.append(f"{path}: {len(refused)} {what} because the endpoint refused; index {index}: {words}")
    return notices
