"""Score predictions on BFCL v3's executable categories: file in, file out, no model.

    python -m eval.evaluate_bfcl --answers bfcl_v3_exec/2024-12-19_5bd63a96 --predictions FILE [--rules official]
        [--execute_code] [--output DIR]

A record wants one call or several, in any order; the TL-Training paper does not say how its TS, PI and CF count those.
The rows are scored by the primary variant of `--rules`; the summary has all variants side by side (docs/evaluation.md).
With --execute_code the records whose functions need no network are also judged as BFCL does, by the results of the
calls. Nothing that a model wrote is run as code: its arguments go to our own functions, in the sandbox, since they can
still ask for a factorial without end.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data.formats.call_text import check_count
from data.formats.nexusraven import split_calls
from data.formats.table import FORMATS
from data.import_bfcl import with_json_types
from data.json_records import DataError, field_of
from data.tool_calls import ToolCall, ToolCallError
from data.tool_documents import normalize_tools
from data.trajectories import Message
from eval.benchmarks import BENCHMARKS
from eval.bfcl_functions import FUNCTIONS
from eval.bfcl_source import arithmetic, read_source_calls
from eval.evaluator_command_line import CALL_PREDICTIONS, add_rules, evaluator_parser, read_flags, run_evaluator
from eval.metrics import CallScore, GoldAnswer, GoldCall, can_pair, is_same_tool, score_calls
from eval.predict.prediction_files import Prediction
from eval.predict.react_output import PredictedCalls, read_call_predictions, read_calls
from eval.rates import rate_summary, rates, summarize_results
from eval.records import Record, Scores, ScoreSettings, limited, read_lines
from eval.sandbox.run import SandboxError, run_python
from printable import shown

CATEGORIES = ("simple", "multiple", "parallel", "parallel_multiple")  # the files, in the order of the records' indices

# Variant -> what is compared with what.
VARIANTS = {
    "order_free": "all calls with all gold calls, in any order: primary with --rules fair",
    "ast_checker": "the same by BFCL's AST checker, types of the documents included: primary with --rules official",
    "first_call": "the first call with the first gold call, whatever else is called",
    "any_call": "the first call with any gold call",
}
PRIMARY = {"official": "ast_checker", "fair": "order_free"}

SECONDS, MEMORY_BYTES = 5.0, 512 << 20  # for a process that answers calls; an honest call takes microseconds
CALLS_PER_PROCESS = 256
MAX_ARGUMENT_CHARACTERS = 16384  # of one call as JSON; longer ones are not executed
OUTPUT_BYTES = 4 << 20  # for CALLS_PER_PROCESS results of bfcl_functions.MAX_RESULT_CHARACTERS

_IGNORED = re.compile(r"[ ,./\-_*^]")
_PYTHON_TYPES = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
}
# Formats whose calls are Python source: what an output holds, for BFCL's parser to read.
_SOURCES: dict[str, Callable[[str], Sequence[str]]] = {"tl": lambda text: (text,), "nexusraven": split_calls}


# ---------------------------------------------------------------------------------------------------------------------
# Records


def load_bfcl(folder: Path) -> list[Record]:
    """Read BFCL_v3_exec_<category>.json of all CATEGORIES, in their order: JSON lines with the gold calls as source.

    `gold` is one order-free answer; its integers for parameters documented as float are floats. `meta`: `category`;
    `documents`, the functions as published, with Python's type names; `calls`, the gold calls as written (ToolCall);
    `result_types`, how the benchmark compares their results. Tools have JSON Schema's type names. Raises DataError
    with `file:line`.
    """
    records: list[Record] = []
    for category in CATEGORIES:
        path = folder / f"BFCL_v3_exec_{category}.json"
        records += [
            _record(row, len(records) + number, category, f"{path}:{line}")
            for number, (line, row) in enumerate(read_lines(path))
        ]
    return records


def _record(row: dict, index: int, category: str, where: str) -> Record:
    documents = _documents(row, where)
    tools = normalize_tools(with_json_types(documents), f"{where}: function")
    documents_by_name = {document["name"]: document for document in documents}
    sources = field_of(row, "ground_truth", list, where)
    if not sources:
        raise DataError(f"{where}: found no ground_truth, expected at least one call")
    calls = tuple(_gold_call(source, documents_by_name, where) for source in sources)
    answer = GoldAnswer(tuple(_as_documented(call, documents_by_name[call.name]) for call in calls), order_free=True)
    return Record(
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


def _documents(row: dict, where: str) -> list[dict]:
    """The functions of a row, checked for the form that the benchmark publishes; scoring relies on it."""
    documents = field_of(row, "function", list, where)
    for document in documents:
        name = field_of(document, "name", str, f"{where}: function")
        place = f"{where}: function {name[:40]!a}"
        parameters = field_of(document, "parameters", dict, place)
        schemas = field_of(parameters, "properties", dict, place).values()
        items = [schema["items"] for schema in schemas if isinstance(schema, dict) and "items" in schema]
        if not all(isinstance(each, dict) and isinstance(each.get("type"), str) for each in (*schemas, *items)):
            raise DataError(f"{place}: found a parameter without a type, expected the name of one")
        if not all(isinstance(each, str) for each in field_of(parameters, "required", list, place)):
            raise DataError(f"{place}: found other required parameters, expected a list of names")
    return documents


def _messages(row: dict, where: str) -> list[Message]:
    turns = field_of(row, "question", list, where)
    if len(turns) != 1 or not isinstance(turns[0], list) or len(turns[0]) != 1:
        raise DataError(f"{where}: found a question of several turns or messages, expected one message")
    role = field_of(turns[0][0], "role", str, where)
    if role != "user":
        raise DataError(f"{where}: found a message of role {role!a}, expected user")
    return [Message(role="user", content=field_of(turns[0][0], "content", str, where))]


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
        found = shown(source, 80) if isinstance(source, str) else type(source).__name__
        raise DataError(f"{where}: ground_truth: found {found} ({error}), expected a Python call") from None
    return ToolCall(tree.func.id, arguments)


def _value_of(node: ast.expr) -> object:
    """A literal's value, tuples as lists, or that of arithmetic with literals: two gold calls have 1/6 and 500*500."""
    return arithmetic(node) if isinstance(node, ast.BinOp) else _without_tuples(ast.literal_eval(node))


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
    """The documented parameters, in their order."""
    return document["parameters"]["properties"]


