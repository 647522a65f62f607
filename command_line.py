"""Settings of a run: a slots dataclass becomes flags, a `--config file.json` and a checked object. Flags win.

Every field carries metadata: help (meaning, unit, source), choices, low, high. Anything wrong is a ConfigError of one
line, `--flag: found ..., expected ...` or `file:line: found ..., expected ...`; scripts end with it and exit code 2.
Small programs with a few flags use argparse through `parse_arguments` and `run_command`, and end in the same way.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from printable import listed, message_line, one_line, shown

Config = TypeVar("Config")
EXIT_BAD_INPUT = 2
EXIT_BY_SIGNAL = 128  # and the signal's number, as shells say it
MAX_CONFIG_BYTES = 1 << 20
MAX_TEXT = 4096  # characters of a text setting; as long as a path may be
MAX_WHOLE_NUMBER = 2**63 - 1  # of any setting; seeds among them
GRACE_SECONDS = 3.0  # from a signal to the end by force
PATIENCE_SECONDS = 1.0  # of a rank above 0 before it writes its error: torchrun may end it first
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text"}
# argparse's words for a wrong value, and ours
_ARGPARSE_WORDS = (
    (re.compile(r"argument (.+?): invalid int value: (.*)", re.DOTALL), r"\1: found \2, expected a whole number"),
    (re.compile(r"argument (.+?): invalid float value: (.*)", re.DOTALL), r"\1: found \2, expected a number"),
    (re.compile(r"argument (.+?): invalid choice: (.*) \(choose from (.*)\)", re.DOTALL), r"\1: found \2, expected \3"),
)


class ConfigError(ValueError):
    """A flag or config key is unknown or has an impossible value. One line: where, found what, expected what."""


class _OneLineParser(argparse.ArgumentParser):
    """argparse prints its usage before an error; we want one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def setting(
    default: object,
    meaning: str,
    *,
    choices: tuple = (),
    low: float | None = None,
    high: float | None = None,
    free: bool = False,
    hidden: bool = False,
) -> Any:
    """A dataclass field with its help line, and the values it may have: one of `choices`, or low <= value <= high.

    free: the field does not change what is learned, so a run may resume with another value. Paths are free, because
    their content counts instead; micro_batch_size is free, because it changes rounding only.
    hidden: error lines do not show the value, since a user may mistake the setting for a password.
    """
    bounds = {"choices": choices, "low": low, "high": high}
    return field(default=default, metadata={"help": meaning, **bounds, "free": free, "hidden": hidden})


def run_identity(config: object, sources: dict[str, object]) -> dict:
    """What makes two runs the same run: every field of `config` that is not free, and `sources`.

    sources: fingerprints of what goes in, e.g. {"data_sha256": ...}.
    """
    return {each.name: getattr(config, each.name) for each in fields(config) if not each.metadata["free"]} | sources


def changed_settings(config: object) -> dict[str, object]:
    """Field -> its default, of every setting that has another value."""
    return {each.name: each.default for each in fields(config) if getattr(config, each.name) != each.default}


def read_config(
    config_class: type[Config], description: str, arguments: Sequence[str] | None = None, *, section: str = ""
) -> Config:
    """Build `config_class` from its defaults, then `--config FILE`, then the flags; every value is checked.

    section: the stage's name in a file for several stages, {"sft": {...}, "ppo": {...}}; a flat file serves any stage.
    Raises ConfigError. `--help` prints one line per field and exits with code 0.
    """
    parser = _make_parser(config_class, description)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].split("=")[0]
        raise ConfigError(f"{one_line(name)}: found an unknown flag, expected one of those in --help")
    by_name = {each.name: each for each in fields(config_class)}
    values, places = {}, {}
    if given.config is not None:
        if expected := _fault_of(given.config):
            raise ConfigError(f"--config: found {shown(given.config)}, expected {expected}")
        values, places = _read_file(Path(given.config), by_name, section)
    for name, text in vars(given).items():
        if name != "config" and text is not None:
            values[name] = _from_text(by_name[name], text)
            places[name] = f"--{name}"
    for name, value in values.items():
        _check(by_name[name], value, places[name])
    config = config_class(**values)
    try:
        config.validate()
    except ValueError as error:
        field_name, _, rest = str(error).partition(":")
        raise ConfigError(f"{places.get(field_name, f'--{field_name}')}:{rest}") from None
    return config


def fail(error: BaseException) -> NoReturn:
    """End the process with one line on stderr and exit code 2, or 130 and 143 for a signal (KeyboardInterrupt).

    Under torchrun rank 0 writes at once. Where it fails too, torchrun ends the other ranks, and one line is enough.
    A rank that is still alive after PATIENCE_SECONDS has an error of its own, such as a file that its node lacks: it
    writes `rank N: ` and that. A signal reaches all ranks alike: the others say nothing.
    """
    is_signal = isinstance(error, KeyboardInterrupt)
    if os.environ.get("RANK", "0") != "0" and not is_signal:
        time.sleep(PATIENCE_SECONDS)
    sys.stderr.write(_last_line(error))
    sys.stderr.flush()
    tell_torchrun(error_line(error))
    raise SystemExit(_code_of(error) if is_signal else EXIT_BAD_INPUT) from None


