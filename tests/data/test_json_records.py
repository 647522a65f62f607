"""data/json_records.py: one verdict on a file for every reader, and what a killed writer leaves."""

import gzip
import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from data.json_records import (
    DataError,
    JsonLinesFile,
    open_lock,
    parse_json,
    read_json_lines,
    read_json_list,
    read_json_object,
    read_records,
    write_text,
)
from data.run_journals import read_journal

# Whatever Python's own decoder lets through, or fails on in its own way: (text of one value, words of the refusal).
MALFORMED = [
    ("{,}", "expected JSON"),
    ('{"a": 1, "a": 2}', "found the key 'a' twice in one object, expected it once"),
    ('{"x": {"b": 1, "b": 1}}', "found the key 'b' twice"),
    ('{"a": NaN}', "found NaN, expected JSON, which has no such number"),
    ('{"a": -Infinity}', "found -Infinity"),
    ('{"a": ' + "9" * 5000 + "}", "found an integer of too many digits, expected fewer"),
    ('{"a": ' + "[" * 99_999 + "}", "nested too deeply"),
    ('{"a": "\x01"}', "expected JSON (Invalid control character"),
]


def fault_of(read, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(*arguments, **options)
    message = str(caught.value)
    assert message.isascii() and message.isprintable() and len(message) < 400
    return message


@pytest.mark.parametrize(("text", "words"), MALFORMED, ids=range(len(MALFORMED)))
def test_all_readers_refuse_the_same_values_in_the_same_words(tmp_path, text, words):
    lines, in_list, packed = tmp_path / "lines.jsonl", tmp_path / "list.json", tmp_path / "lines.jsonl.gz"
    lines.write_text('{"a": 0}\n' + text + '\n{"a": 1}\n')
    in_list.write_text('[{"a": 0},\n' + text + ',\n{"a": 1}]')
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    messages = [
        fault_of(lambda: list(read_records(lines))),
        fault_of(lambda: list(read_records(in_list))),
        fault_of(read_json_list, in_list),
        fault_of(read_json_lines, lines, drop_partial_last_line=True),
        fault_of(read_json_lines, packed, drop_partial_last_line=False),
    ]
    assert all(":2: " in message and words in message for message in messages), messages
    assert words in fault_of(parse_json, text, "here")


def test_a_byte_order_mark_says_nothing(tmp_path):
    lines, in_list = tmp_path / "lines.jsonl", tmp_path / "list.json"
    lines.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    in_list.write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    expected = [(1, {"a": 1})]
    assert list(read_records(lines)) == list(read_records(in_list)) == read_json_list(in_list) == expected
    assert read_json_lines(lines, drop_partial_last_line=True) == (expected, False)


def test_json_list_gives_the_line_where_each_item_begins(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('\n[ {"a":\n 1},\n\n "x", [2]\n]\n')
    assert read_json_list(path) == [(2, {"a": 1}), (5, "x"), (5, [2])]
    for text in ("[]", " [ ] \n", "\ufeff[]"):
        path.write_text(text, encoding="utf-8")
        assert read_json_list(path) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ":1: found '', expected a JSON list"),
        ('{"a": 1}', ":1: found '{\"a\": 1}', expected a JSON list"),
        ("[1,\n2,\n]", ":3: found ']' at column 1, expected JSON"),
        ("[1\n 2]", ":2: found '2]', expected ',' or"),
        ("[1,", ":1: found the end at column 4, expected JSON"),
        ("[1", ":1: found '', expected ','"),
        ("[1] x", ":1: found 'x', expected nothing after the list"),
        ("[\n\n" + "[" * 9999, ":3: found lists or objects nested too deeply"),
    ],
)
def test_malformed_lists_name_the_line(tmp_path, text, expected):
    path = tmp_path / "list.json"
    path.write_text(text)
    assert fault_of(read_json_list, path).startswith(f"{path}{expected}")


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'[1,\n"\xe9"]')
    (tmp_path / "no.jsonl.gz").write_bytes(b'{"a": 1}\n')
    assert "Is a directory" in fault_of(read_json_list, tmp_path)
    assert "No such file" in fault_of(read_json_list, tmp_path / "none")
    assert "latin.json:2: found byte 0xe9, expected UTF-8 text" in fault_of(read_json_list, tmp_path / "latin.json")
    assert "no.jsonl.gz: found" in fault_of(read_json_lines, tmp_path / "no.jsonl.gz", drop_partial_last_line=False)


