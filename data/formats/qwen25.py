"""Qwen-2.5 (Table 11): chat, tools in the system turn; text, then any number of calls between `<tool_call>` tags.

<tool_call>
{"name": .., "arguments": {..}}
</tool_call>
"""

from collections.abc import Sequence

from data.formats.call_text import (
    call_of_object,
    check_count,
    fault,
    json_text,
    object_pieces,
    readable_thought,
    skip_end_marks,
    skip_whitespace,
    sorted_keys,
    take_json,
    take_objects,
)
from data.formats.chatml import CHATML_ENDS, chatml_end, chatml_header, chatml_turn
from data.formats.prompt_format import (
    Dialogue,
    PromptFormat,
    Segment,
    WrittenTurn,
    call_target,
    join_context,
    split_system,
)
from data.tool_calls import ToolCall
from data.trajectories import Message

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def dialogue_segments(tools: list[dict], messages: Dialogue) -> list[Segment]:
    """The system turn with the tools, then one turn per message; feedback is a user's turn."""
    system, turns = split_system(messages)
    segments = chatml_turn("system", _system(tools, system))
    for index, message in turns:
        if message.role == "assistant":
            segments += [*chatml_header(), _target(index, message), *chatml_end()]
        elif message.role == "tool":
            segments += chatml_turn("user", f"<tool_response>\n{message.content}\n</tool_response>", index)
        else:
            segments += chatml_turn("user", message.content, index)
    return join_context(segments)


def _system(tools: list[dict], system: str) -> str:
    documents = "".join(f"{json_text(sorted_keys(tool))}\n" for tool in tools)
    return f"""\
{system or "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{documents}</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def _target(index: int, message: Message | WrittenTurn) -> Segment:
    if message.call is None:
        return Segment(message.content, index, True, end="<|im_end|>")
    thought = readable_thought(message, _call_pieces, parse_calls)
    return call_target(index, _call_pieces(message.call, thought), end="<|im_end|>")


def _call_pieces(call: ToolCall, thought: str = "") -> tuple[str, str, str]:
    before, name, after = object_pieces(call, "arguments")
    text = f"{thought}\n" if thought else ""
    return f"{text}{_OPEN}\n{before}", name, f"{after}\n{_CLOSE}"


def parse_calls(text: str) -> list[ToolCall]:
    """The calls between tags; without any tag, bare objects as the paper's Table 14 shows the outputs."""
    calls: list[ToolCall] = []
    position = text.find(_OPEN)
    if position < 0:
        return take_objects(text, 0, ("arguments",), CHATML_ENDS)
    while text.startswith(_OPEN, position):
        value, position = take_json(text, position + len(_OPEN))
        calls.append(call_of_object(value, ("arguments",)))
        check_count(len(calls))
        position = skip_whitespace(text, position)
        if not text.startswith(_CLOSE, position):
            raise fault(text, position, f"{_CLOSE!r} after a call")
        position = skip_end_marks(text, position + len(_CLOSE), CHATML_ENDS)
    if position != len(text):
        raise fault(text, position, "the end of the text after the calls")
    return calls


def render_calls(calls: Sequence[ToolCall]) -> str:
    """The calls, each between its tags."""
    return "\n".join("".join(_call_pieces(call)) for call in calls)


FORMAT = PromptFormat(
    name="qwen25",
    parse_calls=parse_calls,
    render_calls=render_calls,
    dialogue_segments=dialogue_segments,
    stop_strings=CHATML_ENDS,
)
