"""What the log says about a data set (data/data_report.py), on files whose counts are known by hand."""

import json
import re

import pytest

from data.data_report import describe_data
from data.json_records import DataError
from tests.support.tiny_run import tiny_files
from train.sft_loop import SFTConfig, encode_data

TOOLS = [
    {
        "name": "find_book",
        "parameters": {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
    }
]
ASK, END = {"role": "user", "content": "Is there Ulysses?"}, {"role": "assistant", "content": "Yes."}
GOOD = ("find_book", {"title": "Ulysses"})
UNKNOWN = ("nope", {})
INVENTED = ("find_book", {"title": "Ulysses", "city": "Oslo"})
MISSING = ("find_book", {})


def record(*calls, end: bool = True, **keys) -> dict:
    """A dialogue of these calls, each with a fine result; `keys` go to every assistant message."""
    messages: list[dict] = [ASK]
    for name, arguments in calls:
        tool_calls = [{"function": {"name": name, "arguments": json.dumps(arguments)}}]
        messages += [{"role": "assistant", "tool_calls": tool_calls, **keys}, {"role": "tool", "content": "fine"}]
    return {"tools": TOOLS, "messages": [*messages, *([{**END, **keys}] if end else [])]}


def notes_of(tmp_path, *records: dict, **settings) -> list[str]:
    from model.tokenizer import load_tokenizer

    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
    notes = encode_data(SFTConfig(data=str(path), **settings), load_tokenizer(tiny_files()[0]))[1]["notes"]
    assert all(note.isprintable() and note.isascii() and len(note) < 400 for note in notes)
    return notes


def test_masked_turns_of_dropped_trajectories_are_counted(tmp_path):
    notes = notes_of(tmp_path, record(GOOD), record(UNKNOWN, end=False), record(UNKNOWN, end=False), record(MISSING))
    assert notes[0].startswith("dropped 2 of 4 trajectories, without a trained turn: 1, 2")
    assert re.fullmatch(r"2 trajectories of \d+ tokens; trained: 3 turns, \d+ tokens", notes[1])
    assert notes[2] == "turns masked by error_filter=structured: parameter_missing 1, tool_hallucination 2"


def test_a_set_that_is_mostly_masked_ends_with_a_warning(tmp_path):
    hostile = ("find_book", {"title": "x", "\x1b[2J\u202e": 1})
    notes = notes_of(
        tmp_path, record(GOOD), record(INVENTED), record(UNKNOWN), record(MISSING), record(hostile), record(INVENTED)
    )
    path = re.escape(str(tmp_path / "data.jsonl"))
    assert notes[-4] == "warning: 5 of 6 calls are masked and train nothing; the most frequent rules:"
    expected = (
        rf"warning: 3 x parameter_hallucination, parameter not documented \(city\); .* {path}:2 message 1 find_book",
        rf"warning: 1 x tool_hallucination, tool not offered \(nope\); first at {path}:3 message 1 nope",
        rf"warning: 1 x parameter_missing, required parameter absent \(title\); first at {path}:4 message 1 find_book",
    )
    for note, pattern in zip(notes[-3:], expected, strict=True):
        assert re.fullmatch(pattern, note), note


def test_report_counts_masked_turns_by_rule_with_the_first_examples(tmp_path):
    from model.tokenizer import load_tokenizer

    records = [record(GOOD, MISSING), record(UNKNOWN), record(INVENTED), record(INVENTED), record(INVENTED, end=False)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
    kept, report = encode_data(SFTConfig(data=str(path)), load_tokenizer(tiny_files()[0]))
    assert {
        key: report[key] for key in ("trajectories", "trained_trajectories", "assistant_turns", "trained_turns")
    } == {
        "trajectories": 5,
        "trained_trajectories": 4,
        "assistant_turns": 10,  # six calls and four texts
        "trained_turns": 5,  # one call and the four texts
    }
    assert report["trained_tokens"] == sum(row.trained_tokens for row in kept)
    assert [(each["category"], each["turns"], len(each["examples"])) for each in report["masked"]] == [
        ("parameter_hallucination", 3, 2),
        ("parameter_missing", 1, 1),
        ("tool_hallucination", 1, 1),
    ]
    assert report["masked"][0]["examples"][0] == {
        "id": "2",
        "source": "data.jsonl:3",
        "message_index": 1,
        "call": 'find_book(title="Ulysses", city="Oslo")',
        "matched_text": "city",
        "feedback": "fine",
    }
    assert report["masked"][1]["examples"][0]["message_index"] == 3
    assert report["notes"][0].startswith("dropped 1 of 5 trajectories, without a trained turn: 4")


def test_half_masked_is_no_warning_and_text_turns_do_not_count(tmp_path):
    assert not any("warning" in note for note in notes_of(tmp_path, record(GOOD), record(UNKNOWN)))
    assert any("warning: 2 of 3" in note for note in notes_of(tmp_path, record(GOOD), record(UNKNOWN), record(UNKNOWN)))
    assert not any("warning" in note for note in notes_of(tmp_path, record(UNKNOWN), error_filter="none"))


def test_text_beside_a_call_that_does_not_parse_is_counted(tmp_path):
    broken = record(GOOD)
    broken["messages"][1] |= {"content": "Let me look.", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    notes = notes_of(tmp_path, record(GOOD), broken, unparsable_calls="mask")
    assert "turns masked by error_filter=structured: unparsable 1" in notes
    assert any(note.startswith("1 turns have text next to the call") for note in notes)


def test_what_is_not_used_is_counted(tmp_path):
    padded = record(GOOD)
    padded["messages"][1] = {
        "role": "assistant",
        "content": "Let me look.",
        "reasoning_content": "Hm.",
        "tool_calls": [{"function": {"name": "find_book", "arguments": {"title": "x", "city": None, "unit": None}}}],
    }
    excluded = record(GOOD, weight=0)
    notes = notes_of(tmp_path, padded, padded, record(GOOD), excluded)
    assert notes[0].startswith("dropped 1 of 4 trajectories, without a trained turn: 3")
    assert "turns masked by error_filter=structured: none" in notes
    assert "turns of weight 0 in the data: 2, kept as context and not trained" in notes
    assert any(note.startswith("4 null arguments dropped: ") for note in notes)
    assert any(note.startswith("2 turns have text next to the call: ") for note in notes)
    assert "2 texts under 'reasoning_content' of an assistant message: not read" in notes


def test_nothing_trained_is_one_line_with_the_reasons(tmp_path):
    records = [record(UNKNOWN, end=False), record(INVENTED, INVENTED, end=False), record(GOOD, weight=0)]
    with pytest.raises(DataError) as raised:
        notes_of(tmp_path, *records)
    assert str(raised.value) == (
        f"{tmp_path / 'data.jsonl'}: found 3 trajectories, 0 longer than 8192 tokens and 3 without a trained turn "
        "(turns: 2 x parameter_hallucination, parameter not documented; 2 x weight 0 in the data; 1 x "
        "tool_hallucination, tool not offered), expected at least one to train on"
    )


def test_no_trajectory_is_no_warning():
    assert describe_data([], [], [], "none")[1:] == ["turns masked by error_filter=none: none"]
