"""Messages of the published forms to OpenAI messages, or one line that says what cannot be read.

    legacy OpenAI   `function_call` on the assistant's message, results of role `function`, tools under `functions`
    ShareGPT        {"conversations": [{"from": "human" | "gpt" | "function_call" | "observation", "value"}]}
    Anthropic       content blocks `tool_use` and `tool_result`

A call under a key that is not known, or written into the assistant's text, is refused: read as text it would be trained
without its documents, its error filter and its key tokens. Null counts as absent (columnar storage pads with it).
"""

import json
import re
import unicodedata
from collections.abc import Iterator

from data.json_records import DataError, kind_of, parse_json
from data.tool_documents import accepts_any_parameter, is_padding, tool_parameters
from printable import shown

# What ShareGPT's roles mean; "call" is an assistant's message that is the JSON of one call or of a list of calls.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_SHAREGPT_ONLY = _SHAREGPT_ROLES.keys() - {"system", "user", "assistant", "tool", "function"}
_TOOL_KEYS = ("tools", "functions")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
_RESULT_ID_KEYS = ("tool_call_id", "toolCallId", "tool_use_id", "toolUseId", "call_id")
WEIGHT_KEYS = ("weight", "train", "loss")
_READ_KEYS = ("role", "from", "content", "value", "name", "id", "type", "tool_calls", "function_call", *WEIGHT_KEYS)
_CALL_WORDS = re.compile(r"call|tool|function|action", re.IGNORECASE)
_CALL_IN_TEXT = re.compile(
    r"<tool_call>|<function_?calls?>|<function=|<invoke |\[TOOL_CALLS\]|<\|python_tag\|>|<\|tool_calls?[a-z_]*\|>"
    r"|<\uff5ctool\u2581calls?\u2581begin\uff5c>|<\|channel\|>\w* to=|```tool_code\b|^[ \t]*Action Input[ \t]*:",
    re.MULTILINE,
)
# A last line that is a call may begin with one of these; ``` may be around it.
_BEFORE_CALL = re.compile(r"(?:(?:API-Request|Action|Call|Function call|Tool call)[ \t]*:|>>>)[ \t]*", re.IGNORECASE)
_NAME_KEYS = ("name", "tool", "tool_name", "toolName", "function", "function_name", "api_name", "action")
_SURE_KEYS = ("arguments", "kwargs", "action_input", "tool_input", "tool_args", "tool_arguments")  # of a call only
_DOCUMENTS_IN_TEXT = re.compile(r"<tools>|<functions>|[\"']parameters[\"']\s*:|[\"']arguments[\"']\s*:\s*\{")
_EMPTY_JSON = ("null", "[]", "{}")  # where a column of JSON texts has nothing
WEIGHT_WORDS = re.compile(r"(?:^|_)(?:weights?|train|trainable|training|loss|mask|masked|grad|gradient)(?:_|\Z)")


def is_blank(value: object) -> bool:
    """Null, empty, or an object or list of nothing but such: what columnar storage leaves of an absent value."""
    pending = [value]  # not recursive: a value may be nested as deeply as the reader of JSON lets it
    while pending:
        each = pending.pop()
        if isinstance(each, (dict, list)):
            pending.extend(each.values() if isinstance(each, dict) else each)
        elif each not in (None, ""):
            return False
    return True


