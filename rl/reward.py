"""The paper's reward of one response (E22, E23), from the parsed call and the documents; and its check before training.

    -2      the response is not exactly one call (text after it or a second call included)
    -2      the tool is not offered
    -1.5    the tool is offered, but is not that of the gold call
    R_p     same tool, other parameters: -0.8 [some hallucinated] - 0.5 [some redundant] - 0.5 [some missing]
    -0.25   same parameters, some value differs
    +1      equal to the gold call

Hallucinated: not documented. Redundant: documented, not in the gold call. Missing: in the gold call, absent.
The paper's numbers are not monotone: the right tool with all three parameter faults gets -1.8, less than a wrong tool.
Of several gold calls the one with the best reward counts, the first of equals. To see one response judged:

    echo '{"tools": [...], "gold": [{"name": "f", "arguments": {"a": 1}}], "output": "f(a=1)"}' \\
        | python -m rl.reward --explain
"""

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.error_filter import ALWAYS_OFFERED
from data.json_records import DataError
from data.tool_calls import ToolCall, ToolCallError, parse_tool_call, render_tool_call
from data.trajectories import normalize_tools, tool_parameters
from rl.prompts import PPOPrompt, parse_json_line, read_gold_call, take_field

# Each category with its reward; a call with several parameter faults has the sum of theirs.
REWARDS = {
    "unparsable": -2.0,
    "hallucinated_tool": -2.0,
    "wrong_tool": -1.5,
    "hallucinated_parameter": -0.8,
    "redundant_parameter": -0.5,
    "missing_parameter": -0.5,
    "wrong_value": -0.25,
    "correct": 1.0,
}
CATEGORIES = tuple(REWARDS)


@dataclass(frozen=True, slots=True)
class RewardResult:
    """The reward of one response, and why."""

    reward: float
    category: str  # one of CATEGORIES; of several parameter faults the first in their order
    call: ToolCall | None  # None: the response did not parse
    fault: str | None  # then the parser's reason
    gold: ToolCall  # the gold call that gave this reward
    hallucinated: tuple[str, ...]  # parameter names; the four are empty unless the tool is the gold call's
    redundant: tuple[str, ...]
    missing: tuple[str, ...]
    wrong_values: tuple[str, ...]  # parameters that both calls have, with values that are not equal
    explanation: str  # one line of ASCII


# ----------------------------------------------------------------------------------------------------------- reward


def tool_call_reward(output_text: str, gold_calls: Sequence[ToolCall], tools: list[dict]) -> RewardResult:
    """R (E22) with R_p (E23), paper section 3.3, for any text at all; no text raises.

    `finish` and `ask_to_user` count as offered even if not listed, as in the error filter; where such a tool has no
    document, the parameters of its gold calls are its documented ones. Where several tools have one name, a parameter
    is documented if one of them has it. Values are compared by `is_equal_value`: types count, 1 is not 1.0.
    tools: OpenAI function dicts. Raises ValueError if there is no gold call.
    """
    if not gold_calls:
        raise ValueError("found no gold call, expected at least one")
    try:
        call = parse_tool_call(output_text)
    except ToolCallError as error:
        return _judge_tool("unparsable", None, gold_calls[0], fault=str(error))
    functions = [tool["function"] for tool in tools if tool["function"].get("name") == call.name]
    if not functions and call.name not in ALWAYS_OFFERED:
        return _judge_tool("hallucinated_tool", call, gold_calls[0])
    documented = {name for function in functions for name in tool_parameters(function)[0]}
    if not functions:
        documented = {name for gold in gold_calls if gold.name == call.name for name in gold.arguments}
    results = [_compare(call, gold, documented) for gold in gold_calls]
    return max(results, key=lambda result: result.reward)  # max keeps the first of equals


def parameter_reward(hallucinated: Collection[str], redundant: Collection[str], missing: Collection[str]) -> float:
    """R_p (E23): each kind of fault counts once, however many parameters have it; 0 without any."""
    return (
        REWARDS["hallucinated_parameter"] * bool(hallucinated)
        + REWARDS["redundant_parameter"] * bool(redundant)
        + REWARDS["missing_parameter"] * bool(missing)
    )  # E23


