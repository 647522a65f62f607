"""The call grammar `name(p="value", q=3)`: one parser and one renderer for training data, rewards and evaluators.

    call     = name "(" [argument {"," argument} [","]] ")"     nothing may follow
    argument = parameter "=" value | "**" dict                   the second form is for names that cannot be bare
    value    = string | number | true | false | null (or True | False | None) | list | dict | tuple (read as a list)

A scanner with an explicit stack reads the structure in one pass; `ast.literal_eval` only ever sees one string literal
with escapes. Nothing is evaluated, nothing recurses on the input, and every fault is a `ToolCallError`.
Values are rendered as JSON literals, as the released data preparation writes them.
"""

import ast
import json
import math
import re
from dataclasses import dataclass

from printable import shown

# A value may hold this many lists/dicts inside one another. Deeper values overflow the recursion of json and of ==.
MAX_NESTING = 200

# Name characters: everything except whitespace, control characters, lone surrogates (no tokenizer can encode them) and
# the characters of the grammar itself. ToolAlpaca has `preferred-routes_search_get`, ToolEyes a parameter `code:`.
_NAME_CHARACTER = r"""[^\s\x00-\x1f\x7f\ud800-\udfff()\[\]{}"'=,]"""
_NAME = re.compile(rf"{_NAME_CHARACTER}+")
_PARAMETER = re.compile(rf"(?!\*){_NAME_CHARACTER}+")
_WHITESPACE = re.compile(r"\s*")
_STRING = re.compile(r""""[^"\\]*(?:\\[\s\S][^"\\]*)*"|'[^'\\]*(?:\\[\s\S][^'\\]*)*\'""")
# No leading zeros: 07001 is more likely a postal code without its quotes than the number 7001.
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(\.[0-9]*)?|(\.[0-9]+))([eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[^\W\d]\w*")
_WORD_VALUES = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_CLOSER = {"[": "]", "{": "}", "(": ")"}

# Inside a string: an escape, or a raw character that Python source does not allow there but a model may well write.
_RAW = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_ESCAPE_OR_RAW = re.compile(r"\\(?:[0-7]{1,3}|[\s\S])|[\x00-\x1f\x7f\ud800-\udfff]")
_PYTHON_ESCAPES = frozenset("\\'\"abfnrtvxuUN")
_SURROGATE_PAIR = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


class ToolCallError(ValueError):
    """The text is not exactly one call, or the call cannot be written down; the message says what was found where."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call. `arguments` maps parameter names to JSON values, in the order written.

    `==` is Python's and so takes 1, 1.0 and True for equal.
    """

    name: str
    arguments: dict


# ---------------------------------------------------------------------------------------------------------------------
# Parsing


def parse_tool_call(text: str) -> ToolCall:
    """Read exactly one call. Whitespace around the call and between its parts is free.

    Raises ToolCallError, with the character position, for everything else: text after the call or a second call,
    positional, duplicated or starred arguments (except `**{...}`), duplicated dict keys, names and calls as values,
    prefixed (f, r, b), tripled or adjacent strings, comprehensions, operators, non-finite numbers, integers beyond
    Python's digit limit (4,300) or with leading zeros, more than MAX_NESTING levels.
    """
    if not isinstance(text, str):
        raise ToolCallError(f"found {type(text).__name__}, expected the text of a call")
    position = _skip_whitespace(text, 0)
    match = _NAME.match(text, position)
    if not match:
        raise _fault(text, position, "a tool name")
    name = match[0]
    position = _skip_whitespace(text, match.end())
    if not text.startswith("(", position):
        raise _fault(text, position, f"'(' after the name {shown(name)}")
    arguments, position = _scan_arguments(text, position + 1)
    position = _skip_whitespace(text, position)
    if position != len(text):
        raise _fault(text, position, "the end of the text after the call")
    return ToolCall(name, arguments)


def parse_value(text: str) -> object:
    """Read one JSON value or Python literal of the same shapes (`{'error': None}`), by the rules for values in a call.

    Raises ToolCallError for everything else, also for text after the value.
    """
    value, position = _scan_value(text, 0)
    position = _skip_whitespace(text, position)
    if position != len(text):
        raise _fault(text, position, "the end of the text after the value")
    return value


def _scan_arguments(text: str, position: int) -> tuple[dict, int]:
    """The arguments after the opening bracket, and the position after the closing one."""
    arguments: dict = {}
    while True:
        position = _skip_whitespace(text, position)
        if text.startswith(")", position):
            return arguments, position + 1
        if text.startswith("**", position):
            start = position
            value, position = _scan_value(text, position + 2)
            if not isinstance(value, dict):
                raise ToolCallError(f"character {start}: found ** before {type(value).__name__}, expected a dict")
            new_arguments = value
        else:
            start = position
            match = _PARAMETER.match(text, position)
            equals = _skip_whitespace(text, match.end()) if match else position
            if not match or not text.startswith("=", equals):
                raise _fault(text, position, "parameter=value (positional arguments are not calls by name)")
            value, position = _scan_value(text, equals + 1)
            new_arguments = {match[0]: value}
        for parameter, value in new_arguments.items():
            if parameter in arguments:
                raise ToolCallError(f"character {start}: found parameter {shown(parameter)} again, expected it once")
            arguments[parameter] = value
        position = _skip_whitespace(text, position)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith(")", position):
            raise _fault(text, position, "',' or ')' after a value")


def _scan_value(text: str, position: int) -> tuple[object, int]:
    """One value from `position`, and the position after it. `stack` holds the open brackets and their items so far.

    A frame is [opening bracket, items so far (list, or dict for `{`), pending dict key or None, commas seen].
    """
    stack: list[list] = []
    while True:
        # 1. Expect a value, a dict key or a closing bracket.
        position = _skip_whitespace(text, position)
        character = text[position : position + 1]
        if stack and character == _CLOSER[stack[-1][0]] and stack[-1][2] is None:
            value, position = _close(stack.pop()), position + 1
        elif stack and stack[-1][0] == "{" and stack[-1][2] is None:
            position = _scan_key(text, position, stack[-1])
            continue
        elif character in _CLOSER:
            if len(stack) == MAX_NESTING:
                raise ToolCallError(
                    f"character {position}: found more than {MAX_NESTING} nested brackets, expected fewer"
                )
            stack.append([character, {} if character == "{" else [], None, 0])
            position += 1
            continue
        else:
            value, position = _scan_scalar(text, position)
        # 2. A value is complete: hand it to the bracket around it, which may be complete itself then.
        while stack:
            frame = stack[-1]
            _add_value(frame, value)
            position = _skip_whitespace(text, position)
            character = text[position : position + 1]
            if character == ",":
                frame[3] += 1
                position += 1
                break
            if character != _CLOSER[frame[0]]:
                raise _fault(text, position, f"',' or '{_CLOSER[frame[0]]}'")
            value, position = _close(stack.pop()), position + 1
        else:
            return value, position


def _scan_key(text: str, position: int, frame: list) -> int:
    """Read `"key":` into a dict's frame; the position after the colon. JSON keys are strings, so only they pass."""
    if not text.startswith(('"', "'"), position):
        raise _fault(text, position, "a string as dict key")
    key, end = _scan_scalar(text, position)
    if key in frame[1]:
        raise ToolCallError(f"character {position}: found dict key {shown(key)} again, expected it once")
    frame[2] = [key]
    end = _skip_whitespace(text, end)
    if not text.startswith(":", end):
        raise _fault(text, end, "':' after a dict key")
    return end + 1


def _add_value(frame: list, value: object) -> None:
    if frame[0] == "{":
        frame[1][frame[2][0]] = value
        frame[2] = None
    else:
        frame[1].append(value)


def _close(frame: list) -> object:
    """The finished bracket. `(1, 2)` and `(1,)` are lists to JSON; `(1)` is just 1."""
    opening, items, _, commas = frame
    if opening == "(" and len(items) == 1 and not commas:
        return items[0]
    return items


def _scan_scalar(text: str, position: int) -> tuple[object, int]:
    """One string, number or word value, and the position after it."""
    if match := _STRING.match(text, position):
        if text.startswith(('"', "'"), match.end()):
            raise _fault(text, match.end(), "one string (adjacent and triple-quoted strings are not values)")
        return _string_value(match[0], position), match.end()
    if match := _NUMBER.match(text, position):
        try:
            value = float(match[0]) if any(match.groups()) else int(match[0])
        except ValueError as error:  # Python refuses to convert integers of more than 4,300 digits
            raise _fault(text, position, "an integer of fewer digits") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise _fault(text, position, "a finite number (JSON has no inf)")
        return value, match.end()
    match = _WORD.match(text, position)
    if match and match[0] in _WORD_VALUES:
        return _WORD_VALUES[match[0]], match.end()
    if match and text.startswith(('"', "'"), match.end()):
        raise _fault(text, position, "a string without prefix")
    if text.startswith(('"', "'"), position):
        raise _fault(text, position, "a closing quote to this string")
    raise _fault(text, position, "a value: string, number, true, false, null, list or dict")


def _string_value(literal: str, position: int) -> str:
    """The text of a quoted literal, by Python's escapes plus JSON's `\\/` and surrogate pairs.

    An escape that neither knows keeps its backslash; raw line breaks and control characters are kept.
    """
    if "\\" not in literal:
        return literal[1:-1]
    source = literal[0] + _ESCAPE_OR_RAW.sub(_as_python_escape, literal[1:-1]) + literal[-1]
    try:
        value = ast.literal_eval(source)
    except (SyntaxError, ValueError) as error:  # \x, \u, \U or \N without the digits or name that it needs
        raise ToolCallError(f"character {position}: found a broken \\x, \\u, \\U or \\N escape in a string") from error
    return _SURROGATE_PAIR.sub(_joined_pair, value)


def _as_python_escape(match: re.Match) -> str:
    found = match[0]
    if len(found) == 1:
        return f"\\u{ord(found):04x}"
    if found[1] in "01234567":  # Python warns about octals above 377; written as \u they mean the same
        return f"\\u{int(found[1:], 8):04x}"
    if found[1] in _PYTHON_ESCAPES:
        return found
    if found[1] == "/":
        return "/"
    return "\\\\" + _RAW.sub(lambda raw: f"\\u{ord(raw[0]):04x}", found[1])


def _joined_pair(match: re.Match) -> str:
    return match[0].encode("utf-16", "surrogatepass").decode("utf-16")


def _skip_whitespace(text: str, position: int) -> int:
    return _WHITESPACE.match(text, position).end()


def _fault(text: str, position: int, expected: str) -> ToolCallError:
    found = shown(text[position : position + 41]) if position < len(text) else "the end of the text"
    return ToolCallError(f"character {position}: found {found}, expected {expected}")


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


def render_tool_call(call: ToolCall) -> str:
    """Write a call so that parse_tool_call reads the same call back, types included.

    Values are JSON literals: `name(p="value", q=3, r=true, s=null, t=[1, 2.0])`; a parameter that cannot be bare is
    written `**{"odd key": 1}`. Raises ToolCallError for a name or value outside the grammar: nan and inf, keys that are
    not strings, types that JSON lacks, nesting that is too deep or endless, integers beyond Python's digit limit.
    """
    if not isinstance(call.name, str) or not _NAME.fullmatch(call.name):
        raise ToolCallError(f"found {shown(str(call.name))}, expected a name without whitespace, quotes, brackets, =")
    if not isinstance(call.arguments, dict):
        raise ToolCallError(f"found {type(call.arguments).__name__}, expected a dict of arguments")
    _check_json_value(call.arguments)
    arguments = [
        f"{key}={_json(value)}" if _PARAMETER.fullmatch(key) else f"**{_json({key: value})}"
        for key, value in call.arguments.items()
    ]
    return f"{call.name}({', '.join(arguments)})"


def _check_json_value(root: object) -> None:
    """Raise unless `root` (the arguments) holds JSON values only, none nested deeper than MAX_NESTING."""
    # Depth 0 is the argument dict itself; the parser counts the dict after ** as level 1, hence the - 1.
    pending = [(root, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_NESTING - 1 and isinstance(value, (dict, list)):
            raise ToolCallError(f"found more than {MAX_NESTING - 1} nested lists and dicts, expected fewer")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ToolCallError(f"found a dict key of type {type(key).__name__}, expected a string")
            pending.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, list):
            pending.extend((item, depth + 1) for item in value)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise ToolCallError(f"found {value}, expected a finite number (JSON has neither nan nor inf)")
        elif value is not None and not isinstance(value, (str, int)):
            raise ToolCallError(f"found a value of type {type(value).__name__}, expected a JSON value")


def _json(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError as error:  # an integer of more digits than Python converts
        raise ToolCallError(f"found a value that cannot be written: {error}") from error
    return _LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
