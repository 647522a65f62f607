"""What a model writes for its calls, per prompt format, read into ToolCalls and written again (docs/evaluation.md).

    tl          name(p="v")                                         one call (paper, Table 13)
    plain       name(p: "v").                                       one call (the bundled base model)
    toolllama   Thought: .. \\nAction: name\\nAction Input: {..}      one call
    qwen2       the same; what follows "Observation:" is cut        one call
    nexusraven  Call: name(p='v'); name(q=1)<bot_end>\\nThought: ..  calls parted by ";"
    chatglm4    name\\n{..}                                          calls parted by <|assistant|>
    llama31     {"name": .., "parameters": {..}}                    calls parted by ";" or line breaks
    qwen25      <tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>, any number, text before the first
    openai      {"tool_calls": [{"function": {"name": .., "arguments": "{..}"}}]}, the message of the chat API as JSON
    react       as toolllama, arguments also as a Python dict (ToolEyes' own prompt)     one call

Outputs are hostile: everything is scanned from left to right or handed to the JSON decoder, nothing is evaluated, and
whatever is not exactly a list of calls is a ToolCallError that says what stands where.
"""

import json
import re
from collections.abc import Sequence

from data.formats.plain import parse_plain_call
from data.tool_calls import ToolCall, ToolCallError, parse_tool_call, parse_value, render_tool_call

OUTPUT_FORMATS = ("tl", "plain", "toolllama", "nexusraven", "chatglm4", "qwen2", "llama31", "qwen25", "openai", "react")
# Formats whose output holds exactly one call.
SINGLE_CALL_FORMATS = ("tl", "plain", "toolllama", "qwen2", "react")

# Text that ends a turn: control tokens beside the tokenizer's EOS, and words that the model must not write itself
# (Qwen-2 goes on with an observation of its own making, the base with a whole dialogue). Generation stops there; the
# parser passes over the tokens.
STOP_STRINGS = {
    "tl": (),
    "plain": ("\nOutput:", "\nUser:"),
    "toolllama": ("</s>",),
    "nexusraven": ("<bot_end>",),
    "chatglm4": ("<|user|>", "<|observation|>", "<|endoftext|>"),
    "qwen2": ("<|im_end|>", "<|endoftext|>", "\nObservation:"),
    "llama31": ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    "qwen25": ("<|im_end|>", "<|endoftext|>"),
    "openai": (),
    "react": (),
}
# A megabyte of outputs holds 40,000 calls; to pair as many with the gold calls in any order would take hours.
MAX_CALLS = 64

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_WHITESPACE = re.compile(r"\s*")
_GLM_NAME = re.compile(r"""[^\s"'()\[\]{}=,]+""")
# What decides where a call of NexusRaven ends: strings are skipped, brackets counted, the rest counts outside brackets.
_CALL_MARKS = re.compile(
    r""""[^"\\]*(?:\\[\s\S][^"\\]*)*"|'[^'\\]*(?:\\[\s\S][^'\\]*)*'|"""
    r"[\"'()\[\]{};]|<bot_end>|\nThought:"
)
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def parse_output(output: str, output_format: str) -> list[ToolCall]:
    """All calls of a model's raw output, in its order, at least one and at most MAX_CALLS.

    Raises ToolCallError, one line of ASCII, if the output is anything but calls of this format with JSON values (no
    NaN, no key twice, at most data.tool_calls.MAX_NESTING levels); ValueError for an unknown format.
    """
    if output_format not in OUTPUT_FORMATS:
        raise ValueError(f"found format {output_format!a}, expected one of {', '.join(OUTPUT_FORMATS)}")
    if not isinstance(output, str):
        raise ToolCallError(f"found {type(output).__name__}, expected the text that a model wrote")
    if output_format == "tl":
        return [parse_tool_call(output)]
    if output_format == "plain":
        return [parse_plain_call(output)]
    if output_format in ("toolllama", "qwen2"):
        return [_parse_react(output, output_format)]
    if output_format == "nexusraven":
        return _parse_nexusraven(output)
    if output_format == "chatglm4":
        return _parse_chatglm4(output)
    if output_format == "llama31":
        return _parse_objects(output, output_format, ("parameters", "arguments"))
    if output_format == "qwen25":
        return _parse_qwen25(output)
    if output_format == "react":
        return [_parse_published_react(output)]
    return _parse_openai(output)


# ------------------------------------------------------------------------------------------------------------- formats


def _parse_react(text: str, output_format: str) -> ToolCall:
    """One JSON object behind the name."""
    name, position = _react_name(text)
    arguments, position = _take_json(text, position)
    position = _skip_end_marks(text, position, output_format)
    is_cut = output_format == "qwen2" and text.startswith("Observation:", position)
    if position != len(text) and not is_cut:
        raise _fault(text, position, "the end of the text after the arguments")
    return _checked(name, arguments)


