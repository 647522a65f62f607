"""Every program, run on data, names, outputs and answers that are hostile: what it shows is printable.

Each test calls main() in this process and judges every character of stdout and stderr, and the Markdown, HTML and SVG
files that were written, by the oracle of tests/support/hostile_text.py.
"""

import contextlib
import importlib
import io
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from printable import (
    html_text,
    json_line,
    log_text,
    markdown_text,
    message_line,
    one_line,
    shown,
    terminal_lines,
    terminal_text,
)
from tests.support.endpoint_server import Server
from tests.support.hostile_text import (
    FOLDER_NAME,
    HOSTILE,
    LONG,
    TOOL_NAME,
    faults_of_markdown,
    faults_of_markup,
    faults_of_text,
    written,
)
from tests.support.tiny_ppo import ppo_arguments
from tests.support.tiny_run import ROOT, arguments, copy_of_model, make_records

WALKED = {  # module -> the test that runs it
    "run_sft": "training",
    "run_ppo": "ppo",
    "run_eval": "evaluation",
    "data.error_filter": "small programs",
    "data.import_bfcl": "small programs",
    "data.inspect_loss_weights": "inspect",
    "eval.ablation": "small programs",
    "eval.collect_trajectories": "collect",
    "eval.evaluate_bfcl": "evaluators",
    "eval.evaluate_gsm8k": "evaluators",
    "eval.evaluate_humaneval": "evaluators",
    "eval.evaluate_mmlu": "evaluators",
    "eval.evaluate_own": "evaluators",
    "eval.evaluate_rotbench": "evaluators",
    "eval.evaluate_tiny": "evaluators",
    "eval.evaluate_tiny_multi": "evaluators",
    "eval.evaluate_toolalpaca": "evaluators",
    "eval.evaluate_tooleyes": "evaluators",
    "eval.fetch_benchmarks": "small programs",
    "eval.robustness": "small programs",
    "eval.run_page": "training",
    "eval.sensitivity": "small programs",
    "eval.reports.compare": "reports",
    "eval.reports.error_statistics": "reports",
    "eval.reports.plots": "reports",
    "model.import_gguf": "small programs",
    "rl.check_rewards": "small programs",
    "rl.evaluate_reward": "ppo",
    "toolbox.make": "small programs",
    "train.audit_loss": "training",
    "train.export_metrics": "training",
}
EXCUSED = {
    "eval.sandbox.child": "talks to its parent over a pipe, never to a person",
    "eval.sandbox.tool_server": "talks to its parent over a pipe, never to a person",
    "toolbox.pretrain": "reads nothing from outside",
}


def run(module: str, flags: list, codes: tuple[int, ...] = (0,)) -> tuple[str, str]:
    """main() of a module: (stdout, stderr), both checked."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        try:
            code = importlib.import_module(module).main([str(flag) for flag in flags])
        except SystemExit as stop:
            code = stop.code
    texts = out.getvalue(), err.getvalue()
    assert code in codes, (module, code, *texts)
    assert "Traceback" not in texts[1]
    for text in texts:
        assert faults_of_text(text) == [], module
        assert max(map(len, text.split("\n"))) < 20_000, module  # long texts are cut
    return texts


def hostile_tool(name: str) -> dict:
    properties = {"city": {"type": "string", "description": HOSTILE}, "x\u202ey|<b>$a$": {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": LONG, "parameters": parameters}}


def hostile_record(number: int) -> dict:
    """A prompt in the held-out form of tiny and PPO."""
    gold = [{"name": TOOL_NAME, "arguments": {"city": HOSTILE[:60]}}]
    return {
        "id": f"{number}{HOSTILE}",
        "tools": [hostile_tool(TOOL_NAME), hostile_tool("other")],
        "messages": [{"role": "user", "content": f"{number} {HOSTILE}"}],
        "gold": [{"calls": gold, "order_free": False}],
        "meta": {HOSTILE: HOSTILE},
    }


def hostile_trajectories() -> list[dict]:
    """make_records with hostile ids, tool names, words, arguments and feedback; one is too long to be trained."""
    text = json.dumps(make_records(6)).replace("get_weather", json.dumps(TOOL_NAME)[1:-1].replace("\\", "\\\\"))
    records = json.loads(text)
    for number, record in enumerate(records):
        record["id"] = f"{number}{HOSTILE}"
        for turn in record["conversations"]:
            if turn["role"] in ("user", "function"):
                turn["content"] += HOSTILE
    records[5]["conversations"][1]["content"] += LONG
    return records


def lines_of(records: list) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Model, data, prompts, benchmark and predictions in folders and files with hostile names."""
    folder = tmp_path_factory.mktemp("text") / FOLDER_NAME
    folder.mkdir()
    copy_of_model(folder / "model$x$")
    (folder / "train\u202e.json").write_text(json.dumps(hostile_trajectories()), encoding="utf-8")
    (folder / "prompts.jsonl").write_text(lines_of([hostile_record(number) for number in range(4)]), encoding="utf-8")
    (folder / "test_seen.jsonl").write_text(lines_of([hostile_record(number) for number in range(2)]), encoding="utf-8")
    outputs = [HOSTILE, f'{TOOL_NAME}(city="{HOSTILE[:20]!a}", b=1)']
    rows = [{"index": index, "output": output} for index, output in enumerate(outputs)]
    (folder / "predictions\u2066.jsonl").write_text(lines_of(rows), encoding="utf-8")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The functions


