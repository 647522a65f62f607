"""Held-out data during SFT (`--eval_data`): loss per part of a turn, and right calls by greedy answers.

A trained token belongs to one part of its turn:
    key         a key token (PKT, E3), whether or not `key_tokens` weighs it in training
    name        another token of the tool's name
    arguments   what follows the name of a call, brackets and quotes included
    text        what a format writes before the name, and turns of plain text
    eos         the end of the turn
Losses are plain means over tokens, without weights, so that runs with other weights compare. Nothing here draws a
random number or touches a gradient: a run learns the same with and without it.

Shape suffixes: B batch (1: one packed row), T tokens, K trained tokens, D model dim.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from data.batches import PackedBatch, drop_unusable, pack
from data.data_report import describe_data
from data.formats.prompt_format import find_stop_ids
from data.formats.table import FORMATS, dialogue_segments, end_of_turn_ids, parse_output
from data.gold_records import is_gold_file, read_gold_records
from data.json_records import DataError
from data.loss_weights import EOS, KEY, EncodedTrajectory, count_tokens_before, encode_trajectory
from data.tool_calls import ToolCall, ToolCallError
from data.trajectories import Message, Trajectory, read_trajectories
from model.sampling import generate
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from train.distributed import World, gathered_model, global_sum
from train.sft_config import SFTConfig
from train.weighted_cross_entropy import linear_token_logprobs

PARTS = ("key", "name", "arguments", "text", "eos")


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """One trajectory, and the part that each of its K trained tokens belongs to, in their order."""

    encoded: EncodedTrajectory
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """What the model reads before a call, and the calls that would be right."""

    prompt_ids: list[int]
    gold_calls: tuple[ToolCall, ...]
    gold_tokens: int  # length of the answer in the data, end of turn included


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out data, the same on every rank."""

    rows: list[HeldOutRow]
    prompts: list[HeldOutPrompt]  # the first eval_limit calls
    tokenizer: Tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_held_out(config: SFTConfig, tokenizer: Tokenizer) -> tuple[HeldOut | None, list[str]]:
    """The data of `eval_data`, or None if the run has none, and lines for the log.

    The file holds trajectories in any form of `data`, or records with gold calls (data/gold_records.py), whose first
    gold call is then the turn that gets a loss. Raises DataError, PromptError.
    """
    if not config.eval_data:
        return None, []
    rows, prompts = [], []
    cases = _gold_cases(config) if is_gold_file(config.eval_data) else _trajectory_cases(config)
    encoded = [(trajectory, golds, _encode(config, trajectory, tokenizer)) for trajectory, golds in cases]
    try:
        kept, notes = drop_unusable([row for _, _, row in encoded], config.max_tokens)
    except DataError as error:
        raise DataError(f"{config.eval_data}: {error}") from None
    trajectories, all_rows = [trajectory for trajectory, _, _ in encoded], [row for _, _, row in encoded]
    notes += describe_data(trajectories, all_rows, kept, config.error_filter)[1:]  # its first line is the last one here
    kept_rows = set(map(id, kept))
    for trajectory, golds, row in encoded:
        if id(row) not in kept_rows:
            continue
        turns = trained_turns(row)
        rows.append(HeldOutRow(row, parts_of(row, turns, trajectory, tokenizer, config.prompt_format)))
        for message_index, positions in turns.items():
            call = trajectory.messages[message_index].call
            if call is not None:
                prompt_ids = list(row.input_ids[: positions[0] + 1])
                prompts.append(HeldOutPrompt(prompt_ids, golds or (call,), len(positions)))
    asked = prompts[: config.eval_limit or None]
    counts = {name: sum(row.parts.count(name) for row in rows) for name in PARTS}
    listing = ", ".join(f"{name} {count}" for name, count in counts.items())
    notes.append(f"{len(rows)} trajectories, {sum(counts.values())} trained tokens ({listing}), {len(asked)} calls")
    return HeldOut(rows, asked, tokenizer), [f"held-out data: {note}" for note in notes]


def _gold_cases(config: SFTConfig) -> Iterator[tuple[Trajectory, tuple[ToolCall, ...]]]:
    """Each record with a gold call as a trajectory that ends with the first of them; and all of them."""
    for record in read_gold_records(config.eval_data, unparsable_calls=config.unparsable_calls):
        if record.gold_calls:
            messages = [*record.messages, Message("assistant", "", record.gold_calls[0])]
            yield Trajectory(record.id, record.tools, messages, record.source), record.gold_calls


def _trajectory_cases(config: SFTConfig) -> Iterator[tuple[Trajectory, tuple[ToolCall, ...]]]:
    for trajectory in read_trajectories(config.eval_data, unparsable_calls=config.unparsable_calls):
        yield trajectory, ()


def _encode(config: SFTConfig, trajectory: Trajectory, tokenizer: Tokenizer) -> EncodedTrajectory:
    """With key tokens in any case, because they are a part of the turn; their weights are not used."""
    return encode_trajectory(
        trajectory,
        tokenizer,
        error_filter=config.error_filter,
        key_tokens=True,
        max_key_token_weight=1.0,
        loss_normalization="sum",
        prompt_format=config.prompt_format,
    )


def trained_turns(row: EncodedTrajectory) -> dict[int, list[int]]:
    """Message index -> positions of the row that predict the turn's trained tokens, the end of the turn last."""
    turns: dict[int, list[int]] = {}
    for position, weight in enumerate(row.loss_weights):
        if weight > 0:
            turns.setdefault(row.message_indices[position], []).append(position)
    return turns


