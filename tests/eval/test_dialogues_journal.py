"""eval/dialogues/journal.py: journals of killed runs, files put together, malformed lines, a process that is killed."""

import json
import os
import random
import signal
import threading

import pytest

from data.json_records import DataError
from eval.dialogues.journal import (
    DialogueJournal,
    RecordedDialogue,
    close_journals,
    read_dialogues,
    read_journals,
    rewrite_journals,
)
from eval.predict.journals import journal_file, journal_files
from eval.predict.prediction_files import match_predictions
from tests.support.dialogue_doubles import FINISH, WEATHER, answer_right, call, play, task

CALL = {"name": "f", "arguments": {"a": 1}, "feedback": "x", "executor": "local"}
END = {"name": "finish", "arguments": {}, "feedback": None, "executor": ""}
TURN, FAULTY = {"output": "f(a=1)", "calls": [CALL], "fault": ""}, {"output": "?", "calls": [], "fault": "no call"}
LAST = {"output": "finish()", "calls": [END], "fault": ""}


def row(index=0, turns=(TURN, LAST), end="finish", **more):
    return {"index": index, "turns": list(turns), "end": end, "error": "", "format": "tl", **more}


def write(path, *rows, torn=""):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows) + torn)
    return path


def line(index, turn, record=TURN):
    return {"index": index, "turn": turn, **record}


def end(index, reason="finish", error=""):
    return {"index": index, "end": reason, "error": error}


# ---------------------------------------------------------------------------------------------------------------------
# Prediction files


def test_dialogues_are_read(tmp_path):
    path = write(tmp_path / "p.jsonl", row(1, [FAULTY], "max_turns"), row(0, format="react"), torn='{"index": 2, "tu')
    dialogues, has_dropped = read_dialogues(path)
    assert has_dropped and [dialogue.index for dialogue in dialogues] == [1, 0]
    assert dialogues[0] == RecordedDialogue(1, [FAULTY], "max_turns", "", "tl", 1)
    assert dialogues[1].turns == [TURN, LAST] and dialogues[1].format == "react"
    first, second = match_predictions(dialogues, 2, None, path=path)
    assert (first.index, second.index) == (0, 1)
    assert [each.index for each in match_predictions(dialogues, 2, 1, path=path)] == [0]
    for count, text in ((1, "found index 1, expected 0 to 0"), (3, "found 2 of 3 dialogues, expected all .*index 2")):
        with pytest.raises(DataError, match=text):
            match_predictions(dialogues, count, None, path=path, what="dialogues")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"index": True}, "found index True, expected the record's number"),
        ({"index": "0"}, "found index '0'"),
        ({"index": None}, "found index None"),
        ({"turns": {}}, "found an object as 'turns'"),
        ({"turns": [[]]}, "turn 1: found a list, expected an object"),
        ({"turns": [TURN, {**TURN, "output": 5}]}, "turn 2: found a number as 'output'"),
        ({"turns": [{**TURN, "calls": None}]}, "turn 1: found other 'calls'"),
        ({"turns": [{**TURN, "calls": [{**CALL, "arguments": []}]}]}, "found other 'calls'"),
        ({"turns": [{**TURN, "calls": [{**CALL, "name": None}]}]}, "found other 'calls'"),
        ({"turns": [{**TURN, "calls": [{**CALL, "feedback": None}]}]}, "found other 'calls'"),
        ({"turns": [{**LAST, "calls": [{**END, "feedback": "x"}]}]}, "found other 'calls'"),
        ({"turns": [{**TURN, "calls": [{**CALL, "executor": "root"}]}]}, "local, simulated, recorded, user or empty"),
        ({"turns": [{**TURN, "calls": [{**CALL, "executor": ["local"]}]}]}, "found other 'calls'"),
        ({"turns": [{**TURN, "fault": "both"}]}, "found 1 calls and the fault 'both'"),
        ({"turns": [{**FAULTY, "fault": ""}]}, "found 0 calls and the fault ''"),
        ({"turns": [{**FAULTY, "fault": 3}]}, "found a number as 'fault'"),
        ({"end": "gave up"}, "found end 'gave up', expected one of finish, max_turns"),
        ({"end": None}, "found end None"),
        ({"format": "xml"}, "found format 'xml', expected one of tl"),
        ({"format": []}, r"found format \[\]"),
        ({"error": 7}, "found a number as 'error'"),
        ({"index": 0}, "found index 0 again, expected it once .first in line 1"),
    ],
)
def test_malformed_dialogues_name_file_and_line(tmp_path, bad, text):
    path = write(tmp_path / "p.jsonl", row(0), {**row(1), **bad})
    with pytest.raises(DataError, match=text) as found:
        read_dialogues(path)
    assert str(found.value).startswith(f"{path}:2: ") and "\n" not in str(found.value)


