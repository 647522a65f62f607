"""data/trajectories.py: both forms read alike, and every malformed thing ends in one DataError with file and line."""

import copy
import json
import time
from pathlib import Path

import pytest

from data.json_records import DataError
from data.tool_calls import ToolCall
from data.tool_documents import normalize_tools, tool_parameters
from data.trajectories import Message, Trajectory, read_trajectories

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_book",
            "description": "Finds a book.",
            "parameters": {
                "type": "object",
                "properties": {
                    "title": {"type": "string", "description": "its title"},
                    "year": {"type": "integer", "description": "of print"},
                },
                "required": ["title"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "finish",
            "description": "Ends.",
            "parameters": {
                "type": "object",
                "properties": {"answer": {"type": "string", "description": "the answer"}},
                "required": ["answer"],
            },
        },
    },
]
AUTHORS = {
    "id": "s1",
    "conversations": [
        {"role": "system", "content": json.dumps(TOOLS)},
        {"role": "user", "content": "Find Ulysses."},
        {"role": "assistant", "content": 'find_book\n{"title": "Ulysses", "year": 1922}'},
        {"role": "function", "content": '{"found": true}'},
        {"role": "assistant", "content": 'finish\n{\n  "answer": "It\\nexists."\n}'},
    ],
}
OPENAI = {
    "id": "s1",
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "Find Ulysses."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "find_book", "arguments": '{"title": "Ulysses", "year": 1922}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": '{"found": true}'},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c2", "type": "function", "function": {"name": "finish", "arguments": {"answer": "It\nexists."}}}
            ],
        },
    ],
}
CALLS = [ToolCall("find_book", {"title": "Ulysses", "year": 1922}), ToolCall("finish", {"answer": "It\nexists."})]


def write(folder: Path, content: object, name: str = "file.json") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def changed(record: dict, *steps: object) -> dict:
    """A deep copy with `steps[:-1]` as the path to set and `steps[-1]` as the value; `...` deletes."""
    record = copy.deepcopy(record)
    place = record
    for step in steps[:-2]:
        place = place[step]
    if steps[-1] is ...:
        del place[steps[-2]]
    else:
        place[steps[-2]] = steps[-1]
    return record


def fault_of(path: Path) -> str:
    with pytest.raises(DataError) as raised:
        read_trajectories(path)
    message = str(raised.value)
    assert message.startswith(str(path)) and "\n" not in message, message
    assert "found" in message and "expected" in message, message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Good files


