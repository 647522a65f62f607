"""Evaluation records: `EvalExample`, the loaders of the tool benchmarks, and which file each benchmark is in.

The loader of BFCL, whose gold answers are Python source, is in eval/bfcl_data.py. What the loaders repair or leave as
it is: docs/evaluation.md.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.json_records import DataError, read_json_lines, read_json_list
from data.tool_calls import ToolCall, ToolCallError
from data.tool_documents import normalize_tools
from data.trajectories import Message
from eval.dialogues.journal import DialogueTask
from eval.metrics import GoldAnswer, GoldCall
from eval.predict.react_output import parse_react

# Every benchmark's answer file, or folder of files, below --benchmark_dir.
BENCHMARK_FILES = {
    "tiny-seen": "test_seen.jsonl",
    "tiny-unseen": "test_unseen.jsonl",
    "tiny-multi": "test_multi.jsonl",
    "rotbench-clean": "rotbench/First_Turn/clean.json",
    "rotbench-slight": "rotbench/First_Turn/slight.json",
    "rotbench-medium": "rotbench/First_Turn/medium.json",
    "rotbench-heavy": "rotbench/First_Turn/heavy.json",
    "rotbench-union": "rotbench/First_Turn/union.json",
    "toolalpaca": "toolalpaca/eval_real.masked.json",
    "bfcl-exec": "bfcl_v3_exec/2024-12-19_5bd63a96",
    "tooleyes": "tooleyes/Test_Data/scenario_data_zero_processed.json",
    "mmlu": "mmlu",
    "gsm8k": "gsm8k/test.jsonl",
    "humaneval": "humaneval/HumanEval.jsonl.gz",
}

# Benchmarks of whole dialogues, whose calls are executed; the loader of ToolEyes is in eval/tooleyes_data.py.
DIALOGUE_BENCHMARKS = ("tiny-multi", "tooleyes")

# Records of the published sets: the n that every share is over.
BENCHMARK_COUNTS = {
    "rotbench-clean": 105,
    "rotbench-slight": 210,
    "rotbench-medium": 210,
    "rotbench-heavy": 210,
    "rotbench-union": 105,
    "toolalpaca": 114,
    "bfcl-exec": 240,
    "tooleyes": 382,
    "mmlu": 14042,
    "gsm8k": 1319,
    "humaneval": 164,
}

IMPLICIT_TOOLS = ("finish", "ask_to_user")  # callable in every dialogue, listed or not
MASKED_API_KEY = "MASKED_API_KEY"  # stands in for the keys that ToolAlpaca's gold answers were published with


@dataclass(frozen=True, slots=True)
class EvalExample:
    """One record of a tool benchmark."""

    index: int  # position in the benchmark's file, from 0; predictions refer to it
    id: str  # the benchmark's own name of the record; need not be unique
    tools: list[dict]  # offered tools, OpenAI function dicts, in the benchmark's order
    messages: list[Message]  # the dialogue up to the call to be predicted
    gold: tuple[GoldAnswer, ...]  # accepted answers, at least one
    meta: dict  # whatever else the record says; the loader names the keys


def benchmark_file(name: str, benchmark_dir: Path) -> Path:
    """The answer file of benchmark `name`. Raises DataError for a name that is none."""
    if name not in BENCHMARK_FILES:
        raise DataError(f"--benchmarks: found {name!a}, expected some of {', '.join(BENCHMARK_FILES)}")
    return benchmark_dir / BENCHMARK_FILES[name]


def benchmark_of(answers: Path) -> str:
    """The benchmark's name by the last parts of its path, `First_Turn/clean.json` -> `rotbench-clean`.

    RoTBench's files for a later turn are no benchmark of ours: `Third_Turn/clean.json` -> `rotbench-third-clean`. A
    file name alone is enough; other files keep their stem.
    """
    if answers.parent.name == "Third_Turn":
        return f"rotbench-third-{answers.stem}"
    return next((name for name, path in BENCHMARK_FILES.items() if Path(path).name == answers.name), answers.stem)


def check_count(name: str, found: int, path: Path) -> None:
    """Raise DataError unless `found` records of the published benchmark `name` are as many as were published."""
    expected = BENCHMARK_COUNTS.get(name, found)
    if found != expected:
        raise DataError(f"{path}: found {found} records, expected the {expected} of {name}")


def load_tiny(path: Path) -> list[EvalExample]:
    """Read lines `{"id", "tools", "messages", "gold": [{"calls": [{"name", "arguments"}], "order_free"}], "meta"}`.

    Raises DataError with `file:line`.
    """
    rows, _ = read_json_lines(path, drop_partial_last_line=False)
    if not rows:
        raise DataError(f"{path}: found no record, expected at least one line")
    return [_example(row, index, f"{path}:{line}") for index, (line, row) in enumerate(rows)]


def load_tiny_multi(path: Path) -> list[DialogueTask]:
    """Read lines `{"id", "tools", "messages", "meta": {"scenario", "requests", "calls", "results", "answer"}}`.

    `results` are the texts that a right answer holds, one per request. Raises DataError with `file:line`.
    """
    rows, _ = read_json_lines(path, drop_partial_last_line=False)
    if not rows:
        raise DataError(f"{path}: found no record, expected at least one line")
    return [_dialogue_task(row, index, f"{path}:{line}") for index, (line, row) in enumerate(rows)]


def load_rotbench(path: Path) -> list[EvalExample]:
    """Read RoTBench's own file, a JSON list: first or third turn, clean or with noise.

    `meta`: `scenario`; `finish` and `ask_to_user`, the names that noise has given to the tools in the last place and
    the last but one ("" where there is no such tool); `noise`, "tool" or "parameter" for the halves of slight, medium
    and heavy, else "". In the gold arguments the value "None" marks a wildcard, and of `finish` and `ask_to_user` all
    are. Raises DataError with `file:line`.
    """
    records = _some_records(path)
    halves = path.stem in ("slight", "medium", "heavy") and len(records) % 2 == 0
    examples = []
    for index, (line, record) in enumerate(records):
        noise = ("tool" if index < len(records) // 2 else "parameter") if halves else ""
        examples.append(_rotbench_example(record, index, noise, f"{path}:{line}"))
    return examples


def load_toolalpaca(path: Path) -> list[EvalExample]:
    """Read ToolAlpaca's eval_real.json, masked or not: one example per instruction, in the file's order.

    Tools are the API's documented functions, then `ask_to_user` and `finish`, as in all training data. `gold` is the
    first gold call. `meta`: `api`; `gold_calls`, all calls of the instruction; `authentication`, the names of the API's
    key parameters; `is_documented`, whether the first gold call's function is. API keys in the gold are masked.
    Raises DataError with `file:line`.
    """
    examples: list[EvalExample] = []
    for line, record in _some_records(path):
        where = f"{path}:{line}"
        tools = _toolalpaca_tools(record, where)
        answers = field_of(record, "Golden_Answers", list, where)
        instructions = field_of(record, "Instructions", list, where)
        if len(answers) != len(instructions):
            raise DataError(
                f"{where}: found {len(answers)} Golden_Answers for {len(instructions)} Instructions, expected one each"
            )
        api = field_of(record, "Name", str, where)
        shared_meta = {"api": api, "authentication": sorted(field_of(record, "Authentication", dict, where))}
        documented = {tool["function"]["name"] for tool in tools}
        for number, (instruction, answer) in enumerate(zip(instructions, answers)):
            here = f"{where}: instruction {number}"
            if not isinstance(instruction, str):
                raise DataError(f"{here}: found {type(instruction).__name__}, expected text")
            calls = _toolalpaca_calls(answer, shared_meta["authentication"], here)
            examples.append(
                EvalExample(
                    index=len(examples),
                    id=f"{api}/{number}",
                    tools=tools,
                    messages=[Message(role="user", content=instruction)],
                    gold=(GoldAnswer(calls=(calls[0],), order_free=False),),
                    meta={**shared_meta, "gold_calls": calls, "is_documented": calls[0].name in documented},
                )
            )
    return examples


# ------------------------------------------------------------------------------------------------------ tiny benchmarks


def _example(row: dict, index: int, where: str) -> EvalExample:
    record_id = field_of(row, "id", str, where)
    tools = normalize_tools(field_of(row, "tools", list, where), f"{where}: tools")
    offered = {*IMPLICIT_TOOLS, *(tool["function"]["name"] for tool in tools)}
    messages = [_message(message, where) for message in field_of(row, "messages", list, where)]
    if not messages:
        raise DataError(f"{where}: found no message, expected at least the user's request")
    gold = tuple(_answer(answer, offered, where) for answer in field_of(row, "gold", list, where))
    if not gold:
        raise DataError(f"{where}: found no gold answer, expected at least one")
    return EvalExample(index=index, id=record_id, tools=tools, messages=messages, gold=gold, meta=row.get("meta", {}))


def _dialogue_task(row: dict, index: int, where: str) -> DialogueTask:
    record_id = field_of(row, "id", str, where)
    tools = normalize_tools(field_of(row, "tools", list, where), f"{where}: tools")
    messages = [_message(message, where) for message in field_of(row, "messages", list, where)]
    if not messages:
        raise DataError(f"{where}: found no message, expected at least the user's request")
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
    return DialogueTask(index=index, id=record_id, tools=tools, messages=messages, tool_set="toolbox", meta=meta)


def field_of(row: object, name: str, kind: type, where: str) -> object:
    """`row[name]`, which must be of type `kind`. Raises DataError, prefixed by `where`."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}, expected an object with {name!a}")
    if not isinstance(row.get(name), kind):
        found = type(row[name]).__name__ if name in row else "nothing"
        raise DataError(f"{where}: found {found} as {name!a}, expected {kind.__name__}")
    return row[name]


