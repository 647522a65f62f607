"""PPO prompts: every kept assistant turn of a training file, or every record of a held-out file, with its gold calls.

A turn is dropped by the first rule that applies, and the notes say how many turns each rule dropped:
    plain text      the turn is not a call, so there is nothing to score
    excluded        the data gives the turn weight 0
    unparsable      its call does not parse (unparsable_calls "mask"; "error" refuses the file, as SFT does)
    erroneous       the error filter masks it, by category (data.error_filter, as in SFT)
    not offered     its tool is not among the documents, so even the gold call would score -2
    prompt_turns    all | tools (not finish, not ask_to_user) | first | last (of the turns left in the trajectory)
    too long        the prompt has more than max_prompt_tokens tokens; it is dropped, never cut
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from data.batches import epoch_order
from data.error_filter import CATEGORIES, ERROR_FILTERS, check_documents, decide_masked_turns
from data.formats.prompt_format import TextEncoder
from data.formats.table import DEFAULT_FORMAT, encode_prompt, end_of_turn_ids
from data.gold_records import GoldRecord, is_gold_file, read_gold_records
from data.json_records import DataError
from data.tool_calls import ToolCall
from data.tool_documents import IMPLICIT_TOOLS, offered_names
from data.trajectories import Message, Trajectory, read_trajectories

PROMPT_TURNS = ("all", "tools", "first", "last")
UNPARSABLE_CALLS = ("error", "mask")
_NO_SINGLE_CALL = "no gold answer of exactly one call without wildcards"
_EXCLUDED = "weight 0 in the data"
_DROPPED_BEFORE = (
    "plain text",
    _EXCLUDED,
    "unparsable",
    _NO_SINGLE_CALL,
    *(f"erroneous, {category}" for category in CATEGORIES if category != "unparsable"),
    "tool not offered",
)


@dataclass(frozen=True, slots=True)
class PPOPrompt:
    """What the model reads, and the calls that would be right next."""

    id: str  # of the trajectory or record
    turn: int  # which assistant turn of the trajectory, from 0; plain text counts
    where: str  # "file:line" of the trajectory or record
    prompt_ids: list[int]  # from the start to where the assistant speaks, the prefix of the SFT sample
    gold_calls: tuple[ToolCall, ...]  # at least one; the best reward counts
    tools: list[dict]  # offered tools, OpenAI function dicts
    prompt_format: str = DEFAULT_FORMAT  # of the prompt, and of the response that it asks for
    request: str = ""  # the user's last words, for the log


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A turn that passed the rules before prompt_turns: its number and the messages before it."""

    turn: int
    messages: list[Message]
    gold_calls: tuple[ToolCall, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_prompts(
    path: str | Path,
    tokenizer: TextEncoder,
    *,
    error_filter: str,
    prompt_turns: str,
    max_prompt_tokens: int,
    unparsable_calls: str,
    prompt_format: str = DEFAULT_FORMAT,
) -> tuple[list[PPOPrompt], list[str]]:
    """(prompts in the file's order, notes: one line per rule with its count).

    `path` holds trajectories in either form of data.trajectories, or held-out records, one JSON object per line:
    {"id", "tools", "messages": [user ...], "gold": [{"calls": [{"name", "arguments"}]}]}; "gold" in the first record
    decides. A held-out record has one turn, number 0, and every answer of exactly one call without wildcards is a gold
    call.
    Raises DataError for malformed files, and with all counts if no prompt is left; PromptError for a tokenizer
    without the control tokens of the format; ValueError for unknown settings.
    """
    _check_setting("error_filter", error_filter, ERROR_FILTERS)
    _check_setting("prompt_turns", prompt_turns, PROMPT_TURNS)
    _check_setting("unparsable_calls", unparsable_calls, UNPARSABLE_CALLS)
    end_of_turn_ids(tokenizer, prompt_format)  # a tokenizer without the format's tokens shows now
    not_chosen = f"not chosen by prompt_turns {prompt_turns}"
    too_long = f"longer than {max_prompt_tokens} prompt tokens"
    # Seeded in the order of the rules, which is then that of the notes.
    counts = Counter(dict.fromkeys([*_DROPPED_BEFORE, not_chosen, too_long], 0))
    prompts: list[PPOPrompt] = []
    if is_gold_file(path):
        records = _held_out_records(path, error_filter, unparsable_calls, counts)
    else:
        records = _trajectory_records(path, error_filter, unparsable_calls, counts)
    n_records = 0
    for identity, where, tools, candidates in records:
        n_records += 1
        selected = _select_turns(candidates, prompt_turns)
        counts[not_chosen] += len(candidates) - len(selected)
        for candidate in selected:
            prompt_ids = encode_prompt(tools, candidate.messages, tokenizer, prompt_format)
            if len(prompt_ids) > max_prompt_tokens:
                counts[too_long] += 1
                continue
            request = next((each.content for each in reversed(candidate.messages) if each.role == "user"), "")
            gold_calls = candidate.gold_calls
            prompts.append(
                PPOPrompt(identity, candidate.turn, where, prompt_ids, gold_calls, tools, prompt_format, request)
            )
    notes = _notes(counts, len(prompts), n_records, f"error_filter {error_filter}, prompt_turns {prompt_turns}")
    if not prompts:
        raise DataError(f"{path}: found no prompt, expected at least one ({'; '.join(notes)})")
    return prompts, notes


def _check_setting(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def _select_turns(candidates: list[_Candidate], prompt_turns: str) -> list[_Candidate]:
    if prompt_turns == "tools":
        return [candidate for candidate in candidates if candidate.gold_calls[0].name not in IMPLICIT_TOOLS]
    if prompt_turns == "first":
        return candidates[:1]
    return candidates[-1:] if prompt_turns == "last" else candidates


def _notes(counts: Counter, n_prompts: int, n_records: int, settings: str) -> list[str]:
    n_turns = n_prompts + counts.total()
    return [
        f"{n_prompts} prompts from {n_turns} assistant turns of {n_records} records ({settings})",
        *(f"{count} turns dropped: {rule}" for rule, count in counts.items() if count),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Which prompts in which iteration: computed from seed and number alone, so that resumed runs and all ranks agree


def even_sizes(n: int, most: int) -> list[int]:
    """n things in as few parts of at most `most` as possible: sizes that differ by at most one, larger ones first."""
    n_parts = ceil(n / most)
    return [n // n_parts + (part < n % n_parts) for part in range(n_parts)]


def iteration_sizes(n_prompts: int, most: int) -> list[int]:
    """Number of prompts in each iteration of one pass over them: `most`, but the last two share what is left.

    1,217 prompts by 8 are 151 times 8, then 5 and 4. Otherwise the last optimizer step would follow one response.
    """
    n_full = max(0, ceil(n_prompts / most) - 2)
    return [most] * n_full + even_sizes(n_prompts - n_full * most, most)


def repeat_each(prompts: Sequence[PPOPrompt], n: int) -> list[PPOPrompt]:
    """Each prompt n times in a row."""
    return [prompt for prompt in prompts for _ in range(n)]


def prompts_of_iteration(prompts: Sequence[PPOPrompt], iteration: int, seed: int, most: int) -> list[PPOPrompt]:
    """The prompts of all ranks in one iteration, counted from 0 over all epochs; every epoch has its own order.

    most: prompts of a full iteration.
    """
    sizes = iteration_sizes(len(prompts), most)
    epoch, number = divmod(iteration, len(sizes))
    start = sum(sizes[:number])
    return [prompts[i] for i in epoch_order(len(prompts), seed, epoch)[start : start + sizes[number]]]


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


def _trajectory_records(
    path: str | Path, error_filter: str, unparsable_calls: str, counts: Counter
) -> Iterator[tuple[str, str, list[dict], list[_Candidate]]]:
    for trajectory in read_trajectories(path, unparsable_calls=unparsable_calls):
        yield (trajectory.id, trajectory.source, trajectory.tools, list(_kept_turns(trajectory, error_filter, counts)))


def _kept_turns(trajectory: Trajectory, error_filter: str, counts: Counter) -> Iterator[_Candidate]:
    for turn, decision in enumerate(decide_masked_turns(trajectory, error_filter)):
        message = trajectory.messages[decision.message_index]
        if message.fault is not None:
            counts["unparsable"] += 1
        elif message.call is None:
            counts["plain text"] += 1
        elif message.weight == 0:
            counts[_EXCLUDED] += 1
        elif decision.masked:
            counts[f"erroneous, {decision.category}"] += 1
        elif not _is_offered(message.call, trajectory.tools):
            counts["tool not offered"] += 1
        else:
            yield _Candidate(turn, trajectory.messages[: decision.message_index], (message.call,))


def _is_offered(call: ToolCall, tools: list[dict]) -> bool:
    return call.name in offered_names(tools)


# ---------------------------------------------------------------------------------------------------------------------
# Held-out records


def _held_out_records(
    path: str | Path, error_filter: str, unparsable_calls: str, counts: Counter
) -> Iterator[tuple[str, str, list[dict], list[_Candidate]]]:
    for record in read_gold_records(path, unparsable_calls=unparsable_calls):
        reason = _reason_to_drop(record, error_filter)
        if reason is not None:
            counts[reason] += 1
        candidates = [] if reason is not None else [_Candidate(0, record.messages, record.gold_calls)]
        yield record.id, record.source, record.tools, candidates


def _reason_to_drop(record: GoldRecord, error_filter: str) -> str | None:
    """The rule that takes a record out, or None. There is no feedback, so only the documents can call it erroneous."""
    if not record.gold_calls:
        return "unparsable" if record.unparsable_calls else _NO_SINGLE_CALL
    for call in record.gold_calls if error_filter == "structured" else ():
        category = check_documents(call, record.tools).category
        if category != "all_right":
            return f"erroneous, {category}"
    return None if all(_is_offered(call, record.tools) for call in record.gold_calls) else "tool not offered"
