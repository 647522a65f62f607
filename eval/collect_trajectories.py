"""Training trajectories from a teacher: a model or an endpoint works through queries, every call executed.

    python -m eval.collect_trajectories --model runs/sft/final --queries assets/tiny_data/test_multi.jsonl --output FILE
    python -m eval.collect_trajectories --endpoint http://HOST:PORT/v1 --model NAME --prompt_format openai \
        --queries queries.jsonl --temperature 0.7 --output FILE

FILE gets the authors' raw form (docs/data_format.md), one record per line, calls that failed and their feedback
included: `run_sft.py --data FILE` masks them. The dialogues themselves stay in FILE.dialogues.jsonl; a killed run goes
on with the same command and ends with the same bytes. At the end: the error categories of the calls, as in the paper's
Figure 1. Rules and flags: docs/evaluation.md.
"""

import argparse
import fcntl
import functools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from command_line import parse_arguments, polite_stop, run_command
from data.formats.prompt_format import PromptError
from data.formats.table import COMPLETION_FORMATS, PROMPT_FORMATS, encode_prompt
from data.json_records import DataError, field_of, open_lock, read_json_lines, read_json_list, write_text
from data.tool_documents import normalize_tools
from data.trained_format import AUTO_FORMAT, choose_format
from data.trajectories import Message, read_trajectories
from eval.dialogues.journal import DialogueJournal, RecordedDialogue, read_dialogues
from eval.dialogues.local_tools import TOOLBOX
from eval.dialogues.metrics import MAX_TURNS
from eval.dialogues.play import (
    DialogueSettings,
    complete_dialogues,
    format_reminder,
    run_dialogues_with_endpoint,
    run_dialogues_with_model,
)
from eval.dialogues.tools import EXECUTOR_KINDS, ExecutorSettings, ToolExecutor
from eval.evaluate_rotbench import load_rotbench
from eval.evaluate_tooleyes import load_tooleyes
from eval.predict.endpoint import Endpoint, check_key_variable, check_url, make_endpoint
from eval.predict.generate import LocalModel, answers_sha256, check_settings, folder_sha256
from eval.predict.prediction_files import match_predictions
from eval.records import Record
from eval.reports.error_statistics import classify_turns, format_turns, summarize_turns
from eval.sandbox.run import end_sandboxes
from model.pretrained_weights import ModelFolderError, load_pretrained
from model.tokenizer import check_vocabulary_fits, load_tokenizer
from printable import json_line, terminal_text
from toolbox.make import trajectories_text
from toolbox.world import build_toolbox

USER_ROLES = ("system", "user")  # what a query may begin with; the teacher says the rest
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


# ---------------------------------------------------------------------------------------------------------------------
# Queries


def read_queries(path: Path) -> list[Record]:
    """What the teacher is asked: the queries of a file in any of these forms, told apart by its first record.

    JSON list: ToolEyes (`path`), RoTBench (`from`, `value`), training data in the authors' form. JSON lines:
    `{"tools", "messages"}`, which tiny-multi and the OpenAI form of training data are. Answers in the file are left
    aside. Raises DataError, `file:line`.
    """
    first = _first_record(path)
    turns = first.get("conversations")
    has_answers = any(
        isinstance(message, dict) and message.get("role") == "assistant"
        for message in turns or first.get("messages") or []
    )
    if isinstance(turns, list) and "path" in first:
        return load_tooleyes(path)
    if isinstance(turns, list) and not has_answers:
        return [_query(example.index, example.id, example.tools, example.messages) for example in load_rotbench(path)]
    if has_answers:
        return [
            _query(index, trajectory.id, trajectory.tools, trajectory.messages)
            for index, trajectory in enumerate(read_trajectories(path, unparsable_calls="mask"))
        ]
    rows, _ = read_json_lines(path, drop_partial_last_line=False)
    return [_query_of_line(row, index, f"{path}:{line}") for index, (line, row) in enumerate(rows)]


def _first_record(path: Path) -> dict:
    try:
        start = path.read_bytes()[:4096].decode("utf-8-sig", "replace").lstrip()
    except OSError as error:
        raise DataError(f"{path}: found {error.strerror or error}, expected a file of queries") from None
    records = read_json_list(path) if start.startswith("[") else read_json_lines(path, drop_partial_last_line=False)[0]
    if not records or not isinstance(records[0][1], dict):
        raise DataError(f"{path}: found no record, expected queries: objects with tools and messages")
    return records[0][1]


