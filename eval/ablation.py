"""The paper's Table 5 on the bundled world: `python -m eval.ablation [--quick] [--seeds N] --output DIR`.

Eight methods: none, MAE, PKT, IRM and what they combine to, each with several seeds. A cell is one method with one
seed: trained by run_sft.py or run_ppo.py and scored by run_eval.py, in folders of its own. A cell with IRM starts from
the SFT model of the cell without. DIR/cells.jsonl lists the finished cells: a run that was stopped or killed continues
with the same command. It ends with DIR/ablation.md, ablation.json and ablation.svg. Exit codes: 0 all cells finished; 2
bad input, or a program that failed (one line on stderr); 130 or 143 stopped by SIGINT or SIGTERM.
"""

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from command_line import parse_arguments, polite_stop, run_command
from data.json_records import (
    DataError,
    JsonLinesFile,
    open_lock,
    read_json_lines,
    read_json_object,
    write_json_lines,
    write_text,
)
from eval.benchmarks import BENCHMARKS
from eval.reports.ablation_tables import METHODS, SPLITS, Cell, write_tables
from eval.sandbox.limits import die_with_parent
from printable import shown, terminal_text
from toolbox.alike import draw_alike_trajectories
from toolbox.make import TRAIN_SEED, draw_split, write_trajectories
from toolbox.world import draw_trajectories

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets/tiny_model/model.safetensors"
FULL = {"seeds": 10, "ppo_seeds": 3, "prompts": 3000, "trajectories": 1217}
QUICK = {"seeds": 2, "ppo_seeds": 1, "prompts": 200, "trajectories": 140}
MOST = {"seeds": 20, "ppo_seeds": 20, "prompts": 10_000, "trajectories": 100_000, "jobs": 64}
PROMPT_SEED = 900  # of the generator, one more for each further split; the bundled data have 11 to 16
MAX_DRAWN = 50  # for each prompt kept: queries of the training data and repeated ones are left out

# What each program gets besides its files, seed and method. Other settings have the program's defaults.
SFT_FLAGS = "--device cpu --checkpoint_every 50 --keep_checkpoints 1"
PPO_FLAGS = (
    "--epochs 1 --rollout_batch_size 32 --minibatch_size 32 --micro_batch_size 16 --policy_learning_rate 2e-4 "
    "--value_learning_rate 5e-4 --kl_coef 0.2 --critic_only_iterations 4 --device cpu --checkpoint_every 10 "
    "--keep_checkpoints 1"
)
QUICK_PPO_FLAGS = f"{PPO_FLAGS} --max_steps 24"  # of 38
EVAL_FLAGS = "--max_new_tokens 48 --device cpu --dtype float32"

SECONDS_TO_END = 2.0  # for a program after SIGTERM; polite_stop gives this one 3


def cells_of(n_seeds: int, n_ppo_seeds: int) -> list[Cell]:
    """All cells, seed by seed, those with IRM after the others."""
    methods = sorted(METHODS, key=lambda method: "IRM" in method)
    cells = [Cell(method, seed) for seed in range(n_seeds) for method in methods]
    return [cell for cell in cells if not cell.has_irm or cell.seed < n_ppo_seeds]


