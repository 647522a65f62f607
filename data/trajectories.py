"""Files of tool-use dialogues to `Trajectory` objects, whichever of two forms they come in (docs/data_format.md).

    authors' form   {"id", "conversations": [{"role", "content"}]}: tools in the system message, calls "name\\n{json}"
    OpenAI form     {"id", "tools": [...], "messages": [{"role", "content", "tool_calls", "tool_call_id"}]}

Either may stand in one JSON list or one object per line; the first record decides and the rest must agree. Whatever is
malformed raises `DataError` as `file:line: where: found ..., expected ...`, also for one record inside a long list.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from data.json_records import DataError, check_text, decode_value, kind_of, parse_json, read_records, shown
from data.tool_calls import ToolCall, ToolCallError, render_tool_call
from data.tool_documents import normalize_tools


@dataclass(frozen=True, slots=True)
class Message:
    """One message. An assistant message is a call, plain text (`call` None) or a call that does not parse (`fault`)."""

    role: str  # "user", "assistant" or "tool"; "system" only first, for the system text of OpenAI-form data
    content: str  # as in the file; for a call of the OpenAI form the text beside it
    call: ToolCall | None = None
    fault: str | None = None  # why the call does not parse; such a turn is context only (category `unparsable`)
    thought: str = ""  # the text beside a call, which some prompt formats write before it


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One dialogue: `tools` as OpenAI function dicts (`required` inside `parameters`), messages in prompt order."""

    id: str
    tools: list[dict]
    messages: list[Message]
    source: str  # "file:line" where the record begins


_UNPARSABLE = ("error", "mask")


# ---------------------------------------------------------------------------------------------------------- reading


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


def _detect_form(record: object, source: str) -> str:
    if isinstance(record, dict):
        for form in ("conversations", "messages"):
            if form in record:
                return form
    found = f"the keys {shown(sorted(record))}" if isinstance(record, dict) else kind_of(record)
    raise DataError(
        f'{source}: found {found}, expected an object with "conversations" (the authors\' form) '
        'or "messages" and "tools" (OpenAI form)'
    )


def _read_record(record: object, form: str, source: str, index: int, mask: bool) -> Trajectory:
    name = "the authors' form" if form == "conversations" else "OpenAI form"
    if not isinstance(record, dict) or form not in record:
        found = kind_of(record) if not isinstance(record, dict) else f"no key {form!r}"
        raise DataError(f"{source}: found {found}, expected an object with {form!r} ({name}) like the first record")
    identity = record.get("id", index)
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise DataError(f"{source}: id: found {kind_of(identity)}, expected a string or an integer")
    if not isinstance(record[form], list) or not record[form]:
        found = "an empty list" if record[form] == [] else kind_of(record[form])
        raise DataError(f"{source}: {form}: found {found}, expected a list of messages ({name})")
    read_messages = _read_authors_messages if form == "conversations" else _read_openai_messages
    tools, messages = read_messages(record, source, mask)
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{source}: {form}: found no assistant message, expected at least one")
    return Trajectory(str(identity), tools, messages, source)


# ----------------------------------------------------------------------------------------------------- authors' form


def _read_authors_messages(record: dict, source: str, mask: bool) -> tuple[list[dict], list[Message]]:
    """Tools and messages of `conversations`; the keys `from` and `value` are taken for `role` and `content`."""
    raw = record["conversations"]
    tools: list[dict] = []
    messages: list[Message] = []
    previous = "the start"
    for index, entry in enumerate(raw):
        where = f"{source}: conversations[{index}]"
        if not isinstance(entry, dict):
            raise DataError(f"{where}: found {kind_of(entry)}, expected a message object")
        role = entry.get("role", entry.get("from"))
        content = entry.get("content", entry.get("value"))
        _check_order(role, previous, where, {"system", "user", "assistant", "function"})
        if role == "system":
            tools = _tools_of_system_message(content, where)
        else:
            check_text(content, where)
            if role == "assistant":
                messages.append(_call_message(content, *_authors_call(content), where, mask))
            else:
                messages.append(Message("tool" if role == "function" else "user", content))
        previous = role
    return tools, messages


def _tools_of_system_message(content: object, where: str) -> list[dict]:
    if isinstance(content, str):
        start = len(content) - len(content.lstrip(" \t\r\n"))
        try:
            content, _ = decode_value(content, start, where)  # text after the list is the authors' and not read
        except DataError as error:
            raise DataError(f"{error}: the system message must begin with the JSON list of tools") from None
    return normalize_tools(content, f"{where}: tools")


def _authors_call(content: str) -> tuple[ToolCall | None, str | None]:
    """(call, None) from "name\\n{json}", the JSON on any number of lines, or (None, what is wrong)."""
    name, newline, arguments = content.partition("\n")
    if not newline:
        return None, f"found {shown(content)}, expected the tool's name, a newline and a JSON object"
    return _build_call(name.strip(), arguments)