def _query_of_line(row: dict, index: int, where: str) -> Record:
    messages = []
    for message in field_of(row, "messages", list, where):
        role = field_of(message, "role", str, where)
        if role not in USER_ROLES:
            raise DataError(f"{where}: found role {role!a}, expected {' or '.join(USER_ROLES)}")
        messages.append(Message(role, _encodable(field_of(message, "content", str, where))))
    if not any(message.role == "user" for message in messages):
        raise DataError(f"{where}: found no message of the user, expected the query")
    tools = normalize_tools(field_of(row, "tools", list, where), f"{where}: tools")
    return _query(index, row["id"] if isinstance(row.get("id"), str) else str(index), tools, messages)


def _query(index: int, identity: str, tools: list[dict], messages: Sequence[Message]) -> Record:
    """The task of a record: the messages before its first answer; local tools where its documents are the toolbox's."""
    answers = [number for number, message in enumerate(messages) if message.role not in USER_ROLES]
    asked = list(messages[: answers[0]] if answers else messages)
    return Record(index, identity, tools, asked, tool_set=TOOLBOX if is_toolbox(tools) else "")


@functools.cache
def _toolbox_documents() -> dict[str, dict]:
    return {tool["function"]["name"]: tool for unseen in (False, True) for tool in build_toolbox(unseen)}


def is_toolbox(tools: Sequence[dict]) -> bool:
    """Whether all tools, but for `ask_to_user` and `finish`, are those of the toolbox world, document by document."""
    documents = [tool for tool in tools if tool["function"]["name"] not in ("ask_to_user", "finish")]
    return bool(documents) and all(_toolbox_documents().get(tool["function"]["name"]) == tool for tool in documents)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def authors_record(identity: str, task: Record, dialogue: RecordedDialogue, *, keeps_unparsable: bool) -> dict | None:
    """One dialogue in the authors' raw form, None if no call is left of it.

    Each call is a message of its own (`name`, a newline, its arguments as JSON), followed by its feedback as
    `function`, also where one output held several calls. An output that is not a call has no place in that form: it is
    left out with the reminder that followed, or, with `keeps_unparsable`, kept as it is (run_sft.py --unparsable_calls
    mask).
    """
    tools = json.dumps([tool["function"] for tool in task.tools])
    conversations = [{"role": "system", "content": tools}]
    # The form has one system message, the tools; what a system text said goes to the user's words.
    conversations += [{"role": "user", "content": message.content} for message in task.messages]
    start = len(conversations)
    for turn in dialogue.turns:
        if turn["fault"] and keeps_unparsable:
            conversations += [
                {"role": "assistant", "content": _encodable(turn["output"])},
                {"role": "user", "content": format_reminder(dialogue.format)},
            ]
        for call in turn["calls"]:
            words = f"{call['name']}\n{json.dumps(call['arguments'])}"
            conversations.append({"role": "assistant", "content": words})
            if call["feedback"] is not None:
                conversations.append({"role": "function", "content": _encodable(call["feedback"])})
    return {"id": identity, "conversations": conversations} if len(conversations) > start else None


def _encodable(text: str) -> str:
    """Text that UTF-8 can hold: a tool may echo half of a surrogate pair that the model wrote."""
    return _LONE_SURROGATE.sub("\ufffd", text)


