"""Score predictions on RoTBench, first or third turn, clean or with noise: file in, file out, no model.

    python -m eval.evaluate_rotbench --answers rotbench/First_Turn/clean.json --predictions FILE [--rules fair]
        [--output DIR]

`official` is what RoTBench's own scorer counts, record by record, quirks included. Its first rule makes every record
wrong whose predicted arguments are empty, so that even the gold answers reach only 97 of 105 on the clean set. `fair`
takes an empty object for arguments like any other, and tries every accepted answer on the call as it was predicted.
The steps and quirks: docs/evaluation.md.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data.json_records import write_json_lines
from data.tool_calls import ToolCall
from eval.benchmark_data import EvalExample, benchmark_of, load_rotbench
from eval.command_line import parse_arguments, run_command
from eval.metrics import CallScore, GoldAnswer, equal_python, score_calls
from eval.predict.prediction_files import Prediction
from eval.predict.react_output import PredictedCall, read_call, read_call_predictions
from eval.reports.report import METRICS, summarize_results

RULES = ("official", "fair")
SCENARIOS = {
    "TG": "Text Generation",
    "RS": "Real-Time Search",
    "DU": "Data Understanding",
    "PL": "Personal Life",
    "AM": "Application Manipulation",
    "IR": "Information Retrieval",
    "FT": "Financial Transactions",
}
RATE_KEYS = ("n", *(key for metric in METRICS for key in (metric, f"{metric}_percent", f"{metric}_interval_95")))


# ----------------------------------------------------------------------------------------------------------- one record


def score_rotbench_call(name: str, arguments: object, example: EvalExample, rules: str) -> CallScore:
    """Score one call by the steps of RoTBench's scorer (its Code/Evaluation/evaluate.py; docs/evaluation.md).

    1. Arguments that Python takes for false (`{}`, `[]`, 0, null) make all three metrics wrong; `fair` lets `{}` pass.
    2. The accepted answers are tried in order. Where one calls the tool in the last place, a predicted `finish` is
       renamed to that tool; with `official` it keeps that name for the answers that follow.
    3. TS: equal names. Arguments that are no object stop the scorer here: TS stands, PI and CF are wrong.
    4. PI: also equal sets of argument names; what the document requires does not matter.
    5. CF: also equal values (`==`) of all arguments but those with the gold value "None". With `official` the latter
       are deleted from the prediction, which the answers that follow then see without them. Values do not count for the
       tools in the last two places, nor for gold tools that noise has named `finish` or `ask_to_user`.
    Raises ValueError for other rules.
    """
    if rules not in RULES:
        raise ValueError(f"found rules {rules!a}, expected one of {', '.join(RULES)}")
    if not arguments and (rules == "official" or not isinstance(arguments, dict)):  # 1
        return CallScore(TS=False, PI=False, CF=False, reason="empty arguments: wrong by RoTBench's first rule")
    level, current, left = 0, name, arguments
    for answer in example.gold:
        gold = answer.calls[0]
        if rules == "fair":
            current, left = name, arguments
        if current == "finish" and gold.name == example.meta["finish"]:  # 2
            current = gold.name
        if current != gold.name:
            continue
        level = max(level, 1)  # 3
        if not isinstance(left, dict):
            break
        if left.keys() != gold.arguments.keys():
            continue
        level = 2  # 4; a third level ends the loop
        left = {key: value for key, value in left.items() if gold.arguments[key] != "None"}
        has_free_values = gold.name in (example.meta["finish"], example.meta["ask_to_user"], "finish", "ask_to_user")
        if has_free_values or left == {key: value for key, value in gold.arguments.items() if value != "None"}:  # 5
            level = 3
            break
    return CallScore(TS=level >= 1, PI=level >= 2, CF=level == 3, reason=_reason(name, arguments, example, level))


def _reason(name: str, arguments: object, example: EvalExample, level: int) -> str:
    """Why the call is wrong: the difference to an accepted answer, or the quirk where that does not explain it."""
    if level == 3:
        return ""
    if not isinstance(arguments, dict):
        return f"unparsable: found {type(arguments).__name__} as arguments, expected an object"
    score = score_calls([ToolCall(name, arguments)], _with_finish(example), values_equal=equal_python)
    if score.TS + score.PI + score.CF == level:
        return score.reason
    return "scorer's order: an earlier accepted answer changed the call before this one was tried"


def _with_finish(example: EvalExample) -> list[GoldAnswer]:
    """The accepted answers, and beside each that calls the last tool the same under the name `finish`."""
    calls = [answer.calls[0] for answer in example.gold if answer.calls[0].name == example.meta["finish"]]
    return [*example.gold, *(GoldAnswer((replace(call, name="finish"),), order_free=False) for call in calls)]


# ---------------------------------------------------------------------------------------------------------- whole files


def evaluate_rotbench(examples: Sequence[EvalExample], calls: Sequence[PredictedCall], rules: str) -> list[dict]:
    """One row per record: index, id, scenario, TS, PI, CF (0 or 1), reason ("" if correct).

    `calls` are those predicted for `examples`, in order; `rules` is one of RULES.
    """
    rows = []
    for example, call in zip(examples, calls, strict=True):
        score = (
            score_rotbench_call(call.name, call.arguments, example, rules)
            if not call.fault
            else CallScore(TS=False, PI=False, CF=False, reason=call.fault)
        )
        rows.append(
            {
                "index": example.index,
                "id": example.id,
                "scenario": example.meta["scenario"],
                "TS": int(score.TS),
                "PI": int(score.PI),
                "CF": int(score.CF),
                "reason": score.reason,
            }
        )
    return rows


def summarize_rotbench(
    examples: Sequence[EvalExample], predictions: Sequence[Prediction], rules: str
) -> tuple[list[dict], dict]:
    """The rows by `rules`, and a summary: rates, both rules side by side, rates by scenario and half of the noise."""
    calls = [read_call(prediction) for prediction in predictions]
    rows_by_rules = {name: evaluate_rotbench(examples, calls, name) for name in RULES}
    rows = rows_by_rules[rules]
    summary = {
        **summarize_results(rows),
        "rules": rules,
        "primary": rules,
        "variants": {name: rates(variant) for name, variant in rows_by_rules.items()},
    }
    for key, names in (("scenario", SCENARIOS), ("noise", ("tool", "parameter"))):
        groups = {name: [row for row, example in zip(rows, examples) if example.meta[key] == name] for name in names}
        summary[f"by_{key}"] = {name: rates(group) for name, group in groups.items() if group}
    return rows, summary


def rates(rows: Sequence[dict]) -> dict:
    """n, and per metric count, percentage and 95 % interval, without the errors."""
    summary = summarize_results(rows)
    return {key: summary[key] for key in RATE_KEYS}


def evaluate_rotbench_files(
    answers: Path, predictions: Path, limit: int | None, rules: str
) -> tuple[list[dict], dict, list[str]]:
    """(rows, summary, notices) for an answer file and a prediction file, official form or JSONL. Raises DataError."""
    examples = load_rotbench(answers)
    matched, notices = read_call_predictions(predictions, len(examples), limit)
    return *summarize_rotbench(examples[:limit], matched, rules), notices


# --------------------------------------------------------------------------------------------------------- command line


def read_flags(
    prog: str, default_rules: str, rules_help: Mapping[str, str], arguments: Sequence[str], *, execute_help: str = ""
) -> argparse.Namespace:
    """The flags of an evaluator of calls, --execute_code if it has an `execute_help`.

    Wrong ones end the program with one line and code 2.
    """
    parser = argparse.ArgumentParser(prog=prog, description="Score tool calls: TS, PI, CF.")
    parser.add_argument("--answers", type=Path, required=True, help="the benchmark's own file")
    parser.add_argument(
        "--predictions",
        type=Path,
        required=True,
        help='JSONL of {"index": 0, "output": "text"}, "format" where it is not tl; or a JSON list of '
        "records whose last conversations value is a ReAct text",
    )
    parser.add_argument(
        "--rules",
        choices=tuple(rules_help),
        default=default_rules,
        help="; ".join(f"{name}: {text}" for name, text in rules_help.items()) + " (default: %(default)s)",
    )
    if execute_help:
        parser.add_argument("--execute_code", action="store_true", help=execute_help)
    parser.add_argument("--output", type=Path, help="folder for results/<benchmark>.jsonl (default: none written)")
    parser.add_argument("--limit", type=int, help="score only the first N records (default: all, none may miss)")
    flags = parse_arguments(parser, arguments)
    if flags.limit is not None and flags.limit < 1:
        parser.error(f"--limit: found {flags.limit}, expected at least 1")
    return flags


def report_scores(flags: argparse.Namespace, rows: Sequence[dict], summary: Mapping, notices: Sequence[str]) -> None:
    """Notices to stderr, rows to --output, the summary as the last line of stdout."""
    for notice in notices:
        print(notice, file=sys.stderr)
    if flags.output is not None:
        write_json_lines(flags.output / "results" / f"{benchmark_of(flags.answers)}.jsonl", rows)
    print(json.dumps(summary))


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    rules_help = {"official": "as RoTBench's scorer, empty arguments are wrong", "fair": "empty arguments may be right"}
    flags = read_flags("evaluate_rotbench", "official", rules_help, arguments)
    return run_command(
        lambda: report_scores(
            flags, *evaluate_rotbench_files(flags.answers, flags.predictions, flags.limit, flags.rules)
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
