"""Records of BFCL v3's executable categories: `load_bfcl` reads four files whose gold answers are Python source."""

import ast
import operator
from collections.abc import Sequence
from pathlib import Path

from data.json_records import DataError, read_json_lines
from data.tool_calls import ToolCall
from data.tool_documents import normalize_tools
from data.trajectories import Message
from eval.benchmark_data import EvalExample, field_of
from eval.metrics import GoldAnswer, GoldCall

CATEGORIES = ("simple", "multiple", "parallel", "parallel_multiple")  # the files, in the order of the records' indices
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}  # other type names are those of JSON Schema

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def load_bfcl(folder: Path) -> list[EvalExample]:
    """Read BFCL_v3_exec_<category>.json of all CATEGORIES, in their order: JSON lines with the gold calls as source.

    `gold` is one order-free answer; its integers for parameters documented as float are floats. `meta`: `category`;
    `documents`, the functions as published, with Python's type names; `calls`, the gold calls as written (ToolCall);
    `result_types`, how the benchmark compares their results. Tools have JSON Schema's type names. Raises DataError
    with `file:line`.
    """
    examples: list[EvalExample] = []
    for category in CATEGORIES:
        path = folder / f"BFCL_v3_exec_{category}.json"
        rows, _ = read_json_lines(path, drop_partial_last_line=False)
        if not rows:
            raise DataError(f"{path}: found no record, expected at least one line")
        examples += [
            _example(row, len(examples) + number, category, f"{path}:{line}") for number, (line, row) in enumerate(rows)
        ]
    return examples


def _example(row: dict, index: int, category: str, where: str) -> EvalExample:
    documents = field_of(row, "function", list, where)
    tools = normalize_tools(with_json_types(documents), f"{where}: function")
    documents_by_name = {document["name"]: document for document in documents}
    sources = field_of(row, "ground_truth", list, where)
    if not sources:
        raise DataError(f"{where}: found no ground_truth, expected at least one call")
    calls = tuple(_gold_call(source, documents_by_name, where) for source in sources)
    answer = GoldAnswer(tuple(_as_documented(call, documents_by_name[call.name]) for call in calls), order_free=True)
    return EvalExample(
        index=index,
        id=field_of(row, "id", str, where),
        tools=tools,
        messages=_messages(row, where),
        gold=(answer,),
        meta={
            "category": category,
            "documents": documents,
            "calls": calls,
            "result_types": field_of(row, "execution_result_type", list, where),
        },
    )


def _messages(row: dict, where: str) -> list[Message]:
    turns = field_of(row, "question", list, where)
    if len(turns) != 1 or not isinstance(turns[0], list) or len(turns[0]) != 1:
        raise DataError(f"{where}: found a question of several turns or messages, expected one message")
    role = field_of(turns[0][0], "role", str, where)
    if role != "user":
        raise DataError(f"{where}: found a message of role {role!a}, expected user")
    return [Message(role="user", content=field_of(turns[0][0], "content", str, where))]


def with_json_types(schema: object) -> object:
    """A copy of a schema in which `"type": "dict"`, `"float"` and `"tuple"` are JSON Schema's names."""
    if isinstance(schema, list):
        return [with_json_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: JSON_TYPES.get(value, value) if key == "type" and isinstance(value, str) else with_json_types(value)
        for key, value in schema.items()
    }


# ----------------------------------------------------------------------------------------------------------- gold calls


def _gold_call(source: object, documents: dict[str, dict], where: str) -> ToolCall:
    """The call that a line of Python source writes; positional arguments take the documented names in their order."""
    try:
        tree = ast.parse(source, mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.func.id not in documents:
            raise ValueError("expected a call of one of the record's functions")
        names = [*properties_of(documents[tree.func.id])]
        named = [*zip(names, tree.args), *((keyword.arg, keyword.value) for keyword in tree.keywords)]
        arguments = {name: _value_of(node) for name, node in named}
        if len(tree.args) > len(names) or len(arguments) != len(named) or None in arguments:
            raise ValueError("expected each argument once, by a name")
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        shown = ascii(source)[:80] if isinstance(source, str) else type(source).__name__
        raise DataError(f"{where}: ground_truth: found {shown} ({error}), expected a Python call") from None
    return ToolCall(tree.func.id, arguments)


def _value_of(node: ast.expr) -> object:
    """A literal's value, tuples as lists, or that of arithmetic with numbers: two gold calls have 1/6 and 500*500."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value_of(node.left), _value_of(node.right)
        if not all(type(value) in (int, float) for value in (left, right)):
            raise ValueError("expected arithmetic with numbers only")
        return _OPERATORS[type(node.op)](left, right)
    return _without_tuples(ast.literal_eval(node))


def _without_tuples(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_without_tuples(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("expected strings as keys")
        return {key: _without_tuples(item) for key, item in value.items()}
    if not isinstance(value, (str, int, float)) and value is not None:
        raise ValueError(f"expected no {type(value).__name__}")
    return value


def _as_documented(call: ToolCall, document: dict) -> GoldCall:
    properties = properties_of(document)

    def documented(name: str, value: object) -> object:
        return float(value) if type(value) is int and properties.get(name, {}).get("type") == "float" else value

    return GoldCall(
        name=call.name,
        wildcards=frozenset(),
        arguments={name: documented(name, value) for name, value in call.arguments.items()},
    )


def properties_of(document: dict) -> dict[str, dict]:
    """The documented parameters, in their order, as normalize_tools has already checked them."""
    return (document.get("parameters") or {}).get("properties") or {}


def required_of(document: dict) -> Sequence[str]:
    """Names of the parameters that a call must have."""
    return (document.get("parameters") or {}).get("required") or document.get("required") or []
