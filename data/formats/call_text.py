"""What several formats share in reading and writing calls: JSON inside an output, the ReAct form, the thought.

Outputs are hostile: everything is scanned from left to right or handed to the JSON decoder, and nothing is evaluated.
Whatever is not exactly a list of calls is a ToolCallError that says what was found where.
"""

import json
import re
from collections.abc import Callable, Sequence

from data.formats.prompt_format import Segment, WrittenTurn, call_target
from data.json_records import DataError, decode_value, kind_of
from data.tool_calls import ToolCall, ToolCallError, render_tool_call
from data.trajectories import Message
from printable import shown

# A megabyte of outputs holds 40,000 calls; to pair as many with the gold calls in any order would take hours.
MAX_CALLS = 64

_WHITESPACE = re.compile(r"\s*")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def fault(text: str, position: int, expected: str) -> ToolCallError:
    """The error for what is at `position` of `text`, where `expected` should be."""
    found = shown(text[position : position + 41]) if position < len(text) else "the end of the text"
    return ToolCallError(f"character {position}: found {found}, expected {expected}")


def skip_whitespace(text: str, position: int) -> int:
    """The position of the first character from `position` on that is no white space."""
    return _WHITESPACE.match(text, position).end()


def skip_end_marks(text: str, position: int, stop_strings: Sequence[str]) -> int:
    """The position after white space and those control tokens of `stop_strings` that end a turn."""
    marks = tuple(mark for mark in stop_strings if mark.startswith("<"))
    while True:
        position = skip_whitespace(text, position)
        mark = next((mark for mark in marks if text.startswith(mark, position)), "")
        if not mark:
            return position
        position += len(mark)


def take_json(text: str, position: int) -> tuple[object, int]:
    """The JSON value that begins after the white space at `position`, and the position after it."""
    position = skip_whitespace(text, position)
    try:
        return decode_value(text, position, f"character {position}")
    except DataError as error:
        raise ToolCallError(str(error)) from error


def whole_json(text: str) -> object:
    """The one JSON value that `text` is."""
    value, position = take_json(text, 0)
    position = skip_whitespace(text, position)
    if position != len(text):
        raise fault(text, position, "the end of the text after the JSON value")
    return value


def checked_call(name: object, arguments: object) -> ToolCall:
    """The call, if it can be written down in the grammar of data.tool_calls; else ToolCallError says why not."""
    if not isinstance(name, str):
        raise ToolCallError(f"found {_kind(name)} as tool name, expected a string")
    call = ToolCall(name, arguments)
    render_tool_call(call)
    return call


def call_of_object(value: object, keys: Sequence[str]) -> ToolCall:
    """The call in `{"name": .., keys[i]: {..}}`; other keys ("type", "id") say nothing about it."""
    found = [key for key in keys if key in value] if isinstance(value, dict) else []
    if not isinstance(value, dict) or "name" not in value or len(found) != 1:
        raise ToolCallError(
            f'found {_kind(value)}, expected an object with "name" and {" or ".join(json.dumps(key) for key in keys)}'
        )
    return checked_call(value["name"], value[found[0]])


def take_objects(text: str, position: int, keys: Sequence[str], stop_strings: Sequence[str]) -> list[ToolCall]:
    """The calls of the JSON objects from `position` to the end, separated by semicolons or white space."""
    calls: list[ToolCall] = []
    while True:
        value, position = take_json(text, position)
        calls.append(call_of_object(value, keys))
        check_count(len(calls))
        position = skip_whitespace(text, position)
        position += 1 if text.startswith(";", position) else 0
        position = skip_end_marks(text, position, stop_strings)
        if position == len(text):
            return calls


def check_count(count: int) -> None:
    """Raise ToolCallError for more than MAX_CALLS calls."""
    if count > MAX_CALLS:
        raise ToolCallError(f"found more than {MAX_CALLS} calls, expected fewer")


def no_calls(value: object) -> ToolCallError:
    """The error for a JSON value that is no message with calls."""
    return ToolCallError(f"found {_kind(value)}, expected a message with tool_calls")


def _kind(value: object) -> str:
    """A parsed JSON value in a few words; to write it out again could exceed Python's recursion limit."""
    if isinstance(value, dict):
        return f"an object with the keys {shown(', '.join(list(value)[:4]))}"
    return kind_of(value)


# ---------------------------------------------------------------------------------------------------------------------
# ReAct


def take_react_name(text: str) -> tuple[str, int]:
    """The name between the first "Action Input:" and the nearest "Action:" before it; where the arguments begin."""
    end_of_name = text.find("Action Input:")
    if end_of_name < 0:
        raise fault(text, 0, "'Action:' and 'Action Input:'")
    start_of_name = text.rfind("Action:", 0, end_of_name)
    if start_of_name < 0:
        raise fault(text, 0, "'Action:' before 'Action Input:'")
    return text[start_of_name + len("Action:") : end_of_name].strip(), end_of_name + len("Action Input:")


def take_react_call(text: str, stop_strings: Sequence[str]) -> tuple[ToolCall, int]:
    """The call with one JSON object after its name, and the position after it and the end of the turn."""
    name, position = take_react_name(text)
    arguments, position = take_json(text, position)
    return checked_call(name, arguments), skip_end_marks(text, position, stop_strings)


def react_pieces(call: ToolCall, thought: str = "") -> tuple[str, str, str]:
    """A call in the ReAct form: what comes before its name, the name, what comes after it."""
    return f"Thought: {thought}\nAction: ", call.name, f"\nAction Input: {json_text(call.arguments)}"


def react_target(
    index: int,
    message: Message | WrittenTurn,
    parse: Callable[[str], list[ToolCall]],
    *,
    before: str = "",
    end: str = "",
) -> Segment:
    """The target of an assistant's message in a ReAct format, after the characters `before`."""
    if message.call is None:
        return Segment(before + message.content, index, True, end=end)
    heading, name, after = react_pieces(message.call, readable_thought(message, react_pieces, parse))
    return call_target(index, (before + heading, name, after), end)


def render_react(calls: Sequence[ToolCall]) -> str:
    """The one call in the ReAct form, with an empty thought."""
    return "".join(react_pieces(calls[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON in readable Unicode; lone surrogates are escaped, since no tokenizer can encode them."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def object_pieces(call: ToolCall, arguments_key: str) -> tuple[str, str, str]:
    """A call as JSON object: what comes before the characters of its name, the name, what comes after it."""
    return '{"name": "', json_text(call.name)[1:-1], f'", "{arguments_key}": {json_text(call.arguments)}}}'


def sorted_keys(value: object) -> object:
    """Objects with their keys in alphabetical order, as Tables 10 and 11 have them."""
    if isinstance(value, dict):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(item) for item in value] if isinstance(value, list) else value


def readable_thought(
    message: Message | WrittenTurn, write: Callable[[ToolCall, str], tuple[str, str, str]], parse: Callable
) -> str:
    """The text next to a message's call; "" where it holds marks of a call, so that the call could not be read back."""
    if not message.thought:
        return ""
    try:
        calls = parse("".join(write(message.call, message.thought)))
    except ToolCallError:
        return ""
    return message.thought if calls == [message.call] else ""
