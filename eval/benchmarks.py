"""The evaluator of every benchmark behind one function: what run_eval.py calls after the predictions are made.

Beside DE, CE and VA, which say whether calls worked and whether there was an answer, tiny-multi has `answer_right`: the
world is closed, so it is known what a right answer must hold.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from data.json_records import DataError, read_json_lines
from eval.benchmark_data import BENCHMARK_FILES, DIALOGUE_BENCHMARKS
from eval.confidence import Z_95, wilson_interval
from eval.dialogues.journal import DialogueTask, RecordedDialogue, match_dialogues, read_dialogues
from eval.dialogues.metrics import score_dialogues
from eval.evaluate_bfcl import evaluate_bfcl_files
from eval.evaluate_gsm8k import evaluate_gsm8k, summarize_gsm8k
from eval.evaluate_humaneval import MEMORY_MIB, SECONDS, evaluate_humaneval, summarize_humaneval
from eval.evaluate_mmlu import evaluate_mmlu, summarize_mmlu
from eval.evaluate_rotbench import evaluate_rotbench_files
from eval.evaluate_tiny import evaluate_tiny_files
from eval.evaluate_toolalpaca import evaluate_toolalpaca_files
from eval.general_tasks import (
    GSM8K_COUNT,
    HUMANEVAL_COUNT,
    MMLU_COUNT,
    count_notice,
    load_gsm8k,
    load_humaneval,
    load_mmlu,
    match_choices,
    match_completions,
    match_texts,
)
from eval.queries import load_tasks
from eval.reports.report import summarize_results
from eval.tooleyes_data import read_official_dialogues

Scores = tuple[list[dict], dict, list[str]]  # rows, summary, notices


def score_predictions(
    name: str, answers: Path, predictions: Path, *, limit: int | None, rules: str, execute_code: bool, max_turns: int
) -> Scores:
    """Rows of results, summary and notices worth showing for the prediction file of benchmark `name`.

    `rules` is "official", "fair" or "default", each benchmark's own; `max_turns` is for dialogues. Raises
    DataError with `file:line`, also for a benchmark whose scoring needs `execute_code`, and SandboxError where code
    can not be run.
    """
    if name in DIALOGUE_BENCHMARKS:
        return _score_dialogues(name, answers, predictions, limit, max_turns)
    if name.startswith("tiny-"):
        rows, notices = evaluate_tiny_files(answers, predictions, limit)
        return rows, summarize_results(rows), notices
    if name.startswith("rotbench-"):
        return evaluate_rotbench_files(answers, predictions, limit, "official" if rules == "default" else rules)
    if name == "toolalpaca":
        return evaluate_toolalpaca_files(answers, predictions, limit, "fair" if rules == "default" else rules)
    if name == "bfcl-exec":
        return evaluate_bfcl_files(
            answers, predictions, limit, "fair" if rules == "default" else rules, execute_code=execute_code
        )
    if name == "gsm8k":
        return _score_gsm8k(answers, predictions, limit)
    if name == "mmlu":
        return _score_mmlu(answers, predictions, limit)
    if name == "humaneval":
        return _score_humaneval(answers, predictions, limit, execute_code)
    raise DataError(f"--benchmarks: found {name}, expected one of {', '.join(BENCHMARK_FILES)}")


# ----------------------------------------------------------------------------------------------------------- dialogues


def _score_dialogues(name: str, answers: Path, predictions: Path, limit: int | None, max_turns: int) -> Scores:
    tasks = load_tasks(name, answers)
    lines, _ = read_json_lines(predictions, drop_partial_last_line=True)
    is_official = bool(lines) and "conversations" in lines[0][1]  # of ToolEyes' own loop
    found, has_dropped = read_official_dialogues(predictions, tasks) if is_official else read_dialogues(predictions)
    dialogues = match_dialogues(found, len(tasks), limit, path=predictions)
    rows, summary = score_dialogues(dialogues, tasks[:limit], max_turns)
    if name == "tiny-multi":
        rows, summary = add_right_answers(rows, summary, dialogues, tasks[:limit])
    return rows, summary, [f"{predictions}: dropped a partial last line"] if has_dropped else []


def is_answer_right(task: DialogueTask, dialogue: RecordedDialogue) -> bool:
    """Whether the answer given by `finish` holds every requested result of a tiny-multi task, `meta["results"]`.

    Each must stand there letter by letter and as whole words (`calm 6` is not in `calm 61`), in any order, whatever is
    beside it. The results come from the tools alone and no two of a task are equal, so a right answer shows that every
    right call was made.
    """
    last = dialogue.turns[-1]["calls"][-1:] if dialogue.end == "finish" and dialogue.turns else []
    answer = last[0]["arguments"].get("answer") if last else None
    return isinstance(answer, str) and all(
        re.search(rf"(?<!\w){re.escape(result)}(?!\w)", answer) for result in task.meta["results"]
    )


def add_right_answers(
    rows: Sequence[dict], summary: dict, dialogues: Sequence[RecordedDialogue], tasks: Sequence[DialogueTask]
) -> tuple[list[dict], dict]:
    """The rows and the summary of tiny-multi with `answer_right`, also by the number of requests in the query."""
    flags = [is_answer_right(task, dialogue) for task, dialogue in zip(tasks, dialogues, strict=True)]
    by_requests = {}
    for requests in sorted({task.meta["requests"] for task in tasks}):
        part = [flag for task, flag in zip(tasks, flags, strict=True) if task.meta["requests"] == requests]
        by_requests[str(requests)] = {"n": len(part), **_share_right(part)}
    return [{**row, "answer_right": int(flag)} for row, flag in zip(rows, flags, strict=True)], {
        **summary,
        **_share_right(flags),
        "by_requests": by_requests,
    }


def _share_right(flags: Sequence[bool]) -> dict:
    low, high = wilson_interval(sum(flags), len(flags), Z_95)  # E20
    return {
        "answer_right": sum(flags),
        "answer_right_percent": round(100 * sum(flags) / len(flags), 2),
        "answer_right_interval_95": [round(100 * low, 2), round(100 * high, 2)],
    }


# -------------------------------------------------------------------------------------------------------- general tasks


def _score_gsm8k(answers: Path, predictions: Path, limit: int | None) -> Scores:
    problems = load_gsm8k(answers)
    matched, notices = match_texts(predictions, len(problems), limit)
    rows = evaluate_gsm8k(problems[:limit], matched)
    return rows, summarize_gsm8k(rows), [*notices, *count_notice(answers, len(problems), GSM8K_COUNT)]


def _score_mmlu(answers: Path, predictions: Path, limit: int | None) -> Scores:
    questions, _ = load_mmlu(answers)
    matched, notices = match_choices(predictions, len(questions), limit)
    rows = evaluate_mmlu(questions[:limit], matched)
    return rows, summarize_mmlu(rows), [*notices, *count_notice(answers, len(questions), MMLU_COUNT)]


def _score_humaneval(answers: Path, predictions: Path, limit: int | None, execute_code: bool) -> Scores:
    if not execute_code:
        raise DataError(
            "--execute_code: found off, expected on for humaneval, whose scoring runs code that a model wrote"
        )
    problems = load_humaneval(answers)
    matched, notices = match_completions(predictions, problems, limit)
    rows, limits = evaluate_humaneval(
        problems[:limit], matched, seconds=SECONDS, memory_bytes=MEMORY_MIB << 20, workers=os.cpu_count() or 1
    )
    open_ends = [name for name, text in limits.items() if text.startswith("NOT CONFINED")]
    if open_ends:
        notices.append(f"sandbox: on this machine nothing confines {', '.join(open_ends)} of the code that ran")
    return rows, summarize_humaneval(rows, limits), [*notices, *count_notice(answers, len(problems), HUMANEVAL_COUNT)]
