"""rl/reward.py: the paper's numbers by hand, an oracle by construction, hostile text."""

import dataclasses
import random
import re
import time
from pathlib import Path

import pytest

from data.tool_calls import ToolCall, render_tool_call
from eval.metrics import equal_strict
from rl.reward import CATEGORIES, is_equal_value, judge_response, parameter_reward, tool_call_reward

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str, required: list[str], optional: list[str]) -> dict:
    properties = {parameter: {"type": "string", "description": "d"} for parameter in [*required, *optional]}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


TOOLS = [tool("f", ["a"], ["b", "c"]), tool("g", [], []), tool("search", ["query"], ["n"])]
GOLD = ToolCall("f", {"a": "x", "b": 1})


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of the paper


@pytest.mark.parametrize(
    ("text", "reward", "category"),
    [
        ('f(a="x", b=1)', 1, "correct"),
        (" f( b = 1 , a = 'x' )\n", 1, "correct"),
        ("", -2, "unparsable"),
        ("f", -2, "unparsable"),
        ("I would call f.", -2, "unparsable"),
        ('f(a="x", b=1', -2, "unparsable"),
        ('f(a="x", b=1) ', 1, "correct"),
        ('f(a="x", b=1).', -2, "unparsable"),
        ('f(a="x", b=1)\nf(a="x", b=1)', -2, "unparsable"),
        ('Sure: f(a="x", b=1)', -2, "unparsable"),
        ('f("x", 1)', -2, "unparsable"),
        ('f(a="x", b=1)</s>', -2, "unparsable"),
        ('(a="x")', -2, "unparsable"),
        ('F(a="x", b=1)', -2, "hallucinated_tool"),
        ("h()", -2, "hallucinated_tool"),
        ('f_(a="x", b=1)', -2, "hallucinated_tool"),
        ("g()", -1.5, "wrong_tool"),
        ('g(a="x", b=1)', -1.5, "wrong_tool"),
        ("finish()", -1.5, "wrong_tool"),
        ('ask_to_user(question="?")', -1.5, "wrong_tool"),
        ('f(a="x", b=1, q=2)', -0.8, "hallucinated_parameter"),
        ('f(a="x", b=1, q=2, r=3)', -0.8, "hallucinated_parameter"),
        ('f(a="x", b=1, c=2)', -0.5, "redundant_parameter"),
        ('f(a="x")', -0.5, "missing_parameter"),
        ("f()", -0.5, "missing_parameter"),
        ('f(a="x", c=1)', -1.0, "redundant_parameter"),  # redundant c, missing b
        ('f(a="x", q=1)', -1.3, "hallucinated_parameter"),  # hallucinated q, missing b
        ('f(a="x", b=1, c=2, q=3)', -1.3, "hallucinated_parameter"),  # hallucinated q, redundant c
        ("f(c=2, q=3)", -1.8, "hallucinated_parameter"),  # all three, below a wrong tool: the paper's own numbers
        ('f(a="WRONG", c=1)', -1.0, "redundant_parameter"),  # a wrong value beside them adds nothing
        ('f(a="y", b=1)', -0.25, "wrong_value"),
        ('f(a="y", b=2)', -0.25, "wrong_value"),
        ('f(a="x", b="1")', -0.25, "wrong_value"),
        ('f(a="x", b=1.0)', 1.0, "correct"),  # the document of b says neither integer nor number
        ('f(a="x", b=1.5)', -0.25, "wrong_value"),
        ('f(a="x", b=true)', -0.25, "wrong_value"),
        ('f(a=["x"], b=1)', -0.25, "wrong_value"),
    ],
)
def test_worked_numbers(text, reward, category):
    result = tool_call_reward(text, [GOLD], TOOLS)
    assert (result.reward, result.category) == (reward, category)
    assert result.gold == GOLD and (result.call is None) == (category == "unparsable") == (result.fault is not None)
    assert result.explanation.startswith(f"{reward:g} {category}: ") and "\n" not in result.explanation


def test_categories_in_the_order_of_severity():
    assert CATEGORIES == (
        "unparsable",
        "hallucinated_tool",
        "wrong_tool",
        "hallucinated_parameter",
        "redundant_parameter",
        "missing_parameter",
        "wrong_value",
        "correct",
    )