def parts_of(
    row: EncodedTrajectory,
    turns: dict[int, list[int]],
    trajectory: Trajectory,
    tokenizer: Tokenizer,
    prompt_format: str,
) -> tuple[str, ...]:
    """The part of each trained token of the row (module docstring); turns: trained_turns(row)."""
    segments = dialogue_segments(trajectory.tools, trajectory.messages, prompt_format)
    targets = {segment.message_index: segment for segment in segments if segment.is_target}
    parts = []
    for message_index, positions in turns.items():
        segment, ids = targets[message_index], [row.target_ids[position] for position in positions[:-1]]
        start = end = len(ids)  # plain text throughout, unless it is a call
        if segment.name_span is not None:
            start, end = (count_tokens_before(ids, segment.text[:border], tokenizer) for border in segment.name_span)
        for index, position in enumerate(positions):
            code = row.class_codes[position]
            name = "text" if index < start else "name" if index < end else "arguments"
            parts.append("key" if code == KEY else "eos" if code == EOS else name)
    return tuple(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluating


def evaluate_held_out(
    config: SFTConfig, model: torch.nn.Module, held_out: HeldOut, world: World
) -> dict[str, float | None]:
    """One line of held_out.jsonl without its step (docs/metrics.md), over all ranks; a collective.

    model: as trained, sharded or not. The ranks share the rows and the prompts; each computes on a whole copy.
    """
    began = time.perf_counter()
    whole = gathered_model(model, world, dtype=config.dtype)
    sums, counts = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0)
    mine = held_out.rows[world.rank :: world.size]
    for start in range(0, len(mine), config.micro_batch_size):
        group = mine[start : start + config.micro_batch_size]
        logprobs_K = trained_logprobs(whole, pack([row.encoded for row in group]), world.device)
        for part, logprob in zip((part for row in group for part in row.parts), logprobs_K, strict=True):
            sums[part] -= logprob
            counts[part] += 1
    n_right = count_right(whole, held_out, held_out.prompts[world.rank :: world.size], config.prompt_format)
    totals = global_sum([*sums.values(), *counts.values(), n_right])
    losses, tokens = totals[: len(PARTS)], totals[len(PARTS) : -1]
    means = [loss / n if n else None for loss, n in zip(losses, tokens, strict=True)]
    return {
        "held_out/loss": sum(losses) / sum(tokens),
        **{f"held_out/loss_{name}": mean for name, mean in zip(PARTS, means, strict=True)},
        "held_out/tokens": int(sum(tokens)),
        "held_out/right_calls": int(totals[-1]),
        "held_out/calls": len(held_out.prompts),
        "time/held_out_seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def trained_logprobs(model: torch.nn.Module, batch: PackedBatch, device: torch.device) -> list[float]:
    """Log-probability of each trained target of one packed row, in the order of trained_index_K, natural log."""
    if batch.trained_tokens == 0:
        return []
    hidden_BTD = model(
        batch.input_ids_T[None].to(device),
        position_ids_BT=batch.position_ids_T[None].to(device),
        segment_lengths=batch.segment_lengths,
        return_hidden=True,
    )
    index_K = batch.trained_index_K.to(device)
    logprobs_K = linear_token_logprobs(
        hidden_BTD[0][index_K], model.head_weight(), batch.target_ids_T.to(device)[index_K]
    )
    return logprobs_K.double().tolist()


def count_right(model: Transformer, held_out: HeldOut, prompts: Sequence[HeldOutPrompt], prompt_format: str) -> int:
    """How many of the prompts get a right call as greedy answer.

    An answer is cut at twice the tokens of the longest one in the data, and at the model's positions: a right call is
    not that much longer, however it is written.
    """
    if not prompts:
        return 0
    room = model.config.max_positions - max(len(prompt.prompt_ids) for prompt in prompts)
    answers = generate(
        model,
        [prompt.prompt_ids for prompt in prompts],
        max_new_tokens=max(1, min(2 * max(prompt.gold_tokens for prompt in prompts), room)),
        eos_id=find_stop_ids(FORMATS[prompt_format].stop_strings, held_out.tokenizer),
    )
    ends = end_of_turn_ids(held_out.tokenizer, prompt_format)
    return sum(
        ids[-1] in ends and is_right_call(held_out.tokenizer.decode(ids[:-1]), prompt.gold_calls, prompt_format)
        for prompt, (ids, _) in zip(prompts, answers, strict=True)
    )


def is_right_call(output: str, gold_calls: Sequence[ToolCall], prompt_format: str) -> bool:
    """Whether the output is exactly one call, with the name and the arguments of a gold call; 1, 1.0 and "1" differ."""
    try:
        calls = parse_output(output, prompt_format)
    except ToolCallError:
        return False
    written = [json.dumps([call.name, call.arguments], sort_keys=True) for call in (*calls, *gold_calls)]
    return len(calls) == 1 and written[0] in written[1:]


def best_line(lines: Sequence[dict]) -> dict:
    """The line of held_out.jsonl with the most right calls; of equals that with the lowest loss, then the first.

    Only lines about as many tokens and calls as the last one compete: `eval_data` may change when a run is resumed.
    """
    size = [(line["held_out/tokens"], line["held_out/calls"]) for line in lines]
    rivals = [line for line, each in zip(lines, size, strict=True) if each == size[-1]]
    return min(rivals, key=lambda line: (-line["held_out/right_calls"], line["held_out/loss"], line["step"]))
