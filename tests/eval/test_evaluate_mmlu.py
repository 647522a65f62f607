"""MMLU: the prompt and how shots are dropped, letters and log-probabilities, files with `file:line` errors."""

import json
import random
from pathlib import Path

import pytest

from data.json_records import DataError
from eval.benchmarks import BENCHMARKS
from eval.evaluate_mmlu import load_mmlu, main, read_letter
from eval.predict.choices import choice_prompt, choose_letter, fitting_shots

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "../shared/data/benchmarks/mmlu"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark files are not beside this checkout")
HEADER = "question,choice0,choice1,choice2,choice3,answer\n"
SHOTS = "".join(f"Shot {i}?,p,q,r,s,{i % 4}\n" for i in range(5))


@pytest.fixture
def folder(tmp_path):
    """Two subjects, three questions: answers B, D in the first, A in the second."""
    for part in ("test", "dev"):
        (tmp_path / "mmlu" / part).mkdir(parents=True)
    (tmp_path / "mmlu/test/high_art_test.csv").write_text(
        HEADER + 'Which?,None,"a, b",nan,"say ""x""",1\n"Two\nlines",1,2,3,4,3\n'
    )
    (tmp_path / "mmlu/test/law_test.csv").write_text(HEADER + "Who?,w,x,y,z,0\n")
    for subject in ("high_art", "law"):
        (tmp_path / f"mmlu/dev/{subject}_dev.csv").write_text(HEADER + SHOTS)
    return tmp_path / "mmlu"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(capsys, folder, predictions, *flags):
    code = main(["--answers", str(folder), "--predictions", str(predictions), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_cells_are_texts_and_subjects_are_in_order(folder):
    questions = load_mmlu(folder)
    assert [(q.index, q.meta["subject"], q.answer) for q in questions] == [
        (0, "high_art", "B"),
        (1, "high_art", "D"),
        (2, "law", "A"),
    ]
    assert questions[0].text == 'Which?\nA. None\nB. a, b\nC. nan\nD. say "x"\nAnswer:'
    assert questions[1].text.startswith("Two\nlines\nA. 1\n") and {q.letters for q in questions} == {"ABCD"}
    assert [shot[-3:] for shot in questions[2].shots] == ["A\n\n", "B\n\n", "C\n\n", "D\n\n", "A\n\n"]


def test_prompt_as_the_benchmark_writes_it(folder):
    assert choice_prompt(load_mmlu(folder)[0], 1) == (
        "The following are multiple choice questions (with answers) about high art.\n\n"
        "Shot 0?\nA. p\nB. q\nC. r\nD. s\nAnswer: A\n\n"
        'Which?\nA. None\nB. a, b\nC. nan\nD. say "x"\nAnswer:'
    )


def test_shots_are_dropped_from_the_end_until_the_prompt_fits(folder):
    question = load_mmlu(folder)[2]
    whole = choice_prompt(question, 5)
    per_shot = len("Shot 0?\nA. p\nB. q\nC. r\nD. s\nAnswer: A\n\n")
    for dropped in range(6):
        for slack in (0, per_shot - 1):
            room = len(whole) - dropped * per_shot + slack
            assert fitting_shots(question, count_tokens=len, max_tokens=room) == 5 - dropped
            assert len(choice_prompt(question, 5 - dropped)) == len(whole) - dropped * per_shot
    assert fitting_shots(question, count_tokens=len, max_tokens=3) == 0


def test_letter_of_the_largest_logprob():
    assert [
        choose_letter(row, "ABCD") for row in ([-1, -2, -3, -4], [-4, -1.5, -3, -2], [-3, -3, -1, -1], [-9, -9, -9, 0])
    ] == ["A", "B", "C", "D"]
    assert choose_letter([float("-inf")] * 4, "ABCD") == "A"
    for wrong in ([0, 0, 0], [0] * 5, [0, 0, 0, float("nan")]):
        with pytest.raises(ValueError, match="expected 4 numbers"):
            choose_letter(wrong, "ABCD")


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        (" B", "B"),
        ("C.", "C"),
        ("(D) because", "D"),
        ("\nA\n\nQuestion", "A"),
        ("B,C", "B"),
        ("Apple", None),
        ("a", None),
        ("", None),
        ("The answer is B", None),
        ("A's", None),
        ("E", None),
        ("B_", None),
    ],
)
def test_letter_of_a_text(output, letter):
    assert read_letter(output) == letter


