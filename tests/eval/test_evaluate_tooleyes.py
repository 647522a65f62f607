"""eval/evaluate_tooleyes.py: the records, files in and out, hostile files and predictions."""

import json
import random
from pathlib import Path

import pytest

from data.formats.table import FORMATS
from data.json_records import DataError
from data.tool_documents import normalize_tools
from data.trajectories import Message
from eval.evaluate_tooleyes import load_tooleyes, main, score_tooleyes
from eval.records import ScoreSettings
from tests.support.dialogue_doubles import TOOLS

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "../shared/data/benchmarks/tooleyes"
needs_files = pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark files are not there")
DOCUMENTS = [tool["function"] for tool in TOOLS]


def evaluate_files(answers, predictions, limit):
    return score_tooleyes(load_tooleyes(answers), predictions, ScoreSettings(limit, "", False, max_turns=9))


def record(query="Weather in Oslo?", path="ToolEyes/Tool_Library/Weather/Weather", scenario="RS", documents=DOCUMENTS):
    return {
        "id": f"Turn 1: {query}",
        "path": path,
        "scenario": scenario,
        "conversations": [
            {"from": "system", "value": f"Use these tools:\n{json.dumps(documents)}\n\nLet's Begin!"},
            {"from": "user", "value": query},
        ],
    }


def answers_file(tmp_path, *records):
    path = tmp_path / "scenario_data_zero_processed.json"
    path.write_text(json.dumps(list(records), indent=1))
    return path


def turn(*calls):
    return {
        "output": "raw",
        "fault": "",
        "calls": [
            {
                "name": name,
                "arguments": arguments,
                "feedback": feedback,
                "executor": "" if feedback is None else "local",
            }
            for name, arguments, feedback in calls
        ],
    }


RIGHT = [turn(("get_weather", {"city": "Oslo"}, "rain")), turn(("finish", {"answer": "Rain."}, None))]
WRONG = [turn(("get_weather", {"town": "Oslo"}, "rain")), {"output": "?", "fault": "no call", "calls": []}]


def predictions_file(tmp_path, *rows):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(index, turns, end="finish", **more):
    return {"index": index, "turns": turns, "end": end, "error": "", "format": "tl", **more}


# ---------------------------------------------------------------------------------------------------------------------
# The data


@needs_files
def test_all_records_of_tooleyes():
    tasks = load_tooleyes(REAL / "Test_Data/scenario_data_zero_processed.json")
    assert [task.index for task in tasks] == list(range(382))
    assert len({task.id for task in tasks}) == 380  # two ids occur twice; nothing is told apart by its id
    scenarios = [task.meta["scenario"] for task in tasks]
    assert {name: scenarios.count(name) for name in scenarios} == {
        "TG": 58,
        "DU": 49,
        "RS": 56,
        "PL": 70,
        "IR": 54,
        "AM": 45,
        "FT": 50,
    }
    sets = [task.tool_set for task in tasks]
    assert len(set(sets)) == 95 and sets.count("Random/Random") == 30 and sets.count("Social/chan") == 30
    assert all([tool["function"]["name"] for tool in task.tools][-2:] == ["ask_to_user", "finish"] for task in tasks)
    assert all([message.role for message in task.messages] == ["user"] for task in tasks)


@needs_files
def test_all_tool_sets_of_tooleyes():
    library = REAL / "Tool_Library"
    sets = {
        file.parent.relative_to(library).as_posix(): normalize_tools(json.loads(file.read_text("utf-8")), str(file))
        for file in library.rglob("config_gpt4.json")
    }
    assert len(sets) == 95 and sum(map(len, sets.values())) == 568 + 2 * 95
    tasks = load_tooleyes(REAL / "Test_Data/scenario_data_zero_processed.json")
    assert all(task.tools == sets[task.tool_set] for task in tasks)


@needs_files
def test_published_prompt_letter_by_letter():
    path = REAL / "Test_Data/scenario_data_zero_processed.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    for task, source in zip(load_tooleyes(path), records, strict=True):
        assert [
            (each["role"], each["content"]) for each in FORMATS["react"].chat_request(task.tools, task.messages)[0]
        ] == [(each["from"], each["value"]) for each in source["conversations"]]