def required_of(document: dict) -> Sequence[str]:
    """Names of the parameters that a call must have."""
    return document["parameters"]["required"]


# ---------------------------------------------------------------------------------------------------------------------
# Values


def standardize(text: str) -> str:
    """A string as BFCL's AST checker compares it: lower case, without ` ,./-_*^`, single quotes as double ones."""
    return _IGNORED.sub("", text).lower().replace("'", '"')


def equal_values(predicted: object, gold: object) -> bool:
    """The AST checker's rule for values without its type faults; `gold` is a float where the document says so.

    Strings as by `standardize`; an integer may stand for a float but not a float for an integer, except in lists, where
    numbers compare as numbers; booleans are no numbers; lists in order, dicts by key.
    """
    if isinstance(gold, str):
        return isinstance(predicted, str) and standardize(predicted) == standardize(gold)
    if isinstance(gold, list):
        return isinstance(predicted, list) and len(predicted) == len(gold) and all(map(_equal_items, predicted, gold))
    if isinstance(gold, dict):
        return (
            isinstance(predicted, dict)
            and predicted.keys() == gold.keys()
            and all(_equal_items(predicted[key], gold[key]) for key in gold)
        )
    if type(gold) is float:
        return type(predicted) in (int, float) and predicted == gold
    return type(predicted) is type(gold) and predicted == gold