def test_both_forms_give_the_same_trajectory(tmp_path):
    (authors,) = read_trajectories(write(tmp_path, [AUTHORS], "a.json"))
    (openai,) = read_trajectories(write(tmp_path, json.dumps(OPENAI) + "\n", "b.jsonl"))
    for trajectory in (authors, openai):
        assert trajectory.id == "s1" and trajectory.tools == TOOLS
        assert [message.role for message in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
        assert [message.call for message in trajectory.messages if message.role == "assistant"] == CALLS
        assert trajectory.messages[2] == Message("tool", '{"found": true}')
        assert all(message.fault is None for message in trajectory.messages)
    assert authors.source == f"{tmp_path / 'a.json'}:1"


def test_forms_and_containers_are_independent(tmp_path):
    lines = "\n\n  " + json.dumps(AUTHORS) + "\r\n" + json.dumps(changed(AUTHORS, "id", "s2")) + "\n"
    assert [(t.id, t.source[-2:]) for t in read_trajectories(write(tmp_path, lines, "a.jsonl"))] == [
        ("s1", ":3"),
        ("s2", ":4"),
    ]
    assert read_trajectories(write(tmp_path, [OPENAI], "o.json"))[0].messages[1].call == CALLS[0]


def test_bom_pretty_printing_and_line_separators_inside_strings(tmp_path):
    odd = changed(AUTHORS, "conversations", 1, "content", "a\u2028b\u0085c")
    path = write(
        tmp_path, b"\xef\xbb\xbf" + json.dumps([odd, AUTHORS | {"id": 7}], indent=2, ensure_ascii=False).encode()
    )
    first, second = read_trajectories(path)
    assert first.messages[0].content == "a\u2028b\u0085c" and second.id == "7"
    assert path.read_text("utf-8").split("\n")[int(second.source.rsplit(":", 1)[1]) - 1].strip() == "{"
    line = json.dumps(odd, ensure_ascii=False)
    assert len(read_trajectories(write(tmp_path, line, "x.jsonl"))) == 1


def test_missing_ids_get_the_index(tmp_path):
    records = [changed(AUTHORS, "id", ...), AUTHORS, changed(AUTHORS, "id", ...)]
    assert [trajectory.id for trajectory in read_trajectories(write(tmp_path, records))] == ["0", "s1", "2"]


def test_from_and_value_are_read_too(tmp_path):
    record = {
        "conversations": [{"from": entry["role"], "value": entry["content"]} for entry in AUTHORS["conversations"]]
    }
    assert read_trajectories(write(tmp_path, [record]))[0].messages[1].call == CALLS[0]


def test_required_beside_parameters_moves_inside_and_bare_functions_are_wrapped():
    function = copy.deepcopy(TOOLS[0]["function"])
    beside = {**function, "required": function["parameters"].pop("required")}
    assert normalize_tools([beside, {"type": "function", "function": beside}], "x") == [TOOLS[0], TOOLS[0]]
    assert "required" in beside  # the input is untouched
    (bare,) = normalize_tools([{"name": "f"}], "x")
    assert bare["function"]["parameters"] == {"type": "object", "properties": {}, "required": []}
    assert tool_parameters(beside) == (function["parameters"]["properties"], ["title"])
    assert tool_parameters({"name": "f", "parameters": None}) == ({}, [])


def test_equal_tool_names_are_kept():
    assert len(normalize_tools([TOOLS[0], TOOLS[0]], "x")) == 2


def test_parallel_calls_become_turns_with_their_own_feedback(tmp_path):
    def call(identity: str, title: str) -> dict:
        return {"id": identity, "function": {"name": "find_book", "arguments": json.dumps({"title": title})}}

    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Both."},
        {"role": "assistant", "content": "I look.", "tool_calls": [call("a", "A"), call("b", "B")]},
        {"role": "tool", "tool_call_id": "b", "content": "no B"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "has "}, {"text": "A"}]},
        {"role": "assistant", "content": "A exists."},
        {"role": "user", "content": "And C, D?"},
        {"role": "assistant", "tool_calls": [call("a", "C"), call("b", "D")]},
    ]
    (trajectory,) = read_trajectories(write(tmp_path, json.dumps({"tools": TOOLS, "messages": messages})))
    assert [(m.role, m.call.arguments["title"] if m.call else m.content) for m in trajectory.messages] == [
        ("system", "Be kind."),
        ("user", "Both."),
        ("assistant", "A"),
        ("tool", "has A"),
        ("assistant", "B"),
        ("tool", "no B"),
        ("assistant", "A exists."),
        ("user", "And C, D?"),
        ("assistant", "C"),
        ("assistant", "D"),
    ]
    for message in messages[2]["tool_calls"], messages[3:5]:  # without ids: in order
        for entry in message:
            entry.pop("id", entry.pop("tool_call_id", None))
    messages[4]["content"] = "second"
    (trajectory,) = read_trajectories(write(tmp_path, json.dumps({"tools": TOOLS, "messages": messages})))
    assert [m.content for m in trajectory.messages[3:6:2]] == ["no B", "second"]


@pytest.mark.parametrize("arguments", [None, "", "{}", " { } ", {}])
def test_openai_calls_without_arguments(tmp_path, arguments):
    record = changed(OPENAI, "messages", 3, "tool_calls", 0, "function", {"name": "ping", "arguments": arguments})
    assert read_trajectories(write(tmp_path, json.dumps(record)))[0].messages[3].call == ToolCall("ping", {})


# ---------------------------------------------------------------------------------------------------------------------
# Calls that do not parse