def _compare(call: ToolCall, gold: ToolCall, documented: set[str]) -> RewardResult:
    """E22 for a call whose tool is offered, against one gold call."""
    if call.name != gold.name:
        return _judge_tool("wrong_tool", call, gold)
    hallucinated = tuple(name for name in call.arguments if name not in documented)
    redundant = tuple(name for name in call.arguments if name in documented and name not in gold.arguments)
    missing = tuple(name for name in gold.arguments if name not in call.arguments)
    wrong_values = tuple(
        name
        for name, value in gold.arguments.items()
        if name in call.arguments and not is_equal_value(call.arguments[name], value)
    )
    faults = [
        category
        for category, names in (
            ("hallucinated_parameter", hallucinated),
            ("redundant_parameter", redundant),
            ("missing_parameter", missing),
        )
        if names
    ]
    category = faults[0] if faults else "wrong_value" if wrong_values else "correct"
    reward = parameter_reward(hallucinated, redundant, missing) if faults else REWARDS[category]  # E22
    details = [
        f"{kind} {_listed(names)}"
        for kind, names in (("hallucinated", hallucinated), ("redundant", redundant), ("missing", missing))
        if names
    ]
    details += [
        f"{_shown(name)} is {_shown(call.arguments[name])}, expected {_shown(gold.arguments[name])}"
        for name in wrong_values[:3]
    ]
    details += [f"{len(wrong_values) - 3} more wrong values"] if len(wrong_values) > 3 else []
    explanation = f"{reward:g} {category}: {'; '.join(details) or _shown(call.name) + ' as the gold call'}"
    return RewardResult(reward, category, call, None, gold, hallucinated, redundant, missing, wrong_values, explanation)


def _judge_tool(category: str, call: ToolCall | None, gold: ToolCall, *, fault: str | None = None) -> RewardResult:
    """E22 where parameters are not compared: no call, or not the tool of the gold call."""
    if call is None:
        detail = fault
    elif category == "hallucinated_tool":
        detail = f"{_shown(call.name)} is not offered"
    else:
        detail = f"{_shown(call.name)}, expected {_shown(gold.name)}"
    reward = REWARDS[category]  # E22
    return RewardResult(reward, category, call, fault, gold, (), (), (), (), f"{reward:g} {category}: {detail}")


