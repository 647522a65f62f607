"""Score dialogues on the bundled multi-turn benchmark: DE, CE, VA and answer_right. File in, file out, no model.

    python -m eval.evaluate_tiny_multi --answers assets/tiny_data/test_multi.jsonl --predictions FILE [--output DIR]

DE, CE and VA (docs/multi_turn.md) say whether calls worked and whether there was an answer. The world of the bundled
tools is closed, so it is also known what a right answer must hold: `answer_right`.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data.json_records import DataError, field_of
from data.tool_documents import normalize_tools
from eval.benchmarks import BENCHMARKS
from eval.dialogues.journal import RecordedDialogue, read_dialogues
from eval.dialogues.metrics import score_dialogues
from eval.evaluate_tiny import user_messages
from eval.evaluator_command_line import evaluator_parser, read_flags, run_evaluator
from eval.predict.prediction_files import dropped_notice, match_predictions
from eval.rates import rate_summary
from eval.records import Record, Scores, ScoreSettings, limited, read_lines


def load_tiny_multi(path: Path) -> list[Record]:
    """Read lines `{"id", "tools", "messages", "meta": {"scenario", "requests", "calls", "results", "answer"}}`.

    `results` are the texts that a right answer holds, one per request. Raises DataError with `file:line`.
    """
    return [_record(row, index, f"{path}:{line}") for index, (line, row) in enumerate(read_lines(path))]


def _record(row: dict, index: int, where: str) -> Record:
    record_id = field_of(row, "id", str, where)
    tools = normalize_tools(field_of(row, "tools", list, where), f"{where}: tools")
    messages = user_messages(row, where)
    meta = field_of(row, "meta", dict, where)
    field_of(meta, "scenario", str, f"{where}: meta")
    results = field_of(meta, "results", list, f"{where}: meta")
    if not results or not all(isinstance(result, str) and result for result in results):
        raise DataError(
            f"{where}: meta: found results {str(results)[:60]!a}, expected a list of texts, one per request"
        )
    if meta.get("requests") != len(results):
        raise DataError(
            f"{where}: meta: found {str(meta.get('requests'))[:20]} requests and {len(results)} results, "
            "expected as many of each"
        )
    return Record(index=index, id=record_id, tools=tools, messages=messages, tool_set="toolbox", meta=meta)


def is_answer_right(task: Record, dialogue: RecordedDialogue) -> bool:
    """Whether the answer given by `finish` holds every requested result of a tiny-multi task, `meta["results"]`.

    Each must be there letter by letter and as whole words (`calm 6` is not in `calm 61`), in any order, with any text
    around it. The results come from the tools alone and no two of a task are equal, so a right answer shows that every
    right call was made.
    """
    last = dialogue.turns[-1]["calls"][-1:] if dialogue.end == "finish" and dialogue.turns else []
    answer = last[0]["arguments"].get("answer") if last else None
    return isinstance(answer, str) and all(
        re.search(rf"(?<!\w){re.escape(result)}(?!\w)", answer) for result in task.meta["results"]
    )


def add_right_answers(
    rows: Sequence[dict], summary: dict, dialogues: Sequence[RecordedDialogue], tasks: Sequence[Record]
) -> tuple[list[dict], dict]:
    """The rows and the summary of tiny-multi with `answer_right`, also by the number of requests in the query."""
    flags = [is_answer_right(task, dialogue) for task, dialogue in zip(tasks, dialogues, strict=True)]
    by_requests = {}
    for requests in sorted({task.meta["requests"] for task in tasks}):
        part = [flag for task, flag in zip(tasks, flags, strict=True) if task.meta["requests"] == requests]
        by_requests[str(requests)] = {"n": len(part), **rate_summary("answer_right", sum(part), len(part))}
    return [{**row, "answer_right": int(flag)} for row, flag in zip(rows, flags, strict=True)], {
        **summary,
        **rate_summary("answer_right", sum(flags), len(flags)),
        "by_requests": by_requests,
    }


def score_tiny_multi(records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
    """Rows, summary and notices for a file of dialogues. Raises DataError, `file:line`."""
    found, dropped = read_dialogues(predictions)
    dialogues = match_predictions(found, len(records), settings.limit, path=predictions, what="dialogues")
    records = limited(records, settings.limit)
    rows, summary = add_right_answers(*score_dialogues(dialogues, records, settings.max_turns), dialogues, records)
    return Scores(rows, summary, dropped_notice(predictions, dropped))


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = evaluator_parser(
        "evaluate_tiny_multi",
        "Score dialogues with tools: DE, CE, VA, answer_right.",
        answers="test_multi.jsonl",
        predictions='JSONL of {"index": 0, "turns": [..], "end": "finish", "format": "tl"}',
    )
    return run_evaluator(read_flags(parser, arguments), BENCHMARKS["tiny-multi"], load_tiny_multi, score_tiny_multi)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
