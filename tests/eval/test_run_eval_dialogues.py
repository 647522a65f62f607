"""run_eval.py on multi-turn benchmarks: kills, ranks, endpoint, executors, settings, bad lines, all of ToolEyes."""

import json
import re
import time

import pytest

from data.formats.table import render_output
from data.tool_calls import ToolCall
from eval.dialogues.journal import RecordedDialogue, read_dialogues
from eval.evaluate_tiny_multi import add_right_answers, is_answer_right, load_tiny_multi
from eval.predict import endpoint as endpoint_module
from eval.reports.compare import main as compare_main
from tests.support.endpoint_server import Server
from tests.support.eval_runs import flags_of, run_here
from tests.support.processes import lines_in, start
from tests.support.tiny_run import ROOT
from toolbox.world import execute

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

ASSETS = ROOT / "assets"
TASKS = ASSETS / "tiny_data" / "test_multi.jsonl"
TOOLEYES = ROOT.parent / "shared" / "data" / "benchmarks"
PICKED = (0, 21, 62, 65, 121, 150, 172)  # one to three requests, seen and unseen tools, an unstable tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A benchmark folder with seven of the bundled tasks."""
    path = tmp_path_factory.mktemp("multi") / "data"
    path.mkdir()
    lines = TASKS.read_text().splitlines()
    (path / "test_multi.jsonl").write_text("".join(lines[index] + "\n" for index in PICKED))
    return path


