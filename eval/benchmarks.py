"""The table of benchmarks: one line each. Everything that knows a benchmark by name looks it up here.

A benchmark is a file eval/evaluate_<evaluator>.py, which loads its records and scores predictions, and a line of the
table (CONTRIBUTING.md, "Add a benchmark"). A line imports its evaluator when it is first used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from data.json_records import DataError
from eval.records import Record, Scores, ScoreSettings

# How a record is asked (eval/records.py) -> the setting of run_eval.py that bounds the output, "" for one token.
LONGEST_OUTPUT = {"call": "max_new_tokens", "dialogue": "max_turn_tokens", "text": "max_answer_tokens", "choice": ""}
OWN = "own"  # the benchmark whose file is that of --data


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One line of the table."""

    name: str  # as in --benchmarks
    path: str  # its answer file, or folder of files, below --benchmark_dir; "" = the file of --data
    asked: str  # how a record is asked: a key of LONGEST_OUTPUT
    evaluator: str  # eval/evaluate_<evaluator>.py has load_<evaluator>, score_<evaluator>, STOP_TEXTS if asked by text
    published: int = 0  # records of the published set, the n of every rate; 0 = bundled here, or of your own
    rules: str = ""  # what --rules default means: "official" or "fair"; "" = there is one rule only
    executes_code: bool = False  # scoring runs code that a model wrote: needs --execute_code
    figure: int = 0  # of the paper that shows it: 4, 5; 0 = none
    metric: str = ""  # the one that figure 5 shows
    folder: str = ""  # all files below it belong to the benchmark, not only `path`

    def load(self, path: Path) -> list[Record]:
        """The records of an answer file or folder, in order. Raises DataError with `file:line`."""
        return getattr(self._module(), f"load_{self.evaluator}")(path)

    def score(self, records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
        """Score a prediction file on all records of the benchmark. Raises DataError with `file:line`, SandboxError."""
        return getattr(self._module(), f"score_{self.evaluator}")(records, predictions, settings)

    def stop_texts(self) -> tuple[str, ...]:
        """Where the continuation of a text ends, in addition to the model's own end; () where records are asked
        otherwise.
        """
        return self._module().STOP_TEXTS if self.asked == "text" else ()

    def equality(self, rules: str) -> Callable[[object, object], bool] | None:
        """How `rules` compare an argument's value with the gold one; None where records are no single calls."""
        return getattr(self._module(), "EQUALITY", {}).get(rules)

    def resolve_rules(self, rules: str) -> str:
        """`rules`, or the benchmark's own where they are "default"."""
        return self.rules if rules == "default" else rules

    def _module(self) -> ModuleType:
        return import_module(f"eval.evaluate_{self.evaluator}")


_TABLE = (
    Benchmark("tiny-seen", "test_seen.jsonl", "call", "tiny"),
    Benchmark("tiny-unseen", "test_unseen.jsonl", "call", "tiny"),
    Benchmark("tiny-hard", "test_hard.jsonl", "call", "tiny"),
    Benchmark("tiny-alike", "test_alike.jsonl", "call", "tiny"),
    Benchmark("tiny-multi", "test_multi.jsonl", "dialogue", "tiny_multi"),
    Benchmark("rotbench-clean", "rotbench/First_Turn/clean.json", "call", "rotbench", 105, "official", figure=4),
    Benchmark("rotbench-slight", "rotbench/First_Turn/slight.json", "call", "rotbench", 210, "official", figure=4),
    Benchmark("rotbench-medium", "rotbench/First_Turn/medium.json", "call", "rotbench", 210, "official", figure=4),
    Benchmark("rotbench-heavy", "rotbench/First_Turn/heavy.json", "call", "rotbench", 210, "official", figure=4),
    Benchmark("rotbench-union", "rotbench/First_Turn/union.json", "call", "rotbench", 105, "official", figure=4),
    Benchmark("toolalpaca", "toolalpaca/eval_real.masked.json", "call", "toolalpaca", 114, "fair"),
    Benchmark("bfcl-exec", "bfcl_v3_exec/2024-12-19_5bd63a96", "call", "bfcl", 240, "fair"),
    Benchmark(
        "tooleyes",
        "tooleyes/Test_Data/scenario_data_zero_processed.json",
        "dialogue",
        "tooleyes",
        382,
        folder="tooleyes",  # the tools are next to the queries
    ),
    Benchmark("mmlu", "mmlu", "choice", "mmlu", 14042, figure=5, metric="accuracy"),
    Benchmark("gsm8k", "gsm8k/test.jsonl", "text", "gsm8k", 1319, figure=5, metric="exact_match"),
    Benchmark(
        "humaneval",
        "humaneval/HumanEval.jsonl.gz",
        "text",
        "humaneval",
        164,
        executes_code=True,
        figure=5,
        metric="pass_at_1",
    ),
    Benchmark(OWN, "", "call", "own"),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _TABLE}


def benchmark_of(answers: Path, evaluator: str = "") -> Benchmark:
    """The line of an answer file, told by the last part of its path; of `evaluator` only, if that is given.

    RoTBench's later turns are no benchmark of the table: `Third_Turn/clean.json` gives a line `rotbench-third-clean`.
    A file of another name gives a line of `evaluator`, or of tiny if it has JSON lines, named by its stem. Raises
    DataError for any other file.
    """
    lines = [line for line in _TABLE if evaluator in ("", line.evaluator)]
    for line in lines:
        if Path(line.path).name == answers.name:
            if answers.parent.name != "Third_Turn":
                return line
            return replace(line, name=f"{line.evaluator}-third-{answers.stem}", published=0, figure=0)
    if not evaluator and answers.suffix != ".jsonl":
        raise DataError(f"{answers}: found a file of another name, expected that of a benchmark or JSON lines")
    line = lines[0] if evaluator else BENCHMARKS["tiny-seen"]
    return replace(line, name=answers.stem, published=0, figure=0)


def count_notice(benchmark: Benchmark, path: Path, records: Sequence[Record]) -> list[str]:
    """A notice where `path` does not hold the whole published set, so that no rate is taken for the benchmark's."""
    if benchmark.published in (0, len(records)):
        return []
    return [f"{path}: found {len(records)} records, the published set has {benchmark.published}"]