def test_duplicates_stay_apart(tmp_path):
    tasks = load_tooleyes(answers_file(tmp_path, record(), record(), record(scenario="TG")))
    assert [task.index for task in tasks] == [0, 1, 2] and len({task.id for task in tasks}) == 1
    assert tasks[0].tool_set == "Weather/Weather" and tasks[0].messages == [Message("user", "Weather in Oslo?")]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"path": 5}, "found int as 'path'"),
        ({"scenario": "XX"}, "found scenario 'XX'"),
        ({"id": None}, "as 'id'"),
        ({"path": "ToolEyes/Tool_Library/../../etc"}, "expected that of a tool set"),
        ({"path": "/etc"}, "expected that of"),
        ({"conversations": []}, "expected one of system and one of user"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "expected one of system and one of user"),
        ({"conversations": [5, 6]}, "expected one of system"),
        ({"conversations": [{"from": "system", "value": "no tools"}, {"from": "user", "value": "x"}]}, "no JSON list"),
        (
            {"conversations": [{"from": "system", "value": "[{}]"}, {"from": "user", "value": "x"}]},
            "a tool with a name",
        ),
        (
            {"conversations": [{"from": "system", "value": "[" * 99_999}, {"from": "user", "value": "x"}]},
            "no JSON list",
        ),
        ({"conversations": [{"from": "system", "value": "[]"}, {"from": "user", "value": None}]}, "as 'value'"),
    ],
)
def test_malformed_records_name_file_and_line(tmp_path, changes, text):
    path = answers_file(tmp_path, record(), {**record(), **changes})
    line = 1 + path.read_text().split("\n").index(" {", 2)
    with pytest.raises(DataError, match=text) as found:
        load_tooleyes(path)
    assert str(found.value).startswith(f"{path}:{line}: ")


def test_tools_are_those_of_the_library(tmp_path):
    folder = tmp_path / "Tool_Library/Weather/Weather"
    folder.mkdir(parents=True)
    (tmp_path / "Test_Data").mkdir()
    path = answers_file(tmp_path / "Test_Data", record())
    (folder / "config_gpt4.json").write_text(json.dumps(DOCUMENTS))
    assert len(load_tooleyes(path)) == 1
    other = answers_file(tmp_path / "Test_Data", record(documents=DOCUMENTS[1:]))
    with pytest.raises(DataError, match=":2: found other tools than those of 'Weather/Weather' in Tool_Library"):
        load_tooleyes(other)
    with pytest.raises(DataError, match="found No such file or directory, expected the tools of 'Other/Other'"):
        load_tooleyes(answers_file(tmp_path / "Test_Data", record(path="ToolEyes/Tool_Library/Other/Other")))


# ---------------------------------------------------------------------------------------------------------------------
# Files in, out


