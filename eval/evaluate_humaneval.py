"""HumanEval: completions of functions, judged by running them in the sandbox. File in, file out, no model.

    python -m eval.evaluate_humaneval --answers humaneval/HumanEval.jsonl.gz --predictions FILE --execute_code
        [--output DIR]

This runs code that a model wrote, so it does nothing without --execute_code. The summary says under "sandbox" what
confines that code, and what is missing on a machine (docs/sandbox.md). pass_at_1 is the share of problems whose one
completion passes the benchmark's test. The TL-Training paper names the set without a protocol; the choices:
docs/evaluation.md.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data.json_records import DataError, field_of, read_json_lines
from eval.benchmarks import BENCHMARKS
from eval.evaluator_command_line import evaluator_parser, read_flags, run_evaluator
from eval.predict.cut_output import cut_at
from eval.predict.prediction_files import Prediction, dropped_notice, match_predictions, read_matched
from eval.rates import count_errors, rate_summary
from eval.records import Record, Scores, ScoreSettings, limited, read_lines
from eval.sandbox.run import CheckResult, run_check, run_python

SECONDS, MEMORY_MIB = 3.0, 512  # the benchmark's time limit; it sets no limit of memory by default
# A function's body is indented: text at the left margin is no longer part of it.
STOP_TEXTS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """What each problem may use, and how many are checked at a time."""

    seconds: float = SECONDS
    memory_bytes: int = MEMORY_MIB << 20
    workers: int = os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# Records


def load_humaneval(path: Path) -> list[Record]:
    """Read lines `{"task_id", "prompt", "entry_point", "canonical_solution", "test"}`; a `.gz` file is unpacked.

    `text` is the prompt: imports, helpers, signature and docstring of the function to be completed. `meta`:
    `entry_point`, its name; `canonical_solution`, a right completion; `test`, Python text that defines
    check(candidate). Raises DataError with `file:line`.
    """
    records = []
    for line, row in read_lines(path):
        where = f"{path}:{line}"
        meta = {key: field_of(row, key, str, where) for key in ("entry_point", "canonical_solution", "test")}
        if not meta["entry_point"].isidentifier():
            raise DataError(f"{where}: found entry_point {meta['entry_point']!a}, expected a function's name")
        task_id, prompt = (field_of(row, key, str, where) for key in ("task_id", "prompt"))
        records.append(Record(len(records), id=task_id, text=prompt, meta=meta))
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def read_completions(path: Path, records: Sequence[Record], limit: int | None) -> tuple[list[Prediction], list[str]]:
    """The completions of a prediction file, and notices worth showing.

    An output of ours is cut to the function's body. The benchmark's own samples, lines `{"task_id", "completion"}`, one
    per problem, are taken as they are; the first line tells which form it is. Raises DataError.
    """
    rows, has_dropped = read_json_lines(path, drop_partial_last_line=True)
    if not rows or "task_id" not in rows[0][1]:
        matched, notices = read_matched(path, len(records), limit)
        return [replace(each, output=cut_at(each.output, STOP_TEXTS)[0]) for each in matched], notices
    index_of = {record.id: record.index for record in records}
    predictions = []
    for line, row in rows:
        task_id, completion = (field_of(row, key, str, f"{path}:{line}") for key in ("task_id", "completion"))
        if task_id not in index_of:
            raise DataError(f"{path}:{line}: found task_id {task_id!a}, expected one of the benchmark's")
        predictions.append(Prediction(index=index_of[task_id], output=completion, format="tl", stop="", line=line))
    return match_predictions(predictions, len(records), limit, path=path), dropped_notice(path, has_dropped)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def check_completion(problem: Record, completion: str, *, seconds: float, memory_bytes: int) -> CheckResult:
    """Run the problem's test on `prompt + completion`, twice. Raises SandboxError if nothing can be run.

    First the test runs in a process of its own, with the prompt but without the completion, and calls the completed
    function in another (eval/sandbox/run.py:run_check): that verdict cannot be forged. What passes must also pass as
    the benchmark runs it, joined with its test to one program, whose verdict alone a completion could forge.
    """
    entry_point, test = problem.meta["entry_point"], problem.meta["test"]
    result = run_check(
        problem.text + completion + "\n",
        entry_point=entry_point,
        checker=f"{problem.text}\n{test}\n",
        seconds=seconds,
        memory_bytes=memory_bytes,
    )
    if not result.passed:
        return result
    joined = f"{problem.text}{completion}\n{test}\ncheck({entry_point})"
    # In a namespace of its own as in the benchmark's code, so that it is not `__main__`. Only ever in the sandbox.
    program = f"exec(compile({joined!a}, 'joined', 'exec'), {{}})"
    outcome = run_python(program, seconds=seconds, memory_bytes=memory_bytes)
    if outcome.passed:
        return result
    last = "timed out" if outcome.timed_out else (outcome.stderr.strip().splitlines() or ["no error"])[-1]
    return replace(result, passed=False, reason=f"wrong in one program with its test: {ascii(last)[1:-1][:200]}")


def evaluate_humaneval(
    problems: Sequence[Record], predictions: Sequence[Prediction], limits: CheckLimits
) -> tuple[list[dict], dict[str, str]]:
    """One row per problem: index, task_id, passed (0 or 1), reason; and what confined the code.

    `predictions` are those of `problems`, in order. Raises SandboxError.
    """

    def check(problem: Record, prediction: Prediction) -> CheckResult:
        if prediction.stop == "prompt_too_long":
            return CheckResult(False, "no output: the prompt does not fit the model's positions", {})
        return check_completion(problem, prediction.output, seconds=limits.seconds, memory_bytes=limits.memory_bytes)

    rows, applied = [], {}
    with ThreadPoolExecutor(max_workers=limits.workers) as executor:
        results: Iterator[CheckResult] = executor.map(check, problems, predictions)
        try:
            for problem, result in zip(problems, tqdm(results, "HumanEval", len(problems), disable=None)):
                applied = result.limits_applied or applied
                rows.append(
                    {
                        "index": problem.index,
                        "task_id": problem.id,
                        "passed": int(result.passed),
                        "reason": result.reason,
                    }
                )
        except BaseException:
            executor.shutdown(cancel_futures=True)  # else an interrupted run would first work off all that is queued
            raise
    return rows, applied


def summarize_humaneval(rows: Sequence[dict], limits: dict[str, str]) -> dict:
    """n, pass_at_1 with its 95 % interval, errors by category, the limits that were in force."""
    return {
        "n": len(rows),
        **rate_summary("pass_at_1", sum(row["passed"] for row in rows), len(rows)),
        "errors": count_errors(rows),
        "sandbox": limits,
    }


def score_humaneval(
    records: Sequence[Record], predictions: Path, settings: ScoreSettings, limits: CheckLimits | None = None
) -> Scores:
    """Rows, summary and notices for a prediction file, after running its code.

    Raises DataError with `file:line`, also without `execute_code`, and SandboxError where no code can be run.
    """
    if not settings.execute_code:
        raise DataError(
            "--execute_code: found off, expected on for humaneval, whose scoring runs code that a model wrote"
        )
    matched, notices = read_completions(predictions, records, settings.limit)
    rows, applied = evaluate_humaneval(limited(records, settings.limit), matched, limits or CheckLimits())
    open_ends = [name for name, text in applied.items() if text.startswith("NOT CONFINED")]
    if open_ends:
        notices.append(f"sandbox: on this machine nothing confines {', '.join(open_ends)} of the code that ran")
    return Scores(rows, summarize_humaneval(rows, applied), notices)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = evaluator_parser(
        "evaluate_humaneval",
        "Score predictions on HumanEval.",
        answers="HumanEval.jsonl.gz or HumanEval.jsonl",
        predictions='JSONL of {"index": 0, "output": "text"}, cut at the end of the function; or of '
        '{"task_id", "completion"}, taken as it is',
    )
    parser.add_argument("--execute_code", action="store_true", help="run the predicted code, in the sandbox")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="wall time per problem (default: %(default)s)")
    parser.add_argument("--memory_mib", type=int, default=MEMORY_MIB, help="memory per process (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="problems at a time (default: CPUs)")
    flags = read_flags(parser, arguments)
    for name in ("workers", "seconds", "memory_mib"):
        value = getattr(flags, name)
        if not 0 < value < 1e6:  # not for nan either
            parser.error(f"--{name}: found {value}, expected a positive number below 1000000")
    if not flags.execute_code:
        parser.error("--execute_code: found no such flag, expected it, since this runs code that a model wrote")
    limits = CheckLimits(flags.seconds, flags.memory_mib << 20, flags.workers)

    def score(records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
        return score_humaneval(records, predictions, settings, limits)

    return run_evaluator(flags, BENCHMARKS["humaneval"], load_humaneval, score)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
