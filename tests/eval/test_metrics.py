"""TS, PI, CF on hand-made calls; order-free pairing against brute force over permutations."""

import itertools
import json
import random

import pytest

from data.tool_calls import ToolCall, parse_tool_call
from eval.metrics import GoldAnswer, GoldCall, can_pair, equal_strict, is_same_content, score_calls


def gold(*calls, order_free=False):
    gold_calls = tuple(GoldCall(name, arguments, frozenset(wildcards)) for name, arguments, wildcards in calls)
    return GoldAnswer(calls=gold_calls, order_free=order_free)


def score(calls, *answers):
    result = score_calls([ToolCall(name, arguments) for name, arguments in calls], answers, values_equal=equal_strict)
    return result.TS, result.PI, result.CF


WEATHER = gold(("get_weather", {"city": "Oslo", "days": 3}, ()))


@pytest.mark.parametrize(
    "name, arguments, expected",
    [
        ("get_weather", {"city": "Oslo", "days": 3}, (True, True, True)),
        ("get_weather", {"days": 3, "city": "Oslo"}, (True, True, True)),  # order of arguments is free
        ("get_weather", {"city": "Oslo", "days": 4}, (True, True, False)),  # wrong number
        ("get_weather", {"city": "oslo", "days": 3}, (True, True, False)),  # letter case counts
        ("get_weather", {"city": "Oslo ", "days": 3}, (True, True, False)),  # blanks count
        ("get_weather", {"city": "Oslo", "days": "3"}, (True, True, False)),  # "3" is not 3
        ("get_weather", {"city": "Oslo", "days": 3.0}, (True, True, False)),  # 3.0 is not 3
        ("get_weather", {"city": "Oslo"}, (True, False, False)),  # missing
        ("get_weather", {"city": "Oslo", "days": 3, "unit": "C"}, (True, False, False)),  # surplus
        ("get_weather", {"town": "Oslo", "days": 3}, (True, False, False)),  # renamed
        ("get_weather", {}, (True, False, False)),
        ("get_forecast", {"city": "Oslo", "days": 3}, (False, False, False)),  # right arguments, wrong tool
        ("Get_weather", {"city": "Oslo", "days": 3}, (False, False, False)),
    ],
)
def test_one_call_one_answer(name, arguments, expected):
    assert score([(name, arguments)], WEATHER) == expected


def test_empty_arguments_can_be_right():
    assert score([("list_all", {})], gold(("list_all", {}, ()))) == (True, True, True)


def test_alternatives_are_not_mixed():
    """PI from one alternative and the values of another do not make a CF; TS needs any of them."""
    first, second = gold(("find", {"name": "Ann"}, ())), gold(("find", {"user": "Bo"}, ()))
    assert score([("find", {"user": "Bo"})], first, second) == (True, True, True)
    assert score([("find", {"user": "Ann"})], first, second) == (True, True, False)
    assert score([("find", {"id": "Bo"})], first, second) == (True, False, False)
    assert score([("search", {"q": 1})], first, gold(("search", {"q": 1}, ()))) == (True, True, True)


def test_wildcard_needs_the_name_but_not_the_value():
    answer = gold(("translate", {"text": "Hi", "max_length": "None"}, ("max_length",)))
    assert score([("translate", {"text": "Hi", "max_length": 7})], answer) == (True, True, True)
    assert score([("translate", {"text": "Ho", "max_length": 7})], answer) == (True, True, False)
    assert score([("translate", {"text": "Hi"})], answer) == (True, False, False)


def test_content_of_a_pair_includes_its_names():
    one = WEATHER.calls[0]
    assert is_same_content(ToolCall("get_weather", {"city": "Oslo", "days": 3}), one, equal_strict)
    assert not is_same_content(ToolCall("get_weather", {"city": "Oslo", "days": 3, "unit": "C"}), one, equal_strict)
    assert not is_same_content(ToolCall("get_forecast", {"city": "Oslo", "days": 3}), one, equal_strict)


def test_several_calls():
    calls = (("a", {"x": 1}, ()), ("b", {"y": 2}, ()))
    swapped = [("b", {"y": 2}), ("a", {"x": 1})]
    assert score(swapped, gold(*calls, order_free=True)) == (True, True, True)
    assert score(swapped, gold(*calls)) == (False, False, False)
    assert score(swapped[:1], gold(*calls, order_free=True)) == (False, False, False)
    assert score(swapped + swapped[:1], gold(*calls, order_free=True)) == (False, False, False)
    assert score([], gold(*calls)) == (False, False, False)


