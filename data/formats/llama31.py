"""LLaMA-3.1 (Table 10): chat, tools in the first user turn; the answer is `{"name": .., "parameters": {..}}`.

Several calls are separated by semicolons or line breaks. The date is fixed: a prompt must not change by the day.
"""

from collections.abc import Sequence

from data.formats.call_text import json_text, object_pieces, skip_whitespace, sorted_keys, take_objects
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

_SYSTEM = "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_FORM = """\
Given the following functions, please respond with a JSON for a function call with its proper arguments that best \
answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\
Do not use variables.

"""

_STOP_STRINGS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


def dialogue_segments(tools: list[dict], messages: Dialogue) -> list[Segment]:
    """The date and the system text, then the messages; the first query comes after the form and the tools."""
    system, turns = split_system(messages)
    documents = "".join(f"{json_text(sorted_keys(tool), indent=4)}\n\n" for tool in tools)
    segments = _turn("system", Segment(f"\n\n{_SYSTEM}{system}"))
    for number, (index, message) in enumerate(turns):
        if message.role == "user":
            before = _FORM + documents if number == 0 else ""
            segments += _turn("user", Segment(f"\n\n{before}{message.content}", index))
        elif message.role == "tool":  # the model's own template writes the feedback as a JSON string
            segments += _turn("ipython", Segment(f"\n\n{json_text(message.content)}", index))
        else:
            segments += _turn("assistant", Segment("\n\n", index), _target(index, message))
    return join_context(segments)


def _turn(role: str, *content: Segment) -> list[Segment]:
    header = [control("<|start_header_id|>"), Segment(role), control("<|end_header_id|>")]
    return [*header, *content, control("<|eot_id|>")]


def _target(index: int, message: Message | WrittenTurn) -> Segment:
    if message.call is not None:
        return call_target(index, object_pieces(message.call, "parameters"), end="<|eot_id|>")
    return Segment(message.content, index, True, end="<|eot_id|>")


def parse_calls(text: str) -> list[ToolCall]:
    """JSON objects, `<|python_tag|>` before them or not."""
    position = skip_whitespace(text, 0)
    position += len("<|python_tag|>") if text.startswith("<|python_tag|>", position) else 0
    return take_objects(text, position, ("parameters", "arguments"), _STOP_STRINGS)


def render_calls(calls: Sequence[ToolCall]) -> str:
    """One JSON object per call."""
    return "; ".join("".join(object_pieces(call, "parameters")) for call in calls)


FORMAT = PromptFormat(
    name="llama31",
    parse_calls=parse_calls,
    render_calls=render_calls,
    dialogue_segments=dialogue_segments,
    stop_strings=_STOP_STRINGS,
    start_tokens=("<|begin_of_text|>",),
)
