"""Which errors there are: the paper's Figure 1 over training data, its Table 1 over predictions.

    python -m eval.reports.error_statistics --data train.json
    python -m eval.reports.error_statistics --answers rotbench/First_Turn/clean.json --predictions FILE
        [--rules official] [--tokenizer MODEL_DIR] [--output DIR]

Definitions, and what the paper leaves open: docs/evaluation.md. A table for people, then one JSON object as the
last line of stdout; --output writes one row per call or record to DIR/error_statistics.jsonl.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import parse_arguments, run_command
from data.error_filter import CATEGORIES, decide_masked_turns
from data.json_records import DataError, write_json_lines
from data.tool_documents import accepts_any_parameter, tool_parameters
from data.trajectories import Trajectory, read_trajectories
from eval.benchmarks import benchmark_of
from eval.confidence import Z_95, wilson_interval
from eval.dialogues.metrics import MAX_TURNS
from eval.metrics import GoldCall
from eval.predict.react_output import PredictedCall, read_call, read_call_predictions
from eval.records import Record, ScoreSettings, limited
from eval.reports.paper_tables import read_published
from eval.reports.report import format_table
from eval.reports.synonyms import is_synonym
from model.pretrained_weights import ModelFolderError
from model.tokenizer import load_tokenizer
from printable import json_line, markdown_text, shown, terminal_text

KINDS = {
    "tool": ("First", "Prefix"),
    "parameter": ("Redundancy", "Missing", "Hallucination"),
    "content": ("Synonyms", "Others"),
}  # aspect -> rows of Table 1
_NAME_PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+|.", re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# Figure 1: the data


def classify_turns(trajectories: Sequence[Trajectory]) -> list[dict]:
    """One row per call of the data: id, source, message_index, category (data.error_filter.CATEGORIES), rule, matched.

    Assistant turns of plain text are not calls and have no row.
    """
    rows = []
    for trajectory in trajectories:
        for turn in decide_masked_turns(trajectory, "structured"):
            message = trajectory.messages[turn.message_index]
            if message.call is not None or message.fault is not None:
                rows.append(
                    {
                        "id": trajectory.id,
                        "source": trajectory.source,
                        "message_index": turn.message_index,
                        "category": turn.category,
                        "rule": turn.rule,
                        "matched_text": turn.matched_text,
                    }
                )
    return rows


def summarize_turns(trajectories: Sequence[Trajectory], rows: Sequence[dict]) -> dict:
    """Calls by category, and trajectories by the categories of their calls, as counts and percentages.

    A trajectory is all_right if all its calls are; else it counts under each error category that occurs in it, so these
    rows may add up to more than the trajectories. Raises ValueError for no rows.
    """
    found: dict[str, set[str]] = {trajectory.id: set() for trajectory in trajectories}
    for row in rows:
        found[row["id"]].add(row["category"])
    errors = [categories - {"all_right"} for categories in found.values()]
    per_call = {name: _share(sum(row["category"] == name for row in rows), len(rows)) for name in CATEGORIES}
    per_trajectory = {name: _share(sum(name in each for each in errors), len(errors)) for name in CATEGORIES}
    per_trajectory["all_right"] = _share(sum(not each for each in errors), len(errors))
    return {
        "calls": len(rows),
        "trajectories": len(errors),
        "by_call": per_call,
        "by_trajectory": per_trajectory,
        "trajectories_with_error": _share(sum(bool(each) for each in errors), len(errors)),
    }


def _share(count: int, n: int) -> dict:
    low, high = wilson_interval(count, n, Z_95)
    return {
        "count": count,
        "percent": round(100 * count / n, 2),
        "interval_95": [round(100 * low, 2), round(100 * high, 2)],
    }


def format_turns(summary: dict) -> str:
    """Figure 1 as a table, with the one number that the paper prints below it."""
    table = [["category", "calls", "% of calls [95 %]", "trajectories", "% of trajectories [95 %]"]]
    for name in CATEGORIES:
        call, trajectory = summary["by_call"][name], summary["by_trajectory"][name]
        table.append([name, str(call["count"]), _rate(call), str(trajectory["count"]), _rate(trajectory)])
    figure = read_published()["figure1"]
    with_error = summary["trajectories_with_error"]
    return (
        f"{format_table(table)}\n\n{summary['calls']} calls in {summary['trajectories']} trajectories; with an "
        f"error: {with_error['count']} trajectories, {_rate(with_error)} %. The paper's other training set "
        f"(Figure 1, {figure['trajectories']} trajectories): {figure['percent_with_error']} %."
    )


def _rate(share: dict) -> str:
    low, high = share["interval_95"]
    return f"{share['percent']:.1f} [{low:.1f}, {high:.1f}]"


# ---------------------------------------------------------------------------------------------------------------------
# Table 1: one wrong record


@dataclass(frozen=True, slots=True)
class ErrorCase:
    """What is wrong with one record: an aspect of KINDS with some of its kinds, or an aspect outside of Table 1.

    Those have no kinds: "" correct, "unparsable" no call, "rule" wrong by a rule of the scorer although the call agrees
    with an accepted answer (empty arguments on RoTBench).
    """

    aspect: str
    kinds: tuple[str, ...]
    detail: str


def split_name(name: str) -> list[str]:
    """The words of a tool name, `getWeather_2` -> get, Weather, _, 2: used where there is no tokenizer."""
    return _NAME_PIECE.findall(name)


def name_tokens(tokenizer_path: Path) -> Callable[[str], list[int]]:
    """Ids of a name as it appears in a prompt, after `Assistant:` and before its bracket. Raises DataError."""
    try:
        tokenizer = load_tokenizer(tokenizer_path)
    except ModelFolderError as error:
        raise DataError(str(error)) from None
    return lambda name: tokenizer.encode_continuation(f" {name}(")


def classify_error(
    call: PredictedCall,
    example: Record,
    level: int,
    split: Callable[[str], Sequence],
    values_equal: Callable[[object, object], bool],
) -> ErrorCase:
    """The case of one record that the evaluator scored `level` = TS + PI + CF.

    Of several accepted answers the nearest counts: the one with most kinds right, that is fewest differing parameters,
    then fewest differing values. `split` cuts a name into tokens.
    """
    if level == 3:
        return ErrorCase("", (), "")
    if call.fault:
        return ErrorCase("unparsable", (), call.fault)
    golds = [answer.calls[0] for answer in example.gold]
    same_tool = [
        gold
        for gold in golds
        if gold.name == call.name or call.name == "finish" and gold.name == example.meta.get("finish")
    ]
    if level == 0 and not same_tool:
        return _tool_error(call, golds, example, split)
    if level == 0 or not same_tool or not isinstance(call.arguments, dict):
        return ErrorCase("rule", (), "the scorer's rule, not the call's difference to an accepted answer")
    nearest = min(same_tool, key=lambda gold: len(gold.arguments.keys() ^ call.arguments.keys()))
    if level == 1 and nearest.arguments.keys() != call.arguments.keys():
        return _parameter_error(call.arguments, nearest, example)
    same_keys = [gold for gold in same_tool if gold.arguments.keys() == call.arguments.keys()]
    wrong = [
        [
            key
            for key, value in call.arguments.items()
            if key not in gold.wildcards and not values_equal(value, gold.arguments[key])
        ]
        for gold in same_keys
    ]
    if level == 2 and wrong and all(wrong):
        index = min(range(len(wrong)), key=lambda i: len(wrong[i]))
        return _content_error(call.arguments, same_keys[index], wrong[index])
    return ErrorCase("rule", (), "the scorer's rule, not the call's difference to an accepted answer")


def _tool_error(
    call: PredictedCall, golds: Sequence[GoldCall], example: Record, split: Callable[[str], Sequence]
) -> ErrorCase:
    first = list(split(call.name))[:1]
    is_prefix = any(first == list(split(gold.name))[:1] for gold in golds)
    is_offered = any(tool["function"].get("name") == call.name for tool in example.tools)
    detail = f"{shown(call.name)}{'' if is_offered else ' (not offered)'}, expected " + " or ".join(
        dict.fromkeys(shown(gold.name) for gold in golds)
    )
    return ErrorCase("tool", ("Prefix" if is_prefix else "First",), detail)


def _parameter_error(arguments: dict, gold: GoldCall, example: Record) -> ErrorCase:
    """Kinds as the reward's: undocumented = Hallucination, documented but not in the answer = Redundancy."""
    documented: set[str] = set()
    for tool in example.tools:
        if tool["function"].get("name") == gold.name:
            documented |= tool_parameters(tool["function"])[0].keys()
            documented |= arguments.keys() if accepts_any_parameter(tool["function"]) else set()
    surplus = [key for key in arguments if key not in gold.arguments]
    by_kind = {
        "Redundancy": [key for key in surplus if key in documented],
        "Missing": [key for key in gold.arguments if key not in arguments],
        "Hallucination": [key for key in surplus if key not in documented],
    }
    kinds = tuple(kind for kind, keys in by_kind.items() if keys)
    return ErrorCase("parameter", kinds, "; ".join(f"{kind} {', '.join(map(ascii, by_kind[kind]))}" for kind in kinds))


