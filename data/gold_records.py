"""Held-out records: a request, the offered tools and the calls that would be right next, one JSON object per line.

{"id", "tools": [...], "messages": [{"role": "user", "content"} ...], "gold": [{"calls": [{"name", "arguments"}]}]}
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.json_records import DataError, field_of, parse_json, read_json_lines
from data.tool_calls import ToolCall, ToolCallError, render_tool_call
from data.tool_documents import normalize_tools
from data.trajectories import Message


@dataclass(frozen=True, slots=True)
class GoldRecord:
    """One record. gold_calls: its answers of exactly one call without wildcards; any of them is right."""

    id: str  # its place in the file, from 0, where the file gives none
    source: str  # "file:line"
    tools: list[dict]  # OpenAI function dicts
    messages: list[Message]  # of the user, at least one
    gold_calls: tuple[ToolCall, ...]
    unparsable_calls: int  # gold calls left out, because no text equals them


def is_gold_file(path: str | Path) -> bool:
    """Whether the first line that is not blank is an object with "gold". Faults are left to the readers to report."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
        record = parse_json(first, str(path)) if first.lstrip().startswith("{") else None
    except (OSError, UnicodeDecodeError, DataError):
        return False
    return isinstance(record, dict) and "gold" in record


def read_gold_records(path: str | Path, *, unparsable_calls: str) -> Iterator[GoldRecord]:
    """The records in the file's order.

    unparsable_calls: "error" refuses a gold call that cannot be written down, "mask" leaves it out. Raises DataError.
    """
    lines, _ = read_json_lines(Path(path), drop_partial_last_line=False)
    for index, (line, record) in enumerate(lines):
        where = f"{path}:{line}"
        tools = normalize_tools(field_of(record, "tools", list, where), f"{where}: tools")
        messages = [_user_message(message, where) for message in field_of(record, "messages", list, where)]
        if not messages:
            raise DataError(f"{where}: found no message, expected at least the user's request")
        identity = record.get("id", index)
        if isinstance(identity, bool) or not isinstance(identity, (str, int)):
            raise DataError(f"{where}: id: found {type(identity).__name__}, expected a string or an integer")
        gold_calls, n_unparsable = _single_calls(field_of(record, "gold", list, where), unparsable_calls, where)
        yield GoldRecord(str(identity), where, tools, messages, gold_calls, n_unparsable)


def _single_calls(answers: list, unparsable_calls: str, where: str) -> tuple[tuple[ToolCall, ...], int]:
    """The gold calls, and how many more could not be written down ("mask" only)."""
    gold_calls, n_unparsable = [], 0
    for answer in answers:
        calls = field_of(answer, "calls", list, f"{where}: gold")
        if len(calls) != 1 or isinstance(calls[0], dict) and calls[0].get("wildcards"):
            continue
        call, fault = read_gold_call(calls[0], f"{where}: gold")
        if fault is None:
            gold_calls.append(call)
        elif unparsable_calls == "error":
            raise DataError(f"{where}: gold: {fault}")
        else:
            n_unparsable += 1
    return tuple(gold_calls), n_unparsable


def _user_message(message: object, where: str) -> Message:
    role = field_of(message, "role", str, f"{where}: messages")
    if role != "user":
        raise DataError(f"{where}: found a message of role {role!a}, expected user messages only")
    return Message("user", field_of(message, "content", str, f"{where}: messages"))


def read_gold_call(record: object, where: str) -> tuple[ToolCall, str | None]:
    """(call, None) of {"name", "arguments"}; (call, reason) if it cannot be written down, so that no text equals it."""
    call = ToolCall(field_of(record, "name", str, where), field_of(record, "arguments", dict, where))
    try:
        render_tool_call(call)
    except ToolCallError as error:
        return call, str(error)
    return call, None
