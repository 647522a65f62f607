"""data/import_bfcl.py on wheels made by hand; the real one where BFCL_WHEEL names it."""

import json
import os
import zipfile
from pathlib import Path

import pytest

from data.error_filter import decide_masked_turns
from data.import_bfcl import CATEGORIES, FOLDER, TEST_CATEGORIES, VERSION, BfclRecord, main, split_by_tools
from data.trajectories import read_trajectories
from eval.evaluate_tiny import load_tiny

METADATA = f"Metadata-Version: 2.4\nName: bfcl_eval\nVersion: {VERSION}\n\nwords\n"


def tool(name, *required, **properties):
    parameters = {"type": "dict", "properties": properties, "required": list(required)}
    return {"name": name, "description": f"about {name}", "parameters": parameters}


def row(identity, tools, query="q", system=None):
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": query}]
    return {"id": identity, "question": [messages], "function": tools}


def lines(rows):
    return "".join(json.dumps(each) + "\n" for each in rows)


def wheel_files(records, tests=()):
    """Name -> text: `records` are (row, accepted call) of the first category, `tests` rows of the first executable."""
    files = {f"bfcl_eval-{VERSION}.dist-info/METADATA": METADATA}
    for category in CATEGORIES:
        mine = records if category == CATEGORIES[0] else []
        files[f"{FOLDER}/BFCL_v4_{category}.json"] = lines([each for each, _ in mine])
        answers = [{"id": each["id"], "ground_truth": [call]} for each, call in mine]
        files[f"{FOLDER}/possible_answer/BFCL_v4_{category}.json"] = lines(answers)
    for category in TEST_CATEGORIES:
        mine = tests if category == TEST_CATEGORIES[0] else []
        files[f"{FOLDER}/unused_datasets/question/BFCL_v4_{category}.json"] = lines(mine)
    return files


