"""evaluate_tiny_multi: the bundled tasks with the right calls and answers, the command line, bad lines."""

import json
from pathlib import Path

from eval.evaluate_tiny_multi import main

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "assets/tiny_data/test_multi.jsonl"


def whole(index, calls, answer):
    """One finished dialogue: a turn per call, then `finish`."""
    entries = [{**call, "feedback": '{"result": "x"}', "executor": "local"} for call in calls]
    entries.append({"name": "finish", "arguments": {"answer": answer}, "feedback": None, "executor": ""})
    turns = [{"output": "", "calls": [entry], "fault": ""} for entry in entries]
    return {"index": index, "turns": turns, "end": "finish", "error": "", "format": "tl"}


def evaluate(tmp_path, rows, *flags):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return main(["--answers", str(TASKS), "--predictions", str(path), "--output", str(tmp_path), *flags])


def test_bundled_tasks(tmp_path, capsys):
    tasks = [json.loads(line) for line in TASKS.read_text().splitlines()]
    rows = [
        whole(index, [{key: call[key] for key in ("name", "arguments")} for call in task["meta"]["calls"]], answer)
        for index, task in enumerate(tasks)
        for answer in [task["meta"]["answer"] if index % 4 else "Nothing."]
    ]
    assert evaluate(tmp_path, rows) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["n"], summary["DE"], summary["CE"], summary["VA"], summary["answer_right"]) == (200, 0, 0, 200, 150)
    assert sum(part["answer_right"] for part in summary["by_requests"].values()) == 150
    assert set(summary["by_scenario"]) == {"seen", "unseen"}
    lines = (tmp_path / "results/tiny-multi.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer_right"] for line in lines] == [0, 1, 1, 1] * 50


def test_missing_dialogues_are_one_line_and_code_2(tmp_path, capsys):
    assert evaluate(tmp_path, [whole(0, [], "x")]) == 2
    assert "found 1 of 200 dialogues" in capsys.readouterr().err
    assert evaluate(tmp_path, [whole(0, [], "x")], "--limit", "1") == 0