def test_every_function_makes_hostile_text_printable():
    for text in (HOSTILE, LONG, "\ud800", "\ufe0f\u034f"):
        for make in (shown, one_line, terminal_text, terminal_lines, log_text, message_line, json_line):
            assert faults_of_text(make(text)) == []
        assert faults_of_markdown(markdown_text(text)) == []
        assert faults_of_markup(f'<p title="{html_text(text)}">{html_text(text)}</p>', '<p title="">x</p>') == []


def test_what_they_keep_cut_and_escape():
    assert terminal_text("a\nb\\ \u00e9\u4e2d") == "a\\nb\\ \u00e9\u4e2d" and terminal_lines("a\n\tb") == "a\n\\tb"
    assert terminal_text(terminal_text(HOSTILE)) == terminal_text(HOSTILE)  # twice is once
    assert one_line("a\\\n") == "a\\\\\\n" and shown("a'\u202e") == '"a\'\\u202e"'
    assert shown("x" * 100) == "'" + "x" * 59 + "... (102 characters)"
    assert shown(10**5000) == "a whole number of about 5001 digits"
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a list that is too large to be shown"
    assert json_line("\x7f\u202e") == '"\\u007f\\u202e"' and json.loads(json_line(HOSTILE)) == HOSTILE
    assert markdown_text("get_it _x_ a|b") == "get_it \\_x\\_ a\\|b"
    assert markdown_text("http://a.b www.c.d") == "http\\://a.b www\\.c.d"
    assert markdown_text("y" * 300).endswith("y... (300 characters)")
    assert html_text("<a href='\u202e'>\n") == "&lt;a href=&#x27;\\u202e&#x27;&gt;\n"
    assert log_text("a\n" + "b" * 5000) == "a\n" + "b" * 4000 + "... (5000 characters)"
    assert message_line("a\n" + "b" * 5000).startswith("a bbb") and len(message_line("b" * 5000)) <= 2000


def test_the_oracle_is_not_blind():
    for character in "\x1b\x9b\u202e\u200b\u2028\x7f\x00\ue000\ud800\u3164":
        assert faults_of_text(f"a{character}")
    assert faults_of_text("ok\n") == [] and faults_of_text("x\rEVIL")
    for text in ("<b>", "![i](x)", "`c`", "| a | b |\n| c | d | e |", "_u_"):
        assert faults_of_markdown(text)
    assert faults_of_markdown("| a \\| b |\n| \\<b\\> |") == []
    assert faults_of_markup("<p><b>x</b></p>", "<p>x</p>") and faults_of_markup("<p id=a>", "<p>")
    assert faults_of_markup("<p>&#x202e;</p>", "<p></p>") and not faults_of_markup("<p>&lt;b&gt;</p>", "<p></p>")


def test_every_program_is_walked_or_excused():
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for pattern in (
            "run_*.py",
            *(f"{package}/**/*.py" for package in ("data", "eval", "model", "rl", "toolbox", "train")),
        )
        for path in ROOT.glob(pattern)
        if "\ndef main(" in path.read_text(encoding="utf-8")
    }
    assert found == {*WALKED, *EXCUSED}


# ---------------------------------------------------------------------------------------------------------------------
# The programs


