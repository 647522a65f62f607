"""data/formats/: each format's own outputs, faults with a reason, round trips, hostile text."""

import json
import random
import time

import pytest

from data.formats.call_text import MAX_CALLS
from data.formats.table import FORMATS, PROMPT_FORMATS, parse_output, render_output
from data.tool_calls import ToolCall, ToolCallError
from tests.data.test_tool_calls import PARAMETERS, random_value, short_id, strictly_equal

RENDERED = [name for name in PROMPT_FORMATS if name != "plain"]
PARALLEL = ["nexusraven", "chatglm4", "llama31", "qwen25", "openai"]
ADVICE = ToolCall("random_advice", {})
# Outputs of the paper's Table 14, quotes straightened; it prints all of them on one line.
EXCHANGE = ToolCall("get_exchange_rate", {"from_currency": "EUR", "to_currency": "GBP"})
TRENDS = ToolCall("google_trends_search", {"query": "school", "data_type": "related_topics"})
NOBEL = ToolCall("get_nobel_results", {"year": "2018"})
BITCOIN = ToolCall("google_trends_search", {"query": "Bitcoin", "data_type": "RELATED_QUERIES", "limit": "5"})
LONDON = ToolCall("forecast", {"q": "London", "days": "7", "api_key": "your_api_key"})
OSLO, ROME = ToolCall("get_weather", {"city": "Oslo", "days": 3}), ToolCall("get_weather", {"city": "Rome", "days": 1})


def tool_calls(*functions):
    return json.dumps(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": f"c{index}", "type": "function", "function": function}
                for index, function in enumerate(functions)
            ],
        }
    )


