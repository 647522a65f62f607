"""NexusRaven-2 (Table 7): text; the answer is `Call: name(p='v'); other(q=1)<bot_end>`, a thought may follow it.

One query with one answer is the model's own form; later turns continue with the same marks, a form of ours. Some copies
of the tokenizer have the marks as tokens, others spell them in characters.
"""

import re
from collections.abc import Sequence

from data.formats.call_text import check_count, skip_whitespace
from data.formats.prompt_format import (
    Dialogue,
    PromptFormat,
    Segment,
    WrittenTurn,
    call_target,
    control,
    join_context,
    split_system,
    strip_written,
)
from data.formats.tl import call_pieces, render_tools
from data.tool_calls import ToolCall, parse_tool_call, render_tool_call
from data.trajectories import Message

_QUOTES = '    """'  # the end of a document
# What decides where a call ends: strings are skipped, brackets counted, the rest counts outside brackets.
_CALL_MARKS = re.compile(
    r""""[^"\\]*(?:\\[\s\S][^"\\]*)*"|'[^'\\]*(?:\\[\s\S][^'\\]*)*'|"""
    r"[\"'()\[\]{};]|<bot_end>|\nThought:"
)


def dialogue_segments(tools: list[dict], messages: Dialogue) -> list[Segment]:
    """The documents, then the messages with a mark after each; the model writes the line break before its words."""
    system, turns = split_system(messages)
    feedback = f"    Returns:\n    string: The feedback from the tool.\n{_QUOTES}"
    documents = "\n\n".join(f"{render_tools([tool]).removesuffix(_QUOTES)}\n{feedback}" for tool in tools)
    segments = [Segment("\n\n".join(text for text in (system, documents) if text))]
    for index, message in turns:
        if message.role == "user":
            segments += [Segment(f"\n\nUser Query: {message.content}", index), control("<human_end>")]
        elif message.role == "tool":
            segments += [Segment(f"\nOutput: {message.content}", index), control("<human_end>")]
        else:
            segments += [_target(index, message), control("<bot_end>")]
    return join_context(segments)


def _target(index: int, message: Message | WrittenTurn) -> Segment:
    if message.call is not None:
        before, name, after = call_pieces(message.call)
        return call_target(index, (f"\nCall: {before}", name, after), end="<bot_end>")
    return Segment(f"\n{strip_written(message).content}", index, True, end="<bot_end>")


def parse_calls(text: str) -> list[ToolCall]:
    """Calls separated by semicolons, "Call:" before them or not, up to the mark or a thought."""
    return [parse_tool_call(piece) for piece in split_calls(text)]


def split_calls(text: str) -> list[str]:
    """The texts of the calls, before anything is known of what they hold. Raises ToolCallError for too many."""
    start = skip_whitespace(text, 0)
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
            check_count(len(pieces))
            start = match.end()
        elif depth <= 0 and mark in ("<bot_end>", "\nThought:"):
            end = match.start()
            break
    last = text[start:end]
    if last.strip() or not pieces:  # a semicolon may also close the last call
        pieces.append(last)
    check_count(len(pieces))
    return pieces


def render_calls(calls: Sequence[ToolCall]) -> str:
    """The calls in the call form, separated by semicolons."""
    return f"Call: {'; '.join(map(render_tool_call, calls))}"


FORMAT = PromptFormat(
    name="nexusraven",
    parse_calls=parse_calls,
    render_calls=render_calls,
    dialogue_segments=dialogue_segments,
    stop_strings=("<bot_end>",),
    may_spell_controls=True,
)