# ---------------------------------------------------------------------------------------------------------------------
# Whole file


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What became of the dialogues."""

    records: list[dict]  # in the authors' form
    counts: dict[str, int]  # of dialogues and turns left out, by reason


def authors_records(
    tasks: Sequence[Record], dialogues: Sequence[RecordedDialogue], *, keeps_unfinished: bool, keeps_unparsable: bool
) -> WrittenFile:
    """The records of the dialogues that are training data; an id that occurs again gets its index appended.

    A dialogue without `finish` shows no way to an answer: it is left out unless `keeps_unfinished`.
    """
    records, counts, seen = [], Counter(), set()
    for task, dialogue in zip(tasks, dialogues, strict=True):
        counts["turns that are not a call"] += sum(bool(turn["fault"]) for turn in dialogue.turns)
        if dialogue.end != "finish":
            counts[f"dialogues without finish ({dialogue.end})"] += 1
            if not keeps_unfinished:
                continue
        identity = task.id if task.id not in seen else f"{task.id} ({task.index})"
        seen.add(identity)
        record = authors_record(identity, task, dialogue, keeps_unparsable=keeps_unparsable)
        if record is None:
            counts["dialogues without any call"] += 1
        else:
            records.append(record)
    return WrittenFile(records, dict(counts))


def collect(flags: argparse.Namespace) -> str:
    """Do what the flags ask; the statistics to show. Raises DataError, PromptError, ModelFolderError, OSError."""
    tasks = read_queries(flags.queries)[: flags.limit]
    flags.prompt_format, line = choose_format(flags.prompt_format, None if flags.endpoint else flags.model)
    if line:
        print(terminal_text(line), file=sys.stderr)
    path = flags.output.with_name(flags.output.name + ".dialogues.jsonl")
    teacher = read_endpoint(flags) if flags.endpoint else load_teacher(flags, tasks[0])
    source = (
        {"endpoint": flags.endpoint, "model": flags.model}
        if flags.endpoint
        else {"model_sha256": folder_sha256(Path(flags.model)), "dtype": flags.dtype, "device": flags.device}
    )
    settings = {
        **source,
        "queries_sha256": answers_sha256(flags.queries),
        **{name: getattr(flags, name) for name in DECIDING_FLAGS},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path.with_suffix(".lock")) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{flags.output}: found another process at work on it, expected none") from None
        check_settings(path, settings, resume="auto", is_writer=True)
        notices = complete_dialogues(path, tasks, player_of(flags, teacher), prompt_format=flags.prompt_format, rank=0)
    for notice in notices:
        print(terminal_text(notice), file=sys.stderr)
    found = [dialogue for dialogue in read_dialogues(path)[0] if dialogue.index < len(tasks)]
    dialogues = match_predictions(found, len(tasks), None, path=path, what="dialogues")
    written = authors_records(
        tasks, dialogues, keeps_unfinished=flags.unfinished == "keep", keeps_unparsable=flags.unparsable == "keep"
    )
    if not written.records:
        raise DataError(
            f"{path}: found no dialogue to write among {len(dialogues)} ({_shown(written.counts)}), "
            "expected at least one that ends with finish"
        )
    write_text(flags.output, trajectories_text(written.records))
    return describe(flags, written, len(dialogues))


def describe(flags: argparse.Namespace, written: WrittenFile, n_dialogues: int) -> str:
    """What was written, what was left out, and the error categories of the file's calls (Figure 1)."""
    trajectories = read_trajectories(flags.output, unparsable_calls="mask")
    rows = classify_turns(trajectories)
    summary = summarize_turns(trajectories, rows)
    found = {"dialogues": n_dialogues, "written": len(written.records), **written.counts}
    left_out = f"{_shown(written.counts)} (--unfinished {flags.unfinished}, --unparsable {flags.unparsable})"
    output = terminal_text(str(flags.output))
    return (
        f"{format_turns(summary)}\n\n{len(written.records)} of {n_dialogues} dialogues written to {output}; {left_out}"
        f"\n\n{json_line({**found, **summary})}"
    )


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing left out"


def load_teacher(flags: argparse.Namespace, first: Record) -> LocalModel:
    """The model of --model on its device, with its tokenizer. Raises ModelFolderError, DataError, PromptError."""
    tokenizer = load_tokenizer(flags.model)
    encode_prompt(first.tools, first.messages, tokenizer, flags.prompt_format)  # has it the format's tokens?
    model = load_pretrained(
        flags.model, dtype=torch.bfloat16 if flags.dtype == "bfloat16" else torch.float32, device=flags.device
    )
    check_vocabulary_fits(tokenizer, model.config.vocab_size)
    if flags.max_new_tokens >= model.config.max_positions:
        raise DataError(
            f"--max_new_tokens: found {flags.max_new_tokens}, expected less than the model's "
            f"{model.config.max_positions} positions"
        )
    return LocalModel(model.eval(), tokenizer, rank=0, world_size=1)


def read_endpoint(flags: argparse.Namespace) -> Endpoint:
    """The endpoint of the flags, with its key from the environment."""
    return make_endpoint(
        flags.endpoint,
        flags.model,
        key_variable=flags.endpoint_key,
        timeout=flags.endpoint_timeout,
        attempts=flags.endpoint_attempts,
        concurrency=flags.endpoint_concurrency,
    )


def player_of(
    flags: argparse.Namespace, teacher: LocalModel | Endpoint
) -> Callable[[list[Record], DialogueJournal], None]:
    """The function that plays some dialogues with the teacher."""
    settings = DialogueSettings(
        prompt_format=flags.prompt_format,
        max_new_tokens=flags.max_new_tokens,
        max_turns=flags.max_turns,
        temperature=flags.temperature,
        seed=flags.seed,
        batch_size=flags.batch_size,
        max_dialogue_tokens=flags.max_dialogue_tokens,
    )
    tools = ExecutorSettings(
        flags.tool_executor,
        seed=flags.seed,
        instability_rate=flags.instability_rate,
        failure_rate=flags.call_failure_rate,
        execute_code=flags.execute_code,
    )
    run = run_dialogues_with_endpoint if isinstance(teacher, Endpoint) else run_dialogues_with_model

    def play(missing: list[Record], journal: DialogueJournal) -> None:
        with ToolExecutor(tools) as execute:
            run(missing, teacher, settings, execute=execute, journal=journal)
            for notice in execute.notices:
                print(terminal_text(notice), file=sys.stderr)

    return play


# ---------------------------------------------------------------------------------------------------------------------
# Command line

