"""data/message_forms.py: the same dialogue in each published form, written by hand, and what is refused by name."""

import copy
import json

import pytest

from data.error_filter import decide_masked_turns
from data.json_records import DataError
from data.message_forms import is_blank
from data.tool_calls import ToolCall
from data.trajectories import LEFT_OUT_NULLS, Message, read_trajectories

TITLE = {"type": "string", "description": "its title"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_book",
            "description": "Finds a book.",
            "parameters": {"type": "object", "properties": {"title": TITLE}, "required": ["title"]},
        },
    }
]
ULYSSES = {"title": "Ulysses"}
CALL = ToolCall("find_book", ULYSSES)
EXPECTED = [
    Message("user", "Is there Ulysses?"),
    Message("assistant", "", CALL),
    Message("tool", "yes"),
    Message("assistant", "It is there."),
]
ASK = {"role": "user", "content": "Is there Ulysses?"}
END = {"role": "assistant", "content": "It is there."}


def call(arguments: object = ULYSSES, identity: object = "c1", name: str = "find_book") -> dict:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def openai(*messages: dict, tools: object = TOOLS, **rest: object) -> dict:
    return {"tools": tools, "messages": list(messages), **rest}


def asked(assistant: dict, *results: dict) -> dict:
    return openai(ASK, {"role": "assistant", **assistant}, *results, END)


ANSWER = {"role": "tool", "tool_call_id": "c1", "content": "yes"}
BOTH_NULL = {"name": None, "arguments": None}


def read(tmp_path, record: dict, **settings):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (trajectory,) = read_trajectories(path, **settings)
    return trajectory


def fault_of(tmp_path, record: dict) -> str:
    with pytest.raises(DataError) as raised:
        read(tmp_path, record)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'data.jsonl'}:1: ") and "found" in message and "expected" in message
    assert message.isascii() and message.isprintable()
    return message


# ---------------------------------------------------------------------------------------------------------------------
# The forms