# ---------------------------------------------------------------------------------------------------------------------
# Journals


def test_journals_of_all_ranks(tmp_path):
    path = tmp_path / "p.jsonl"
    write(path, row(4))
    write(journal_file(path, 0), line(0, 1), line(2, 1, FAULTY), line(0, 2, LAST), end(0), torn='{"index": 2, "turn"')
    write(journal_file(path, 1), line(1, 1), line(4, 1), end(3, "refused", "no"), torn='{"')
    dialogues, dropped = read_journals(path)
    assert dropped == 2 and list(dialogues) == [0, 1, 2, 3]  # 4 is finished: its journal was about to go
    assert dialogues[0].turns == [TURN, LAST] and (dialogues[0].end, dialogues[1].end) == ("finish", "")
    assert (dialogues[3].turns, dialogues[3].end, dialogues[3].error) == ([], "refused", "no")
    rewrite_journals(path, dialogues.values())
    assert journal_files(path) == [journal_file(path, 0)]
    assert read_journals(path) == (dialogues, 0)
    finished = close_journals(path, "plain")
    assert [(each.index, each.format) for each in finished] == [(0, "plain"), (3, "plain"), (4, "tl")]
    assert list(read_journals(path)[0]) == [1, 2] and journal_files(path) == [journal_file(path, 0)]


def test_kills_while_journals_are_put_together(tmp_path):
    """Joined and not yet removed, or finished and not yet removed: the same record twice is no conflict."""
    path = tmp_path / "p.jsonl"
    write(journal_file(path, 0), line(0, 1), line(1, 1), end(1))
    write(journal_file(path, 3), line(1, 1), end(1))
    dialogues, _ = read_journals(path)
    assert len(dialogues[1].turns) == 1
    write(path, row(1, [TURN]))
    assert list(read_journals(path)[0]) == [0]
    close_journals(path, "tl")
    assert read_dialogues(path)[0][0].index == 1 and list(read_journals(path)[0]) == [0]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([line(0, 1), line(0, 1, FAULTY)], ":2: found a second, different record of this turn of index 0"),
        ([end(0), end(0, "max_turns")], ":2: found a second, different record"),
        ([line(0, 1), line(0, 3)], "found turn 3 of index 0 in its journals, expected turn 2 before it"),
        ([line(0, 0)], ":1: found turn 0, expected an integer from 1"),
        ([line(0, "1")], "found turn '1'"),
        ([{"index": 0, "turn": 1}], "found null as 'output'"),
        ([{"turn": 1}], "found index None"),
        ([{"index": 0, "end": 5}], "found end 5"),
    ],
)
def test_journals_that_cannot_be_continued(tmp_path, rows, text):
    write(journal_file(tmp_path / "p.jsonl", 0), *rows)
    with pytest.raises(DataError, match=text):
        read_journals(tmp_path / "p.jsonl")


def test_threads_append_whole_lines(tmp_path):
    path = tmp_path / "folder" / "p.jsonl"
    with DialogueJournal(path, rank=2, recorded={}) as journal:
        threads = [
            threading.Thread(target=lambda index=index: [journal.add_turn(index, turn, TURN) for turn in range(1, 40)])
            for index in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert journal.recorded_turn(0, 1) is None
    dialogues, _ = read_journals(path)
    assert [len(dialogue.turns) for dialogue in dialogues.values()] == [39] * 8
    with DialogueJournal(path, rank=0, recorded=dialogues) as journal:
        assert journal.recorded_turn(3, 39) == TURN and journal.recorded_turn(3, 40) is None


# ---------------------------------------------------------------------------------------------------------------------
# Killed outright


def test_killed_five_times(tmp_path):
    """A process killed by SIGKILL inside a tool call, five times over; the last one ends with the same bytes."""
    tasks = [task(index, f"Query {index}?") for index in range(10)]
    whole, path = tmp_path / "a.jsonl", tmp_path / "b.jsonl"

    def policy(dialogue, turn, prompt):
        rng = random.Random(f"{dialogue} {turn} {prompt}")
        return rng.choice([WEATHER, call("get_news"), "nonsense", FINISH]) if turn > 3 else WEATHER

    play(whole, tasks, policy)
    for kill in range(5):
        child = os.fork()
        if child == 0:
            calls = iter(range(1_000_000))

            def execute(request, calls=calls):
                if next(calls) == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer_right(request)

            try:
                play(path, tasks, policy, execute=execute, seed=kill, batch_size=3)
            finally:
                os._exit(9)  # only if the kill did not come
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with open(journal_file(path, 0), "ab") as journal:  # and in the middle of a line
            journal.write(b'{"index": 3, "turn": 9, "out')
    _, notices, _ = play(path, tasks, policy)
    assert path.read_bytes() == whole.read_bytes() and "turns of others" in notices[0]
