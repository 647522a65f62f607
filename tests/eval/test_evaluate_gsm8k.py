"""GSM8K: the two ways to read an answer, the prompt, files with `file:line` errors, the real set's own solutions."""

import json
import random
import re
import time
from decimal import Decimal
from pathlib import Path

import pytest

from eval.benchmarks import BENCHMARKS
from eval.evaluate_gsm8k import (
    GSM8K_SHOTS,
    extract_last_number,
    extract_marked,
    gsm8k_prompt,
    is_same_number,
    load_gsm8k,
    main,
)

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "../shared/data/benchmarks/gsm8k/test.jsonl"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="the benchmark files are not beside this checkout")

ANSWERS = ["2 and 3 make <<2+3=5>>5.\n#### 5", "#### 1,200", "so\n#### -7", "#### 3", "#### 8"]
# Per record: output, exact_match, last_number, start of the reason. Worked by hand from the rules in the docstrings.
OUTPUTS = [
    (" 2 + 3 = 5.\n#### 5\n\nQuestion: How many are 7?\nAnswer: 7\n#### 7", 1, 1, ""),
    ("It costs $1,200.00 in all.", 0, 1, "no marked number:"),
    ("#### -7.0", 0, 1, "wrong number: '-7.0', expected '-7'"),
    ("#### 4\nOr was it 3?", 0, 1, "wrong number: '4', expected '3'"),
    ("", 0, 0, "no marked number:"),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    return (
        write(tmp_path / "test.jsonl", [{"question": f"Q{i}?", "answer": text} for i, text in enumerate(ANSWERS)]),
        write(tmp_path / "p.jsonl", [{"index": i, "output": row[0]} for i, row in enumerate(OUTPUTS)]),
    )


def evaluate(capsys, answers, predictions, *flags):
    code = main(["--answers", str(answers), "--predictions", str(predictions), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("#### 18", "18", "18"),
        ("#### $18", None, "18"),
        ("####18", None, "18"),
        ("#### 1,000,000.", "1000000.", "1000000"),
        ("7 #### 1 #### 2", "1", "2"),
        ("#### -3", "-3", "-3"),
        ("10-3", None, "3"),
        ("is -3", None, "-3"),
        ("x=.5", None, "0.5"),
        ("3.50 dollars", None, "3.5"),
        ("none", None, None),
        ("#### ,", "", None),
        ("5 apples\nQuestion: 6?", None, "5"),
        ("Question: 6?", None, "6"),
        ("1/2", None, "2"),
        ("2. ", None, "2"),
        ("\u0663", None, None),
    ],
)
def test_extraction(text, marked, last):
    assert extract_marked(text) == marked
    found = extract_last_number(text)
    assert found == (None if last is None else Decimal(last))


def test_numbers_compare_by_value():
    assert is_same_number(Decimal("18.00"), "18") and is_same_number(Decimal("-0"), "0")
    assert not is_same_number(Decimal("18.01"), "18") and not is_same_number(None, "18")


def test_known_score(files, tmp_path, capsys):
    code, out, err = evaluate(capsys, *files, "--output", str(tmp_path / "scored"))
    assert code == 0 and err == f"{files[0]}: found 5 records, the published set has 1319\n"
    summary = json.loads(out.splitlines()[-1])
    assert {key: summary[key] for key in ("n", "exact_match", "last_number", "primary")} == {
        "n": 5,
        "exact_match": 1,
        "last_number": 4,
        "primary": "exact_match",
    }
    # Wilson, 1 of 5: center (0.2 + 0.38415) / 1.76829, half width 1.96 * sqrt(0.032 + 0.038415) / 1.76829
    assert summary["exact_match_percent"] == 20.0 and summary["exact_match_interval_95"] == [3.62, 62.45]
    assert summary["errors"] == {"no marked number": 2, "wrong number": 2}
    rows = [json.loads(line) for line in (tmp_path / "scored/results/gsm8k.jsonl").read_text().splitlines()]
    for index, (row, (_, exact, last, start)) in enumerate(zip(rows, OUTPUTS, strict=True)):
        assert (row["index"], row["exact_match"], row["last_number"]) == (index, exact, last)
        assert row["reason"].startswith(start) and bool(row["reason"]) == (not exact)


def test_prompt_has_eight_right_shots_and_ends_where_the_model_goes_on():
    shots = GSM8K_SHOTS.strip().split("\n\n")
    assert len(shots) == 8 and GSM8K_SHOTS.endswith("\n\n")
    for shot in shots:
        question, answer = re.fullmatch(r"Question: (.+)\nAnswer: ((?:.+\n)+)#### \d+", shot).groups()
        steps = re.findall(r"([\d +*/-]+) = (\d+)", answer)
        assert question.endswith("?") and steps
        for expression, result in steps:  # every step of a shot is arithmetic that holds
            tokens = expression.split()
            value = Decimal(tokens[0])
            for sign, number in zip(tokens[1::2], tokens[2::2], strict=True):
                value = {
                    "+": value + Decimal(number),
                    "-": value - Decimal(number),
                    "*": value * Decimal(number),
                    "/": value / Decimal(number),
                }[sign]
            assert value == Decimal(result), expression
        assert extract_marked(shot) == steps[-1][1]
    assert gsm8k_prompt("How many?") == GSM8K_SHOTS + "Question: How many?\nAnswer:"


def test_bad_input_is_one_line_and_code_2(files, tmp_path, capsys):
    answers, predictions = files
    for text, found in (
        ('{"question": "Q"}\n', ":1: found nothing as 'answer', expected str"),
        ("", "found no record"),
        ("[]\n", ":1: found a list"),
        ('{"question": "Q", "answer": "5"}\n', ":1: found no '#### number'"),
        ("{\n", ":1: "),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(text)
        code, out, err = evaluate(capsys, bad, predictions)
        assert (code, out, err.count("\n")) == (2, "", 1) and found in err, err
    for rows, found in (
        ([{"index": 9, "output": ""}], ":1: found index 9"),
        ([{"index": 0, "output": 5}], ":1: found int"),
        ([], "found 0 of 5"),
        ([{"index": 0, "output": ""}] * 2, ":2: found index 0 again"),
    ):
        code, out, err = evaluate(capsys, answers, write(tmp_path / "p2.jsonl", rows))
        assert (code, out, err.count("\n")) == (2, "", 1) and found in err, err
    assert evaluate(capsys, answers, predictions, "--limit", "2")[0] == 0
    assert evaluate(capsys, tmp_path / "none.jsonl", predictions)[0] == 2


def test_hostile_outputs_are_wrong_not_a_crash(tmp_path, capsys):
    random_text = random.Random(1)
    hostile = [
        "9" * 1_000_000,
        "1," * 100_000,
        "#### " + "," * 100_000,
        "-" * 100_000,
        "1e999999999",
        "\x00\x1b[31m",
        "#### " + "." * 99,
        "\ud800",
        "1." * 99_999,
        "[" * 99_999,
        *("".join(random_text.choices("#0123456789.,-$ \nQ", k=40)) for _ in range(2000)),
    ]
    answers = write(tmp_path / "a.jsonl", [{"question": "Q", "answer": "#### 123456789123"}] * len(hostile))
    predictions = write(tmp_path / "p.jsonl", [{"index": i, "output": text} for i, text in enumerate(hostile)])
    began = time.monotonic()
    code, out, _ = evaluate(capsys, answers, predictions, "--output", str(tmp_path))
    assert code == 0 and json.loads(out)["exact_match"] == 0 and time.monotonic() - began < 30
    assert max(map(len, (tmp_path / "results/gsm8k.jsonl").read_text().splitlines())) < 500


@needs_real
def test_published_solutions_score_in_full():
    problems = load_gsm8k(REAL)
    assert len(problems) == BENCHMARKS["gsm8k"].published == 1319
    assert all(extract_marked(problem.meta["solution"]) == problem.answer for problem in problems)
    assert all(is_same_number(extract_last_number(problem.meta["solution"]), problem.answer) for problem in problems)
    assert not {problem.meta["question"] for problem in problems} & set(re.findall("Question: (.*)", GSM8K_SHOTS))