FORMS = {
    "openai": asked({"content": None, "tool_calls": [call()]}, ANSWER),
    "arguments as text": asked({"content": "", "tool_calls": [call(json.dumps(ULYSSES))]}, ANSWER),
    "tools as text": openai(ASK, {"role": "assistant", "tool_calls": [call()]}, ANSWER, END, tools=json.dumps(TOOLS)),
    "tool_calls as text": asked({"tool_calls": json.dumps([call()])}, ANSWER),
    "function as text": asked({"tool_calls": [{"id": "c1", "function": json.dumps(call()["function"])}]}, ANSWER),
    "name beside the id": asked({"tool_calls": [{"id": "c1", "name": "find_book", "arguments": ULYSSES}]}, ANSWER),
    "parameters for arguments": asked(
        {"tool_calls": [{"function": {"name": "find_book", "parameters": ULYSSES, "arguments": None}}]}, ANSWER
    ),
    "null ids": asked({"tool_calls": [call(identity=None)]}, {**ANSWER, "tool_call_id": None}),
    "no ids": asked({"tool_calls": [{"function": call()["function"]}]}, {"role": "tool", "content": "yes"}),
    "ids in one place only": asked({"tool_calls": [call()]}, {"role": "tool", "content": "yes"}),
    "text parts": openai(
        {"role": "user", "content": [{"type": "text", "text": "Is there "}, {"text": "Ulysses?"}]},
        {"role": "assistant", "content": [], "tool_calls": [call()]},
        {**ANSWER, "content": [{"type": "text", "text": "yes", "image_url": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is there."}]},
    ),
    "legacy": {
        "functions": [TOOLS[0]["function"]],
        "messages": [
            ASK,
            {"role": "assistant", "content": None, "function_call": call(json.dumps(ULYSSES))["function"]},
            {"role": "function", "name": "find_book", "content": "yes"},
            END,
        ],
    },
    "legacy with tools": asked({"function_call": call()["function"]}, {"role": "function", "content": "yes"}),
    "null-padded": {
        "id": None,
        "conversations": None,
        "functions": None,
        "system": None,
        "tools": TOOLS,
        "messages": [
            {**ASK, "tool_calls": None, "function_call": None, "tool_call_id": None, "weight": None},
            {"role": "assistant", "content": None, "tool_calls": [call()], "function_call": BOTH_NULL, "weight": None},
            {**ANSWER, "tool_calls": None, "function_call": BOTH_NULL},
            {**END, "tool_calls": [], "function_call": None, "tool_call_id": None, "toolUse": {"name": None}},
        ],
    },
    "anthropic": openai(
        ASK,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "find_book", "input": ULYSSES}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "yes"}]},
        END,
        tools=[
            {"name": "find_book", "description": "Finds a book.", "input_schema": TOOLS[0]["function"]["parameters"]}
        ],
    ),
    "sharegpt": {
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "Is there Ulysses?"},
            {"from": "function_call", "value": json.dumps(call()["function"])},
            {"from": "observation", "value": "yes"},
            {"from": "gpt", "value": "It is there."},
        ],
    },
    "sharegpt with role and content": {
        "tools": TOOLS,
        "conversations": [
            ASK,
            {"role": "tool_call", "content": call()["function"]},
            {"role": "tool", "content": "yes"},
            END,
        ],
    },
    "sharegpt with tools in the system message": {
        "conversations": [
            {"from": "system", "value": json.dumps(TOOLS)},
            {"from": "human", "value": "Is there Ulysses?"},
            {"from": "function_call", "value": json.dumps([call()["function"]])},
            {"from": "observation", "value": "yes"},
            {"from": "gpt", "value": "It is there.", "role": None, "content": None},
        ]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_messages(tmp_path, form):
    trajectory = read(tmp_path, FORMS[form])
    assert trajectory.messages == EXPECTED
    assert trajectory.tools == TOOLS and trajectory.id == "0" and trajectory.left_out == {}


def test_system_text_comes_from_the_first_message_or_the_record(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    for record in (
        openai(system, ASK, END),
        openai(ASK, END, system="Be kind."),
        {"conversations": [{"from": "human", "value": ASK["content"]}, END], "system": "Be kind.", "tools": None},
    ):
        assert read(tmp_path, record).messages == [Message("system", "Be kind."), EXPECTED[0], EXPECTED[3]]
    assert "role 'system' after system" in fault_of(tmp_path, openai(system, ASK, END, system="Be kind."))


# ---------------------------------------------------------------------------------------------------------------------
# Parallel calls


@pytest.mark.parametrize(
    "results",
    [
        [{"tool_call_id": "b", "content": "2"}, {"tool_call_id": "a", "content": "1"}],
        [{"toolCallId": "b", "content": "2"}, {"toolCallId": "a", "content": "1"}],
        [{"content": "1"}, {"content": "2"}],
        [{"name": "g", "content": "2"}, {"name": "f", "content": "1"}],
    ],
)
def test_parallel_calls_find_their_results(tmp_path, results):
    has_ids = "content" in results[0] and len(results[0]) == 2 and "name" not in results[0]
    calls = [call({}, identity if has_ids else None, name) for identity, name in (("a", "f"), ("b", "g"))]
    answers = [{"role": "tool", **result} for result in results]
    messages = read(tmp_path, asked({"content": "Both.", "tool_calls": calls}, *answers)).messages
    assert messages[1:-1] == [
        Message(
            "assistant", "Both.", ToolCall("f", {}), thought="Both."
        ),  # the text beside the calls belongs to the first
        Message("tool", "1"),
        Message("assistant", "", ToolCall("g", {})),
        Message("tool", "2"),
    ]


def test_anthropic_text_and_several_results(tmp_path):
    blocks = [
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "a", "name": "find_book", "input": {"title": "A"}},
        {"type": "tool_use", "id": "b", "name": "find_book", "input": {"title": "B"}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "no B"}]},
        {"type": "tool_result", "tool_use_id": "a"},
        {"type": "text", "text": "Well?"},
    ]
    record = openai(ASK, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}, END)
    trajectory = read(tmp_path, record)
    assert [(m.role, m.content, m.call and m.call.arguments) for m in trajectory.messages[1:]] == [
        ("assistant", "Let me look.", {"title": "A"}),
        ("tool", "", None),
        ("assistant", "", {"title": "B"}),
        ("tool", "no B", None),
        ("user", "Well?", None),
        ("assistant", "It is there.", None),
    ]
    assert [m.thought for m in trajectory.messages if m.role == "assistant"] == ["Let me look.", "", ""]


