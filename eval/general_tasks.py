"""GSM8K, HumanEval and MMLU: records, prompts and what counts as an answer (docs/evaluation.md).

The paper's Figure 5 names the three sets without a protocol; what is chosen here follows each benchmark's own scorer:
GSM8K 8-shot with worked solutions, HumanEval as completion of the function, MMLU 5-shot by log-probability.
"""

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path

from data.json_records import DataError, read_json_lines
from eval.confidence import Z_95, wilson_interval
from eval.predict.prediction_files import Prediction, match_predictions, read_predictions

GSM8K_COUNT, HUMANEVAL_COUNT, MMLU_COUNT, MMLU_SHOTS, MMLU_SUBJECTS = 1319, 164, 14042, 5, 57
LETTERS = "ABCD"
MAX_UNPACKED_BYTES = 64 << 20  # of a gzip file; HumanEval unpacks to 0.2 MB


@dataclass(frozen=True, slots=True)
class MathProblem:
    """One GSM8K record."""

    index: int  # position in the file, from 0
    question: str
    solution: str  # the worked solution, ending in "#### <answer>"
    answer: str  # what stands behind "#### ", without commas


@dataclass(frozen=True, slots=True)
class CodeProblem:
    """One HumanEval record."""

    index: int
    task_id: str
    prompt: str  # imports, helpers, signature and docstring of the function to be completed
    entry_point: str  # its name
    canonical_solution: str  # a right completion
    test: str  # Python text that defines check(candidate)


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """One MMLU question."""

    index: int  # over all subjects in alphabetical order, from 0
    subject: str  # e.g. "abstract_algebra"
    question: str
    choices: tuple[str, str, str, str]
    answer: str  # one of LETTERS


# -------------------------------------------------------------------------------------------------------------- loading


def check_count(found: int, expected: int | None, path: Path) -> None:
    """Raise DataError unless `found` records are as many as `expected` (None: any number)."""
    if expected is not None and found != expected:
        raise DataError(f"{path}: found {found} records, expected {expected}; the file is not the published one")


def load_gsm8k(path: Path, expected_count: int | None = None) -> list[MathProblem]:
    """Read lines `{"question", "answer"}`. Raises DataError with `file:line`."""
    rows, _ = read_json_lines(path, drop_partial_last_line=False)
    problems = []
    for line, row in rows:
        question, solution = (_text_of(row, key, f"{path}:{line}") for key in ("question", "answer"))
        answer = extract_marked(solution)
        if answer is None:
            raise DataError(f"{path}:{line}: found no '#### number' in the answer, expected one")
        problems.append(MathProblem(index=len(problems), question=question, solution=solution, answer=answer))
    check_count(len(problems), expected_count, path)
    return _not_empty(problems, path)


def load_humaneval(path: Path, expected_count: int | None = None) -> list[CodeProblem]:
    """Read lines `{"task_id", "prompt", "entry_point", "canonical_solution", "test"}`; a `.gz` file is unpacked.

    Raises DataError with `file:line`.
    """
    keys = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    rows = _read_gzip_lines(path) if path.suffix == ".gz" else read_json_lines(path, drop_partial_last_line=False)[0]
    problems = []
    for line, row in rows:
        fields = {key: _text_of(row, key, f"{path}:{line}") for key in keys}
        if not fields["entry_point"].isidentifier():
            raise DataError(f"{path}:{line}: found entry_point {fields['entry_point']!a}, expected a function's name")
        problems.append(CodeProblem(index=len(problems), **fields))
    check_count(len(problems), expected_count, path)
    return _not_empty(problems, path)


def load_mmlu(
    folder: Path, expected_count: int | None = None
) -> tuple[list[ChoiceQuestion], dict[str, list[ChoiceQuestion]]]:
    """Questions of `folder/test/*_test.csv`, subjects in alphabetical order, and `folder/dev/*_dev.csv` by subject.

    Raises DataError with `file:line`, also if the two folders have different subjects or `dev` fewer than five shots.
    """
    questions: list[ChoiceQuestion] = []
    shots: dict[str, list[ChoiceQuestion]] = {}
    subjects = sorted(path.name.removesuffix("_test.csv") for path in folder.glob("test/*_test.csv"))
    if not subjects:
        raise DataError(f"{folder}: found no test/*_test.csv, expected one per subject")
    for subject in subjects:
        questions += _read_choices(folder / "test" / f"{subject}_test.csv", subject, first_index=len(questions))
        shots[subject] = _read_choices(folder / "dev" / f"{subject}_dev.csv", subject, first_index=0)
        if len(shots[subject]) < MMLU_SHOTS:
            raise DataError(
                f"{folder / 'dev' / subject}_dev.csv: found {len(shots[subject])} questions, expected {MMLU_SHOTS}"
            )
    check_count(len(questions), expected_count, folder)
    return questions, shots


