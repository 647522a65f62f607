"""Dialogues with tools: a model or an endpoint, at most nine turns, batched, journaled, resumed (docs/multi_turn.md).

One turn is one output of the model. Its calls are answered in order; `finish` ends the dialogue, `ask_to_user` gets a
fixed reply, an output that is not a call gets a reminder of the format. `execute` of eval/dialogues/tools.py answers
the other calls. Later prompts repeat the model's own text word for word.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.formats.prompt_format import WrittenTurn, find_stop_ids
from data.formats.table import FORMATS, encode_prompt, parse_output, prompt_text
from data.json_records import DataError
from data.tool_calls import ToolCall, ToolCallError
from data.trajectories import Message
from eval.dialogues.journal import (
    DialogueJournal,
    RecordedDialogue,
    close_journals,
    read_dialogues,
    read_journals,
    rewrite_journals,
)
from eval.dialogues.metrics import MAX_TURNS
from eval.dialogues.tools import MAX_FEEDBACK_CHARACTERS, Executor, ToolRequest
from eval.predict.cut_output import cut_at
from eval.predict.endpoint import (
    REFUSALS_TO_STOP,
    Answer,
    Endpoint,
    EndpointError,
    chat,
    complete,
    completed_text,
    message_text,
)
from eval.predict.generate import LocalModel, join_journals, read_response
from eval.predict.journals import describe_resume
from eval.records import Record
from model.decode import DecodeWeights
from model.dialogue_decoding import DialogueDecoder
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from printable import terminal_text

USER_REPLY = "Please proceed with the information I gave you."  # the answer to every ask_to_user: there is no human
FORMAT_REMINDER = (
    "Your output format does not match the specified format, please revise your answer to follow the desired format."
)


@dataclass(frozen=True, slots=True)
class DialogueSettings:
    """How all dialogues of a file are played."""

    prompt_format: str
    max_new_tokens: int  # of one turn
    max_turns: int = MAX_TURNS
    temperature: float = 0.0
    # For a model of ours only:
    seed: int = 0  # of sampling
    batch_size: int = 1  # dialogues at a time
    max_dialogue_tokens: int | None = None  # room for prompt and answer of the last turn; None: the model's positions


def format_reminder(prompt_format: str) -> str:
    """The user message after an output that is not a call; data.error_filter reads it as `unparsable`."""
    form = FORMATS[prompt_format].reminder
    return f"{FORMAT_REMINDER}\n\n{form}" if form else FORMAT_REMINDER


def is_finish(name: str) -> bool:
    """Whether a tool of this name ends the dialogue; letter case does not count, as in ToolEyes' loop."""
    return name.lower() == "finish"


def is_question(name: str) -> bool:
    """Whether a tool of this name asks the user."""
    return name.lower() == "ask_to_user"


# ---------------------------------------------------------------------------------------------------------------------
# One dialogue