def write_wheel(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


NUMBER, TEXT = {"type": "float"}, {"type": "string"}
AREA = tool("area", "side", side=NUMBER, unit=TEXT)
RECORDS = [
    (row("a", [AREA], "area of 3"), {"area": {"side": [3, 4.5], "unit": ["cm", ""]}}),
    (row("b", [AREA, tool("x")], "x", system="be brief"), {"x": {}}),
    (
        row("c", [tool("deep", o={"type": "dict"})], "deep"),
        {"deep": {"o": [{"p": ["u", "v"], "q": ["", 1], "r": 2.5}]}},
    ),
    (row("d", [tool("seen")], "other"), {"seen": {}}),
    (row("e", [tool("fine", n=TEXT)], "asked before"), {"fine": {"n": [""]}}),
]
TESTS = [row("t", [tool("seen")], "asked before")]


def run(source, output, capsys):
    code = main([str(source), str(output)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_records_by_hand(tmp_path, capsys, monkeypatch):
    """d shares a tool with the test set and e a query; b has a system message, so a and c are held out."""
    monkeypatch.setattr("data.import_bfcl.HELD_OUT_RECORDS", 2)
    wheel = write_wheel(tmp_path / "w.whl", wheel_files(RECORDS, TESTS))
    code, said = run(wheel, tmp_path / "out", capsys)
    assert code == 0 and "5 records" in said and "dropped: 1 with a tool" in said and ", 1 with one of their" in said
    assert "1 in train.json, 2 in heldout.json" in said
    [trained] = read_trajectories(tmp_path / "out" / "train.json")
    assert trained.id == "b" and trained.messages[-1].call.name == "x"
    first, second = load_tiny(tmp_path / "out" / "heldout.json")
    assert [answer.calls[0].arguments for answer in first.gold] == [
        {"side": 3.0, "unit": "cm"},
        {"side": 3.0},
        {"side": 4.5, "unit": "cm"},
        {"side": 4.5},
    ]
    assert isinstance(first.gold[0].calls[0].arguments["side"], float)
    assert [answer.calls[0].arguments["o"] for answer in second.gold] == [
        {"p": "u", "r": 2.5},
        {"p": "u", "q": 1, "r": 2.5},
        {"p": "v", "r": 2.5},
        {"p": "v", "q": 1, "r": 2.5},
    ]


def test_the_first_accepted_answer_is_trained_and_a_folder_is_read_alike(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.import_bfcl.HELD_OUT_RECORDS", 0)
    files = wheel_files(RECORDS[:1])
    for name, text in files.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(text)
    write_wheel(tmp_path / "w.whl", files)
    for source in ("d", "w.whl"):
        assert run(tmp_path / source, tmp_path / f"out_{source}", capsys)[0] == 0
    assert (tmp_path / "out_d" / "train.json").read_bytes() == (tmp_path / "out_w.whl" / "train.json").read_bytes()
    [trained] = read_trajectories(tmp_path / "out_d" / "train.json")
    assert trained.messages[-1].call.arguments == {"side": 3.0, "unit": "cm"}


def test_made_up_failing_calls_by_hand(tmp_path, capsys, monkeypatch):
    """Of four trajectories two have three required arguments; one share fails both, a half of it one, more is refused.

    The first call lacks the last required argument, not the last one given; MAE drops just that call.
    """
    monkeypatch.setattr("data.import_bfcl.HELD_OUT_RECORDS", 0)
    three = tool("far", "x", "y", "z", x=NUMBER, y=NUMBER, z=TEXT, w=TEXT)
    right = {"far": {"x": [1], "y": [2], "z": ["m"], "w": ["o"]}}
    records = [*RECORDS[:2], *((row(name, [three], f"far {name}"), right) for name in "pq")]
    wheel = write_wheel(tmp_path / "w.whl", wheel_files(records))

    code = main([str(wheel), str(tmp_path / "half"), "--failing_share", "0.5"])
    assert code == 0 and "made up: 2 of its trajectories" in capsys.readouterr().out
    by_id = {each.id: each for each in read_trajectories(tmp_path / "half" / "train.json")}
    for name in "pq":
        _, failed, feedback, mended = by_id[name].messages
        assert failed.call.arguments == {"x": 1.0, "y": 2.0, "w": "o"}
        assert feedback.role == "tool" and "'z'" in feedback.content
        assert mended.call.arguments == {"x": 1.0, "y": 2.0, "z": "m", "w": "o"}
        assert [turn.masked for turn in decide_masked_turns(by_id[name], "structured")] == [True, False]
    assert all(len(by_id[name].messages) <= 3 for name in "ab")

    main([str(wheel), str(tmp_path / "quarter"), "--failing_share", "0.25"])
    assert "made up: 1 of its" in capsys.readouterr().out
    for share, found in (("0.75", "found 0.75, expected at most 0.500"), ("1.5", "found 1.5"), ("nan", "found nan")):
        try:
            code = main([str(wheel), str(tmp_path / "no"), "--failing_share", share])
        except SystemExit as end:  # a flag out of bounds
            code = end.code
        assert code == 2 and found in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_record_of_very_many_answers_is_cut(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.import_bfcl.HELD_OUT_RECORDS", 1)
    names = [f"p{number}" for number in range(30)]
    many = (row("m", [tool("many", **dict.fromkeys(names, TEXT))]), {"many": {name: ["a", "b", ""] for name in names}})
    code, said = run(write_wheel(tmp_path / "w.whl", wheel_files([RECORDS[1], many])), tmp_path / "out", capsys)
    assert code == 0 and "of 1 records only the first 64" in said
    assert len(load_tiny(tmp_path / "out" / "heldout.json")[0].gold) == 64


def test_an_id_that_occurs_twice_is_refused(tmp_path, capsys):
    wheel = write_wheel(tmp_path / "w.whl", wheel_files([*RECORDS[:2], RECORDS[1]]))
    assert main([str(wheel), str(tmp_path / "out")]) == 2
    assert "found the id 'b' a second time" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_tool_set_is_never_on_both_sides():
    def record(number):
        tools = [{"type": "function", "function": {"name": f"t{number % 40}"}}]
        return BfclRecord(str(number), tools, [{"role": "user", "content": "q"}], "t", [{}], False)

    train, held_out = split_by_tools([record(number) for number in range(200)], 33)
    names = [{each.tools[0]["function"]["name"] for each in side} for side in (train, held_out)]
    assert len(held_out) == 30 and len(train) == 170 and not names[0] & names[1]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            f"bfcl_eval-{VERSION}.dist-info/METADATA",
            METADATA.replace(VERSION, "2025.1.1"),
            "found 'bfcl-eval 2025.1.1'",
        ),
        (f"bfcl_eval-{VERSION}.dist-info/METADATA", None, f"expected the wheel bfcl-eval {VERSION}"),
        (f"{FOLDER}/BFCL_v4_multiple.json", None, "found no readable file (KeyError)"),
        (f"{FOLDER}/BFCL_v4_simple_python.json", "[1]\n", "simple_python.json:1: found a list"),
        (f"{FOLDER}/BFCL_v4_simple_python.json", '{"id": 1}\n', "found 0"),
        (f"{FOLDER}/possible_answer/BFCL_v4_simple_python.json", "{}\n" * 5, "found the answer of None"),
        (f"{FOLDER}/possible_answer/BFCL_v4_simple_python.json", '{"id": "a"}\n' * 5, "found ground_truth = None"),
        (f"{FOLDER}/unused_datasets/question/BFCL_v4_exec_simple.json", "{\n", "expected JSON"),
    ],
)
def test_other_wheels_are_one_line_and_nothing_is_written(tmp_path, capsys, name, text, words):
    files = wheel_files(RECORDS, TESTS)
    files = {**files, name: text} if text is not None else {each: files[each] for each in files if each != name}
    code, said = run(write_wheel(tmp_path / "w.whl", files), tmp_path / "out", capsys)
    if words == "found 0":  # one record against five answers
        words = "found 5 answers of simple_python, expected 1"
    assert code == 2 and said.count("\n") == 1 and words in said, said
    assert not (tmp_path / "out").exists()


def test_nesting_without_end(tmp_path, capsys):
    files = wheel_files([(RECORDS[2][0], {"deep": {"o": ["DEEP"]}})])
    name = f"{FOLDER}/possible_answer/BFCL_v4_simple_python.json"
    files[name] = files[name].replace('"DEEP"', '{"a": [' * 3000 + "1" + "]}" * 3000)
    code, said = run(write_wheel(tmp_path / "w.whl", files), tmp_path / "out", capsys)
    assert code == 2 and said.count("\n") == 1 and "nested too deeply" in said, said[:300]


def test_what_is_no_wheel(tmp_path, capsys):
    (tmp_path / "text").write_text("PK")
    for source in (tmp_path / "none", tmp_path / "text", tmp_path):
        code, said = run(source, tmp_path / "out", capsys)
        assert code == 2 and said.count("\n") == 1 and f"expected the wheel bfcl-eval {VERSION}" in said


def test_a_damaged_lzma_stream(tmp_path, capsys):
    path = tmp_path / "w.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as wheel:
        wheel.writestr(f"bfcl_eval-{VERSION}.dist-info/METADATA", METADATA)
        start = wheel.infolist()[0].header_offset + 30 + len(f"bfcl_eval-{VERSION}.dist-info/METADATA") + 9
    content = bytearray(path.read_bytes())
    content[start : start + 8] = b"\xff" * 8  # after the nine bytes of the stream's properties
    path.write_bytes(content)
    code, said = run(path, tmp_path / "out", capsys)
    assert code == 2 and said.count("\n") == 1 and "found no readable file (LZMAError)" in said


def test_a_number_that_no_float_holds(tmp_path, capsys):
    record = (row("z", [AREA], "q"), {"area": {"side": [10**400]}})
    code, said = run(write_wheel(tmp_path / "w.whl", wheel_files([RECORDS[1], record])), tmp_path / "out", capsys)
    assert code == 2 and said.count("\n") == 1 and ":2: found a whole number too large for a float" in said
    assert not (tmp_path / "out").exists()


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "w.whl")
    folder = tmp_path / "d" / f"bfcl_eval-{VERSION}.dist-info"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "METADATA")
    for source in ("w.whl", "d"):
        code, said = run(tmp_path / source, tmp_path / "out", capsys)
        assert (
            code == 2 and said.count("\n") == 1 and "found no regular file" in said and not (tmp_path / "out").exists()
        )