def _content_error(arguments: dict, gold: GoldCall, wrong: Sequence[str]) -> ErrorCase:
    are_synonyms = {key: is_synonym(arguments[key], gold.arguments[key]) for key in wrong}
    kinds = tuple(kind for kind, flag in (("Synonyms", True), ("Others", False)) if flag in are_synonyms.values())
    detail = "; ".join(
        f"{'Synonyms' if are_synonyms[key] else 'Others'} {key!a}: {shown(arguments[key])}, expected "
        f"{shown(gold.arguments[key])}"
        for key in wrong
    )
    return ErrorCase("content", kinds, detail)


# ---------------------------------------------------------------------------------------------------------------------
# Table 1: whole files


def classify_predictions(
    answers: Path, predictions: Path, limit: int | None, rules: str, split: Callable[[str], Sequence]
) -> tuple[list[dict], list[str]]:
    """One row per record (index, id, aspect, kinds, detail) and notices to show. `rules`: "default", official, fair.

    RoTBench, ToolAlpaca and the tiny benchmarks: those whose answers are single calls. Raises DataError, `file:line`.
    """
    benchmark = benchmark_of(answers)
    rules = benchmark.resolve_rules(rules)
    # A benchmark with one rule ignores which is asked for, as its evaluator does.
    values_equal = benchmark.equality(rules if benchmark.rules else "")
    if values_equal is None:
        raise DataError(f"{answers}: found {benchmark.name}, expected a benchmark of single calls")
    records = benchmark.load(answers)
    scored = benchmark.score(records, predictions, ScoreSettings(limit, rules, execute_code=False, max_turns=MAX_TURNS))
    matched, notices = read_call_predictions(predictions, len(records), limit)
    calls = [read_call(prediction) for prediction in matched]
    rows = []
    for example, call, row in zip(limited(records, limit), calls, scored.rows, strict=True):
        case = classify_error(call, example, row["TS"] + row["PI"] + row["CF"], split, values_equal)
        rows.append(
            {
                "index": row["index"],
                "id": row["id"],
                "aspect": case.aspect,
                "kinds": list(case.kinds),
                "detail": case.detail,
            }
        )
    return rows, notices