def is_empty_text(text: str) -> bool:
    """Whether a text shows nothing: blanks, controls and invisible characters (U+200B, U+FEFF, ...) alone."""
    return all(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs") for character in text)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def is_sharegpt(record: dict) -> bool:
    """Whether `conversations` are ShareGPT's: by its roles, or by tools at the record, not in the system message."""
    entries = record.get("conversations")
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    if any(role in _SHAREGPT_ONLY for role, _ in map(role_and_content, entries) if isinstance(role, str)):
        return True
    has_tools = any(not is_blank(record.get(key)) for key in _TOOL_KEYS)
    return has_tools and not (entries and _is_tool_list(*role_and_content(entries[0])))


def openai_record(record: dict, form: str, source: str) -> tuple[object, list[tuple[str, dict]]]:
    """(tools as they are, OpenAI messages each with its place) of a record of the form "openai" or "sharegpt"."""
    key = "messages" if form == "openai" else "conversations"
    entries = []
    for index, entry in enumerate(record[key]):
        where = f"{source}: {key}[{index}]"
        if not isinstance(entry, dict):
            raise DataError(f"{where}: found {kind_of(entry)}, expected a message object")
        entries.append((where, entry))
    if form == "sharegpt":
        entries = _sharegpt_messages(entries)
    messages = [message for where, entry in entries for message in _openai_messages(entry, where)]
    tools = _record_tools(record, source)
    if form == "sharegpt" and tools is None and messages and _is_tool_list("system", messages[0][1].get("content")):
        if messages[0][1].get("role") == "system":
            tools, messages = messages[0][1]["content"], messages[1:]
    if not is_blank(record.get("system")):
        messages.insert(0, (f"{source}: system", {"role": "system", "content": record["system"]}))
    return ([] if tools is None else tools), messages


def _record_tools(record: dict, source: str) -> object:
    """`tools` or `functions`, None without either. Raises DataError for both, or for a list of tools elsewhere."""
    found = [key for key in _TOOL_KEYS if not is_blank(record.get(key))]
    if len(found) > 1:
        raise DataError(f"{source}: found both 'tools' and 'functions', expected one of them")
    if found:
        return record[found[0]]
    for key, value in record.items():
        is_list = isinstance(value, (list, dict)) or isinstance(value, str) and value.lstrip()[:1] in ("[", "{")
        if re.search("tool|function", key, re.IGNORECASE) and is_list and not is_blank(value):
            if key not in (*_TOOL_KEYS, "tool_choice", "function_call"):
                raise DataError(f"{source}: found {shown(key)} and no 'tools', expected the tools under 'tools'")
    return next((record[key] for key in _TOOL_KEYS if record.get(key) not in (None, "")), None)


def role_and_content(entry: dict) -> tuple[object, object]:
    """`role` and `content`, or `from` and `value`."""
    role, content = entry.get("role"), entry.get("content")
    return (entry.get("from") if role is None else role, entry.get("value") if content is None else content)


def _is_tool_list(role: object, content: object) -> bool:
    if role != "system" or not isinstance(content, (str, list)):
        return False
    return isinstance(content, list) or re.match(r"\s*\[\s*[\{\]]", content) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def _sharegpt_messages(entries: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The same messages with OpenAI's roles; an assistant's text right before its call becomes the text next to it."""
    messages: list[tuple[str, dict]] = []
    for where, entry in entries:
        role, content = role_and_content(entry)
        kind = _SHAREGPT_ROLES.get(role) if isinstance(role, str) else None
        if kind is None:
            raise DataError(f"{where}: found role {shown(role)}, expected one of {', '.join(_SHAREGPT_ROLES)}")
        rest = {key: value for key, value in entry.items() if key not in ("role", "from", "content", "value")}
        if kind != "call":
            messages.append((where, {**rest, "role": kind, "content": content}))
            continue
        refuse_misplaced(entry, where)
        calls = parse_json(content, where) if isinstance(content, str) else content
        calls = calls if isinstance(calls, list) else [calls]
        text = None
        if messages and messages[-1][1]["role"] == "assistant" and is_blank(messages[-1][1].get("tool_calls")):
            _, before = messages.pop()
            text = before["content"]
            if {key: before.get(key) for key in WEIGHT_KEYS} != {key: rest.get(key) for key in WEIGHT_KEYS}:
                raise DataError(f"{where}: found another weight than that of the text before the call, expected one")
            rest = {**before, **rest}
        tool_calls = [{"function": call} for call in calls]
        messages.append((where, {**rest, "role": "assistant", "content": text, "tool_calls": tool_calls}))
    return messages


def _openai_messages(entry: dict, where: str) -> Iterator[tuple[str, dict]]:
    """The message as today's OpenAI messages: one, or one per Anthropic `tool_result` block and one for the rest."""
    if entry.get("role") != "assistant":
        refuse_misplaced(entry, where)
    content = entry.get("content")
    parts = content if isinstance(content, list) and all(isinstance(part, dict) for part in content) else []
    results = [index for index, part in enumerate(parts) if part.get("type") == "tool_result"]
    for index in results:
        identity, result = parts[index].get("tool_use_id"), parts[index].get("content")
        text = "" if result is None else result
        result = {"role": "tool", "tool_call_id": identity, "content": text, "is_error": parts[index].get("is_error")}
        yield f"{where}: content[{index}]", result
    rest = [part for part in parts if part.get("type") not in ("tool_use", "tool_result")]
    if results:
        if rest:
            yield where, {**entry, "content": rest}
        return
    if entry.get("role") == "assistant":
        blocks = [part for part in parts if part.get("type") == "tool_use"]
        calls = [{"id": part.get("id"), "function": {**part, "arguments": part.get("input")}} for part in blocks]
        calls = [{**call, "function": {k: v for k, v in call["function"].items() if k != "input"}} for call in calls]
        entry = with_tool_calls({**entry, "content": rest or None} if calls else entry, calls, where)
    yield where, entry


def refuse_misplaced(entry: dict, where: str) -> None:
    """Raise DataError if a message that is not the assistant's has calls or tools under a key: they are not read."""
    for key in ("tool_calls", "function_call", *_TOOL_KEYS):
        value = entry.get(key)
        if not is_blank(value) and value not in _EMPTY_JSON:
            wanted = "the tools at the record" if key in _TOOL_KEYS else "calls on an assistant's message"
            raise DataError(f"{where}: found the key {key!r} on a message of another role, expected {wanted}")


def with_tool_calls(entry: dict, calls: list[dict], where: str) -> dict:
    """The assistant's message with its calls under `tool_calls` alone, whichever of the known places they came from."""
    for key, value in entry.items():
        is_known = key in _READ_KEYS or not isinstance(value, (str, list, dict)) or is_blank(value)
        if not is_known and (_CALL_WORDS.search(key) or _holds_call(value)):
            raise DataError(f"{where}: found the key {shown(key)}, expected calls under 'tool_calls'")
    places = [("content", calls)] if calls else []
    if not is_blank(entry.get("function_call")):
        places.append(("function_call", [{"function": entry["function_call"]}]))
    if not is_blank(entry.get("tool_calls")):
        listed = entry["tool_calls"]
        places.append(("tool_calls", parse_json(listed, f"{where}: tool_calls") if isinstance(listed, str) else listed))
    if len(places) > 1:
        names = " and ".join(repr(name) for name, _ in places)
        raise DataError(f"{where}: found calls under {names}, expected one of them")
    rest = {key: value for key, value in entry.items() if key not in ("tool_calls", "function_call")}
    if not places:
        return rest
    listed = places[0][1]
    if not isinstance(listed, list):
        raise DataError(f"{where}: tool_calls: found {kind_of(listed)}, expected a list")
    return {**rest, "tool_calls": [call for call in listed if not is_blank(call)]}


def _holds_call(value: object) -> bool:
    """Whether a call is somewhere inside: an object with a name and arguments."""
    if isinstance(value, list):
        return any(map(_holds_call, value))
    if not isinstance(value, dict):
        return False
    has_name = any(isinstance(value.get(key), str) and value[key] for key in _NAME_KEYS)
    has_arguments = any(
        isinstance(value.get(key), dict) or isinstance(value.get(key), str) and (key in _SURE_KEYS or "{" in value[key])
        for key in (*_ARGUMENT_KEYS, *_SURE_KEYS)
    )
    return has_name and has_arguments or any(map(_holds_call, value.values()))


def call_parts(tool_call: object, where: str) -> tuple[object, object, object]:
    """(id, name, arguments) of one entry of `tool_calls`; name and arguments inside `function` or next to the id."""
    function = tool_call.get("function") if isinstance(tool_call, dict) else None
    function = parse_json(function, f"{where}: function") if isinstance(function, str) else function
    if function is None and isinstance(tool_call, dict) and isinstance(tool_call.get("name"), str):
        function = tool_call
    if not isinstance(function, dict) or "name" not in function:
        raise DataError(f'{where}: found {shown(tool_call)}, expected "id" and "function": "name", "arguments"')
    found = [key for key in _ARGUMENT_KEYS if function.get(key) not in (None, "")]
    if len(found) > 1:
        raise DataError(f"{where}: found {' and '.join(map(repr, found))}, expected 'arguments' alone")
    for place in (tool_call, function):
        if weight_key := next((key for key in WEIGHT_KEYS if place.get(key) is not None), None):
            raise DataError(f"{where}: found {shown(weight_key)} at one call, expected it at the message")
    for key, value in function.items():
        if not found and key not in ("name", "id", "function") and isinstance(value, dict) and not is_blank(value):
            raise DataError(f"{where}: found {shown(key)} and no 'arguments', expected the arguments there")
    return tool_call.get("id"), function["name"], function[found[0]] if found else {}


def result_id(entry: dict) -> object:
    """The id of the call that a tool message answers, None if it has none."""
    return next((entry[key] for key in _RESULT_ID_KEYS if entry.get(key) is not None), None)


def is_failed_result(entry: dict, where: str) -> bool:
    """Whether a tool message says that its call failed: `is_error` (Anthropic), `isError` (MCP), `status` (LangChain).

    Raises DataError for a flag that is neither true, false nor null.
    """
    for key in ("is_error", "isError"):
        if entry.get(key) is not None and not isinstance(entry[key], bool):
            raise DataError(f"{where}: {key}: found {shown(entry[key])}, expected true, false or null")
    return entry.get("is_error") is True or entry.get("isError") is True or entry.get("status") == "error"


def message_weight(entry: dict, where: str) -> int:
    """0 if `weight`, `train` or `loss` of an assistant's message says 0 or false, else 1.

    Raises DataError for any other value than 0, 1, false, true and null, and for two keys that disagree.
    """
    said = {key: entry[key] for key in WEIGHT_KEYS if entry.get(key) is not None}
    for key, value in entry.items():
        if key not in WEIGHT_KEYS and WEIGHT_WORDS.search(key) and isinstance(value, (bool, int, float, list)):
            raise DataError(f"{where}: found the key {shown(key)}, expected 'weight', 'train' or 'loss'")
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(f"{where}: {key}: found {shown(value)}, expected 0, 1, false, true or null")
    if len({bool(value) for value in said.values()}) > 1:
        raise DataError(f"{where}: found {shown(said)}, expected them to agree")
    return int(all(said.values()))


def unread_text_keys(entry: dict) -> list[str]:
    """Keys of an assistant's message, and of its calls, that hold text that is not read (`reasoning_content`, ...)."""
    listed = entry.get("tool_calls")
    calls = [call for call in listed if isinstance(call, dict)] if isinstance(listed, list) else []
    functions = [call["function"] for call in calls if isinstance(call.get("function"), dict)]
    known = (*_READ_KEYS, *_ARGUMENT_KEYS, *_RESULT_ID_KEYS, "function")
    return [
        key
        for place, keys in ((entry, _READ_KEYS), *((call, known) for call in (*calls, *functions)))
        for key, value in place.items()
        if key not in keys and isinstance(value, str) and not is_blank(value)
    ]


def refuse_call_in_text(text: str, tools: list[dict], where: str) -> None:
    """Raise DataError if the assistant's text is, or marks, a call that should be under `tool_calls`."""
    found = _CALL_IN_TEXT.search(text)
    mark = found[0].strip() if found else None
    stripped = text.strip()
    if stripped.endswith("```"):
        fenced = stripped[:-3].rstrip()
        stripped = fenced[fenced.rfind("```") :].partition("\n")[2].strip()
    before = _BEFORE_CALL.match(stripped)
    stripped = stripped[before.end() :] if before else stripped
    last_line = _BEFORE_CALL.sub("", stripped[stripped.rfind("\n") + 1 :].strip(), count=1)
    for name in () if mark else dict.fromkeys(tool["function"]["name"] for tool in tools):
        if _is_call(stripped, name) or _is_call(last_line, name):
            mark = name
    if mark is not None:
        raise DataError(f"{where}: found a call in the text ({shown(mark)}), expected it under 'tool_calls'")


def refuse_documents_in_text(system: str, source: str) -> None:
    """Raise DataError if the system text of a record with calls and without tools holds their documents."""
    if found := _DOCUMENTS_IN_TEXT.search(system):
        raise DataError(f"{source}: found tools in the system text ({shown(found[0])}), expected them under 'tools'")


def _is_call(text: str, name: str) -> bool:
    """Whether the text is a call of `name`: `f(a=1)`, `[f(a=1)]`, `f` and a JSON object, or a JSON object of a call."""
    words = text[1:-1].strip() if text[:1] == "[" and text[-1:] == "]" else text
    after = words[len(name) :].lstrip(" \t\r") if words.startswith(name) else ""
    is_called = after[:1] == "(" and after.endswith(")") or re.match(r"\n\s*\{", after) is not None
    return is_called or _is_call_object(text, name)


def _is_call_object(text: str, name: str) -> bool:
    if text[:1] not in ("{", "[") or json.dumps(name) not in text:
        return False
    try:
        value = parse_json(text, "")
    except DataError:
        return False
    entries = value if isinstance(value, list) else [value]
    return any(
        isinstance(entry, dict)
        and (entry.keys() == {name} or any(entry.get(key) == name for key in _NAME_KEYS) and _holds_call(entry))
        for entry in entries
    )


# ---------------------------------------------------------------------------------------------------------------------
# Padded arguments


def without_padding(arguments: dict, functions: list[dict], *, is_object: bool) -> tuple[dict, int]:
    """(arguments without the nulls that columnar storage pads with, how many there were).

    functions: the documents of the called tool. Left out are null arguments that no document has; and, where the file
    holds an object and not JSON text (is_object), those that are optional and not nullable by the document.
    """
    properties: dict[str, object] = {}
    required: list[str] = []
    for function in functions:
        documented, names = tool_parameters(function)
        properties |= documented
        required += names
    is_open = any(map(accepts_any_parameter, functions))
    schema = {"properties": properties, "required": required, "additionalProperties": is_open and not is_object}
    return _without_nulls(arguments, schema, is_object)


def _without_nulls(value: object, schema: object, is_object: bool) -> tuple[object, int]:
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        pairs = [_without_nulls(entry, items, is_object) for entry in value]
        return [entry for entry, _ in pairs], sum(n for _, n in pairs)
    if not isinstance(value, dict):
        return value, 0
    schema = schema if isinstance(schema, dict) else {}
    properties = schema.get("properties")
    is_closed = is_object if properties is None else True
    is_closed = is_closed and schema.get("additionalProperties") in (None, False)
    properties = properties if isinstance(properties, dict) else {}
    required = schema["required"] if isinstance(schema.get("required"), list) else []
    kept, n_dropped = {}, 0
    for key, entry in value.items():
        document = properties.get(key)
        is_undocumented = key not in properties and is_closed
        is_not_nullable = is_object and key in properties and key not in required and not _is_nullable(document)
        is_null = is_padding(entry) if is_object else entry is None
        if is_null and is_undocumented or entry is None and is_not_nullable:
            n_dropped += 1
            continue
        kept[key], n = _without_nulls(entry, document, is_object)
        n_dropped += n
    return kept, n_dropped


def _is_nullable(document: object) -> bool:
    """Whether the document of a parameter allows null: it says so, or says nothing about the type."""
    if not isinstance(document, dict):
        return True
    lists = [document[key] for key in ("anyOf", "oneOf") if isinstance(document.get(key), list)]
    alternatives = [entry for entries in lists for entry in entries]
    enum = document.get("enum")
    if document.get("nullable") is True or isinstance(enum, list) and None in enum:
        return True
    if "default" in document and document["default"] is None or any(map(_is_nullable, alternatives)):
        return True
    kind = document.get("type")
    kinds = [str(entry).lower() for entry in (kind if isinstance(kind, list) else [kind])]
    if kind is None:
        return not alternatives and enum is None
    return any(re.search(r"null|none|optional|any", entry) for entry in kinds)