def test_parameter_reward_counts_each_kind_once():
    expected = {
        (0, 0, 0): 0,
        (1, 0, 0): -0.8,
        (0, 1, 0): -0.5,
        (0, 0, 1): -0.5,
        (1, 1, 0): -1.3,
        (1, 0, 1): -1.3,
        (0, 1, 1): -1.0,
        (1, 1, 1): -1.8,
    }
    for kinds, reward in expected.items():
        for times in (1, 3):
            names = [["p"] * times * kind for kind in kinds]
            assert parameter_reward(*names) == reward


def test_all_sets_are_given_and_the_record_is_frozen():
    result = tool_call_reward('f(a="y", c=2, q=3, r=4)', [GOLD], TOOLS)
    assert (result.hallucinated, result.redundant, result.missing, result.wrong_values) == (
        ("q", "r"),
        ("c",),
        ("b",),
        ("a",),
    )
    assert result.call == ToolCall("f", {"a": "y", "c": 2, "q": 3, "r": 4})
    assert result.explanation == (
        "-1.8 hallucinated_parameter: hallucinated 'q', 'r'; redundant 'c'; missing 'b'; 'a' is 'y', expected 'x'"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.reward = 1.0


def test_what_the_released_regular_expressions_get_wrong():
    """Single-quoted strings only, cut at the first bracket, text around the call ignored."""
    gold = [ToolCall("search", {"query": "love"})]
    assert tool_call_reward('search(query="TOTALLY WRONG", n=1)', gold, TOOLS).reward == -0.5
    assert tool_call_reward('search(query="love")', gold, TOOLS).reward == 1
    assert tool_call_reward("search(query='love')", gold, TOOLS).reward == 1
    assert tool_call_reward("search()", gold, TOOLS).reward == -0.5
    cut = [ToolCall("search", {"query": "f(x)", "n": "WRONG"})]
    assert tool_call_reward("search(query='f(x)', n='3')", cut, TOOLS).category == "wrong_value"
    apostrophe = [ToolCall("search", {"query": "it's \"odd\" (very), n='3'"})]
    assert tool_call_reward(render_tool_call(apostrophe[0]), apostrophe, TOOLS).reward == 1
    numbers = [ToolCall("f", {"a": 7, "b": [1, {"k": None}]})]
    assert tool_call_reward("f(a=1, b=2)", numbers, TOOLS).category == "wrong_value"
    assert tool_call_reward("f(a=7, b=[1, {'k': None}])", numbers, TOOLS).reward == 1


# ---------------------------------------------------------------------------------------------------------------------
# Which tools, which gold


def test_finish_and_ask_to_user_are_offered_without_document():
    gold = [ToolCall("finish", {"answer": "42"})]
    for text, reward in (
        ('finish(answer="42")', 1),
        ('finish(answer="43")', -0.25),
        ("finish()", -0.5),
        ('finish(answer="42", p=1)', -0.8),
        ('ask_to_user(question="?")', -1.5),
        ("end()", -2),
    ):
        assert tool_call_reward(text, gold, TOOLS).reward == reward, text
    beside = [ToolCall("f", {"a": 1}), *gold]  # the parameters of f document nothing of finish
    assert tool_call_reward('finish(answer="42", a=1)', beside, TOOLS).category == "hallucinated_parameter"
    listed = [*TOOLS, tool("finish", ["answer"], ["p"])]
    assert tool_call_reward('finish(answer="42", p=1)', gold, listed).category == "redundant_parameter"


def test_an_undocumented_parameter_is_hallucinated_even_if_gold_has_it():
    assert tool_call_reward("f(zz=1)", [ToolCall("f", {"zz": 1})], TOOLS).reward == -0.8


def test_tools_of_one_name_document_together():
    tools = [tool("f", ["a"], []), tool("f", ["b"], []), tool("g", [], ["q"])]
    assert tool_call_reward("f(b=1)", [ToolCall("f", {"b": 1})], tools).reward == 1
    assert tool_call_reward("f(b=1, a=1)", [ToolCall("f", {"b": 1})], tools).category == "redundant_parameter"
    assert tool_call_reward("f(b=1, q=1)", [ToolCall("f", {"b": 1})], tools).category == "hallucinated_parameter"


def test_the_best_of_several_gold_calls_counts():
    golds = [ToolCall("f", {"a": 1, "b": 2}), ToolCall("f", {"a": 2}), ToolCall("g", {}), ToolCall("f", {"a": 3})]
    for text, reward, index in (
        ("f(a=2)", 1, 1),
        ("g()", 1, 2),
        ("f(a=1, b=2)", 1, 0),
        ("f(a=3)", 1, 3),
        ("f(a=9)", -0.25, 1),
        ("f(a=1)", -0.25, 1),
        ("g(a=1)", -0.8, 2),
        ("search(query=1)", -1.5, 0),
        ("h()", -2, 0),
        ("f(", -2, 0),
        ("f(c=1, q=1)", -1.5, 2),
    ):  # -1.8 against every f, so the wrong tool for g is best
        result = tool_call_reward(text, golds, TOOLS)
        assert (result.reward, result.gold) == (reward, golds[index]), text
    assert tool_call_reward("f(c=1, q=1)", golds[:2], TOOLS).reward == -1.8


def test_no_gold_call_is_refused():
    with pytest.raises(ValueError, match="found no gold call"):
        tool_call_reward("f()", [], TOOLS)


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, True),
        (0, False),
        (1, "1"),
        (None, False),
        (None, "null"),
        ("", None),
        ([], {}),
        ([1], [True]),
        ([1, 2], [2, 1]),
        ([1], [1, 1]),
        ({"a": 1}, {"a": 2.0}),
        (1, 1.5),
        (True, 1.0),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 1, "b": 1}),
        ("a", "A"),
        ("a", "a "),
        ([[[1]]], [[[2]]]),
        (10**40, 1e40),
    ],
)
def test_unequal_values(left, right):
    assert not is_equal_value(left, right) and not is_equal_value(right, left)