class Dialogue:
    """One running dialogue.

    State: its messages so far, the number of its turns, how often each call was made, how it ended ("" while it runs).
    """

    def __init__(
        self, task: Record, settings: DialogueSettings, *, execute: Executor, journal: DialogueJournal
    ) -> None:
        self.task = task
        self.messages: list[Message | WrittenTurn] = list(task.messages)
        self.n_turns = 0
        self.end = ""
        self._execute = execute
        self._journal = journal
        self._settings = settings
        self._attempts: dict[str, int] = {}

    def recorded_turn(self) -> dict | None:
        """The next turn, if an earlier process made it."""
        return self._journal.recorded_turn(self.task.index, self.n_turns + 1)

    def take_turn(self, output: str, *, is_cut: bool) -> None:
        """Take the model's `output`, cut at max_new_tokens or not: answer its calls, journal the turn.

        A recorded turn is not journaled again and keeps its feedback; only local tools run once more, for the files
        that later calls may need. Raises DataError where the recorded output, or what was read from it, differs.
        """
        recorded = self.recorded_turn()
        calls, fault = self._read(output, is_cut)
        said = [{"name": call.name, "arguments": call.arguments} for call in calls]
        if recorded is not None and (recorded["output"], _calls_of(recorded)) != (output, said):
            raise DataError(
                f"{self._journal.path}: found another output for turn {self.n_turns + 1} of index "
                f"{self.task.index} than in its journal, expected the same one: model, machine, number of "
                "threads or this program have changed; choose another --output"
            )
        self.n_turns += 1
        answered = self._answer(calls, recorded)
        if recorded is None:
            self._journal.add_turn(self.task.index, self.n_turns, {"output": output, "calls": answered, "fault": fault})
        self.messages.append(WrittenTurn(output, tuple(calls)))
        for call in answered:
            if not is_finish(call["name"]):
                self.messages.append(Message("user" if is_question(call["name"]) else "tool", call["feedback"]))
        if fault:
            self.messages.append(Message("user", format_reminder(self._settings.prompt_format)))
        if calls and is_finish(calls[-1].name):
            self.close("finish")
        elif self.n_turns == self._settings.max_turns:
            self.close("max_turns")

    def close(self, end: str, error: str = "") -> None:
        """End the dialogue, in the journal too; its tools' files are removed."""
        self.end = end
        if forget := getattr(self._execute, "forget", None):  # a bare function may answer too
            forget(self.task.index)
        self._journal.add_end(self.task.index, end, error)

    def _read(self, output: str, is_cut: bool) -> tuple[list[ToolCall], str]:
        """The calls up to the first `finish`, or why there is none. What follows a `finish` is never run."""
        try:
            calls = parse_output(output, self._settings.prompt_format)
        except ToolCallError as error:
            return [], f"{error} (output cut at max_new_tokens)" if is_cut else str(error)
        end = next((number for number, call in enumerate(calls, 1) if is_finish(call.name)), len(calls))
        return calls[:end], ""

    def _answer(self, calls: Sequence[ToolCall], recorded: dict | None) -> list[dict]:
        answered = []
        for number, call in enumerate(calls):
            key = json.dumps([call.name, call.arguments], sort_keys=True)
            attempt = self._attempts.get(key, 0)
            self._attempts[key] = attempt + 1
            request = ToolRequest(
                dialogue=self.task.index, tool_set=self.task.tool_set, tools=self.task.tools, call=call, attempt=attempt
            )
            if recorded is not None:
                entry = recorded["calls"][number]
                if entry["executor"] == "local":
                    self._execute(request)
            elif is_finish(call.name):
                entry = _call_entry(call, None, "")
            elif is_question(call.name):
                entry = _call_entry(call, USER_REPLY, "user")
            else:
                result = self._execute(request)
                entry = _call_entry(call, result.feedback[:MAX_FEEDBACK_CHARACTERS], result.executor)
            answered.append(entry)
        return answered


def _calls_of(turn: dict) -> list[dict]:
    return [{"name": entry["name"], "arguments": entry["arguments"]} for entry in turn["calls"]]


def _call_entry(call: ToolCall, feedback: str | None, executor: str) -> dict:
    return {"name": call.name, "arguments": call.arguments, "feedback": feedback, "executor": executor}


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


def complete_dialogues(
    path: Path,
    tasks: Sequence[Record],
    run: Callable[[list[Record], DialogueJournal], None],
    *,
    prompt_format: str,
    rank: int,
) -> list[str]:
    """Complete the prediction file `path` to one dialogue per task; what its journals hold is not asked again.

    All ranks call it with the same tasks. `run(missing, journal)` gets all missing dialogues, runs this rank's share of
    them, and ends each in the journal. Returns notices for the user. Raises DataError, on all ranks, for journals that
    cannot be continued, and whatever `run` raises; the turns made before are in the journal.
    """
    # 1. What earlier processes left becomes one journal, before any rank appends to its own.
    finished = {dialogue.index for dialogue in read_dialogues(path)[0]} if path.exists() else set()
    recorded, n_dropped = join_journals(
        rank, lambda: read_journals(path), lambda found: rewrite_journals(path, found[0].values())
    )

    # 2. The dialogues; those that ended in a journal are done.
    missing = [task for task in tasks if task.index not in finished and not _has_ended(recorded.get(task.index))]
    with DialogueJournal(path, rank=rank, recorded=recorded) as journal:
        run(missing, journal)

    # 3. The complete file, in order.
    join_journals(rank, lambda: None, lambda _: close_journals(path, prompt_format))
    n_kept = len(tasks) - len(missing)
    n_turns = sum(len(recorded[task.index].turns) for task in missing if task.index in recorded)
    dialogues = read_dialogues(path)[0]
    return describe_resume(
        path,
        kept=f"{n_kept} dialogues and {n_turns} turns of others" if n_kept or n_turns else "",
        n_dropped=n_dropped,
        too_long=[dialogue.index for dialogue in dialogues if dialogue.end == "prompt_too_long"],
        refused=[(dialogue.index, dialogue.error) for dialogue in dialogues if dialogue.end == "refused"],
        what="dialogues counted as no valid answer",
    )


