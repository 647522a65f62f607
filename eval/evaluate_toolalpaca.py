"""Score predictions on ToolAlpaca's real APIs as single calls: file in, file out, no model.

    python -m eval.evaluate_toolalpaca --answers toolalpaca/eval_real.masked.json --predictions FILE [--rules official]
        [--output DIR]

ToolAlpaca's own judgement is GPT-4's of whole solutions; the TL-Training paper instead applies RoTBench's metrics to
one call, and leaves the details open. The rows are scored by the primary variant of `--rules`; the summary has all
variants side by side (docs/evaluation.md).
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.json_records import DataError, field_of
from data.tool_calls import ToolCall
from data.tool_documents import normalize_tools
from data.trajectories import Message
from eval.benchmarks import BENCHMARKS
from eval.evaluator_command_line import CALL_PREDICTIONS, add_rules, evaluator_parser, read_flags, run_evaluator
from eval.metrics import CallScore, GoldAnswer, GoldCall, equal_json, equal_lenient, equal_python, score_calls
from eval.predict.prediction_files import Prediction
from eval.predict.react_output import PredictedCall, read_call, read_call_predictions
from eval.rates import rates, summarize_results
from eval.records import Record, Scores, ScoreSettings, limited, read_list

MASKED_API_KEY = "MASKED_API_KEY"  # in place of the keys that the gold answers were published with

# Variant -> what it changes against first_call, the primary one of `--rules fair`.
VARIANTS = {
    "first_call": "gold is the instruction's first call, {} may be right, values equal as JSON, API keys literally",
    "rotbench_rules": "empty arguments are wrong, others that are not an object count for TS, values by Python's ==: "
    "primary with --rules official",
    "any_call": "any gold call of the instruction is accepted",
    "authentication_ignored": "an API key must be named, its value is free",
    "lenient_values": '"2024" is 2024, letter case and blanks at the ends of strings do not count',
}
PRIMARY = {"official": "rotbench_rules", "fair": "first_call"}
EQUALITY = {"official": equal_python, "fair": equal_json}  # of values, for eval/reports/error_statistics.py


_SPECIAL_TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {parameter: {"type": "string", "description": meaning}},
                "required": [parameter],
            },
        },
    }
    for name, description, parameter, meaning in (
        ("ask_to_user", "Ask the user for what the request leaves open.", "question", "The question to the user."),
        ("finish", "End the dialogue with an answer to the request.", "answer", "The answer for the user."),
    )
)
_PARAMETER_TEXT = re.compile(r"(Required\. )?(\w+)\.(?:\s+|$)(.*)", re.DOTALL)
_DOUBLED_KEY = re.compile(r'("[^"]+": )\1')  # `"symbols": "symbols": [..]` in four gold inputs of CurrencyBeacon


# ---------------------------------------------------------------------------------------------------------------------
# Records


def load_toolalpaca(path: Path) -> list[Record]:
    """Read ToolAlpaca's eval_real.json, masked or not: one example per instruction, in the file's order.

    Tools are the API's documented functions, then `ask_to_user` and `finish`, as in all training data. `gold` is the
    first gold call. `meta`: `api`; `gold_calls`, all calls of the instruction; `authentication`, the names of the API's
    key parameters; `is_documented`, whether the first gold call's function is. API keys in the gold are masked.
    Raises DataError with `file:line`.
    """
    records: list[Record] = []
    for line, item in read_list(path):
        where = f"{path}:{line}"
        tools = _tools(item, where)
        answers = field_of(item, "Golden_Answers", list, where)
        instructions = field_of(item, "Instructions", list, where)
        if len(answers) != len(instructions):
            raise DataError(
                f"{where}: found {len(answers)} Golden_Answers for {len(instructions)} Instructions, expected one each"
            )
        api = field_of(item, "Name", str, where)
        shared_meta = {"api": api, "authentication": sorted(field_of(item, "Authentication", dict, where))}
        documented = {tool["function"]["name"] for tool in tools}
        for number, (instruction, answer) in enumerate(zip(instructions, answers)):
            here = f"{where}: instruction {number}"
            if not isinstance(instruction, str):
                raise DataError(f"{here}: found {type(instruction).__name__}, expected text")
            calls = _calls(answer, shared_meta["authentication"], here)
            records.append(
                Record(
                    index=len(records),
                    id=f"{api}/{number}",
                    tools=tools,
                    messages=[Message(role="user", content=instruction)],
                    gold=(GoldAnswer(calls=(calls[0],), order_free=False),),
                    meta={**shared_meta, "gold_calls": calls, "is_documented": calls[0].name in documented},
                )
            )
    return records


def _tools(record: object, where: str) -> list[dict]:
    documents = field_of(record, "Function_Description", dict, where)
    tools = [
        _tool(name, text, f"{where}: {name!a}") for name, text in documents.items() if name != "components"
    ]  # prose about the types of results
    return normalize_tools([*tools, *_SPECIAL_TOOLS], f"{where}: tools")


def _tool(name: str, text: object, where: str) -> dict:
    """`description`, `Parameters: {name: "Required. type. description"}`, then what the result looks like."""
    description, mark, rest = text.partition("Parameters: ") if isinstance(text, str) else ("", "", "")
    try:
        parameters, _ = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):
        parameters = None
    if not mark or not isinstance(parameters, dict):
        raise DataError(f"{where}: found no 'Parameters: ' with a JSON object, expected one")
    properties, required = {}, []
    for parameter, spec in parameters.items():
        match = _PARAMETER_TEXT.fullmatch(spec) if isinstance(spec, str) else None
        if match is None:
            raise DataError(f"{where}: found {spec!a} for {parameter!a}, expected 'Required. type. description'")
        properties[parameter] = {"type": match[2], "description": match[3].strip()}
        if match[1]:
            required.append(parameter)
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description.strip(),
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def _calls(answer: object, authentication: Sequence[str], where: str) -> tuple[GoldCall, ...]:
    if not isinstance(answer, list) or not answer:
        raise DataError(f"{where}: found no gold call, expected at least one")
    calls = []
    for call in answer:
        name, source = field_of(call, "Action", str, where), field_of(call, "Action_Input", str, where)
        try:
            arguments = json.loads(_DOUBLED_KEY.sub(r"\1", source))
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise DataError(f"{where}: found Action_Input {source[:40]!a}, expected a JSON object")
        masked = {key: MASKED_API_KEY for key in authentication if key in arguments}
        calls.append(GoldCall(name=name, arguments={**arguments, **masked}, wildcards=frozenset()))
    return tuple(calls)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score_toolalpaca_call(name: str, arguments: object, example: Record, variant: str) -> CallScore:
    """Score one call by `variant`, a key of VARIANTS. Raises ValueError for another name."""
    if variant not in VARIANTS:
        raise ValueError(f"found variant {variant!a}, expected one of {', '.join(VARIANTS)}")
    if variant == "rotbench_rules" and not arguments:
        return CallScore("empty arguments: wrong by RoTBench's first rule")
    if not isinstance(arguments, dict):
        # RoTBench's scorer compares the names first, and stops at arguments that have no keys.
        has_tool = variant == "rotbench_rules" and name == example.gold[0].calls[0].name
        found = type(arguments).__name__
        return CallScore(f"unparsable: found {found} as arguments, expected an object", TS=has_tool)
    answers = example.gold
    if variant == "any_call":
        answers = [GoldAnswer((call,), order_free=False) for call in example.meta["gold_calls"]]
    elif variant == "authentication_ignored":
        gold = example.gold[0].calls[0]
        free = frozenset(key for key in example.meta["authentication"] if key in gold.arguments)
        answers = [GoldAnswer((replace(gold, wildcards=free),), order_free=False)]
    values_equal = {"rotbench_rules": equal_python, "lenient_values": equal_lenient}.get(variant, equal_json)
    return score_calls([ToolCall(name, arguments)], answers, values_equal=values_equal)


def evaluate_toolalpaca(examples: Sequence[Record], calls: Sequence[PredictedCall], variant: str) -> list[dict]:
    """One row per instruction: index, id, api, TS, PI, CF (0 or 1), reason ("" if correct).

    `calls` are those predicted for `examples`, in order; `variant` is a key of VARIANTS.
    """
    rows = []
    for example, call in zip(examples, calls, strict=True):
        fault = call.fault
        score = CallScore(fault) if fault else score_toolalpaca_call(call.name, call.arguments, example, variant)
        rows.append({"index": example.index, "id": example.id, "api": example.meta["api"], **score.as_row()})
    return rows


def summarize_toolalpaca(
    examples: Sequence[Record], predictions: Sequence[Prediction], rules: str
) -> tuple[list[dict], dict]:
    """The rows by the primary variant of `rules`, and a summary with all variants side by side and rates by API."""
    calls = [read_call(prediction) for prediction in predictions]
    rows_by_variant = {variant: evaluate_toolalpaca(examples, calls, variant) for variant in VARIANTS}
    rows = rows_by_variant[PRIMARY[rules]]
    apis = dict.fromkeys(row["api"] for row in rows)
    return rows, {
        **summarize_results(rows),
        "rules": rules,
        "primary": PRIMARY[rules],
        "variants": {variant: rates(scored) for variant, scored in rows_by_variant.items()},
        "by_api": {api: rates([row for row in rows if row["api"] == api]) for api in apis},
    }


def score_toolalpaca(records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
    """Rows, summary and notices for a prediction file. Raises DataError, `file:line`."""
    matched, notices = read_call_predictions(predictions, len(records), settings.limit)
    return Scores(*summarize_toolalpaca(limited(records, settings.limit), matched, settings.rules), notices)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = evaluator_parser(
        "evaluate_toolalpaca",
        "Score tool calls: TS, PI, CF.",
        answers="the benchmark's eval_real.json, masked or not",
        predictions=CALL_PREDICTIONS,
    )
    add_rules(
        parser,
        BENCHMARKS["toolalpaca"].rules,
        official="RoTBench's rules, empty arguments are wrong",
        fair="empty arguments may be right",
    )
    flags = read_flags(parser, arguments)
    return run_evaluator(flags, BENCHMARKS["toolalpaca"], load_toolalpaca, score_toolalpaca)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