def _read_choices(path: Path, subject: str, *, first_index: int) -> list[ChoiceQuestion]:
    """All cells are text: a choice "None" or "nan" is that word, not a missing value as table readers take it."""
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
    except OSError as error:
        raise DataError(f"{path}: found {error.strerror or error}, expected a readable CSV file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: found bytes that are no UTF-8, expected a CSV file") from None
    questions: list[ChoiceQuestion] = []
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
            questions.append(
                ChoiceQuestion(
                    index=first_index + len(questions),
                    subject=subject,
                    question=row[0],
                    choices=(row[1], row[2], row[3], row[4]),
                    answer=LETTERS[int(row[5])],
                )
            )
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: found malformed CSV ({error}), expected quoted cells") from None
    return questions


def _read_gzip_lines(path: Path) -> list[tuple[int, dict]]:
    try:
        with gzip.open(path, "rb") as file:
            raw = file.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: found {error}, expected a readable gzip file of JSON lines") from None
    if len(raw) > MAX_UNPACKED_BYTES:
        raise DataError(f"{path}: found more than {MAX_UNPACKED_BYTES} bytes when unpacked, expected a benchmark")
    rows = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError):
                raise DataError(f"{path}:{number}: found no valid JSON, expected one JSON object") from None
    return rows


def _text_of(row: object, key: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
        raise DataError(f"{where}: found no text {key!a}, expected an object with it")
    return row[key]


def _not_empty(problems: list, path: Path) -> list:
    if not problems:
        raise DataError(f"{path}: found no record, expected at least one line")
    return problems


# ---------------------------------------------------------------------------------------------------------------- GSM8K

MARKED_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")  # the benchmark's own rule
ANY_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*)?\.?\d+", re.ASCII)  # in "10-3" the last number is 3, not -3
NEXT_QUESTION = "\nQuestion:"  # where a base model, done with its answer, invents the next problem

# Eight problems of our own with worked solutions, in the form of the benchmark's: none is from its training or test
# set. (The set's own training part is not among its published test files, and the paper does not say which shots it
# used.)
GSM8K_SHOTS = """\
Question: A baker puts 6 rolls in each bag. She fills 7 bags and has 4 rolls left over. How many rolls did she bake?
Answer: The 7 bags hold 7 * 6 = 42 rolls.
With the 4 left over she baked 42 + 4 = 46 rolls.
#### 46

Question: Tom has 3 times as many stamps as Ada. Together they have 48 stamps. How many stamps does Tom have?
Answer: Tom's and Ada's stamps are 3 + 1 = 4 equal parts.
One part is 48 / 4 = 12 stamps.
Tom has 3 * 12 = 36 stamps.
#### 36

Question: A train ticket costs $14. Children pay half. What do 2 adults and 3 children pay in dollars?
Answer: A child pays 14 / 2 = 7 dollars.
The adults pay 2 * 14 = 28 dollars.
The children pay 3 * 7 = 21 dollars.
All together pay 28 + 21 = 49 dollars.
#### 49

Question: A tank holds 900 liters. A pump takes out 60 liters every minute for 8 minutes. How many liters are left?
Answer: The pump takes out 60 * 8 = 480 liters.
So 900 - 480 = 420 liters are left.
#### 420

Question: Lena reads 25 pages on each weekday and 40 on each day of the weekend. How much does she read in 3 weeks?
Answer: On weekdays she reads 5 * 25 = 125 pages.
On the weekend she reads 2 * 40 = 80 pages.
In one week that is 125 + 80 = 205 pages.
In 3 weeks she reads 3 * 205 = 615 pages.
#### 615

Question: A coat cost $80. Its price rose by 25% and then fell by $15. What does it cost now, in dollars?
Answer: The rise was 80 * 25 / 100 = 20 dollars.
After it the coat cost 80 + 20 = 100 dollars.
Now it costs 100 - 15 = 85 dollars.
#### 85

Question: Four friends share 3 pizzas of 8 slices equally. One gives away 2 of her slices. How many does she keep?
Answer: There are 3 * 8 = 24 slices.
Each friend gets 24 / 4 = 6 slices.
She keeps 6 - 2 = 4 slices.
#### 4

Question: A farmer plants 12 rows of 15 trees. One tree in 9 does not grow. How many trees grow?
Answer: He plants 12 * 15 = 180 trees.
Of these 180 / 9 = 20 do not grow.
So 180 - 20 = 160 trees grow.
#### 160

"""


