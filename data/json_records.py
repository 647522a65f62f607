"""JSON and JSON lines: the one reader of every data, answer and prediction file; writing whole files and lines.

One file gets one verdict, whoever reads it: UTF-8 with or without a byte order mark, no key twice in an object, no NaN
or Infinity, no integer of thousands of digits, no bottomless nesting. What is malformed raises `DataError` in one line,
`file:line: found ..., expected ...`.
"""

import contextlib
import errno
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self, TextIO

from printable import shown

MAX_UNPACKED_BYTES = 64 << 20  # of a gzip file; HumanEval unpacks to 0.2 MB
MAX_OBJECT_BYTES = 64 << 20  # of a file that is one object; the state of a trainer of 7B has below 1 MB


class DataError(ValueError):
    """The user's data file is not what it should be; the message is one line with file, line, finding, expectation."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_records(path: str | Path) -> Iterator[tuple[int, object]]:
    """(line from 1, value) of the items of a JSON list, or of the lines of a JSONL file; the first character decides.

    One value is in memory at a time, in addition to the text. Raises DataError, also for a file without any value.
    """
    text = _read_text(path)
    start = _skip_blanks(text, 0)
    if start == len(text):
        raise DataError(f"{path}:1: found an empty file, expected a JSON list or one JSON object per line")
    if text[start] == "[":
        return _walk_list(text, start, path, allow_empty=False)
    if text[start] == "{":
        return _walk_lines(text, path)
    line = text.count("\n", 0, start) + 1
    raise DataError(f"{path}:{line}: found {shown(text[start])}, expected '[' of a JSON list or '{{' of a JSON line")


def read_json_list(path: Path) -> list[tuple[int, object]]:
    """(line from 1 on which the item begins, item) of a file that is one JSON list, maybe empty. Raises DataError."""
    text = _read_text(path)
    start = _skip_blanks(text, 0)
    if not text.startswith("[", start):
        raise DataError(f"{path}:1: found {shown(text[start : start + 20])}, expected a JSON list")
    return list(_walk_list(text, start, path, allow_empty=True))


def read_json_lines(path: Path, *, drop_partial_last_line: bool) -> tuple[list[tuple[int, dict]], bool]:
    """(line from 1, object) of every line that is not blank, and whether a partial last line was dropped.

    drop_partial_last_line: leave out a last line that has no line feed and does not parse, as a killed writer leaves
    it, even cut inside a character; False refuses it like any other. Raises DataError, with True also unless it is a
    regular file, as a run writes it.
    """
    rows: list[tuple[int, dict]] = []
    if drop_partial_last_line:
        check_regular_file(path)
    content = _read_bytes(path)
    cut = drop_partial_last_line and _ends_inside_a_character(content)
    text = _decode(content[: content.rfind(b"\n") + 1] if cut else content, path)
    last_line = text.count("\n") + 1
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            value = parse_json(content, f"{path}:{line}")
        except DataError:
            if drop_partial_last_line and line == last_line:
                return rows, True
            raise
        if not isinstance(value, dict):
            raise DataError(f"{path}:{line}: found {kind_of(value)}, expected one JSON object")
        rows.append((line, value))
    return rows, cut


def read_json_object(path: Path) -> dict:
    """The one JSON object of a small file. Raises DataError, also unless it is a regular file, reached by no link."""
    try:
        found = path.lstat()
    except OSError as error:
        raise DataError(f"{path}: found {error.strerror or error}, expected a readable file") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_OBJECT_BYTES:  # reading a pipe would never end
        raise DataError(f"{path}: found no regular file of at most {MAX_OBJECT_BYTES} bytes, expected one JSON object")
    value = parse_json(_read_text(path), str(path))
    if not isinstance(value, dict):
        raise DataError(f"{path}: found {kind_of(value)}, expected one JSON object")
    return value


def check_regular_file(path: Path) -> None:
    """Raise DataError if `path` is there and no regular file, links followed: reading a pipe or a device may not end.

    For the files of a run. Data may come through a pipe, which waits for its writer.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: found no regular file, expected one that a run wrote")