def summarize_errors(rows: Sequence[dict]) -> dict:
    """n, correct, unparsable, rule, and per aspect of Table 1 its records and the count and percentage of each kind.

    Percentages are over the aspect's wrong records. A record may be of several kinds, so those of an aspect may add up
    to more than 100, as in Table 1.
    """
    counts = {aspect: sum(row["aspect"] == aspect for row in rows) for aspect in ("", "unparsable", "rule", *KINDS)}
    summary: dict = {"n": len(rows), "correct": counts[""], "unparsable": counts["unparsable"], "rule": counts["rule"]}
    for aspect, kinds in KINDS.items():
        wrong = [row for row in rows if row["aspect"] == aspect]
        summary[aspect] = {
            "records": len(wrong),
            **{
                kind: _share(sum(kind in row["kinds"] for row in wrong), len(wrong)) if wrong else None
                for kind in kinds
            },
        }
    return summary


def format_errors(summary: dict, unit: str) -> str:
    """Table 1 with our column next to the published ones. `unit`: what a name was cut into, for the note."""
    table = [["aspect", "error", "this file: records", "% [95 %]", "ToolLLaMA-2-7B-v2 %", "NexusRaven-13B-v2 %"]]
    for row in read_published()["table1"]:
        ours = summary[row["aspect"].lower()]
        share = ours[row["error"]]
        table.append(
            [
                row["aspect"],
                row["error"],
                f"{share['count'] if share else 0} of {ours['records']}",
                _rate(share) if share else "-",
                f"{row['ToolLLaMA']:.2f}",
                f"{row['NexusRaven']:.2f}",
            ]
        )
    return (
        f"{format_table(table)}\n\n{summary['n']} records: {summary['correct']} correct, {summary['unparsable']} "
        f"without a call, {summary['rule']} wrong by a rule of the scorer alone. First/Prefix by {unit}. "
        "Published: Table 1, RoTBench clean."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags; wrong ones end the program with one line and code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.reports.error_statistics",
        description="Figure 1 (--data) or Table 1 (--answers, --predictions): which errors there are.",
    )
    parser.add_argument("--data", type=Path, help="training data, either form of docs/data_format.md")
    parser.add_argument("--answers", type=Path, help="a benchmark's own file: RoTBench, ToolAlpaca, tiny")
    parser.add_argument("--predictions", type=Path, help="predictions for --answers, as the evaluators take them")
    parser.add_argument(
        "--rules",
        choices=("default", "official", "fair"),
        default="default",
        help="the evaluator's rules (default: each benchmark's own)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="model folder or tokenizer file: First/Prefix by its tokens (default: by the words of the names)",
    )
    parser.add_argument("--limit", type=int, help="only N records, evenly spread (default: all)")
    parser.add_argument("--output", type=Path, help="folder for error_statistics.jsonl (default: none written)")
    flags = parse_arguments(parser, arguments)
    if (flags.data is None) == (flags.answers is None) or (flags.answers is None) != (flags.predictions is None):
        parser.error("found neither or both of --data and --answers, expected --data, or --answers and --predictions")
    if flags.limit is not None and flags.limit < 1:
        parser.error(f"--limit: found {flags.limit}, expected at least 1")
    return flags


def report_errors(flags: argparse.Namespace) -> None:
    """Do what the flags ask: table and JSON to stdout, notices to stderr, rows to --output. Raises DataError."""
    notices: list[str] = []
    if flags.data is not None:
        trajectories = limited(read_trajectories(flags.data, unparsable_calls="mask"), flags.limit)
        rows = classify_turns(trajectories)
        if not rows:
            raise DataError(f"{flags.data}: found no call, expected at least one")
        summary = summarize_turns(trajectories, rows)
        text = format_turns(summary)
    else:
        split = name_tokens(flags.tokenizer) if flags.tokenizer else split_name
        rows, notices = classify_predictions(flags.answers, flags.predictions, flags.limit, flags.rules, split)
        summary = summarize_errors(rows)
        text = format_errors(
            summary, f"tokens of {markdown_text(str(flags.tokenizer))}" if flags.tokenizer else "words of the names"
        )
    for notice in notices:
        print(terminal_text(notice), file=sys.stderr)
    if flags.output is not None:
        write_json_lines(flags.output / "error_statistics.jsonl", rows)
    print(f"{text}\n\n{json_line(summary)}")


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    flags = read_flags(arguments)
    return run_command(lambda: report_errors(flags), (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
