"""TS, PI and CF of parsed calls (E21, docs/evaluation.md): pure functions, no files, no model.

For one record with accepted answers G (a list of alternatives):
    TS (tool selection)           1 if some alternative names the same tools
    PI (parameter identification) 1 if, for some alternative, also the set of argument names of every call is equal
    CF (content filling)          1 if, for some alternative, also the values of all arguments are equal
so CF <= PI <= TS on every record. Several calls are paired in order, or, where the alternative is `order_free`, by any
one-to-one pairing.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.tool_calls import ToolCall
from printable import shown

_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?")


@dataclass(frozen=True, slots=True)
class GoldCall:
    """One call of an accepted answer."""

    name: str
    arguments: dict[str, object]
    wildcards: frozenset[str]  # names of arguments that must be given, with any value


@dataclass(frozen=True, slots=True)
class GoldAnswer:
    """One accepted answer: the calls that together solve the task."""

    calls: tuple[GoldCall, ...]
    order_free: bool  # True: the calls may come in any order


@dataclass(frozen=True, slots=True)
class CallScore:
    """Result of one record."""

    reason: str  # "" for a correct answer, else `<error category>: <detail>`
    TS: bool = False
    PI: bool = False
    CF: bool = False

    def as_row(self) -> dict:
        """Its part of a results row: TS, PI, CF (0 or 1), reason."""
        return {"TS": int(self.TS), "PI": int(self.PI), "CF": int(self.CF), "reason": self.reason}


# ---------------------------------------------------------------------------------------------------------------------
# Values


def equal_strict(predicted: object, gold: object) -> bool:
    """Equality of JSON-like values without conversions: 3, 3.0, "3" and True are four different values.

    Lists compare element by element in order, dicts by key whatever the order; NaN equals nothing.
    """
    if type(predicted) is not type(gold):
        return False
    if isinstance(gold, dict):
        return predicted.keys() == gold.keys() and all(equal_strict(predicted[key], gold[key]) for key in gold)
    if isinstance(gold, (list, tuple)):
        return len(predicted) == len(gold) and all(map(equal_strict, predicted, gold))
    return predicted == gold


def equal_python(predicted: object, gold: object) -> bool:
    """Python's `==`, the rule of RoTBench's scorer: 1, 1.0 and True are one value; case, blanks, quotes count."""
    return predicted == gold


def equal_json(predicted: object, gold: object) -> bool:
    """Equality of JSON values: 2024 and 2024.0 are one number, but neither "2024" nor, for 1, true."""
    return _equal_values(predicted, gold, _equal_json_scalars)


def equal_lenient(predicted: object, gold: object) -> bool:
    """As equal_json, but "2024" is 2024, "true" is true, and letter case and blanks around a string do not count."""
    return _equal_values(predicted, gold, _equal_lenient_scalars)


def _equal_values(predicted: object, gold: object, equal_scalars: Callable[[object, object], bool]) -> bool:
    if isinstance(gold, dict):
        return (
            isinstance(predicted, dict)
            and predicted.keys() == gold.keys()
            and all(_equal_values(predicted[key], gold[key], equal_scalars) for key in gold)
        )
    if isinstance(gold, list):
        return (
            isinstance(predicted, list)
            and len(predicted) == len(gold)
            and all(_equal_values(*pair, equal_scalars) for pair in zip(predicted, gold))
        )
    return not isinstance(predicted, (dict, list)) and equal_scalars(predicted, gold)


def _equal_json_scalars(predicted: object, gold: object) -> bool:
    if _is_number(predicted) and _is_number(gold):
        return predicted == gold
    return type(predicted) is type(gold) and predicted == gold


def _equal_lenient_scalars(predicted: object, gold: object) -> bool:
    return _equal_json_scalars(*(_without_quotes(value) for value in (predicted, gold)))


def _without_quotes(value: object) -> object:
    """A string's number or truth value if it is one (at most 40 characters), else the string trimmed, in lower case."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("true", "false"):
        return text == "true"
    return float(text) if len(text) <= 40 and _NUMBER.fullmatch(text) else text


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------------------------------
# One call


def is_same_tool(call: ToolCall, gold: GoldCall) -> bool:
    """TS for a pair of calls: equal names, letter by letter."""
    return call.name == gold.name


def is_same_parameters(call: ToolCall, gold: GoldCall) -> bool:
    """PI for a pair of calls: same tool and the same set of argument names; order does not matter."""
    return is_same_tool(call, gold) and call.arguments.keys() == gold.arguments.keys()


