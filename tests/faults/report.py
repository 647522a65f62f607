"""Scripted failures and one table: python -m tests.faults.report --seed 1 --output faults.jsonl

Each trial makes one fault in real processes on a small model. It survives if the run goes on to the same bits as an
undisturbed one, or ends with exactly one clean line and the documented code, as docs/checkpoints.md says. --only takes
scenarios whose name has that text, --scale 0.1 a tenth of the trials (at least one each). Rows are appended to --output
as they come; the same command continues a killed report. The last line is JSON.
"""

import argparse
import importlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from command_line import parse_arguments
from tests.faults.checkpoints import clock_set_back, damaged_files, killed_inside_a_save
from tests.faults.folders import double_start, full_disk, read_only_folder, vanished_folder
from tests.faults.processes import (
    agent_killed,
    agent_of_two_killed,
    nan_in_one_gradient,
    rank_killed_under_restart,
    rank_that_hangs,
    signal_in_a_phase,
)
from tests.faults.runs import Scenario, Trial
from tests.support.processes import PRELOADED

SCENARIOS: tuple[tuple[str, int, Scenario], ...] = (
    ("SIGKILL of a rank under --max_restarts", 20, rank_killed_under_restart),
    ("SIGKILL of one of two agents", 5, agent_of_two_killed),
    ("SIGKILL of torchrun: no orphans", 3, agent_killed),
    ("SIGTERM or SIGINT in each phase", 60, signal_in_a_phase),
    ("SIGKILL inside a checkpoint write", 200, killed_inside_a_save),
    ("damaged files of checkpoints", 100, damaged_files),
    ("clock set back", 6, clock_set_back),
    ("full disk", 12, full_disk),
    ("read-only folder", 6, read_only_folder),
    ("vanished folder", 9, vanished_folder),
    ("double start", 6, double_start),
    ("NaN in one rank's gradient", 6, nan_in_one_gradient),
    ("a rank that hangs", 4, rank_that_hangs),
)


def run_trial(name: str, scenario: Scenario, seed: int, number: int) -> dict:
    """One row of the journal."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fault_", ignore_cleanup_errors=True) as folder:
        try:
            trial = scenario(number, random.Random(f"{seed}:{name}:{number}"), Path(folder))
        except Exception as error:  # one trial that fails to run is no survivor, and the others go on
            trial = Trial(f"{type(error).__name__}: {error}"[:1000])
    row = {"fault": name, "seed": seed, "number": number, "problem": trial.problem, "skipped": trial.skipped}
    return row | {"steps_lost": trial.steps_lost, "seconds": round(time.monotonic() - began, 2)}


def read_rows(journal: Path, seed: int) -> list[dict]:
    """The rows of this seed; a partial last line is cut off."""
    if journal.exists():
        journal.write_bytes(journal.read_bytes()[: journal.read_bytes().rfind(b"\n") + 1])
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return [row for row in rows if row["seed"] == seed]


def print_report(rows: list[dict]) -> int:
    """The table, each failure, and one line of JSON. Exit code 0 if all trials survived or were skipped."""
    print(f"{'fault':<42}{'tried':>7}{'survived':>10}{'most steps lost':>17}{'worst seconds':>15}")
    summary = {}
    for name, *_ in SCENARIOS:
        tried = [row for row in rows if row["fault"] == name and not row["skipped"]]
        survived = sum(not row["problem"] for row in tried)
        steps, seconds = (max((row[key] for row in tried), default=0) for key in ("steps_lost", "seconds"))
        if any(row["fault"] == name for row in rows):
            print(f"{name:<42}{len(tried):>7}{survived:>10}{steps:>17}{seconds:>15.1f}")
            summary[name] = {"tried": len(tried), "survived": survived, "most_steps_lost": steps}
            summary[name]["worst_seconds"] = seconds
    for row in rows:
        if row["problem"] or row["skipped"]:
            print(f"{'skipped' if row['skipped'] else 'failed'}: {row['fault']} {row['number']}: ", end="")
            print(" ".join((row["skipped"] or row["problem"]).split()))
    print(json.dumps(summary))
    return int(any(row["problem"] for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.report", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="part of a scenario's name (default: all scenarios)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the trials (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of all trials (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="journal of rows; one that exists is continued")
    flags = parse_arguments(parser, arguments)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that it starts: sums keep their order
    for name in PRELOADED:  # else every forked child pays for them
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="faults_journal_") as folder:
        journal = flags.output or Path(folder) / "faults.jsonl"
        done = {(row["fault"], row["number"]) for row in read_rows(journal, flags.seed)}
        for name, trials, scenario in SCENARIOS:
            for number in range(max(1, math.ceil(trials * flags.scale)) if flags.only.lower() in name.lower() else 0):
                if (name, number) not in done:
                    row = run_trial(name, scenario, flags.seed, number)
                    with open(journal, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
        return print_report(read_rows(journal, flags.seed))


if __name__ == "__main__":
    sys.exit(main())