def gsm8k_prompt(question: str) -> str:
    """The eight shots, then `Question: ...` and `Answer:` for a model to go on."""
    return f"{GSM8K_SHOTS}Question: {question}\nAnswer:"


def extract_marked(text: str) -> str | None:
    """The benchmark's own extraction: the first `#### number`, commas removed; None where there is none."""
    match = MARKED_NUMBER.search(text)
    return match[1].strip().replace(",", "") if match else None


def extract_last_number(text: str) -> Decimal | None:
    """The last number in `text` before it goes on to another question; None where there is none."""
    found = ANY_NUMBER.findall(text.partition(NEXT_QUESTION)[0])
    return _as_number(found[-1]) if found else None


def is_same_number(number: Decimal | None, answer: str) -> bool:
    """Equality of values: 18, 18.0 and 18.00 are the same, unlike in the benchmark's comparison of texts."""
    return number is not None and number == _as_number(answer)


def _as_number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").rstrip("."))
    except InvalidOperation:
        return None


# ------------------------------------------------------------------------------------------------------------ HumanEval

# A function's body is indented: text at the left margin is no longer part of it.
STOP_TEXTS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def cut_completion(output: str) -> str:
    """A model's continuation of a HumanEval prompt up to the first stop text (docs/evaluation.md)."""
    ends = [position for stop in STOP_TEXTS if (position := output.find(stop)) >= 0]
    return output[: min(ends)] if ends else output


# ----------------------------------------------------------------------------------------------------------------- MMLU


def mmlu_prompt(question: ChoiceQuestion, shots: Sequence[ChoiceQuestion]) -> str:
    """The benchmark's prompt: a line on the subject, solved questions, then the one to answer, ending in `Answer:`.

    One deviation: the benchmark's code writes two spaces before the subject, this writes one.
    """
    header = (
        f"The following are multiple choice questions (with answers) about {question.subject.replace('_', ' ')}.\n\n"
    )
    return header + "".join(f"{_ask(shot)} {shot.answer}\n\n" for shot in shots) + _ask(question)


def _ask(question: ChoiceQuestion) -> str:
    lines = [question.question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices))]
    return "\n".join([*lines, "Answer:"])


def fit_mmlu_prompt(
    question: ChoiceQuestion, shots: Sequence[ChoiceQuestion], *, count_tokens: Callable[[str], int], max_tokens: int
) -> tuple[str, int]:
    """The prompt with as many of the first five shots as fit into `max_tokens`, and how many those are.

    The last shots are dropped first, as the benchmark does. Returns the prompt without shots even if that is too long;
    the caller must count such a question as not answered.
    """
    for kept in range(min(MMLU_SHOTS, len(shots)), 0, -1):
        prompt = mmlu_prompt(question, shots[:kept])
        if count_tokens(prompt) <= max_tokens:
            return prompt, kept
    return mmlu_prompt(question, []), 0


def choose_letter(logprobs: Sequence[float]) -> str:
    """The letter of the largest of four log-probabilities (" A" to " D"); the first of equal ones, as argmax does."""
    if len(logprobs) != len(LETTERS) or any(math.isnan(value) for value in logprobs):
        raise ValueError(f"found log-probabilities {logprobs}, expected {len(LETTERS)} numbers")
    return LETTERS[max(range(len(LETTERS)), key=lambda i: logprobs[i])]


def read_letter(output: str) -> str | None:
    """The letter that a text answer begins with, as in ` B`, `B.` or `(B) ...`; None for any other text."""
    match = re.match(r"\s*\(?([ABCD])(?![\w'])", output)
    return match[1] if match else None