def _react_name(text: str) -> tuple[str, int]:
    """The name between the first "Action Input:" and the nearest "Action:" before it; where the arguments begin."""
    end_of_name = text.find("Action Input:")
    if end_of_name < 0:
        raise _fault(text, 0, "'Action:' and 'Action Input:'")
    start_of_name = text.rfind("Action:", 0, end_of_name)
    if start_of_name < 0:
        raise _fault(text, 0, "'Action:' before 'Action Input:'")
    return text[start_of_name + len("Action:") : end_of_name].strip(), end_of_name + len("Action Input:")


def _parse_published_react(text: str) -> ToolCall:
    """As ToolEyes' own loop reads it: a dict in JSON or Python; `finish` is a call whatever stands behind its name.

    To cut arguments of `finish` the `"}` at the end is added first; if they still are no dict, it has none.
    """
    name, position = _react_name(text)
    source = text[position:]
    is_finish = name.lower() == "finish"
    for attempt in (source, source.rstrip() + '"}') if is_finish else (source,):
        try:
            return _checked(name, parse_value(attempt))
        except ToolCallError as error:
            fault = f"Action Input: {error}"
    if is_finish:
        return _checked(name, {})
    raise ToolCallError(fault)


def _parse_nexusraven(text: str) -> list[ToolCall]:
    start = _WHITESPACE.match(text).end()
    start += len("Call:") if text.startswith("Call:", start) else 0
    end, depth, pieces = len(text), 0, []
    for match in _CALL_MARKS.finditer(text, start):
        mark = match[0]
        if mark in "\"'":  # a string without end; to look for more quotes would take quadratic time
            break
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
        elif depth <= 0 and mark == ";":
            pieces.append(text[start : match.start()])
            _check_count(len(pieces))
            start = match.end()
        elif depth <= 0 and mark in ("<bot_end>", "\nThought:"):
            end = match.start()
            break
    last = text[start:end]
    if last.strip() or not pieces:  # a semicolon may also close the last call
        pieces.append(last)
    _check_count(len(pieces))
    return [parse_tool_call(piece) for piece in pieces]


def _parse_chatglm4(text: str) -> list[ToolCall]:
    calls, position = [], 0
    while True:
        position = _WHITESPACE.match(text, position).end()
        name = _GLM_NAME.match(text, position)
        if name is None:
            raise _fault(text, position, "a tool name")
        arguments, position = _take_json(text, name.end())
        calls.append(_checked(name[0], arguments))
        _check_count(len(calls))
        position = _skip_end_marks(text, position, "chatglm4")
        if position == len(text):
            return calls
        if text.startswith("<|assistant|>", position):
            position += len("<|assistant|>")


def _parse_objects(text: str, output_format: str, keys: tuple[str, ...]) -> list[ToolCall]:
    """JSON objects with "name" and one of `keys`, parted by semicolons or white space."""
    calls, position = [], _WHITESPACE.match(text).end()
    if output_format == "llama31" and text.startswith("<|python_tag|>", position):
        position += len("<|python_tag|>")
    while True:
        value, position = _take_json(text, position)
        calls.append(_call_of_object(value, keys))
        _check_count(len(calls))
        position = _WHITESPACE.match(text, position).end()
        position += 1 if text.startswith(";", position) else 0
        position = _skip_end_marks(text, position, output_format)
        if position == len(text):
            return calls


def _parse_qwen25(text: str) -> list[ToolCall]:
    calls, position = [], text.find(_OPEN)
    if position < 0:  # without the tags, as the paper's Table 14 shows the outputs
        return _parse_objects(text, "qwen25", ("arguments",))
    while text.startswith(_OPEN, position):
        value, position = _take_json(text, position + len(_OPEN))
        calls.append(_call_of_object(value, ("arguments",)))
        _check_count(len(calls))
        position = _WHITESPACE.match(text, position).end()
        if not text.startswith(_CLOSE, position):
            raise _fault(text, position, f"{_CLOSE!r} after a call")
        position = _skip_end_marks(text, position + len(_CLOSE), "qwen25")
    if position != len(text):
        raise _fault(text, position, "the end of the text after the calls")
    return calls


def _parse_openai(text: str) -> list[ToolCall]:
    value = _whole_json(text)
    entries = value.get("tool_calls", value) if isinstance(value, dict) else value
    entries = [entries] if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not entries:
        raise ToolCallError(f"found {_kind(value)}, expected a message with tool_calls")
    _check_count(len(entries))
    calls = []
    for entry in entries:
        function = entry.get("function", entry) if isinstance(entry, dict) else entry
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str) and arguments.strip():
            function = {**function, "arguments": _whole_json(arguments)}
        elif isinstance(function, dict) and arguments in (None, ""):  # so servers write a call without arguments
            function = {**function, "arguments": {}}
        calls.append(_call_of_object(function, ("arguments",)))
    return calls


# --------------------------------------------------------------------------------------------------------------- pieces


