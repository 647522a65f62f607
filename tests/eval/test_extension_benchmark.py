"""A new benchmark is one new file and one line of the table, as CONTRIBUTING.md says; tried on a copy of the tree."""

import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_run import tiny_files

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

ROOT = Path(__file__).resolve().parents[2]
FILE = '''"""Echo: the model repeats a word. File in, file out, no model.

    python -m eval.evaluate_echo --answers echo.jsonl --predictions FILE [--output DIR]
"""

import sys

from data.json_records import field_of
from eval.benchmarks import BENCHMARKS
from eval.evaluator_command_line import evaluator_parser, read_flags, run_evaluator
from eval.predict.prediction_files import read_matched
from eval.rates import summarize_results
from eval.records import Record, Scores, read_lines

STOP_TEXTS = ("\\n",)


def load_echo(path):
    """Read lines `{"word"}`. Raises DataError with `file:line`."""
    words = [field_of(row, "word", str, f"{path}:{line}") for line, row in read_lines(path)]
    return [Record(i, id=word, text=f"{word} {word} {word}", answer=word) for i, word in enumerate(words)]


def score_echo(records, predictions, settings):
    """Rows, summary and notices for a prediction file. Raises DataError, `file:line`."""
    matched, notices = read_matched(predictions, len(records), settings.limit)
    rows = []
    for record, prediction in zip(records, matched):
        is_right = prediction.output.strip() == record.answer
        rows.append({"index": record.index, "echo": int(is_right), "reason": "" if is_right else "wrong word: other"})
    return Scores(rows, summarize_results(rows, ("echo",)), notices)


def main(arguments):
    parser = evaluator_parser("evaluate_echo", "Score echoes.", answers="JSONL of words", predictions="JSONL of texts")
    return run_evaluator(read_flags(parser, arguments), BENCHMARKS["echo"], load_echo, score_echo)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''
LINE = '    Benchmark("echo", "echo.jsonl", "text", "echo"),\n'
WORDS = ["alpha", "beta", "gamma"]


def sources_of(tree):
    """{path: text} of all Python files and JSON files of the product."""
    folders = [tree / name for name in ("data", "eval", "model", "toolbox", "train")]
    files = [*tree.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.*"))]
    return {path.relative_to(tree).as_posix(): path.read_text() for path in files if path.suffix in (".py", ".json")}


def copy_of_tree(copy):
    for name in ("data", "eval", "model", "toolbox", "train"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy / path.name)
    return copy


def run(tree, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tree,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_new_benchmark_is_one_file_and_one_line_of_the_table(tmp_path):
    tree, data, output = copy_of_tree(tmp_path / "tree"), tmp_path / "data", tmp_path / "out"
    (tree / "eval/evaluate_echo.py").write_text(FILE)
    table = (tree / "eval/benchmarks.py").read_text()
    (tree / "eval/benchmarks.py").write_text(table.replace("_TABLE = (\n", "_TABLE = (\n" + LINE))

    # Nothing else was touched.
    before, after = sources_of(ROOT), sources_of(tree)
    assert {path for path in after if after[path] != before.get(path)} == {
        "eval/benchmarks.py",
        "eval/evaluate_echo.py",
    }
    changes = difflib.ndiff(before["eval/benchmarks.py"].splitlines(), after["eval/benchmarks.py"].splitlines())
    assert [change for change in changes if change[0] in "+-"] == [f"+ {LINE.rstrip()}"]

    # run_eval.py predicts, scores and reports it beside another benchmark.
    data.mkdir()
    (data / "echo.jsonl").write_text("".join(json.dumps({"word": word}) + "\n" for word in WORDS))
    shutil.copy(ROOT / "assets/tiny_data/test_seen.jsonl", data)
    flags = ["--model", tiny_files()[0], "--benchmark_dir", data, "--device", "cpu", "--limit", 2]
    flags += ["--max_answer_tokens", 4, "--max_new_tokens", 4]
    done = run(tree, "run_eval.py", *flags, "--output", output, "--benchmarks", "echo,tiny-seen")
    assert done.returncode == 0, done.stderr
    summary = json.loads((output / "summary.json").read_text())["benchmarks"]["echo"]
    rows = [json.loads(line) for line in (output / "results/echo.jsonl").read_text().splitlines()]
    assert summary["n"] == 2 and summary["echo"] == sum(row["echo"] for row in rows)
    assert [row["index"] for row in rows] == [0, 1] and "| echo " in (output / "report.md").read_text()

    # So does the evaluator alone.
    predictions = tmp_path / "p.jsonl"
    outputs = [" alpha\nno more", "gamma", "gamma"]
    predictions.write_text("".join(json.dumps({"index": i, "output": text}) + "\n" for i, text in enumerate(outputs)))
    flags = ["-m", "eval.evaluate_echo", "--answers", data / "echo.jsonl", "--predictions", predictions]
    alone = json.loads(run(tree, *flags, "--output", output).stdout)
    # One of three: "gamma". "alpha" is followed by more, which only predictions of ours are cut at.
    assert (alone["n"], alone["echo"], alone["errors"]) == (3, 1, {"wrong word": 2})
    assert len((output / "results/echo.jsonl").read_text().splitlines()) == 3
    (data / "echo.jsonl").write_text('{"word": "a"}\n{"word": 5}\n')
    done = run(tree, *flags)
    assert done.returncode == 2 and done.stderr == f"{data}/echo.jsonl:2: found int as 'word', expected str\n"