def test_training(folder):
    output = folder / "sft"
    flags = {"model": folder / "model$x$", "data": folder / "train\u202e.json", "max_tokens": 4000, "plot": "on"}
    out, _ = run("run_sft", arguments(output, **flags, max_steps=2, checkpoint_every=1))
    assert "\\u202e" in out and "dropped 1 of 6" in out
    out, _ = run("train.audit_loss", ["--run", output, "--step", 2])
    assert "trained tokens of step 2" in out
    run("eval.run_page", [output, "--html", folder / "run\u202e.html"])
    assert faults_of_text((folder / "run\u202e.html").read_text(encoding="utf-8")) == []
    run("train.export_metrics", [output, "--csv", folder / "m\u202e.csv"])
    damaged = folder / "damaged\u202e"
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_text(lines_of([{"step": HOSTILE, HOSTILE: LONG}]) + HOSTILE, encoding="utf-8")
    run("train.export_metrics", [damaged, "--csv", folder / "m\u202e.csv"], (0, 2))
    _, err = run("run_sft", arguments(output, **flags, max_steps=2, seed=1), (2,))
    assert err.count("\n") == 1
    (output / "run_identity.json").write_text(json.dumps({HOSTILE: HOSTILE, "seed": LONG}), encoding="utf-8")
    _, err = run("run_sft", arguments(output, **flags, max_steps=2, checkpoint_every=1), (2,))
    assert "another run" in err


@pytest.mark.parametrize(
    "content",
    [
        HOSTILE,
        json.dumps([{HOSTILE: 1}]),
        json.dumps([{"id": LONG, "conversations": [{"role": HOSTILE, "content": HOSTILE}]}]),
        json.dumps([{"id": "a", "conversations": [{"role": "system", "content": LONG}]}]),
        '{"\u202e\u2028": 1, "\u202e\u2028": 2}',
    ],
)
def test_training_on_damaged_data(folder, tmp_path, content):
    data = tmp_path / "d\u202e.json"
    data.write_text(content, encoding="utf-8")
    _, err = run("run_sft", arguments(folder / "none", model=folder / "model$x$", data=data), (2,))
    assert err.count("\n") == 1
    (tmp_path / "c\u202e.json").write_text(content, encoding="utf-8")
    _, err = run("run_ppo", ["--config", tmp_path / "c\u202e.json"], (2,))
    assert err.count("\n") == 1


def test_ppo(folder):
    flags = {
        "model": folder / "model$x$",
        "data": folder / "prompts.jsonl",
        "max_prompt_tokens": 1900,
        "plot": "on",
        "print_ledger": "on",
        "max_steps": 1,
    }
    prompts = [hostile_record(number) for number in range(4)]
    for record in prompts:  # short enough for the tiny model, and a gold call that its tokenizer can write
        record["tools"][1]["function"]["name"] = "a|`c`<b>$a^$"
        record["gold"][0]["calls"] = [{"name": "a|`c`<b>$a^$", "arguments": {"city": "<i>|"}}]
        for tool in record["tools"]:
            tool["function"]["description"] = HOSTILE[:100]
            tool["function"]["parameters"]["properties"]["city"]["description"] = HOSTILE[:40]
    (folder / "prompts.jsonl").write_text(lines_of(prompts), encoding="utf-8")
    out, _ = run("run_ppo", ppo_arguments(folder / "ppo", **flags, max_response_tokens=60))
    assert "position" in out  # the ledger
    assert written(folder / "ppo", ".svg")
    for path in written(folder, ".svg"):
        assert faults_of_text(path.read_text(encoding="utf-8")) == [], path
    reward = ["--model", folder / "model$x$", "--data", folder / "prompts.jsonl", "--max_response_tokens", 8]
    out, _ = run("rl.evaluate_reward", [*reward, "--output", folder / "rewards.jsonl"])
    assert json.loads(out.splitlines()[-1])["models"][0]["n"] == 4


def test_inspect(folder):
    flags = ["--data", folder / "train\u202e.json", "--model", folder / "model$x$", "--full_context", "--index"]
    out, _ = run("data.inspect_loss_weights", [*flags, 0])
    assert "TRAINED" in out
    out, _ = run("data.inspect_loss_weights", [*flags, 0, "--html", folder / "hostile\u202e.html"])
    assert out.startswith("wrote ")
    _, err = run("data.inspect_loss_weights", [*flags[:-1], "--id", FOLDER_NAME], (2,))
    assert err.count("\n") == 1
    harmless = folder / "harmless.json"
    harmless.write_text(json.dumps(make_records(6)), encoding="utf-8")
    run("data.inspect_loss_weights", ["--data", harmless, *flags[2:], 0, "--html", folder / "harmless.html"])
    page, plain = ((folder / f"{name}.html").read_text(encoding="utf-8") for name in ("hostile\u202e", "harmless"))
    assert faults_of_markup(page, plain) == []