def _message(message: object, where: str) -> Message:
    role = field_of(message, "role", str, where)
    if role != "user":
        raise DataError(f"{where}: found a message of role {role!a}, expected user messages only")
    return Message(role="user", content=field_of(message, "content", str, where), call=None)


def _answer(answer: object, offered: set[str], where: str) -> GoldAnswer:
    calls = tuple(_gold_call(call, offered, where) for call in field_of(answer, "calls", list, where))
    if not calls:
        raise DataError(f"{where}: found a gold answer without calls, expected at least one")
    return GoldAnswer(calls=calls, order_free=field_of(answer, "order_free", bool, where))


def _gold_call(call: object, offered: set[str], where: str) -> GoldCall:
    name = field_of(call, "name", str, f"{where}: gold call")
    arguments = field_of(call, "arguments", dict, f"{where}: gold call")
    wildcards = call.get("wildcards", [])
    if name not in offered:
        raise DataError(f"{where}: found gold tool {name!a}, expected one of the record's tools")
    if (
        not isinstance(wildcards, list)
        or not all(key in arguments for key in wildcards if isinstance(key, str))
        or not all(isinstance(key, str) for key in wildcards)
    ):
        raise DataError(f"{where}: found wildcards {wildcards!a}, expected a list of argument names")
    return GoldCall(name=name, arguments=arguments, wildcards=frozenset(wildcards))