def _call_of_object(value: object, keys: tuple[str, ...]) -> ToolCall:
    """The call in `{"name": .., keys[i]: {..}}`; other keys ("type", "id") say nothing about it."""
    found = [key for key in keys if key in value] if isinstance(value, dict) else []
    if not isinstance(value, dict) or "name" not in value or len(found) != 1:
        raise ToolCallError(
            f'found {_kind(value)}, expected an object with "name" and {" or ".join(json.dumps(key) for key in keys)}'
        )
    return _checked(value["name"], value[found[0]])


def _checked(name: object, arguments: object) -> ToolCall:
    """The call, if it can be written down in the grammar of data.tool_calls; else ToolCallError says why not."""
    if not isinstance(name, str):
        raise ToolCallError(f"found {_kind(name)} as tool name, expected a string")
    call = ToolCall(name, arguments)
    render_tool_call(call)
    return call


def _check_count(count: int) -> None:
    if count > MAX_CALLS:
        raise ToolCallError(f"found more than {MAX_CALLS} calls, expected fewer")


def _skip_end_marks(text: str, position: int, output_format: str) -> int:
    """Position behind white space and the control tokens that end a turn of this format."""
    marks = tuple(mark for mark in STOP_STRINGS[output_format] if mark.startswith("<"))
    while True:
        position = _WHITESPACE.match(text, position).end()
        mark = next((mark for mark in marks if text.startswith(mark, position)), "")
        if not mark:
            return position
        position += len(mark)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ToolCallError(f"found key {_shown(key)} again, expected it once")
        result[key] = value
    return result


def _refuse_constant(name: str) -> object:
    raise ToolCallError(f"found {name}, expected a finite number (JSON has neither nan nor inf)")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _take_json(text: str, position: int) -> tuple[object, int]:
    """The JSON value that begins behind the white space at `position`, and the position behind it."""
    position = _WHITESPACE.match(text, position).end()
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _fault(text, error.pos, f"JSON ({error.msg})") from error
    except RecursionError as error:
        raise _fault(text, position, "JSON of fewer levels") from error
    except ToolCallError:
        raise
    except ValueError as error:  # Python refuses to convert integers of more than 4,300 digits
        raise _fault(text, position, "integers of fewer digits") from error


def _whole_json(text: str) -> object:
    value, position = _take_json(text, 0)
    position = _WHITESPACE.match(text, position).end()
    if position != len(text):
        raise _fault(text, position, "the end of the text after the JSON value")
    return value


def _kind(value: object) -> str:
    """A parsed JSON value in a few words; to write it out again could exceed Python's recursion limit."""
    if isinstance(value, dict):
        return f"an object with the keys {_shown(', '.join(list(value)[:4]))}"
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _shown(text: str) -> str:
    """The text as an ASCII literal of bounded length, fit for one line of a terminal."""
    return ascii(text if len(text) <= 40 else text[:40] + "...")


def _fault(text: str, position: int, expected: str) -> ToolCallError:
    found = _shown(text[position : position + 41]) if position < len(text) else "the end of the text"
    return ToolCallError(f"character {position}: found {found}, expected {expected}")


# ----------------------------------------------------------------------------------------------------------- rendering


def render_output(calls: Sequence[ToolCall], output_format: str) -> str:
    """What a model of this format writes for `calls`: parse_output reads the same calls back, types included.

    Used for earlier turns in prompts and for tests. Raises ToolCallError for calls outside the grammar, for no call,
    and for several where the format has one; ValueError for a format that is unknown or never rendered (`plain`).
    """
    if output_format not in OUTPUT_FORMATS or output_format == "plain":
        raise ValueError(f"found format {output_format!a}, expected one of {', '.join(OUTPUT_FORMATS)} but plain")
    texts = [render_tool_call(call) for call in calls]
    if not calls or len(calls) > 1 and output_format in SINGLE_CALL_FORMATS:
        raise ToolCallError(f"found {len(calls)} calls, expected one")
    if output_format == "tl":
        return texts[0]
    if output_format in ("toolllama", "qwen2", "react"):
        return f"Thought: \nAction: {calls[0].name}\nAction Input: {json_text(calls[0].arguments)}"
    if output_format == "nexusraven":
        return f"Call: {'; '.join(texts)}"
    if output_format == "chatglm4":
        return "<|assistant|>".join(f"{call.name}\n{json_text(call.arguments)}" for call in calls)
    if output_format == "llama31":
        return "; ".join(json_text({"name": call.name, "parameters": call.arguments}) for call in calls)
    if output_format == "qwen25":
        objects = (json_text({"name": call.name, "arguments": call.arguments}) for call in calls)
        return "\n".join(f"{_OPEN}\n{text}\n{_CLOSE}" for text in objects)
    return json_text(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [openai_tool_call(call, index) for index, call in enumerate(calls)],
        }
    )


def openai_tool_call(call: ToolCall, index: int) -> dict:
    """One entry of `tool_calls` in the chat API; arguments are JSON inside a string there."""
    return {
        "id": f"call_{index}",
        "type": "function",
        "function": {"name": call.name, "arguments": json_text(call.arguments)},
    }


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON in readable Unicode; lone surrogates are escaped, since no tokenizer can encode them."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
