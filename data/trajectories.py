"""Files of tool-use dialogues to `Trajectory` objects, whichever of three forms they come in (docs/data_format.md).

    authors' form   {"id", "conversations": [{"role", "content"}]}: tools in the system message, calls "name\\n{json}"
    OpenAI form     {"id", "tools": [...], "messages": [{"role", "content", "tool_calls", "tool_call_id"}]}
    ShareGPT        {"id", "tools": [...], "conversations": [{"from", "value"}]} with function_call and observation

Each may be one JSON list or one object per line; the first record decides and the rest must agree. Whatever is
malformed raises `DataError` as `file:line: where: found ..., expected ...`, also for one record inside a long list.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.json_records import DataError, check_text, decode_value, kind_of, parse_json, read_records
from data.message_forms import (
    WEIGHT_KEYS,
    WEIGHT_WORDS,
    call_parts,
    is_blank,
    is_empty_text,
    is_failed_result,
    is_sharegpt,
    message_weight,
    openai_record,
    refuse_call_in_text,
    refuse_documents_in_text,
    refuse_misplaced,
    result_id,
    role_and_content,
    unread_text_keys,
    with_tool_calls,
    without_padding,
)
from data.tool_calls import ToolCall, ToolCallError, render_tool_call
from data.tool_documents import normalize_tools
from printable import one_line, shown


@dataclass(frozen=True, slots=True)
class Message:
    """One message. An assistant message is a call, plain text (`call` None) or a call that does not parse (`fault`)."""

    role: str  # "user", "assistant" or "tool"; "system" only first, for the system text of OpenAI-form data
    content: str  # as in the file; for a call of the OpenAI form the text next to it
    call: ToolCall | None = None
    fault: str | None = None  # why the call does not parse; such a turn is context only (category `unparsable`)
    thought: str = ""  # the text next to a call, which some prompt formats write before it
    weight: int = 1  # 0: the file asks for no gradient on this turn (`weight`, `train` or `loss`)
    failed: bool = False  # of a tool message: the file says that the call failed (`is_error`)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One dialogue: `tools` as OpenAI function dicts (`required` inside `parameters`), messages in prompt order."""

    id: str
    tools: list[dict]
    messages: list[Message]
    source: str  # "file:line" where the record begins
    left_out: dict[str, int] = field(default_factory=dict)  # what was read and is not used, with counts, for the log


LEFT_OUT_NULLS = "null arguments that no document has or allows"  # a key of `Trajectory.left_out`
_UNPARSABLE = ("error", "mask")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_trajectories(path: str | Path, *, unparsable_calls: str = "error") -> list[Trajectory]:
    """All trajectories of a file, in its order. Records without id get their index.

    `unparsable_calls`: "error" refuses a call that does not parse; "mask" keeps it as context with `fault` set.
    Raises DataError for every malformed thing, naming file and line.
    """
    if unparsable_calls not in _UNPARSABLE:
        raise ValueError(f"unparsable_calls is {unparsable_calls!r}, expected one of {_UNPARSABLE}")
    trajectories: list[Trajectory] = []
    first_seen: dict[str, str] = {}
    form = None
    for index, (line, record) in enumerate(read_records(path)):
        source = f"{path}:{line}"
        form = form or _detect_form(record, source)
        trajectory = _read_record(record, form, source, index, unparsable_calls == "mask")
        if trajectory.id in first_seen:
            raise DataError(
                f"{source}: found id {shown(trajectory.id)} again, expected another than that of "
                f"{first_seen[trajectory.id]}"
            )
        first_seen[trajectory.id] = source
        trajectories.append(trajectory)
    return trajectories


_FORM_NAMES = {"authors": "the authors' form", "openai": "OpenAI form", "sharegpt": "ShareGPT"}


