"""Evaluation records: `EvalExample`, the loader of the bundled tiny benchmarks, and which file each benchmark is in."""
from dataclasses import dataclass
from pathlib import Path

from data.trajectories import DataError, Message, normalize_tools
from eval.json_lines import read_json_lines
from eval.tool_call_metrics import GoldAnswer, GoldCall

BENCHMARK_FILES = {"tiny-seen": "test_seen.jsonl", "tiny-unseen": "test_unseen.jsonl"}
IMPLICIT_TOOLS = ("finish", "ask_to_user")  # callable in every dialogue, listed or not


@dataclass(frozen=True, slots=True)
class EvalExample:
    """One record of a tool benchmark."""
    index: int                # position in the benchmark's file, from 0; predictions refer to it
    id: str                   # the benchmark's own name of the record; need not be unique
    tools: list[dict]         # offered tools, OpenAI function dicts, in the benchmark's order
    messages: list[Message]   # the dialogue up to the call to be predicted
    gold: tuple[GoldAnswer, ...]  # accepted answers, at least one
    meta: dict                # whatever else the record says


def benchmark_file(name: str, benchmark_dir: Path) -> Path:
    """The answer file of benchmark `name`. Raises DataError for a name that is none."""
    if name not in BENCHMARK_FILES:
        raise DataError(f"--benchmarks: found {name!a}, expected some of {', '.join(BENCHMARK_FILES)}")
    return benchmark_dir / BENCHMARK_FILES[name]


def load_tiny(path: Path) -> list[EvalExample]:
    """Read lines `{"id", "tools", "messages", "gold": [{"calls": [{"name", "arguments"}], "order_free"}], "meta"}`.

    Raises DataError with `file:line`.
    """
    rows, _ = read_json_lines(path, drop_partial_last_line=False)
    if not rows:
        raise DataError(f"{path}: found no record, expected at least one line")
    return [_example(row, index, f"{path}:{line}") for index, (line, row) in enumerate(rows)]


# ---------------------------------------------------------------------------------------------------------------- parts


def _example(row: dict, index: int, where: str) -> EvalExample:
    record_id = _field(row, "id", str, where)
    tools = normalize_tools(_field(row, "tools", list, where), f"{where}: tools")
    offered = {*IMPLICIT_TOOLS, *(tool["function"]["name"] for tool in tools)}
    messages = [_message(message, where) for message in _field(row, "messages", list, where)]
    if not messages:
        raise DataError(f"{where}: found no message, expected at least the user's request")
    gold = tuple(_answer(answer, offered, where) for answer in _field(row, "gold", list, where))
    if not gold:
        raise DataError(f"{where}: found no gold answer, expected at least one")
    return EvalExample(index=index, id=record_id, tools=tools, messages=messages, gold=gold, meta=row.get("meta", {}))


def _field(row: object, name: str, kind: type, where: str) -> object:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}, expected an object with {name!a}")
    if not isinstance(row.get(name), kind):
        found = type(row[name]).__name__ if name in row else "nothing"
        raise DataError(f"{where}: found {found} as {name!a}, expected {kind.__name__}")
    return row[name]


def _message(message: object, where: str) -> Message:
    role = _field(message, "role", str, where)
    if role != "user":
        raise DataError(f"{where}: found a message of role {role!a}, expected user messages only")
    return Message(role="user", content=_field(message, "content", str, where), call=None)


def _answer(answer: object, offered: set[str], where: str) -> GoldAnswer:
    calls = tuple(_gold_call(call, offered, where) for call in _field(answer, "calls", list, where))
    if not calls:
        raise DataError(f"{where}: found a gold answer without calls, expected at least one")
    return GoldAnswer(calls=calls, order_free=_field(answer, "order_free", bool, where))


def _gold_call(call: object, offered: set[str], where: str) -> GoldCall:
    name = _field(call, "name", str, f"{where}: gold call")
    arguments = _field(call, "arguments", dict, f"{where}: gold call")
    wildcards = call.get("wildcards", [])
    if name not in offered:
        raise DataError(f"{where}: found gold tool {name!a}, expected one of the record's tools")
    if not isinstance(wildcards, list) or not all(key in arguments for key in wildcards if isinstance(key, str)) \
            or not all(isinstance(key, str) for key in wildcards):
        raise DataError(f"{where}: found wildcards {wildcards!a}, expected a list of argument names")
    return GoldCall(name=name, arguments=arguments, wildcards=frozenset(wildcards))
