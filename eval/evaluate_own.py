"""Your own dialogues as a benchmark: `python run_eval.py --data FILE`, in any form that training reads.

    python -m eval.evaluate_own --answers FILE --predictions FILE [--output DIR]

Each call of the assistant is a question: what came before it is the dialogue, the call is the only right answer. Left
out are calls that MAE would mask (they fail, contradict the documents or do not parse), those that the file gives no
weight, and calls of `finish` and `ask_to_user`, whose text is free. Records with "gold", as those of tiny-seen, are
read as they are. Scores are those of eval/evaluate_tiny.py: strict after parsing.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.error_filter import decide_masked_turns
from data.gold_records import is_gold_file
from data.json_records import DataError
from data.tool_documents import IMPLICIT_TOOLS
from data.trajectories import Trajectory, read_trajectories
from eval.benchmarks import BENCHMARKS
from eval.evaluate_tiny import load_tiny, score_tiny
from eval.evaluator_command_line import evaluator_parser, read_flags, run_evaluator
from eval.metrics import GoldAnswer, GoldCall, equal_strict
from eval.records import Record, Scores, ScoreSettings

EQUALITY = {"": equal_strict}  # of values, for eval/reports/error_statistics.py


def load_own(path: Path) -> list[Record]:
    """One record per question, in the order of the file; its id is that of the dialogue and the message's position.

    Raises DataError with `file:line`, also for a file without any question.
    """
    if is_gold_file(path):
        return load_tiny(path)
    questions = [
        (trajectory, position)
        for trajectory in read_trajectories(path, unparsable_calls="mask")
        for position, reason in _calls(trajectory)
        if not reason
    ]
    if not questions:
        raise DataError(f"{path}: found no call that can be asked for, expected at least one")
    return [_record(index, *question) for index, question in enumerate(questions)]


def _calls(trajectory: Trajectory) -> list[tuple[int, str]]:
    """The position of each call, with the reason why it is not asked for, "" if it is."""
    calls = []
    for decision in decide_masked_turns(trajectory, "structured"):
        message = trajectory.messages[decision.message_index]
        if message.call is None and not decision.masked:
            continue  # plain text
        is_free = message.call is not None and message.call.name.lower() in IMPLICIT_TOOLS
        reason = decision.category if decision.masked else "weight 0" if message.weight <= 0 else "free text" * is_free
        calls.append((decision.message_index, reason))
    return calls


def left_out_notice(path: Path) -> list[str]:
    """A line on the calls of a file that are no questions, by reason; none for a file of gold calls."""
    if is_gold_file(path):
        return []
    trajectories = read_trajectories(path, unparsable_calls="mask")
    reasons = Counter(reason for trajectory in trajectories for _, reason in _calls(trajectory))
    n_asked = reasons.pop("", 0)
    listing = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())) or "none"
    return [f"{path}: {n_asked} of {n_asked + reasons.total()} calls are questions; left out: {listing}"]


def _record(index: int, trajectory: Trajectory, position: int) -> Record:
    call = trajectory.messages[position].call
    gold = GoldAnswer(calls=(GoldCall(call.name, call.arguments, frozenset()),), order_free=False)
    return Record(
        index=index,
        id=f"{trajectory.id}/{position}",
        tools=trajectory.tools,
        messages=trajectory.messages[:position],
        gold=(gold,),
    )


def score_own(records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
    """As score_tiny. Raises DataError, `file:line`."""
    return score_tiny(records, predictions, settings)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = evaluator_parser(
        "evaluate_own",
        "Score predictions on your own dialogues.",
        answers="dialogues in any form that training reads, or records with gold calls",
        predictions='JSONL of {"index": 0, "output": "text"}, "format" where it is not tl',
    )
    return run_evaluator(read_flags(parser, arguments), BENCHMARKS["own"], load_own, score_own)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