@pytest.mark.parametrize(
    "content",
    [
        "",
        "hello",
        "find_book",
        "find_book\n",
        "find_book\nno json",
        "find_book\n[1]",
        'find_book\n"x"',
        "find_book\n{} {}",
        'find_book\n{"title": ',
        "two words\n{}",
        "\n{}",
        'f\n{"a": NaN}',
        'f\n{"a": Infinity}',
        'f\n{"a": 1, "a": 2}',
        "f(\n{}",
        'f\n{"a": ' + "[" * 100_000,
        'f\n{"a": ' + "[" * 300 + "]" * 300 + "}",
        'f\n{"a": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_calls_that_do_not_parse_are_an_error_or_masked(tmp_path, content):
    records = [AUTHORS, changed(AUTHORS, "conversations", 2, "content", content) | {"id": "s2"}]
    path = write(tmp_path, json.dumps(records, indent=1))
    assert ": conversations[2]: " in fault_of(path)
    message = read_trajectories(path, unparsable_calls="mask")[1].messages[1]
    assert message.role == "assistant" and message.content == content and message.call is None and message.fault


def test_openai_calls_that_do_not_parse(tmp_path):
    for function in (
        {"name": "find_book", "arguments": "{'title': 1}"},
        {"name": "a b", "arguments": "{}"},
        {"name": None, "arguments": "{}"},
        {"name": "f", "arguments": [1]},
    ):
        path = write(tmp_path, json.dumps(changed(OPENAI, "messages", 1, "tool_calls", 0, "function", function)))
        assert ":1: messages[1]: tool_calls[0]: " in fault_of(path)
        message = read_trajectories(path, unparsable_calls="mask")[0].messages[1]
        assert message.call is None and message.fault
        assert message.content == f"{function['name']}({function['arguments']})"


def test_unknown_way_to_treat_them_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="unparsable_calls"):
        read_trajectories(write(tmp_path, [AUTHORS]), unparsable_calls="ignore")


# ---------------------------------------------------------------------------------------------------------------------
# Malformed files


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("", 1, "empty file"),
        (" \n\n ", 1, "empty file"),
        ("[]", 1, "empty list"),
        ("\n[\n]\n", 3, "empty list"),
        ("hello", 1, "'h'"),
        ("\n\n42", 3, "'4'"),
        ('"x"', 1, "'\"'"),
        ("null", 1, "'n'"),
        ("[1]", 1, "a number"),
        ("[null]", 1, "null"),
        ("[[]]", 1, "a list"),
        ("{}", 1, "the keys []"),
        ('{"a": 1}', 1, "the keys ['a']"),
        ("{", 1, "the end"),
        ("[{", 1, "the end"),
        ('{"messages": [],}', 1, "column"),
        ('{"messages": []}', 1, "an empty list"),
        ('{"messages": 3}', 1, "a number"),
        ('{"conversations": null}', 1, "null"),
        ('{"a": 1, "a": 2}', 1, "'a' twice"),
        ('{"a": NaN}', 1, "NaN"),
        ("[" * 100_000, 1, "deep"),
        ('{"a": ' + "[" * 100_000, 1, "deep"),
        ('{"a": ' + "9" * 5000 + "}", 1, "digits"),
        ("{\n}\n{}\n", 1, "the end"),
        ('{"messages": 1} {}', 1, "one object per line"),
        (b"[\n\n\xff]", 3, "0xff"),
        ("\x00", 1, "'\\x00'"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_files_that_are_no_records(tmp_path, content, line, words):
    message = fault_of(write(tmp_path, content))
    assert message.startswith(f"{tmp_path / 'file.json'}:{line}: ") and words in message


def test_lists_with_a_fault_between_or_behind_the_records(tmp_path):
    one = json.dumps(AUTHORS)
    for content, line, words in (
        (f"[{one}\n{one}]", 2, "',' or ']'"),
        (f"[{one},\n]", 2, "JSON"),
        (f"[{one},", 1, "JSON"),
        (f"[{one}", 1, "',' or ']'"),
        (f"[{one}]\n\n x", 3, "after the list"),
        (f"[{one},\n{one[:-1]},\n", 3, "column 1 in the record that begins at line 2"),
        (f"[\n{one},\n\n{one[:50]}", 4, "column"),
    ):
        message = fault_of(write(tmp_path, content))
        assert f".json:{line}: " in message and words in message, message


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in fault_of(tmp_path / "none.json")
    fault_of(tmp_path)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (("id", 1.5), "id: found a number"),
        (("id", True), "id: found a boolean"),
        (("id", [1]), "id: found a list"),
        (("conversations", 0, "x"), "conversations[0]: found a string"),
        (("conversations", 0, ...), "'user' first"),
        (("conversations", 0, "role", "System"), "role 'System'"),
        (("conversations", 1, "role", "human"), "role 'human'"),
        (("conversations", 1, "role", ...), "role None"),
        (("conversations", 1, "role", 3), "role 3"),
        (("conversations", 3, "role", "tool"), "role 'tool', expected one of assistant, function, system, user"),
        (("conversations", 1, ...), "'assistant' after system"),
        (("conversations", 2, ...), "'function' after user"),
        (("conversations", 3, ...), "'assistant' after assistant"),
        (("conversations", 3, "role", "system"), "'system' after"),
        (("conversations", 3, "role", "assistant"), "'assistant' after assistant"),
        (("conversations", 1, "content", None), "null as text"),
        (("conversations", 3, "content", {"a": 1}), "an object as text"),
        (("conversations", 1, "content", "\ud800"), "lone surrogate"),
        (("conversations", 0, "content", "You are kind."), "must begin with the JSON list of tools"),
        (("conversations", 0, "content", "{}"), "expected a list of tools"),
        (("conversations", 0, "content", None), "expected a list of tools"),
        (("conversations", 0, "content", "[" * 100_000), "nested too deeply"),
        (("conversations", 0, "content", [3]), "tools[0]: found a number"),
        (("conversations", 0, "content", [{}]), "found no name"),
        (("conversations", 0, "content", [{"name": " "}]), "expected a tool with a name"),
        (("conversations", 0, "content", [{"type": "function", "function": {"description": "d"}}]), "found no name"),
        (("conversations", 0, "content", [{"name": "f", "parameters": 3}]), "parameters: found a number"),
        (("conversations", 0, "content", [{"name": "f", "parameters": [3]}]), "parameters[0]: found 3"),
        (
            ("conversations", 0, "content", [{"name": "f", "parameters": {"properties": []}}]),
            "properties: found a list",
        ),
        (
            ("conversations", 0, "content", [{"name": "f", "parameters": {"properties": {"a": "string"}}}]),
            "'a': found a string",
        ),
        (("conversations", 0, "content", [{"name": "f", "required": "a"}]), "required: found 'a'"),
        (("conversations", 0, "content", [{"name": "f", "required": ["a"]}]), "one of the documented parameters"),
        (("conversations", 0, "content", [{"name": "f", "description": 3}]), "description: found a number"),
        (("conversations", ["x"]), "conversations[0]"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_authors_records_with_a_fault_are_located(tmp_path, steps, words):
    records = [
        AUTHORS,
        changed(AUTHORS, *steps) if steps[0] == "id" else changed(AUTHORS, *steps) | {"id": "s2"},
        AUTHORS | {"id": 3},
    ]
    path = write(tmp_path, "[" + ",\n\n".join(json.dumps(record) for record in records) + "]")
    message = fault_of(path)
    assert message.startswith(f"{path}:3: ") and words in message


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (("tools", {}), "tools: found an object"),
        (("tools", [{}]), "tools[0]: found no name"),
        (("messages", 0, 3), "messages[0]: found a number"),
        (("messages", 0, "role", "function"), "role 'function'"),
        (("messages", 0, "role", "tool"), "'tool' after the start"),
        (("messages", 0, ...), "'assistant' after the start"),
        (("messages", 1, ...), "'tool' after user"),
        (("messages", 2, "role", "system"), "'system' after"),
        (("messages", 2, "content", None), "null as text"),
        (("messages", 2, "content", [{"type": "image_url"}]), "content[0]: found a part of 'image_url'"),
        (("messages", 1, "tool_calls", ...), "neither text nor tool_calls"),
        (("messages", 1, "tool_calls", []), "neither text nor tool_calls"),
        (("messages", 1, "tool_calls", 3), "tool_calls: found a number"),
        (("messages", 1, "tool_calls", 0, 3), "tool_calls[0]: found 3"),
        (("messages", 1, "tool_calls", 0, {"function": {"a": 1}}), "tool_calls[0]"),
        (("messages", 2, "tool_call_id", "zz"), "tool_call_id 'zz'"),
        (("messages", 3, {"role": "tool", "tool_call_id": "c1", "content": "x"}), "'c1' again"),
        (("messages", 3, {"role": "tool", "content": "x"}), "more than there are calls"),
        (("messages", 1, {"role": "assistant", "content": "text"}), "'tool' after assistant text"),
        (("messages", [{"role": "user", "content": "x"}]), "no assistant message"),
        (("messages", 1, "tool_calls", [{"id": 1, "function": {"name": "f"}}] * 2), "id 1 again"),
        (
            ("messages", 1, "tool_calls", [{"id": i, "function": {"name": "f"}} for i in ("c1", "d")]),
            "no tool message for call 1",
        ),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_openai_records_with_a_fault_are_located(tmp_path, steps, words):
    path = write(tmp_path, json.dumps(OPENAI) + "\n\n" + json.dumps(changed(OPENAI, *steps) | {"id": 2}) + "\n")
    message = fault_of(path)
    assert message.startswith(f"{path}:3: ") and words in message


def test_a_record_that_ends_before_all_parallel_calls_are_answered(tmp_path):
    calls = [{"id": i, "function": {"name": "f", "arguments": ""}} for i in ("c1", "d")]
    record = changed(changed(OPENAI, "messages", 1, "tool_calls", calls), "messages", 3, ...)
    assert ":1: found no tool message for call 1 (id 'd')" in fault_of(write(tmp_path, json.dumps(record)))


def test_duplicate_ids_name_both_places(tmp_path):
    path = write(tmp_path, "\n".join(json.dumps(AUTHORS | {"id": identity}) for identity in ("a", "b", "a")))
    message = fault_of(path)
    assert message.startswith(f"{path}:3: ") and f"{path}:1" in message
    fault_of(write(tmp_path, [AUTHORS | {"id": 1}, AUTHORS | {"id": "1"}]))


def test_all_records_have_the_form_of_the_first(tmp_path):
    message = fault_of(write(tmp_path, json.dumps(OPENAI) + "\n" + json.dumps(AUTHORS | {"id": 2})))
    assert ":2: " in message and "'messages' (OpenAI form)" in message


def test_trajectories_are_values(tmp_path):
    (first,) = read_trajectories(write(tmp_path, [AUTHORS]))
    assert first == Trajectory(first.id, first.tools, first.messages, first.source)
    with pytest.raises(AttributeError):
        first.id = "x"


# ---------------------------------------------------------------------------------------------------------------------
# Time


@pytest.mark.parametrize("container", ["list", "lines"])
def test_reading_time_grows_with_the_size_not_its_square(tmp_path, container):
    def seconds(count: int) -> float:
        texts = [json.dumps(AUTHORS | {"id": index}) for index in range(count)]
        path = write(tmp_path, "[" + ",\n".join(texts) + "]" if container == "list" else "\n".join(texts))
        start = time.process_time()
        assert len(read_trajectories(path)) == count
        return time.process_time() - start

    small = min(seconds(250) for _ in range(3))
    assert seconds(4000) < 16 * small * 5 + 0.2  # a quadratic reader takes 256 times as long


def test_a_long_record_costs_no_more_per_character(tmp_path):
    record = changed(AUTHORS, "conversations", 3, "content", "x" * 20_000_000)
    start = time.process_time()
    read_trajectories(write(tmp_path, json.dumps([record, AUTHORS | {"id": 2}])))
    assert time.process_time() - start < 5
