"""Own dialogues as a benchmark: which of their calls are asked for, how they are scored, the flags of run_eval.py."""

import json

import pytest

from data.json_records import DataError
from eval.evaluate_own import left_out_notice, load_own
from tests.support.eval_runs import flags_of, run_here
from tests.support.tiny_run import ROOT

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(name, arguments, **more):
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": function}], **more}


def result(text):
    return {"role": "tool", "tool_call_id": "c", "content": text}


DIALOGUE = [
    {"role": "user", "content": "Oslo, then Lima?"},
    call("weather", {"town": "Oslo"}),  # 1: contradicts the documents
    result('{"error": "missing city"}'),
    call("weather", {"city": "Oslo"}),  # 3: a question
    result("7 degrees"),
    call("weather", {"city": "Rome"}, weight=0),  # 5: the file gives it no weight
    result("20 degrees"),
    call("weather", {"city": "Lima"}),  # 7: a question
    result("19 degrees"),
    call("finish", {"answer": "7 and 19"}),  # 9: free text
]


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"id": "a", "tools": [TOOL], "messages": DIALOGUE}]))
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_calls_that_are_no_questions_are_counted(own):
    assert left_out_notice(own) == [
        f"{own}: 2 of 5 calls are questions; left out: free text 1, parameter_hallucination 1, weight 0 1"
    ]
    assert left_out_notice(ROOT / "assets/tiny_data/test_seen.jsonl") == []  # gold calls: each line is a question


def test_each_right_call_is_a_question_after_what_came_before(own):
    records = load_own(own)
    assert [(record.index, record.id, len(record.messages)) for record in records] == [(0, "a/3", 3), (1, "a/7", 7)]
    assert [record.gold[0].calls[0].arguments for record in records] == [{"city": "Oslo"}, {"city": "Lima"}]
    assert records[1].messages[3].call.arguments == {"city": "Oslo"} and records[1].messages[4].content == "7 degrees"
    assert all(record.gold[0].calls[0].name == "weather" and len(record.gold) == 1 for record in records)


def test_training_data_and_records_with_gold_are_read():
    assert len(load_own(ROOT / "assets/tiny_data/test_seen.jsonl")) == 300
    assert len(load_own(ROOT / "assets/tiny_data/train.json")) > 1217  # more than one call in some dialogues


def test_a_file_without_questions(own):
    own.write_text(json.dumps([{"id": "a", "tools": [TOOL], "messages": [DIALOGUE[0], DIALOGUE[9]]}]))
    with pytest.raises(DataError, match="own.json: found no call that can be asked for, expected at least one"):
        load_own(own)


def test_scores_by_hand(own, tmp_path):
    """Of Oslo and Lima, one right to the value and one to the names."""
    outputs = ['weather(city="Oslo")', 'weather(city="lima")']
    path = write(tmp_path / "p.jsonl", [{"index": index, "output": output} for index, output in enumerate(outputs)])
    code, out, err = run_here(["--data", str(own), "--predictions", str(path), "--output", str(tmp_path / "run")])
    assert code == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())["benchmarks"]
    assert list(summary) == ["own"]
    assert [summary["own"][metric] for metric in ("n", "TS", "PI", "CF")] == [2, 2, 2, 1]
    rows = [json.loads(line) for line in (tmp_path / "run/results/own.jsonl").read_text().splitlines()]
    assert [(row["id"], row["CF"]) for row in rows] == [("a/3", 1), ("a/7", 0)]


def test_a_model_is_asked(own, tmp_path):
    flags = flags_of(ROOT / "assets/tiny_data", tmp_path / "run", data=own, benchmarks="tiny-seen,own", limit=2)
    code, out, err = run_here(flags)
    assert code == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary["benchmarks"]) == ["tiny-seen", "own"] and summary["dtype"] == "float32"
    assert "| own, fp32       | 2 |" in (tmp_path / "run/report.md").read_text()
    own.write_text(own.read_text().replace("Lima", "Bern"))  # other data are another run
    code, out, err = run_here(flags)
    assert code == 2 and "answers_sha256" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "none.json"], "none.json: found No such file or directory, expected a readable file"),
        (["--benchmarks", "own"], "--benchmarks: found own alone, expected own together with --data FILE"),
        (["--benchmarks", "mmlu", "--data", "x"], "--benchmarks: found --data alone, expected own together"),
        (["--data", "README.md"], "README.md:1: found '#', expected '['"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path):
    code, out, err = run_here([*flags, "--model", str(ROOT / "assets/tiny_model"), "--output", str(tmp_path / "run")])
    assert code == 2 and err.startswith(message) and err.count("\n") == 1