# ---------------------------------------------------------------------------------------------------------------------
# What is counted, not lost


def test_text_beside_a_call_is_kept(tmp_path):
    record = asked(
        {"content": "Let me look.", "function_call": call()["function"]}, {"role": "function", "content": "yes"}
    )
    trajectory = read(tmp_path, record)
    assert trajectory.messages[1] == Message("assistant", "Let me look.", CALL, thought="Let me look.")
    sharegpt = copy.deepcopy(FORMS["sharegpt"])
    sharegpt["conversations"].insert(1, {"from": "gpt", "value": "Let me look."})
    trajectory = read(tmp_path, sharegpt)
    assert trajectory.messages == [
        EXPECTED[0],
        Message("assistant", "Let me look.", CALL, thought="Let me look."),
        *EXPECTED[2:],
    ]


def test_text_beside_a_call_that_does_not_parse_is_kept_too(tmp_path):
    record = asked({"content": "Let me look.", "tool_calls": [call("{")]}, ANSWER)
    message = read(tmp_path, record, unparsable_calls="mask").messages[1]
    assert (message.call, message.content, message.thought) == (None, "find_book({)", "Let me look.")


def test_text_under_other_keys_is_counted(tmp_path):
    record = asked({"tool_calls": [call()], "reasoning_content": "Hm.", "refusal": None}, ANSWER)
    assert read(tmp_path, record).left_out == {"texts under 'reasoning_content' of an assistant message": 1}


NULLABLE = {
    "title": TITLE,
    "a": {"type": ["string", "null"]},
    "b": {"type": "string", "nullable": True},
    "c": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "d": {"description": "any type"},
    "e": {"enum": ["x", None]},
}


def arguments_of(tmp_path, properties: dict, arguments: object, **schema: object):
    parameters = {"type": "object", "properties": properties, "required": ["title"], **schema}
    tools = [{"type": "function", "function": {"name": "find_book", "parameters": parameters}}]
    record = openai(ASK, {"role": "assistant", "tool_calls": [call(arguments)]}, ANSWER, END, tools=tools)
    trajectory = read(tmp_path, record)
    assert trajectory.left_out.keys() <= {LEFT_OUT_NULLS}
    return trajectory.messages[1].call.arguments, trajectory.left_out.get(LEFT_OUT_NULLS, 0)


def test_undocumented_null_arguments_are_dropped_and_counted(tmp_path):
    padded = {"title": "Ulysses", "city": None, "unit": None}
    assert arguments_of(tmp_path, {"title": TITLE}, padded) == (ULYSSES, 2)
    assert arguments_of(tmp_path, {"title": TITLE}, json.dumps(padded)) == (ULYSSES, 2)
    assert arguments_of(tmp_path, {"title": TITLE}, {**ULYSSES, "place": {"city": None, "at": {"x": None}}}) == (
        ULYSSES,
        1,
    )
    assert arguments_of(tmp_path, {"title": TITLE}, padded, additionalProperties=True) == (ULYSSES, 2)
    text = json.dumps(padded)  # JSON text is not padded by storage, and this document allows any parameter
    assert arguments_of(tmp_path, {"title": TITLE}, text, additionalProperties=True) == (padded, 0)


def test_a_documented_null_stays_where_the_document_allows_it(tmp_path):
    arguments = {"title": "Ulysses", **dict.fromkeys("abcde")}
    assert arguments_of(tmp_path, NULLABLE, arguments) == (arguments, 0)
    year = {"title": TITLE, "year": {"type": "integer"}}
    assert arguments_of(tmp_path, year, {"title": "Ulysses", "year": None}) == (ULYSSES, 1)  # padded as well
    assert arguments_of(tmp_path, year, '{"title": "Ulysses", "year": null}') == ({"title": "Ulysses", "year": None}, 0)
    assert arguments_of(tmp_path, year, {"title": None, "year": 3}) == ({"title": None, "year": 3}, 0)  # required


