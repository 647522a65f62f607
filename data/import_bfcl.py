"""The single-call categories of the wheel bfcl-eval as training data and as held-out prompts, offline.

    python -m data.import_bfcl WHEEL_OR_DIR OUT

Of the categories that are judged without executing anything, those with one call per record are read: simple_python,
multiple, live_simple, live_multiple. Records that share a tool's name or description with the wheel's executable
categories, which are the benchmark bfcl-exec, are dropped, and so are their queries. OUT/train.json has trajectories
(OpenAI form) with the first accepted answer, OUT/heldout.json held-out records with all accepted answers, one per line;
no tool set is in both. The records hold no failed call. With --failing_share S a made-up teacher fails in the share S
of the trajectories: its first call leaves out the last required argument, the tool reports the error, and the right
call follows. It does so only where a tool asks for FAILING_ARGUMENTS arguments or more, so that the mistake is
systematic.
"""

import argparse
import hashlib
import itertools
import json
import lzma
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import parse_arguments, run_command
from data.json_records import DataError, check_text, kind_of, parse_json, write_json_lines, write_text
from data.tool_documents import normalize_tools
from printable import shown, terminal_text

VERSION = "2026.3.23"  # of the wheel; other versions have other records
CATEGORIES = ("simple_python", "multiple", "live_simple", "live_multiple")
TEST_CATEGORIES = ("exec_simple", "exec_multiple", "exec_parallel", "exec_parallel_multiple")
FOLDER = "bfcl_eval/data"
HELD_OUT_RECORDS = 208
FAILING_ARGUMENTS = 3  # required ones; of the 1,674 trajectories 291, or 17 %, have as many
MAX_ANSWERS = 64  # accepted answers kept per held-out record; one record has 524,288
MAX_FILE_BYTES = 32 << 20  # of one file of the wheel; the largest has 4 MB
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}  # other type names are those of JSON Schema
_OMITTED = object()  # a parameter that the accepted call does not have


@dataclass(frozen=True, slots=True)
class BfclRecord:
    """One query with its tools and accepted calls."""

    id: str
    tools: list[dict]  # OpenAI function dicts
    messages: list[dict]  # user, or system and user
    name: str  # of the tool that is called
    answers: list[dict]  # accepted arguments, at least one, the first accepted ones first
    is_cut: bool  # whether there are more than MAX_ANSWERS


# ---------------------------------------------------------------------------------------------------------------------
# The wheel