# ---------------------------------------------------------------------------------------------------------- predictions


def match_texts(path: Path, count: int, limit: int | None) -> tuple[list[Prediction], list[str]]:
    """The predictions of records 0, 1, ... and notices worth showing. Raises DataError."""
    predictions, has_dropped = read_predictions(path)
    return match_predictions(predictions, count, limit, path=path), _notices(path, has_dropped)


def match_completions(
    path: Path, problems: Sequence[CodeProblem], limit: int | None
) -> tuple[list[Prediction], list[str]]:
    """Like match_texts, the output cut to the function's body; or the benchmark's own samples, taken as they are.

    The latter are lines `{"task_id", "completion"}`, one per problem, told by the first line. Raises DataError.
    """
    rows, has_dropped = read_json_lines(path, drop_partial_last_line=True)
    if not rows or "task_id" not in rows[0][1]:
        matched, notices = match_texts(path, len(problems), limit)
        return [replace(prediction, output=cut_completion(prediction.output)) for prediction in matched], notices
    index_of = {problem.task_id: problem.index for problem in problems}
    predictions = []
    for line, row in rows:
        task_id, completion = (_text_of(row, key, f"{path}:{line}") for key in ("task_id", "completion"))
        if task_id not in index_of:
            raise DataError(f"{path}:{line}: found task_id {task_id!a}, expected one of the benchmark's")
        predictions.append(Prediction(index=index_of[task_id], output=completion, format="tl", stop="", line=line))
    return match_predictions(predictions, len(problems), limit, path=path), _notices(path, has_dropped)


def match_choices(path: Path, count: int, limit: int | None) -> tuple[list[Prediction], list[str]]:
    """Like match_texts for lines `{"index", "output": "B"}` or `{"index", "logprobs": [of " A", " B", " C", " D"]}`.

    Where both stand the log-probabilities decide; they arrive as the output that is their letter. Raises DataError.
    """
    rows, has_dropped = read_json_lines(path, drop_partial_last_line=True)
    predictions = []
    for line, row in rows:
        index, stop = row.get("index"), row.get("stop", "")
        if type(index) is not int or not isinstance(stop, str):
            raise DataError(f"{path}:{line}: found index {index!a}, expected the record's number, an integer from 0")
        if "logprobs" in row:
            output = choose_letter(_four_numbers(row["logprobs"], f"{path}:{line}"))
        else:
            output = _text_of(row, "output", f"{path}:{line}")
        predictions.append(Prediction(index=index, output=output, format="tl", stop=stop, line=line))
    return match_predictions(predictions, count, limit, path=path), _notices(path, has_dropped)


def _four_numbers(logprobs: object, where: str) -> list[float]:
    if (
        not isinstance(logprobs, list)
        or len(logprobs) != len(LETTERS)
        or not all(type(value) in (int, float) for value in logprobs)
    ):
        raise DataError(f"{where}: found {logprobs!a:.80} as 'logprobs', expected four numbers, of A to D")
    return logprobs


def _notices(path: Path, has_dropped: bool) -> list[str]:
    return [f"{path}: dropped a partial last line"] if has_dropped else []


def count_notice(path: Path, found: int, published: int) -> list[str]:
    """A notice where an answer file is not the whole published set, so that no rate is taken for the benchmark's."""
    return [] if found == published else [f"{path}: found {found} records, the published set has {published}"]


# ------------------------------------------------------------------------------------------------------------ summaries


def rate_summary(name: str, count: int, n: int) -> dict:
    """`name` -> count, with `_percent` and the 95 % Wilson interval in percent (E20), as in eval/reports/report.py."""
    low, high = wilson_interval(count, n, Z_95)
    return {
        name: count,
        f"{name}_percent": round(100 * count / n, 2),
        f"{name}_interval_95": [round(100 * low, 2), round(100 * high, 2)],
    }


def count_errors(rows: Sequence[dict]) -> dict[str, int]:
    """Number of rows by the category that their `reason` begins with, in alphabetical order."""
    categories = sorted(row["reason"].split(":", 1)[0] for row in rows if row["reason"])
    return {category: categories.count(category) for category in dict.fromkeys(categories)}