def test_known_score(folder, tmp_path, capsys):
    predictions = write(
        tmp_path / "p.jsonl",
        [
            {"index": 2, "output": " A"},
            {"index": 0, "logprobs": [-3, -1, -2, -9]},
            {"index": 1, "output": "D", "logprobs": [0, -1, -2, -3]},
        ],
    )
    code, out, err = evaluate(capsys, folder, predictions, "--output", str(tmp_path / "scored"))
    assert code == 0 and err == f"{folder}: found 3 records, the published set has 14042\n"
    summary = json.loads(out.splitlines()[-1])
    assert (summary["n"], summary["accuracy"], summary["accuracy_percent"]) == (3, 2, 66.67)
    assert {key: (row["n"], row["accuracy"]) for key, row in summary["by_subject"].items()} == {
        "high_art": (2, 1),
        "law": (1, 1),
    }
    rows = [json.loads(line) for line in (tmp_path / "scored/results/mmlu.jsonl").read_text().splitlines()]
    assert rows[1] == {"index": 1, "subject": "high_art", "accuracy": 0, "reason": "wrong letter: A, expected D"}


def test_unanswered_questions_are_wrong(folder, tmp_path, capsys):
    rows = [
        {"index": 0, "output": "B", "stop": "prompt_too_long"},
        {"index": 1, "output": "I think D"},
        {"index": 2, "output": "x" * 1_000_000},
    ]
    _, out, _ = evaluate(capsys, folder, write(tmp_path / "p.jsonl", rows))
    assert json.loads(out)["errors"] == {"no letter": 2, "no output": 1}


def test_bad_input_is_one_line_and_code_2(folder, tmp_path, capsys):
    good = {"index": 0, "output": "A"}
    for rows, found in (
        ([{"index": 0, "logprobs": [1, 2, 3]}], ":1: found [1, 2, 3] as 'logprobs'"),
        ([good, {"index": 1, "logprobs": [1, 2, 3, "4"]}], ":2: found"),
        ([{"index": 0, "logprobs": "B"}], ":1: "),
        ([{"index": 0, "logprobs": [True] * 4}], ":1: "),
        ([{"index": 0}], ":1: found nothing as 'output', expected str"),
        ([{"index": True, "output": "A"}], ":1: found index True"),
        ([good, good], ":2: found index 0 again"),
        ([{"index": 3, "output": "A"}], ":1: found index 3"),
        ([good], "found 1 of 3"),
    ):
        code, out, err = evaluate(capsys, folder, write(tmp_path / "p.jsonl", rows))
        assert (code, out, err.count("\n")) == (2, "", 1) and found in err, err


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("test/law_test.csv", "", ":1: found the columns None"),
        ("test/law_test.csv", "a,b\n", ":1: found the columns"),
        ("test/law_test.csv", HEADER + "Q,1,2,3,4,5\n", ":2: found 6 cells"),
        ("test/law_test.csv", HEADER + "Q\n", ":2: "),
        ("test/law_test.csv", HEADER + 'Q,"1,2,3,4,0\n', ": found malformed CSV"),
        ("dev/law_dev.csv", HEADER + "Q,1,2,3,4,0\n", "law_dev.csv: found 1 questions, expected 5"),
        ("dev/law_dev.csv", None, "law_dev.csv: found No such file"),
    ],
)
def test_altered_folder_is_an_error(folder, file, text, found):
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(DataError, match="found") as caught:
        load_mmlu(folder)
    assert found in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="found no test"):
        load_mmlu(tmp_path / "none")


@needs_real
def test_published_set():
    questions = load_mmlu(REAL)
    assert [question.index for question in questions] == list(range(BENCHMARKS["mmlu"].published))
    assert len({question.meta["subject"] for question in questions}) == 57
    assert any("\nA. None\n" in question.text for question in questions)  # what a table reader would take for missing
    sample = random.Random(1).sample(questions, 50)
    assert all(len(q.shots) == 5 and choice_prompt(q, 5).count("\nAnswer:") == 6 for q in sample)