ACCEPTED = [
    ("tl", "random_advice()", [ADVICE]),
    ("tl", ' get_weather(city="Oslo", days=3)\n', [OSLO]),
    ("plain", ' get_weather(city: "Oslo", days: 3).\nUser: thanks', [OSLO]),
    ("toolllama", 'Thought: ... Action: get_nobel_results Action Input: { "year": "2018" }', [NOBEL]),
    ("toolllama", "\nThought: advice.\nAction: random_advice\nAction Input: {}</s>", [ADVICE]),
    ("toolllama", "Thought: Action: is next.\nAction: random_advice\nAction Input:\n{\n}\n", [ADVICE]),
    (
        "qwen2",
        ('Thought: ... Action: google_trends_search Action Input: {"query": "school", "data_type": "related_topics"}'),
        [TRENDS],
    ),
    (
        "qwen2",
        (
            'Action: get_weather\nAction Input: {"city": "Oslo", "days": 3}\nObservation: rain\nThought: Now.\n'
            'Action: finish\nAction Input: {"answer": "rain"}'
        ),
        [OSLO],
    ),
    ("qwen2", "Thought: x\nAction: random_advice\nAction Input: {}<|im_end|>", [ADVICE]),
    ("nexusraven", "Call: random_advice()<bot_end>\nThought: The function f(x) gives advice; that's all.", [ADVICE]),
    (
        "nexusraven",
        "\nCall: get_weather(city='Oslo', days=3); get_weather(city='Rome', days=1)<bot_end>\n",
        [OSLO, ROME],
    ),
    ("nexusraven", "get_weather(city='Oslo', days=3);\nThought: done", [OSLO]),
    (
        "nexusraven",
        "Call: f(a=\"it's; (not) over<bot_end>\\nThought:\", b=[{'c': None}, (1, 2)])",
        [ToolCall("f", {"a": "it's; (not) over<bot_end>\nThought:", "b": [{"c": None}, [1, 2]]})],
    ),
    ("chatglm4", 'get_exchange_rate {"from_currency": "EUR", "to_currency": "GBP"}', [EXCHANGE]),
    ("chatglm4", "random_advice\n{}<|observation|>", [ADVICE]),
    (
        "chatglm4",
        'get_weather\n{"city": "Oslo", "days": 3}<|assistant|>get_weather\n{"city": "Rome", "days": 1}',
        [OSLO, ROME],
    ),
    ("llama31", '{"name": "random_advice", "parameters": {}}<|eot_id|>', [ADVICE]),
    (
        "llama31",
        (
            '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}'
            "<|eom_id|>"
        ),
        [OSLO],
    ),
    (
        "llama31",
        (
            '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}};\n'
            '{"name": "get_weather", "arguments": {"days": 1, "city": "Rome"}}'
        ),
        [OSLO, ROME],
    ),
    ("qwen25", '{"arguments": {"q": "London", "days": "7", "api_key": "your_api_key"}, "name": "forecast"}', [LONDON]),
    ("qwen25", '<tool_call>\n{"name": "random_advice", "arguments": {}}\n</tool_call><|im_end|>\n', [ADVICE]),
    (
        "qwen25",
        (
            'I ask for {both}.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}'
            "\n</tool_call>\n<tool_call>"
            '{"name": "get_weather", "arguments": {"city": "Rome", "days": 1}}</tool_call>'
        ),
        [OSLO, ROME],
    ),
    (
        "openai",
        (
            '{"arguments": {"query": "Bitcoin", "data_type": "RELATED_QUERIES", "limit": "5"}, '
            '"name": "google_trends_search"}'
        ),
        [BITCOIN],
    ),
    ("openai", tool_calls({"name": "random_advice", "arguments": "{}"}), [ADVICE]),
    ("openai", tool_calls({"name": "random_advice", "arguments": ""}), [ADVICE]),
    ("openai", tool_calls({"name": "random_advice"}), [ADVICE]),
    (
        "openai",
        tool_calls(
            {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 3}'},
            {"name": "get_weather", "arguments": '{"city": "Rome", "days": 1}'},
        ),
        [OSLO, ROME],
    ),
    ("openai", '[{"function": {"name": "random_advice", "arguments": "{}"}}]', [ADVICE]),
    ("react", 'Thought: I look.\nAction: get_weather\nAction Input: {"city": "Oslo", "days": 3}', [OSLO]),
    ("react", "Action: get_weather\nAction Input: {'city': 'Oslo', 'days': 3}\n", [OSLO]),
    ("react", "Thought: Action: is next.\nAction: random_advice\nAction Input:\n{\n}\n", [ADVICE]),
    # ToolEyes' loop ends at `finish` whatever stands behind it; it adds the end of arguments that were cut off.
    ("react", 'Action: finish\nAction Input: {"answer": "It rai', [ToolCall("finish", {"answer": "It rai"})]),
    ("react", "Action: Finish\nAction Input: it rains", [ToolCall("Finish", {})]),
    ("react", 'Action: finish\nAction Input: ["rain"]', [ToolCall("finish", {})]),
    ("react", "Action: finish\nAction Input:", [ToolCall("finish", {})]),
]
ACTION = "Thought: x\nAction: f\nAction Input: "
REFUSED = [
    ("tl", "f() f()", "end of the text"),
    ("tl", "I think f() is best", "'('"),
    ("tl", 'f(a: "x").', "parameter=value"),
    ("plain", "f(a=1)", "':'"),
    *(
        case
        for name in ("toolllama", "qwen2")
        for case in (
            (name, "Thought: done\nFinal Answer: 42", "'Action:'"),
            (name, "Action Input: {}", "'Action:' before"),
            (name, ACTION, "JSON"),
            (name, ACTION + "{'a': 1}", "JSON"),
            (name, ACTION + '{"a": 1', "JSON"),
            (name, ACTION + '{"a": 1} ok', "end of the text"),
            (name, ACTION + "[1]", "dict"),
            (name, ACTION + '"x"', "dict"),
            (name, ACTION + '{"a": NaN}', "no such number"),
            (name, ACTION + '{"a": 1e999}', "finite"),
            (name, ACTION + '{"a": 1, "a": 2}', "twice"),
            (name, ACTION + '{"a": "raw\nbreak"}', "JSON"),
            (name, "Action: two words\nAction Input: {}", "name"),
            (name, "Action: \nAction Input: {}", "name"),
        )
    ),
    ("toolllama", ACTION + "{}\nObservation: mine", "end of the text"),
    ("react", "Thought: done\nFinal Answer: 42", "'Action:'"),
    ("react", "Action Input: {}", "'Action:' before"),
    ("react", "Action: finish", "'Action Input:'"),
    ("react", ACTION, "a value"),
    ("react", ACTION + '{"a": 1', "'}'"),
    ("react", ACTION + '{"a": 1} ok', "end of the text"),
    ("react", ACTION + "[1]", "dict"),
    ("react", ACTION + "{}\nFunction: mine", "end of the text"),
    ("react", ACTION + '{"a": 1e999}', "finite"),
    ("react", ACTION + '{"a": f()}', "a value"),
    ("react", ACTION + '{"a": 1, "a": 2}', "again"),
    ("react", "Action: two words\nAction Input: {}", "name"),
    ("react", "Action: \nAction Input: {}", "name"),
    ("nexusraven", "Call: f(1)", "positional"),
    ("nexusraven", "Call: f(a=g(b=1))", "a value"),
    ("nexusraven", "Call: f(a=1) g(b=2)", "end of the text"),
    ("nexusraven", "Call: f(a='x<bot_end>", "closing quote"),
    ("nexusraven", "Call: <bot_end>", "a tool name"),
    ("nexusraven", "Call: f();; g()", "a tool name"),
    ("chatglm4", "\nThe weather is fine.", "JSON"),
    ("chatglm4", "f", "JSON"),
    ("chatglm4", "f\n[]", "dict"),
    ("chatglm4", 'f\n{"a": 1}\nThat was it.', "JSON"),
    ("chatglm4", "{}", "a tool name"),
    ("llama31", '{"name": "f"}', '"parameters" or "arguments"'),
    ("llama31", '{"parameters": {}}', '"name"'),
    ("llama31", '{"name": "f", "parameters": {}, "arguments": {}}', "expected an object"),
    ("llama31", '{"name": "f", "parameters": null}', "dict"),
    ("llama31", '{"name": ["f"], "parameters": {}}', "string"),
    ("llama31", 'Sure: {"name": "f", "parameters": {}}', "JSON"),
    ("llama31", "[]", "a list"),
    ("llama31", "f()", "JSON"),
    ("llama31", '{"name": "f", "parameters": {}} I hope', "JSON"),
    ("qwen25", "The answer is 42.", "JSON"),
    ("qwen25", "<tool_call>\n</tool_call>", "JSON"),
    ("qwen25", '<tool_call>{"name": "f", "arguments": {}}', "</tool_call>"),
    ("qwen25", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "dict"),
    ("qwen25", '<tool_call>{"name": "f", "arguments": {}}</tool_call> Done.', "end of the text"),
    ("qwen25", '<tool_call>{"name": "f", "parameters": {}}</tool_call>', '"arguments"'),
    ("openai", '{"role": "assistant", "content": "42", "tool_calls": null}', "tool_calls"),
    ("openai", '{"tool_calls": []}', "tool_calls"),
    ("openai", '{"tool_calls": [5]}', "expected an object"),
    ("openai", '{"role": "assistant", "content": "42"}', '"name"'),
    ("openai", "hello", "JSON"),
    ("openai", tool_calls({"name": "f", "arguments": "{'a': 1}"}), "JSON"),
    ("openai", tool_calls({"name": "f", "arguments": "{} {}"}), "end of the text"),
    ("openai", tool_calls({"name": "f", "arguments": "3"}), "dict"),
    ("openai", '{"tool_calls": [{"function": null}]}', "expected an object"),
    ("openai", "null", "null"),
]
HOSTILE = [
    "",
    " ",
    "\x00",
    "\ud800",
    "[]",
    "{}",
    "null",
    "5",
    "true",
    '"x"',
    "Action: Action Input:",
    "<tool_call>",
    "Call:",
    ";",
    '{"name": "\\ud800", "parameters": {}, "arguments": {}}',
    "[" * 100_000,
    '{"a":' * 100_000,
    "f(a=" + "[" * 100_000,
    '"' + '\\"' * 400_000,
    "'" * 999_999,
    "Call: f(a='" + "\\'" * 400_000,
    "Action: " * 120_000,
    "Action Input: " * 70_000,
    "<tool_call>" * 90_000,
    "f\n{}" * 250_000,
    "f();" * 250_000,
    '{"name":"f","parameters":{}};' * 30_000,
    "Action: f\nAction Input: " + "9" * 1_000_000,
    " " * 1_000_000,
    "\nThought:" * 100_000,
    "<|eot_id|>" * 100_000,
    "a" * 1_000_000,
    "Call: f(a=1)" + "\n" * 1_000_000 + "x",
    '{"name": "f", "arguments": {' + ", ".join(f'"k{i}": 1' for i in range(60_000)) + ', "k59999": 2}}',
]


