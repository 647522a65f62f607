"""DE, CE and VA of dialogues (E32 to E35, docs/multi_turn.md): pure functions, no files, no model.

The unit of DE and CE is one attempted call: every call of a turn but `finish` and `ask_to_user`, and every output that
is not a call at all. The documents judge it first, the feedback second (data/error_filter.py).
    DE   documentation understanding error: tool or parameter not documented, required parameter absent
    CE   tool call error: any other error of a call, and outputs that do not parse
    VA   valid answer: the dialogue ends in time with the model's own `finish`, whose answer is valid and not a give-up
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from data.error_filter import CATEGORIES, classify_feedback
from data.tool_calls import ToolCall
from data.tool_documents import IMPLICIT_TOOLS
from eval.confidence import Z_95, wilson_interval
from eval.dialogues.journal import EXECUTORS, RecordedDialogue
from eval.rates import rate_summary
from eval.records import Record

MAX_TURNS = 9  # outputs of a model per dialogue (paper, section 4.3; the same in ToolEyes' own loop)
DE_CATEGORIES = ("tool_hallucination", "parameter_hallucination", "parameter_missing")
CE_CATEGORIES = ("tool_call_failure", "tool_instability", "unparsable")
ANSWER_KEYS = ("answer", "final_answer")  # the second belongs to ToolLLaMA's own `Finish`
# An answer that holds one of these, in any letter case, is not valid. ToolEyes' prompt asks for the first where a task
# cannot be done, and its loop writes it when it breaks off; the last is ToolLLaMA's own phrase.
GIVE_UPS = (
    "cannot handle the task",
    "can not handle the task",
    "can't handle the task",
    "unable to handle the task",
    "give up and restart",
)

# ---------------------------------------------------------------------------------------------------------------------
# One dialogue


def call_categories(dialogue: RecordedDialogue, tools: list[dict]) -> list[str]:
    """The category of each attempted call, one of data.error_filter.CATEGORIES, in order."""
    categories = []
    for turn in dialogue.turns:
        if turn["fault"]:
            categories.append("unparsable")
        categories += [
            classify_feedback(call["feedback"], ToolCall(call["name"], call["arguments"]), tools)
            for call in turn["calls"]
            if call["name"].lower() not in IMPLICIT_TOOLS
        ]
    return categories


def answer_fault(dialogue: RecordedDialogue, max_turns: int) -> str:
    """Why the dialogue ends without a valid answer, "" if it has one (E34)."""
    if dialogue.end != "finish":
        return f"no finish: {dialogue.end}"
    if len(dialogue.turns) > max_turns:
        return f"finish in turn {len(dialogue.turns)} of at most {max_turns}"
    calls = dialogue.turns[-1]["calls"] if dialogue.turns else []
    if not calls or calls[-1]["name"].lower() != "finish":
        return "no finish: the last turn does not call it"
    arguments = calls[-1]["arguments"]
    answer = next((arguments[key] for key in ANSWER_KEYS if key in arguments), None)
    if answer in (None, "", [], {}) or isinstance(answer, str) and not answer.strip():
        return "empty answer"
    if _gives_up(answer) or _gives_up(arguments.get("return_type")):
        return "give-up"
    return ""  # E34


def _gives_up(value: object) -> bool:
    if not isinstance(value, str):
        return False
    text = " ".join(re.sub(r"[_\s]+", " ", value.replace("\u2019", "'")).lower().split())
    return any(phrase in text for phrase in GIVE_UPS)


def score_dialogue(dialogue: RecordedDialogue, task: Record, max_turns: int) -> dict:
    """The results row: attempted calls, calls with DE and with CE, whether there are any (0 or 1), VA, categories."""
    categories = call_categories(dialogue, task.tools)
    n_de = sum(category in DE_CATEGORIES for category in categories)  # E32
    n_ce = sum(category in CE_CATEGORIES for category in categories)  # E33
    fault = answer_fault(dialogue, max_turns)  # E34
    return {
        "index": dialogue.index,
        "id": task.id,
        "scenario": task.meta.get("scenario", ""),
        "turns": len(dialogue.turns),
        "calls": len(categories),
        "DE": n_de,
        "CE": n_ce,
        "DE_dialogues": int(n_de > 0),
        "CE_dialogues": int(n_ce > 0),
        "VA": int(not fault),
        "end": dialogue.end,
        "categories": categories,
        "reason": fault,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


def score_dialogues(
    dialogues: Sequence[RecordedDialogue], tasks: Sequence[Record], max_turns: int = MAX_TURNS
) -> tuple[list[dict], dict]:
    """(rows, summary) of dialogues with their tasks, in the same order; at least one.

    The summary has n (dialogues), n_calls, DE, CE (counts of calls), VA, DE_dialogues, CE_dialogues (counts of
    dialogues with such a call), for each its percentage and 95 % interval; errors (calls by category), executors (calls
    by who answered), ends and turns (dialogues by how and after how many turns they ended), by_scenario.
    """
    rows = [score_dialogue(dialogue, task, max_turns) for dialogue, task in zip(dialogues, tasks, strict=True)]
    counts = Counter(category for row in rows for category in row["categories"])
    executors = Counter(
        call["executor"]
        for dialogue in dialogues
        for turn in dialogue.turns
        for call in turn["calls"]
        if call["name"].lower() not in IMPLICIT_TOOLS
    )
    summary = {
        **dialogue_rates(rows),
        "errors": {
            category: counts[category] for category in CATEGORIES if category in counts and category != "all_right"
        },
        "executors": {name: executors[name] for name in EXECUTORS if executors[name]},
        "ends": dict(sorted(Counter(dialogue.end for dialogue in dialogues).items())),
        "turns": dict(sorted(Counter(str(row["turns"]) for row in rows).items(), key=lambda item: int(item[0]))),
        "no_answer": dict(sorted(Counter(row["reason"] for row in rows if row["reason"]).items())),
    }
    scenarios = sorted({row["scenario"] for row in rows if row["scenario"]})
    if scenarios:
        summary["by_scenario"] = {
            name: dialogue_rates([row for row in rows if row["scenario"] == name]) for name in scenarios
        }
    return rows, summary


def dialogue_rates(rows: Sequence[Mapping]) -> dict:
    """Counts, percentages and 95 % intervals (in percent) of results rows, at least one."""
    n, calls = len(rows), [row["calls"] for row in rows]
    summary: dict = {"n": n, "n_calls": sum(calls)}
    for metric in ("DE", "CE"):
        errors = [row[metric] for row in rows]
        interval = clustered_interval(errors, calls, Z_95)  # E35
        summary |= {metric: sum(errors), f"{metric}_percent": round(100 * sum(errors) / (sum(calls) or 1), 2)}
        summary[f"{metric}_interval_95"] = [round(100 * bound, 2) for bound in interval]
    for metric in ("VA", "DE_dialogues", "CE_dialogues"):
        summary |= rate_summary(metric, sum(row[metric] for row in rows), n)  # E20
    return summary


def clustered_interval(errors: Sequence[int], calls: Sequence[int], z: float) -> tuple[float, float]:
    """Bounds (low, high) of an interval for the share of erroneous calls, given both numbers per dialogue (E35).

        p = X / M,  X = sum x_i,  M = sum m_i,  D = max(1, sum (x_i - p m_i)^2 / (p (1 - p) M)),  Wilson at n = M / D

    Calls of one dialogue fail together: a model that does not understand a tool calls it nine times. If they were
    treated as independent, intervals would be too narrow. So Wilson's interval is taken for M / D calls instead of M,
    where D is the design effect: the variance of p between dialogues over the binomial one (Kish 1965; ratio estimator,
    Cochran 1977, section 6.3). With one call per dialogue D = 1. At p = 0, at p = 1 and with one dialogue nothing shows
    how strongly calls depend on each other; n is then the number of dialogues with a call, as if each were one trial.
    (0, 1) without calls. Raises ValueError unless 0 <= x_i <= m_i.
    """
    if len(errors) != len(calls) or any(not 0 <= x <= m for x, m in zip(errors, calls)):
        raise ValueError(f"found {sum(errors)} errors of {sum(calls)} calls, expected 0 <= errors <= calls everywhere")
    n_errors, n_calls = sum(errors), sum(calls)
    if n_calls == 0:
        return 0.0, 1.0
    p, n_dialogues = n_errors / n_calls, sum(m > 0 for m in calls)
    if n_errors in (0, n_calls) or n_dialogues == 1:
        return wilson_interval(p * n_dialogues, n_dialogues, z)
    between = math.fsum((x - p * m) ** 2 for x, m in zip(errors, calls))
    n_effective = max(1.0, n_calls / max(1.0, between / (p * (1 - p) * n_calls)))  # E35
    return wilson_interval(p * n_effective, n_effective, z)
