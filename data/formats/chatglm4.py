"""ChatGLM-4 (Table 8): chat, roles as control tokens; the answer is the tool's name, a line break, `{json}`.

The name of a called tool is written in the line of the role, directly after `<|assistant|>`; other words begin with a
line break. A turn ends with the control token of whoever speaks next.
"""

import re
from collections.abc import Sequence

from data.formats.call_text import (
    check_count,
    checked_call,
    fault,
    json_text,
    skip_end_marks,
    skip_whitespace,
    take_json,
)
from data.formats.prompt_format import (
    Dialogue,
    PromptFormat,
    Segment,
    WrittenTurn,
    call_target,
    control,
    join_context,
    split_system,
)
from data.tool_calls import ToolCall
from data.trajectories import Message

_SYSTEM = (
    "\u4f60\u662f\u4e00\u4e2a\u540d\u4e3a ChatGLM \u7684\u4eba\u5de5\u667a\u80fd\u52a9\u624b\u3002"
    "\u4f60\u662f\u57fa\u4e8e\u667a\u8c31AI\u8bad\u7ec3\u7684\u8bed\u8a00\u6a21\u578b GLM-4 "
    "\u6a21\u578b\u5f00\u53d1\u7684\uff0c\u4f60\u7684\u4efb\u52a1\u662f\u9488\u5bf9\u7528\u6237\u7684\u95ee\u9898"
    "\u548c\u8981\u6c42\u63d0\u4f9b\u9002\u5f53\u7684\u7b54\u590d\u548c\u652f\u6301\u3002"
)  # who it is
_TOOLS = "\n\n# \u53ef\u7528\u5de5\u5177"  # "available tools"
_FORM = (
    "\n\u5728\u8c03\u7528\u4e0a\u8ff0\u51fd\u6570\u65f6\uff0c\u8bf7\u4f7f\u7528 Json "
    "\u683c\u5f0f\u8868\u793a\u8c03\u7528\u7684\u53c2\u6570\u3002"
)  # "write the arguments as JSON"

_STOP_STRINGS = ("<|user|>", "<|observation|>", "<|endoftext|>")
_NAME = re.compile(r"""[^\s"'()\[\]{}=,]+""")


def dialogue_segments(tools: list[dict], messages: Dialogue) -> list[Segment]:
    """Who the model is and the tools, then every message after the control token of its role."""
    system, turns = split_system(messages)
    documents = "".join(f"\n\n## {tool['function']['name']}\n\n{json_text(tool['function'])}{_FORM}" for tool in tools)
    identity = f"{system}\n\n{_SYSTEM}" if system else _SYSTEM
    segments = [control("<|system|>"), Segment(f"\n{identity}{_TOOLS}{documents}")]
    for index, message in turns:
        if message.role == "assistant":
            segments += [control("<|assistant|>"), _target(index, message)]
        else:
            role = "<|user|>" if message.role == "user" else "<|observation|>"
            segments += [control(role), Segment(f"\n{message.content}", index)]
    return join_context(segments)


def _target(index: int, message: Message | WrittenTurn) -> Segment:
    if message.call is not None:
        return call_target(index, _call_pieces(message.call), end="<|observation|>")
    newline = "" if isinstance(message, WrittenTurn) else "\n"  # the model writes its own
    return Segment(f"{newline}{message.content}", index, True, end="<|user|>")


def _call_pieces(call: ToolCall) -> tuple[str, str, str]:
    return "", call.name, f"\n{json_text(call.arguments)}"


def parse_calls(text: str) -> list[ToolCall]:
    """Calls, each with one JSON object after its name; `<|assistant|>` may separate them."""
    calls: list[ToolCall] = []
    position = 0
    while True:
        position = skip_whitespace(text, position)
        name = _NAME.match(text, position)
        if name is None:
            raise fault(text, position, "a tool name")
        arguments, position = take_json(text, name.end())
        calls.append(checked_call(name[0], arguments))
        check_count(len(calls))
        position = skip_end_marks(text, position, _STOP_STRINGS)
        if position == len(text):
            return calls
        if text.startswith("<|assistant|>", position):
            position += len("<|assistant|>")


def render_calls(calls: Sequence[ToolCall]) -> str:
    """The calls, `<|assistant|>` between them."""
    return "<|assistant|>".join("".join(_call_pieces(call)) for call in calls)


FORMAT = PromptFormat(
    name="chatglm4",
    parse_calls=parse_calls,
    render_calls=render_calls,
    dialogue_segments=dialogue_segments,
    stop_strings=_STOP_STRINGS,
    start_tokens=("[gMASK]", "<sop>"),
)