def fault_of(output, output_format):
    """The reason of a refused output, None for an accepted one; no other exception passes."""
    try:
        calls = parse_output(output, output_format)
    except ToolCallError as error:
        message = str(error)
        assert message.isascii() and message.isprintable() and len(message) < 300 and "found" in message
        return message
    assert 1 <= len(calls) <= MAX_CALLS and all(isinstance(call, ToolCall) for call in calls)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(("output_format", "output", "calls"), ACCEPTED, ids=short_id)
def test_own_outputs_are_read(output_format, output, calls):
    found = parse_output(output, output_format)
    assert [call.name for call in found] == [call.name for call in calls]
    for call, expected in zip(found, calls, strict=True):
        assert call == expected and all(
            strictly_equal(call.arguments[key], expected.arguments[key]) for key in expected.arguments
        )


@pytest.mark.parametrize(("output_format", "output", "reason"), REFUSED, ids=short_id)
def test_malformed_outputs_fail_with_a_reason(output_format, output, reason):
    message = fault_of(output, output_format)
    assert message is not None and reason in message


def test_every_format_has_cases():
    assert {case[0] for case in ACCEPTED} == {case[0] for case in REFUSED} == set(PROMPT_FORMATS)


def test_unknown_formats_and_outputs_that_are_no_text():
    for name in ("xml", "", "TL"):
        with pytest.raises(ValueError, match="expected one of tl, plain, toolllama"):
            parse_output("f()", name)
        with pytest.raises(ValueError, match="expected one of"):
            render_output([ADVICE], name)
    for output_format in PROMPT_FORMATS:
        for value in (None, 5, ["f()"], {"name": "f"}):
            assert "expected" in fault_of(value, output_format)