def test_order_free_pairing_is_one_to_one():
    twice = gold(("a", {"x": 1}, ()), ("a", {"x": 2}, ()), order_free=True)
    assert score([("a", {"x": 2}), ("a", {"x": 1})], twice) == (True, True, True)
    assert score([("a", {"x": 1}), ("a", {"x": 1})], twice) == (True, True, False)
    # The first call fits both gold calls, the second only the wildcard one: taking the first fit would fail.
    loose = gold(("a", {"x": 0}, ("x",)), ("a", {"x": 1}, ()), order_free=True)
    assert score([("a", {"x": 1}), ("a", {"x": 5})], loose) == (True, True, True)


def test_pairing_equals_brute_force():
    draw = random.Random(5)
    outcomes = []
    for _ in range(2000):
        size = draw.randint(1, 4)
        calls = [ToolCall(draw.choice("ab"), {"x": draw.randint(0, 2)}) for _ in range(size)]
        answer = gold(
            *((draw.choice("ab"), {"x": draw.randint(0, 2)}, draw.choice([(), (), ("x",)])) for _ in range(size)),
            order_free=True,
        )
        found = can_pair(calls, answer, lambda call, one: is_same_content(call, one, equal_strict))
        brute = any(
            all(
                call.name == one.name and ("x" in one.wildcards or call.arguments["x"] == one.arguments["x"])
                for call, one in zip(calls, order)
            )
            for order in itertools.permutations(answer.calls)
        )
        assert found == brute
        outcomes.append(found)
    assert 0.05 < sum(outcomes) / len(outcomes) < 0.95


def test_cf_implies_pi_implies_ts_on_random_calls():
    draw = random.Random(6)

    def arguments():
        return {key: draw.choice([0, 1, "0", True, None, [1], {"k": 1}]) for key in "xyz" if draw.random() < 0.6}

    for _ in range(3000):
        answers = [gold((draw.choice("ab"), arguments(), ()), order_free=draw.random() < 0.5) for _ in range(2)]
        ts, pi, cf = score([(draw.choice("ab"), arguments())], *answers)
        assert ts >= pi >= cf


VALUES = [
    0,
    1,
    -1,
    1.0,
    0.0,
    True,
    False,
    None,
    "",
    "1",
    "a",
    "A",
    [],
    [1],
    [1.0],
    [1, 2],
    [2, 1],
    [True],
    {},
    {"a": 1},
    {"a": 1.0},
    {"b": 1},
    {"a": [1, {"c": None}]},
    {"a": 1, "b": 2},
    [[]],
    [{}],
    "None",
    10**30,
    1e300,
]


def test_strict_equality_is_equality_of_canonical_json():
    """The oracle: two JSON values are the same if their text with sorted keys is (`1`, `1.0`, `true` differ there)."""
    for left, right in itertools.product(VALUES, repeat=2):
        same = json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)
        assert equal_strict(left, right) == same, (left, right)


def test_strict_equality_ignores_key_order_and_survives_depth():
    assert equal_strict({"a": 1, "b": [2]}, {"b": [2], "a": 1})
    deep = parse_tool_call(f"f(x={'[' * 190}{']' * 190})").arguments["x"]
    assert equal_strict(deep, json.loads(json.dumps(deep)))


def test_no_accepted_answer_is_an_error():
    with pytest.raises(ValueError, match="no accepted answer"):
        score([("a", {})])


@pytest.mark.parametrize(
    "call, start, parts",
    [
        (("get_forecast", {}), "wrong tool:", ["get_forecast", "get_weather"]),
        (("get_weather", {"town": "Oslo", "days": 3}), "wrong parameters:", ["town", "city"]),
        (("get_weather", {"city": "Oslo", "days": "3"}), "wrong value:", ["'days'", "'3'", "3"]),
        (("get_weather", {"city": "x" * 10_000, "days": 3}), "wrong value:", ["..."]),
    ],
)
def test_reasons_name_the_difference_in_one_short_ascii_line(call, start, parts):
    reason = score_calls([ToolCall(*call)], [WEATHER], values_equal=equal_strict).reason
    assert reason.startswith(start) and all(part in reason for part in parts)
    assert len(reason) < 400 and reason.isascii() and "\n" not in reason


def test_reason_of_a_correct_call_is_empty():
    assert (
        score_calls([ToolCall("get_weather", {"city": "Oslo", "days": 3})], [WEATHER], values_equal=equal_strict).reason
        == ""
    )
