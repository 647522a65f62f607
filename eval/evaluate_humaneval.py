"""Score predictions on HumanEval by running them in the sandbox: file in, file out, no model.

    python -m eval.evaluate_humaneval --answers humaneval/HumanEval.jsonl.gz --predictions FILE --execute_code
        [--output DIR]

This runs code that a model wrote, so it does nothing without --execute_code. What confines that code, and what is
missing on a machine, stands in the summary under "sandbox" (docs/sandbox.md). pass_at_1 is the share of problems whose
one completion passes the benchmark's test.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data.json_records import write_json_lines
from eval.command_line import parse_arguments, run_command
from eval.general_tasks import (
    HUMANEVAL_COUNT,
    CodeProblem,
    count_errors,
    count_notice,
    load_humaneval,
    match_completions,
    rate_summary,
)
from eval.predict.prediction_files import Prediction
from eval.sandbox.run import CheckResult, run_check

SECONDS, MEMORY_MIB = 3.0, 512  # the benchmark's time limit; it sets no limit of memory by default


def check_completion(problem: CodeProblem, completion: str, *, seconds: float, memory_bytes: int) -> CheckResult:
    """Run the problem's test on `prompt + completion`. Raises SandboxError if nothing can be run.

    The benchmark joins prompt, completion and test to one program. Here the test runs in a process of its own, with the
    prompt but without the completion, and calls the completed function in another (eval/sandbox/run.py:run_check).
    """
    return run_check(
        problem.prompt + completion + "\n",
        entry_point=problem.entry_point,
        checker=f"{problem.prompt}\n{problem.test}\n",
        seconds=seconds,
        memory_bytes=memory_bytes,
    )


def evaluate_humaneval(
    problems: Sequence[CodeProblem],
    predictions: Sequence[Prediction],
    *,
    seconds: float,
    memory_bytes: int,
    workers: int,
) -> tuple[list[dict], dict[str, str]]:
    """One row per problem: index, task_id, passed (0 or 1), reason; and the limits that were in force.

    `predictions` are those of `problems`, in order; `workers` run at the same time. Raises SandboxError.
    """

    def check(problem: CodeProblem, prediction: Prediction) -> CheckResult:
        if prediction.stop == "prompt_too_long":
            return CheckResult(False, "no output: the prompt does not fit the model's positions", {})
        return check_completion(problem, prediction.output, seconds=seconds, memory_bytes=memory_bytes)

    rows, limits = [], {}
    with ThreadPoolExecutor(max_workers=workers) as executor:
        results: Iterator[CheckResult] = executor.map(check, problems, predictions)
        try:
            for problem, result in zip(problems, tqdm(results, "HumanEval", len(problems), disable=None)):
                limits = result.limits_applied or limits
                rows.append(
                    {
                        "index": problem.index,
                        "task_id": problem.task_id,
                        "passed": int(result.passed),
                        "reason": result.reason,
                    }
                )
        except BaseException:
            executor.shutdown(cancel_futures=True)  # else an interrupted run would first work off all that is queued
            raise
    return rows, limits


def summarize_humaneval(rows: Sequence[dict], limits: dict[str, str]) -> dict:
    """n, pass_at_1 with its 95 % interval, errors by category, the limits that were in force."""
    return {
        "n": len(rows),
        **rate_summary("pass_at_1", sum(row["passed"] for row in rows), len(rows)),
        "errors": count_errors(rows),
        "sandbox": limits,
    }


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(prog="evaluate_humaneval", description="Score predictions on HumanEval.")
    parser.add_argument("--answers", type=Path, required=True, help="HumanEval.jsonl.gz or HumanEval.jsonl")
    parser.add_argument(
        "--predictions",
        type=Path,
        required=True,
        help='JSONL of {"index": 0, "output": "text"}, cut at the end of the function; or of '
        '{"task_id", "completion"}, taken as it is',
    )
    parser.add_argument("--execute_code", action="store_true", help="run the predicted code, in the sandbox")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="wall time per problem (default: %(default)s)")
    parser.add_argument("--memory_mib", type=int, default=MEMORY_MIB, help="memory per process (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="problems at a time (default: CPUs)")
    parser.add_argument("--output", type=Path, help="folder for results/humaneval.jsonl (default: none written)")
    parser.add_argument("--limit", type=int, help="score only the first N problems (default: all, none may miss)")
    flags = parse_arguments(parser, arguments)
    for name in ("limit", "workers", "seconds", "memory_mib"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < 1e6:  # not for nan either
            parser.error(f"--{name}: found {value}, expected a positive number below 1000000")
    if not flags.execute_code:
        parser.error("--execute_code: found no such flag, expected it, since this runs code that a model wrote")

    def command() -> None:
        problems = load_humaneval(flags.answers)
        predictions, notices = match_completions(flags.predictions, problems, flags.limit)
        rows, limits = evaluate_humaneval(
            problems[: flags.limit],
            predictions,
            seconds=flags.seconds,
            memory_bytes=flags.memory_mib << 20,
            workers=flags.workers,
        )
        open_ends = [name for name, text in limits.items() if text.startswith("NOT CONFINED")]
        if open_ends:
            notices.append(f"sandbox: on this machine nothing confines {', '.join(open_ends)} of the code that ran")
        for notice in [*notices, *count_notice(flags.answers, len(problems), HUMANEVAL_COUNT)]:
            print(notice, file=sys.stderr)
        if flags.output is not None:
            write_json_lines(flags.output / "results" / "humaneval.jsonl", rows)
        print(json.dumps(summarize_humaneval(rows, limits)))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