def _has_ended(dialogue: RecordedDialogue | None) -> bool:
    return dialogue is not None and bool(dialogue.end)


# ---------------------------------------------------------------------------------------------------------------------
# Model


def run_dialogues_with_model(
    tasks: Sequence[Record],
    local: LocalModel,
    settings: DialogueSettings,
    *,
    execute: Executor,
    journal: DialogueJournal,
    decoder: DialogueDecoder | None = None,
) -> None:
    """Run this rank's share of the dialogues with a model of ours, batch_size of them at a time.

    Live dialogues decode together. When a response ends, its dialogue gets its feedback and asks again at once; when a
    dialogue ends, the next waiting one takes its row. A dialogue depends on its own history alone, so neither
    batch_size nor ranks change it; recorded turns are decoded again and compared, then the dialogue continues. A prompt
    that leaves less than max_new_tokens of the room ends its dialogue with "prompt_too_long": nothing is dropped from
    the front. Above temperature 0 each turn has its own generator, made from seed, index and turn. A caller that wants
    the decoder's counters passes one made for this model and these settings.
    Raises DataError where a recorded turn decodes differently or a turn has no room, PromptError for a tokenizer of
    another format.
    """
    room = _room_tokens(local.model, settings)
    stop_texts = FORMATS[settings.prompt_format].stop_strings
    stop_ids = find_stop_ids(stop_texts, local.tokenizer)
    decoder = decoder or DialogueDecoder(
        DecodeWeights(local.model, cuda_graphs=local.cuda_graphs),
        n_rows=settings.batch_size,
        max_tokens=room,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_ids,
        temperature=settings.temperature,
    )
    waiting = list(reversed(tasks[local.rank :: local.world_size]))
    live: dict[int, Dialogue] = {}
    with tqdm(
        total=len(waiting),
        desc=terminal_text(journal.path.stem),
        unit="dialogue",
        disable=local.rank != 0 or not waiting or None,  # None: no bar where stderr is no terminal
    ) as bar:
        while live or waiting:
            while waiting and len(live) < settings.batch_size:
                dialogue = Dialogue(waiting.pop(), settings, execute=execute, journal=journal)
                if _ask_model(dialogue, decoder, local.tokenizer, settings, room):
                    live[dialogue.task.index] = dialogue
                else:
                    bar.update()
            for index, response_ids, _ in decoder.step() if live else ():
                output, stop = read_response(
                    response_ids, local.tokenizer, stop_ids=stop_ids, stop_texts=stop_texts, prompt_ids=[]
                )
                live[index].take_turn(output, is_cut=stop == "max_new_tokens")
                if not _ask_model(live[index], decoder, local.tokenizer, settings, room):
                    decoder.drop(index)
                    del live[index]
                    bar.update()


def _room_tokens(model: Transformer, settings: DialogueSettings) -> int:
    """Tokens that one dialogue may have. Raises DataError if one turn does not fit."""
    room = min(settings.max_dialogue_tokens or model.config.max_positions, model.config.max_positions)
    if settings.max_new_tokens >= room:
        raise DataError(
            f"--max_dialogue_tokens: found room for {room} tokens, expected more than the {settings.max_new_tokens} of "
            "one turn"
        )
    return room


def _ask_model(
    dialogue: Dialogue, decoder: DialogueDecoder, tokenizer: Tokenizer, settings: DialogueSettings, room: int
) -> bool:
    """Ask for the dialogue's next turn; False if it has none."""
    if dialogue.end:
        return False
    prompt_ids = encode_prompt(dialogue.task.tools, dialogue.messages, tokenizer, settings.prompt_format)
    if len(prompt_ids) + settings.max_new_tokens > room:
        dialogue.close("prompt_too_long")
        return False
    index = dialogue.task.index
    is_sampled = settings.temperature > 0
    decoder.ask(index, prompt_ids, turn_generator(settings.seed, index, dialogue.n_turns + 1) if is_sampled else None)
    return True