def commands_of(output: Path, cell: Cell, ppo_flags: str) -> list[list[str]]:
    """The arguments of Python for the two programs of a cell: training and evaluation."""
    sft, run = cell.start().folder(output) / "sft", cell.folder(output) / ("ppo" if cell.has_irm else "sft")
    if cell.has_irm:
        train = ["run_ppo.py", "--model", f"{sft / 'final'}", *ppo_flags.split()]
        train += ["--data", f"{output / 'data' / 'ppo.json'}"]
    else:
        train = ["run_sft.py", "--data", f"{output / 'data' / 'train.json'}", *SFT_FLAGS.split()]
        train += ["--error_filter", "structured" if "MAE" in cell.method else "none"]
        train += ["--key_tokens", "on" if "PKT" in cell.method else "off"]
    score = ["run_eval.py", "--model", f"{run / 'final'}", "--benchmarks", ",".join(SPLITS), *EVAL_FLAGS.split()]
    return [
        [*train, "--output", f"{run}", "--seed", f"{cell.seed}"],
        [*score, "--output", f"{cell.folder(output) / 'eval'}", "--benchmark_dir", f"{output / 'data'}"],
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def check_folder(output: Path, settings: Mapping) -> None:
    """Raise DataError unless `output` is new, empty or that of an ablation with these settings. Writes nothing."""
    path = output / "settings.json"
    if not path.exists():
        if output.exists() and any(each.name != "lock" for each in output.iterdir()):
            raise DataError(f"{output}: found files but no settings.json, expected a new folder or that of an ablation")
        return
    found = read_json_object(path)
    for name in settings:
        if found.get(name) != settings[name]:
            raise DataError(
                f"{path}: found {name} {shown(found.get(name))}, expected {shown(settings[name])} as in this command; "
                "give the settings of the first command, or another --output"
            )


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other ablations out of the folder. Raises DataError while one is at work on it."""
    output.mkdir(parents=True, exist_ok=True)
    with open_lock(output / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{output}: found another ablation at work on it, expected none") from None
        yield


def write_data(output: Path, n_prompts: int, n_trajectories: int, alike: bool) -> None:
    """Write DIR/data, unless it is there: ppo.json, train.json, which is its start, and prompts of each split.

    All prompts are different, and none is a query of ppo.json.
    """
    folder, n_all = output / "data", max(n_trajectories, FULL["trajectories"])
    records = [*(draw_alike_trajectories if alike else draw_trajectories)(TRAIN_SEED, n_all)]
    for name, n_records in (("ppo.json", n_all), ("train.json", n_trajectories)):
        if not (folder / name).exists():
            write_trajectories(folder / name, records[:n_records])
    met = {turn["content"] for record in records for turn in record["conversations"] if turn["role"] == "user"}
    for number, split in enumerate(SPLITS):
        path = folder / BENCHMARKS[split].path
        drawn = draw_split(split.removeprefix("tiny-"), PROMPT_SEED + number, MAX_DRAWN * n_prompts)
        new = (each for each in drawn if (query := each["messages"][0]["content"]) not in met and not met.add(query))
        prompts = [*islice(new, n_prompts)]
        if not path.exists():
            write_json_lines(path, prompts)


def read_finished(path: Path, cells: Sequence[Cell]) -> dict[Cell, float]:
    """Cell -> seconds, from the journal of finished cells; a line that a kill has cut is removed. Raises DataError."""
    if not path.exists():
        return {}
    rows, by_name = read_json_lines(path, drop_partial_last_line=True)[0], {str(cell): cell for cell in cells}
    for line, row in rows:
        if str(row.get("cell")) not in by_name or type(row.get("seconds")) is not float:
            raise DataError(f"{path}:{line}: found {shown(row)}, expected a cell of this ablation and its seconds")
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


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def ablate(output: Path, settings: Mapping, n_jobs: int) -> None:
    """Run the cells that are missing, then write the tables. Raises DataError, OSError."""
    settings = {**settings, "model_sha256": hashlib.sha256(BASE.read_bytes()).hexdigest()}
    cells = cells_of(settings["seeds"], settings["ppo_seeds"])
    path = output / "cells.jsonl"
    check_folder(output, settings)
    with locked(output):
        write_text(output / "settings.json", json.dumps(settings, indent=2) + "\n")
        write_data(output, settings["prompts"], settings["trajectories"], settings["alike"])
        finished = read_finished(path, cells)
        missing = {cell: commands_of(output, cell, settings["ppo_flags"]) for cell in cells if cell not in finished}
        print(f"{'already finished' if not missing else 'finished'}: {len(finished)} of {len(cells)} cells", flush=True)
        with JsonLinesFile(path) as journal:
            for cell, seconds in run_cells(output, missing, n_jobs):
                journal.write({"cell": str(cell), "seconds": seconds})
                journal.sync()
                finished[cell] = seconds
                minutes = seconds_left(finished, cells, n_jobs) / 60
                words = f"{cell}: {seconds:.0f} s; about {minutes:.0f} min left"
                print(f"{len(finished)}/{len(cells)}  {words}", flush=True)
        tables = write_tables(output, settings, cells)
        print(terminal_text(f"tables: {tables}"))


def read_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict]:
    """The flags, and the settings that make two ablations the same; wrong flags end the program with code 2."""
    parser = argparse.ArgumentParser(prog="python -m eval.ablation", description="Table 5 of the paper, with seeds.")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the cells and tables")
    add("--quick", action="store_true", help="a first look in minutes: other defaults, and PPO of 24 iterations")
    for flag, meaning in (
        ("--seeds", "seeds of the methods without IRM"),
        ("--ppo_seeds", "the first N of them also with IRM"),
        ("--prompts", "held-out prompts per split, drawn by the toolbox"),
        ("--trajectories", "SFT on the first N; PPO takes the queries of 1,217"),
    ):
        name = flag.removeprefix("--")
        default = (QUICK if "--quick" in arguments else FULL)[name]
        words = f"{meaning} ({FULL[name]}, with --quick {QUICK[name]})"
        add(flag, type=int, default=default, metavar="N", help=words)
    add(
        "--alike",
        action="store_true",
        help="train on tools that look alike (toolbox/alike.py), not as the bundled data",
    )
    add("--jobs", type=int, default=2, metavar="N", help="cells at a time, one core each (%(default)s)")
    flags = parse_arguments(parser, arguments)
    for name, most in MOST.items():
        low = int(name != "ppo_seeds")
        if not low <= getattr(flags, name) <= most:
            parser.error(f"--{name}: found {getattr(flags, name)}, expected {low} to {most}")
    settings = {name: getattr(flags, name) for name in (*FULL, "alike")}
    settings |= {"sft_flags": SFT_FLAGS, "ppo_flags": QUICK_PPO_FLAGS if flags.quick else PPO_FLAGS}
    return flags, {**settings, "eval_flags": EVAL_FLAGS}


@polite_stop("finished cells and checkpoints are kept; the same command continues")
def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr."""
    flags, settings = read_flags(arguments)
    return run_command(lambda: ablate(flags.output.absolute(), settings, flags.jobs), (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
