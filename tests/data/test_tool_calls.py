"""data/tool_calls.py: round trip on random JSON values, Python's own parser as oracle, hostile text."""

import ast
import json
import random
import re
import time
import warnings

import pytest

from data.tool_calls import MAX_NESTING, ToolCall, ToolCallError, parse_tool_call, parse_value, render_tool_call

NASTY = [
    "",
    " ",
    "'",
    '"',
    "\\",
    "\\n",
    "\n",
    "\r\n",
    "\t",
    "\x00",
    "\x1f",
    "\x7f",
    "\x85",
    "\u2028",
    "\u2029",
    "\ufeff",
    "\ud800",
    "\udfff",
    "\U0001f600",
    "\u00e9",
    "e\u0301",
    "\u4e2d",
    ")",
    "(",
    "[",
    "]",
    "{",
    "}",
    ",",
    "=",
    ":",
    "#",
    "/",
    "//",
    "it's",
    'say "hi"',
    "f(a=1)",
    "**",
    "*a",
    "None",
    "true",
    "\\u0041",
    "</s>",
    "\nAssistant:",
    "'''",
    '"""',
    "{x}",
    "%s",
    "a,b=c)",
    "\\\n",
    "\\'",
]
NAMES = ["f", "get_news", "preferred-routes_search_get", "a.b.c", "x/y:z", "class", "\u691c\u7d22", "1st", "f*", "#x"]
PARAMETERS = [
    "a",
    "from",
    "class",
    "None",
    "true",
    "code:",
    "1st",
    "with space",
    "",
    "a=b",
    "'",
    '"',
    "**kw",
    "*args",
    "a,b",
    "\u00e9",
    "x-y",
    "\n",
    "\ud800",
    "(",
    "]",
    "{}",
    "lambda",
    "\ufb01",
    "q.r",
    "$filter",
    "@type",
    "a\\b",
    "#",
]


def short_id(value: object) -> str:
    """A test id: values as long as a megabyte or 5,000 digits must not end up in one."""
    return ascii(value)[:30] if isinstance(value, str) else type(value).__name__


