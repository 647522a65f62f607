"""The bundled base model: the prompt of `tl`, but calls of the form `name(p: "v", q: 12).`, which only the base writes.

The base never learned to end a turn: after its call it continues with the next line of the dialogue. So only the first
line of the output is read. Everything else is strict:
    call     = name "(" [ argument { "," argument } ] ")" "."
    argument = parameter ":" ( JSON string in double quotes | JSON number )
with blanks allowed around names, values and punctuation.
"""

import json
import math
import re

from data.formats.prompt_format import PromptFormat
from data.formats.tl import dialogue_segments
from data.tool_calls import ToolCall, ToolCallError

_NAME = re.compile(r"""[^\s"'()\[\]{}=,:]+""")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?![\w.])")
_BLANKS = re.compile(r"[ \t]*")


def parse_plain_call(text: str) -> ToolCall:
    """Parse the first line of `text`, after leading white space, as a call in the plain form.

    Raises ToolCallError saying what was found at which character of that line.
    """
    line = text.strip().split("\n", 1)[0].rstrip()
    name, position = _take(_NAME, line, 0, "a tool name")
    position = _expect("(", line, position)
    arguments: dict[str, object] = {}
    while not line.startswith(")", position):
        if arguments:
            position = _expect(",", line, position)
        parameter, position = _take(_NAME, line, position, "a parameter name")
        if parameter in arguments:
            raise ToolCallError(f"found parameter {parameter!a} twice, expected it once")
        position = _expect(":", line, position)
        arguments[parameter], position = _take_value(line, position)
    position = _expect(".", line, _expect(")", line, position))
    if position != len(line):
        raise ToolCallError(f"found {line[position : position + 20]!a} after the call, expected the end of the line")
    return ToolCall(name=name, arguments=arguments)


def _skip_blanks(line: str, position: int) -> int:
    return _BLANKS.match(line, position).end()


def _take(pattern: re.Pattern[str], line: str, position: int, expected: str) -> tuple[str, int]:
    match = pattern.match(line, position)
    if match is None:
        raise ToolCallError(f"found {line[position : position + 20]!a} at character {position}, expected {expected}")
    return match.group(), _skip_blanks(line, match.end())


def _expect(mark: str, line: str, position: int) -> int:
    if not line.startswith(mark, position):
        raise ToolCallError(f"found {line[position : position + 20]!a} at character {position}, expected {mark!r}")
    return _skip_blanks(line, position + 1)


def _take_value(line: str, position: int) -> tuple[object, int]:
    pattern = _STRING if line.startswith('"', position) else _NUMBER
    source, position = _take(pattern, line, position, "a string in double quotes or a number")
    try:
        value = json.loads(source)
    except ValueError as error:  # an unknown escape, or an integer of more than 4,300 digits
        raise ToolCallError(f"found value {source[:40]!a}, expected JSON: {error}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolCallError(f"found value {source[:40]!a}, expected a finite number")
    return value, position


FORMAT = PromptFormat(
    name="plain",
    parse_calls=lambda text: [parse_plain_call(text)],
    render_calls=None,
    dialogue_segments=dialogue_segments,
    stop_strings=("\nOutput:", "\nUser:"),  # the base never ends a turn and continues with a whole dialogue
    has_one_call=True,
)
