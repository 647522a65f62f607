"""The base model's call form: accepted forms, refused forms, random damage."""

import random

import pytest

from data.formats.plain import parse_plain_call
from data.tool_calls import ToolCall, ToolCallError


@pytest.mark.parametrize(
    "text, name, arguments",
    [
        (' get_weather(city: "Oslo", days: 3).', "get_weather", {"city": "Oslo", "days": 3}),
        ("list_all().", "list_all", {}),
        ('f(a: "x, y): .", b: -1.5e2, c: 0).\nUser: next', "f", {"a": "x, y): .", "b": -150.0, "c": 0}),
        ('\n f( a :"\\u00e9\\"" , b:"" ) . ', "f", {"a": '\u00e9"', "b": ""}),
        ('preferred-routes_get(class: "A").', "preferred-routes_get", {"class": "A"}),
    ],
)
def test_plain_calls(text, name, arguments):
    assert parse_plain_call(text) == ToolCall(name, arguments)
    assert all(type(value) is type(arguments[key]) for key, value in parse_plain_call(text).arguments.items())


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "f",
        "f(",
        "f()",
        "f().x",
        "f() f().",
        "f(a).",
        'f("x").',
        'f(a="x").',
        'f(a: "x",).',
        'f(, a: "x").',
        'f(a: "x" b: "y").',
        'f(a: "x", a: "y").',
        "f(a: x).",
        "f(a: 'x').",
        "f(a: true).",
        "f(a: [1]).",
        "f(a: 01).",
        "f(a: 1_0).",
        "f(a: 1.).",
        'f(a: "x).',
        'f(a: "\\q").',
        'f(a: "tab\there").',
        "f(a: 1e999).",
        "f(a: " + "9" * 5000 + ").",
        '(a: "x").',
        'two words(a: "x").',
        'f(a: "x")..',
        "f(a: 1;).",
        'f(\na: "x").',
        "\x00",
        "f(" * 10_000,
        "f(a: nan).",
    ],
)
def test_malformed_plain_calls_fail_with_a_reason(text):
    with pytest.raises(ToolCallError) as caught:
        parse_plain_call(text)
    assert "found" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_mutated_plain_calls_never_crash():
    draw = random.Random(7)
    source = 'get_weather(city: "Oslo", days: 3, note: "a \\" b").'
    parsed = 0
    for _ in range(20_000):
        text = list(source)
        for _ in range(draw.randint(1, 4)):
            position = draw.randrange(len(text))
            text[position] = draw.choice(['"', "(", ")", ":", ",", ".", "\\", "\n", "x", "7", "\ud800", "\u2603", ""])
        try:
            parse_plain_call("".join(text))
            parsed += 1
        except ToolCallError:
            pass
    assert 100 < parsed < 19_000