# ------------------------------------------------------------------------------------------------------------- RoTBench


def _some_records(path: Path) -> list[tuple[int, object]]:
    records = read_json_list(path)
    if not records:
        raise DataError(f"{path}: found no record, expected at least one")
    return records


def _rotbench_example(record: object, index: int, noise: str, where: str) -> EvalExample:
    turns = field_of(record, "conversations", list, where)
    if len(turns) < 3:
        raise DataError(f"{where}: found {len(turns)} conversations, expected system, user and the accepted answers")
    tools = normalize_tools(_rotbench_tools(field_of(turns[0], "value", str, where), where), f"{where}: tools")
    names = ["", "", *(tool["function"]["name"] for tool in tools)]
    meta = {
        "scenario": field_of(record, "scenario", str, where),
        "finish": names[-1],
        "ask_to_user": names[-2],
        "noise": noise,
    }
    answers = field_of(turns[-1], "value", list, where)
    if not answers:
        raise DataError(f"{where}: found no accepted answer, expected at least one")
    return EvalExample(
        index=index,
        id=field_of(record, "id", str, where),
        tools=tools,
        messages=[_rotbench_message(turn, where) for turn in turns[1:-1]],
        gold=tuple(_rotbench_answer(answer, names, where) for answer in answers),
        meta=meta,
    )


def _rotbench_tools(system: str, where: str) -> object:
    """The tool list inside the system prompt: from the first square bracket to the bracket that closes it."""
    start = system.find("[")
    try:
        tools, _ = json.JSONDecoder().raw_decode(system, max(start, 0))
    except (ValueError, RecursionError):
        raise DataError(f"{where}: found no JSON list of tools in the system message, expected one") from None
    return tools


