"""GPT series (Table 12): messages and tools of the chat API, no text; the answer is the message as JSON.

{"content": "..", "tool_calls": [{"id": .., "type": "function", "function": {"name": .., "arguments": "{..}"}}]}
"""

import json
from collections.abc import Sequence

from data.formats.call_text import call_of_object, check_count, json_text, no_calls, whole_json
from data.formats.prompt_format import Dialogue, PromptFormat, WrittenTurn, split_system
from data.tool_calls import ToolCall
from data.trajectories import Message


def chat_request(tools: list[dict], messages: Dialogue) -> tuple[list[dict], list[dict]]:
    """(messages, tools) of the chat API. Raises PromptError as split_system does."""
    split_system(messages)
    return _messages(messages), tools


def _messages(messages: Dialogue) -> list[dict]:
    """Messages of the chat API. It refuses a call without feedback, so the user's answer to one becomes its feedback.

    Such are the answers to ask_to_user. Several calls of one turn get their feedback in their order.
    """
    result: list[dict] = []
    open_calls: list[str] = []  # ids of the latest turn's calls without an answer
    for index, message in enumerate(messages):
        if message.role == "assistant":
            entry = _turn(message, index)
            open_calls = [call["id"] for call in entry.get("tool_calls", [])]
            result.append(entry)
        elif open_calls and message.role in ("tool", "user"):
            result.append({"role": "tool", "tool_call_id": open_calls.pop(0), "content": message.content})
        else:
            role = "user" if message.role == "tool" else message.role
            result.append({"role": role, "content": message.content})
    return result


def _turn(message: Message | WrittenTurn, index: int) -> dict:
    """An assistant's message; ids follow from its place, since a server may give none, or one twice."""
    if not isinstance(message, WrittenTurn):
        if message.call is None:
            return {"role": "assistant", "content": message.content}
        return {"role": "assistant", "content": None, "tool_calls": [_tool_call(message.call, index)]}
    try:
        value = json.loads(message.content)
    except (ValueError, RecursionError):
        value = None
    text = value.get("content") if isinstance(value, dict) else None
    text = text if isinstance(text, str) and text else None
    if not message.calls:  # calls that cannot be read are sent back as text: the API would refuse them as calls
        has_calls = isinstance(value, dict) and bool(value.get("tool_calls"))
        return {"role": "assistant", "content": message.content if has_calls or text is None else text}
    return {
        "role": "assistant",
        "content": text,
        "tool_calls": [
            {**_tool_call(call, index), "id": f"call_{index}_{number}"} for number, call in enumerate(message.calls)
        ],
    }


def _tool_call(call: ToolCall, index: int) -> dict:
    """One entry of `tool_calls`; arguments are JSON inside a string there."""
    return {
        "id": f"call_{index}",
        "type": "function",
        "function": {"name": call.name, "arguments": json_text(call.arguments)},
    }


def parse_calls(text: str) -> list[ToolCall]:
    """The calls of a message, of its `tool_calls`, or one `{"name", "arguments"}` as in Table 14."""
    value = whole_json(text)
    entries = value.get("tool_calls", value) if isinstance(value, dict) else value
    entries = [entries] if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not entries:
        raise no_calls(value)
    check_count(len(entries))
    calls = []
    for entry in entries:
        function = entry.get("function", entry) if isinstance(entry, dict) else entry
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str) and arguments.strip():
            function = {**function, "arguments": whole_json(arguments)}
        elif isinstance(function, dict) and arguments in (None, ""):  # so servers write a call without arguments
            function = {**function, "arguments": {}}
        calls.append(call_of_object(function, ("arguments",)))
    return calls


def render_calls(calls: Sequence[ToolCall]) -> str:
    """The message of these calls as JSON."""
    entries = [_tool_call(call, index) for index, call in enumerate(calls)]
    return json_text({"role": "assistant", "content": None, "tool_calls": entries})


FORMAT = PromptFormat(
    name="openai", parse_calls=parse_calls, render_calls=render_calls, dialogue_segments=None, chat_request=chat_request
)
