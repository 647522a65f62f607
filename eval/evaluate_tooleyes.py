"""Score ToolEyes' dialogues with tools: DE, CE and VA. File in, file out, no model.

    python -m eval.evaluate_tooleyes --answers tooleyes/Test_Data/scenario_data_zero_processed.json --predictions FILE
        [--output DIR]

What counts as what: docs/multi_turn.md. --predictions has one dialogue per line with the feedback of every call, as
run_eval.py writes them, or is the file of ToolEyes' own loop, unchanged. Nothing is called here.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from data.formats.table import parse_output
from data.json_records import DataError, field_of, read_json_lines
from data.tool_calls import ToolCallError
from data.tool_documents import normalize_tools
from data.trajectories import Message
from eval.benchmarks import BENCHMARKS
from eval.dialogues.journal import RecordedDialogue, read_dialogues
from eval.dialogues.metrics import score_dialogues
from eval.evaluator_command_line import evaluator_parser, read_flags, run_evaluator
from eval.predict.prediction_files import dropped_notice, match_predictions
from eval.records import Record, Scores, ScoreSettings, limited, read_list

LIBRARY = "ToolEyes/Tool_Library/"  # before the name of a tool set in a record's path
SCENARIOS = ("TG", "DU", "RS", "PL", "IR", "AM", "FT")  # eval/evaluate_rotbench.py has their names
# What its loop writes in the model's place, after the ninth turn and where the model itself raised an exception.
FORCED_ENDS = (
    "Thought: I cannot solve this task due to trying too many times.\nAction: finish\n",
    "Thought: During execution, an error occurs.\nAction: finish\n",
)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def load_tooleyes(path: Path) -> list[Record]:
    """Read ToolEyes' scenario_data_zero_processed.json: one record per item, in the file's order, none left out.

    Two ids occur twice, so records are told apart by their index. The tools are those of the system prompt; where the
    benchmark's Tool_Library is next to the file's folder, they must be those of the record's tool set. `meta`:
    `scenario`, and `path` as in the file. Raises DataError with `file:line`.
    """
    library = path.parent.parent / "Tool_Library"
    return [_record(item, index, f"{path}:{line}", library) for index, (line, item) in enumerate(read_list(path))]


@cache
def _tool_set(library: Path, name: str) -> list[dict]:
    file = library / name / "config_gpt4.json"
    try:
        documents = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: found {error.strerror or error}, expected the tools of {name!a}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{file}: found no valid JSON, expected the tools of {name!a}") from None
    return normalize_tools(documents, str(file))


def _record(item: object, index: int, where: str, library: Path) -> Record:
    turns = field_of(item, "conversations", list, where)
    if [turn.get("from") if isinstance(turn, Mapping) else None for turn in turns] != ["system", "user"]:
        raise DataError(f"{where}: found other conversations, expected one of system and one of user")
    system, query = (field_of(turn, "value", str, where) for turn in turns)
    source, scenario = field_of(item, "path", str, where), field_of(item, "scenario", str, where)
    tool_set = source.removeprefix(LIBRARY)
    if scenario not in SCENARIOS:
        raise DataError(f"{where}: found scenario {scenario!a}, expected one of {', '.join(SCENARIOS)}")
    if ".." in tool_set.split("/") or tool_set.startswith("/"):  # it names a folder to be read
        raise DataError(f"{where}: found path {source!a}, expected that of a tool set below {LIBRARY}")
    tools = _tools_of(system, where)
    if library.is_dir() and tools != _tool_set(library, tool_set):
        raise DataError(f"{where}: found other tools than those of {tool_set!a} in {library.name}, expected the same")
    return Record(
        index=index,
        id=field_of(item, "id", str, where),
        tools=tools,
        messages=[Message("user", query)],
        tool_set=tool_set,
        meta={"scenario": scenario, "path": source},
    )


def _tools_of(system: str, where: str) -> list[dict]:
    """The tool list inside the system prompt: from the first square bracket to the one that closes it."""
    try:
        documents, _ = json.JSONDecoder().raw_decode(system, max(system.find("["), 0))
    except (ValueError, RecursionError):
        raise DataError(f"{where}: found no JSON list of tools in the system message, expected one") from None
    return normalize_tools(documents, f"{where}: tools")


# ---------------------------------------------------------------------------------------------------------------------
# Files of ToolEyes' own loop


def read_official_dialogues(path: Path, tasks: Sequence[Record]) -> tuple[list[RecordedDialogue], bool]:
    """The dialogues of a file that ToolEyes' own loop wrote, and whether a partial last line was dropped.

    Each line is `{"id", "conversations": [{"from", "value"}], "path", ..}`: system, user, then assistant in turn with
    function or user. It belongs to the first task of its id that has no line yet. A message of the user after a call
    other than ask_to_user is the loop's own word that the arguments were none. What the loop wrote in the model's place
    is no turn. Raises DataError with `file:line`.
    """
    rows, has_dropped = read_json_lines(path, drop_partial_last_line=True)
    indices: dict[str, list[int]] = {}
    for task in reversed(tasks):
        indices.setdefault(task.id, []).append(task.index)
    dialogues = []
    for line, row in rows:
        where = f"{path}:{line}"
        identity = field_of(row, "id", str, where)
        if not indices.get(identity):
            raise DataError(f"{where}: found id {identity[:40]!a}, expected that of a task without a line so far")
        turns, end = _official_turns(field_of(row, "conversations", list, where), where)
        dialogues.append(RecordedDialogue(indices[identity].pop(), turns, end, "", "react", line))
    return dialogues, has_dropped


def _official_turns(conversations: list, where: str) -> tuple[list[dict], str]:
    """(turns, end) of one conversation, whose first two messages are the system's and the user's."""
    said = [
        (field_of(message, "from", str, where), field_of(message, "value", str, where)) for message in conversations[2:]
    ]
    said = said[:-1] if said and said[-1][0] == "assistant" and said[-1][1].startswith(FORCED_ENDS) else said
    turns: list[dict] = []
    end = "max_turns"
    for number in range(0, len(said), 2):
        role, output = said[number]
        answer_role, answer = said[number + 1] if number + 1 < len(said) else ("", "")
        if role != "assistant" or answer_role not in ("function", "user", "") or end == "finish":
            raise DataError(
                f"{where}: found {role!a} and {answer_role!a} as messages {number + 2} and {number + 3}, "
                "expected one of assistant and one of function or user, up to a call of finish"
            )
        try:
            call = parse_output(output, "react")[0]
        except ToolCallError as error:
            turns.append({"output": output, "calls": [], "fault": str(error)})
            continue
        name, entry = call.name.lower(), {"name": call.name, "arguments": call.arguments}
        if name == "finish":
            end, entry = "finish", {**entry, "feedback": None, "executor": ""}
        elif answer_role == "user" and name != "ask_to_user":
            turns.append({"output": output, "calls": [], "fault": "ToolEyes' loop could not read the arguments"})
            continue
        else:
            entry |= {"feedback": answer, "executor": "user" if name == "ask_to_user" else "recorded"}
        turns.append({"output": output, "calls": [entry], "fault": ""})
    return turns, end


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score_tooleyes(records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
    """Rows, summary and notices for a file of dialogues, ours or of ToolEyes' loop. Raises DataError, `file:line`."""
    lines, _ = read_json_lines(predictions, drop_partial_last_line=True)
    is_official = bool(lines) and "conversations" in lines[0][1]
    found, dropped = read_official_dialogues(predictions, records) if is_official else read_dialogues(predictions)
    dialogues = match_predictions(found, len(records), settings.limit, path=predictions, what="dialogues")
    rows, summary = score_dialogues(dialogues, limited(records, settings.limit), settings.max_turns)
    return Scores(rows, summary, dropped_notice(predictions, dropped))


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = evaluator_parser(
        "evaluate_tooleyes",
        "Score dialogues with tools: DE, CE, VA.",
        answers="the benchmark's scenario_data_zero_processed.json",
        predictions='JSONL of {"index": 0, "turns": [..], "end": "finish", "format": "tl"}, or of '
        'ToolEyes\' own {"id", "conversations": [..], "path"}',
    )
    return run_evaluator(read_flags(parser, arguments), BENCHMARKS["tooleyes"], load_tooleyes, score_tooleyes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
