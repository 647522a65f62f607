"""Checks of the reward rule (rl/reward.py): on every prompt before training, and on one response by hand.

Before training, `check_rewards` scores each gold call and one mutation of every kind that it allows; each must get its
stated category. `drop_unspellable` then drops the prompts whose gold call the tokenizer cannot write: a policy that
gives the right answer there would be punished. To see why a response gets its reward:

    echo '{"tools": [...], "gold": [{"name": "f", "arguments": {"a": 1}}], "output": "f(a=1)"}' \\
        | python -m rl.check_rewards --explain
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from command_line import parse_arguments, run_command
from data.formats.table import dialogue_segments, render_output
from data.gold_records import read_gold_call
from data.json_records import DataError, field_of, parse_json
from data.tool_calls import ToolCall, ToolCallError, render_tool_call
from data.tool_documents import accepts_any_parameter, normalize_tools, offered_names, tool_parameters
from data.trajectories import Message
from model.tokenizer import Tokenizer
from printable import shown, terminal_text
from rl.prompts import PPOPrompt
from rl.reward import REWARDS, tool_call_reward

# ---------------------------------------------------------------------------------------------------------------------
# Before training


def check_rewards(prompts: Sequence[PPOPrompt]) -> list[str]:
    """One line per gold call that does not score +1 against itself, or of which a mutation gets another category.

    Empty if the rule is right on every prompt. Training on a prompt that fails would punish the right answer.
    """
    faults = []
    for prompt in prompts:
        for gold in prompt.gold_calls:
            fault = _check_gold_call(gold, prompt.tools, prompt.prompt_format)
            if fault:
                faults.append(f"{prompt.where} turn {prompt.turn}: {fault}")
    return faults


def _check_gold_call(gold: ToolCall, tools: list[dict], prompt_format: str) -> str | None:
    """What is wrong with the first mutation that fails, or None. The gold call itself comes first."""
    try:
        for text, category in _mutations(gold, tools, prompt_format):
            result = tool_call_reward(text, (gold,), tools, prompt_format)
            if result.category != category or result.reward != REWARDS[category]:
                return f"{shown(text)} scores {result.explanation}, expected {REWARDS[category]:g} {category}"
    except ToolCallError as error:
        return f"gold call of {shown(gold.name)}: {error}"
    return None


def drop_unspellable(
    prompts: Sequence[PPOPrompt], tokenizer: Tokenizer, max_response_tokens: int
) -> tuple[list[PPOPrompt], list[str]]:
    """(prompts with a gold call that the tokenizer can write, a line for the log if there are others).

    A gold call goes the way of a response: ids, EOS, text, reward. It is lost where the tokenizer has no piece for a
    character, merges blanks or normalises characters (NFKC), and where call and EOS have more than max_response_tokens
    tokens. Raises DataError if no prompt is left.
    """
    kept, faults = [], []
    for prompt in prompts:
        found = [_spelling_fault(gold, prompt, tokenizer, max_response_tokens) for gold in prompt.gold_calls]
        if None in found:
            kept.append(prompt)
        else:
            faults.append(f"{prompt.where} turn {prompt.turn}: {found[0]}")
    if faults and not kept:
        raise DataError(f"{faults[0]}; all {len(prompts)} prompts have such a gold call, expected at least one without")
    line = f"{len(faults)} prompts dropped: the tokenizer cannot write their gold call; the first is "
    return kept, [line + faults[0]] if faults else []


def _spelling_fault(gold: ToolCall, prompt: PPOPrompt, tokenizer: Tokenizer, max_response_tokens: int) -> str | None:
    """Why ids cannot carry the gold call of a prompt, or None."""
    turns = [Message("user", ""), Message("assistant", "", gold)]
    segments = dialogue_segments([], turns, prompt.prompt_format)
    ids = tokenizer.encode_continuation(next(segment.text for segment in segments if segment.is_target))
    if len(ids) >= max_response_tokens:
        return (
            f"found a gold call of {len(ids) + 1} tokens with EOS ({shown(gold.name)}), expected at most "
            f"{max_response_tokens} (--max_response_tokens)"
        )
    text = tokenizer.decode(ids).strip()
    result = tool_call_reward(text, (gold,), prompt.tools, prompt.prompt_format)
    if result.category == "correct":
        return None
    return f"found the gold call {shown(render_tool_call(gold))} decoded as {shown(text)}, {result.explanation}"


def _mutations(gold: ToolCall, tools: list[dict], prompt_format: str) -> Iterator[tuple[str, str]]:
    """(response, category it must get): the gold call itself, then one mutation of every kind that it allows."""

    def write(name: str, arguments: dict) -> str:
        return render_output([ToolCall(name, arguments)], prompt_format)

    text = write(gold.name, gold.arguments)
    yield text, "correct"
    yield text[:-1], "unparsable"  # cut off at the length limit
    yield f"{text}\n{text}", "unparsable"
    names = offered_names(tools)
    yield write(_unused_name(gold.name, set(names)), gold.arguments), "hallucinated_tool"
    other = next(name for name in names if name != gold.name and _is_writable(name))
    yield write(other, gold.arguments), "wrong_tool"
    documented = [
        name for tool in tools if tool["function"]["name"] == gold.name for name in tool_parameters(tool["function"])[0]
    ]
    unknown = _unused_name("parameter", {*documented, *gold.arguments})
    is_open = any(accepts_any_parameter(tool["function"]) for tool in tools if tool["function"]["name"] == gold.name)
    surplus_category = "redundant_parameter" if is_open else "hallucinated_parameter"
    yield write(gold.name, {**gold.arguments, unknown: "x"}), surplus_category
    surplus = next((name for name in documented if name not in gold.arguments), None)
    if surplus is not None:
        yield write(gold.name, {**gold.arguments, surplus: "x"}), "redundant_parameter"
    for name, value in list(gold.arguments.items())[:1]:
        rest = {other: kept for other, kept in gold.arguments.items() if other != name}
        yield write(gold.name, rest), "missing_parameter"
        yield write(gold.name, {**gold.arguments, name: _changed(value)}), "wrong_value"


def _is_writable(name: str) -> bool:
    """Whether a call of this tool can be written; "get weather" is no name of a call."""
    try:
        return bool(render_tool_call(ToolCall(name, {})))
    except ToolCallError:
        return False


def _unused_name(name: str, taken: set[str]) -> str:
    """`name` with as many underscores as make it differ from all that are taken."""
    while name in taken:
        name += "_"
    return name


def _changed(value: object) -> object:
    """Another value, of the same type where such a value can surely be written (a longer number may not)."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return type(value)(0 if value else 1)
    return f"{value}!" if isinstance(value, str) else None if value is not None else False


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def explain(record: object, where: str) -> str:
    """The reward of {"tools", "gold": [{"name", "arguments"}], "output"} in a few lines. Raises DataError."""
    tools = normalize_tools(field_of(record, "tools", list, where), f"{where}: tools")
    gold_calls = []
    for entry in field_of(record, "gold", list, where):
        call, fault = read_gold_call(entry, f"{where}: gold")
        if fault is not None:
            raise DataError(f"{where}: gold: {fault}")
        gold_calls.append(call)
    if not gold_calls:
        raise DataError(f"{where}: found no gold call, expected at least one")
    result = tool_call_reward(field_of(record, "output", str, where), gold_calls, tools)
    return "\n".join(
        [
            f"reward        {result.reward:g}",
            f"category      {result.category}",
            f"parsed call   {'none' if result.call is None else terminal_text(render_tool_call(result.call))}",
            f"gold call     {terminal_text(render_tool_call(result.gold))}",
            *(
                f"{title:<14}{', '.join(map(shown, names)) or '-'}"
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


def read_line(source: Path | None, number: int) -> tuple[str, str]:
    """Line `number` (from 1) of a file (None: stdin) and its place, "source:line". Raises DataError, OSError."""
    content = sys.stdin.buffer.read() if source is None else source.read_bytes()
    where = f"{source or 'stdin'}:{number}"
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{source or 'stdin'}:{line}: found byte {content[error.start]:#04x}, expected UTF-8 text"
        ) from None
    if not 1 <= number <= len(lines):
        raise DataError(f"{where}: found {len(lines)} lines, expected --line 1 to {len(lines)}")
    return lines[number - 1], where


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m rl.check_rewards", description="Explain the reward of one response."
    )
    parser.add_argument(
        "--explain", action="store_true", required=True, help="print the reward of one response and why"
    )
    parser.add_argument("--data", type=Path, help='JSON lines of {"tools", "gold", "output"} (default: stdin)')
    parser.add_argument("--line", type=int, default=1, help="which line, from 1")
    options = parse_arguments(parser, arguments)

    def explain_line() -> None:
        line, where = read_line(options.data, options.line)
        print(explain(parse_json(line, where), where))

    return run_command(explain_line, (ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