def test_lines_are_objects_and_blank_lines_count(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('\n{"a": 1}\n \n{"a": "\u2028"}\n', encoding="utf-8")
    assert read_json_lines(path, drop_partial_last_line=False) == ([(2, {"a": 1}), (4, {"a": "\u2028"})], False)
    path.write_text('{"a": 1}\n[1]\n')
    assert ":2: found a list, expected one JSON object" in fault_of(read_json_lines, path, drop_partial_last_line=True)


def test_every_cut_of_a_killed_writer_leaves_whole_lines_and_a_notice(tmp_path):
    """The last line may be cut at any byte, also inside a character of several bytes."""
    first, last = {"index": 0, "output": "\u00e9"}, {"index": 1, "output": "Oslo \u2603 \U0001f600"}
    path = tmp_path / "journal.jsonl"
    whole = json.dumps(first, ensure_ascii=False).encode() + b"\n"
    line = json.dumps(last, ensure_ascii=False).encode()
    for length in range(len(line) + 1):
        path.write_bytes(whole + line[:length])
        rows, was_cut = read_json_lines(path, drop_partial_last_line=True)
        complete = length == len(line)
        assert rows == [(1, first), *([(2, last)] if complete else [])]
        assert was_cut == (0 < length < len(line)), length
        if was_cut:
            fault_of(read_json_lines, path, drop_partial_last_line=False)
        # cut in the only line: nothing is left of it
        path.write_bytes(line[:length])
        rows, was_cut = read_json_lines(path, drop_partial_last_line=True)
        assert (rows, was_cut) == ([(1, last)] if complete else [], 0 < length < len(line))


def test_damage_elsewhere_is_no_cut(tmp_path):
    path = tmp_path / "journal.jsonl"
    for content in (b'{"a": "\xe9"}\n{"a": 1', b'{"a": 1\n{"a": 1}\n', b'{"a": "\xe2\x98"}\n', b'{"a": "\xff', b"[1\n"):
        path.write_bytes(content)
        fault_of(read_json_lines, path, drop_partial_last_line=True)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_a_file_is_replaced_whole_and_never_through_a_link(tmp_path):
    path, victim = tmp_path / "report.md", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "report.md.unfinished").symlink_to(victim)
    write_text(path, "new")
    assert (path.read_text(), victim.read_text()) == ("new", "precious")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["report.md", "victim"]
    path.unlink()
    path.symlink_to(victim)  # the name itself is a link: replaced, not written through
    write_text(path, "newer")
    assert (path.read_text(), path.is_symlink(), victim.read_text()) == ("newer", False, "precious")


@pytest.mark.parametrize("name", ["", ".", "..", "folder"])
def test_a_folder_is_not_written_to_and_the_error_names_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_text(Path(name), "x")
    assert caught.value.filename == str(Path(name)) and os.listdir() == ["folder"]


def test_an_error_names_the_file_and_not_the_unfinished_one(tmp_path):
    (tmp_path / "page.html.unfinished").mkdir()
    with pytest.raises(OSError, match=r"page\.html'$"):
        write_text(tmp_path / "page.html", "x")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # like a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_text(path, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"] and path.read_text() == "old"


def test_a_line_that_fits_only_in_part_is_an_error(tmp_path):
    """write() takes what still fits and says so by its count alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with JsonLinesFile(tmp_path / "journal.jsonl") as journal:
        journal.write({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        try:
            with pytest.raises(
                DataError, match=r"journal.jsonl: found no way to append .File too large., expected room"
            ):
                journal.write({"step": 2, "text": "x" * 30})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("action", ["deleted", "replaced", "folder gone"])
def test_a_journal_notices_at_the_next_line_that_its_file_is_gone(tmp_path, action):
    folder = tmp_path / "run"
    folder.mkdir()
    with JsonLinesFile(folder / "metrics.jsonl") as journal:
        journal.write({"step": 1})
        if action == "deleted":
            journal.path.unlink()
        elif action == "replaced":
            write_text(journal.path, '{"step": 1}\n')
        else:
            shutil.rmtree(folder)
        for call in (lambda: journal.write({"step": 2}), journal.sync):
            with pytest.raises(DataError, match=r"metrics.jsonl: found it deleted or replaced during the run"):
                call()


def test_journals_and_locks_follow_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "link").symlink_to(victim)
    for make in (JsonLinesFile, open_lock):
        with pytest.raises(OSError, match="symbolic links"):
            make(tmp_path / "link")
    open_lock(victim).close()  # the content of a lock is left alone
    assert victim.read_text() == "precious"


OBJECT_FAULTS = {
    "deep": (b"[" * 100_000, "nested too deeply"),
    "digits": (b'{"a": ' + b"1" * 5000 + b"}", "an integer of too many digits"),
    "list": (b"[]", "found a list, expected one JSON object"),
    "NUL": (b"\0" * 100, "expected JSON"),
    "cut": (b'{"a": [1', "found the end"),
    "latin 1": (b'{"a": "\xe9"}', "found byte 0xe9"),
}


@pytest.mark.parametrize("name", OBJECT_FAULTS)
def test_a_file_that_is_no_object_is_one_line(tmp_path, name):
    content, words = OBJECT_FAULTS[name]
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_json_object(path)
    assert str(caught.value).startswith(f"{path}:") and words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_regular_file_is_not_read(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("folder", "pipe", "link"):
        with pytest.raises(DataError, match=f"{name}: found no regular file"):
            read_json_object(tmp_path / name)
    with pytest.raises(DataError, match="absent: found No such file or directory"):
        read_json_object(tmp_path / "absent")


def test_what_never_ends_is_not_read(tmp_path):
    """A pipe without its other end, and a device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        path = tmp_path / name
        readers = [
            lambda path=path: read_json_lines(path, drop_partial_last_line=True),
            lambda path=path: read_journal(path, lambda row: row),
        ]
        for read in readers:
            with pytest.raises(DataError, match=f"{name}: found no regular file, expected one that a run wrote"):
                read()
        with pytest.raises(OSError, match=r"No such device or address|Too many levels of symbolic links"):
            JsonLinesFile(path)
    for read in (read_records, read_json_list):
        with pytest.raises(DataError, match="endless: found a device, expected a file"):
            read(tmp_path / "endless")