def test_equal_values_and_agreement_with_the_evaluators_rule():
    assert is_equal_value({"a": [1, {"b": None}], "c": "x"}, {"c": "x", "a": [1, {"b": None}]})
    assert is_equal_value(-0.0, 0.0) and is_equal_value(5, 5.0) and is_equal_value([{"a": 5.0}], [{"a": 5}])
    rng, seen = random.Random(5), [0, 0]
    for _ in range(3000):
        left, right = (random_value(rng, 3) for _ in range(2))
        assert is_equal_value(left, left)
        assert is_equal_value(left, right) == equal_strict(*map(with_whole_floats_as_integers, (left, right)))
        seen[is_equal_value(left, right)] += 1
    assert min(seen) > 100


def with_whole_floats_as_integers(value: object) -> object:
    if isinstance(value, list):
        return [with_whole_floats_as_integers(each) for each in value]
    if isinstance(value, dict):
        return {key: with_whole_floats_as_integers(each) for key, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


INTEGER, NUMBER = {"type": "integer"}, {"type": "number"}
POINT = {"type": "object", "properties": {"x": INTEGER, "y": NUMBER, "tags": {"type": "array", "items": INTEGER}}}


@pytest.mark.parametrize(
    ("document", "output", "gold", "is_equal"),
    [
        # the declared type decides between integer and float
        (NUMBER, 5.0, 5, True),
        (NUMBER, 5, 5.0, True),
        (INTEGER, 5.0, 5, False),
        (INTEGER, 5, 5, True),
        (INTEGER, 5, 5.0, False),
        ({"description": "no type"}, 5.0, 5, True),
        (None, 5.0, 5, True),
        ({"type": "string"}, 5.0, 5, True),  # says nothing about numbers
        ({"type": ["integer", "null"]}, 5.0, 5, False),
        ({"type": ["integer", "number"]}, 5.0, 5, True),
        ({"type": "int"}, 5.0, 5, False),
        ({"type": "Float"}, 5.0, 5, True),
        ({"anyOf": [INTEGER, {"type": "null"}]}, 5.0, 5, False),
        ({"anyOf": [INTEGER, NUMBER]}, 5.0, 5, True),
        # other values still differ, whatever is declared
        (NUMBER, 5.5, 5, False),
        (NUMBER, True, 1, False),
        (NUMBER, 1.0, True, False),
        (INTEGER, False, 0, False),
        (NUMBER, "5", 5, False),
        (INTEGER, "5", 5, False),
        ({"type": "string"}, 5, "5", False),
        (NUMBER, None, 0, False),
        # inside lists and objects
        ({"type": "array", "items": INTEGER}, [1, 2.0], [1, 2], False),
        ({"type": "array", "items": NUMBER}, [1, 2.0], [1, 2], True),
        ({"type": "array"}, [1, 2.0], [1, 2], True),
        ({"type": "array", "items": NUMBER}, [True], [1], False),
        (POINT, {"x": 1, "y": 2.0}, {"x": 1, "y": 2}, True),
        (POINT, {"x": 1.0, "y": 2}, {"x": 1, "y": 2}, False),
        (POINT, {"tags": [3.0]}, {"tags": [3]}, False),
        (POINT, {"other": 3.0}, {"other": 3}, True),
        ({"type": "array", "items": POINT}, [{"x": 1}, {"x": 2.0}], [{"x": 1}, {"x": 2}], False),
        # documents that are no schema decide nothing
        ({"type": 7, "items": "integer", "properties": []}, [5.0, {"a": 5}], [5, {"a": 5.0}], True),
    ],
)
def test_the_document_decides_between_integer_and_float(document, output, gold, is_equal):
    parameters = {"properties": {"p": document}, "required": ["p"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    result = tool_call_reward(render_tool_call(ToolCall("f", {"p": output})), [ToolCall("f", {"p": gold})], tools)
    assert (result.category, result.reward) == (("correct", 1.0) if is_equal else ("wrong_value", -0.25))
    assert result.wrong_values == (() if is_equal else ("p",))


def test_two_documents_of_one_parameter_are_read_together():
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"p": document}}}}
        for document in (INTEGER, NUMBER)
    ]
    assert tool_call_reward("f(p=5.0)", [ToolCall("f", {"p": 5})], tools).category == "correct"
    assert tool_call_reward("f(p=5.0)", [ToolCall("f", {"p": 5})], tools[:1]).category == "wrong_value"


