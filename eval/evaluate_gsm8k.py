"""GSM8K: eight solved problems before the question, the number at the end of the answer. File in, file out, no model.

    python -m eval.evaluate_gsm8k --answers gsm8k/test.jsonl --predictions FILE [--output DIR]

exact_match (primary) is the benchmark's own rule: the first `#### number` of the output, commas removed, equals the
gold text letter by letter. last_number takes the last number before the output starts another question, by value.
The TL-Training paper names the set without a protocol; the choices: docs/evaluation.md.
"""

import re
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path

from data.json_records import DataError, field_of
from eval.benchmarks import BENCHMARKS
from eval.evaluator_command_line import evaluator_parser, read_flags, run_evaluator
from eval.predict.prediction_files import Prediction, read_matched
from eval.rates import summarize_results
from eval.records import Record, Scores, ScoreSettings, limited, read_lines

SHOWN_CHARACTERS = 40  # longest quotation of a number in a reason
MARKED_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")  # the benchmark's own rule
ANY_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*)?\.?\d+", re.ASCII)  # in "10-3" the last number is 3, not -3
NEXT_QUESTION = "\nQuestion:"  # where a base model, done with its answer, invents the next problem
STOP_TEXTS = (NEXT_QUESTION,)

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


# ---------------------------------------------------------------------------------------------------------------------
# Records


def load_gsm8k(path: Path) -> list[Record]:
    """Read lines `{"question", "answer"}`. `meta`: `question`; `solution`, which ends in "#### <answer>".

    Raises DataError with `file:line`.
    """
    records = []
    for line, row in read_lines(path):
        question, solution = (field_of(row, key, str, f"{path}:{line}") for key in ("question", "answer"))
        answer = extract_marked(solution)
        if answer is None:
            raise DataError(f"{path}:{line}: found no '#### number' in the answer, expected one")
        meta = {"question": question, "solution": solution}
        index = len(records)
        records.append(Record(index, id=f"gsm8k/{index}", text=gsm8k_prompt(question), answer=answer, meta=meta))
    return records


def gsm8k_prompt(question: str) -> str:
    """The eight shots, then `Question: ...` and `Answer:` for a model to continue."""
    return f"{GSM8K_SHOTS}Question: {question}\nAnswer:"


def extract_marked(text: str) -> str | None:
    """The benchmark's own extraction: the first `#### number`, commas removed; None where there is none."""
    match = MARKED_NUMBER.search(text)
    return match[1].strip().replace(",", "") if match else None


def extract_last_number(text: str) -> Decimal | None:
    """The last number in `text` before it starts another question; None where there is none."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def evaluate_gsm8k(records: Sequence[Record], predictions: Sequence[Prediction]) -> list[dict]:
    """One row per record: index, exact_match, last_number (0 or 1), reason ("" if exact_match).

    `predictions` are those of `records`, in order.
    """
    return [_score(record, prediction) for record, prediction in zip(records, predictions, strict=True)]


def _score(record: Record, prediction: Prediction) -> dict:
    row = {"index": record.index, "exact_match": 0, "last_number": 0}
    if prediction.stop == "prompt_too_long":
        return {**row, "reason": "no output: the prompt does not fit the model's positions"}
    marked, last = extract_marked(prediction.output), extract_last_number(prediction.output)
    if marked == record.answer:
        reason = ""
    elif marked is None:
        cut = " (output cut at max_new_tokens)" if prediction.stop == "max_new_tokens" else ""
        reason = f"no marked number: found no '#### number'{cut}"
    else:
        reason = f"wrong number: {marked[:SHOWN_CHARACTERS]!a}, expected {record.answer!a}"
    return {
        **row,
        "exact_match": int(not reason),
        "last_number": int(is_same_number(last, record.answer)),
        "reason": reason,
    }


def summarize_gsm8k(rows: Sequence[dict]) -> dict:
    """n, both rates with 95 % intervals, the name of the primary one, errors by category."""
    return {"n": len(rows), "primary": "exact_match", **summarize_results(rows, ("exact_match", "last_number"))}


def score_gsm8k(records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
    """Rows, summary and notices for a prediction file. Raises DataError, `file:line`."""
    matched, notices = read_matched(predictions, len(records), settings.limit)
    rows = evaluate_gsm8k(limited(records, settings.limit), matched)
    return Scores(rows, summarize_gsm8k(rows), notices)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = evaluator_parser(
        "evaluate_gsm8k",
        "Score predictions on GSM8K.",
        answers="the benchmark's test.jsonl",
        predictions='JSONL of {"index": 0, "output": "text"}',
    )
    return run_evaluator(read_flags(parser, arguments), BENCHMARKS["gsm8k"], load_gsm8k, score_gsm8k)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
