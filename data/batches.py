"""Encoded trajectories to micro-batches: order, shares of the ranks, packing, and on CUDA one step of preparation.

No state: a step number says which trajectories a step trains.

A micro-batch is one row of several trajectories end to end, without padding. `segment_lengths` tells the model where
each begins; attention stays inside a segment and positions restart at 0, so packing changes nothing but speed.

Shape suffixes: T tokens of the packed row, K trained ones.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil

import torch

from data.json_records import DataError
from data.loss_weights import EncodedTrajectory
from printable import one_line


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch."""

    input_ids_T: torch.Tensor  # int64
    target_ids_T: torch.Tensor  # int64, aligned with input_ids_T: nothing downstream shifts
    loss_weights_T: torch.Tensor  # float32, 0 = not trained
    position_ids_T: torch.Tensor  # int64, from 0 in every segment
    trained_index_K: torch.Tensor  # int64, positions of T with weight != 0, ascending
    segment_lengths: list[int]  # tokens per trajectory, sum = T
    ids: list[str]  # trajectory ids, one per segment
    denominator: float  # sum of the trajectories' shares of the global denominator
    trained_turns: int
    trained_tokens: int  # K

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`. From pinned memory the host does not wait for the copies."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "PackedBatch":
        """The same batch in memory that the device copies from by itself. Needs CUDA."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        names = [name for name in self.__slots__ if name.endswith(("_T", "_K"))]
        return replace(self, **{name: change(getattr(self, name)) for name in names})


# ---------------------------------------------------------------------------------------------------------------------
# What can be trained

TOO_LONG, UNTRAINED = "too long", "without a trained turn"


def drop_unusable(encoded: Sequence[EncodedTrajectory], max_tokens: int) -> tuple[list[EncodedTrajectory], list[str]]:
    """Trajectories that fit into `max_tokens` and train something, and one line per reason for those that do not.

    A row that is too long is dropped whole: a cut one would lose its tools or its calls and still look trained. Length
    is the number of input positions, BOS included. Raises DataError with the reasons when nothing is left.
    """
    reasons = [why_dropped(row, max_tokens) for row in encoded]
    too_long = [row for row, reason in zip(encoded, reasons) if reason == TOO_LONG]
    untrained = [row for row, reason in zip(encoded, reasons) if reason == UNTRAINED]
    kept = [row for row, reason in zip(encoded, reasons) if not reason]
    notes = []
    if too_long:
        listing = _first_few([f"{one_line(row.id)} ({len(row)})" for row in too_long])
        notes.append(
            f"dropped {len(too_long)} of {len(encoded)} trajectories, longer than {max_tokens} tokens: {listing}"
        )
    if untrained:
        listing = _first_few([one_line(row.id) for row in untrained])
        notes.append(f"dropped {len(untrained)} of {len(encoded)} trajectories, without a trained turn: {listing}")
    if not kept:
        raise DataError(
            f"found {len(encoded)} trajectories, {len(too_long)} longer than {max_tokens} tokens and "
            f"{len(untrained)} without a trained turn{_reasons(untrained)}, expected at least one to train on"
        )
    return kept, notes


def why_dropped(row: EncodedTrajectory, max_tokens: int) -> str:
    """TOO_LONG, UNTRAINED, or "" for a trajectory that is kept."""
    return TOO_LONG if len(row) > max_tokens else UNTRAINED if row.trained_tokens == 0 else ""


def _first_few(names: list[str]) -> str:
    """The first five: a log line of thousands of ids is no help."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more, all in data_report.json" if len(names) > 5 else "")


def _reasons(rows: Sequence[EncodedTrajectory]) -> str:
    """Why the turns of `rows` are not trained, with counts, the most frequent reason first."""
    reasons = Counter(
        f"{turn.category}, {one_line(turn.rule)}" for row in rows for turn in row.turn_decisions if turn.masked
    )
    reasons["weight 0 in the data"] = sum(row.excluded_turns for row in rows)
    listing = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5) if count)
    return f" (turns: {listing})" if listing else ""


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def pack(rows: Sequence[EncodedTrajectory]) -> PackedBatch:
    """Rows end to end as one micro-batch. Raises ValueError for an empty list."""
    if not rows:
        raise ValueError("rows: found none, expected at least one trajectory to pack")
    loss_weights_T = torch.cat([torch.tensor(row.loss_weights, dtype=torch.float32) for row in rows])
    return PackedBatch(
        input_ids_T=torch.cat([torch.tensor(row.input_ids, dtype=torch.int64) for row in rows]),
        target_ids_T=torch.cat([torch.tensor(row.target_ids, dtype=torch.int64) for row in rows]),
        loss_weights_T=loss_weights_T,
        position_ids_T=torch.cat([torch.arange(len(row)) for row in rows]),
        trained_index_K=loss_weights_T.nonzero().flatten(),
        segment_lengths=[len(row) for row in rows],
        ids=[row.id for row in rows],
        denominator=sum(row.denominator for row in rows),
        trained_turns=sum(row.trained_turns for row in rows),
        trained_tokens=sum(row.trained_tokens for row in rows),
    )


def idle_batch(token_id: int) -> PackedBatch:
    """One token of weight 0 for a rank without rows: all ranks must join every collective of a forward."""
    ids_T = torch.tensor([token_id], dtype=torch.int64)
    return PackedBatch(
        input_ids_T=ids_T,
        target_ids_T=ids_T.clone(),
        loss_weights_T=torch.zeros(1),
        position_ids_T=torch.zeros(1, dtype=torch.int64),
        trained_index_K=torch.zeros(0, dtype=torch.int64),
        segment_lengths=[1],
        ids=[],
        denominator=0.0,
        trained_turns=0,
        trained_tokens=0,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Order and shares


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n) that depends on (n, seed, epoch) alone.

    The generator is private: a draw from torch's global one would let any other draw shift the data of a resumed run.
    """
    generator = torch.Generator()
    generator.manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator).tolist()


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Optimizer steps of one epoch; the last one takes what is left and never borrows from the next epoch."""
    return ceil(n / global_batch_size)


def step_batches(
    encoded: Sequence[EncodedTrajectory],
    step: int,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> list[PackedBatch]:
    """The micro-batches of `rank` for global optimizer step `step`, counted from 0 over all epochs.

    The step's trajectories are dealt to the ranks in turn, so which trajectories a step trains depends on neither ranks
    nor micro-batches. All ranks get the same number of micro-batches; one that runs out of rows gets idle ones.
    Raises ValueError for no rows, sizes below 1 or a rank outside the world, DataError for a row that trains nothing.
    """
    if min(global_batch_size, micro_batch_size, world_size) < 1 or not 0 <= rank < world_size or step < 0:
        raise ValueError(
            f"found step={step}, global_batch_size={global_batch_size}, "
            f"micro_batch_size={micro_batch_size}, rank={rank}, world_size={world_size}, "
            "expected sizes >= 1, step >= 0, 0 <= rank < world_size"
        )
    if not encoded:
        raise ValueError("encoded: found none, expected at least one trajectory")
    epoch, step_in_epoch = divmod(step, steps_per_epoch(len(encoded), global_batch_size))
    order = epoch_order(len(encoded), seed, epoch)
    chosen = [encoded[i] for i in order[step_in_epoch * global_batch_size : (step_in_epoch + 1) * global_batch_size]]
    for row in chosen:
        if row.trained_tokens == 0:
            raise DataError(
                f"trajectory {one_line(row.id)}: found no trained token, expected drop_unusable to have dropped it"
            )
    mine = chosen[rank::world_size]
    n_micro_batches = ceil(ceil(len(chosen) / world_size) / micro_batch_size)
    groups = [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(n_micro_batches)]
    return [pack(group) if group else idle_batch(chosen[0].input_ids[0]) for group in groups]


# ---------------------------------------------------------------------------------------------------------------------
# Ahead of the step


def prepared_batches(
    step_batches: Callable[[int], list[PackedBatch]], steps: Iterable[int], device: torch.device
) -> Iterator[list[PackedBatch]]:
    """step_batches(step) of each step. For a CUDA device a thread packs and pins the next step's during this one."""
    if device.type != "cuda":
        yield from map(step_batches, steps)
        return

    def pinned_batches(step: int) -> list[PackedBatch]:
        return [batch.pinned() for batch in step_batches(step)]

    # A new thread is on device 0: pinning there would take memory of that device on every rank.
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        waiting = None
        for step in steps:
            following = thread.submit(pinned_batches, step)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
