"""The standalone evaluator on files: known score, completeness, file:line errors, no model imports."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from eval.evaluate_tiny import main
from eval.rates import summarize_results
from eval.reports.report import compare_rates

ROOT = Path(__file__).resolve().parents[2]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def record(index, calls=(("get_weather", {"city": "Oslo", "days": 3}),)):
    return {
        "id": f"tiny/{index}",
        "tools": [TOOL],
        "messages": [{"role": "user", "content": "Weather in Oslo?"}],
        "gold": [{"calls": [{"name": name, "arguments": arguments} for name, arguments in calls], "order_free": False}],
        "meta": {},
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluate(capsys, answers, predictions, *flags):
    code = main(["--answers", str(answers), "--predictions", str(predictions), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# One output per way of being right or wrong, with the expected TS, PI, CF and start of the reason.
OUTPUTS = [
    ('get_weather(city="Oslo", days=3)', 1, 1, 1, ""),
    (" get_weather(days=3, city='Oslo')\n", 1, 1, 1, ""),
    ('get_weather(city="Bergen", days=3)', 1, 1, 0, "wrong value:"),
    ('get_weather(city="Oslo", days="3")', 1, 1, 0, "wrong value:"),
    ('get_weather(city="Oslo")', 1, 0, 0, "wrong parameters:"),
    ('finish(answer="Oslo")', 0, 0, 0, "wrong tool:"),
    ('get_weather(city="Oslo", days=3', 0, 0, 0, "unparsable:"),
    ('get_weather(city="Oslo", days=3) get_weather(city="Oslo", days=3)', 0, 0, 0, "unparsable:"),
    ("", 0, 0, 0, "unparsable:"),
    ("I cannot do that.", 0, 0, 0, "unparsable:"),
]


@pytest.fixture
def files(tmp_path):
    answers = write(tmp_path / "test_seen.jsonl", [record(index) for index in range(len(OUTPUTS))])
    predictions = write(
        tmp_path / "predictions.jsonl", [{"index": index, "output": row[0]} for index, row in enumerate(OUTPUTS)]
    )
    return answers, predictions


def test_known_score(files, tmp_path, capsys):
    code, out, err = evaluate(capsys, *files, "--output", str(tmp_path / "scored"))
    assert (code, err) == (0, "")
    summary = json.loads(out.splitlines()[-1])
    assert {key: summary[key] for key in ("n", "TS", "PI", "CF")} == {"n": 10, "TS": 5, "PI": 4, "CF": 2}
    assert (summary["TS_percent"], summary["PI_percent"], summary["CF_percent"]) == (50.0, 40.0, 20.0)
    # Wilson, 5 of 10: center 1/2, half width z / sqrt(10 + z^2) / 2 = 1.96 / sqrt(13.8415) / 2 = 0.26341
    assert summary["TS_interval_95"] == [23.66, 76.34]
    assert summary["errors"] == {"unparsable": 4, "wrong parameters": 1, "wrong tool": 1, "wrong value": 2}
    rows = [json.loads(line) for line in (tmp_path / "scored/results/tiny-seen.jsonl").read_text().splitlines()]
    for index, (row, (_, ts, pi, cf, start)) in enumerate(zip(rows, OUTPUTS, strict=True)):
        assert list(row) == ["index", "id", "TS", "PI", "CF", "reason"]
        assert (row["index"], row["id"], row["TS"], row["PI"], row["CF"]) == (index, f"tiny/{index}", ts, pi, cf)
        assert row["reason"].startswith(start) and bool(row["reason"]) == (not cf)


def test_order_of_lines_is_free_and_blank_lines_are_skipped(files, tmp_path, capsys):
    lines = Path(files[1]).read_text().splitlines()
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n\n".join(random.Random(1).sample(lines, len(lines))))
    assert evaluate(capsys, files[0], shuffled) == evaluate(capsys, *files)


def test_plain_format_is_read_where_a_line_says_so(files, tmp_path, capsys):
    rows = [
        {"index": index, "output": ' get_weather(city: "Oslo", days: 3).\nUser: thanks', "format": "plain"}
        for index in range(len(OUTPUTS))
    ]
    _, out, _ = evaluate(capsys, files[0], write(tmp_path / "plain.jsonl", rows))
    assert json.loads(out)["CF"] == 10
    rows[0].pop("format")  # in the tl form the same text is no call
    _, out, _ = evaluate(capsys, files[0], write(tmp_path / "plain.jsonl", rows))
    assert json.loads(out)["CF"] == 9


def test_reason_names_a_cut_or_missing_output(tmp_path, capsys):
    answers = write(tmp_path / "answers.jsonl", [record(0), record(1)])
    predictions = write(
        tmp_path / "p.jsonl",
        [
            {"index": 0, "output": "get_weather(", "stop": "max_new_tokens"},
            {"index": 1, "output": "", "stop": "prompt_too_long"},
        ],
    )
    code, _, _ = evaluate(capsys, answers, predictions, "--output", str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results/answers.jsonl").read_text().splitlines()]
    assert code == 0 and "cut at max_new_tokens" in rows[0]["reason"] and rows[1]["reason"].startswith("no output:")


# ---------------------------------------------------------------------------------------------------------------------
# Incomplete, malformed


def change(files, tmp_path, line, text):
    lines = Path(files[1]).read_text().splitlines()
    lines[line - 1] = text
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(text + "\n" for text in lines))
    return changed


@pytest.mark.parametrize(
    "line, text, expected",
    [
        (3, '{"index": 1, "output": ""}', ":3: found index 1 again"),
        (3, '{"index": 10, "output": ""}', ":3: found index 10, expected 0 to 9"),
        (3, '{"index": -1, "output": ""}', ":3: found index -1"),
        (3, '{"index": true, "output": ""}', ":3: found index True, expected the record"),
        (3, '{"index": 2.0, "output": ""}', ":3: found index 2.0"),
        (3, '{"index": ' + "9" * 5000 + ', "output": ""}', ":3: found an integer of too many digits"),
        (3, '{"output": ""}', ":3: found index None"),
        (3, '{"index": 2}', ":3: found NoneType as 'output'"),
        (3, '{"index": 2, "output": ["f()"]}', ":3: found list as 'output'"),
        (3, '{"index": 2, "output": "", "format": "xml"}', ":3: found format 'xml'"),
        (3, '{"index": 2, "output": "", "format": ["tl"]}', ":3: found format"),
        (3, '{"index": 2, "output": "", "stop": 1}', ":3: found stop 1"),
        (3, '{"index": 2, "outp', "at column 14, expected JSON"),
        (3, "[2]", ":3: found a list"),
        (3, "[" * 100_000, ":3: found lists or objects nested too deeply"),
        (3, "", "found 9 of 10 predictions, expected all (first missing index 2)"),
    ],
)
def test_wrong_predictions_end_with_one_line_and_code_2(files, tmp_path, capsys, line, text, expected):
    code, out, err = evaluate(capsys, files[0], change(files, tmp_path, line, text))
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith(str(tmp_path / "changed.jsonl")) and expected in err


def test_partial_last_line_is_dropped_with_a_notice(files, tmp_path, capsys):
    partial = tmp_path / "partial.jsonl"
    partial.write_bytes(Path(files[1]).read_bytes() + b'{"index": 3, "outp\xc3')
    code, out, err = evaluate(capsys, files[0], partial)
    assert code == 0 and err == f"{partial}: dropped a partial last line\n" and json.loads(out)["n"] == 10
    partial.write_bytes(Path(files[1]).read_bytes()[:-20])  # the last record itself is torn: incomplete
    code, out, err = evaluate(capsys, files[0], partial)
    assert code == 2 and "found 9 of 10 predictions" in err


def test_limit_scores_evenly_spread_records_only(files, tmp_path, capsys):
    short = tmp_path / "short.jsonl"
    lines = Path(files[1]).read_text().splitlines(keepends=True)
    short.write_text("".join(lines[index] for index in (0, 3, 5, 6)))  # 3 of 10 are 0, 3 and 6; 5 is left aside
    code, out, _ = evaluate(capsys, files[0], short, "--limit", "3")
    assert code == 0 and json.loads(out)["n"] == 3 and json.loads(out)["CF"] == 1
    assert evaluate(capsys, files[0], short, "--limit", "5")[0] == 2
    assert json.loads(evaluate(capsys, *files, "--limit", "500")[1])["n"] == 10


def damaged(**changes):
    return {**record(1), **changes}


@pytest.mark.parametrize(
    "second_line, expected",
    [
        ("{", "found the end at column 2, expected JSON"),
        ('"text"', "found a string"),
        ('{"id": NaN}', "found NaN, expected JSON"),
        (damaged(id=None), "found NoneType as 'id'"),
        (damaged(tools={}), "found dict as 'tools'"),
        (damaged(tools=[{"type": "function", "function": {}}]), "tools"),
        (damaged(tools=["f"]), "tools"),
        (damaged(messages=[]), "found no message"),
        (damaged(messages=["hi"]), "found str"),
        (damaged(messages=[{"role": "robot", "content": "hi"}]), "role 'robot'"),
        (damaged(messages=[{"role": "user"}]), "found nothing as 'content'"),
        (damaged(gold=[]), "found no gold answer"),
        (damaged(gold=[{"calls": [], "order_free": False}]), "without calls"),
        (damaged(gold=[{"calls": [{"name": "get_weather", "arguments": {}}]}]), "found nothing as 'order_free'"),
        (
            damaged(gold=[{"calls": [{"name": "other", "arguments": {}}], "order_free": False}]),
            "found gold tool 'other'",
        ),
        (damaged(gold=[{"calls": [{"name": "get_weather", "arguments": []}], "order_free": False}]), "found list as"),
        (
            damaged(
                gold=[
                    {
                        "calls": [{"name": "get_weather", "arguments": {"city": "O"}, "wildcards": ["town"]}],
                        "order_free": False,
                    }
                ]
            ),
            "found wildcards",
        ),
        (
            damaged(
                gold=[
                    {
                        "calls": [{"name": "get_weather", "arguments": {"city": "O"}, "wildcards": [["city"]]}],
                        "order_free": False,
                    }
                ]
            ),
            "found wildcards",
        ),
    ],
)
def test_wrong_answers_file(tmp_path, capsys, second_line, expected):
    answers = tmp_path / "answers.jsonl"
    line = second_line if isinstance(second_line, str) else json.dumps(second_line)
    answers.write_text(json.dumps(record(0)) + "\n" + line + "\n")
    code, out, err = evaluate(capsys, answers, write(tmp_path / "p.jsonl", [{"index": 0, "output": ""}]))
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"{answers}:2") and expected in err


def test_missing_and_empty_files_and_wrong_flags(files, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "No such file" in evaluate(capsys, tmp_path / "none.jsonl", files[1])[2]
    assert "No such file" in evaluate(capsys, files[0], tmp_path / "none.jsonl")[2]
    assert "found no record" in evaluate(capsys, tmp_path / "empty.jsonl", files[1])[2]
    assert "found 0 of 10" in evaluate(capsys, files[0], tmp_path / "empty.jsonl")[2]
    assert "no regular file" in evaluate(capsys, files[0], tmp_path)[2]
    for flags in (["--limit", "0"], ["--nonsense"], ["--limit", "x"]):
        with pytest.raises(SystemExit) as caught:
            evaluate(capsys, *files, *flags)
        assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Hostile outputs


def test_hostile_outputs_are_wrong_not_a_crash(tmp_path, capsys):
    hostile = [
        "(" * 100_000,
        "f(" * 50_000,
        "x" * 1_000_000,
        "\x00\x1b[31m",
        "__import__('os').abort()",
        "f(x=" + "[" * 9999,
        "get_weather(city=" + "9" * 10_000 + ")",
        "\ud800(a=1)",
        "get_weather(**{1: 2})",
        "get_weather(*[1])",
        "get_weather(city=open('/etc/passwd').read())",
        "{}",
        "[]",
        "null",
        "-1",
        "get_weather(city=1e999)",
    ]
    answers = write(tmp_path / "answers.jsonl", [record(index) for index in range(len(hostile))])
    predictions = write(tmp_path / "p.jsonl", [{"index": i, "output": text} for i, text in enumerate(hostile)])
    code, out, err = evaluate(capsys, answers, predictions, "--output", str(tmp_path))
    assert (code, err) == (0, "") and json.loads(out)["CF"] == 0
    for line in (tmp_path / "results/answers.jsonl").read_text().splitlines():
        assert len(line) < 1000 and json.loads(line)["reason"]


def test_runs_as_a_module(files):
    command = [sys.executable, "-m", "eval.evaluate_tiny", "--answers", files[0], "--predictions"]
    result = subprocess.run([*command, files[1]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and json.loads(result.stdout.splitlines()[-1])["TS"] == 5
    result = subprocess.run([*command, "none"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "none: found No such file or directory, expected a readable file\n"


# ---------------------------------------------------------------------------------------------------------------------
# Summaries


def rows_of(correct, n):
    return [
        {"TS": 1, "PI": 1, "CF": int(i < correct), "reason": "" if i < correct else "wrong value: x"} for i in range(n)
    ]


def test_comparison_calls_a_difference_only_when_intervals_are_disjoint():
    base, sft, near = (summarize_results(rows_of(correct, 300)) for correct in (120, 200, 130))
    assert compare_rates(base, sft, "CF") == "higher, intervals disjoint"
    assert compare_rates(sft, base, "CF") == "lower, intervals disjoint"
    assert compare_rates(base, near, "CF") == "intervals overlap"
    assert compare_rates(base, sft, "TS") == "intervals overlap"