def test_padding_inside_objects_and_lists(tmp_path):
    place = {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"type": ["string", "null"]}}}
    properties = {
        "title": TITLE,
        "place": place,
        "places": {"type": "array", "items": place},
        "free": {"type": "object"},
    }
    padded = {"city": "Oslo", "zip": None, "title": None}
    arguments = {"title": "x", "place": padded, "places": [padded, {"city": None}], "free": {"a": 1, "b": None}}
    clean = {"city": "Oslo", "zip": None}
    assert arguments_of(tmp_path, properties, arguments) == (
        {"title": "x", "place": clean, "places": [clean, {}], "free": {"a": 1}},
        4,
    )
    free = {"title": TITLE, "free": {"type": "object", "additionalProperties": True}}
    assert arguments_of(tmp_path, free, {"title": "x", "free": {"b": None}}) == ({"title": "x", "free": {"b": None}}, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({}, 1),
        ({"weight": 0}, 0),
        ({"weight": 0.0}, 0),
        ({"weight": 1}, 1),
        ({"weight": None}, 1),
        ({"train": False}, 0),
        ({"train": True}, 1),
        ({"loss": 0}, 0),
        ({"loss": False, "train": 0, "weight": None}, 0),
    ],
)
def test_weights_of_messages_in_all_forms(tmp_path, keys, weight):
    record = asked({"tool_calls": [call()], **keys}, ANSWER)
    record["messages"][3] = {**END, **keys}
    assert [message.weight for message in read(tmp_path, record).messages] == [1, weight, 1, weight]
    sharegpt = copy.deepcopy(FORMS["sharegpt"])
    sharegpt["conversations"][1] |= keys
    assert [message.weight for message in read(tmp_path, sharegpt).messages] == [1, weight, 1, 1]
    authors = {
        "conversations": [
            {"role": "system", "content": json.dumps(TOOLS)},
            ASK,
            {"role": "assistant", "content": 'find_book\n{"title": "x"}', **keys},
        ]
    }
    assert [message.weight for message in read(tmp_path, authors).messages] == [1, weight]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"weight": 0.5}, "weight: found 0.5"),
        ({"weight": -1}, "weight: found -1"),
        ({"loss": 2}, "loss: found 2"),
        ({"train": "no"}, "train: found 'no'"),
        ({"loss": [1]}, "loss: found [1]"),
        ({"weight": 1, "train": False}, "expected them to agree"),
    ],
)
def test_other_weights_are_refused(tmp_path, keys, words):
    assert words in fault_of(tmp_path, asked({"tool_calls": [call()], **keys}, ANSWER))