def read_file(source: Path, name: str) -> str:
    """The text of a file of the wheel, or of the folder that it was unpacked into. Raises DataError."""
    where = f"{source}/{name}"
    path = source / name if source.is_dir() else source
    if path.exists() and not path.is_file():  # reading a pipe or a device may not end
        raise DataError(f"{path}: found no regular file, expected the wheel bfcl-eval {VERSION}")
    try:
        if source.is_dir():
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        else:
            with zipfile.ZipFile(source) as wheel, wheel.open(name) as file:
                content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise DataError(f"{where}: found more than {MAX_FILE_BYTES} bytes, expected fewer")
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{where}: found bytes that are not UTF-8, expected text") from None
    except (KeyError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise DataError(f"{where}: found no readable file ({reason}), expected the wheel bfcl-eval {VERSION}") from None


def check_version(source: Path) -> None:
    """Raise DataError unless the wheel says that it is bfcl-eval VERSION."""
    text = read_file(source, f"bfcl_eval-{VERSION}.dist-info/METADATA")
    head = dict(line.split(": ", 1) for line in text.split("\n\n")[0].split("\n") if ": " in line)
    found = head.get("Name", "").replace("_", "-"), head.get("Version")
    if found != ("bfcl-eval", VERSION):
        raise DataError(f"{source}: found {shown(' '.join(map(str, found)))}, expected bfcl-eval {VERSION}")


def read_rows(source: Path, name: str) -> list[tuple[str, dict]]:
    """(place, object) of the lines of a file. Raises DataError."""
    rows = []
    for number, line in enumerate(read_file(source, name).split("\n"), 1):
        if line.strip():
            where = f"{source}/{name}:{number}"
            row = parse_json(line, where)
            check_text(json.dumps(row, ensure_ascii=False), where)
            if not isinstance(row, dict):
                raise DataError(f"{where}: found {kind_of(row)}, expected an object")
            rows.append((where, row))
    return rows


def field_of(row: object, key: str, kind: type, where: str) -> object:
    """row[key], of the given type. Raises DataError."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        raise DataError(f"{where}: found {key} = {shown(value)}, expected {kind_of(kind())}")
    return value


def query_of(row: dict, where: str) -> list[dict]:
    """The messages of a record of one turn: the user's, maybe after the system's. Raises DataError."""
    turns = field_of(row, "question", list, where)
    messages = turns[0] if len(turns) == 1 and isinstance(turns[0], list) else []
    roles = [field_of(message, "role", str, where) for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise DataError(f"{where}: found messages of {shown(roles)}, expected the user's, maybe after the system's")
    return [{"role": each["role"], "content": field_of(each, "content", str, where)} for each in messages]


# ---------------------------------------------------------------------------------------------------------------------
# Records


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


def accepted_values(accepted: list, schema: object, *, is_required: bool) -> list:
    """The values of one parameter that BFCL accepts, at most MAX_ANSWERS; _OMITTED where it may be left out ("").

    A whole number for a parameter documented as a float becomes a float, as the tool would get it.
    """
    values: list = []
    schema = schema if isinstance(schema, dict) else {}
    for each in accepted:
        if each == "" and not is_required:
            values.append(_OMITTED)
        elif type(each) is int and schema.get("type") == "number":
            values.append(float(each))
        elif isinstance(each, dict):
            values += itertools.islice(accepted_objects(each, schema), MAX_ANSWERS)
        elif isinstance(each, list) and any(isinstance(item, dict) for item in each):
            items = [accepted_values([item], schema.get("items"), is_required=True) for item in each]
            values += itertools.islice(map(list, itertools.product(*items)), MAX_ANSWERS)
        else:
            values.append(each)
    return values[:MAX_ANSWERS]


def accepted_objects(accepted: dict, schema: dict) -> Iterator[dict]:
    """The objects that {name: accepted values} means, those of the first values first."""
    properties = schema.get("properties") if isinstance(schema.get("properties"), dict) else {}
    required = schema.get("required") if isinstance(schema.get("required"), list) else []
    options = []
    for name, values in accepted.items():
        # some records have a value itself, or [] as the value, instead of a list of accepted values
        accepted_list = values if isinstance(values, list) and values else [values]
        options.append(accepted_values(accepted_list, properties.get(name), is_required=name in required))
    for chosen in itertools.product(*options):
        yield {name: value for name, value in zip(accepted, chosen, strict=True) if value is not _OMITTED}


def read_record(row: dict, answer: dict, where: str) -> BfclRecord:
    """One record of a category with its line of possible answers. Raises DataError."""
    identity = field_of(row, "id", str, where)
    if answer.get("id") != identity:
        raise DataError(f"{where}: found the answer of {shown(answer.get('id'))}, expected that of {shown(identity)}")
    tools = normalize_tools(with_json_types(field_of(row, "function", list, where)), f"{where}: function")
    calls = field_of(answer, "ground_truth", list, where)
    if len(calls) != 1 or not isinstance(calls[0], dict) or len(calls[0]) != 1:
        raise DataError(f"{where}: found {len(calls)} accepted calls, expected one of one tool")
    [(name, accepted)] = calls[0].items()
    document = next((tool["function"] for tool in tools if tool["function"]["name"] == name), None)
    if document is None or not isinstance(accepted, dict):
        raise DataError(f"{where}: found an answer of {shown(name)}, expected a call of an offered tool")
    found = itertools.islice(accepted_objects(accepted, document["parameters"]), MAX_ANSWERS + 1)
    answers = list({json.dumps(arguments, sort_keys=True): arguments for arguments in found}.values())
    return BfclRecord(identity, tools, query_of(row, where), name, answers[:MAX_ANSWERS], len(answers) > MAX_ANSWERS)


def read_records(source: Path) -> tuple[list[BfclRecord], int, int]:
    """(records that share nothing with the test set, number dropped for a tool, for a query). Raises DataError."""
    test_tools, test_queries = set(), set()
    for category in TEST_CATEGORIES:
        for where, row in read_rows(source, f"{FOLDER}/unused_datasets/question/BFCL_v4_{category}.json"):
            test_queries.add(query_of(row, where)[-1]["content"])
            for tool in field_of(row, "function", list, where):
                test_tools |= {field_of(tool, key, str, where) for key in ("name", "description")}
    records, n_tools, n_queries, identities = [], 0, 0, set()
    for category in CATEGORIES:
        rows = read_rows(source, f"{FOLDER}/BFCL_v4_{category}.json")
        answers = read_rows(source, f"{FOLDER}/possible_answer/BFCL_v4_{category}.json")
        if len(rows) != len(answers):
            raise DataError(f"{source}: found {len(answers)} answers of {category}, expected {len(rows)}")
        for (where, row), (_, answer) in zip(rows, answers, strict=True):
            try:
                record = read_record(row, answer, where)
            except RecursionError:
                raise DataError(f"{where}: found objects nested too deeply, expected fewer levels") from None
            except OverflowError:
                raise DataError(
                    f"{where}: found a whole number too large for a float, expected a smaller one"
                ) from None
            if record.id in identities:
                raise DataError(f"{where}: found the id {shown(record.id)} a second time, expected each once")
            identities.add(record.id)
            functions = [tool["function"] for tool in record.tools]
            if any({each["name"], str(each.get("description"))} & test_tools for each in functions):
                n_tools += 1
            elif record.messages[-1]["content"] in test_queries:
                n_queries += 1
            else:
                records.append(record)
    return records, n_tools, n_queries


def split_by_tools(records: Sequence[BfclRecord], n_held_out: int) -> tuple[list[BfclRecord], list[BfclRecord]]:
    """(training, held out): whole tool sets go to one side, in the order of a hash, while they fit into n_held_out.

    Held-out records have no place for a system message, so a tool set that has one is trained on.
    """
    groups: dict[str, list[BfclRecord]] = {}
    for record in records:
        names = sorted(tool["function"]["name"] for tool in record.tools)
        groups.setdefault(hashlib.sha256(json.dumps(names).encode()).hexdigest(), []).append(record)
    held_out: list[BfclRecord] = []
    for _, group in sorted(groups.items()):
        has_system = any(len(record.messages) > 1 for record in group)
        if not has_system and len(held_out) + len(group) <= n_held_out:
            held_out += group
    chosen = {id(record) for record in held_out}
    return [each for each in records if id(each) not in chosen], [each for each in records if id(each) in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def trajectory(record: BfclRecord, *, fails: bool = False) -> dict:
    """A training record in OpenAI form: the query and the first accepted call, maybe after one that fails."""
    messages = list(record.messages)
    if fails:
        *_, missing = required_arguments(record)
        arguments = {name: value for name, value in record.answers[0].items() if name != missing}
        feedback = f"Error: missing required argument '{missing}'"
        messages.append(call_message("call_0", record.name, arguments))
        messages.append({"role": "tool", "tool_call_id": "call_0", "content": feedback})
    messages.append(call_message("call_1", record.name, record.answers[0]))
    return {"id": record.id, "tools": record.tools, "messages": messages}


def call_message(identity: str, name: str, arguments: dict) -> dict:
    """An assistant message with one call, in OpenAI form."""
    call = {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def required_arguments(record: BfclRecord) -> list[str]:
    """The required parameters of the tool that is called, in the order of its document; the call has them all."""
    document = next(tool["function"] for tool in record.tools if tool["function"]["name"] == record.name)
    return [name for name in document["parameters"].get("required", []) if name in record.answers[0]]


def choose_failing(records: Sequence[BfclRecord], share: float) -> set[str]:
    """The ids of the trajectories in which the teacher fails: round(share x all), in the order of a hash of the id.

    Raises DataError if fewer records have FAILING_ARGUMENTS required arguments.
    """
    able = [record.id for record in records if len(required_arguments(record)) >= FAILING_ARGUMENTS]
    n_failing = round(share * len(records))
    if n_failing > len(able):
        most = len(able) / len(records)
        raise DataError(
            f"--failing_share: found {share:g}, expected at most {most:.3f}: {len(able)} of {len(records)} "
            f"trajectories have a call with {FAILING_ARGUMENTS} required arguments or more"
        )
    return {*sorted(able, key=lambda identity: hashlib.sha256(identity.encode()).digest())[:n_failing]}


def held_out_record(record: BfclRecord) -> dict:
    """A held-out record: the query and every accepted call."""
    gold = [{"calls": [{"name": record.name, "arguments": each}], "order_free": False} for each in record.answers]
    return {"id": record.id, "tools": record.tools, "messages": record.messages, "gold": gold}


def import_bfcl(source: Path, output: Path, failing_share: float = 0.0) -> str:
    """Write OUT/train.json and OUT/heldout.json; lines that say what is in them. Raises DataError, OSError."""
    check_version(source)
    records, n_tools, n_queries = read_records(source)
    train, held_out = split_by_tools(records, HELD_OUT_RECORDS)
    if not train:
        raise DataError(f"{source}: found {len(records)} records that can be used, expected more than those held out")
    failing = choose_failing(train, failing_share)
    lines = ",\n".join(json.dumps(trajectory(each, fails=each.id in failing)) for each in train)
    write_text(output / "train.json", f"[\n{lines}\n]\n")
    write_json_lines(output / "heldout.json", [held_out_record(each) for each in held_out])
    several = sum(len(each.answers) > 1 for each in train)
    cut = sum(each.is_cut for each in held_out)
    n_answers = sum(len(each.answers) for each in held_out)
    lines = (
        f"{len(records) + n_tools + n_queries} records of {', '.join(CATEGORIES)}",
        f"dropped: {n_tools} with a tool of the executable categories, {n_queries} with one of their queries",
        f"{terminal_text(str(output))}: {len(train)} in train.json, {len(held_out)} in heldout.json, other tool sets",
        f"train.json has the first accepted answer; {several} of its records have more",
        f"made up: {len(failing)} of its trajectories begin with a call that fails",
        f"heldout.json has {n_answers} accepted answers; of {cut} records only the first {MAX_ANSWERS}",
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(prog="python -m data.import_bfcl", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, metavar="WHEEL_OR_DIR", help=f"bfcl-eval {VERSION}, packed or unpacked")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of train.json and heldout.json")
    words = "share of the trajectories that begin with a made-up call that fails, 0 to 1 (%(default)s)"
    parser.add_argument("--failing_share", type=float, default=0.0, metavar="S", help=words)
    flags = parse_arguments(parser, arguments)
    if not 0.0 <= flags.failing_share <= 1.0:
        parser.error(f"--failing_share: found {flags.failing_share:g}, expected 0 to 1")
    return run_command(
        lambda: print(import_bfcl(flags.source, flags.output, flags.failing_share)), (DataError, OSError)
    )


if __name__ == "__main__":
    sys.exit(main())
