"""Error statistics: Figure 1 on hand-made trajectories, Table 1 case by case, the rule for synonyms, command line."""

import json
import random
from pathlib import Path

import pytest

from data.tool_calls import ToolCall
from data.trajectories import Message, Trajectory
from eval.evaluate_rotbench import load_rotbench
from eval.reports.error_statistics import (
    classify_predictions,
    classify_turns,
    main,
    name_tokens,
    split_name,
    summarize_errors,
    summarize_turns,
)
from eval.reports.paper_tables import read_published
from eval.reports.synonyms import is_synonym
from tests.support.rotbench_records import NAMES, react, rotbench_record, toolalpaca_record

REAL = Path(__file__).resolve().parents[3] / "shared/data/benchmarks"
TINY_DATA = Path(__file__).resolve().parents[2] / "assets/tiny_data"
GOLD = react("get_weather", {"city": "Oslo", "unit": "metric"})
RIGHT = [GOLD, react("get_weather", {"city": "None"})]


# ---------------------------------------------------------------------------------------------------------------------
# Figure 1


def trajectory(trajectory_id, *calls):
    """`calls`: (name, arguments, feedback); one tool search(query), query required."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": "search",
                "description": "",
                "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
            },
        }
    ]
    messages = [Message("user", "Hello")]
    for name, arguments, feedback in calls:
        messages += [Message("assistant", "", call=ToolCall(name, arguments)), Message("tool", feedback)]
    return Trajectory(trajectory_id, tools, [*messages, Message("assistant", "Done.")], "f:1")


def test_figure_1_worked_numbers():
    good = ("search", {"query": "a"}, "sunny")
    trajectories = [
        trajectory("good", good, good),
        trajectory("two faults", good, ("find", {}, "x"), ("find", {}, "x"), ("search", {}, "x")),
        trajectory("one", ("search", {"query": "a"}, "Max retries exceeded"), good),
    ]
    rows = classify_turns(trajectories)
    summary = summarize_turns(trajectories, rows)
    counts = {key: share["count"] for key, share in summary["by_call"].items() if share["count"]}
    assert counts == {"all_right": 4, "tool_hallucination": 2, "parameter_missing": 1, "tool_instability": 1}
    counts = {key: share["count"] for key, share in summary["by_trajectory"].items() if share["count"]}
    assert counts == {"all_right": 1, "tool_hallucination": 1, "parameter_missing": 1, "tool_instability": 1}
    assert (summary["calls"], summary["trajectories"]) == (8, 3)  # the plain texts at the ends are no calls
    assert summary["trajectories_with_error"]["percent"] == 66.67


def test_figure_1_of_the_bundled_data(capsys, tmp_path):
    assert main(["--data", str(TINY_DATA / "train.json"), "--limit", "200", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    assert sum(share["count"] for share in summary["by_call"].values()) == summary["calls"] > 200
    assert len((tmp_path / "error_statistics.jsonl").read_text().splitlines()) == summary["calls"]
    assert "| tool_hallucination " in out and "12247 trajectories): 17 %" in out


# ---------------------------------------------------------------------------------------------------------------------
# Table 1


def classify(tmp_path, texts, *, record=None, rules="default", split=split_name):
    answers, predictions = tmp_path / "clean.json", tmp_path / "predictions.json"
    answers.write_text(json.dumps([record or rotbench_record(RIGHT)] * len(texts)))
    predictions.write_text(json.dumps([{"conversations": [{"from": "assistant", "value": text}]} for text in texts]))
    return classify_predictions(answers, predictions, None, rules, split)[0]


# The accepted answers: get_weather(city=Oslo, unit=metric) and get_weather(city=<anything>); unit is documented.
@pytest.mark.parametrize(
    "text, aspect, kinds",
    [
        (GOLD, "", []),
        (react("get_weather", {"city": "Rome"}), "", []),
        (react("get_news", {"a": 1}), "tool", ["Prefix"]),  # shares `get`
        (react("getWeather", {"a": 1}), "tool", ["Prefix"]),
        (react("weather", {"a": 1}), "tool", ["First"]),
        (react("", {"a": 1}), "tool", ["First"]),
        ("no call", "unparsable", []),
        (react("get_weather", {"city": "Oslo", "unit": "metric", "day": 1}), "parameter", ["Hallucination"]),
        (react("get_weather", {"unit": "metric"}), "parameter", ["Missing"]),
        (react("get_weather", {"unit": "metric", "day": 1}), "parameter", ["Missing", "Hallucination"]),
        (react("get_weather", {"city": "oslo, Norway", "unit": "metric"}), "content", ["Synonyms"]),
        (react("get_weather", {"city": "Rome", "unit": "metric"}), "content", ["Others"]),
        (react("get_weather", {"city": "Rome", "unit": "Celsius"}), "content", ["Synonyms", "Others"]),
        (react("get_weather", {}), "rule", []),
        (react("get_weather", [1]), "rule", []),
    ],
)
def test_cases_of_one_record(tmp_path, text, aspect, kinds):
    row = classify(tmp_path, [text])[0]
    assert (row["aspect"], row["kinds"]) == (aspect, kinds)
    assert bool(row["detail"]) == (aspect != "")


def test_redundancy_is_documented_but_not_in_the_answer(tmp_path):
    record = rotbench_record([react("get_weather", {"city": "Oslo"})])
    row = classify(tmp_path, [react("get_weather", {"city": "Oslo", "unit": "metric"})], record=record)[0]
    assert (row["aspect"], row["kinds"]) == ("parameter", ["Redundancy"])


def test_nearest_answer_and_wildcards(tmp_path):
    record = rotbench_record(
        [react("get_weather", {"city": "a", "unit": "b"}), react("get_weather", {"city": "None", "unit": "metric"})]
    )
    row = classify(tmp_path, [react("get_weather", {"city": "x", "unit": "Metric"})], record=record)[0]
    assert row["kinds"] == ["Synonyms"]  # of the second answer only the unit differs, its city is free


def test_renamed_finish_and_fair_rules(tmp_path):
    names = (*NAMES[:3], "bye")
    record = rotbench_record([react("bye", {"answer": "done"})], names=names)
    assert classify(tmp_path, [react("finish", {"text": "done"})], record=record)[0]["aspect"] == "parameter"
    assert classify(tmp_path, [react("get_weather", {})], rules="fair")[0]["kinds"] == ["Missing"]


def test_table_1_adds_up(tmp_path):
    texts = [
        GOLD,
        react("weather", {"a": 1}),
        react("get_news", {"a": 1}),
        react("get_oslo", {"a": 1}),
        "no call",
        react("get_weather", {"unit": "metric", "day": 1}),
        react("get_weather", {"unit": "metric"}),
        react("get_weather", {"city": "Rome", "unit": "Celsius"}),
        react("get_weather", {}),
    ]
    summary = summarize_errors(classify(tmp_path, texts))
    assert (summary["n"], summary["correct"], summary["unparsable"], summary["rule"]) == (9, 1, 1, 1)
    assert {aspect: summary[aspect]["records"] for aspect in ("tool", "parameter", "content")} == {
        "tool": 3,
        "parameter": 2,
        "content": 1,
    }
    assert (summary["tool"]["First"]["percent"], summary["tool"]["Prefix"]["percent"]) == (33.33, 66.67)
    # One record is both missing and hallucinated: 100 % and 50 %.
    assert [summary["parameter"][kind]["count"] for kind in ("Redundancy", "Missing", "Hallucination")] == [0, 2, 1]
    assert summary["content"]["Synonyms"]["count"] == summary["content"]["Others"]["count"] == 1


def test_published_percentages_are_shares_of_the_errors_of_table_3():
    """What the definitions rest on: parameter errors are TS - PI of Table 3, content errors PI - CF, of 105."""
    published = read_published()
    table3 = {
        row["model"]: [round(105 * percent / 100) for percent in row["rotbench-clean"]] for row in published["table3"]
    }
    for column, model in (("ToolLLaMA", "ToolLLaMA-2"), ("NexusRaven", "NexusRaven-2")):
        TS, PI, CF = table3[model]
        for aspect, n in (("Parameter", TS - PI), ("Content", PI - CF)):
            for row in published["table1"]:
                if row["aspect"] == aspect:
                    count = round(n * row[column] / 100)
                    assert f"{100 * count / n:.2f}" == f"{row[column]:.2f}", (column, row)


def test_tokens_of_a_tokenizer_decide_where_one_is_given(tmp_path):
    split = name_tokens(TINY_DATA.parent / "tiny_model")
    assert list(split("get_weather")) != list(split("get_news"))
    rows = classify(tmp_path, [react("get_weather2", {"a": 1})], split=split)
    assert rows[0]["kinds"] == ["Prefix" if split("get_weather2")[0] == split("get_weather")[0] else "First"]


def test_words_of_names():
    assert split_name("getHTTPPage_2") == ["get", "HTTP", "Page", "_", "2"] and split_name("") == []


def test_toolalpaca_and_hostile_text(tmp_path):
    answers, predictions = tmp_path / "eval_real.masked.json", tmp_path / "p.jsonl"
    answers.write_text(json.dumps([toolalpaca_record()]))
    texts = ['latest_get(key="k", base="eur", days=2)', "list_get(" * 9, "\x00" * 99]
    predictions.write_text("".join(json.dumps({"index": i, "output": text}) + "\n" for i, text in enumerate(texts)))
    rows = classify_predictions(answers, predictions, None, "default", split_name)[0]
    assert [row["kinds"] for row in rows] == [["Synonyms", "Others"], [], []]
    record = rotbench_record(RIGHT)
    deep = 'Action: get_weather\nAction Input: {"city": ' + "[" * 900 + "]" * 900 + ', "unit": "metric"}'
    huge = react("get_weather", {"city": "x1 " * 400_000, "unit": 10**4000})
    rows = classify(tmp_path, [deep, huge, react("\ud800" * 9, [])], record=record)
    assert [row["aspect"] for row in rows[:2]] == ["content", "content"]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the benchmark sets beside the repository")
def test_gold_of_the_published_set_has_no_errors_but_the_scorers_rule(tmp_path):
    answers = REAL / "rotbench/First_Turn/clean.json"
    predictions = tmp_path / "gold.json"
    records = json.loads(answers.read_text())
    predictions.write_text(
        json.dumps([{"conversations": [{"value": record["conversations"][-1]["value"][0]}]} for record in records])
    )
    summary = summarize_errors(classify_predictions(answers, predictions, None, "default", split_name)[0])
    assert (summary["correct"], summary["rule"], summary["unparsable"]) == (97, 8, 0)
    assert len(load_rotbench(answers)) == 105


# ---------------------------------------------------------------------------------------------------------------------
# Synonyms


@pytest.mark.parametrize(
    "predicted, gold",
    [
        ("2024", 2024),
        (" Oslo", "oslo"),
        ("true", True),  # rule 1
        (["b", "A"], ["a", "b"]),
        (["Paris", "Rome"], "Paris, Rome"),
        ({"a": "X"}, {"a": "x"}),  # 2
        ("2024/05/01", "2024-05-01"),
        ("marina_bay", "Marina Bay"),
        ("\uff21\uff22", "ab"),  # 3
        ("Japanese", "jpn_Jpan"),
        ("US", "United States"),
        ("January", "jan"),
        ("WHO", "World Health Organization"),  # 4
        ("Paris", "Paris, France"),
        ("career growth", "growth of a career"),
        ("top 5 movies", "5 top movie"),  # 6
        ("big red fox", "red fox hunts"),
        ("Paris", "Paris capital city France"),
        ("movie", "movies"),
    ],
)
def test_synonyms(predicted, gold):
    assert is_synonym(predicted, gold) and is_synonym(gold, predicted)


@pytest.mark.parametrize(
    "predicted, gold",
    [
        ("dog", "cat"),
        (3, 4),
        (True, False),
        (None, "x"),
        ("", "x"),
        ([], ["x"]),
        ("3", "4"),
        ("...", "x"),
        (["a"], ["a", "b"]),
        (["a", "a"], ["a", "b"]),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, "a 1"),
        ("top 5 movies", "top 10 movies"),
        ("with sugar", "without sugar"),
        ("2024-05-01", "2024-05-02"),
        ("www.reddit.com", "www.amazon.com"),
        ("the of", "the in"),
        ("dogs chase mice", "cats chase birds"),
        ("5", "5 6"),
    ],
)
def test_no_synonyms(predicted, gold):
    assert not is_synonym(predicted, gold) and not is_synonym(gold, predicted)


def test_synonyms_of_anything_never_raise_and_are_symmetric():
    generator = random.Random(0)
    pieces = ["5", "a", "\U00010a40", "\u00b2", "\u2160", ".", "/", "@", "not", "\ud800", " ", "e5", "1e9", "\x00"]
    for _ in range(3000):
        first, second = ("".join(generator.choices(pieces, k=generator.randrange(6))) for _ in range(2))
        assert is_synonym(first, second) == is_synonym(second, first)
        assert is_synonym(first, first)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "found neither or both"),
        (["--data", "a", "--answers", "b"], "found neither or both"),
        (["--answers", "b"], "found neither or both"),
        (["--data", "a", "--limit", "0"], "--limit: found 0"),
    ],
)
def test_wrong_flags(capsys, flags, expected):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_bad_files_are_one_line(tmp_path, capsys):
    (tmp_path / "other.json").write_text("[]")
    for flags, expected in (
        (["--data", str(tmp_path / "none")], "none"),
        (["--answers", str(tmp_path / "other.json"), "--predictions", "p"], "expected that of a benchmark"),
        (
            ["--answers", str(tmp_path / "test.jsonl"), "--predictions", "p"],
            "gsm8k, expected a benchmark of single calls",
        ),
        (
            ["--answers", str(TINY_DATA / "test_seen.jsonl"), "--predictions", "p", "--tokenizer", str(tmp_path)],
            "no tokenizer",
        ),
    ):
        assert main(flags) == 2
        captured = capsys.readouterr()
        assert expected in captured.err and captured.err.count("\n") == 1 and not captured.out