# ---------------------------------------------------------------------------------------------------------------------
# Round trip


def random_calls(rng, output_format):
    names = ["f", "get_news", "preferred-routes_search_get", "a.b.c", "x/y:z", "class", "\u691c\u7d22", "1st", "Action"]
    count = rng.randint(1, 4) if output_format in PARALLEL else 1
    return [
        ToolCall(rng.choice(names), {rng.choice(PARAMETERS): random_value(rng, 3) for _ in range(rng.randrange(4))})
        for _ in range(count)
    ]


@pytest.mark.parametrize("output_format", RENDERED)
def test_round_trip_keeps_calls_and_types(output_format):
    rng = random.Random(3)
    for _ in range(150):
        calls = random_calls(rng, output_format)
        text = render_output(calls, output_format)
        text.encode()  # no lone surrogate is left raw
        for ending in ("", "\n", *(mark for mark in FORMATS[output_format].stop_strings if mark.startswith("<"))):
            found = parse_output(text + ending, output_format)
            assert len(found) == len(calls)
            for call, expected in zip(found, calls, strict=True):
                assert call.name == expected.name and strictly_equal(call.arguments, expected.arguments), text


@pytest.mark.parametrize("output_format", RENDERED)
def test_what_a_format_cannot_hold_is_refused(output_format):
    for calls in ([], [ToolCall("a b", {})], [ToolCall("f", {"a": float("nan")})], [ToolCall("f", {"a": (1,)})]):
        with pytest.raises(ToolCallError):
            render_output(calls, output_format)
    if output_format not in PARALLEL:
        with pytest.raises(ToolCallError, match="found 2 calls, expected one"):
            render_output([ADVICE, ADVICE], output_format)


@pytest.mark.parametrize("output_format", PARALLEL)
def test_number_of_calls_is_bounded(output_format):
    assert len(parse_output(render_output([ADVICE] * MAX_CALLS, output_format), output_format)) == MAX_CALLS
    assert "more than 64" in fault_of(render_output([ADVICE] * (MAX_CALLS + 1), output_format), output_format)


def test_rendered_forms():
    assert render_output([OSLO], "qwen2") == (
        'Thought: \nAction: get_weather\nAction Input: {"city": "Oslo", "days": 3}'
    )
    assert render_output([ADVICE, ADVICE], "nexusraven") == "Call: random_advice(); random_advice()"
    assert render_output([ADVICE], "chatglm4") == "random_advice\n{}"
    assert render_output([ADVICE], "llama31") == '{"name": "random_advice", "parameters": {}}'
    assert render_output([ADVICE], "qwen25") == '<tool_call>\n{"name": "random_advice", "arguments": {}}\n</tool_call>'
    assert json.loads(render_output([OSLO], "openai"))["tool_calls"] == [
        {
            "id": "call_0",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 3}'},
        }
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Hostile


@pytest.mark.parametrize("output_format", PROMPT_FORMATS)
def test_hostile_outputs_fail_fast_with_a_reason(output_format):
    for text in HOSTILE:
        start = time.process_time()
        fault_of(text, output_format)
        assert time.process_time() - start < 2, (output_format, text[:30])


@pytest.mark.parametrize("output_format", PROMPT_FORMATS)
def test_mutated_outputs_never_crash(output_format):
    rng = random.Random(5)
    sources = [output for name, output, _ in ACCEPTED if name == output_format]
    pieces = [
        '"',
        "'",
        "(",
        ")",
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        ";",
        "\\",
        "\n",
        "x",
        "7",
        "\ud800",
        "\u2603",
        "",
        "null",
        "Action:",
        "Action Input:",
        "<tool_call>",
        "</tool_call>",
        "<bot_end>",
        "NaN",
        "<|assistant|>",
        "\\u12",
    ]
    accepted = 0
    for _ in range(1500):
        text = list(rng.choice(sources))
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.choice(pieces)
        accepted += fault_of("".join(text), output_format) is None
    assert 15 < accepted < 1400
