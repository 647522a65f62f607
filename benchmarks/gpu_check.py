"""All that one GPU can show in under 8 minutes: one command, one JSON line per stage. Traced and emulated, NOT YET RUN
on a GPU.

    python -m benchmarks.gpu_check --output gpu_check.jsonl
    python -m benchmarks.gpu_check --stages c,g
    python -m benchmarks.gpu_check --device cpu --small      # every stage in miniature: tries the script

Each stage is a process of its own with a limit of its own, so that one that crashes, hangs or runs out of memory stops
no other; what it had found by then is kept. Nothing is installed. What the stages measure: benchmarks/gpu_stages.py;
what the lines mean: docs/cluster.md. A stage that fails also leaves the end of its log on stderr.

Exit codes: 0 all stages that could run passed; 1 some did not; 2 bad flags.
"""

import argparse
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from data.json_records import DataError, JsonLinesFile, read_json_lines
from printable import json_line, log_text, message_line

# letter -> (name, seconds on a GPU); together under 8 minutes
STAGES = {
    "a": ("versions", 35),
    "b": ("gpu_tests", 75),
    "c": ("attention", 40),
    "d": ("transformers_logits", 40),
    "e": ("bundled_sft", 70),
    "f": ("training_step", 85),
    "g": ("decode", 55),
    "h": ("ppo_and_checkpoint", 45),
    "i": ("loss_kernels", 30),
}
SMALL_SECONDS = 300  # limit of a stage in miniature, whatever else the machine does
LOG_LINES = 30  # of a failed stage, on stderr

Stage = Callable[[], Iterable[dict]]  # {name: figure}, {"fault": ...}, {"not_run": ...}, {"skipped": reason}, together


# ---------------------------------------------------------------------------------------------------------------------
# One stage in a process of its own


def run_stage(stage: Stage, limit_seconds: float, preload: list[str]) -> dict:
    """Runs a stage; returns ok (None if skipped), seconds, figures, not_run, error (one line, "" if ok).

    stage: a function of a module, or a partial of one. Its process and those that it started are killed after
    limit_seconds. preload: modules that stages have in common, imported once for all of them.
    """
    context = multiprocessing.get_context("forkserver")  # its processes are forks of one that has imported `preload`
    context.set_forkserver_preload(preload)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record, log = Path(folder) / "record.jsonl", Path(folder) / "log"
        record.touch()
        log.touch()
        process = context.Process(target=record_stage, args=(stage, record, log))
        process.start()
        try:
            process.join(limit_seconds)
        finally:
            is_late = process.is_alive()
            if is_late:
                kill_group(process)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        result = read_record(record)
    faults = result.pop("faults")
    if is_late:
        faults.append(f"found no end after {limit_seconds:g} s, expected one")
    elif process.exitcode and (process.exitcode < 0 or not faults):
        last = next((line for line in reversed(lines) if line.strip()), "it wrote nothing")
        ended = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        faults.append(f"found {ended}, expected 0; last line: {last}")
    if faults and lines:
        sys.stderr.write(log_text("\n".join(lines[-LOG_LINES:])) + "\n")
    is_skipped = "skipped" in result["figures"]
    ok = False if faults else None if is_skipped else True
    return {"ok": ok, "seconds": plain(time.monotonic() - began), **result, "error": message_line("; ".join(faults))}


def record_stage(stage: Stage, record: Path, log: Path) -> None:
    """The stage's process: its items go to `record` as they come, what it prints to `log`."""
    os.setsid()  # a group of its own, which kill_group ends
    tempfile.tempdir = str(record.parent)  # removed with it, also when this process is killed
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with JsonLinesFile(record) as lines:
        try:
            for item in stage():
                lines.write(plain(item))
        except Exception as error:  # noqa: BLE001, whatever it is, it is this stage's result
            traceback.print_exc()
            lines.write({"fault": f"found {type(error).__name__}: {error}"})


def kill_group(process: multiprocessing.Process) -> None:
    """Ends a stage's process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # before its setsid
        process.kill()
    process.join()


def read_record(record: Path) -> dict:
    """figures, not_run and faults of a record, which may end inside a line."""
    result: dict = {"figures": {}, "not_run": [], "faults": []}
    try:
        rows = read_json_lines(record, drop_partial_last_line=True)[0]
    except DataError as error:
        return {**result, "faults": [str(error)]}
    for _, row in rows:
        for name, value in row.items():
            if name in ("fault", "not_run"):
                result["faults" if name == "fault" else name].append(value)
            else:
                result["figures"][name] = value
    return result


def plain(value: object) -> object:
    """`value` as JSON has it: numbers with 5 digits, nan and inf as words, anything else as text."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# All stages


def stage_items(name: str, device: str, small: bool) -> Iterable[dict]:
    """The items of a stage of benchmarks/gpu_stages.py."""
    from benchmarks.gpu_stages import run  # imports torch, which may be broken

    return run(name, device, small)


def chosen_stages(text: str) -> list[str]:
    """Letters of --stages. Raises ArgumentTypeError."""
    letters = text.split(",")
    if wrong := [each for each in letters if each not in STAGES]:
        raise argparse.ArgumentTypeError(f"found {wrong[0]!r}, expected letters of {','.join(STAGES)}")
    return letters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tries the script")
    parser.add_argument("--small", action="store_true", help="tiny shapes, few steps")
    names = ", ".join(f"{letter} {name}" for letter, (name, _) in STAGES.items())
    parser.add_argument("--stages", type=chosen_stages, default=list(STAGES), help=f"with commas, of {names} [all]")
    parser.add_argument("--output", help="a file that the lines are appended to")
    flags = parser.parse_args()
    if flags.device == "cpu" and not flags.small:
        parser.error("--device: found cpu without --small, expected both: full shapes are for a GPU")
    outputs = []
    if flags.output:
        try:
            outputs.append(JsonLinesFile(Path(flags.output)))
        except OSError as error:
            parser.error(f"--output: found {error}, expected a file to append to")

    def write(line: dict) -> None:
        print(json_line(line), flush=True)
        for file in outputs:
            file.write(line)

    # on CUDA each stage imports PyTorch itself: the fork of a process that has touched a device cannot use it
    preload = ["benchmarks.gpu_stages"] if flags.device == "cpu" else []
    began, results = time.monotonic(), {}
    for letter in flags.stages:
        name, seconds = STAGES[letter]
        stage = partial(stage_items, name, flags.device, flags.small)
        result = run_stage(stage, SMALL_SECONDS if flags.small else seconds, preload)
        results[letter] = result["ok"]
        write({"stage": letter, "name": name, **result})
    by_result = {
        word: [letter for letter, ok in results.items() if ok is expected]
        for word, expected in (("passed", True), ("failed", False), ("skipped", None))
    }
    write({"summary": by_result, "ok": not by_result["failed"], "seconds": plain(time.monotonic() - began)})
    return 1 if by_result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
