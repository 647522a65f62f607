"""The one reader of a model folder's JSON files.

A model folder comes from anywhere. What is read from it is refused unless it is plain JSON: a regular file of bounded
size, UTF-8, one object, no key twice, no NaN or Infinity, no integer of thousands of digits, no bottomless nesting.
"""

import json
from pathlib import Path
from typing import Any

from printable import one_line, shown

MAX_JSON_BYTES = 64 << 20  # the largest published tokenizer.json has about 33 MB


class ModelFolderError(ValueError):
    """A model folder that cannot be used; the message is one line that names the file and what was expected."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ModelFolderError, also when there is no such file."""
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ModelFolderError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except _StrictError as error:
        raise ModelFolderError(f"{path}: {error}") from None
    except RecursionError:
        raise ModelFolderError(f"{path}: found lists or objects nested too deeply, expected fewer levels") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise ModelFolderError(f"{path}: found an integer of too many digits, expected fewer") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def read_text(path: Path) -> str:
    """The UTF-8 text of a regular file of at most MAX_JSON_BYTES. Raises ModelFolderError."""
    try:
        if not path.exists():
            raise ModelFolderError(f"{path}: no such file, expected a model folder in Hugging Face layout")
        if not path.is_file():  # reading a pipe would wait for ever
            raise ModelFolderError(f"{path}: found something else than a file, expected a JSON file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFolderError(f"{path}: found {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelFolderError(f"{path}: found bytes that are not UTF-8 (at {error.start}), expected text") from None
    except OSError as error:
        raise ModelFolderError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None


class _StrictError(ValueError):
    """JSON that Python's decoder would take without a word."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _StrictError(f"found the key {shown(repeated)} twice in one object, expected it once")
    return result


def _refuse_constant(name: str) -> None:
    raise _StrictError(f"found {name}, expected JSON, which has no such number")


# ---------------------------------------------------------------------------------------------------------------------
# Words for error messages


def first_line(error: BaseException) -> str:
    """The first line of an error's message, printable; the error's type if it has none."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0], 120)
