"""BFCL's reading of calls as Python source: values by hand, faults, bounds; verdicts that BFCL's own scorer gave."""

import ast
import time

import pytest

from data.tool_calls import ToolCall, ToolCallError
from eval.bfcl_source import MAX_SOURCE_CHARACTERS, arithmetic, read_source_calls

VALUES = [  # source, what BFCL's parser makes of it
    ("1/6", 1 / 6),
    ("500*500", 250000),
    ("2**10", 1024),
    ("2**-1", 0.5),
    ("-7//2", -4),
    ("-7%3", 2),
    ("(1+2)*3-4", 5),
    ("6/2", 3.0),
    ("-3", -3),
    ("-2.5", -2.5),
    ("+3", -3),  # any sign is a minus
    ("~3", -3),
    ("1+-3", -2),  # inside arithmetic a sign is a sign
    ("1-+3", -2),
    ("True+1", 2),
    ("'a'+'b'", "ab"),
    ("'a' 'b'", "ab"),
    ("Paris", "Paris"),
    ("true", True),
    ("null", None),
    ("True", True),
    ("...", "..."),
    ("(1, [2])", (1, [2])),
    ("(1)", 1),
    ("{'a': 1/2, 'b': (x,)}", {"a": 0.5, "b": ("x",)}),
    ("f(1)", "f(1)"),
    ("f(x=1+1)", {"f": {"x": 2}}),
    ("a[0]", "a[0]"),
]


@pytest.mark.parametrize("source, expected", VALUES, ids=[source for source, _ in VALUES])
def test_values(source, expected):
    (call,) = read_source_calls(f"f(a={source})")
    assert repr(call) == repr(ToolCall("f", {"a": expected}))


@pytest.mark.parametrize(
    "text, names_and_arguments",
    [
        ("f()", [("f", {})]),
        ("f(1, 2)", [("f", {})]),  # positional arguments are dropped
        ("f(1, b=2)", [("f", {"b": 2})]),
        ("f(*x, b=2)", [("f", {"b": 2})]),
        ("f(a=1, a=2)", [("f", {"a": 2})]),
        ("m.n.f(a=1)", [("m.n.f", {"a": 1})]),
        ("```\nf(a=1), g(b=2)\n```", [("f", {"a": 1}), ("g", {"b": 2})]),
        ("[f(a=1), g(b=2)]", [("f", {"a": 1}), ("g", {"b": 2})]),
        (" f(a=[1])", [("f", {"a": [1]})]),
        ("f(a='\\d')", [("f", {"a": "\\d"})]),
    ],
)
def test_calls(text, names_and_arguments):
    assert [(call.name, call.arguments) for call in read_source_calls(text)] == names_and_arguments


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "7", "f", "f(", "f(a=1", "f(a=1); g(b=2)", "[f(a=1), 2]", "f(a=1) text", "f()()", "[1](a=1)"),
        *(f"f(a={value})" for value in ("-(1/6)", "--3", "-x", "-'x'", "1+x", "x.y", "not x", "1 < 2", "{1, 2}")),
        *(f"f(a={value})" for value in ("lambda: 1", "f'{x}'", "b'x'", "1j", "{1: 2}", "{**x}", "[*x]", "'x'*3")),
        *(f"f(a={value})" for value in ("1/0", "1e999", "1e308*10", "(-8)**0.5", "0**-1", "'a'-'b'", "1<<2", "7@8")),
        *(f"f(a={value})" for value in ("2**99999", "2**2**2**9", "9**9**9", "10**4000*10**4000", "9" * 5000)),
        *("f(**{'a': 1})", "\0", "\ud800(a=1)", "f(a='" + "x" * MAX_SOURCE_CHARACTERS + "')", "f(a=1 if b else 2)"),
        *("f(a=" + "[" * 250 + "]" * 250 + ")", "(" * 9000, "-" * 9000 + "1", "f(a=" + "1+" * 7000 + "1)"),
        *("f(a=" + "-" * 7000 + "1)", "f(a=" + "b(" * 80 + ")" * 80 + ")[", ", ".join(["f(a=1)"] * 65)),
        *("f(a=__import__('os').abort()+1)", "f(a=(1).__class__+1)", "f(a=[x for x in y])", "f(a=(y:=1))"),
    ],
)
def test_anything_else_is_refused_soon_and_on_one_line(text):
    start = time.process_time()
    with pytest.raises(ToolCallError) as caught:
        read_source_calls(text)
    assert time.process_time() - start < 1 and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_arithmetic_is_pythons_on_random_expressions():
    """Oracle: literal_eval cannot do it, so the expected values are from exact fractions of integers."""
    from fractions import Fraction
    from random import Random

    draw = Random(3)
    for _ in range(2000):
        source, value = str(draw.randint(-9, 9)), None
        value = Fraction(source)
        for _ in range(draw.randint(1, 5)):
            number = draw.randint(1, 9)
            sign = draw.choice(["+", "-", "*", "//", "%"])
            source = f"({source}){sign}{number}"
            if sign in "+-*":
                value = {"+": value + number, "-": value - number, "*": value * number}[sign]
            else:
                quotient = (value / number).__floor__()
                value = Fraction(quotient) if sign == "//" else value - quotient * number
        assert arithmetic(ast.parse(source, mode="eval").body) == value, source