@pytest.mark.parametrize(
    ("text", "has_ended", "reward", "category"),
    [
        ('f(a="x", b=1)', True, 1.0, "correct"),
        ('f(a="x", b=1)', False, -2.0, "unparsable"),  # cut just after its bracket
        ('f(a="x", b=2)', True, -0.25, "wrong_value"),
        ('f(a="x", b=2)', False, -2.0, "unparsable"),
        ("g()", True, -1.5, "wrong_tool"),
        ("g()", False, -2.0, "unparsable"),
        ('f(a="x", b=', False, -2.0, "unparsable"),
    ],
)
def test_a_call_without_its_end_gets_nothing(text, has_ended, reward, category):
    result = judge_response(text, has_ended, [ToolCall("f", {"a": "x", "b": 1})], TOOLS)
    assert (result.reward, result.category) == (reward, category)
    assert (result.call is None) == (category == "unparsable") == bool(result.fault)
    if text.endswith(")") and not has_ended:
        assert "found no EOS after the call" in result.explanation


def random_value(rng: random.Random, depth: int) -> object:
    kind = rng.randrange(6 if depth else 4)
    if kind == 4:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 5:
        return {rng.choice("kl"): random_value(rng, depth - 1) for _ in range(rng.randrange(3))}
    return rng.choice((0, 1, 1.0, True, False, None, "1", "it's", 'f(")'))


def test_deep_values_do_not_recurse():
    deep = [list, list]
    for side in range(2):
        deep[side] = []
        for _ in range(20_000):
            deep[side] = [deep[side]]
    assert is_equal_value(deep[0], deep[1]) and not is_equal_value(deep[0], deep[1][0])
    for value in deep:  # take it apart: freeing such a list at once recurses in the interpreter
        while value:
            value = value.pop()


# ---------------------------------------------------------------------------------------------------------------------
# Oracle by construction


def test_random_edits_score_what_they_were_made_to():
    """Gold calls and edits are drawn so that the sets are known before any reward is computed."""
    rng = random.Random(6)
    seen = set()
    for _ in range(1500):
        names = [f"p{index}" for index in range(6)]
        rng.shuffle(names)
        n_gold, n_surplus = rng.randrange(4), rng.randrange(3)
        in_gold, surplus = names[:n_gold], names[n_gold : n_gold + n_surplus]
        gold = ToolCall("f", {name: random_value(rng, 2) for name in in_gold})
        tools = [tool("g", [], ["q"]), tool("f", in_gold, surplus)]
        dropped = [name for name in in_gold if rng.random() < 0.2]
        added = [name for name in surplus if rng.random() < 0.3]
        invented = [name for name in ("q", "pp") if rng.random() < 0.15]
        changed = [name for name in in_gold if name not in dropped and rng.random() < 0.2]
        items = [
            (name, ["changed", value] if name in changed else value)
            for name, value in gold.arguments.items()
            if name not in dropped
        ] + [(name, 1) for name in added + invented]
        rng.shuffle(items)
        result = tool_call_reward(render_tool_call(ToolCall("f", dict(items))), [gold], tools)
        penalty = 0.8 * (len(invented) > 0) + 0.5 * (len(added) > 0) + 0.5 * (len(dropped) > 0)
        expected = -penalty if penalty else -0.25 if changed else 1.0
        assert result.reward == pytest.approx(expected, abs=1e-12)
        assert (set(result.hallucinated), set(result.redundant), set(result.missing), set(result.wrong_values)) == (
            set(invented),
            set(added),
            set(dropped),
            set(changed),
        )
        seen.add((result.reward, result.category))
    assert len(seen) == 8  # correct, wrong value and the combinations of parameter faults, two of which are -1.3