def _rotbench_message(turn: object, where: str) -> Message:
    role, text = field_of(turn, "from", str, where), field_of(turn, "value", str, where)
    if role == "user":
        return Message(role="user", content=text.removesuffix("\nBegin!\n"))
    if role == "function":
        return Message(role="tool", content=text)
    if role != "assistant":
        raise DataError(f"{where}: found role {role!a}, expected user, assistant or function")
    try:
        name, arguments = parse_react(text)
    except ToolCallError as error:
        return Message(role="assistant", content=text, fault=str(error))
    if not isinstance(arguments, dict):
        return Message(role="assistant", content=text, fault=f"found {type(arguments).__name__} as arguments")
    return Message(role="assistant", content=text, call=ToolCall(name, arguments))


def _rotbench_answer(answer: object, names: Sequence[str], where: str) -> GoldAnswer:
    if not isinstance(answer, str):
        raise DataError(f"{where}: found {type(answer).__name__} as accepted answer, expected text")
    try:
        name, arguments = parse_react(answer)
    except ToolCallError as error:
        raise DataError(f"{where}: accepted answer: {error}") from None
    if not isinstance(arguments, dict) or name not in names[2:]:
        raise DataError(f"{where}: found accepted answer {answer[:60]!a}, expected a call of one of the record's tools")
    wildcards = arguments if name in names[-2:] else [key for key, value in arguments.items() if value == "None"]
    return GoldAnswer(
        calls=(GoldCall(name=name, arguments=arguments, wildcards=frozenset(wildcards)),), order_free=False
    )


# ----------------------------------------------------------------------------------------------------------- ToolAlpaca

_SPECIAL_TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {parameter: {"type": "string", "description": meaning}},
                "required": [parameter],
            },
        },
    }
    for name, description, parameter, meaning in (
        ("ask_to_user", "Ask the user for what the request leaves open.", "question", "The question to the user."),
        ("finish", "End the dialogue with an answer to the request.", "answer", "The answer for the user."),
    )
)
_PARAMETER_TEXT = re.compile(r"(Required\. )?(\w+)\.(?:\s+|$)(.*)", re.DOTALL)
_DOUBLED_KEY = re.compile(r'("[^"]+": )\1')  # `"symbols": "symbols": [..]` in four gold inputs of CurrencyBeacon


def _toolalpaca_tools(record: object, where: str) -> list[dict]:
    documents = field_of(record, "Function_Description", dict, where)
    tools = [
        _toolalpaca_tool(name, text, f"{where}: {name!a}") for name, text in documents.items() if name != "components"
    ]  # prose about the types of results
    return normalize_tools([*tools, *_SPECIAL_TOOLS], f"{where}: tools")


def _toolalpaca_tool(name: str, text: object, where: str) -> dict:
    """`description`, `Parameters: {name: "Required. type. description"}`, then what the result looks like."""
    description, mark, rest = text.partition("Parameters: ") if isinstance(text, str) else ("", "", "")
    try:
        parameters, _ = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):
        parameters = None
    if not mark or not isinstance(parameters, dict):
        raise DataError(f"{where}: found no 'Parameters: ' with a JSON object, expected one")
    properties, required = {}, []
    for parameter, spec in parameters.items():
        match = _PARAMETER_TEXT.fullmatch(spec) if isinstance(spec, str) else None
        if match is None:
            raise DataError(f"{where}: found {spec!a} for {parameter!a}, expected 'Required. type. description'")
        properties[parameter] = {"type": match[2], "description": match[3].strip()}
        if match[1]:
            required.append(parameter)
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description.strip(),
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def _toolalpaca_calls(answer: object, authentication: Sequence[str], where: str) -> tuple[GoldCall, ...]:
    if not isinstance(answer, list) or not answer:
        raise DataError(f"{where}: found no gold call, expected at least one")
    calls = []
    for call in answer:
        name, source = field_of(call, "Action", str, where), field_of(call, "Action_Input", str, where)
        try:
            arguments = json.loads(_DOUBLED_KEY.sub(r"\1", source))
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise DataError(f"{where}: found Action_Input {source[:40]!a}, expected a JSON object")
        masked = {key: MASKED_API_KEY for key in authentication if key in arguments}
        calls.append(GoldCall(name=name, arguments={**arguments, **masked}, wildcards=frozenset()))
    return tuple(calls)