def _last_line(error: BaseException) -> str:
    """error_line with its line feed, and with the rank if that is not 0; "" for a signal there."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, KeyboardInterrupt):
        return ""
    return f"rank {rank}: " * (rank != "0") + error_line(error) + "\n"


def _code_of(error: KeyboardInterrupt) -> int:
    return EXIT_BY_SIGNAL + (error.args[0] if error.args else signal.SIGINT)


def tell_torchrun(line: str) -> None:
    """Leave an error line where torchrun looks for the cause of a failure; its report then ends with that line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": content}), encoding="utf-8")


def error_line(error: BaseException) -> str:
    """The one line that a program ends with: errors of files in the words of ours, `path: found ..., expected ...`."""
    if isinstance(error, KeyboardInterrupt):
        return (
            f"stopped by {signal.Signals(error.args[0]).name}; {error.args[1]}" if error.args else "stopped by Ctrl-C"
        )
    if isinstance(error, OSError) and error.strerror:
        where = "the file system" if error.filename is None else os.fsdecode(error.filename)
        return message_line(f"{where}: found {error.strerror}, expected a file or folder that can be used")
    return message_line(error)


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """`parser.parse_args(arguments)`; a wrong flag ends the program with one line and exit code 2.

    Wrong is also what no program here takes: see _fault_of.
    """

    def end(message: str) -> NoReturn:
        for pattern, words in _ARGPARSE_WORDS:
            message = pattern.sub(words, message)
        sys.stderr.write(message_line(f"{parser.prog}: {message} (see --help)") + "\n")
        raise SystemExit(EXIT_BAD_INPUT)

    parser.error = end
    parser.allow_abbrev = False  # a misspelt flag is not taken for another one
    flags = parser.parse_args(arguments)
    for name, value in vars(flags).items():
        for each in value if isinstance(value, list) else [value]:
            each = str(each) if isinstance(each, Path) else each
            if expected := _fault_of(each):
                end(f"--{name}: found {shown(each)}, expected {expected}")
    return flags


def run_command(command: Callable[[], None], errors: tuple[type[Exception], ...]) -> int:
    """Run `command`; its exit code: 0, or 2 after one line about one of `errors`, those that the user causes.

    130 after Ctrl-C.
    """
    try:
        command()
    except (*errors, KeyboardInterrupt) as error:
        sys.stderr.write(error_line(error) + "\n")
        return _code_of(error) if isinstance(error, KeyboardInterrupt) else EXIT_BAD_INPUT
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@contextmanager
def polite_stop(what_next: str, clean_up: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While active, the first SIGINT or SIGTERM ends the program with one line and exit code 130 or 143.

    The signal raises KeyboardInterrupt(number, what_next) in the main thread; later signals are ignored. When the
    program has unwound, `clean_up` runs and the line is written. A main thread that cannot hear, because it waits for
    another rank or another thread or multiplies matrices, is ended GRACE_SECONDS after the signal, after `clean_up`.
    what_next: what is kept and how to go on. Code that takes the signals for itself meanwhile takes
    signal.set_wakeup_fd too. Outside the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_over = threading.Event()

    def stop(number: int, _frame: object) -> None:
        for each in _STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number, what_next)

    with ExitStack() as stack:
        stack.callback(is_over.set)
        try:
            read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            stack.callback(os.close, write_end)
            watch = threading.Thread(target=_end_by_force, args=(read_end, is_over, what_next, clean_up), daemon=True)
            watch.start()
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_end, warn_on_full_buffer=False))
            for number in _STOP_SIGNALS:
                stack.callback(signal.signal, number, signal.signal(number, stop))
            yield
        except KeyboardInterrupt as error:
            if error.args:  # of `stop`: the signals stay ignored, and the thread watches the end of the other threads
                stack.pop_all()
                clean_up()
            fail(error)


def _end_by_force(read_end: int, is_over: threading.Event, what_next: str, clean_up: Callable[[], None]) -> None:
    """Wait for the number of a signal, then end the process after GRACE_SECONDS, unless `is_over`."""
    with open(read_end, "rb", buffering=0) as signals:  # open to the end: a second signal writes into it too
        while (number := signals.read(1)) and number[0] not in _STOP_SIGNALS:
            pass
        if not number or is_over.wait(GRACE_SECONDS):
            return
        error = KeyboardInterrupt(number[0], what_next)
        clean_up()
        os.write(2, _last_line(error).encode("ascii"))  # the main thread may hold the lock of sys.stderr
        os._exit(_code_of(error))


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def _make_parser(config_class: type, description: str) -> argparse.ArgumentParser:
    # wide: one line per flag, whatever the terminal (a pager can scroll, grep cannot join)
    parser = _OneLineParser(
        description=description,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=80, width=280),
    )
    parser.add_argument("--config", metavar="FILE", help="JSON object of the fields below; flags win over it")
    for each in fields(config_class):
        choices = each.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else each.type.__name__.upper().replace("STR", "TEXT")
        text = f"{each.metadata['help']} [{_default(each)}]".replace("%", "%%")
        # a switch needs no value: --print_ledger means --print_ledger on
        alone = {"nargs": "?", "const": "on"} if choices == ("on", "off") else {}
        parser.add_argument(f"--{each.name}", metavar=metavar, help=text, **alone)
    return parser


