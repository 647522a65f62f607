"""A sample of the fuzzing report, and what it must find: a fault of every kind, planted."""

import os
import signal
import time
from pathlib import Path

import pytest

from data.json_records import DataError
from tests.fuzz import report
from tests.fuzz.targets import TARGETS, Target

# ---------------------------------------------------------------------------------------------------------------------
# The product


@pytest.mark.slow
def test_a_sample_survives(tmp_path, capsys):
    """`python -m tests.fuzz.report --mutations 20000` is the whole of it."""
    rows = report.fuzz(200, 0, tmp_path / "fuzz.jsonl")
    assert report.print_report(rows, 0) == 0, capsys.readouterr().out
    assert len(rows) == 200 and {row[1] for row in rows.values()} == {target.name for target in TARGETS}
    assert {row[2] for row in rows.values()} == {"read", "refused"}


# ---------------------------------------------------------------------------------------------------------------------
# The report


def make(folder: Path) -> None:
    (folder / "one").mkdir(parents=True)
    (folder / "one/file.txt").write_text("some text")


def refuse(message: str) -> None:
    raise DataError(message)


OUTSIDE = Path(__file__).with_name("written_outside.txt")
PLANTED = {  # name of the fault -> what a reader does with the damaged folder, how the row begins
    "read": (lambda folder: None, "read", ""),
    "refused": (lambda folder: refuse("file:1: found x, expected y"), "refused", "file:1: found x, expected y"),
    "two lines": (lambda folder: refuse("file:1\nfound"), "found", "Wrong at"),
    "escape": (lambda folder: refuse("file:1: found \x1b[2J"), "found", "Wrong at"),
    "another error": (lambda folder: {}[folder], "found", "KeyError at tests/fuzz/test_fuzz.py:"),
    "exit": (lambda folder: exit(3), "found", "SystemExit at"),
    "hang": (lambda folder: time.sleep(9), "found", "Hang at"),
    "memory": (lambda folder: b"x" * (100 << 20), "found", "100 MiB of memory"),
    "too much memory": (lambda folder: bytearray(1 << 40), "found", "MemoryError at"),
    "inside": (lambda folder: (folder / "new").write_text("x"), "read", ""),
    "outside": (lambda folder: OUTSIDE.write_text("x"), "found", "WroteOutside at"),
    "crash": (lambda folder: os.kill(os.getpid(), signal.SIGKILL), "found", "crashed: SIGKILL"),
    "silence": (lambda folder: os.kill(os.getpid(), signal.SIGSTOP), "found", "hung for"),
}


@pytest.mark.slow
def test_every_planted_fault_is_found_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    readers = {name: (lambda folder, rng, damaged, read=read: read(folder)) for name, (read, *_) in PLANTED.items()}
    monkeypatch.setattr(report, "TARGETS", [Target(name, make, read) for name, read in readers.items()])
    for name, value in {"SECONDS": 3.0, "MEBIBYTES": 50, "SECONDS_OF_SILENCE": 8}.items():
        monkeypatch.setattr(report, name, value)
    journal = tmp_path / "fuzz.jsonl"
    rows = report.fuzz(16, 14399, journal)  # a seed that draws each fault, and the two that cost seconds once
    assert sorted(rows) == list(range(16)) and {row[1] for row in rows.values()} == set(PLANTED)
    for _, name, outcome, _, _, what in rows.values():
        assert outcome == PLANTED[name][1] and what.startswith(PLANTED[name][2]), (name, outcome, what)
    assert not OUTSIDE.exists()
    assert report.print_report(rows, 14399) == 1
    out = capsys.readouterr().out
    assert out.count("replay: python -m tests.fuzz.report --case 14399:") == 10


def test_a_killed_report_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TARGETS", [Target("read", make, lambda folder, rng, damaged: None)])
    journal = tmp_path / "fuzz.jsonl"
    whole = report.fuzz(6, 1, journal)
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:3]) + '[3, "rea')
    again = report.fuzz(6, 1, journal)
    assert {index: row[1:3] for index, row in again.items()} == {index: row[1:3] for index, row in whole.items()}


def test_a_case_is_the_same_whatever_ran_before(tmp_path):
    folders = {}
    for target in TARGETS:
        make(tmp_path / target.name)
        folders[target.name] = [tmp_path / target.name / "one"]
    first = [report.draw_case(folders, 7, index) for index in range(50)]
    last = [report.draw_case(folders, 7, index) for index in reversed(range(50))][::-1]
    assert [(case.target.name, case.content) for case in first] == [(case.target.name, case.content) for case in last]
    assert len({case.content for case in first}) > 30 and all(case.content != b"some text" for case in first[:3])