# What decides the dialogues, with model and queries: a run continues only where these are the same.
DECIDING_FLAGS = (
    "prompt_format",
    "max_turns",
    "max_new_tokens",
    "max_dialogue_tokens",
    "temperature",
    "seed",
    "tool_executor",
    "instability_rate",
    "call_failure_rate",
    "execute_code",
)


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags; wrong ones end the program with one line and code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.collect_trajectories",
        description="Let a teacher work through queries; write training trajectories.",
    )
    add = parser.add_argument
    add("--model", default="runs/sft/final", help="folder of the teacher; with --endpoint its name there (%(default)s)")
    add("--endpoint", type=_url, default="", help="base URL of an OpenAI-compatible server (default: the model folder)")
    add("--endpoint_key", type=_key_variable, default="OPENAI_API_KEY", help="variable with its key (%(default)s)")
    add("--endpoint_timeout", type=float, default=120.0, help="seconds for one request (%(default)s)")
    add("--endpoint_attempts", type=int, default=6, help="requests per turn before the run ends (%(default)s)")
    add("--endpoint_concurrency", type=int, default=8, help="dialogues at a time (%(default)s)")
    add(
        "--queries",
        type=Path,
        required=True,
        help="tools and queries: ToolEyes, RoTBench, tiny-multi, training data, "
        'or JSON lines {"id", "tools", "messages"}',
    )
    add("--output", type=Path, required=True, help="file of the trajectories, authors' form")
    add(
        "--prompt_format",
        choices=(AUTO_FORMAT, *PROMPT_FORMATS),
        default=AUTO_FORMAT,
        help="prompts and calls (%(default)s: that of the model folder's training, else tl)",
    )
    add("--tool_executor", choices=EXECUTOR_KINDS, default="auto", help="who answers the calls (%(default)s)")
    add("--instability_rate", type=float, default=0.0, help="share of simulated calls that find the service down")
    add("--call_failure_rate", type=float, default=0.0, help="share of simulated calls that the tool fails on")
    add("--execute_code", action="store_true", help="run code that the teacher wrote, in the sandbox")
    add("--max_turns", type=int, default=MAX_TURNS, help="outputs of a dialogue, 1 to 9 (%(default)s)")
    add("--max_new_tokens", type=int, default=512, help="longest output, tokens (%(default)s)")
    add("--max_dialogue_tokens", type=int, default=8192, help="prompt and output together (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 = greedy; above, one draw per turn (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the draws and of the tools (%(default)s)")
    add("--batch_size", type=int, default=32, help="dialogues side by side; memory and speed only (%(default)s)")
    add("--limit", type=int, help="only the first N queries (default: all)")
    add("--unfinished", choices=("drop", "keep"), default="drop", help="dialogues without finish (%(default)s)")
    add(
        "--unparsable",
        choices=("drop", "keep"),
        default="drop",
        help="outputs that are not a call; kept ones need run_sft.py --unparsable_calls mask (%(default)s)",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of the model (%(default)s)")
    flags = parse_arguments(parser, arguments)
    _check_flags(parser, flags)
    return flags


def _check_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    for name, low, high in (
        ("limit", 1, None),
        ("max_turns", 1, MAX_TURNS),
        ("max_new_tokens", 1, None),
        ("max_dialogue_tokens", 2, None),
        ("batch_size", 1, None),
        ("seed", 0, None),
        ("temperature", 0, 100),
        ("instability_rate", 0, 1),
        ("call_failure_rate", 0, 1),
        ("endpoint_timeout", 0.1, 86400),
        ("endpoint_attempts", 1, None),
        ("endpoint_concurrency", 1, None),
    ):
        value = getattr(flags, name)
        if value is not None and not (low <= value <= (math.inf if high is None else high)):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            parser.error(f"--{name}: found {value}, expected {bounds}")
    if flags.instability_rate + flags.call_failure_rate > 1:
        parser.error("--instability_rate: found more than 1 together with --call_failure_rate, expected at most 1")
    if flags.prompt_format not in (AUTO_FORMAT, *COMPLETION_FORMATS) and not flags.endpoint:
        parser.error(
            f"--prompt_format: found {flags.prompt_format} without --endpoint, expected the chat API of a server"
        )


def _url(text: str) -> str:
    return _checked(text, check_url) if text else text


def _key_variable(text: str) -> str:
    return _checked(text, check_key_variable)


def _checked(text: str, check: Callable[[str], None]) -> str:
    """`text` if `check` raises no ValueError; argparse would show the text itself."""
    try:
        check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


@polite_stop("turns so far are kept; the same command continues", end_sandboxes)
def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr. The last line of stdout is one JSON object."""
    flags = read_flags(arguments)

    return run_command(lambda: print(collect(flags)), (DataError, ModelFolderError, PromptError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
