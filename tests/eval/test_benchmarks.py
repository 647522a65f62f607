"""The table of benchmarks: its lines, the line of a file, and that no other product file names a benchmark."""

import ast
from pathlib import Path

import pytest

from data.json_records import DataError
from eval.benchmarks import BENCHMARKS, LONGEST_OUTPUT, benchmark_of, count_notice
from eval.eval_config import EvalConfig
from eval.records import Record

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_line_has_its_evaluator_and_settings(name):
    line = BENCHMARKS[name]
    module = (ROOT / f"eval/evaluate_{line.evaluator}.py").read_text()
    functions = {node.name for node in ast.parse(module).body if isinstance(node, ast.FunctionDef)}
    assert {f"load_{line.evaluator}", f"score_{line.evaluator}", "main"} <= functions
    longest = LONGEST_OUTPUT[line.asked]
    assert not longest or hasattr(EvalConfig(), longest)
    assert bool(line.stop_texts()) == (line.asked == "text")
    assert line.rules in ("", "official", "fair") and line.resolve_rules("default") == line.rules
    assert line.resolve_rules("fair") == "fair"
    assert (line.equality(line.rules) is not None) == (line.asked == "call" and name != "bfcl-exec")
    assert bool(line.metric) == (line.figure == 5)


def test_published_counts():
    """Each n is the denominator of the benchmark's rates (the paper's Table 2; 240 for bfcl-exec, see the docs)."""
    assert {name: line.published for name, line in BENCHMARKS.items() if line.published} == {
        "rotbench-clean": 105,
        "rotbench-slight": 210,
        "rotbench-medium": 210,
        "rotbench-heavy": 210,
        "rotbench-union": 105,
        "toolalpaca": 114,
        "bfcl-exec": 240,
        "tooleyes": 382,
        "mmlu": 14042,
        "gsm8k": 1319,
        "humaneval": 164,
    }


@pytest.mark.parametrize(
    "path, evaluator, name, published",
    [
        ("x/First_Turn/clean.json", "", "rotbench-clean", 105),
        ("clean.json", "rotbench", "rotbench-clean", 105),
        ("x/Third_Turn/clean.json", "", "rotbench-third-clean", 0),
        ("x/Third_Turn/heavy.json", "rotbench", "rotbench-third-heavy", 0),
        ("mine.json", "rotbench", "mine", 0),
        ("eval_real.masked.json", "", "toolalpaca", 114),
        ("test_unseen.jsonl", "tiny", "tiny-unseen", 0),
        ("mine.jsonl", "", "mine", 0),
        ("test.jsonl", "", "gsm8k", 1319),
        ("test.jsonl", "tiny", "test", 0),
    ],
)
def test_line_of_a_file(path, evaluator, name, published):
    line = benchmark_of(Path(path), evaluator)
    assert (line.name, line.published) == (name, published)
    assert line.evaluator == (evaluator or line.evaluator) and line.asked in LONGEST_OUTPUT


def test_line_of_an_unknown_file():
    assert benchmark_of(Path("mine.jsonl")).evaluator == "tiny"
    with pytest.raises(DataError, match="mine.json: found a file of another name, expected that of a benchmark"):
        benchmark_of(Path("mine.json"))


def test_notice_where_the_set_is_not_whole():
    records = [Record(index, f"{index}") for index in range(3)]
    assert count_notice(BENCHMARKS["tiny-seen"], Path("f"), records) == []
    assert count_notice(BENCHMARKS["rotbench-clean"], Path("f"), records * 35) == []
    assert count_notice(BENCHMARKS["gsm8k"], Path("f"), records) == ["f: found 3 records, the published set has 1319"]


def test_only_the_table_and_the_evaluators_name_a_benchmark():
    """No `name == "mmlu"` and no `startswith("rotbench-")`: whoever needs to know asks the line of the table."""
    groups = {name.partition("-")[0] for name in BENCHMARKS} | {"bfcl", "rotbench-", "tiny-"}
    named = {}
    for path in sorted([*ROOT.glob("run_*.py"), *(ROOT / "eval").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            is_name = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_name and node.value in {*BENCHMARKS, *groups} - {"tiny"}:
                named.setdefault(path.relative_to(ROOT).as_posix(), set()).add(node.value)
    # the ablation is an experiment on two benchmarks, and shows the paper's figures of two others beside it
    experiment = ("eval/ablation.py", "eval/reports/ablation_tables.py")
    own = {path: names for path, names in named.items() if not path.startswith(("eval/evaluate_", *experiment))}
    assert own.keys() == {"eval/benchmarks.py"}, own
    for path, names in named.items():  # an evaluator looks up its own line at most
        if path not in ("eval/benchmarks.py", *experiment):
            evaluator = path.removeprefix("eval/evaluate_").removesuffix(".py")
            assert all(BENCHMARKS[name].evaluator == evaluator for name in names if name in BENCHMARKS), path
