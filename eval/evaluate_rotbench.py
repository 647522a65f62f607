"""Score predictions on RoTBench, first or third turn, clean or with noise: file in, file out, no model.

    python -m eval.evaluate_rotbench --answers rotbench/First_Turn/clean.json --predictions FILE [--rules fair]
        [--output DIR]

`official` is what RoTBench's own scorer counts, record by record, quirks included. Its first rule makes every record
wrong whose predicted arguments are empty, so that even the gold answers reach only 97 of 105 on the clean set. `fair`
takes an empty object for arguments like any other, and tries every accepted answer on the call as it was predicted.
The steps and quirks: docs/evaluation.md.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.json_records import DataError, field_of
from data.tool_calls import ToolCall, ToolCallError
from data.tool_documents import normalize_tools
from data.trajectories import Message
from eval.benchmarks import BENCHMARKS, benchmark_of
from eval.evaluator_command_line import CALL_PREDICTIONS, add_rules, evaluator_parser, read_flags, run_evaluator
from eval.metrics import CallScore, GoldAnswer, GoldCall, equal_python, score_calls
from eval.predict.prediction_files import Prediction
from eval.predict.react_output import PredictedCall, parse_react, read_call, read_call_predictions
from eval.rates import rates, summarize_results
from eval.records import Record, Scores, ScoreSettings, limited, read_list

RULES = ("official", "fair")
EQUALITY = dict.fromkeys(RULES, equal_python)  # of values, for eval/reports/error_statistics.py
SCENARIOS = {
    "TG": "Text Generation",
    "RS": "Real-Time Search",
    "DU": "Data Understanding",
    "PL": "Personal Life",
    "AM": "Application Manipulation",
    "IR": "Information Retrieval",
    "FT": "Financial Transactions",
}

# ---------------------------------------------------------------------------------------------------------------------
# Records


def load_rotbench(path: Path) -> list[Record]:
    """Read RoTBench's own file, a JSON list: first or third turn, clean or with noise.

    `meta`: `scenario`; `finish` and `ask_to_user`, the names that noise has given to the tools in the last place and
    the last but one ("" where there is no such tool); `noise`, "tool" or "parameter" for the halves of slight, medium
    and heavy, else "". In the gold arguments the value "None" marks a wildcard, and of `finish` and `ask_to_user` all
    are. Raises DataError with `file:line`.
    """
    records = read_list(path)
    halves = path.stem in ("slight", "medium", "heavy") and len(records) % 2 == 0
    noises = ["tool", "parameter"] if halves else [""]
    return [
        _record(record, index, noises[index * len(noises) // len(records)], f"{path}:{line}")
        for index, (line, record) in enumerate(records)
    ]


def _record(record: object, index: int, noise: str, where: str) -> Record:
    turns = field_of(record, "conversations", list, where)
    if len(turns) < 3:
        raise DataError(f"{where}: found {len(turns)} conversations, expected system, user and the accepted answers")
    tools = normalize_tools(_tools(field_of(turns[0], "value", str, where), where), f"{where}: tools")
    names = ["", "", *(tool["function"]["name"] for tool in tools)]
    meta = {
        "scenario": field_of(record, "scenario", str, where),
        "finish": names[-1],
        "ask_to_user": names[-2],
        "noise": noise,
    }
    answers = field_of(turns[-1], "value", list, where)
    if not answers:
        raise DataError(f"{where}: found no accepted answer, expected at least one")
    return Record(
        index=index,
        id=field_of(record, "id", str, where),
        tools=tools,
        messages=[_message(turn, where) for turn in turns[1:-1]],
        gold=tuple(_answer(answer, names, where) for answer in answers),
        meta=meta,
    )


def _tools(system: str, where: str) -> object:
    """The tool list inside the system prompt: from the first square bracket to the bracket that closes it."""
    start = system.find("[")
    try:
        tools, _ = json.JSONDecoder().raw_decode(system, max(start, 0))
    except (ValueError, RecursionError):
        raise DataError(f"{where}: found no JSON list of tools in the system message, expected one") from None
    return tools


def _message(turn: object, where: str) -> Message:
    role, text = field_of(turn, "from", str, where), field_of(turn, "value", str, where)
    if role == "user":
        return Message(role="user", content=text.removesuffix("\nBegin!\n"))
    if role == "function":
        return Message(role="tool", content=text)
    if role != "assistant":
        raise DataError(f"{where}: found role {role!a}, expected user, assistant or function")
    try:
        name, arguments = parse_react(text)
    except ToolCallError as error:
        return Message(role="assistant", content=text, fault=str(error))
    if not isinstance(arguments, dict):
        return Message(role="assistant", content=text, fault=f"found {type(arguments).__name__} as arguments")
    return Message(role="assistant", content=text, call=ToolCall(name, arguments))


def _answer(answer: object, names: Sequence[str], where: str) -> GoldAnswer:
    if not isinstance(answer, str):
        raise DataError(f"{where}: found {type(answer).__name__} as accepted answer, expected text")
    try:
        name, arguments = parse_react(answer)
    except ToolCallError as error:
        raise DataError(f"{where}: accepted answer: {error}") from None
    if not isinstance(arguments, dict) or name not in names[2:]:
        raise DataError(f"{where}: found accepted answer {answer[:60]!a}, expected a call of one of the record's tools")
    wildcards = arguments if name in names[-2:] else [key for key, value in arguments.items() if value == "None"]
    return GoldAnswer(
        calls=(GoldCall(name=name, arguments=arguments, wildcards=frozenset(wildcards)),), order_free=False
    )


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score_rotbench_call(name: str, arguments: object, example: Record, rules: str) -> CallScore:
    """Score one call by the steps of RoTBench's scorer (its Code/Evaluation/evaluate.py; docs/evaluation.md).

    1. Arguments that Python takes for false (`{}`, `[]`, 0, null) make all three metrics wrong; `fair` lets `{}` pass.
    2. The accepted answers are tried in order. Where one calls the tool in the last place, a predicted `finish` is
       renamed to that tool; with `official` it keeps that name for the answers that follow.
    3. TS: equal names. Arguments that are not an object stop the scorer here: TS counts, PI and CF are wrong.
    4. PI: also equal sets of argument names; what the document requires does not matter.
    5. CF: also equal values (`==`) of all arguments but those with the gold value "None". With `official` the latter
       are deleted from the prediction, which the answers that follow then see without them. Values do not count for the
       tools in the last two places, nor for gold tools that noise has named `finish` or `ask_to_user`.
    Raises ValueError for other rules.
    """
    if rules not in RULES:
        raise ValueError(f"found rules {rules!a}, expected one of {', '.join(RULES)}")
    if not arguments and (rules == "official" or not isinstance(arguments, dict)):  # 1
        return CallScore("empty arguments: wrong by RoTBench's first rule")
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
    return CallScore(_reason(name, arguments, example, level), TS=level >= 1, PI=level >= 2, CF=level == 3)


def _reason(name: str, arguments: object, example: Record, level: int) -> str:
    """Why the call is wrong: the difference to an accepted answer, or the quirk where that does not explain it."""
    if level == 3:
        return ""
    if not isinstance(arguments, dict):
        return f"unparsable: found {type(arguments).__name__} as arguments, expected an object"
    score = score_calls([ToolCall(name, arguments)], _with_finish(example), values_equal=equal_python)
    if score.TS + score.PI + score.CF == level:
        return score.reason
    return "scorer's order: an earlier accepted answer changed the call before this one was tried"


def _with_finish(example: Record) -> list[GoldAnswer]:
    """The accepted answers, and for each that calls the last tool the same one under the name `finish`."""
    calls = [answer.calls[0] for answer in example.gold if answer.calls[0].name == example.meta["finish"]]
    return [*example.gold, *(GoldAnswer((replace(call, name="finish"),), order_free=False) for call in calls)]


def evaluate_rotbench(examples: Sequence[Record], calls: Sequence[PredictedCall], rules: str) -> list[dict]:
    """One row per record: index, id, scenario, TS, PI, CF (0 or 1), reason ("" if correct).

    `calls` are those predicted for `examples`, in order; `rules` is one of RULES.
    """
    rows = []
    for example, call in zip(examples, calls, strict=True):
        fault = call.fault
        score = CallScore(fault) if fault else score_rotbench_call(call.name, call.arguments, example, rules)
        rows.append({"index": example.index, "id": example.id, "scenario": example.meta["scenario"], **score.as_row()})
    return rows


def summarize_rotbench(
    examples: Sequence[Record], predictions: Sequence[Prediction], rules: str
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


def score_rotbench(records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
    """Rows, summary and notices for a prediction file, official form or JSONL. Raises DataError, `file:line`."""
    matched, notices = read_call_predictions(predictions, len(records), settings.limit)
    return Scores(*summarize_rotbench(limited(records, settings.limit), matched, settings.rules), notices)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = evaluator_parser(
        "evaluate_rotbench",
        "Score tool calls: TS, PI, CF.",
        answers="the benchmark's own file, of any turn and noise",
        predictions=CALL_PREDICTIONS,
    )
    add_rules(
        parser,
        BENCHMARKS["rotbench-clean"].rules,
        official="as RoTBench's scorer, empty arguments are wrong",
        fair="empty arguments may be right",
    )
    flags = read_flags(parser, arguments)
    return run_evaluator(flags, benchmark_of(flags.answers, "rotbench"), load_rotbench, score_rotbench)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
