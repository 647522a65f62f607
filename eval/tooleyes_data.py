"""ToolEyes' records: 382 queries, each with its tool set (docs/multi_turn.md, docs/benchmarks.md)."""
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from data.trajectories import DataError, Message, normalize_tools
from eval.benchmark_data import field_of
from eval.dialogue_journal import DialogueTask
from eval.json_lines import read_json_list

LIBRARY = "ToolEyes/Tool_Library/"  # before the name of a tool set in a record's path
SCENARIOS = {"TG": "Text Generation", "DU": "Data Understanding", "RS": "Real-Time Search", "PL": "Personal Life",
             "IR": "Information Retrieval", "AM": "Application Manipulation", "FT": "Financial Transactions"}


def load_tooleyes(path: Path) -> list[DialogueTask]:
    """Read ToolEyes' scenario_data_zero_processed.json: one task per record, in the file's order, none left out.

    Two ids occur twice, so records are told apart by their index. The tools are those of the system prompt; where the
    benchmark's Tool_Library lies beside the file's folder, they must be those of the record's tool set. `meta`:
    `scenario`, and `path` as in the file. Raises DataError with `file:line`.
    """
    records = read_json_list(path)
    if not records:
        raise DataError(f"{path}: found no record, expected at least one")
    library = path.parent.parent / "Tool_Library"
    return [_task(record, index, f"{path}:{line}", library) for index, (line, record) in enumerate(records)]


def load_tool_sets(library: Path) -> dict[str, list[dict]]:
    """The tools of every set below a Tool_Library folder, by its name, "Random/Random". Raises DataError."""
    names = sorted(file.parent.relative_to(library).as_posix() for file in library.rglob("config_gpt4.json"))
    if not names:
        raise DataError(f"{library}: found no config_gpt4.json below it, expected ToolEyes' tool sets")
    return {name: _tool_set(library, name) for name in names}


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


def _task(record: object, index: int, where: str, library: Path) -> DialogueTask:
    turns = field_of(record, "conversations", list, where)
    if [turn.get("from") if isinstance(turn, Mapping) else None for turn in turns] != ["system", "user"]:
        raise DataError(f"{where}: found other conversations, expected one of system and one of user")
    system, query = (field_of(turn, "value", str, where) for turn in turns)
    source, scenario = field_of(record, "path", str, where), field_of(record, "scenario", str, where)
    tool_set = source.removeprefix(LIBRARY)
    if scenario not in SCENARIOS:
        raise DataError(f"{where}: found scenario {scenario!a}, expected one of {', '.join(SCENARIOS)}")
    if ".." in tool_set.split("/") or tool_set.startswith("/"):  # it names a folder to be read
        raise DataError(f"{where}: found path {source!a}, expected that of a tool set below {LIBRARY}")
    tools = _tools_of(system, where)
    if library.is_dir() and tools != _tool_set(library, tool_set):
        raise DataError(f"{where}: found other tools than those of {tool_set!a} in {library.name}, expected the same")
    return DialogueTask(index=index, id=field_of(record, "id", str, where), tools=tools,
                        messages=[Message("user", query)], tool_set=tool_set,
                        meta={"scenario": scenario, "path": source})


def _tools_of(system: str, where: str) -> list[dict]:
    """The tool list inside the system prompt: from the first square bracket to the one that closes it."""
    try:
        documents, _ = json.JSONDecoder().raw_decode(system, max(system.find("["), 0))
    except (ValueError, RecursionError):
        raise DataError(f"{where}: found no JSON list of tools in the system message, expected one") from None
    return normalize_tools(documents, f"{where}: tools")