def _detect_form(record: object, source: str) -> str:
    if isinstance(record, dict):
        if record.get("conversations") is not None:
            return "sharegpt" if is_sharegpt(record) else "authors"
        for form, key in (("openai", "messages"), ("authors", "conversations")):
            if key in record:
                return form
    found = f"the keys {shown(sorted(record))}" if isinstance(record, dict) else kind_of(record)
    raise DataError(
        f'{source}: found {found}, expected an object with "conversations" (the authors\' form or ShareGPT) '
        'or "messages" and "tools" (OpenAI form)'
    )


def _read_record(record: object, form: str, source: str, index: int, mask: bool) -> Trajectory:
    key, name = "messages" if form == "openai" else "conversations", _FORM_NAMES[form]
    if not isinstance(record, dict) or key not in record:
        found = kind_of(record) if not isinstance(record, dict) else f"no key {key!r}"
        raise DataError(f"{source}: found {found}, expected an object with {key!r} ({name}) like the first record")
    identity = index if record.get("id") is None else record["id"]
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise DataError(f"{source}: id: found {kind_of(identity)}, expected a string or an integer")
    if not isinstance(record[key], list) or not record[key]:
        found = "an empty list" if record[key] == [] else kind_of(record[key])
        raise DataError(f"{source}: {key}: found {found}, expected a list of messages ({name})")
    for weight_key, value in record.items():
        numbers = [each for each in value if isinstance(each, (int, float))] if isinstance(value, list) else []
        if numbers and WEIGHT_WORDS.search(weight_key) or weight_key in WEIGHT_KEYS and value not in (None, True, 1):
            raise DataError(
                f"{source}: {one_line(weight_key, 80)}: found {shown(value)} at the record, expected it at messages"
            )
    left_out: Counter[str] = Counter()
    if form == "authors":
        tools, messages = _read_authors_messages(record, source, mask, left_out)
    else:
        tools, messages = _read_openai_messages(record, form, source, mask, left_out)
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{source}: {key}: found no assistant message, expected at least one")
    return Trajectory(str(identity), tools, messages, source, dict(left_out))


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def _read_call(
    name: object, arguments: object, tools: list[dict], left_out: Counter[str]
) -> tuple[ToolCall | None, str | None]:
    """(call, None), or (None, reason) if the arguments are not a JSON object or the call cannot be rendered."""
    is_object = isinstance(arguments, dict)
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments, "arguments")
        except DataError as error:
            return None, str(error)
    if not isinstance(arguments, dict):
        return None, f"found {kind_of(arguments)} as arguments, expected a JSON object"
    try:
        render_tool_call(ToolCall(name, arguments))
    except ToolCallError as error:
        return None, str(error)
    functions = [tool["function"] for tool in tools if tool["function"]["name"] == name]
    arguments, n_padded = without_padding(arguments, functions, is_object=is_object)
    if n_padded:
        left_out[LEFT_OUT_NULLS] += n_padded
    return ToolCall(name, arguments), None


def _assistant_message(
    content: str, call: ToolCall | None, fault: str | None, weight: int, where: str, mask: bool
) -> Message:
    if fault and not mask:
        raise DataError(f"{where}: {fault}")
    return Message("assistant", content, call, fault, weight=weight)


# ---------------------------------------------------------------------------------------------------------------------
# Authors' form


def _read_authors_messages(
    record: dict, source: str, mask: bool, left_out: Counter[str]
) -> tuple[list[dict], list[Message]]:
    """Tools and messages of `conversations`; the keys `from` and `value` are taken for `role` and `content`."""
    tools: list[dict] = []
    messages: list[Message] = []
    previous = "the start"
    if not is_blank(record.get("system")):
        left_out["texts under 'system' of a record"] += 1
    for index, entry in enumerate(record["conversations"]):
        where = f"{source}: conversations[{index}]"
        if not isinstance(entry, dict):
            raise DataError(f"{where}: found {kind_of(entry)}, expected a message object")
        role, content = role_and_content(entry)
        _check_order(role, previous, where, {"system", "user", "assistant", "function"})
        if role != "assistant":
            refuse_misplaced(entry, where)
        if role == "system":
            tools = _tools_of_system_message(content, where)
        else:
            check_text(content, where)
            if role == "assistant":
                if "tool_calls" in with_tool_calls(entry, [], where):
                    raise DataError(f"{where}: found a call under a key of its own, expected it as the content")
                _count_unread(entry, left_out)
                call, fault = _authors_call(content, tools, left_out)
                messages.append(_assistant_message(content, call, fault, message_weight(entry, where), where, mask))
            else:
                failed = role == "function" and is_failed_result(entry, where)
                messages.append(Message("tool" if role == "function" else "user", content, failed=failed))
        previous = role
    return tools, messages


