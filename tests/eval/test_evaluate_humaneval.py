"""HumanEval: completions judged in the sandbox, where they are cut, both prediction forms, the real set's solutions."""

import gzip
import json
import random
from pathlib import Path

import pytest

from data import json_records
from eval import evaluate_humaneval as evaluator
from eval.benchmarks import BENCHMARKS
from eval.evaluate_humaneval import STOP_TEXTS, check_completion, load_humaneval, main
from eval.predict.cut_output import cut_at
from eval.sandbox.run import SandboxError

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "../shared/data/benchmarks/humaneval/HumanEval.jsonl.gz"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="the benchmark files are not beside this checkout")

PROMPT = 'def double(x: list) -> list:\n    """Every item twice.\n    """\n'
TEST = (
    "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == [1, 1, 2, 2]\n"
    "    assert candidate([]) == [], 'empty'\n"
)
RIGHT = "    return [item for item in x for _ in range(2)]\n"
LIMITS = {"seconds": 10.0, "memory_bytes": 512 << 20}


def problem(number):
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": PROMPT,
        "entry_point": "double",
        "canonical_solution": RIGHT,
        "test": TEST,
    }


OUTPUTS = [  # output, passed, start of the reason
    (RIGHT + "\n\ndef other(:\n", 1, ""),
    ("    return x * 2\n", 0, "wrong result:"),
    ("    import os\n    os._exit(0)\n", 0, "process ended:"),
    ("    return 1 / 0\n", 0, "exception: ZeroDivisionError"),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    return (
        write(tmp_path / "HumanEval.jsonl", [problem(i) for i in range(len(OUTPUTS))]),
        write(tmp_path / "p.jsonl", [{"index": i, "output": row[0]} for i, row in enumerate(OUTPUTS)]),
    )


def evaluate(capsys, answers, predictions, *flags):
    code = main(["--answers", str(answers), "--predictions", str(predictions), "--execute_code", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_known_score(files, tmp_path, capsys):
    code, out, err = evaluate(capsys, *files, "--output", str(tmp_path / "scored"), "--workers", "2", "--seconds", "10")
    assert code == 0 and f"{files[0]}: found 4 records, the published set has 164\n" in err
    summary = json.loads(out.splitlines()[-1])
    assert (summary["n"], summary["pass_at_1"], summary["pass_at_1_percent"]) == (4, 1, 25.0)
    assert summary["errors"] == {"exception": 1, "process ended": 1, "wrong result": 1}
    assert {"wall_clock", "memory", "network", "files"} <= summary["sandbox"].keys()
    rows = [json.loads(line) for line in (tmp_path / "scored/results/humaneval.jsonl").read_text().splitlines()]
    for index, (row, (_, passed, start)) in enumerate(zip(rows, OUTPUTS, strict=True)):
        assert (row["index"], row["task_id"], row["passed"]) == (index, f"HumanEval/{index}", passed)
        assert row["reason"].startswith(start) and bool(row["reason"]) == (not passed)


def test_nothing_runs_without_the_flag(files, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "run_check", lambda *a, **k: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as caught:
        main(["--answers", str(files[0]), "--predictions", str(files[1])])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.err.startswith(
        "python -m eval.evaluate_humaneval: --execute_code: found no such flag"
    )
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_samples_of_the_benchmarks_own_form_are_not_cut(files, tmp_path, capsys):
    body = "    return both(x)\n\ndef both(x):\n    return sorted(x + x)\n"
    rows = [{"task_id": "HumanEval/2", "completion": body}, {"task_id": "HumanEval/0", "completion": body}]
    _, out, _ = evaluate(capsys, files[0], write(tmp_path / "samples.jsonl", rows), "--limit", "2", "--seconds", "10")
    assert json.loads(out)["pass_at_1"] == 2
    rows = [{"index": 0, "output": body}]  # in our form the second function is cut away
    _, out, _ = evaluate(capsys, files[0], write(tmp_path / "p.jsonl", rows), "--limit", "1", "--seconds", "10")
    assert json.loads(out)["errors"] == {"exception": 1}


@pytest.mark.parametrize(
    ("output", "kept"),
    [
        ("    return 1\n\ndef g():\n", "    return 1\n"),
        ("    return 1\nclass A:", "    return 1"),
        ("", ""),
        ("    x = 1\n# end\n", "    x = 1"),
        ("    if x:\n        print(1)\n", "    if x:\n        print(1)\n"),
        ("    return 1\nif x", "    return 1"),
        ("    return 1\nprint(1)", "    return 1"),
        ("def f():", "def f():"),
        ("    a\n\ndef g\nclass", "    a\n"),
        ("    # note\n    return 1", "    # note\n    return 1"),
    ],
)
def test_completion_is_cut_at_the_left_margin(output, kept):
    assert cut_at(output, STOP_TEXTS) == (kept, output != kept)


def test_completion_cannot_reach_the_test(tmp_path):
    """Function and test are in different processes: replacing `check` or the helpers of the prompt is no use."""
    row = problem(0) | {
        "prompt": "def helper(x):\n    return [1, 1, 2, 2]\n\n\n" + PROMPT,
        "test": "def check(candidate):\n    assert candidate([1]) == helper(0)\n",
    }
    (one,) = load_humaneval(write(tmp_path / "one.jsonl", [row]))
    honest = check_completion(one, "    return helper(x)\n", **LIMITS)
    cheat = check_completion(one, "    return 7\n\ndef helper(x): return 7\n\ndef check(c): pass\n", **LIMITS)
    assert honest.passed and not cheat.passed and cheat.reason == "wrong result: AssertionError"


def test_prompt_that_did_not_fit_is_wrong(files, tmp_path, capsys):
    rows = [{"index": 0, "output": RIGHT, "stop": "prompt_too_long"}]
    _, out, _ = evaluate(capsys, files[0], write(tmp_path / "p.jsonl", rows), "--limit", "1")
    assert json.loads(out)["errors"] == {"no output": 1}


def test_bad_input_is_one_line_and_code_2(files, tmp_path, capsys):
    for rows, found in (
        ([{"index": 4, "output": ""}], ":1: found index 4"),
        ([], "found 0 of 4"),
        ([{"task_id": "HumanEval/9", "completion": ""}], ":1: found task_id 'HumanEval/9'"),
        ([{"task_id": "HumanEval/1"}], ":1: found nothing as 'completion', expected str"),
        ([{"task_id": "HumanEval/1", "completion": ""}] * 2, ":2: found index 1 again"),
    ):
        code, out, err = evaluate(capsys, files[0], write(tmp_path / "p.jsonl", rows))
        assert (code, out, err.count("\n")) == (2, "", 1) and found in err, err
    for rows, found in (
        ([problem(0) | {"entry_point": "f()"}], ":1: found entry_point 'f()'"),
        ([], "found no record"),
        ([problem(0) | {"test": None}], ":1: found NoneType as 'test', expected str"),
    ):
        code, out, err = evaluate(capsys, write(tmp_path / "a.jsonl", rows), files[1])
        assert (code, out, err.count("\n")) == (2, "", 1) and found in err, err
    for flags in (["--limit", "0"], ["--seconds", "nan"], ["--workers", "-1"], ["--memory_mib", "x"]):
        with pytest.raises(SystemExit) as caught:
            evaluate(capsys, *files, *flags)
        assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_gzip_files(tmp_path, monkeypatch):
    path = tmp_path / "HumanEval.jsonl.gz"
    lines = "".join(json.dumps(problem(i)) + "\n" for i in range(3)).encode()
    path.write_bytes(gzip.compress(lines))
    assert [one.index for one in load_humaneval(path)] == [0, 1, 2]
    monkeypatch.setattr(json_records, "MAX_UNPACKED_BYTES", 10_000)
    for raw, found in (
        (lines, "Not a gzipped file"),
        (gzip.compress(lines)[:-9], "found"),
        (gzip.compress(b"{"), ":1: "),
        (gzip.compress(b"[]"), "found a list"),
        (gzip.compress(bytes(10_001)), "found more than 10000 bytes"),
    ):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=found):
            load_humaneval(path)


def test_sandbox_that_does_not_start_is_one_line_and_code_2(files, monkeypatch, capsys):
    def refuse(*arguments, **flags):
        raise SandboxError("the sandbox did not start: no reason")

    monkeypatch.setattr(evaluator, "run_check", refuse)
    code, out, err = evaluate(capsys, *files)
    assert (code, out) == (2, "") and err.endswith("the sandbox did not start: no reason\n")


# ---------------------------------------------------------------------------------------------------------------------
# The published set


@needs_real
def test_published_solutions_pass_seven_of_them():
    problems = load_humaneval(REAL)
    assert len(problems) == BENCHMARKS["humaneval"].published == 164
    tricky = [32, 38, 50, 53, 72, 151]  # tests that call helpers of the prompt, compare with `is`, make random cases
    for index in tricky + random.Random(1).sample(range(164), 1):
        result = check_completion(problems[index], problems[index].meta["canonical_solution"], **LIMITS)
        assert result.passed, (index, result.reason)
    assert not check_completion(problems[32], "    return 0.0\n", **LIMITS).passed


@needs_real
@pytest.mark.very_slow
def test_published_solutions_pass_all_164_and_empty_bodies_none(tmp_path, capsys):
    problems = load_humaneval(REAL)
    for solution, passed in ((None, 164), ("    pass\n", 0)):
        rows = [{"index": one.index, "output": solution or one.meta["canonical_solution"]} for one in problems]
        code, out, err = evaluate(capsys, REAL, write(tmp_path / "p.jsonl", rows), "--seconds", "10")
        assert (code, err) == (0, "") and json.loads(out)["pass_at_1"] == passed