def flags(folder, output, **changes):
    return flags_of(
        folder,
        output,
        **{
            "benchmarks": "tiny-multi",
            "model": ASSETS / "tiny_model",
            "batch_size": 4,
            "prompt_format": "plain",
            "max_turn_tokens": 24,
            "max_turns": 5,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """An undisturbed run of the bundled base in its own call form."""
    output = tmp_path_factory.mktemp("multi") / "reference"
    code, out, err = run_here(flags(folder, output))
    assert code == 0, err
    return output, out


def predictions_of(output):
    return (output / "predictions/tiny-multi.jsonl").read_bytes()


def summary_of(output, name="tiny-multi"):
    return json.loads((output / "summary.json").read_text())["benchmarks"][name]


def rows_of(output):
    return [json.loads(line) for line in (output / "results/tiny-multi.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Files, figures


def test_run_leaves_dialogues_rows_summary_report(reference, folder):
    output, out = reference
    dialogues, _ = read_dialogues(output / "predictions/tiny-multi.jsonl")
    tasks, rows, summary = load_tiny_multi(folder / "test_multi.jsonl"), rows_of(output), summary_of(output)
    assert [each.index for each in dialogues] == [row["index"] for row in rows] == list(range(len(PICKED)))
    assert not list((output / "predictions").glob("*.rank*"))
    calls = 0
    for task, dialogue in zip(tasks, dialogues, strict=True):  # every feedback is the tool's own
        made = []
        for call in (call for turn in dialogue.turns for call in turn["calls"] if call["name"] != "finish"):
            attempt = made.count((call["name"], call["arguments"]))
            made.append((call["name"], call["arguments"]))
            assert call["feedback"] == execute(task.tools, call["name"], call["arguments"], attempt)
            assert call["executor"] == "local"
        calls += len(made)
    assert calls >= len(PICKED) and summary["executors"] == {"local": calls}
    unparsable = sum(bool(turn["fault"]) for dialogue in dialogues for turn in dialogue.turns)
    assert summary["n"] == len(PICKED) and summary["n_calls"] == calls + unparsable
    assert summary["answer_right"] == sum(row["answer_right"] for row in rows) >= 3
    assert {key: part["n"] for key, part in summary["by_requests"].items()} == {"1": 3, "2": 3, "3": 1}
    report = (output / "report.md").read_text()
    assert (
        report in out and "| tiny-multi, fp32 | 7         |" in report and "| tiny-multi, fp32 | local    |" in report
    )
    assert "is not that of the real tool" in report and "Table 4" not in report and "Warnings" not in report
    settings = json.loads((output / "predictions/tiny-multi.settings.json").read_text())
    assert settings["max_turns"] == 5 and settings["tool_executor"] == "auto" and settings["max_new_tokens"] == 24


def test_batch_size_and_rescoring_do_not_matter(reference, folder, tmp_path):
    assert run_here(flags(folder, tmp_path, batch_size=1))[0] == 0
    assert predictions_of(tmp_path) == predictions_of(reference[0])
    path = reference[0] / "predictions/tiny-multi.jsonl"
    code, _, err = run_here(
        flags_of(folder, tmp_path / "again", benchmarks="tiny-multi", predictions=path, max_turns=5)
    )
    assert code == 0, err
    assert summary_of(tmp_path / "again") == summary_of(reference[0]) and rows_of(tmp_path / "again") == rows_of(
        reference[0]
    )


def test_limit_is_evenly_spread_and_can_be_extended(reference, folder, tmp_path):
    assert run_here(flags(folder, tmp_path, limit=2))[0] == 0
    assert predictions_of(tmp_path).splitlines() == predictions_of(reference[0]).splitlines()[:4:3]  # 0 and 3 of 7
    code, out, _ = run_here(flags(folder, tmp_path))
    assert code == 0 and "kept 2 dialogues" in out
    assert predictions_of(tmp_path) == predictions_of(reference[0])


@pytest.mark.parametrize(
    "change",
    [
        {"max_turns": 4},
        {"max_turn_tokens": 23},
        {"max_dialogue_tokens": 500},
        {"seed": 1},
        {"tool_executor": "simulated"},
        {"instability_rate": 0.5},
        {"call_failure_rate": 0.5},
        {"execute_code": "on"},
        {"prompt_format": "tl"},
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(reference, folder, change):
    before = predictions_of(reference[0])
    code, _, err = run_here(flags(folder, reference[0], **change))
    assert code == 2 and err.count("\n") == 1 and "belong to another run" in err, err
    assert predictions_of(reference[0]) == before


# ---------------------------------------------------------------------------------------------------------------------
# Kills and ranks


def journal_of(content):
    """The journal lines that lead to a prediction file, turn by turn and end by end."""
    rows = []
    for line in content.splitlines():
        row = json.loads(line)
        rows += [{"index": row["index"], "turn": number, **turn} for number, turn in enumerate(row["turns"], 1)]
        rows.append({"index": row["index"], "end": row["end"], "error": row["error"]})
    return [json.dumps(row).encode() + b"\n" for row in rows]


def test_continues_from_every_cut(reference, folder, tmp_path):
    """States that a kill can leave: turns of several ranks, torn lines, half of the file done, a journal too late."""
    lines = journal_of(predictions_of(reference[0]))
    whole = predictions_of(reference[0]).splitlines(keepends=True)
    settings = (reference[0] / "predictions/tiny-multi.settings.json").read_bytes()
    states = [
        {"tiny-multi.rank0000.jsonl": b"".join(lines[:1]) + lines[1][:30]},
        {"tiny-multi.rank0000.jsonl": b"".join(lines[::2]), "tiny-multi.rank0001.jsonl": b"".join(lines[1::2])},
        {"tiny-multi.jsonl": b"".join(whole[:3]), "tiny-multi.rank0001.jsonl": b"".join(lines)},
        {"tiny-multi.jsonl": b"".join(whole[2:]), "tiny-multi.jsonl.unfinished": b"{"},
    ]
    for number, state in enumerate(states):
        predictions = tmp_path / str(number) / "predictions"
        predictions.mkdir(parents=True)
        for name, content in {**state, "tiny-multi.settings.json": settings}.items():
            (predictions / name).write_bytes(content)
        code, out, err = run_here(flags(folder, predictions.parent))
        assert code == 0, err
        assert predictions_of(predictions.parent) == predictions_of(reference[0]), number
        assert ("dropped 1 partial" in out) == (number == 0)
        assert not list(predictions.glob("*.rank*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "moments",
    [((1, 1), (2, 6)), pytest.param(((1, 1), (2, 4), (1, 8), (1, 12), (1, 15)), marks=pytest.mark.very_slow)],
    ids=["twice", "five times"],
)
def test_killed_with_one_rank_and_two(reference, folder, tmp_path, moments):
    """SIGKILL after every few journal lines, under one rank, two, one ...; the file ends the same, byte by byte."""
    arguments = flags(folder, tmp_path, batch_size=2)

    def lines_there():
        return lines_in(tmp_path / "predictions", "tiny-multi*.jsonl")

    kills = 0
    for ranks, enough in moments:
        running = start("run_eval", arguments, ranks)
        deadline = time.monotonic() + 120
        while lines_there() < enough and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        kills += running.poll() is None
        running.kill()
        running.communicate()
    code, out, err = run_here(arguments)
    assert code == 0, err
    assert kills == len(moments) and "of an earlier run" in out
    assert predictions_of(tmp_path) == predictions_of(reference[0])


@pytest.mark.slow
def test_two_ranks_equal_one(reference, folder, tmp_path):
    running = start("run_eval", flags(folder, tmp_path), ranks=2)
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    assert out.count("# Evaluation") == 1
    assert predictions_of(tmp_path) == predictions_of(reference[0])
    assert summary_of(tmp_path) == summary_of(reference[0]) and rows_of(tmp_path) == rows_of(reference[0])


# ---------------------------------------------------------------------------------------------------------------------
# Endpoint


def gold_script(tasks, prompt_format, *, fails_at=None, skips=()):
    """A server that makes the right calls of tiny-multi one after the other, again where a tool was unstable.

    `fails_at`: from that request on it is down. Of the tasks in `skips` it leaves the last call out.
    """

    def script(number, path, body):
        if fails_at is not None and number >= fails_at:
            return 500, b"<html>", {}
        asked = json.dumps(body)
        task = next(task for task in tasks if json.dumps(task.messages[0].content)[1:-1] in asked)
        calls = task.meta["calls"][:-1] if task.index in skips else task.meta["calls"]
        done = [asked.count(json.dumps(json.dumps({"result": result}))[1:-1]) for result in task.meta["results"]]
        n_done = sum(count > 0 for count in done)
        answer = " and ".join(task.meta["results"][:n_done])
        call = ToolCall(**calls[n_done]) if n_done < len(calls) else ToolCall("finish", {"answer": answer})
        output = render_output([call], prompt_format)
        choice = {"message": json.loads(output)} if path.endswith("/chat/completions") else {"text": output}
        return 200, {"choices": [{**choice, "finish_reason": "stop"}]}, {}

    return script


@pytest.mark.parametrize("prompt_format", ["tl", "qwen25"])
def test_endpoint_that_calls_rightly_answers_rightly(folder, tmp_path, prompt_format):
    tasks = load_tiny_multi(folder / "test_multi.jsonl")
    server = Server(gold_script(tasks, prompt_format, skips=(2,)))
    code, _, err = run_here(flags(folder, tmp_path, endpoint=server.url, model="m", prompt_format=prompt_format))
    server.http.shutdown()
    assert code == 0, err
    summary, rows = summary_of(tmp_path), rows_of(tmp_path)
    unstable = sum(task.meta["attempts"] - task.meta["requests"] for task in tasks)
    assert unstable == 1 and summary["n_calls"] == sum(task.meta["attempts"] for task in tasks) - 1
    assert (summary["DE"], summary["CE"], summary["VA"]) == (0, unstable, len(tasks))
    assert [row["answer_right"] for row in rows] == [int(index != 2) for index in range(len(tasks))]
    assert len(server.requests) == summary["n_calls"] + len(tasks)  # each turn is asked once


def test_endpoint_that_fails_loses_no_turn(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "BACKOFF_SECONDS", 0.001)
    tasks = load_tiny_multi(folder / "test_multi.jsonl")
    whole = Server(gold_script(tasks, "tl"))
    arguments = {"model": "m", "prompt_format": "tl", "endpoint_attempts": 1, "endpoint_concurrency": 2}
    assert run_here(flags(folder, tmp_path / "whole", endpoint=whole.url, **arguments))[0] == 0
    whole.http.shutdown()
    state = {"works": 3}
    server = Server(lambda number, path, body: gold_script(tasks, "tl", fails_at=state["works"])(number, path, body))
    answered = 0
    for works in (3, 9, 14):
        state["works"] = works
        code, _, err = run_here(flags(folder, tmp_path / "cut", endpoint=server.url, **arguments))
        assert code == 2 and "found status 500" in err, err
        state["works"] = 0
    state["works"] = 10_000
    code, out, err = run_here(flags(folder, tmp_path / "cut", endpoint=server.url, **arguments))
    server.http.shutdown()
    assert code == 0 and "of an earlier run" in out, err
    assert predictions_of(tmp_path / "cut") == predictions_of(tmp_path / "whole")
    answered = len(server.requests)
    assert len(whole.requests) <= answered <= len(whole.requests) + 3 * 2  # failed ones only: no turn is asked twice


# ---------------------------------------------------------------------------------------------------------------------
# Executors


def test_simulated_tools_fail_at_the_given_rate_and_are_named(folder, tmp_path):
    tasks = load_tiny_multi(folder / "test_multi.jsonl")
    server = Server(gold_script(tasks, "tl"))
    code, _, err = run_here(
        flags(
            folder,
            tmp_path,
            endpoint=server.url,
            model="m",
            prompt_format="tl",
            tool_executor="simulated",
            call_failure_rate=1.0,
        )
    )
    server.http.shutdown()
    assert code == 0, err
    summary = summary_of(tmp_path)
    assert summary["executors"] == {"simulated": summary["n_calls"]} and summary["CE_percent"] == 100.0
    assert summary["ends"] == {"max_turns": len(tasks)} and summary["n_calls"] == 5 * len(tasks)
    assert "| tiny-multi | simulated | 35    | 100.0 |" in (tmp_path / "report.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Right answers


def answered(answer, end="finish"):
    return RecordedDialogue(
        0,
        [
            {
                "output": "",
                "fault": "",
                "calls": [{"name": "finish", "arguments": {"answer": answer}, "feedback": None, "executor": ""}],
            }
        ],
        end=end,
    )


@pytest.mark.parametrize(
    "answer, is_right",
    [
        ("hostel : calm 61 and note : mixed 47", True),
        ("mixed 47, then calm 61.", True),
        ("calm 61", False),
        ("hostel : calm 61 and note : mixed 4", False),
        ("calm 611 and mixed 47", False),
        ("uncalm 61 and mixed 47", False),
        ("Calm 61 and mixed 47", False),
        ("", False),
        (["calm 61", "mixed 47"], False),
        (None, False),
    ],
)
def test_right_answers_by_hand(answer, is_right):
    task = load_tiny_multi(TASKS)[60]
    task.meta["results"] = ["calm 61", "mixed 47"]
    assert is_answer_right(task, answered(answer)) is is_right
    assert not is_answer_right(task, answered(answer, end="max_turns"))
    assert not is_answer_right(task, RecordedDialogue(0, [], end="prompt_too_long"))


def test_right_answers_are_counted_by_requests():
    tasks = [load_tiny_multi(TASKS)[index] for index in (0, 1, 60, 61)]
    dialogues = [answered(task.meta["answer"] if number != 3 else "none") for number, task in enumerate(tasks)]
    rows, summary = add_right_answers([{"index": index} for index in range(4)], {"n": 4}, dialogues, tasks)
    assert [row["answer_right"] for row in rows] == [1, 1, 1, 0]
    assert (summary["answer_right"], summary["answer_right_percent"]) == (3, 75.0)
    assert [(key, part["n"], part["answer_right"]) for key, part in summary["by_requests"].items()] == [
        ("1", 2, 2),
        ("2", 2, 1),
    ]


def test_runs_are_compared_with_lower_is_better(reference, folder, tmp_path, capsys):
    tasks = load_tiny_multi(folder / "test_multi.jsonl")
    server = Server(gold_script(tasks, "tl"))
    assert run_here(flags(folder, tmp_path, endpoint=server.url, model="m", prompt_format="tl"))[0] == 0
    server.http.shutdown()
    assert compare_main([str(reference[0]), str(tmp_path), "--names", "base,gold", "--mcnemar"]) == 0
    out = capsys.readouterr().out
    assert "DE, lower is better" in out and "answer_right" in out
    files = [str(each / "predictions/tiny-multi.jsonl") for each in (reference[0], tmp_path)]
    assert compare_main(["--answers", str(folder / "test_multi.jsonl"), *files]) == 0
    assert "VA" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda row: {**row, "tools": "none"}, ":1: found str as 'tools', expected list"),
        (lambda row: {**row, "messages": []}, ":1: found no message"),
        (
            lambda row: {**row, "messages": [{"role": "assistant", "content": "x"}]},
            ":1: found a message of role 'assistant'",
        ),
        (lambda row: {key: row[key] for key in row if key != "meta"}, ":1: found nothing as 'meta', expected dict"),
        (
            lambda row: {**row, "meta": {**row["meta"], "results": [3]}},
            ":1: meta: found results '[3]', expected a list",
        ),
        (lambda row: {**row, "meta": {**row["meta"], "requests": 2}}, ":1: meta: found 2 requests and 1 results"),
        (
            lambda row: {**row, "meta": {**row["meta"], "scenario": 1}},
            ":1: meta: found int as 'scenario', expected str",
        ),
        (lambda row: [row], ":1: found a list, expected one JSON object"),
    ],
)
def test_bad_lines_are_one_line_and_code_2(folder, tmp_path, spoil, expected):
    rows = [json.loads(line) for line in (folder / "test_multi.jsonl").read_text().splitlines()]
    (tmp_path / "test_multi.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [spoil(rows[0]), *rows[1:]]))
    code, _, err = run_here(flags(tmp_path, tmp_path / "out"))
    assert code == 2 and err.count("\n") == 1 and expected in err, err


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"max_turns": 10}, "--max_turns: found 10, expected at most 9"),
        ({"max_turns": 0}, "expected at least 1"),
        ({"tool_executor": "recorded"}, "expected one of auto, local, simulated"),
        ({"recorded_calls": "x"}, "--recorded_calls: found an unknown flag"),
        ({"instability_rate": 1.5}, "expected at most 1"),
        ({"instability_rate": 0.6, "call_failure_rate": 0.6}, "--instability_rate: found 1.2 together with"),
        ({"max_turn_tokens": 1024}, "--max_turn_tokens: found 1024, expected less than the model's 1024 positions"),
        ({"benchmarks": "tooleyes", "check_files": "on"}, "tooleyes/LICENSE: found no such file, expected it"),
        ({"prompt_format": "qwen25"}, "--prompt_format qwen25: found no token <|im_start|>, <|im_end|> in the"),
        ({"predictions": "none.jsonl", "prompt_format": "tl"}, "none.jsonl: found No such file"),
    ],
)
def test_bad_settings_are_one_line_and_code_2(folder, tmp_path, change, expected):
    code, _, err = run_here(flags(folder, tmp_path / "out", **change))
    assert code == 2 and err.count("\n") == 1 and expected in err, err


def test_bad_dialogue_files_are_refused(reference, folder, tmp_path):
    lines = predictions_of(reference[0]).decode().splitlines()
    for content, expected in (
        (lines[1:], "first missing index 0"),
        ([*lines, lines[0]], ":8: found index 0 again"),
        (['{"index": 0, "output": "x"}'], ":1: found null as 'turns'"),
    ):
        path = tmp_path / "p.jsonl"
        path.write_text("\n".join(content) + "\n")
        code, _, err = run_here(flags_of(folder, tmp_path / "out", benchmarks="tiny-multi", predictions=path))
        assert code == 2 and err.count("\n") == 1 and expected in err, err


# ---------------------------------------------------------------------------------------------------------------------
# ToolEyes

needs_tooleyes = pytest.mark.skipif(not TOOLEYES.is_dir(), reason="needs the published files beside this repository")


def finish_after_one_call(number, path, body):
    """A server that calls the first tool of the prompt with its required parameters, then gives an answer."""
    prompt = body["prompt"]
    name, signature = re.search(r"\ndef ([^\n(]+)\(([^\n]*)\):\n", prompt).groups()
    required = [part.partition(":")[0] for part in signature.split(", ") if part and not part.endswith(" = None")]
    call = ToolCall(name, dict.fromkeys(required, "7"))
    text = render_output([call], "tl") if "\nOutput:" not in prompt else 'finish(answer="done")'
    return 200, {"choices": [{"text": text, "finish_reason": "stop"}]}, {}


@needs_tooleyes
def test_first_dialogues_of_tooleyes_with_a_scripted_endpoint(tmp_path):
    server = Server(finish_after_one_call)
    code, _, err = run_here(
        flags(TOOLEYES, tmp_path, benchmarks="tooleyes", limit=12, endpoint=server.url, model="m", prompt_format="tl")
    )
    server.http.shutdown()
    assert code == 0, err
    summary = summary_of(tmp_path, "tooleyes")
    assert (summary["n"], summary["VA"], summary["DE"]) == (12, 12, 0)
    assert sum(summary["executors"].values()) == summary["n_calls"] == 12
    report = (tmp_path / "report.md").read_text()
    assert "## Table 4: multi-turn" in report and "tooleyes: 12 of 382 records were run; not comparable." in report
    assert ("the paper's models called the real tools" in report) == bool(summary["executors"].get("simulated"))


@needs_tooleyes
def test_all_of_tooleyes_with_a_scripted_endpoint(tmp_path):
    server = Server(finish_after_one_call)
    code, _, err = run_here(
        flags(TOOLEYES, tmp_path, benchmarks="tooleyes", endpoint=server.url, model="m", prompt_format="tl")
    )
    server.http.shutdown()
    assert code == 0, err
    summary = summary_of(tmp_path, "tooleyes")
    assert (summary["n"], summary["VA"], summary["n_calls"]) == (382, 382, 382) and len(server.requests) == 2 * 382
    # execute_pycode documents a parameter named `code:`; the script says `code`, in each of the seven dialogues.
    assert (summary["DE"], summary["CE"]) == (7, 0) and summary["executors"] == {"local": 41, "simulated": 341}
    assert {name: part["n"] for name, part in summary["by_scenario"].items()} == {
        "TG": 58,
        "DU": 49,
        "RS": 56,
        "PL": 70,
        "IR": 54,
        "AM": 45,
        "FT": 50,
    }
    assert "not comparable" not in (tmp_path / "report.md").read_text()


@needs_tooleyes
def test_file_of_tooleyes_own_loop_is_scored(tmp_path):
    records = json.loads((TOOLEYES / "tooleyes/Test_Data/scenario_data_zero_processed.json").read_text())
    records = [records[index] for index in (0, 127, 254)]  # three of 382, evenly spread, as --limit takes them
    path = tmp_path / "official.jsonl"
    answer = {"from": "assistant", "value": 'Thought: done\nAction: finish\nAction Input: {"answer": "it rains"}'}
    path.write_text(
        "".join(
            json.dumps({**record, "conversations": [*record["conversations"], answer]}) + "\n" for record in records
        )
    )
    code, _, err = run_here(flags_of(TOOLEYES, tmp_path / "out", benchmarks="tooleyes", predictions=path, limit=3))
    assert code == 0, err
    summary = summary_of(tmp_path / "out", "tooleyes")
    assert (summary["n"], summary["n_calls"], summary["VA"]) == (3, 0, 3)
    assert "0.00 " in (tmp_path / "out/report.md").read_text()  # no call at all: no share that could be warned of


@needs_tooleyes
@pytest.mark.very_slow
def test_all_of_tooleyes_with_the_bundled_model(tmp_path):
    """It cannot read these documents; what shows is that every dialogue comes to an end. 45 s of processor time."""
    code, _, err = run_here(flags(TOOLEYES, tmp_path, benchmarks="tooleyes", batch_size=16, max_turns=9))
    assert code == 0, err
    dialogues, _ = read_dialogues(tmp_path / "predictions/tooleyes.jsonl")
    assert [dialogue.index for dialogue in dialogues] == list(range(382))
    assert sum(bool(dialogue.turns) for dialogue in dialogues) > 150  # the others' documents exceed its 1,024 positions
    assert summary_of(tmp_path, "tooleyes")["n"] == 382