def strictly_equal(left: object, right: object) -> bool:
    """Equality that keeps 1, 1.0 and True apart, 0.0 and -0.0 too, and the order of keys."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(strictly_equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(strictly_equal, left, right))
    return repr(left) == repr(right)


def random_string(rng: random.Random) -> str:
    count = rng.randrange(6)
    text = "".join(rng.choice(NASTY) if rng.random() < 0.6 else chr(rng.randrange(32, 127)) for _ in range(count))
    # A high surrogate beside a low one is no JSON string: json.loads makes one character of the two.
    return re.sub("[\ud800-\udfff]{2,}", "", text)


def random_value(rng: random.Random, depth: int) -> object:
    kind = rng.randrange(10 if depth else 8)
    if kind == 8:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 9:
        return {random_string(rng): random_value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return (
        None,
        True,
        False,
        rng.randrange(-10, 10),
        rng.choice((10**40, -(10**400), 2**63)),
        rng.choice((0.0, -0.0, 1.0, 1e300, 5e-324, 0.1, -2.5e-7, 1e16, 123456789.125)),
        random_string(rng),
        random_string(rng),
    )[kind]


# ---------------------------------------------------------------------------------------------------------------------
# Round trip


def test_round_trip_keeps_random_json_values_and_their_types():
    rng = random.Random(1)
    for _ in range(4000):
        arguments = {rng.choice(PARAMETERS): random_value(rng, 4) for _ in range(rng.randrange(5))}
        call = ToolCall(rng.choice(NAMES), arguments)
        text = render_tool_call(call)
        text.encode()  # no lone surrogate is left raw: a tokenizer can encode every rendered call
        again = parse_tool_call(text)
        assert again.name == call.name and strictly_equal(again.arguments, arguments), text


def test_strict_equality_of_this_file_tells_types_apart():
    assert not strictly_equal(1, True) and not strictly_equal(1, 1.0) and not strictly_equal([0.0], [-0.0])
    assert not strictly_equal({"a": 1, "b": 2}, {"b": 2, "a": 1}) and strictly_equal({"a": [1, None]}, {"a": [1, None]})


def test_rendered_form_is_the_one_of_the_paper():
    assert render_tool_call(ToolCall("random_advice", {})) == "random_advice()"
    assert render_tool_call(ToolCall("name", {"p": "value", "q": 3})) == 'name(p="value", q=3)'
    call = ToolCall("f", {"a": [1, 2.0, None], "b": {"k": True}, "c": 'it\'s "x"\n\u00e9'})
    assert render_tool_call(call) == 'f(a=[1, 2.0, null], b={"k": true}, c="it\'s \\"x\\"\\n\u00e9")'
    assert render_tool_call(ToolCall("f", {"a": 1, "odd key": 2, "b": 3})) == 'f(a=1, **{"odd key": 2}, b=3)'


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        {1: 2},
        {"a": {None: 1}},
        (1, 2),
        b"x",
        {1},
        1j,
        object(),
        10**5000,
        [float("nan")],
    ],
    ids=short_id,
)
def test_values_that_json_lacks_are_refused(value):
    with pytest.raises(ToolCallError):
        render_tool_call(ToolCall("f", {"a": value}))


@pytest.mark.parametrize(
    "name", ["", "a b", "f(", "a\nb", "a=b", "a,b", "'f'", "\ud800", "f\x00", None, 3], ids=short_id
)
def test_names_outside_the_grammar_are_refused(name):
    with pytest.raises(ToolCallError):
        render_tool_call(ToolCall(name, {}))


def test_cyclic_and_deep_values_are_refused_not_followed():
    cyclic: list = []
    cyclic.append(cyclic)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (cyclic, deep):
        with pytest.raises(ToolCallError, match="nested"):
            render_tool_call(ToolCall("f", {"a": value}))


@pytest.mark.parametrize("key", ["a", "odd key"])
def test_deepest_value_that_renders_also_parses(key):
    value: object = 1
    for _ in range(MAX_NESTING - 1):
        value = [value]
    call = ToolCall("f", {key: value})
    assert parse_tool_call(render_tool_call(call)) == call
    with pytest.raises(ToolCallError):
        render_tool_call(ToolCall("f", {key: [value]}))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("f()", {}),
        (" f ( ) \n", {}),
        ("f(a=1,)", {"a": 1}),
        ("f(\n  a = 1 ,\n  b = 'x'\n)", {"a": 1, "b": "x"}),
        (
            "f(a=true, b=True, c=false, d=False, e=null, g=None)",
            {"a": True, "b": True, "c": False, "d": False, "e": None, "g": None},
        ),
        (
            "f(a=-1, b=+2, c=-1.5e-3, d=1., e=.5, g=1E5, h=-0.0, i=0)",
            {"a": -1, "b": 2, "c": -0.0015, "d": 1.0, "e": 0.5, "g": 1e5, "h": -0.0, "i": 0},
        ),
        ("f(a='it\\'s', b=\"it's\", c='a)b(c,d=e')", {"a": "it's", "b": "it's", "c": "a)b(c,d=e"}),
        (
            "f(a=\"\\ud83d\\ude00\", b='\\/', c='\\d', d='\\x41\\101', e='\\N{BULLET}', g='\\ud800')",
            {"a": "\U0001f600", "b": "/", "c": "\\d", "d": "AA", "e": "\u2022", "g": "\ud800"},
        ),
        ("f(a='raw\nbreak\x00\u2028', b='mixed\\n\n')", {"a": "raw\nbreak\x00\u2028", "b": "mixed\n\n"}),
        (
            "f(a=[1, [2, {'k': (3, 4)}],], b=(), c=(1,), d=(1), e=[[]], g={})",
            {"a": [1, [2, {"k": [3, 4]}]], "b": [], "c": [1], "d": 1, "e": [[]], "g": {}},
        ),
        ("f(**{'odd key': 1, 'b': 2}, c=3, **{})", {"odd key": 1, "b": 2, "c": 3}),
        ("f(from='x', class=1, code:='y', if=None)", {"from": "x", "class": 1, "code:": "y", "if": None}),
    ],
)
def test_accepted_forms(text, arguments):
    call = parse_tool_call(text)
    assert call.name == "f" and strictly_equal(call.arguments, arguments)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "f",
        "f(",
        "f(a",
        "f(a=",
        "f(a=1",
        "f)",
        "()",
        "(a=1)",
        "f(a=1))",
        "f(a=1) ok",
        "f(a=1) f(b=2)",
        "f(a=1)g(b=2)",
        "f(a=1);",
        "I call f(a=1)",
        "'f'(a=1)",
        "f[0](a=1)",
        "f('x')",
        "f(1)",
        "f(x)",
        "f(a=1, 2)",
        "f(a=1, a=1)",
        "f(a=1, **{'a': 2})",
        "f(*[1])",
        "f(**[1])",
        "f(**1)",
        "f(**'x')",
        "f(***{})",
        "f(,)",
        "f(a=1,,b=2)",
        "f(a=,b=1)",
        "f(a 1)",
        "f(a=1 b=2)",
        "f(=1)",
        "f(a==1)",
        "f(a:=)",
        "f('a'=1)",
        "f(a='x' 'y')",
        "f(a='x''y')",
        'f(a="""x""")',
        "f(a='''x''')",
        "f(a=f'x')",
        "f(a=r'x')",
        "f(a=b'x')",
        "f(a=u'x')",
        "f(a=x)",
        "f(a=g())",
        "f(a=x.y)",
        "f(a=[x for x in y])",
        "f(a=[1 for x in y])",
        "f(a=lambda: 1)",
        "f(a=1+2)",
        "f(a=--1)",
        "f(a=- 1)",
        "f(a=not 1)",
        "f(a=1 if 1 else 2)",
        "f(a={1, 2})",
        "f(a={'x'})",
        "f(a={1: 2})",
        "f(a={x: 2})",
        "f(a={'x': 1, 'x': 2})",
        "f(a={**{}})",
        "f(a={{}})",
        "f(a={{'x': 1}: 2})",
        "f(a={[1]: 2})",
        "f(a=[1, *[2]])",
        "f(a=[1,,2])",
        "f(a=[,])",
        "f(a=[1)",
        "f(a=(1])",
        "f(a={'x':})",
        "f(a={'x' 1})",
        "f(a=1j)",
        "f(a=0x10)",
        "f(a=1_000)",
        "f(a=007)",
        "f(a=1e)",
        "f(a=.)",
        "f(a=...)",
        "f(a=1e999)",
        "f(a=nan)",
        "f(a=NaN)",
        "f(a=Infinity)",
        "f(a=-inf)",
        "f(a=TRUE)",
        "f(a=trueish)",
        "f(a='x)",
        "f(a=\"x')",
        "f(a='\\')",
        "f(a='\\x4')",
        "f(a='\\u12')",
        "f(a='\\N{NO SUCH}')",
        "f(a=`x`)",
        "f(a=1) # done",
        "f(a=1)\x00",
        "\x00f()",
        "\ud800()",
        "f(\ud800=1)",
        '{"name": "f"}',
        "__import__('os').system('x')",
    ],
    ids=short_id,
)
def test_everything_else_is_a_tool_call_error_with_a_one_line_ascii_reason(text):
    with pytest.raises(ToolCallError) as raised:
        parse_tool_call(text)
    reason = str(raised.value)
    assert "found" in reason and ("expected" in reason or "broken" in reason)
    assert reason.isascii() and "\n" not in reason and len(reason) < 250


@pytest.mark.parametrize("value", [None, 3, b"f()", ["f()"]])
def test_other_types_than_text_are_refused(value):
    with pytest.raises(ToolCallError):
        parse_tool_call(value)


def test_parse_value_reads_json_and_python_literals():
    assert parse_value(' {"a": [null, True]} ') == {"a": [None, True]}
    assert parse_value("{'error': None}") == {"error": None}
    for text in ("", "{} x", "{'a'}", "x", "NaN"):
        with pytest.raises(ToolCallError):
            parse_value(text)


# ---------------------------------------------------------------------------------------------------------------------
# Oracle


def python_reading(text: str) -> tuple[str, dict] | None:
    """Name and arguments by CPython's parser; None unless the text is `name(keyword=literal, ...)` in its eyes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            node = ast.parse(text.strip(), mode="eval").body
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
                return None
            pairs = [(keyword.arg, ast.literal_eval(keyword.value)) for keyword in node.keywords]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return node.func.id, dict(pairs)


