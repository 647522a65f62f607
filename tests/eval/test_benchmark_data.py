"""Loaders of RoTBench and ToolAlpaca on records made here, and on the published files where they are at hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from data.json_records import DataError
from data.tool_calls import ToolCall
from eval.benchmark_data import (
    BENCHMARK_COUNTS,
    BENCHMARK_FILES,
    benchmark_file,
    benchmark_of,
    check_count,
    load_rotbench,
    load_toolalpaca,
)
from tests.support.rotbench_records import react, rotbench_record, toolalpaca_record

REAL = Path(__file__).resolve().parents[3] / "shared/data/benchmarks"
needs_real_files = pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the published benchmarks in ../shared/data/benchmarks"
)


def write(path: Path, records: object, indent: int | None = 1) -> Path:
    path.write_text(json.dumps(records, indent=indent))
    return path


# ------------------------------------------------------------------------------------------------------------- RoTBench


def test_rotbench_record(tmp_path):
    answers = [react("get_weather", {"city": "Oslo", "unit": "None"}), react("ask_to_user", {"question": "Where?"})]
    (example,) = load_rotbench(write(tmp_path / "clean.json", [rotbench_record(answers)]))
    assert (example.index, example.id) == (0, "Turn 1: Weather in Oslo?")
    assert [tool["function"]["name"] for tool in example.tools] == ["get_weather", "get_news", "ask_to_user", "finish"]
    assert example.tools[0]["function"]["parameters"]["required"] == ["city"]
    assert [(message.role, message.content) for message in example.messages] == [("user", "Weather in Oslo?")]
    first, second = (answer.calls[0] for answer in example.gold)
    assert (first.name, first.arguments, first.wildcards) == ("get_weather", {"city": "Oslo", "unit": "None"}, {"unit"})
    assert (second.name, second.wildcards) == ("ask_to_user", {"question"})  # any question is right
    assert example.meta == {"scenario": "RS", "finish": "finish", "ask_to_user": "ask_to_user", "noise": ""}


def test_special_tools_are_found_by_position_and_duplicate_names_stay(tmp_path):
    record = rotbench_record([react("xq", {"answer": "None"})], names=("same", "same", "finish", "xq"))
    (example,) = load_rotbench(write(tmp_path / "union.json", [record]))
    assert [tool["function"]["name"] for tool in example.tools] == ["same", "same", "finish", "xq"]
    assert (example.meta["finish"], example.meta["ask_to_user"]) == ("xq", "finish")
    assert example.gold[0].calls[0].wildcards == {"answer"}


def test_halves_of_the_noise_files(tmp_path):
    records = [rotbench_record([react("get_news", {})]) for _ in range(4)]
    halves = [example.meta["noise"] for example in load_rotbench(write(tmp_path / "heavy.json", records))]
    assert halves == ["tool", "tool", "parameter", "parameter"]
    assert {example.meta["noise"] for example in load_rotbench(write(tmp_path / "union.json", records))} == {""}


def test_later_turn_keeps_calls_feedback_and_what_is_no_call(tmp_path):
    turns = [
        ("assistant", react("get_weather", {"city": "Oslo"})),
        ("function", "missing 1 required argument"),
        ("assistant", "I do not know."),
        ("function", "?"),
        ("assistant", "Thought:\nAction: get_news\nAction Input: [1]"),
        ("function", "??"),
    ]
    path = write(tmp_path / "clean.json", [rotbench_record([react("finish", {"answer": "Rain."})], turns=turns)])
    (example,) = load_rotbench(path)
    assert [message.role for message in example.messages] == ["user", *["assistant", "tool"] * 3]
    assert example.messages[1].call == ToolCall("get_weather", {"city": "Oslo"}) and example.messages[1].fault is None
    assert example.messages[2].content == "missing 1 required argument"
    assert example.messages[3].call is None and "Action Input" in example.messages[3].fault
    assert example.messages[5].call is None and "list" in example.messages[5].fault


def without(record, *keys):
    return {key: value for key, value in record.items() if key not in keys}


GOOD = rotbench_record([react("get_news", {})])


@pytest.mark.parametrize(
    "record, expected",
    [
        (7, "found int, expected an object"),
        (without(GOOD, "conversations"), "found nothing as 'conversations'"),
        ({**GOOD, "conversations": []}, "found 0 conversations"),
        (without(GOOD, "scenario"), "nothing as 'scenario'"),
        ({**GOOD, "id": 5}, "found int as 'id'"),
        (rotbench_record([]), "found no accepted answer"),
        (rotbench_record([{}]), "found dict as accepted answer"),
        (rotbench_record(["finish"]), "accepted answer: "),
        (rotbench_record([react("other", {})]), "expected a call of one of the record's tools"),
        (rotbench_record([react("get_news", [])]), "expected a call of one of the record's tools"),
        (
            {**GOOD, "conversations": [{"from": "system", "value": "-"}, *GOOD["conversations"][1:]]},
            "found no JSON list",
        ),
        (
            {**GOOD, "conversations": [{"from": "system", "value": "[1]"}, *GOOD["conversations"][1:]]},
            "tools[0]: found",
        ),
        (rotbench_record([react("get_news", {})], turns=[("robot", "x")]), "found role 'robot'"),
    ],
)
def test_malformed_rotbench_records_name_file_and_line(tmp_path, record, expected):
    path = tmp_path / "clean.json"
    path.write_text(f"[{json.dumps(GOOD)},\n{json.dumps(record)}]")
    with pytest.raises(DataError) as caught:
        load_rotbench(path)
    assert str(caught.value).startswith(f"{path}:2: ") and expected in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- ToolAlpaca


def test_toolalpaca_record(tmp_path):
    path = write(tmp_path / "eval_real.json", [toolalpaca_record(), toolalpaca_record(name="Second")])
    examples = load_toolalpaca(path)
    assert [(example.index, example.id) for example in examples] == [
        (0, "Rates/0"),
        (1, "Rates/1"),
        (2, "Rates/2"),
        (3, "Second/0"),
        (4, "Second/1"),
        (5, "Second/2"),
    ]
    tools = {tool["function"]["name"]: tool["function"] for tool in examples[0].tools}
    assert list(tools) == ["latest_get", "list_get", "ask_to_user", "finish"]  # `components` is prose, no tool
    assert tools["latest_get"]["description"] == "Get rates." and tools["list_get"]["description"] == ""
    assert tools["latest_get"]["parameters"] == {
        "type": "object",
        "required": ["key", "base"],
        "properties": {
            "key": {"type": "string", "description": "Your key."},
            "base": {"type": "string", "description": ""},
            "days": {"type": "integer", "description": "How many. At most 5."},
        },
    }
    assert examples[0].messages[0].content == "Rates of the euro?"
    (gold,) = examples[0].gold[0].calls
    assert (gold.name, gold.arguments) == ("latest_get", {"key": "MASKED_API_KEY", "base": "EUR", "days": 2})
    assert [call.name for call in examples[0].meta["gold_calls"]] == ["latest_get", "list_get"]
    assert examples[0].meta["authentication"] == ["key"] and examples[0].meta["is_documented"]
    assert examples[1].gold[0].calls[0].arguments == {"base": "USD", "symbols": ["EUR"]}  # the doubled key is repaired
    assert examples[2].gold[0].calls[0].name == "secret_get" and not examples[2].meta["is_documented"]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"Golden_Answers": []}, "found 0 Golden_Answers for 3 Instructions"),
        ({"Name": 3}, "found int as 'Name'"),
        ({"Instructions": [1, 2, 3]}, "instruction 0: found int"),
        ({"Authentication": None}, "found NoneType"),
        ({"Golden_Answers": [[], [], []]}, "instruction 0: found no gold call"),
        ({"Golden_Answers": [[{"Action": "x", "Action_Input": "{"}]] * 3}, "found Action_Input '{', expected a JSON"),
        ({"Function_Description": {"f": "no such part"}}, "'f': found no 'Parameters: '"),
        ({"Function_Description": {"f": 'Parameters: {"a": "whatever"}'}}, "found 'whatever' for 'a'"),
        ({"Function_Description": {"f": "Parameters: [1]"}}, "found no 'Parameters: ' with a JSON object"),
    ],
)
def test_malformed_toolalpaca_records_name_file_and_line(tmp_path, change, expected):
    path = tmp_path / "eval.json"
    path.write_text(f"[{json.dumps(toolalpaca_record())},\n{json.dumps({**toolalpaca_record(), **change})}]")
    with pytest.raises(DataError) as caught:
        load_toolalpaca(path)
    assert str(caught.value).startswith(f"{path}:2: ") and expected in str(caught.value)


# ----------------------------------------------------------------------------------------------------- names and counts


def test_names_files_and_counts(tmp_path):
    assert benchmark_file("rotbench-heavy", tmp_path) == tmp_path / "rotbench/First_Turn/heavy.json"
    with pytest.raises(DataError, match="--benchmarks: found 'rotbench'"):
        benchmark_file("rotbench", tmp_path)
    assert benchmark_of(Path("x/First_Turn/clean.json")) == benchmark_of(Path("clean.json")) == "rotbench-clean"
    assert benchmark_of(Path("x/Third_Turn/clean.json")) == "rotbench-third-clean"
    assert benchmark_of(Path("eval_real.masked.json")) == "toolalpaca" and benchmark_of(Path("mine.json")) == "mine"
    assert set(BENCHMARK_COUNTS) == {name for name in BENCHMARK_FILES if not name.startswith("tiny-")}
    check_count("rotbench-clean", 105, tmp_path)
    check_count("tiny-seen", 7, tmp_path)  # made here, of any size
    with pytest.raises(DataError, match="found 104 records, expected the 105 of rotbench-clean"):
        check_count("rotbench-clean", 104, tmp_path)


@needs_real_files
def test_published_rotbench_files():
    for split in ("clean", "slight", "medium", "heavy", "union"):
        path = benchmark_file(f"rotbench-{split}", REAL)
        examples = load_rotbench(path)
        check_count(f"rotbench-{split}", len(examples), path)
        assert len(set(Counter(example.meta["scenario"] for example in examples).values())) == 1
        assert len(load_rotbench(REAL / f"rotbench/Third_Turn/{split}.json")) == len(examples) * 2 // 3
    clean = load_rotbench(benchmark_file("rotbench-clean", REAL))
    assert Counter(min(len(example.gold), 5) for example in clean) == {1: 79, 2: 10, 3: 11, 5: 5}
    calls = [answer.calls[0] for example in clean for answer in example.gold]
    assert sum(not call.arguments for call in calls) == 9
    assert sum("None" in call.arguments.values() for call in calls) == 13
    assert sum(len(example.tools) for example in clean) == 892
    names = [[tool["function"]["name"] for tool in example.tools] for example in clean]
    assert sum(len(set(each)) < len(each) for each in names) == 3
    assert all(each[-2:] == ["ask_to_user", "finish"] for each in names)


@needs_real_files
def test_published_toolalpaca_file():
    path = benchmark_file("toolalpaca", REAL)
    examples = load_toolalpaca(path)
    check_count("toolalpaca", len(examples), path)
    assert Counter(len(example.meta["gold_calls"]) for example in examples) == {1: 94, 2: 13, 3: 6, 5: 1}
    golds = [example.gold[0].calls[0] for example in examples]
    assert sum(not example.meta["is_documented"] for example in examples) == 6
    assert sum(not gold.arguments for gold in golds) == 17
    assert sum("MASKED_API_KEY" in gold.arguments.values() for gold in golds) == 34
    assert len({example.meta["api"] for example in examples}) == 11