def test_a_list_of_words_at_the_record_is_no_list_of_weights(tmp_path):
    record = openai(ASK, END, training_sources=["web"], loss_notes=[])
    assert [message.weight for message in read(tmp_path, record).messages] == [1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    "key",
    ["tool_call", "function_calls", "toolUse", "toolCalls", "functionCall", "tool_use", "actions", "toolInvocations"],
)
def test_unknown_keys_that_look_like_calls_are_refused(tmp_path, key):
    value = [{"name": "find_book", "arguments": ULYSSES}]
    assert f"found the key {key!r}" in fault_of(tmp_path, asked({"content": "Let me look.", key: value}))


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "find_book", "arguments": {"title": "Ulysses"}}\n</tool_call>',
        '<functioncall> {"name": "find_book", "arguments": \'{"title": "Ulysses"}\'}',
        'Let me.\n<function=find_book>{"title": "Ulysses"}</function>',
        '[TOOL_CALLS] [{"name": "find_book"}]',
        "<|tool_call|>[]",
        '<|python_tag|>find_book.call(title="Ulysses")',
        'Thought: look\nAction: find_book\nAction Input: {"title": "Ulysses"}',
        'find_book\n{"title": "Ulysses"}',
        'find_book(title="Ulysses")',
        '[find_book(title="Ulysses")]',
        '{"name": "find_book", "parameters": {"title": "Ulysses"}}',
        '[{"name": "find_book", "arguments": {}}]',
    ],
)
def test_calls_written_into_the_text_are_refused(tmp_path, text):
    assert "found a call in the text" in fault_of(tmp_path, openai(ASK, {"role": "assistant", "content": text}))
    record = {"tools": TOOLS, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": text}]}
    assert "found a call in the text" in fault_of(tmp_path, record)


@pytest.mark.parametrize(
    "text", ["find_book is a tool.", '{"title": "x"}', "[1]", "f(x) = 1", "find_book (see above) ..."]
)
def test_text_about_tools_is_text(tmp_path, text):
    assert read(tmp_path, openai(ASK, {"role": "assistant", "content": text})).messages[1] == Message("assistant", text)


@pytest.mark.parametrize("content", [None, "", " \n", [], [{"type": "text", "text": ""}]])
def test_empty_assistant_messages_are_refused_or_context(tmp_path, content):
    record = openai(ASK, {"role": "assistant", "content": content, "tool_calls": None})
    assert "messages[1]: found neither text nor tool_calls" in fault_of(tmp_path, record)
    message = read(tmp_path, record, unparsable_calls="mask").messages[1]
    assert message.call is None and message.fault and not message.content.strip()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            asked({"tool_calls": [call()], "function_call": call()["function"]}),
            "under 'function_call' and 'tool_calls'",
        ),
        (openai(ASK, END, functions=TOOLS), "both 'tools' and 'functions'"),
        ({"messages": [ASK, END], "available_tools": TOOLS}, "'available_tools' and no 'tools'"),
        (asked({"content": "Let me look.", "invocations": [{"tool": "f", "input": {"a": 1}}]}), "key 'invocations'"),
        (asked({"content": "Let me look.", "metadata": {"raw": [call()]}}), "the key 'metadata'"),
        (asked({"content": "\u200b\ufeff\n"}), "neither text nor"),
        (asked({"tool_calls": [{**call(), "weight": 0}]}), "'weight' at one call"),
        (asked({"content": "x", "loss_mask": 0}), "the key 'loss_mask'"),
        (asked({"content": "x", "trainable": False}), "the key 'trainable'"),
        (openai(ASK, END, weight=0), "weight: found 0 at the record"),
        (openai(ASK, END, loss_mask=[0, 0]), "loss_mask: found [0, 0] at the record"),
        (openai({**ASK, "tool_calls": [call()]}, END), "messages[0]: found the key 'tool_calls' on a message"),
        (openai({**ASK, "function_call": call()["function"]}, END), "messages[0]: found the key 'function_call' on a"),
        (
            openai({"role": "system", "content": "Be kind.", "tools": TOOLS}, ASK, END, tools=None),
            "messages[0]: found the key 'tools' on a message of another role, expected the tools at the record",
        ),
        (
            {
                "conversations": [
                    {"role": "system", "content": json.dumps(TOOLS)},
                    {**ASK, "function_call": call()["function"]},
                    {"role": "assistant", "content": "find_book\n{}"},
                ]
            },
            "conversations[1]: found the key 'function_call' on a message",
        ),
        (
            {
                "tools": TOOLS,
                "conversations": [
                    {"from": "human", "value": "x"},
                    {"from": "function_call", "value": json.dumps(call()["function"]), "tool_calls": [call({})]},
                ],
            },
            "conversations[1]: found the key 'tool_calls' on a message",
        ),
        (
            openai(
                {"role": "system", "content": f"<tools>{json.dumps(TOOLS[0])}</tools>"},
                ASK,
                {"role": "assistant", "content": None, "tool_calls": [call()]},
                tools=None,
            ),
            "found tools in the system text ('<tools>')",
        ),
        (
            {
                "tools": TOOLS,
                "conversations": [
                    {"from": "human", "value": "x"},
                    {"from": "gpt", "value": "Let me look.", "weight": 0},
                    {"from": "function_call", "value": json.dumps(call()["function"])},
                ],
            },
            "another weight than that of the text",
        ),
        (asked({"tool_calls": {"name": "f"}}), "tool_calls: found an object"),
        (asked({"tool_calls": "find_book"}), "tool_calls: found 'find_book'"),
        (asked({"function_call": "auto"}), "tool_calls[0]"),
        (asked({"tool_calls": [{"function": {"name": "f", "kwargs": {"a": 1}}}]}), "'kwargs' and no 'arguments'"),
        (asked({"tool_calls": [{"function": {"name": "f", "args": {"a": 1}, "arguments": {"b": 1}}}]}), "'arguments'"),
        (asked({"tool_calls": [{"toolName": "f", "args": {}}]}), "tool_calls[0]"),
        (asked({"tool_calls": [call()]}, {"role": "tool", "name": "g", "content": "x"}), "a result of 'g'"),
        (asked({"tool_calls": [call()]}, {"role": "tool", "toolCallId": "zz", "content": "x"}), "tool_call_id 'zz'"),
        (asked({"content": [{"type": "thinking", "thinking": "x"}]}), "content[0]: found a part of 'thinking'"),
        (openai({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, END), "a part of 'image_url'"),
        (openai({"role": "user", "content": ["x"]}, END), "content[0]: found a part of 'a string'"),
        (openai({"role": "user", "content": [{"toolUse": {}}]}, END), "found a part of ['toolUse']"),
        (openai({"role": "human", "content": "x"}, END), "role 'human'"),
        (openai(ASK, END, tools="find_book"), "tools: found 'find_book'"),
        (openai(ASK, END, tools="{}"), "tools: found an object"),
        (openai(ASK, END, tools='[{"name": "f", "name": "g"}]'), "'name' twice"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "bot", "value": "y"}]}, "role 'bot'"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "y"}]}, "found 'y'"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "3"}]}, "tool_calls"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "observation", "value": "3"}]}, "after user"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": None}]}, "neither text nor"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_what_cannot_be_read_is_named(tmp_path, record, words):
    assert words in fault_of(tmp_path, record)


