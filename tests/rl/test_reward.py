"""rl/reward.py: the paper's numbers by hand, an oracle by construction, hostile text, the check before training."""

import dataclasses
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.tool_calls import ToolCall, parse_tool_call, render_tool_call
from eval.metrics import equal_strict
from rl import reward as reward_module
from rl.prompts import PPOPrompt
from rl.reward import CATEGORIES, check_rewards, is_equal_value, main, parameter_reward, tool_call_reward

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


def prompt(gold: ToolCall, *more: ToolCall, tools: list[dict] = TOOLS) -> PPOPrompt:
    return PPOPrompt("t", 2, "train.json:7", [1, 2], (gold, *more), tools)


# ------------------------------------------------------------------------------------------- numbers of the paper


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
        ('f(a="x", b=1.0)', -0.25, "wrong_value"),
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


# ------------------------------------------------------------------------------------------- which tools, which gold


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


# ---------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, True),
        (0, False),
        (1, 1.0),
        (1, "1"),
        (None, False),
        (None, "null"),
        ("", None),
        ([], {}),
        ([1], [True]),
        ([1, 2], [2, 1]),
        ([1], [1, 1]),
        ({"a": 1}, {"a": 1.0}),
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
    assert is_equal_value(-0.0, 0.0)
    rng, seen = random.Random(5), [0, 0]
    for _ in range(3000):
        left, right = (random_value(rng, 3) for _ in range(2))
        assert is_equal_value(left, left)
        assert is_equal_value(left, right) == equal_strict(left, right)
        seen[is_equal_value(left, right)] += 1
    assert min(seen) > 100


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


# --------------------------------------------------------------------------------------------- oracle by construction


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


# ---------------------------------------------------------------------------------------------------- hostile text

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


# ------------------------------------------------------------------------------------------- check before training


def test_good_prompts_pass_the_check():
    golds = [
        GOLD,
        ToolCall("g", {}),
        ToolCall("finish", {"answer": "it's"}),
        ToolCall("ask_to_user", {}),
        ToolCall("search", {"query": "a(b)", "n": [1, {"k": None}]}),
        ToolCall("f", {"a": 10**4000}),
        *(ToolCall("f", {"a": value}) for value in (0, 1, 0.0, 2.5, True, False, None, "", "\ud800", [], {})),
    ]
    assert check_rewards([prompt(gold) for gold in golds]) == []
    assert check_rewards([prompt(*golds)]) == []
    unwritable = tool("get weather", [], [])  # no call can name it, so it is not the other tool of the mutation
    assert check_rewards([prompt(GOLD, tools=[unwritable, *TOOLS])]) == []
    nested: object = 1
    for _ in range(199):
        nested = [nested]
    assert check_rewards([prompt(ToolCall("f", {"a": nested}))]) == []


@pytest.mark.parametrize(
    ("gold", "pattern"),
    [
        (ToolCall("f", {"zz": 1}), r"'f\(zz=1\)' scores -0.8 hallucinated_parameter: .*, expected 1 correct"),
        (ToolCall("h", {}), r"'h\(\)' scores -2 hallucinated_tool: 'h' is not offered, expected 1 correct"),
        (ToolCall("f", {"a": float("nan")}), r"gold call of 'f': found nan, expected a finite number"),
        (ToolCall("f f", {}), r"gold call of 'f f': found 'f f', expected a name without whitespace"),
        (ToolCall("f", {"a": (1, 2)}), r"gold call of 'f': found a value of type tuple, expected a JSON value"),
    ],
)
def test_offenders_are_listed_with_their_place(gold, pattern):
    faults = check_rewards([prompt(GOLD), prompt(gold), prompt(GOLD, gold)])
    assert len(faults) == 2  # a gold call is checked alone: another that scores +1 does not cover for it
    for fault in faults:
        assert re.fullmatch(rf"train\.json:7 turn 2: {pattern}.*", fault), fault


def test_one_mutation_of_every_kind_is_checked():
    categories = [category for _, category in reward_module._mutations(GOLD, TOOLS)]
    assert set(categories) == set(CATEGORIES) and categories[0] == "correct"
    categories = {category for _, category in reward_module._mutations(ToolCall("g", {}), TOOLS)}
    assert set(CATEGORIES) - categories == {"redundant_parameter", "missing_parameter", "wrong_value"}


def released_parser(text: str) -> ToolCall:
    """Reads as the released reward does: up to the first closing bracket, single-quoted strings only."""
    found = re.search(r"(.*?)\(([\s\S]*?)\)", text)
    if not found:
        raise reward_module.ToolCallError("no call")
    return ToolCall(found[1], dict(re.findall(r"(\w+)\s*=\s*'([^']*)'", found[2])))


def first_line_is_enough(text: str) -> ToolCall:
    return parse_tool_call(text.split("\n")[0])


def cut_calls_are_mended(text: str) -> ToolCall:
    return parse_tool_call(text if text.endswith(")") else f"{text})")


