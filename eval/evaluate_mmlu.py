"""MMLU: four choices after five solved questions, 57 subjects. File in, file out, no model.

    python -m eval.evaluate_mmlu --answers mmlu --predictions FILE [--output DIR]

The answer is the letter with the largest of four log-probabilities, or the letter that a text begins with. accuracy is
the share of all questions, as in the benchmark's code, not a mean over its 57 subjects; those are given too. The
TL-Training paper names the set without a protocol; the choices: docs/evaluation.md.
"""

import csv
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data.json_records import DataError, field_of, read_json_lines
from eval.benchmarks import BENCHMARKS
from eval.evaluator_command_line import evaluator_parser, read_flags, run_evaluator
from eval.predict.choices import choose_letter
from eval.predict.prediction_files import Prediction, dropped_notice, match_predictions
from eval.rates import rates, summarize_results
from eval.records import Record, Scores, ScoreSettings, limited

SHOTS, LETTERS = 5, "ABCD"
METRICS = ("accuracy",)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def load_mmlu(folder: Path) -> list[Record]:
    """Read questions from `folder/test/*_test.csv`, subjects in alphabetical order, shots from `folder/dev/*_dev.csv`.

    The prompt is the benchmark's: a line on the subject, solved questions, then the one to answer, ending in `Answer:`.
    One deviation: the benchmark's code writes two spaces before the subject, this writes one. `meta`: `subject`.
    Raises DataError with `file:line`, also if the two folders have different subjects or `dev` fewer than five shots.
    """
    records: list[Record] = []
    subjects = sorted(path.name.removesuffix("_test.csv") for path in folder.glob("test/*_test.csv"))
    if not subjects:
        raise DataError(f"{folder}: found no test/*_test.csv, expected one per subject")
    for subject in subjects:
        about = subject.replace("_", " ")
        instruction = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        questions = _read_questions(folder / "test" / f"{subject}_test.csv")
        dev = folder / "dev" / f"{subject}_dev.csv"
        shots = tuple(f"{text} {letter}\n\n" for text, letter in _read_questions(dev))
        if len(shots) < SHOTS:
            raise DataError(f"{dev}: found {len(shots)} questions, expected {SHOTS}")
        for number, (text, letter) in enumerate(questions):
            records.append(
                Record(
                    index=len(records),
                    id=f"{subject}/{number}",
                    instruction=instruction,
                    shots=shots[:SHOTS],
                    text=text,
                    letters=LETTERS,
                    answer=letter,
                    meta={"subject": subject},
                )
            )
    return records


def _read_questions(path: Path) -> list[tuple[str, str]]:
    """(question as asked, letter of the answer) of each row.

    All cells are text: a choice "None" or "nan" is that word, not a missing value as table readers take it.
    """
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
    except OSError as error:
        raise DataError(f"{path}: found {error.strerror or error}, expected a readable CSV file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: found bytes that are no UTF-8, expected a CSV file") from None
    questions = []
    try:
        header = next(reader, None)
        if header != ["question", "choice0", "choice1", "choice2", "choice3", "answer"]:
            raise DataError(f"{path}:1: found the columns {header!a}, expected question, choice0 to choice3, answer")
        for row in reader:
            if len(row) != 6 or row[5] not in ("0", "1", "2", "3"):
                raise DataError(
                    f"{path}:{reader.line_num}: found {len(row)} cells ending in {row[-1:]!a}, "
                    "expected question, four choices and an answer from 0 to 3"
                )
            lines = [row[0], *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:5])), "Answer:"]
            questions.append(("\n".join(lines), LETTERS[int(row[5])]))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: found malformed CSV ({error}), expected quoted cells") from None
    return questions


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def read_letter(output: str) -> str | None:
    """The letter that a text answer begins with, as in ` B`, `B.` or `(B) ...`; None for any other text."""
    match = re.match(r"\s*\(?([ABCD])(?![\w'])", output)
    return match[1] if match else None


def read_choices(path: Path, count: int, limit: int | None) -> tuple[list[Prediction], list[str]]:
    """Lines `{"index", "output": "B"}` or `{"index", "logprobs": [of " A", " B", " C", " D"]}`, and notices to show.

    Of a line with both, the log-probabilities count; the letter they choose becomes the output. Raises DataError.
    """
    rows, has_dropped = read_json_lines(path, drop_partial_last_line=True)
    predictions = []
    for line, row in rows:
        index, stop = row.get("index"), row.get("stop", "")
        if type(index) is not int or not isinstance(stop, str):
            raise DataError(f"{path}:{line}: found index {index!a}, expected the record's number, an integer from 0")
        if "logprobs" in row:
            output = choose_letter(_four_numbers(row["logprobs"], f"{path}:{line}"), LETTERS)
        else:
            output = field_of(row, "output", str, f"{path}:{line}")
        predictions.append(Prediction(index=index, output=output, format="tl", stop=stop, line=line))
    return match_predictions(predictions, count, limit, path=path), dropped_notice(path, has_dropped)


def _four_numbers(logprobs: object, where: str) -> list[float]:
    if (
        not isinstance(logprobs, list)
        or len(logprobs) != len(LETTERS)
        or not all(type(value) in (int, float) for value in logprobs)
    ):
        raise DataError(f"{where}: found {logprobs!a:.80} as 'logprobs', expected four numbers, of A to D")
    return logprobs


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def evaluate_mmlu(questions: Sequence[Record], predictions: Sequence[Prediction]) -> list[dict]:
    """One row per question: index, subject, accuracy (0 or 1), reason ("" if right).

    `predictions` are those of `questions`, in order; an output holds a letter.
    """
    return [_score(question, prediction) for question, prediction in zip(questions, predictions, strict=True)]


def _score(question: Record, prediction: Prediction) -> dict:
    letter = read_letter(prediction.output)
    if prediction.stop == "prompt_too_long":
        reason = "no output: the prompt does not fit the model's positions, not even without solved questions"
    elif letter is None:
        reason = "no letter: found text that begins with none of A to D"
    else:
        reason = "" if letter == question.answer else f"wrong letter: {letter}, expected {question.answer}"
    return {"index": question.index, "subject": question.meta["subject"], "accuracy": int(not reason), "reason": reason}


def summarize_mmlu(rows: Sequence[dict]) -> dict:
    """n and accuracy with its 95 % interval, over all questions and by subject; errors by category."""
    by_subject: dict[str, list[dict]] = {}
    for row in rows:
        by_subject.setdefault(row["subject"], []).append(row)
    return {
        **summarize_results(rows, METRICS),
        "by_subject": {subject: rates(group, METRICS) for subject, group in by_subject.items()},
    }


def score_mmlu(records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
    """Rows, summary and notices for a prediction file. Raises DataError, `file:line`."""
    matched, notices = read_choices(predictions, len(records), settings.limit)
    rows = evaluate_mmlu(limited(records, settings.limit), matched)
    return Scores(rows, summarize_mmlu(rows), notices)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = evaluator_parser(
        "evaluate_mmlu",
        "Score predictions on MMLU.",
        answers="folder with the benchmark's test/ and dev/",
        predictions='JSONL of {"index": 0, "output": "B"} or {"index": 0, "logprobs": [4 numbers]}',
    )
    return run_evaluator(read_flags(parser, arguments), BENCHMARKS["mmlu"], load_mmlu, score_mmlu)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
