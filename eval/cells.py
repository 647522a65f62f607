"""Cells of an experiment: programs for each, run a few at a time, in a folder that the same command continues.

A cell is one method with one seed, trained or scored by our own programs. DIR/settings.json says what the run is,
DIR/cells.jsonl which cells are finished: a run that was stopped or killed leaves those alone and runs the others.
"""

import fcntl
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.json_records import (
    DataError,
    JsonLinesFile,
    check_regular_file,
    open_lock,
    read_json_lines,
    read_json_object,
    write_json_lines,
    write_text,
)
from eval.reports.ablation_tables import Cell
from eval.sandbox.limits import die_with_parent
from printable import shown

ROOT = Path(__file__).resolve().parents[1]
EVAL_FLAGS = "--max_new_tokens 48 --device cpu --dtype float32"

SECONDS_TO_END = 2.0  # for a program after SIGTERM; polite_stop gives this one 3


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def check_folder(output: Path, settings: Mapping, may_grow: Collection[str] = ()) -> None:
    """Raise DataError unless `output` is new, empty or that of an experiment with these settings. Writes nothing.

    may_grow: settings, all integers, that may be larger than the folder's.
    """
    path = output / "settings.json"
    if not path.exists():
        if output.exists() and any(each.name != "lock" for each in output.iterdir()):
            raise DataError(f"{output}: found files but no settings.json, expected a new folder or that of such a run")
        return
    found = read_json_object(path)
    for name, value in settings.items():
        grows = name in may_grow and type(found.get(name)) is int and found[name] <= value
        if json.dumps(found.get(name)) != json.dumps(value) and not grows:  # true is not 1
            expected = f"{'at most ' if name in may_grow else ''}{shown(value)} as in this command"
            raise DataError(
                f"{path}: found {name} {shown(found.get(name))}, expected {expected}; "
                "give the settings of the first command, or another --output"
            )


@contextmanager
def opened(output: Path, settings: Mapping, may_grow: Collection[str] = ()) -> Iterator[None]:
    """Check the folder, keep other runs out of it and write its settings.json.

    Raises DataError as check_folder, and while another run is at work on the folder.
    """
    check_folder(output, settings, may_grow)
    output.mkdir(parents=True, exist_ok=True)
    with open_lock(output / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{output}: found another run at work on it, expected none") from None
        write_text(output / "settings.json", json.dumps(settings, indent=2) + "\n")
        yield


def write_once(path: Path, text: str) -> None:
    """Write the file, unless it is there. Raises DataError if it is another one: the data of cells would differ."""
    check_regular_file(path)
    if not path.exists():
        write_text(path, text)
    elif path.read_bytes() != text.encode():
        found = "found another text, expected what this command draws"
        raise DataError(f"{path}: {found}; remove it, or give another --output")


def read_finished(path: Path, cells: Sequence[Cell]) -> dict[Cell, float]:
    """Cell -> seconds, from the journal of finished cells; a line that a kill has cut is removed. Raises DataError."""
    if not path.exists():
        return {}
    rows, by_name = read_json_lines(path, drop_partial_last_line=True)[0], {str(cell): cell for cell in cells}
    for line, row in rows:
        seconds = row.get("seconds")
        if str(row.get("cell")) not in by_name or type(seconds) is not float or not 0.0 <= seconds < math.inf:
            raise DataError(f"{path}:{line}: found {shown(row)}, expected a cell of this run and its seconds")
    write_json_lines(path, [row for _, row in rows])
    return {by_name[row["cell"]]: row["seconds"] for _, row in rows}


# ---------------------------------------------------------------------------------------------------------------------
# Running


@dataclass(slots=True)
class _Work:
    """A cell at work."""

    cell: Cell
    commands: list[list[str]]  # the one that runs and those after it
    process: subprocess.Popen
    log: Path
    begun: float


def score_command(model: Path, splits: Sequence[str], benchmark_dir: Path, output: Path) -> list[str]:
    """The arguments of Python that score a model on the splits, greedily."""
    files = ["--model", f"{model}", "--benchmark_dir", f"{benchmark_dir}", "--output", f"{output}"]
    return ["run_eval.py", *files, "--benchmarks", ",".join(splits), *EVAL_FLAGS.split()]


def finish_cells(output: Path, commands: Mapping[Cell, list[list[str]]], n_jobs: int) -> Iterator[str]:
    """Run the cells that the journal lacks; yields a line after each that tells what is left.

    Raises DataError as read_finished and run_cells.

    commands: cell -> the arguments of Python for each of its programs.
    """
    path, cells = output / "cells.jsonl", list(commands)
    finished = read_finished(path, cells)
    missing = {cell: commands[cell] for cell in cells if cell not in finished}
    yield f"{'already finished' if not missing else 'finished'}: {len(finished)} of {len(cells)} cells"
    with JsonLinesFile(path) as journal:
        for cell, seconds in run_cells(output, missing, n_jobs):
            journal.write({"cell": str(cell), "seconds": seconds})
            journal.sync()
            finished[cell] = seconds
            words = f"{cell}: {seconds:.0f} s; about {seconds_left(finished, cells, n_jobs) / 60:.0f} min left"
            yield f"{len(finished)}/{len(cells)}  {words}"


def run_cells(output: Path, cells: Mapping[Cell, list[list[str]]], n_jobs: int) -> Iterator[tuple[Cell, float]]:
    """Run the programs of each cell, `n_jobs` cells at a time; yields (cell, seconds) as it ends.

    cells: cell -> the arguments of Python for each of its programs. Raises DataError if a program fails. However this
    ends, no program that it started goes on.
    """
    waiting, working = list(cells), []
    try:
        while waiting or working:
            unfinished = {*waiting, *(work.cell for work in working)}
            ready = [cell for cell in waiting if not cell.has_irm or cell.start() not in unfinished]
            for cell in ready[: n_jobs - len(working)]:
                waiting.remove(cell)
                log = cell.folder(output) / "log.txt"
                working.append(_Work(cell, cells[cell], _start(cells[cell][0], log), log, time.monotonic()))
            for work in [work for work in working if work.process.poll() is not None]:
                if work.process.returncode:
                    raise DataError(_failure(work))
                work.commands = work.commands[1:]
                if work.commands:
                    work.process = _start(work.commands[0], work.log)
                else:
                    working.remove(work)
                    yield work.cell, time.monotonic() - work.begun
            time.sleep(0.1)
    finally:
        _stop([work.process for work in working])


def _start(arguments: Sequence[str], log: Path) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a core each
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=die_with_parent,  # after a kill of ours it would keep the next start out of its folder
        )


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """End them: SIGTERM, on which they save, and SIGKILL for those that take too long."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + SECONDS_TO_END
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(work: _Work) -> str:
    lines = work.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    found = f"exit code {work.process.returncode} of {work.commands[0][0]}"
    return f"{work.log}: found {found} for {work.cell}, expected 0; the last line is {shown(last, 400)}"


def seconds_left(seconds: Mapping[Cell, float], cells: Sequence[Cell], n_jobs: int) -> float:
    """The time that the unfinished cells take: each the mean of the finished ones of its kind, with or without IRM.

    Where none of its kind is finished, the mean of all. Raises ZeroDivisionError where none is finished.
    """
    left = 0.0
    for cell in cells:
        if cell not in seconds:
            same = [each for other, each in seconds.items() if other.has_irm == cell.has_irm] or [*seconds.values()]
            left += sum(same) / len(same)
    return left / n_jobs