def turn_generator(seed: int, index: int, turn: int) -> torch.Generator:
    """The random generator of one turn: it does not depend on what else was drawn before, so a resumed run agrees."""
    digest = hashlib.sha256(f"{seed} {index} {turn}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Endpoint


def run_dialogues_with_endpoint(
    tasks: Sequence[Record],
    endpoint: Endpoint,
    settings: DialogueSettings,
    *,
    execute: Executor,
    journal: DialogueJournal,
) -> None:
    """Run dialogues with a server, one thread each, `endpoint.concurrency` at a time.

    Formats with messages of the chat API are asked by chat, every other format by a completion of its text. Recorded
    turns are taken from the journal and not asked again. A request that the server refuses ends its dialogue
    ("prompt_too_long" or "refused"). Raises EndpointError when a request fails for good, or when nothing but refusals
    came; dialogues go to the end of their turn before.
    """
    waiting, running, failure, has_answered = list(reversed(tasks)), set(), None, False
    refused: list[tuple[Dialogue, str]] = []  # at the first turn, before any other answer: the settings may be wrong

    def talk(task: Record) -> tuple[Dialogue, str, str]:
        dialogue = Dialogue(task, settings, execute=execute, journal=journal)
        return (dialogue, *_talk(dialogue, endpoint, settings))

    with (
        ThreadPoolExecutor(max_workers=endpoint.concurrency) as pool,
        tqdm(
            total=len(tasks), desc=terminal_text(journal.path.stem), unit="dialogue", disable=not tasks or None
        ) as bar,
    ):
        try:
            while running or waiting and failure is None:
                while waiting and failure is None and len(running) < endpoint.concurrency:
                    running.add(pool.submit(talk, waiting.pop()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        dialogue, stop, error = future.result()
                    except Exception as fault:  # noqa: BLE001, raised below, after the other threads
                        failure = failure or fault
                        continue
                    has_answered = has_answered or dialogue.n_turns > 0
                    if stop:
                        refused.append((dialogue, error))
                    bar.update()
                if has_answered:
                    _close_refused(refused)
                elif len(refused) >= REFUSALS_TO_STOP and failure is None:
                    failure = EndpointError(
                        f"{endpoint.url}: found {refused[0][1]} for each of the first "
                        f"{len(refused)} dialogues, expected answers"
                    )
                if failure is not None:
                    endpoint.stopping.set()
        except BaseException:  # interrupted: do not wait for answers
            endpoint.stop()
            raise
    if failure is not None:
        raise failure
    _close_refused(refused)


def _close_refused(refused: list[tuple[Dialogue, str]]) -> None:
    for dialogue, error in refused:
        dialogue.close("refused", error)
    refused.clear()


def _talk(dialogue: Dialogue, endpoint: Endpoint, settings: DialogueSettings) -> tuple[str, str]:
    """Run the dialogue to its end; ("refused", the server's words) if a request was refused, else ("", "")."""
    while not dialogue.end and not endpoint.stopping.is_set():
        recorded = dialogue.recorded_turn()
        if recorded is not None:
            dialogue.take_turn(recorded["output"], is_cut=False)
            continue
        output, answer = _ask_endpoint(endpoint, dialogue, settings)
        if answer.stop == "refused":
            return "refused", answer.error
        if answer.stop == "prompt_too_long":
            dialogue.close("prompt_too_long", answer.error)
        else:
            dialogue.take_turn(output, is_cut=answer.stop == "max_new_tokens")
    return "", ""


def _ask_endpoint(endpoint: Endpoint, dialogue: Dialogue, settings: DialogueSettings) -> tuple[str, Answer]:
    """The model's next output, cut at the format's stop texts, and the server's whole answer."""
    tools, entry = dialogue.task.tools, FORMATS[settings.prompt_format]
    max_new_tokens, temperature = settings.max_new_tokens, settings.temperature
    if entry.chat_request:
        messages, offered = entry.chat_request(tools, dialogue.messages)
        answer = chat(endpoint, messages, offered, max_new_tokens, entry.stop_strings, temperature)
        output = message_text(answer, bool(offered))
    else:
        prompt = prompt_text(tools, dialogue.messages, settings.prompt_format)
        answer = complete(endpoint, prompt, max_new_tokens, entry.stop_strings, temperature=temperature)
        output = completed_text(answer)
    output, has_stop = cut_at(output, entry.stop_strings)
    return output, Answer(answer.choice, "end", "") if has_stop else answer