def _default(each: Field) -> object:
    assert each.default is not MISSING, f"{each.name} has no default: every run must work without flags"
    return each.default


def _from_text(each: Field, text: str) -> object:
    """The flag's text as a value of the field's type."""
    try:
        return each.type(text)
    except ValueError:  # also an integer of more than 4,300 digits
        raise ConfigError(f"--{each.name}: found {shown(text)}, expected {_TYPE_NAMES[each.type]}") from None


# ---------------------------------------------------------------------------------------------------------------------
# File


def _read_file(path: Path, by_name: dict[str, Field], section: str) -> tuple[dict, dict[str, str]]:
    """Values of a config file (of one section, if it has any) and the place of each ("file:line")."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device would never end
            raise ConfigError(f"{path}: found no readable file (not a regular file), expected a JSON config")
        if path.exists() and path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: found more than {MAX_CONFIG_BYTES} bytes, expected a JSON config")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: found no readable file ({error.strerror}), expected a JSON config") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}:1: found bytes that are not UTF-8, expected a JSON config") from None
    try:
        values = json.loads(text, object_pairs_hook=lambda pairs: _without_duplicates(pairs, path, text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: found malformed JSON ({error.msg}), expected one object") from None
    except RecursionError:
        raise ConfigError(f"{path}:1: found JSON nested too deeply, expected one flat object") from None
    except ConfigError:
        raise
    except ValueError:  # Python's limit on the digits of an integer
        raise ConfigError(f"{path}:1: found a whole number of too many digits, expected fewer") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: found a JSON {type(values).__name__}, expected an object of settings")
    first_line = 1
    if section and values and all(isinstance(value, dict) for value in values.values()):
        if section not in values:
            raise ConfigError(f"{path}:1: found the sections {listed(list(values))}, expected one named {section}")
        first_line = _line_of(text, section, 1)
        values = values[section]
    places = {name: f"{path}:{_line_of(text, name, first_line)}" for name in values}
    for name, value in values.items():
        if name not in by_name:
            raise ConfigError(
                f"{places[name]}: found unknown key {shown(name)}, expected one of {', '.join(sorted(by_name))}"
            )
        wanted = by_name[name].type
        if wanted is float and type(value) is int and abs(value) < 10**300:
            values[name] = float(value)
        elif type(value) is not wanted:  # exact: True is an int to isinstance
            raise ConfigError(
                f"{places[name]}: {_found(by_name[name], value, places[name])}, expected {_TYPE_NAMES[wanted]}"
            )
    return values, places


def _without_duplicates(pairs: list[tuple[str, object]], path: Path, text: str) -> dict:
    names = [name for name, _ in pairs]
    result = dict(pairs)
    if len(result) < len(names):
        seen: set[str] = set()
        name = next(name for name in names if name in seen or seen.add(name))
        raise ConfigError(
            f"{path}:{_line_of(text, name, 1)}: found key {shown(name)} {names.count(name)} times, expected once"
        )
    return result


def _line_of(text: str, name: str, first_line: int) -> int:
    """Line of the first `"name":` in the file at or after first_line, all counted from 1."""
    start = sum(len(line) for line in text.splitlines(keepends=True)[: first_line - 1])
    found = re.compile(re.escape(json.dumps(name)) + r"\s*:").search(text, start)
    return text.count("\n", 0, found.start()) + 1 if found else 1


# ---------------------------------------------------------------------------------------------------------------------
# Values


def _check(each: Field, value: object, place: str) -> None:
    """Choices and bounds of one field, and what holds for every value."""
    choices, low, high = each.metadata["choices"], each.metadata["low"], each.metadata["high"]
    found = f"{place}: {_found(each, value, place)}"
    if choices and value not in choices:
        raise ConfigError(f"{found}, expected one of {', '.join(choices)}")
    if expected := _fault_of(value):
        raise ConfigError(f"{found}, expected {expected}")
    if low is not None and value < low:
        raise ConfigError(f"{found}, expected at least {low}")
    if high is not None and value > high:
        raise ConfigError(f"{found}, expected at most {high}")


def _found(each: Field, value: object, place: str) -> str:
    """The value found at `place`; a flag that the place names already is not named again."""
    if each.metadata["hidden"]:
        return f"found a value of {each.name} that is not shown"
    return f"found {shown(value)}" if place == f"--{each.name}" else f"found {each.name} = {shown(value)}"


def _fault_of(value: object) -> str:
    """What was expected instead of a value that no setting can have; "" for any other."""
    if isinstance(value, str) and _NOT_TEXT.search(value):
        return "text without control characters and lone surrogates"
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"at most {MAX_TEXT} characters"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if isinstance(value, int) and abs(value) > MAX_WHOLE_NUMBER:
        return f"at most {MAX_WHOLE_NUMBER}" if value > 0 else f"at least {-MAX_WHOLE_NUMBER}"
    return ""