# ---------------------------------------------------------------------------------------------------------------------
# Hostile text

HOSTILE = [
    "f(a=" + "[" * 200_000,
    "f(a=" + "{'k':" * 50_000,
    "f(" * 100_000,
    "f(a=" + "(" * 1000 + "1" + ")" * 1000 + ")",
    "f(a=" + "9" * 100_000 + ")",
    "f(a=1e999)",
    "f(a=nan)",
    "f(a=-Infinity)",
    "f(a=__import__('os').system('true'))",
    "f(a=[x for x in ()])",
    "f(**{'a': 1})",
    "f(**{'a': 1}, a=2)",
    "f(*[1])",
    "f(a=1, a=1)",
    "f(a={1: 2})",
    "f(a='" + "x" * 1_000_000 + "')",
    "f(" + ", ".join(f"p{index}=1" for index in range(20_000)) + ")",
    "\x00",
    "\ud800(a=1)",
    "f(a='\ud800')",
    "f(a='\\ud800')",
    "f(a='\\x')",
    "f(a='\\N{DIGIT ONE}')",
    "f(a='\x1b[2J')",
    "\x1b[2Jf()",
    "f(a='\u202e')",
    "\u0434\u0430(a=1)",
    "f\n\n(\n)",
    "\ufeff" + "f()",
    "f(a=b'x')",
    "f(a=f'{1}')",
    "f(a='x' 'y')",
    "f(a='''x''')",
    "f(a=0x10)",
    "f(a=1_000)",
    "f(a=1j)",
    "f(a=...)",
    "f(a=lambda: 0)",
    "f()()",
    "f();g()",
    "f()#",
    "lambda: 0",
    "'" * 10_001,
    "\\" * 10_001,
    "(" * 100_000,
    ")" * 100_000,
    "=" * 1000,
    "," * 1000,
    " " * 1_000_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_gets_a_reward_in_bounded_time(text):
    started = time.process_time()
    result = tool_call_reward(text, [GOLD], TOOLS)
    assert time.process_time() - started < 1
    check_result(result)


def check_result(result) -> None:
    assert result.category in CATEGORIES and -2 <= result.reward <= 1
    assert re.fullmatch(r"[ -~]{1,1200}", result.explanation)


def test_any_text_gets_a_reward():
    rng = random.Random(7)
    pieces = [
        "f",
        "g",
        "(",
        ")",
        "a",
        "b",
        "=",
        ",",
        '"',
        "'",
        "1",
        "[",
        "]",
        "{",
        "}",
        ":",
        " ",
        "\n",
        "**",
        "\\",
        "x",
        "true",
        "-",
        ".",
        "\x00",
        "\u00e9",
        "\ud800",
        "</s>",
        "finish",
        "q",
    ]
    found = set()
    for _ in range(8000):
        result = tool_call_reward("".join(rng.choices(pieces, k=rng.randrange(14))), [GOLD], TOOLS)
        check_result(result)
        found.add(result.category)
    for _ in range(3000):  # one character of a call replaced, removed or doubled
        good = rng.choice(['f(a="x", b=1)', 'f(a="x")', 'f(a="x", b=1, c=[2])'])
        place = rng.randrange(len(good))
        text = good[:place] + rng.choice(["", rng.choice(pieces), good[place] * 2]) + good[place + 1 :]
        result = tool_call_reward(text, [GOLD], TOOLS)
        check_result(result)
        found.add(result.category)
    assert found == set(CATEGORIES)