def _count_unread(entry: dict, left_out: Counter[str]) -> None:
    for key in unread_text_keys(entry):
        left_out[f"texts under {shown(key)} of an assistant message"] += 1


def _tools_of_system_message(content: object, where: str) -> list[dict]:
    if isinstance(content, str):
        start = len(content) - len(content.lstrip(" \t\r\n"))
        try:
            content, _ = decode_value(content, start, where)  # text after the list is the authors' and not read
        except DataError as error:
            raise DataError(f"{error}: the system message must begin with the JSON list of tools") from None
    return normalize_tools(content, f"{where}: tools")


def _authors_call(content: str, tools: list[dict], left_out: Counter[str]) -> tuple[ToolCall | None, str | None]:
    """(call, None) from "name\\n{json}", the JSON on any number of lines, or (None, what is wrong)."""
    name, newline, arguments = content.partition("\n")
    if not newline:
        return None, f"found {shown(content)}, expected the tool's name, a newline and a JSON object"
    return _read_call(name.strip(), arguments, tools, left_out)


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI form and ShareGPT


def _read_openai_messages(
    record: dict, form: str, source: str, mask: bool, left_out: Counter[str]
) -> tuple[list[dict], list[Message]]:
    """Tools and messages. Parallel calls become consecutive turns, each followed by its own tool message."""
    raw_tools, entries = openai_record(record, form, source)
    tools = normalize_tools(raw_tools, f"{source}: tools")
    messages: list[Message] = []
    calls: list[tuple[object, Message]] = []  # of the latest assistant message, with their ids
    feedback: dict[int, Message] = {}  # tool messages by index into `calls`
    previous = "the start"
    for where, entry in entries:
        role = "system" if entry.get("role") == "developer" else entry.get("role")
        _check_order(role, previous, where, {"system", "user", "assistant", "tool", "function"})
        if role in ("tool", "function"):
            feedback[_answered_call(entry, calls, feedback, where)] = Message(
                "tool", _openai_text(entry, where), failed=is_failed_result(entry, where)
            )
        else:
            _flush_calls(calls, feedback, messages, where)
            calls, feedback = [], {}
            if role == "assistant":
                _count_unread(entry, left_out)
            if role == "assistant" and entry.get("tool_calls"):
                calls = _openai_calls(entry, tools, where, mask, left_out)
            elif role == "assistant":
                messages.append(_text_message(entry, tools, where, mask))
            else:
                messages.append(Message(role, _openai_text(entry, where)))
        previous = role if role != "assistant" or calls else "assistant text"
    _flush_calls(calls, feedback, messages, source)
    if not tools and messages[0].role == "system" and any(message.call for message in messages):
        refuse_documents_in_text(messages[0].content, source)
    return tools, messages


def _flush_calls(calls: list, feedback: dict[int, Message], messages: list[Message], where: str) -> None:
    """Append call, its feedback, next call, ... Either all calls of a message have feedback or none has."""
    for index, (identity, message) in enumerate(calls):
        messages.append(message)
        if index in feedback:
            messages.append(feedback[index])
        elif feedback:
            raise DataError(
                f"{where}: found no tool message for call {index} (id {shown(identity)}), "
                "expected one for each parallel call"
            )