def test_an_authors_file_is_not_taken_for_sharegpt(tmp_path):
    """One wrong role later in the file, or a list of tools beside the messages, does not change the form."""
    authors = {
        "conversations": [
            {"role": "system", "content": json.dumps(TOOLS)},
            ASK,
            {"role": "assistant", "content": 'find_book\n{"title": "Ulysses"}'},
        ]
    }
    assert read(tmp_path, {**authors, "tools": ["find_book"]}).messages[1].call == CALL
    with pytest.raises(DataError, match="found a call in the text"):
        read(tmp_path, {"conversations": [*authors["conversations"], {"role": "human", "content": "x"}]})


@pytest.mark.parametrize(
    "text",
    [
        "I look.\nfind_book(title='Ulysses')",
        "API-Request: [find_book(title='Ulysses')]",
        '>>>find_book\n{"title": "Ulysses"}',
        '```json\n{"name": "find_book", "arguments": {"title": "Ulysses"}}\n```',
        'I look:\n```json\n{"tool": "find_book", "tool_input": {"title": "Ulysses"}}\n```',
        '{"action": "find_book", "action_input": "Ulysses"}',
        '{"find_book": {"title": "Ulysses"}}',
        "```tool_code\nprint(find_book(title='Ulysses'))\n```",
        '<|channel|>commentary to=functions.find_book<|message|>{"title": "Ulysses"}',
        "<\uff5ctool\u2581calls\u2581begin\uff5c>function",
    ],
)
def test_further_ways_to_write_a_call_into_a_text_are_refused(tmp_path, text):
    assert "found a call in the text" in fault_of(tmp_path, asked({"content": text}))


@pytest.mark.parametrize(
    "text",
    [
        "Use `find_book(title)` to search.",
        'The record is {"title": "find_book"}.',
        '```json\n{"name": "find_book"}\n```',
        "find_book\nis a tool.",
        "```\n" * 20000,
        "```" + " " * 100000 + "```",
    ],
    ids=lambda text: text[:20],
)
def test_texts_that_only_mention_a_tool_are_kept(tmp_path, text):
    assert read(tmp_path, openai(ASK, {"role": "assistant", "content": text})).messages[1].content == text


