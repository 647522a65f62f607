"""Score predictions on ToolAlpaca's real APIs as single calls: file in, file out, no model.

    python -m eval.evaluate_toolalpaca --answers toolalpaca/eval_real.masked.json --predictions FILE [--rules official]
        [--output DIR]

ToolAlpaca's own judgement is GPT-4's of whole solutions; the TL-Training paper instead applies RoTBench's metrics to
one call, and leaves the details open. The rows are scored by the primary variant of `--rules`; the summary has all
variants side by side (docs/evaluation.md).
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data.tool_calls import ToolCall
from eval.benchmark_data import EvalExample, load_toolalpaca
from eval.command_line import run_command
from eval.evaluate_rotbench import rates, read_flags, report_scores
from eval.metrics import CallScore, GoldAnswer, equal_json, equal_lenient, equal_python, score_calls
from eval.predict.prediction_files import Prediction
from eval.predict.react_output import PredictedCall, read_call, read_call_predictions
from eval.reports.report import summarize_results

# Variant -> what it changes against first_call, the primary one of `--rules fair`.
VARIANTS = {
    "first_call": "gold is the instruction's first call, {} may be right, values equal as JSON, API keys literally",
    "rotbench_rules": "empty arguments are wrong, values by Python's ==: primary with --rules official",
    "any_call": "any gold call of the instruction is accepted",
    "authentication_ignored": "an API key must be named, its value is free",
    "lenient_values": '"2024" is 2024, letter case and blanks at the ends of strings do not count',
}
PRIMARY = {"official": "rotbench_rules", "fair": "first_call"}


# ----------------------------------------------------------------------------------------------------------- one record


def score_toolalpaca_call(name: str, arguments: object, example: EvalExample, variant: str) -> CallScore:
    """Score one call by `variant`, a key of VARIANTS. Raises ValueError for another name."""
    if variant not in VARIANTS:
        raise ValueError(f"found variant {variant!a}, expected one of {', '.join(VARIANTS)}")
    if variant == "rotbench_rules" and not arguments:
        return CallScore(TS=False, PI=False, CF=False, reason="empty arguments: wrong by RoTBench's first rule")
    if not isinstance(arguments, dict):
        return CallScore(
            TS=False,
            PI=False,
            CF=False,
            reason=f"unparsable: found {type(arguments).__name__} as arguments, expected an object",
        )
    answers = example.gold
    if variant == "any_call":
        answers = [GoldAnswer((call,), order_free=False) for call in example.meta["gold_calls"]]
    elif variant == "authentication_ignored":
        gold = example.gold[0].calls[0]
        free = frozenset(key for key in example.meta["authentication"] if key in gold.arguments)
        answers = [GoldAnswer((replace(gold, wildcards=free),), order_free=False)]
    return score_calls([ToolCall(name, arguments)], answers, values_equal=_equality_of(variant))


def _equality_of(variant: str) -> Callable[[object, object], bool]:
    return {"rotbench_rules": equal_python, "lenient_values": equal_lenient}.get(variant, equal_json)


# ---------------------------------------------------------------------------------------------------------- whole files


def evaluate_toolalpaca(examples: Sequence[EvalExample], calls: Sequence[PredictedCall], variant: str) -> list[dict]:
    """One row per instruction: index, id, api, TS, PI, CF (0 or 1), reason ("" if correct).

    `calls` are those predicted for `examples`, in order; `variant` is a key of VARIANTS.
    """
    rows = []
    for example, call in zip(examples, calls, strict=True):
        score = (
            score_toolalpaca_call(call.name, call.arguments, example, variant)
            if not call.fault
            else CallScore(TS=False, PI=False, CF=False, reason=call.fault)
        )
        rows.append(
            {
                "index": example.index,
                "id": example.id,
                "api": example.meta["api"],
                "TS": int(score.TS),
                "PI": int(score.PI),
                "CF": int(score.CF),
                "reason": score.reason,
            }
        )
    return rows


def summarize_toolalpaca(
    examples: Sequence[EvalExample], predictions: Sequence[Prediction], rules: str
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


def evaluate_toolalpaca_files(
    answers: Path, predictions: Path, limit: int | None, rules: str
) -> tuple[list[dict], dict, list[str]]:
    """(rows, summary, notices) for an answer file and a prediction file. Raises DataError, `file:line`."""
    examples = load_toolalpaca(answers)
    matched, notices = read_call_predictions(predictions, len(examples), limit)
    return *summarize_toolalpaca(examples[:limit], matched, rules), notices


# --------------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    rules_help = {"official": "RoTBench's rules, empty arguments are wrong", "fair": "empty arguments may be right"}
    flags = read_flags("evaluate_toolalpaca", "fair", rules_help, arguments)
    return run_command(
        lambda: report_scores(
            flags, *evaluate_toolalpaca_files(flags.answers, flags.predictions, flags.limit, flags.rules)
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