def _equal_items(predicted: object, gold: object) -> bool:
    if type(gold) is int:
        return type(predicted) in (int, float) and predicted == gold
    return equal_values(predicted, gold)


def passes_ast_types(predicted: object, gold: object, schema: dict) -> bool:
    """One argument by the AST checker (its type_checker and value checks), the gold value being the only possible one.

    The type is that of the document or that of the gold value, an integer standing for a documented float; the items of
    a list are of the documented type or that of the gold list's first item, which 0.1 and 10 in one list are not.
    """
    expected = _PYTHON_TYPES.get(schema.get("type"))
    if schema.get("type") == "tuple" and isinstance(predicted, tuple):
        predicted = list(predicted)
    found = float if expected is float and type(predicted) is int else type(predicted)
    if found is not expected:
        return found is type(gold) and predicted == gold
    if expected is list and "items" in schema:
        item_types = (
            {_PYTHON_TYPES.get(schema["items"].get("type")), *map(type, gold[:1])} if isinstance(gold, list) else set()
        )
        if not all(type(item) in item_types for item in predicted):
            return False
    if expected is str:
        return isinstance(gold, str) and standardize(predicted) == standardize(gold)
    if expected is list and isinstance(gold, list):
        return [standardize(item) if isinstance(item, str) else item for item in predicted] == [
            standardize(item) if isinstance(item, str) else item for item in gold
        ]
    return predicted == gold


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score_bfcl_calls(calls: Sequence[ToolCall], example: Record, variant: str) -> CallScore:
    """Score the calls of one record by `variant`, a key of VARIANTS. Raises ValueError for another name."""
    if variant not in VARIANTS:
        raise ValueError(f"found variant {variant!a}, expected one of {', '.join(VARIANTS)}")
    answer = example.gold[0]
    if variant == "ast_checker":
        return _score_by_ast(calls, example)
    if variant == "order_free":
        return score_calls(calls, [answer], values_equal=equal_values)
    accepted = answer.calls[:1] if variant == "first_call" else answer.calls
    return score_calls(
        calls[:1], [GoldAnswer((call,), order_free=False) for call in accepted], values_equal=equal_values
    )


def _score_by_ast(calls: Sequence[ToolCall], example: Record) -> CallScore:
    """TS as ever. PI: parameters as the AST checker wants them. CF: its verdict on the record."""
    documents = {document["name"]: document for document in example.meta["documents"]}
    answer = GoldAnswer(calls=example.meta["calls"], order_free=True)  # as written: its types matter

    def has_parameters(call: ToolCall, gold: ToolCall) -> bool:
        document = documents[gold.name]
        return (
            call.name == gold.name
            and call.arguments.keys() == gold.arguments.keys()
            and call.arguments.keys() <= properties_of(document).keys()
            and all(name in call.arguments for name in required_of(document))
        )

    def passes(call: ToolCall, gold: ToolCall) -> bool:
        properties = properties_of(documents[gold.name])
        return has_parameters(call, gold) and all(
            passes_ast_types(value, gold.arguments[name], properties[name]) for name, value in call.arguments.items()
        )

    levels = [can_pair(calls, answer, is_match) for is_match in (is_same_tool, has_parameters, passes)]
    like = score_calls(calls, example.gold, values_equal=equal_values)
    if levels[2] or levels == [like.TS, like.PI, like.CF]:
        reason = "" if levels[2] else like.reason
    else:
        reason = (
            "wrong type: not one of the document's and the gold value's"
            if levels[1]
            else "wrong parameters: not those of the document"
        )
    return CallScore(reason, *levels)


def read_calls_as_bfcl(prediction: Prediction) -> PredictedCalls:
    """As read_calls, but by BFCL's parser where the format's calls are Python source that Python accepts."""
    if prediction.format not in _SOURCES or prediction.stop == "prompt_too_long":
        return read_calls(prediction)
    try:
        pieces = _SOURCES[prediction.format](prediction.output)
        calls = [call for piece in pieces for call in read_source_calls(piece)]
        check_count(len(calls))
    except ToolCallError:
        return read_calls(prediction)
    return PredictedCalls(tuple(calls), "")