def as_json_types(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [as_json_types(item) for item in value]
    return {key: as_json_types(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_mutated_calls_read_as_python_reads_them_or_not_at_all():
    rng = random.Random(2)
    pieces = [
        *"()[]{},='\"\\:*-+.0123eEx \n\tnrtu",
        "True",
        "None",
        "a=",
        "b='x'",
        "[1, 2]",
        "{'k': 1}",
        "\\x41",
        "\\u0041",
        "1.5",
    ]
    originals = ("f(a=1, b='x')", 'g(a="it\'s", b=[1, 2.5, {"k": None}], c=-3)', "h(a='\\n\\\\', b=(1, 2))", "f()")
    agreed = 0
    for _ in range(20_000):
        text = list(rng.choice(originals))
        for _ in range(rng.randrange(4)):
            place = rng.randrange(len(text) + 1)
            text[place : place + rng.randrange(3)] = rng.choice(pieces)
        text = "".join(text)
        expected = python_reading(text)
        try:
            call = parse_tool_call(text)
        except ToolCallError:
            continue
        # A backslash before a raw line break is data here, a line continuation in Python source.
        if expected and None not in expected[1] and "\\\n" not in text:
            assert (call.name, True) == (expected[0], strictly_equal(call.arguments, as_json_types(expected[1]))), text
            agreed += 1
    assert agreed > 4000


def test_rendered_values_are_json():
    rng = random.Random(3)
    for _ in range(500):
        value = random_value(rng, 3)
        text = render_tool_call(ToolCall("f", {"a": value}))
        assert strictly_equal(json.loads(text.removeprefix("f(a=").removesuffix(")")), value)


# ---------------------------------------------------------------------------------------------------------------------
# Size and time

MEGABYTE = 1_000_000  # characters


@pytest.mark.parametrize(
    "text",
    [
        "f(a=" + "[" * 100_000,
        "f(a=" + "[" * 100_000 + "]" * 100_000 + ")",
        "f(a=" + '{"a":' * 100_000,
        "f(a=" + "(" * 100_000,
        "f(a=" + "-" * MEGABYTE + "1)",
        "f(a=" + "1" * MEGABYTE + ")",
        "f(a=1" + "0" * MEGABYTE + ".0)",
        "f(a=1e" + "9" * MEGABYTE + ")",
        'f(a="' + "\\" * MEGABYTE,
        'f(a="' + "x" * MEGABYTE,
        "f(a='" + '"' * MEGABYTE,
        "f" * MEGABYTE,
        "f(" + " " * MEGABYTE,
        "f(" + "a" * MEGABYTE,
        "," * MEGABYTE,
        " " * MEGABYTE,
        "f(a=" + "true" * 250_000,
        "f(" * 300_000,
        "f()" * 300_000,
        "'" * MEGABYTE,
        "f(a=[" + "," * MEGABYTE,
        "f(" + "**{}," * 50_000 + "x",
        "f(a=" + "\\N{" * 300_000 + ")",
        "f(a='" + "\\N{" * 300_000 + "')",
    ],
    ids=short_id,
)
def test_hostile_megabytes_end_in_an_error_within_seconds(text):
    start = time.process_time()
    with pytest.raises(ToolCallError):
        parse_tool_call(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "make",
    [
        lambda n: ('f(a="' + "x" * n + '")', "x" * n),
        lambda n: ('f(a="' + "\\n" * n + '")', "\n" * n),
        lambda n: ('f(a="' + "\\u0000" * n + '")', "\x00" * n),
        lambda n: ("f(a=[" + "1, " * n + "])", [1] * n),
        lambda n: ("f(a=" + json.dumps({str(i): 1 for i in range(n)}) + ")", {str(i): 1 for i in range(n)}),
        lambda n: ("f(a=" + " " * n + "1)", 1),
    ],
)
def test_reading_time_grows_with_the_length_not_its_square(make):
    def seconds(n: int) -> float:
        text, value = make(n)
        start = time.process_time()
        call = parse_tool_call(text)
        spent = time.process_time() - start
        assert call.arguments == {"a": value}
        return spent

    small, large = min(seconds(4_000) for _ in range(3)), seconds(64_000)
    assert large < 16 * small * 6 + 0.2  # a quadratic reader takes 256 times as long


def test_many_arguments():
    arguments = {f"p{i}": i for i in range(20_000)}
    assert parse_tool_call(render_tool_call(ToolCall("f", arguments))).arguments == arguments