def every_tool_is_offered(text: str, gold_calls, tools: list[dict]):
    names = re.findall(r"\A\w+", text)
    return tool_call_reward(text, gold_calls, [*tools, *(tool(name, [], []) for name in names)])


def every_parameter_is_documented(text: str, gold_calls, tools: list[dict]):
    return tool_call_reward(text, gold_calls, [*tools, tool(GOLD.name, [], re.findall(r"(\w+)=", text))])


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("parse_tool_call", released_parser),
        ("parse_tool_call", first_line_is_enough),
        ("parse_tool_call", cut_calls_are_mended),
        ("is_equal_value", lambda value, gold: True),
        ("is_equal_value", lambda value, gold: False),
        ("parameter_reward", lambda hallucinated, redundant, missing: -0.8),
        ("tool_call_reward", every_tool_is_offered),
        ("tool_call_reward", every_parameter_is_documented),
    ],
)
def test_a_broken_judge_does_not_pass_the_check(monkeypatch, name, replacement):
    monkeypatch.setattr(reward_module, name, replacement)
    assert len(check_rewards([prompt(GOLD)])) == 1


def test_a_thousand_prompts_are_checked_in_a_second():
    tools = [tool(f"tool_number_{index}", ["a", "b"], ["c"]) for index in range(8)]
    prompts = [
        prompt(ToolCall("tool_number_3", {"a": f"text {index}", "b": index}), tools=tools) for index in range(1000)
    ]
    started = time.process_time()
    assert check_rewards(prompts) == []
    assert time.process_time() - started < 1


# ----------------------------------------------------------------------------------------------------- command line

LINE = {"tools": TOOLS, "gold": [{"name": "f", "arguments": {"a": "x", "b": 1}}], "output": 'f(a="\u00e9\x7f", q=1)'}


def test_explain_from_standard_input():
    done = subprocess.run(
        [sys.executable, "-m", "rl.reward", "--explain"],
        input=json.dumps(LINE) + "\nnext line",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={"PATH": "", "LC_ALL": "C"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "reward        -1.3",
        "category      hallucinated_parameter",
        'parsed call   f(a="\\xe9\\x7f", q=1)',
        'gold call     f(a="x", b=1)',
        "hallucinated  'q'",
        "redundant     -",
        "missing       'b'",
        "wrong values  'a'",
        "explanation   -1.3 hallucinated_parameter: hallucinated 'q'; missing 'b'; 'a' is '\\xe9\\x7f', expected 'x'",
    ]


def test_explain_one_line_of_a_file(tmp_path, capsys):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("\ufeffnot json\n" + json.dumps({**LINE, "output": "f("}) + "\n", encoding="utf-8")
    assert main(["--explain", "--data", str(path), "--line", "2"]) == 0
    printed = capsys.readouterr().out
    assert "reward        -2\n" in printed and "parsed call   none\n" in printed
    assert "expected parameter=value" in printed


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("", "found the end at column 1, expected JSON"),
        ("{", "found the end"),
        ("[1]", "found list, expected an object"),
        ("not json", "found 'not json'"),
        ('{"a": 1, "a": 2}', "found a key twice in one object"),
        ("NaN", "found NaN"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "expected strict JSON"),
        (json.dumps({**LINE, "tools": None}), "found NoneType as 'tools', expected list"),
        (json.dumps({**LINE, "tools": [{"name": ""}]}), "expected a tool with a name"),
        (json.dumps({**LINE, "tools": [1]}), "expected a function object"),
        (json.dumps({**LINE, "gold": []}), "found no gold call"),
        (json.dumps({**LINE, "gold": [1]}), "gold: found int, expected an object with 'name'"),
        (json.dumps({**LINE, "gold": [{"name": "f"}]}), "gold: found nothing as 'arguments', expected dict"),
        (json.dumps({**LINE, "gold": [{"name": "f g", "arguments": {}}]}), "gold: found 'f g', expected a name"),
        (json.dumps({**LINE, "output": None}), "found NoneType as 'output', expected str"),
        (json.dumps({"tools": [], "gold": LINE["gold"]}), "found nothing as 'output'"),
    ],
)
def test_bad_lines_end_with_one_line_and_code_2(tmp_path, capsys, content, pattern):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    assert main(["--explain", "--data", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"{path}:1: ") and pattern in err, err


def test_bad_flags_and_files_end_with_one_line_and_code_2(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff')
    for arguments, pattern in (
        (["--data", str(path)], "--explain"),
        (["--explain", "--bogus"], "--bogus"),
        (["--explain", "--line", "x"], "--line"),
        (["--explain", "--data", str(path)], "utf-8"),
        (["--explain", "--data", str(tmp_path)], "directory"),
        (["--explain", "--data", str(tmp_path / "none")], "No such file"),
    ):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        assert code == 2 and out == "" and err.count("\n") == 1 and pattern in err, err
    path.write_text("{}\n")
    for line in (0, -1, 3):
        assert main(["--explain", "--data", str(path), "--line", str(line)]) == 2
        assert f"{path}:{line}: found 2 lines, expected --line 1 to 2" in capsys.readouterr().err