def _text_message(entry: dict, tools: list[dict], where: str, mask: bool) -> Message:
    """An assistant's message without a call. An empty one is refused, or kept as context with `fault` set."""
    weight = message_weight(entry, where)
    text = "" if is_blank(entry.get("content")) else _openai_text(entry, where)
    if is_empty_text(text):
        fault = "found neither text nor tool_calls, expected one of them"
        return _assistant_message(text, None, fault, weight, where, mask)
    refuse_call_in_text(text, tools, where)
    return Message("assistant", text, weight=weight)


def _openai_calls(
    entry: dict, tools: list[dict], where: str, mask: bool, left_out: Counter[str]
) -> list[tuple[object, Message]]:
    """(id, message) of each call. The text next to them belongs to the first."""
    text = "" if is_blank(entry.get("content")) else _openai_text(entry, where)
    weight = message_weight(entry, where)
    result: list[tuple[object, Message]] = []
    for index, tool_call in enumerate(entry["tool_calls"]):
        place = f"{where}: tool_calls[{index}]"
        identity, name, arguments = call_parts(tool_call, place)
        if identity is not None and any(identity == other for other, _ in result):
            raise DataError(f"{place}: found id {shown(identity)} again, expected another per call")
        call, fault = _read_call(name, arguments, tools, left_out)
        content = f"{name}({arguments})" if fault else "" if index else text
        if fault:
            check_text(content, place)
        message = _assistant_message(content, call, fault, weight, place, mask)
        result.append((identity, message if index else replace(message, thought=text)))  # the text is the first's
    return result


def _answered_call(entry: dict, calls: list, feedback: dict[int, Message], where: str) -> int:
    """Index of the call that a tool message answers: by its id; without ids by the tool's name, or in order."""
    identity = result_id(entry)
    ids = [other for other, _ in calls]
    if identity is None or all(other is None for other in ids):
        open_calls = [index for index in range(len(calls)) if index not in feedback]
        if not open_calls:
            raise DataError(f"{where}: found a tool message more than there are calls, expected one per call")
        name = entry.get("name")
        if not isinstance(name, str) or not name or any(calls[index][1].call is None for index in open_calls):
            return open_calls[0]
        named = [index for index in open_calls if calls[index][1].call.name == name]
        if not named:
            raise DataError(f"{where}: found a result of {shown(name)}, expected one of a call that has none yet")
        return named[0]
    if identity not in ids:
        raise DataError(f"{where}: found tool_call_id {shown(identity)}, expected one of {shown(ids)}")
    index = ids.index(identity)
    if index in feedback:
        raise DataError(f"{where}: found tool_call_id {shown(identity)} again, expected one tool message per call")
    return index


def _openai_text(entry: dict, where: str) -> str:
    """`content` as text: a string or a list of text parts."""
    content = entry.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            if kind not in (None, "text", "input_text", "output_text") or not isinstance(part.get("text"), str):
                found = shown(kind if kind is not None else sorted(part))
                raise DataError(f"{where}: content[{index}]: found a part of {found}, expected a text part")
        content = "".join(part["text"] for part in content)
    check_text(content, where)
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Checks

# Who may speak after whom. A call without feedback may precede the user's answer: ask_to_user(question).
_MAY_FOLLOW = {
    "system": ("the start",),
    "user": ("the start", "system", "assistant", "assistant text", "function", "tool"),
    "assistant": ("user", "function", "tool"),
    "function": ("assistant",),
    "tool": ("assistant", "tool"),
}


def _check_order(role: object, previous: str, where: str, roles: set[str]) -> None:
    if not isinstance(role, str) or role not in roles:
        raise DataError(f"{where}: found role {shown(role)}, expected one of {', '.join(sorted(roles))}")
    if previous == "the start" and role != "system" and "tool" not in roles:
        raise DataError(f"{where}: found role {role!r} first, expected 'system' with the JSON list of tools")
    if previous not in _MAY_FOLLOW[role]:
        after = " or ".join(_MAY_FOLLOW[role]).replace("assistant or", "a call or")
        raise DataError(f"{where}: found role {role!r} after {previous}, expected it only after {after}")