def test_unread_texts_inside_a_call_are_counted(tmp_path):
    value = json.dumps({"thought": "Hm.", **call()["function"]})
    record = {
        "tools": TOOLS,
        "conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": value}],
    }
    assert read(tmp_path, record).left_out == {"texts under 'thought' of an assistant message": 1}


@pytest.mark.parametrize("flag", [{"is_error": True}, {"isError": True}, {"status": "error"}], ids=str)
def test_results_that_the_file_calls_failed_mask_their_call(tmp_path, flag):
    """The words alone would not: "It was not on the shelf."; and a flag that says no changes nothing."""
    words = {**ANSWER, "content": "It was not on the shelf."}
    (decision, _) = decide_masked_turns(
        read(tmp_path, asked({"tool_calls": [call()]}, {**words, **flag})), "structured"
    )
    assert (decision.masked, decision.category) == (True, "tool_call_failure")
    same = {key: False if value is True else "success" for key, value in flag.items()}
    (decision, _) = decide_masked_turns(
        read(tmp_path, asked({"tool_calls": [call()]}, {**words, **same})), "structured"
    )
    assert not decision.masked
    blocks = [{"type": "tool_result", "tool_use_id": "c1", "content": "x", "is_error": flag.get("is_error")}]
    messages = read(tmp_path, asked({"tool_calls": [call()]}, {"role": "user", "content": blocks})).messages
    assert messages[2].failed == ("is_error" in flag)
    assert "is_error: found 'yes'" in fault_of(tmp_path, asked({"tool_calls": [call()]}, {**words, "is_error": "yes"}))


def test_the_authors_form_loses_nothing_in_silence(tmp_path):
    """A second call, texts beside the call, a system text and a failed result, next to the content that is read."""

    def authors(assistant: dict, feedback: dict, **rest: object) -> dict:
        return {
            "conversations": [
                {"role": "system", "content": json.dumps(TOOLS)},
                ASK,
                {"role": "assistant", "content": 'find_book\n{"title": "Ulysses"}', **assistant},
                {"role": "function", "content": "It was not on the shelf.", **feedback},
            ],
            **rest,
        }

    other = {"function_call": {"name": "find_book", "arguments": {"title": "Emma"}}}
    assert "a call under a key of its own" in fault_of(tmp_path, authors(other, {}))
    assert "the key 'calls'" in fault_of(tmp_path, authors({"calls": [call()]}, {}))
    padded = {"function_call": BOTH_NULL, "tool_calls": []}
    assert read(tmp_path, authors(padded, {"is_error": None})).messages[1].call == CALL
    trajectory = read(tmp_path, authors({"reasoning": "Hm."}, {"is_error": True}, system="Be kind."))
    assert trajectory.left_out == {
        "texts under 'system' of a record": 1,
        "texts under 'reasoning' of an assistant message": 1,
    }
    (decision,) = decide_masked_turns(trajectory, "structured")
    assert (decision.masked, decision.rule) == (True, "the data says is_error")


def test_a_text_of_nothing_on_a_message_of_another_role(tmp_path):
    record = asked({"content": None, "tool_calls": [call()]}, ANSWER)
    for text in ("null", "[]", "{}"):
        padded = {key: text for key in ("tool_calls", "function_call", "tools", "functions")}
        messages = [each if each["role"] == "assistant" else {**each, **padded} for each in record["messages"]]
        assert read(tmp_path, {**record, "messages": messages}).messages == EXPECTED


def test_a_value_of_any_depth_is_blank_or_not():
    """The reader of JSON takes about 990 levels; half as many overflowed a recursive check."""
    for leaf, blank in (("", True), (None, True), (0, False), (False, False), ("x", False)):
        value: object = leaf
        for level in range(990):
            value = [value] if level % 2 else {"a": value, "b": None}
        assert is_blank(value) is blank