def test_rows_and_summary(tmp_path, capsys):
    answers = answers_file(tmp_path, record(), record(), record(scenario="TG"))
    predictions = predictions_file(tmp_path, row(2, RIGHT), row(1, WRONG, "max_turns"), row(0, RIGHT))
    assert main(["--answers", str(answers), "--predictions", str(predictions), "--output", str(tmp_path)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {
        key: summary[key] for key in ("n", "n_calls", "DE", "CE", "VA", "DE_percent", "CE_percent", "VA_percent")
    } == {"n": 3, "n_calls": 4, "DE": 1, "CE": 1, "VA": 2, "DE_percent": 25.0, "CE_percent": 25.0, "VA_percent": 66.67}
    assert set(summary["by_scenario"]) == {"RS", "TG"} and summary["executors"] == {"local": 3}
    rows = [json.loads(line) for line in (tmp_path / "results/tooleyes.jsonl").read_text().splitlines()]
    assert [(each["index"], each["VA"], each["DE"], each["CE"]) for each in rows] == [
        (0, 1, 0, 0),
        (1, 0, 1, 1),
        (2, 1, 0, 0),
    ]
    assert rows[1]["categories"] == ["parameter_hallucination", "unparsable"]
    assert main(["--answers", str(answers), "--predictions", str(predictions), "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 1


def test_partial_last_line_is_told(tmp_path, capsys):
    answers, predictions = answers_file(tmp_path, record()), predictions_file(tmp_path, row(0, RIGHT))
    predictions.write_text(predictions.read_text() + '{"index": 1, "tur')
    assert main(["--answers", str(answers), "--predictions", str(predictions)]) == 0
    assert "dropped a partial last line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "found 0 of 2 dialogues"),
        ('{"index": 0}\n', ":1: found null as 'turns'"),
        ("[1]\n", ":1: found a list"),
        ("{\n{}\n", ":1: found the end at column 2, expected JSON"),
        (json.dumps(row(5, RIGHT)) + "\n", ":1: found index 5, expected 0 to 1"),
        (json.dumps(row(0, RIGHT)) + "\n" + json.dumps(row(0, WRONG)) + "\n", ":2: found index 0 again"),
        ('{"index": 0, "output": "f()"}\n', ":1: found null as 'turns'"),
    ],
)
def test_wrong_files_end_with_one_line_and_code_2(tmp_path, capsys, content, text):
    answers, predictions = answers_file(tmp_path, record(), record()), tmp_path / "p.jsonl"
    predictions.write_text(content)
    assert main(["--answers", str(answers), "--predictions", str(predictions)]) == 2
    error = capsys.readouterr().err
    assert text in error and str(predictions) in error and error.count("\n") == 1
    assert main(["--answers", str(tmp_path / "none.json"), "--predictions", str(predictions)]) == 2
    assert main(["--answers", str(predictions), "--predictions", str(predictions)]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["--answers", str(answers), "--predictions", str(predictions), "--limit", "0"])
    assert ended.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------
# The file of ToolEyes' loop

SAID = {  # what the loop's messages say, and what they are to us: attempted calls, DE, CE, VA
    "right": (
        [
            ("assistant", 'Thought: x\nAction: get_weather\nAction Input: {"city": "Oslo"}'),
            ("function", '"rain"'),
            ("assistant", 'Thought: x\nAction: finish\nAction Input: {"answer": "Rain."}'),
        ],
        1,
        0,
        0,
        1,
    ),
    "faults": (
        [
            ("assistant", "Thought: x\nAction: get_wind\nAction Input: {}"),
            ("function", "cannot import name 'get_wind' from 'Weather.Weather.tool' (x)"),
            ("assistant", "I wonder."),
            ("user", "Your output format does not match the specified format, .."),
            ("assistant", "Action: ask_to_user\nAction Input: {'question': 'Where?'}"),
            ("user", "Oslo"),
            ("assistant", "Action: get_weather\nAction Input: {'city': 'Oslo'}"),
            ("user", "Your output format .."),
            ("assistant", "Action: get_weather\nAction Input: {'town': 'Oslo'}"),
            ("function", "got an unexpected"),
            ("assistant", 'Action: finish\nAction Input: {"answer": "I cannot handle the task."}'),
        ],
        4,
        2,
        2,
        0,
    ),
    "too long": (
        [("assistant", "Action: get_news\nAction Input: {}"), ("function", '{"error": "Response error."}')] * 9
        + [
            (
                "assistant",
                (
                    "Thought: I cannot solve this task due to trying too many times.\nAction: finish\n"
                    'Action Input: {"answer": "I cannot handle the task."}'
                ),
            )
        ],
        9,
        0,
        9,
        0,
    ),
    "exception": (
        [
            (
                "assistant",
                (
                    "Thought: During execution, an error occurs.\nAction: finish\n"
                    'Action Input: {"answer": "I cannot handle the task."}'
                ),
            )
        ],
        0,
        0,
        0,
        0,
    ),
}


def official_file(tmp_path, *rows):
    path = tmp_path / "official.jsonl"
    path.write_text("".join(json.dumps(each) + "\n\n" for each in rows))  # blank lines pass, as in its own reader
    return path


def official_row(said, query="Weather in Oslo?"):
    source = record(query)
    return {**source, "conversations": source["conversations"] + [{"from": role, "value": text} for role, text in said]}


def test_file_of_the_official_loop(tmp_path):
    """Lines in any order, equal ids in the order of the records; what the loop wrote itself is no turn."""
    answers = answers_file(tmp_path, record("a"), record("same"), record("same"), record("d"))
    said = list(SAID.values())
    path = official_file(
        tmp_path,
        official_row(said[3][0], "d"),
        official_row(said[1][0], "same"),
        official_row(said[0][0], "a"),
        official_row(said[2][0], "same"),
    )
    rows, summary, _ = evaluate_files(answers, path, None)
    for row, (_, calls, de, ce, va) in zip(rows, said, strict=True):
        assert (row["calls"], row["DE"], row["CE"], row["VA"]) == (calls, de, ce, va), row
    assert [row["turns"] for row in rows] == [2, 6, 9, 0] and summary["executors"] == {"recorded": 12}
    assert summary["ends"] == {"finish": 2, "max_turns": 2}
    assert summary["no_answer"] == {"give-up": 1, "no finish: max_turns": 2}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"id": "Turn 1: other"}, ":1: found id 'Turn 1: other', expected that of a task without a line"),
        ({"id": 5}, "as 'id'"),
        ({"conversations": {}}, "as 'conversations'"),
        ({"conversations": [0, 0, {"from": "user", "value": "x"}]}, "found 'user' and '' as messages 2 and 3"),
        ({"conversations": [0, 0, {"from": "assistant", "value": 5}]}, "as 'value'"),
        ({"conversations": [0, 0, 7]}, "'from'"),
        (
            {"conversations": [0, 0, *({"from": "assistant", "value": "Action: finish\nAction Input: {}"},) * 2]},
            "found 'assistant' and 'assistant'",
        ),
    ],
)
def test_malformed_official_files(tmp_path, capsys, change, text):
    answers = answers_file(tmp_path, record())
    path = official_file(tmp_path, {**official_row(SAID["right"][0]), **change})
    assert main(["--answers", str(answers), "--predictions", str(path)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith(f"{path}:1: ") and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Hostile


def mutate(rng, value):
    """The value with one of its parts replaced by something else, anywhere."""
    junk = [
        None,
        True,
        -1,
        1e308,
        10**40,
        "",
        "\ud800",
        "x" * 5000,
        [],
        {},
        [[]] * 50,
        {"name": "f"},
        "finish",
        json.loads("[" * 300 + "]" * 300),
    ]
    if rng.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(junk)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    action = rng.random()
    if action < 0.1:
        del copy[key]
    elif action < 0.2 and isinstance(copy, list):
        copy.append(copy[key])
    else:
        copy[key] = mutate(rng, copy[key])
    return copy


def test_mutated_predictions_never_crash(tmp_path):
    """Whatever the file holds, it is scored or refused with one line that names the file."""
    answers = answers_file(tmp_path, record(), record(scenario="TG"))
    rng, scored = random.Random(7), 0
    for _ in range(700):
        rows = [row(0, RIGHT), row(1, WRONG, "max_turns")]
        for _ in range(rng.randint(1, 3)):
            number = rng.randrange(2)
            changed = mutate(rng, rows[number])
            rows[number] = changed if isinstance(changed, dict) else rows[number]
        predictions = predictions_file(tmp_path, *rows)
        try:
            results, summary, _ = evaluate_files(answers, predictions, None)
        except DataError as error:
            assert str(error).startswith(str(predictions)) and "\n" not in str(error) and len(str(error)) < 600
            continue
        scored += 1
        json.dumps(summary)
        assert summary["n"] == 2 and summary["DE"] + summary["CE"] <= summary["n_calls"] == sum(
            each["calls"] for each in results
        )
    assert 60 < scored < 650


def test_mutated_bytes_never_crash(tmp_path):
    answers, rng = answers_file(tmp_path, record()), random.Random(8)
    source = (json.dumps(row(0, RIGHT)) + "\n").encode()
    path = tmp_path / "p.jsonl"
    for _ in range(300):
        raw = bytearray(source)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.choice(b'"{}[]:,\\\n0x\xff\x00')
        path.write_bytes(bytes(raw))
        try:
            evaluate_files(answers, path, None)
        except DataError as error:
            assert str(error).startswith(str(path))


def test_very_long_dialogues(tmp_path):
    """A dialogue of 5,000 turns is scored like any other; its finish comes too late."""
    answers = answers_file(tmp_path, record())
    predictions = predictions_file(tmp_path, row(0, RIGHT[:1] * 5_000 + RIGHT[1:]))
    rows, summary, _ = evaluate_files(answers, predictions, None)
    assert summary["n_calls"] == 5_000 and summary["VA"] == 0 and rows[0]["reason"].startswith("finish in turn 5001")