def _build_call(name: object, arguments: object) -> tuple[ToolCall | None, str | None]:
    """(call, None), or (None, reason) if the arguments are no JSON object or the call cannot be rendered."""
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments, "arguments")
        except DataError as error:
            return None, str(error)
    if not isinstance(arguments, dict):
        return None, f"found {kind_of(arguments)} as arguments, expected a JSON object"
    call = ToolCall(name, arguments)
    try:
        render_tool_call(call)
    except ToolCallError as error:
        return None, str(error)
    return call, None


def _call_message(content: str, call: ToolCall | None, fault: str | None, where: str, mask: bool) -> Message:
    if fault and not mask:
        raise DataError(f"{where}: {fault}")
    return Message("assistant", content, call, fault)


# ------------------------------------------------------------------------------------------------------ OpenAI form


def _read_openai_messages(record: dict, source: str, mask: bool) -> tuple[list[dict], list[Message]]:
    """Tools and messages. Parallel calls become consecutive turns, each followed by its own tool message."""
    tools = normalize_tools([] if record.get("tools") is None else record["tools"], f"{source}: tools")
    messages: list[Message] = []
    calls: list[tuple[object, Message]] = []  # of the latest assistant message, with their ids
    feedback: dict[int, Message] = {}  # tool messages by index into `calls`
    previous = "the start"
    for index, entry in enumerate(record["messages"]):
        where = f"{source}: messages[{index}]"
        if not isinstance(entry, dict):
            raise DataError(f"{where}: found {kind_of(entry)}, expected a message object")
        role = "system" if entry.get("role") == "developer" else entry.get("role")
        _check_order(role, previous, where, {"system", "user", "assistant", "tool"})
        if role == "tool":
            feedback[_answered_call(entry, calls, feedback, where)] = Message("tool", _openai_text(entry, where))
        else:
            _flush_calls(calls, feedback, messages, where)
            calls, feedback = [], {}
            if role == "assistant" and entry.get("tool_calls"):
                calls = _openai_calls(entry, where, mask)
            else:
                messages.append(Message(role, _openai_text(entry, where)))
        previous = role if role != "assistant" or calls else "assistant text"
    _flush_calls(calls, feedback, messages, source)
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


def _openai_calls(entry: dict, where: str, mask: bool) -> list[tuple[object, Message]]:
    tool_calls = entry["tool_calls"]
    if not isinstance(tool_calls, list):
        raise DataError(f"{where}: tool_calls: found {kind_of(tool_calls)}, expected a list")
    text = "" if entry.get("content") is None else _openai_text(entry, where)
    result: list[tuple[object, Message]] = []
    for index, tool_call in enumerate(tool_calls):
        place = f"{where}: tool_calls[{index}]"
        function = tool_call.get("function") if isinstance(tool_call, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise DataError(f'{place}: found {shown(tool_call)}, expected "id" and "function": "name", "arguments"')
        identity = tool_call.get("id")
        if identity is not None and any(identity == other for other, _ in result):
            raise DataError(f"{place}: found id {shown(identity)} again, expected another per call")
        arguments = function.get("arguments")
        call, fault = _build_call(function["name"], {} if arguments in (None, "") else arguments)
        content = f"{function['name']}({arguments})" if fault else text
        if fault:
            check_text(content, place)
        message = _call_message(content, call, fault, place, mask)
        is_spoken = index == 0 and call is not None  # the text belongs to the first of parallel calls
        result.append((identity, replace(message, thought=text) if is_spoken else message))
    return result


def _answered_call(entry: dict, calls: list, feedback: dict[int, Message], where: str) -> int:
    """Index of the call that a tool message answers: by tool_call_id, or in order where ids are absent."""
    identity = entry.get("tool_call_id")
    ids = [other for other, _ in calls]
    if identity is None or all(other is None for other in ids):
        open_calls = [index for index in range(len(calls)) if index not in feedback]
        if not open_calls:
            raise DataError(f"{where}: found a tool message more than there are calls, expected one per call")
        return open_calls[0]
    if identity not in ids:
        raise DataError(f"{where}: found tool_call_id {shown(identity)}, expected one of {shown(ids)}")
    index = ids.index(identity)
    if index in feedback:
        raise DataError(f"{where}: found tool_call_id {shown(identity)} again, expected one tool message per call")
    return index


def _openai_text(entry: dict, where: str) -> str:
    """`content` as text: a string or a list of text parts."""
    content = entry.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if content is None and entry.get("role") == "assistant":
        raise DataError(f"{where}: found neither text nor tool_calls, expected one of them")
    check_text(content, where)
    return content


# ----------------------------------------------------------------------------------------------------------- checks

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
    if previous == "the start" and role != "system" and "function" in roles:
        raise DataError(f"{where}: found role {role!r} first, expected 'system' with the JSON list of tools")
    if previous not in _MAY_FOLLOW[role]:
        after = " or ".join(_MAY_FOLLOW[role]).replace("assistant or", "a call or")
        raise DataError(f"{where}: found role {role!r} after {previous}, expected it only after {after}")