def check_no_device(path: Path) -> None:
    """Raise DataError for a device: its bytes may never end."""
    if path.is_char_device() or path.is_block_device():
        raise DataError(f"{path}: found a device, expected a file")


def parse_json(text: str, where: str) -> object:
    """The one JSON value that `text` is. Raises DataError prefixed by `where`."""
    value, end = decode_value(text, _skip_blanks(text, 0), where)
    after = _skip_blanks(text, end)
    if after != len(text):
        raise DataError(f"{where}: found {shown(text[after : after + 20])}, expected nothing after the JSON value")
    return value


def decode_value(text: str, position: int, where: str) -> tuple[object, int]:
    """The JSON value that begins at `position` of `text`, and the position after it. Raises DataError."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        found = shown(text[error.pos : error.pos + 20]) if error.pos < len(text) else "the end"
        raise DataError(f"{where}: found {found} at column {error.colno}, expected JSON ({error.msg})") from None
    except _StrictError as error:
        raise DataError(f"{where}: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: found lists or objects nested too deeply, expected fewer levels") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise DataError(f"{where}: found an integer of too many digits, expected fewer") from None


def field_of(row: object, name: str, kind: type, where: str) -> object:
    """`row[name]`, which must be of type `kind`. Raises DataError, prefixed by `where`."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}, expected an object with {name!a}")
    if not isinstance(row.get(name), kind):
        found = type(row[name]).__name__ if name in row else "nothing"
        raise DataError(f"{where}: found {found} as {name!a}, expected {kind.__name__}")
    return row[name]


def _read_text(path: str | Path) -> str:
    return _decode(_read_bytes(path), path)