# ---------------------------------------------------------------------------------------------------------------------
# Execution


def is_offline(example: Record) -> bool:
    """True if all gold calls are of functions that need no network, with results that must be equal."""
    return all(call.name in FUNCTIONS for call in example.meta["calls"]) and set(example.meta["result_types"]) == {
        "exact_match"
    }


def run_calls(calls: Sequence[ToolCall]) -> tuple[list[dict], dict[str, str]]:
    """For each call {"result": ..} or {"fault": reason}, from our functions in the sandbox; and the limits in force.

    One process answers many calls. Where it ends early, the call that it did not answer gets a process of its own, so
    that none fails for another's sake. Raises SandboxError if the sandbox does not start.
    """
    answers: list[dict] = []
    limits: dict[str, str] = {}
    count = CALLS_PER_PROCESS
    while len(answers) < len(calls):
        batch = calls[len(answers) : len(answers) + count]
        result = run_python(_program(batch), seconds=SECONDS, memory_bytes=MEMORY_BYTES, output_bytes=OUTPUT_BYTES)
        limits = result.limits_applied
        found = [json.loads(line) for line in result.stdout.split("\n")[:-1]]
        answers += found
        if not found and len(batch) == 1:
            answers.append(
                {
                    "fault": f"timed out after {SECONDS:g} s"
                    if result.timed_out
                    else f"process ended: exit code {result.exit_code}"
                }
            )
        count = CALLS_PER_PROCESS if len(found) == len(batch) or len(batch) == 1 else 1
    return answers, limits


def _program(calls: Sequence[ToolCall]) -> str:
    source = Path(__file__).with_name("bfcl_functions.py").read_text(encoding="utf-8")
    text = repr([(call.name, call.arguments) for call in calls])  # JSON would make lists of tuples
    return f"{source}\n\nanswer_calls({text!a})\n"


def match_results(expected: Sequence[dict], found: Sequence[dict]) -> str:
    """ "" if BFCL's checker passes: each expected result takes the first call left over whose result is equal."""
    left = list(found)
    for answer in expected:
        same = next((other for other in left if "result" in other and other["result"] == answer["result"]), None)
        if same is None:
            faults = "; ".join(other["fault"] for other in left if "fault" in other)
            return f"wrong result: no call gives {shown(answer['result'], 80)}" + (
                f" (no result: {faults})"[:200] if faults else ""
            )
        left.remove(same)
    return ""


def execute_bfcl(
    examples: Sequence[Record], predicted: Sequence[PredictedCalls]
) -> tuple[dict[int, str], dict[str, str]]:
    """For each offline record its index -> "" if the results are right, else why not; and the sandbox's limits.

    As in BFCL's checker, as many calls as gold ones are needed, and only their results matter. Raises SandboxError,
    also if a gold call gives no result, since then no prediction can be judged.
    """
    reasons, todo = {}, []
    for example, prediction in zip(examples, predicted, strict=True):
        gold = example.meta["calls"]
        if not is_offline(example):
            continue
        if prediction.fault:
            reasons[example.index] = prediction.fault
        elif len(prediction.calls) != len(gold):
            reasons[example.index] = f"wrong number of calls: {len(prediction.calls)}, expected {len(gold)}"
        elif any(len(json.dumps(call.arguments)) > MAX_ARGUMENT_CHARACTERS for call in prediction.calls):
            reasons[example.index] = f"not executed: more than {MAX_ARGUMENT_CHARACTERS} characters of arguments"
        else:
            todo.append((example, prediction))
    answers, limits = run_calls(
        [call for example, prediction in todo for call in (*example.meta["calls"], *prediction.calls)]
    )
    answers.reverse()
    for example, prediction in todo:
        expected, found = ([answers.pop() for _ in calls] for calls in (example.meta["calls"], prediction.calls))
        faults = [answer["fault"] for answer in expected if "fault" in answer]
        if faults:
            raise SandboxError(f"{example.id}: the gold calls gave no result: {faults[0]}")
        reasons[example.index] = match_results(expected, found)
    return dict(sorted(reasons.items())), limits


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


