"""A sample of the failure report, and what its judge must find: a checkpoint that nobody verified."""

import json
import random
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.faults import report
from tests.faults.checkpoints import SAVED, STEPS, damaged_files, judge
from tests.faults.runs import fault_of_end
from tests.support.processes import server_context


def in_clean_process(function, *arguments):
    """`function` in a process without threads and process groups, which the scenarios fork; its exit code."""
    process = server_context().Process(target=function, args=arguments)
    process.start()
    process.join(300)
    return process.exitcode


def run_report(journal: str) -> None:
    sys.exit(report.main(["--only", "checkpoint", "--scale", "0.02", "--output", journal]))


@pytest.mark.slow
def test_a_sample_survives(tmp_path):
    """`python -m tests.faults.report` is the whole of it."""
    journal = tmp_path / "faults.jsonl"
    code = in_clean_process(run_report, str(journal))
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert code == 0 and len(rows) == 4 + 2, rows
    assert not any(row["problem"] or row["skipped"] for row in rows)
    for row in rows:  # every step is saved; a loop that does not wait for the save (odd trials) is a step further
        in_background = "inside" in row["fault"] and row["number"] % 2
        assert row["steps_lost"] <= (2 if in_background else 1), row


def trust_everything(folder: str) -> None:
    with patch("train.checkpoint.check_files", lambda *_: ""):
        trials = [damaged_files(2 * way, random.Random(way), Path(folder) / str(way)) for way in (0, 1)]
    sys.exit(sum(bool(trial.problem) for trial in trials))


@pytest.mark.slow
def test_a_resume_from_damaged_files_is_found(tmp_path):
    assert in_clean_process(trust_everything, str(tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"step": SAVED - 1}, "resumed from step 2, expected 3"),
        ({"loaded": "other"}, "the weights of step 3 are not those that were saved"),
        ({"end": "other"}, "another end"),
        ({"steps": [1, 2, 3, 3, 4, 5, 6]}, "another end"),
        ({"problem": "none left"}, "no good checkpoint"),
        ({"left": [".saving_step_00000004"]}, "left behind"),
    ],
)
def test_judge(change, words):
    true = [f"digest {step}" for step in range(STEPS + 1)]
    found = {"step": SAVED, "loaded": true[SAVED], "end": true[STEPS], "problem": "", "left": [], "bad": []}
    found |= {"steps": list(range(1, STEPS + 1))}
    with patch("tests.faults.checkpoints.true_digests", lambda: true):
        trial = judge(found | change, 4, SAVED)
    assert trial.problem.startswith(words) and bool(trial.problem) == bool(words)
    assert trial.steps_lost == 4 - (found | change)["step"]


@pytest.mark.parametrize(
    ("code", "err", "is_clean"),
    [
        (2, "run: found x, expected y\n", True),
        (143, "", True),
        (-15, "", False),
        (1, "", False),
        (2, "one\ntwo\n", False),
        (2, "Traceback (most recent call last)\n", False),
        (2, "\x1b[31mred\n", False),
    ],
)
def test_what_a_clean_end_is(code, err, is_clean):
    assert (fault_of_end(code, err, (2, 143)) == "") == is_clean


def test_table_and_exit_code(capsys):
    name, other = report.SCENARIOS[0][0], report.SCENARIOS[7][0]
    rows = [
        {"fault": name, "number": 0, "problem": "", "skipped": "", "steps_lost": 3, "seconds": 2.5},
        {"fault": name, "number": 1, "problem": "lost\neverything", "skipped": "", "steps_lost": 0, "seconds": 9.0},
        {"fault": other, "number": 0, "problem": "", "skipped": "no tmpfs", "steps_lost": 0, "seconds": 0.1},
    ]
    assert report.print_report(rows) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-4:] == ["2", "1", "3", "9.0"] and lines[2].split()[-4:] == ["0", "0", "0", "0.0"]
    assert lines[3] == f"failed: {name} 1: lost everything" and lines[4] == f"skipped: {other} 0: no tmpfs"
    assert json.loads(lines[-1])[name] == {"tried": 2, "survived": 1, "most_steps_lost": 3, "worst_seconds": 9.0}
    assert report.print_report(rows[:1]) == 0