def is_equal_value(value: object, gold: object) -> bool:
    """Equality of JSON values with types: 1, 1.0, True and "1" are four values; lists in order, dicts in any order.

    Without recursion, so no nesting of a response can overflow it.
    """
    pending = [(value, gold)]
    while pending:
        value, gold = pending.pop()
        if type(value) is not type(gold):
            return False
        if isinstance(gold, dict):
            if value.keys() != gold.keys():
                return False
            pending.extend((value[key], gold[key]) for key in gold)
        elif isinstance(gold, list):
            if len(value) != len(gold):
                return False
            pending.extend(zip(value, gold, strict=True))
        elif value != gold:
            return False
    return True


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(_shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ------------------------------------------------------------------------------------------- check before training


def check_rewards(prompts: Sequence[PPOPrompt]) -> list[str]:
    """One line per gold call that does not score +1 against itself, or of which a mutation misses its stated branch.

    Empty if all is well. A run that trains on such a prompt would push the policy away from the right answer.
    """
    faults = []
    for prompt in prompts:
        for gold in prompt.gold_calls:
            fault = _check_gold_call(gold, prompt.tools)
            if fault:
                faults.append(f"{prompt.where} turn {prompt.turn}: {fault}")
    return faults


def _check_gold_call(gold: ToolCall, tools: list[dict]) -> str | None:
    """What is wrong with the first mutation that fails, or None. The unchanged gold call comes first."""
    try:
        for text, category in _mutations(gold, tools):
            result = tool_call_reward(text, (gold,), tools)
            if result.category != category or result.reward != REWARDS[category]:
                return f"{_shown(text)} scores {result.explanation}, expected {REWARDS[category]:g} {category}"
    except ToolCallError as error:
        return f"gold call of {_shown(gold.name)}: {error}"
    return None


def _mutations(gold: ToolCall, tools: list[dict]) -> Iterator[tuple[str, str]]:
    """(text of a response, its stated category): the gold call itself, then one mutation of every kind it allows."""
    text = render_tool_call(gold)
    yield text, "correct"
    yield text[:-1], "unparsable"  # cut off at the length limit
    yield f"{text}\n{text}", "unparsable"
    names = [tool["function"]["name"] for tool in tools]
    yield (
        render_tool_call(ToolCall(_new_name(gold.name, {*names, *ALWAYS_OFFERED}), gold.arguments)),
        "hallucinated_tool",
    )
    other = next(name for name in (*names, *ALWAYS_OFFERED) if name != gold.name and _is_writable(name))
    yield render_tool_call(ToolCall(other, gold.arguments)), "wrong_tool"
    documented = [
        name for tool in tools if tool["function"]["name"] == gold.name for name in tool_parameters(tool["function"])[0]
    ]
    unknown = _new_name("parameter", {*documented, *gold.arguments})
    yield render_tool_call(ToolCall(gold.name, {**gold.arguments, unknown: "x"})), "hallucinated_parameter"
    surplus = next((name for name in documented if name not in gold.arguments), None)
    if surplus is not None:
        yield render_tool_call(ToolCall(gold.name, {**gold.arguments, surplus: "x"})), "redundant_parameter"
    for name, value in list(gold.arguments.items())[:1]:
        rest = {other: kept for other, kept in gold.arguments.items() if other != name}
        yield render_tool_call(ToolCall(gold.name, rest)), "missing_parameter"
        yield render_tool_call(ToolCall(gold.name, {**gold.arguments, name: _changed(value)})), "wrong_value"


def _is_writable(name: str) -> bool:
    """Whether a call of this tool can be written: a document may be named "get weather"."""
    try:
        return bool(render_tool_call(ToolCall(name, {})))
    except ToolCallError:
        return False


def _new_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _changed(value: object) -> object:
    """Another value; of the same type where one surely can be written (a longer number or deeper list may not)."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return type(value)(0 if value else 1)
    return f"{value}!" if isinstance(value, str) else None if value is not None else False


# ----------------------------------------------------------------------------------------------------- command line


def explain(record: object, where: str) -> str:
    """The judgement of {"tools", "gold": [{"name", "arguments"}], "output"} in a few lines. Raises DataError."""
    tools = normalize_tools(take_field(record, "tools", list, where), f"{where}: tools")
    gold_calls = []
    for entry in take_field(record, "gold", list, where):
        call, fault = read_gold_call(entry, f"{where}: gold")
        if fault is not None:
            raise DataError(f"{where}: gold: {fault}")
        gold_calls.append(call)
    if not gold_calls:
        raise DataError(f"{where}: found no gold call, expected at least one")
    result = tool_call_reward(take_field(record, "output", str, where), gold_calls, tools)
    return "\n".join(
        [
            f"reward        {result.reward:g}",
            f"category      {result.category}",
            f"parsed call   {'none' if result.call is None else _written(result.call)}",
            f"gold call     {_written(result.gold)}",
            *(
                f"{title:<14}{', '.join(map(ascii, names)) or '-'}"
                for title, names in (
                    ("hallucinated", result.hallucinated),
                    ("redundant", result.redundant),
                    ("missing", result.missing),
                    ("wrong values", result.wrong_values),
                )
            ),
            f"explanation   {result.explanation}",
        ]
    )


def _written(call: ToolCall) -> str:
    """The call on one line of ASCII: a response must not act on the terminal it is shown in."""
    return "".join(
        character if " " <= character <= "~" else ascii(character)[1:-1] for character in render_tool_call(call)
    )


def _fail(message: str) -> None:
    print(f"python -m rl.reward: {message} (see --help)", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(prog="python -m rl.reward", description=__doc__.split("\n")[0])
    parser.add_argument("--explain", action="store_true", required=True, help="judge one response and say why")
    parser.add_argument("--data", type=Path, help='JSON lines of {"tools", "gold", "output"} (default: stdin)')
    parser.add_argument("--line", type=int, default=1, help="which line, from 1")
    parser.error = _fail
    options = parser.parse_args(arguments)
    try:
        source = options.data or "stdin"
        content = sys.stdin.buffer.read() if options.data is None else options.data.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
        where = f"{source}:{options.line}"
        if not 1 <= options.line <= len(lines):
            raise DataError(f"{where}: found {len(lines)} lines, expected --line 1 to {len(lines)}")
        print(explain(parse_json_line(lines[options.line - 1], where), where))
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split("\n")), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
