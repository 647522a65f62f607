"""What the fault scenarios share: the three programs at their smallest, their undisturbed ends, forked children.

A scenario is a function trial(number, rng, folder) -> Trial that does one fault in a new folder. Its process stays
without threads and process groups, so that `in_child` can fork it.
"""

import functools
import hashlib
import json
import os
import random
import re
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.eval import test_evaluate_tiny as tiny
from tests.support.processes import lines_in, run
from tests.support.tiny_ppo import journal_of, ppo_arguments
from tests.support.tiny_run import arguments, digest_of_final, tiny_files

PROGRAMS = ("run_sft", "run_ppo", "run_eval")
JOURNALS = {"run_sft": "metrics.jsonl", "run_ppo": "metrics.jsonl", "run_eval": "predictions/tiny-seen.*jsonl"}
LAST_LINES = {"run_sft": 16, "run_ppo": 5, "run_eval": 10}  # of the journals: the latest moment of a fault
RECORDS = 16  # of the evaluation


@dataclass(frozen=True, slots=True)
class Trial:
    """What one fault did. A trial that could not be made on this machine says why in `skipped`."""

    problem: str = ""  # "" if the run survived
    steps_lost: int = 0  # optimizer steps done before the fault and done again
    skipped: str = ""


Scenario = Callable[[int, random.Random, Path], Trial]


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def arguments_of(program: str, output: Path, **flags: object) -> list[str]:
    """Flags of a run of about a second: 22 steps of SFT, 8 of PPO, 16 answers."""
    if program == "run_sft":
        return arguments(output, **{"epochs": 2, "checkpoint_every": 4, **flags})
    if program == "run_ppo":
        return ppo_arguments(output, **{"epochs": 4, "checkpoint_every": 2, "max_response_tokens": 12, **flags})
    values = {
        **{"model": tiny_files()[0], "benchmark_dir": _benchmark(), "output": output, "benchmarks": "tiny-seen"},
        **{"device": "cpu", "max_new_tokens": 12, "batch_size": 2, **flags},
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@functools.cache
def _benchmark() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="faults_benchmark_"))
    records = [
        {**tiny.record(index), "messages": [{"role": "user", "content": f"Weather {index}?"}]}
        for index in range(RECORDS)
    ]
    (folder / "test_seen.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def journal_lines(program: str, output: Path) -> int:
    """Optimizer steps, or answers, that a run has written down."""
    return lines_in(output, JOURNALS[program])


def end_of(program: str, output: Path) -> str:
    """The end state of a run, without its times: the exported model and the journal, or predictions and scores."""
    if program == "run_eval":
        names = ("predictions/tiny-seen.jsonl", "results/tiny-seen.jsonl", "report.md")
        return hashlib.sha256(b"".join((output / name).read_bytes() for name in names)).hexdigest()
    rows = json.dumps(journal_of(output, "metrics.jsonl"))
    return digest_of_final(output) + hashlib.sha256(rows.encode()).hexdigest()


@functools.cache
def undisturbed(program: str, ranks: int = 1) -> str:
    """The end state that every disturbed run must reach."""
    with tempfile.TemporaryDirectory(prefix="faults_undisturbed_") as folder:
        code, _, err = run(program, arguments_of(program, Path(folder) / "run"), ranks)
        assert code == 0, err
        return end_of(program, Path(folder) / "run")


def finish(program: str, output: Path, lines_before: int) -> Trial:
    """Run the same command again to its end, and compare. lines_before: those of the journal when the fault came."""
    code, out, err = run(program, arguments_of(program, output))
    if code != 0 or err:
        return Trial(f"the next start ended with code {code}: {err[-300:]!a}")
    return compare(program, output, lines_before, out)


def compare(program: str, output: Path, lines_before: int, out: str, ranks: int = 1) -> Trial:
    """Whether a run that has ended is the undisturbed one, and what it had to do again; `out`: what it said."""
    resumed = re.findall(r"\(step (\d+), saved by", out)
    lost = max(0, lines_before - (int(resumed[-1]) if resumed else 0)) if program != "run_eval" else 0
    return Trial("" if end_of(program, output) == undisturbed(program, ranks) else "another end than undisturbed", lost)


def fault_of_end(code: int | None, err: str, allowed: tuple[int, ...]) -> str:
    """ "" if a disturbed run ended with one of the `allowed` codes and at most one line on stderr."""
    if code not in allowed or "Traceback" in err or err.count("\n") > 1 or not err.strip("\n").isprintable():
        return f"ended with code {code}, expected {' or '.join(map(str, allowed))}, stderr {err[-400:]!a}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Forked children


def start_child(job: Callable[[], object]) -> tuple[int, int]:
    """`job` in a forked process: its pid, and the descriptor that its result comes from."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.close(reading)
        os.write(writing, json.dumps(job()).encode())
        code = 0
    except BaseException:
        os.write(writing, json.dumps({"error": traceback.format_exc()[-1000:]}).encode())
    finally:
        os._exit(code)


def result_of(pid: int, reading: int) -> object:
    """What a child's job returned. Raises RuntimeError with the child's traceback, or if it was killed."""
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0:
        raise RuntimeError(json.loads(text)["error"] if text else f"the child ended with code {code}")
    return json.loads(text)


def in_child(job: Callable[[], object]) -> object:
    """The result of `job`, done in a forked process."""
    return result_of(*start_child(job))


def kill_child(pid: int, reading: int) -> bool:
    """SIGKILL it; False if it had ended before."""
    os.kill(pid, signal.SIGKILL)
    os.close(reading)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