@pytest.mark.parametrize("place", ["query", "value", "name"])
def test_text_that_is_no_unicode(tmp_path, capsys, place):
    name, query, value = ("bad\ud800" if place == each else each for each in ("name", "query", "value"))
    record = (row("z", [tool(name, x=TEXT)], query), {name: {"x": [value]}})
    code, said = run(write_wheel(tmp_path / "w.whl", wheel_files([RECORDS[1], record])), tmp_path / "out", capsys)
    assert code == 2 and said.count("\n") == 1 and "lone surrogate" in said and not (tmp_path / "out").exists()


def test_a_file_that_unpacks_to_too_much(tmp_path, capsys):
    files = {**wheel_files(RECORDS), f"{FOLDER}/BFCL_v4_multiple.json": " " * (33 << 20)}
    code, said = run(write_wheel(tmp_path / "w.whl", files), tmp_path / "out", capsys)
    assert code == 2 and "found more than 33554432 bytes" in said


def test_the_published_wheel(tmp_path, capsys):
    wheel = Path(os.environ.get("BFCL_WHEEL", ""))
    if not wheel.is_file():
        pytest.skip("needs BFCL_WHEEL, the wheel bfcl-eval 2026.3.23")
    code, said = run(wheel, tmp_path, capsys)
    assert code == 0 and "1911 records" in said and "29 with a tool" in said and " 0 with one of their" in said
    assert len(read_trajectories(tmp_path / "train.json")) == 1674 and len(load_tiny(tmp_path / "heldout.json")) == 208