def test_evaluation(folder):
    def answer(number, path, body):
        text = [HOSTILE, f'{TOOL_NAME}(city="{LONG}")'][number % 2]
        return 200, {"choices": [{"text": text, "finish_reason": HOSTILE}]}, {}

    common = ["--benchmark_dir", folder, "--benchmarks", "tiny-seen", "--device", "cpu", "--output"]
    model = ["--model", folder / "model$x$", "--max_new_tokens", 4]
    run("run_eval", [*common, folder / "e1\u202e", "--predictions", folder / "predictions\u2066.jsonl"])
    _, err = run("run_eval", [*common, folder / "e2", *model], (0, 2))  # the prompt may not fit
    server = Server(answer)
    try:
        run("run_eval", [*common, folder / "e3|<b>", "--endpoint", server.url, "--model", FOLDER_NAME])
    finally:
        server.http.shutdown()
    refusing = Server(lambda *_: (400, {"error": {"message": HOSTILE, "code": LONG}}, {"X-A": "b"}))
    try:
        _, err = run("run_eval", [*common, folder / "e4", "--endpoint", refusing.url, "--model", "m"], (0, 2))
    finally:
        refusing.http.shutdown()
    reports = written(folder, "report.md")
    assert len(reports) >= 2
    for path in reports:
        assert faults_of_markdown(path.read_text(encoding="utf-8")) == [], path


def test_collect(folder):
    calls = [f'{TOOL_NAME}(city="{HOSTILE[:40]!a}")', HOSTILE, 'finish(answer="x")']
    server = Server(lambda number, *_: (200, {"choices": [{"text": calls[number % 3], "finish_reason": "stop"}]}, {}))
    flags = ["--queries", folder / "test_seen.jsonl", "--endpoint", server.url, "--model", FOLDER_NAME]
    flags += ["--endpoint_concurrency", 1, "--unfinished", "keep", "--unparsable", "keep"]
    try:
        out, err = run("eval.collect_trajectories", [*flags, "--output", folder / "raw\u202e.json"], (0, 2))
    finally:
        server.http.shutdown()
    assert "\\u202e" in out + err


@pytest.mark.parametrize("name", sorted(name for name, test in WALKED.items() if test == "evaluators"))
def test_evaluators(folder, tmp_path, name):
    """Each on answers that are hostile or of another form, and on hostile predictions."""
    answers = tmp_path / "test_seen\u202e.jsonl"
    flags = ["--answers", answers, "--predictions", folder / "predictions\u2066.jsonl"]
    flags += ["--execute_code"] if name.endswith("humaneval") else []
    for content in (HOSTILE, json.dumps({HOSTILE: LONG}), json.dumps([{HOSTILE: LONG}]), lines_of([hostile_record(0)])):
        answers.write_text(content, encoding="utf-8")
        _, err = run(name, flags, (2,))
        assert err.count("\n") == 1


def test_evaluators_that_score(folder, tmp_path):
    answers = folder / "test_seen.jsonl"
    flags = ["--answers", answers, "--predictions", folder / "predictions\u2066.jsonl", "--output", tmp_path / "o"]
    out, _ = run("eval.evaluate_tiny", flags)
    assert json.loads(out)["n"] == 2
    problems = tmp_path / "test.jsonl"
    problems.write_text(lines_of([{"question": HOSTILE, "answer": f"{HOSTILE}\n#### 5"}] * 2), encoding="utf-8")
    out, _ = run("eval.evaluate_gsm8k", ["--answers", problems, *flags[2:4]])
    assert json.loads(out)["n"] == 2


