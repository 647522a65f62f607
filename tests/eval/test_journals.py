"""eval/predict/journals.py: predictions and dialogues give one verdict on what a killed or strange writer left."""

import json

import pytest

from data.json_records import DataError
from eval.dialogues.journal import read_dialogues, read_journals
from eval.predict.generate import merge_journals
from eval.predict.journals import Journal, describe_resume, journal_file, journal_files, read_rows
from eval.predict.prediction_files import read_predictions

WORDS = "Oslo \u2603 \U0001f600"
PREDICTION = {"index": 0, "output": WORDS}
TURN = {"index": 0, "turn": 1, "output": WORDS, "calls": [], "fault": "no call"}
DIALOGUE = {"index": 0, "turns": [], "end": "max_turns"}


def raw(row: dict) -> bytes:
    """As other programs write it: characters themselves, not their escapes."""
    return json.dumps(row, ensure_ascii=False).encode()


def verdicts(tmp_path, content: bytes, *, row: dict) -> list[str]:
    """What each reader says of a file with `content`, whose rows are like `row`: "" or the error without the path."""
    path, found = tmp_path / "p.jsonl", []
    journal = journal_file(path, 1)
    if row is PREDICTION:
        readers = [(path, lambda: read_predictions(path)), (journal, lambda: merge_journals(path, 1))]
    elif row is TURN:
        readers = [(journal, lambda: read_journals(path))]
    else:
        readers = [(path, lambda: read_dialogues(path))]
    for file, read in readers:
        file.write_bytes(content)
        try:
            read()
            found.append("")
        except DataError as error:
            message = str(error)
            assert message.startswith(f"{file}:") and "\n" not in message
            found.append(message.removeprefix(f"{file}:"))
        file.unlink()
    return found


@pytest.mark.parametrize("row", [PREDICTION, TURN, DIALOGUE], ids=["prediction", "turn", "dialogue"])
def test_one_verdict_on_strange_files(tmp_path, row):
    good = raw(row)
    wrong_index = "found index {}, expected the record's number, an integer from 0"
    for content, words in (
        (b"\xef\xbb\xbf" + good + b"\n", ""),
        (good + b"\n\n" + good[:5], ""),
        (good[:-1] + b', "index": 0}\n', "1: found the key 'index' twice in one object"),
        (raw({**row, "index": True}) + b"\n", "1: " + wrong_index.format("True")),
        (raw({**row, "index": "0"}) + b"\n", "1: " + wrong_index.format("'0'")),
        (raw({**row, "index": 0.0}) + b"\n", "1: " + wrong_index.format("0.0")),
        (raw({**row, "index": None}) + b"\n", "1: " + wrong_index.format("None")),
        (b"[1]\n", "1: found a list, expected one JSON object"),
        (good + b"\n\xff\n", "2: found byte 0xff, expected UTF-8 text"),
        (good + b"\n" + good[:5] + b"\n", "2: found"),
    ):
        for verdict in verdicts(tmp_path, content, row=row):
            assert verdict.startswith(words) if words else verdict == "", (content, verdict)


def test_a_last_line_cut_anywhere_is_dropped_and_counted(tmp_path):
    """Also inside a character of several bytes, in each kind of file; nothing of the lines before is lost."""
    path = tmp_path / "p.jsonl"
    for row, files in ((PREDICTION, [path, journal_file(path, 3)]), (TURN, [journal_file(path, 0)])):
        first, last = raw(row) + b"\n", raw({**row, "index": 1})
        for file in files:
            for length in range(1, len(last)):
                file.write_bytes(first + last[:length])
                rows, n_dropped = read_rows([file])
                assert [found for _, found in rows] == [row] and n_dropped == 1
            file.unlink()
    for length in range(1, len(raw(PREDICTION))):
        path.write_bytes(raw(PREDICTION) + b"\n" + raw({**PREDICTION, "index": 1})[:length])
        journal_file(path, 1).write_bytes(raw({**PREDICTION, "index": 2})[:length])
        assert merge_journals(path, 0) == ([PREDICTION], 2)
        assert not journal_files(path) and json.loads(path.read_bytes()) == PREDICTION


def test_a_journal_hands_on_each_line_at_once(tmp_path):
    with Journal(tmp_path / "new" / "p.rank0001.jsonl") as journal:
        for index in range(3):
            journal.append({"index": index})
            rows, n_dropped = read_rows(journal_files(tmp_path / "new" / "p.jsonl"))
            assert [row["index"] for _, row in rows] == list(range(index + 1)) and n_dropped == 0
    assert rows[2][0] == f"{tmp_path}/new/p.rank0001.jsonl:3"
    assert read_rows([tmp_path / "absent.jsonl"]) == ([], 0)


def test_notices(tmp_path):
    path = tmp_path / "p.jsonl"
    nothing = {"kept": "", "n_dropped": 0, "too_long": [], "refused": []}
    assert describe_resume(path, **nothing, what="predictions counted as wrong") == []
    assert describe_resume(
        path,
        kept="2 predictions",
        n_dropped=1,
        too_long=list(range(21)),
        refused=[(7, "no"), (9, "never")],
        what="predictions counted as wrong",
    ) == [
        f"{path}: kept 2 predictions of an earlier run",
        f"{path}: dropped 1 partial line(s) of a killed run",
        f"{path}: 21 predictions counted as wrong because the prompt does not fit the model; index "
        + ", ".join(map(str, range(20)))
        + ", ..",
        f"{path}: 2 predictions counted as wrong because the endpoint refused; index 7: no",
    ]