def is_same_content(call: ToolCall, gold: GoldCall, values_equal: Callable[[object, object], bool]) -> bool:
    """CF for a pair of calls: PI and equal values, those of wildcards left aside."""
    return is_same_parameters(call, gold) and all(
        key in gold.wildcards or values_equal(call.arguments[key], gold.arguments[key]) for key in gold.arguments
    )


# ---------------------------------------------------------------------------------------------------------------------
# Whole answers


def can_pair(calls: Sequence[ToolCall], answer: GoldAnswer, is_match: Callable[[ToolCall, GoldCall], bool]) -> bool:
    """True if every call can be paired with one gold call of its own so that all pairs match, none left over.

    An order-free answer needs a search, not "the first that fits": with wildcards a call may fit several gold calls.
    Augmenting paths (Kuhn's algorithm), at most len(calls)^3 comparisons.
    """
    if len(calls) != len(answer.calls):
        return False
    if len(calls) == 1:
        return is_match(calls[0], answer.calls[0])
    if not answer.order_free:
        return all(map(is_match, calls, answer.calls))
    fits = [[is_match(call, gold) for gold in answer.calls] for call in calls]
    call_of_gold: list[int | None] = [None] * len(answer.calls)

    def place(call_index: int, tried: set[int]) -> bool:
        for gold_index, is_fit in enumerate(fits[call_index]):
            if not is_fit or gold_index in tried:
                continue
            tried.add(gold_index)
            occupant = call_of_gold[gold_index]
            if occupant is None or place(occupant, tried):
                call_of_gold[gold_index] = call_index
                return True
        return False

    return all(place(call_index, set()) for call_index in range(len(calls)))


def score_calls(
    calls: Sequence[ToolCall], answers: Sequence[GoldAnswer], *, values_equal: Callable[[object, object], bool]
) -> CallScore:
    """Score the calls of one record against its accepted answers (E21); `values_equal(predicted, gold)` judges values.

    Raises ValueError if there is no accepted answer, since then nothing can be right or wrong.
    """
    if not answers:
        raise ValueError("found no accepted answer, expected at least one")

    def same_content(call: ToolCall, gold: GoldCall) -> bool:
        return is_same_content(call, gold, values_equal)

    with_tool = [answer for answer in answers if can_pair(calls, answer, is_same_tool)]
    with_parameters = [answer for answer in with_tool if can_pair(calls, answer, is_same_parameters)]
    is_correct = any(can_pair(calls, answer, same_content) for answer in with_parameters)
    if is_correct:
        reason = ""
    elif with_parameters:
        reason = "wrong value: " + _describe_values(calls, with_parameters[0], values_equal)
    elif with_tool:
        reason = "wrong parameters: " + _describe_parameters(calls, with_tool[0])
    else:
        accepted = " or ".join(dict.fromkeys(_names(answer.calls) for answer in answers))
        reason = f"wrong tool: {_names(calls)}, expected {accepted}"
    return CallScore(reason, TS=bool(with_tool), PI=bool(with_parameters), CF=is_correct)  # E21


# ---------------------------------------------------------------------------------------------------------------------
# Reasons


def _names(calls: Sequence[ToolCall | GoldCall]) -> str:
    return " + ".join(shown(call.name) for call in calls) or "no call"


def _describe_parameters(calls: Sequence[ToolCall], answer: GoldAnswer) -> str:
    if len(calls) != 1:
        return f"in the calls {_names(calls)}"
    predicted, gold = calls[0].arguments.keys(), answer.calls[0].arguments.keys()
    surplus = ", ".join(shown(key) for key in predicted if key not in gold)
    missing = ", ".join(shown(key) for key in gold if key not in predicted)
    return "; ".join(
        part
        for part in (f"not in the answer {surplus}" if surplus else "", f"missing {missing}" if missing else "")
        if part
    )


def _describe_values(
    calls: Sequence[ToolCall], answer: GoldAnswer, values_equal: Callable[[object, object], bool]
) -> str:
    if len(calls) != 1:
        return f"in the calls {_names(calls)}"
    gold = answer.calls[0]
    return ", ".join(
        f"{shown(key)} is {shown(calls[0].arguments[key])}, expected {shown(gold.arguments[key])}"
        for key in gold.arguments
        if key not in gold.wildcards and not values_equal(calls[0].arguments[key], gold.arguments[key])
    )