def test_reports(folder, tmp_path):
    summary = {"n": 4, "accuracy": 2, "accuracy_percent": 50.0, "accuracy_interval_95": [15.0, 85.0]}
    hostile = {"answers_sha256": HOSTILE, HOSTILE: 2, f"{HOSTILE}_percent": 51.0, f"{HOSTILE}_interval_95": [1.0, 99.0]}
    runs = []
    for name in ("a", FOLDER_NAME):
        runs.append(tmp_path / name)
        runs[-1].mkdir()
        content = {"model": HOSTILE, "benchmarks": {"mmlu": {**summary, **hostile}, HOSTILE: {**summary, **hostile}}}
        (runs[-1] / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    out, _ = run("eval.reports.compare", [*runs, "--names", f"a|<b>![i](http://e.example),{FOLDER_NAME}"])
    assert faults_of_markdown(out) == []
    run("eval.reports.compare", ["--answers", folder / "test_seen.jsonl", folder / "predictions\u2066.jsonl"])
    out, _ = run("eval.reports.error_statistics", ["--data", folder / "train\u202e.json"])
    flags = ["--answers", folder / "test_seen.jsonl", "--predictions", folder / "predictions\u2066.jsonl"]
    out, _ = run("eval.reports.error_statistics", [*flags, "--tokenizer", folder / "model$x$", "--output", tmp_path])
    assert faults_of_markdown("\n".join(out.splitlines()[:-1])) == []
    run("eval.reports.plots", [*runs[:1], "--names", "plain", "--output", tmp_path / "p0"])
    for number, name in enumerate((FOLDER_NAME, "$\\frac{$", "_hidden", "<!--x-->")):
        run("eval.reports.plots", [*runs[:1], "--names", name, "--output", tmp_path / f"p{number + 1}\u202e"])
        page, plain = (written(tmp_path, "figure5.svg")[index].read_text(encoding="utf-8") for index in (-1, 0))
        assert faults_of_markup(page, plain) == []


def test_small_programs(folder, tmp_path):
    line = {**hostile_record(0), "gold": [{"name": TOOL_NAME, "arguments": {"city": "\x7fx"}}]}
    (tmp_path / "lines\u202e").write_text(
        lines_of([{**line, "output": f'{TOOL_NAME}(b="\x7f\u202e")'}, line, 1]), "utf-8"
    )
    out, _ = run("rl.check_rewards", ["--explain", "--data", tmp_path / "lines\u202e"])
    assert "reward" in out
    for number in (2, 3, 9):
        _, err = run("rl.check_rewards", ["--explain", "--data", tmp_path / "lines\u202e", "--line", number], (2,))
        assert err.count("\n") == 1
    _, err = run("eval.fetch_benchmarks", ["--check", "--benchmark_dir", tmp_path / FOLDER_NAME], (2,))
    assert err.count("\n") == 1
    run("toolbox.make", ["--only_tests", tmp_path / FOLDER_NAME / "x", "--tests", 2], (0, 2))
    ablation = tmp_path / f"{FOLDER_NAME}2"
    ablation.mkdir()
    for content in (HOSTILE, json.dumps({"seeds": LONG, HOSTILE: HOSTILE})):
        (ablation / "settings.json").write_text(content, encoding="utf-8")
        for module in ("eval.ablation", "eval.sensitivity"):
            _, err = run(module, ["--output", ablation], (2,))
            assert err.count("\n") == 1
        (ablation / "cells.jsonl").write_text(content, encoding="utf-8")
        _, err = run("eval.robustness", ["--ablation", ablation, "--output", tmp_path / "new\u202e"], (2,))
        assert err.count("\n") == 1
    wheel = tmp_path / f"{FOLDER_NAME}.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("bfcl_eval-2026.3.23.dist-info/METADATA", f"Name: {HOSTILE}\nVersion: {LONG}\n")
    _, err = run("data.import_bfcl", [wheel, tmp_path / "out\u202e"], (2,))
    assert err.count("\n") == 1
    for words in (HOSTILE, LONG):  # of a GGUF: one value, whose key and text are hostile
        content = words.encode()
        key = struct.pack("<Q", len(content)) + content
        for name, kind in ((key, 8), (struct.pack("<Q", 20) + b"general.architecture", 8), (key, 77)):
            head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + name + struct.pack("<I", kind) + key
            (tmp_path / f"{FOLDER_NAME}.gguf").write_bytes(head)
            _, err = run("model.import_gguf", [tmp_path / f"{FOLDER_NAME}.gguf", tmp_path / "out\u202e"], (2,))
            assert err.count("\n") == 1
    for case in ({"text": HOSTILE, "label": HOSTILE}, {"feedback": HOSTILE, HOSTILE: LONG}):
        (tmp_path / "cases").write_text(lines_of([case]), encoding="utf-8")
        run("data.error_filter", ["--cases", tmp_path / "cases"], (0, 2))


@pytest.mark.parametrize("module", sorted(WALKED))
def test_flags(module):
    """A flag that no program has, with hostile words."""
    _, err = run(module, [f"--\u202e{TOOL_NAME}={HOSTILE}", LONG], (2,))
    assert err.count("\n") == 1


@pytest.mark.slow
def test_bytes_of_a_real_process(folder):
    """What Python and the libraries add on the way out, and another encoding of the terminal."""
    line = [sys.executable, "-m", "data.inspect_loss_weights", "--data", str(folder / "train\u202e.json")]
    done = subprocess.run([*line, "--model", str(folder / "model$x$")], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0 and faults_of_text(done.stdout.decode() + done.stderr.decode()) == []
    done = subprocess.run(
        [sys.executable, "run_sft.py", "--data", FOLDER_NAME], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 2 and faults_of_text(done.stdout.decode() + done.stderr.decode()) == []