def evaluate_bfcl(examples: Sequence[Record], predicted: Sequence[PredictedCalls], variant: str) -> list[dict]:
    """One row per record: index, id, category, TS, PI, CF (0 or 1), reason ("" if correct).

    `predicted` are the calls for `examples`, in order; `variant` is a key of VARIANTS.
    """
    rows = []
    for example, prediction in zip(examples, predicted, strict=True):
        fault = prediction.fault
        score = CallScore(fault) if fault else score_bfcl_calls(prediction.calls, example, variant)
        row = {"index": example.index, "id": example.id, "category": example.meta["category"]}
        rows.append({**row, **score.as_row()})
    return rows


def summarize_bfcl(
    examples: Sequence[Record], predictions: Sequence[Prediction], rules: str, *, execute_code: bool
) -> tuple[list[dict], dict]:
    """The rows by the primary variant of `rules`, and a summary with all variants side by side and rates by category.

    With `execute_code` rows of offline records also have `executed` (0 or 1) and `execution_reason`, the summary has
    `execution` over those records, and `sandbox`, the limits in force. Raises SandboxError.
    """
    predicted = [read_calls(prediction) for prediction in predictions]
    read_by_bfcl = [read_calls_as_bfcl(prediction) for prediction in predictions]
    rows_by_variant = {
        variant: evaluate_bfcl(examples, read_by_bfcl if variant == "ast_checker" else predicted, variant)
        for variant in VARIANTS
    }
    rows = rows_by_variant[PRIMARY[rules]]
    groups = {name: [row for row in rows if row["category"] == name] for name in CATEGORIES}
    summary = {
        **summarize_results(rows),
        "rules": rules,
        "primary": PRIMARY[rules],
        "one_call_per_turn": all(FORMATS[prediction.format].has_one_call for prediction in predictions),
        "variants": {variant: rates(scored) for variant, scored in rows_by_variant.items()},
        "by_category": {name: rates(group) for name, group in groups.items() if group},
    }
    if execute_code:
        reasons, limits = execute_bfcl(examples, read_by_bfcl)
        rows = [
            row | {"executed": int(not reasons[row["index"]]), "execution_reason": reasons[row["index"]]}
            if row["index"] in reasons
            else row
            for row in rows
        ]
        passed = sum(not reason for reason in reasons.values())
        summary["execution"] = {"n": len(reasons), **(rate_summary("passed", passed, len(reasons)) if reasons else {})}
        summary["sandbox"] = limits
    return rows, summary


def score_bfcl(records: Sequence[Record], predictions: Path, settings: ScoreSettings) -> Scores:
    """Rows, summary and notices for a prediction file. Raises DataError, `file:line`, and SandboxError."""
    matched, notices = read_call_predictions(predictions, len(records), settings.limit)
    found = summarize_bfcl(
        limited(records, settings.limit), matched, settings.rules, execute_code=settings.execute_code
    )
    return Scores(*found, notices)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    parser = evaluator_parser(
        "evaluate_bfcl",
        "Score tool calls: TS, PI, CF.",
        answers="the benchmark's folder, with BFCL_v3_exec_*.json",
        predictions=CALL_PREDICTIONS,
    )
    add_rules(
        parser,
        BENCHMARKS["bfcl-exec"].rules,
        official="BFCL's AST checker",
        fair="its values, but numbers in lists compare as numbers",
    )
    parser.add_argument(
        "--execute_code",
        action="store_true",
        help="also compare the results of calls that need no network, in the sandbox",
    )
    return run_evaluator(read_flags(parser, arguments), BENCHMARKS["bfcl-exec"], load_bfcl, score_bfcl)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