def _read_bytes(path: str | Path) -> bytes:
    """The content of a file, unpacked where its name ends in .gz."""
    check_no_device(Path(path))
    try:
        if not str(path).endswith(".gz"):
            return Path(path).read_bytes()
        with gzip.open(path, "rb") as file:
            content = file.read(MAX_UNPACKED_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: found {error}, expected a readable gzip file") from None
    except OSError as error:
        raise DataError(f"{path}: found {error.strerror or error}, expected a readable file") from None
    if len(content) > MAX_UNPACKED_BYTES:
        raise DataError(f"{path}: found more than {MAX_UNPACKED_BYTES} bytes when unpacked, expected fewer")
    return content


def _decode(content: bytes, path: str | Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: found byte {content[error.start]:#04x}, expected UTF-8 text") from None


def _ends_inside_a_character(content: bytes) -> bool:
    """Whether the content is UTF-8 but for a character that its end has cut."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _walk_list(text: str, start: int, path: str | Path, *, allow_empty: bool) -> Iterator[tuple[int, object]]:
    """Item by item, so that a fault lies in one of them; newlines are counted only once."""
    position, counted, line = start + 1, 0, 1
    wanted = "a record or ']'"
    while True:
        position = _skip_blanks(text, position)
        line, counted = line + text.count("\n", counted, position), position
        character = text[position : position + 1]
        if character == "]" and wanted != "a record":
            break
        if wanted == "',' or ']'":
            if character != ",":
                raise DataError(f"{path}:{line}: found {shown(text[position : position + 20])}, expected {wanted}")
            wanted, position = "a record", position + 1
            continue
        value, position = _decode_item(text, position, path, line)
        yield line, value
        wanted = "',' or ']'"
    if wanted == "a record or ']'" and not allow_empty:
        raise DataError(f"{path}:{line}: found an empty list, expected records")
    after = _skip_blanks(text, position + 1)
    if after != len(text):
        line += text.count("\n", counted, after)
        raise DataError(f"{path}:{line}: found {shown(text[after : after + 20])}, expected nothing after the list")


def _decode_item(text: str, position: int, path: str | Path, line: int) -> tuple[object, int]:
    """decode_value for an item that may span many lines: the message names the line of the fault."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        fault_line = line + text.count("\n", position, error.pos)
        begins = "" if fault_line == line else f" in the record that begins at line {line}"
        found = shown(text[error.pos : error.pos + 20]) if error.pos < len(text) else "the end"
        raise DataError(
            f"{path}:{fault_line}: found {found} at column {error.colno}{begins}, expected JSON ({error.msg})"
        ) from None
    except (ValueError, RecursionError):
        return decode_value(text, position, f"{path}:{line}")  # raises again, with the right words


def _walk_lines(text: str, path: str | Path) -> Iterator[tuple[int, object]]:
    """One value per line. Only "\\n" ends a line: U+2028 and the like may be inside JSON strings."""
    for line, content in enumerate(text.split("\n"), 1):
        position = _skip_blanks(content, 0)
        if position == len(content):
            continue
        value, position = decode_value(content, position, f"{path}:{line}")
        after = _skip_blanks(content, position)
        if after != len(content):
            raise DataError(f"{path}:{line}: found {shown(content[after : after + 20])}, expected one object per line")
        yield line, value


class _StrictError(ValueError):
    """JSON that Python's decoder would take without a word."""


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _StrictError(f"found the key {shown(repeated)} twice in one object, expected it once")
    return result


def _refuse_constant(name: str) -> None:
    raise _StrictError(f"found {name}, expected JSON, which has no such number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BLANKS = re.compile(r"[ \t\r\n]*")


def _skip_blanks(text: str, position: int) -> int:
    return _BLANKS.match(text, position).end()


# ---------------------------------------------------------------------------------------------------------------------
# Words for error messages


def kind_of(value: object) -> str:
    """What a JSON value is, in words: "an object", "a list", "null" ..."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def check_text(content: object, where: str) -> None:
    """Raise DataError unless `content` is text that UTF-8, and so a tokenizer, can hold."""
    if not isinstance(content, str):
        raise DataError(f"{where}: found {kind_of(content)} as text, expected a string")
    if match := _LONE_SURROGATE.search(content):
        raise DataError(f"{where}: found the lone surrogate {match[0]!a}, expected Unicode text")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write one ASCII JSON object per line; the file appears whole or not at all. Makes the folder."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """write_bytes in UTF-8. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write next to `path`, flush to disk, then move it there, so that a kill leaves the old file or the new one.

    Nothing is written through a link: what has the name of the unfinished file is removed first. Raises OSError, which
    names `path`.
    """
    if path.is_dir():  # among them the empty name, "..", "/"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        with open(unfinished, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)  # a full disk has more use for the room
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


class JsonLinesFile:
    """A file that JSON objects are appended to, one per line, each handed to the system at once, on disk at `sync`.

    State: the open file. Opening raises OSError; a link is not followed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # unbuffered: a line that a full disk refused is not tried again when the file is closed
        self._file = open(path, "ab", buffering=0, opener=_open_unlinked)  # noqa: SIM115, closed by close()

    def write(self, row: dict) -> None:
        """Append one line. Raises DataError if the disk is full, or the file no longer where it was opened."""
        rest = memoryview((json.dumps(row) + "\n").encode("ascii"))
        try:
            while rest:  # the last room of a disk takes a part of a line
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise DataError(f"{self.path}: found no way to append ({error.strerror}), expected room") from None
        check_same_file(self._file.fileno(), self.path)

    def sync(self) -> None:
        """Force the lines to disk: called before a checkpoint claims their steps. Raises DataError."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self.path}: found no way to append ({error.strerror}), expected room") from None
        check_same_file(self._file.fileno(), self.path)

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_same_file(descriptor: int, path: Path) -> None:
    """Raise DataError unless the open file is the one at `path`: what goes into a deleted file is lost."""
    try:
        is_there = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        is_there = False
    if not is_there:
        raise DataError(f"{path}: found it deleted or replaced during the run, expected the file that the run opened")


def open_lock(path: Path) -> TextIO:
    """The file of a lock, made if it is not there, its content left alone; a link is not followed. Raises OSError."""
    return open(path, "a", encoding="utf-8", opener=_open_unlinked)


def _open_unlinked(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a pipe fails instead of waiting for a reader; for files it means nothing
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
