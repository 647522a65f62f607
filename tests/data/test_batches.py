"""Order, shares of the ranks, packing and dropping, on rows written by hand."""

import threading
from array import array
from collections import Counter

import pytest
import torch

from data.batches import drop_unusable, epoch_order, idle_batch, pack, prepared_batches, step_batches, steps_per_epoch
from data.json_records import DataError
from data.loss_weights import EncodedTrajectory


def row(row_id, input_ids, target_ids, weights, denominator=1.0):
    n_trained = sum(weight != 0 for weight in weights)
    return EncodedTrajectory(
        id=row_id,
        input_ids=array("i", input_ids),
        target_ids=array("i", target_ids),
        loss_weights=array("d", weights),
        class_codes=bytes(len(input_ids)),
        message_indices=array("i", [-1] * len(input_ids)),
        turn_decisions=(),
        trained_turns=int(n_trained > 0),
        trained_tokens=n_trained,
        denominator=denominator,
    )


def numbered_rows(n):
    return [
        row(f"t{i}", [1, 5, 6][: 1 + i % 3], [5, 6, 2][: 1 + i % 3], [0.5, 1.0, 9.0][: 1 + i % 3]) for i in range(n)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def test_pack_by_hand():
    batch = pack([row("a", [1, 5, 6], [5, 6, 2], [0.0, 9.0, 1.0], 10.0), row("b", [1, 7], [7, 2], [0.25, 0.0], 0.25)])
    assert batch.input_ids_T.tolist() == [1, 5, 6, 1, 7] and batch.input_ids_T.dtype == torch.int64
    assert batch.target_ids_T.tolist() == [5, 6, 2, 7, 2] and batch.target_ids_T.dtype == torch.int64
    assert batch.loss_weights_T.tolist() == [0.0, 9.0, 1.0, 0.25, 0.0] and batch.loss_weights_T.dtype == torch.float32
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1] and batch.position_ids_T.dtype == torch.int64
    assert batch.trained_index_K.tolist() == [1, 2, 3] and batch.trained_index_K.dtype == torch.int64
    assert batch.segment_lengths == [3, 2] and batch.ids == ["a", "b"]
    assert batch.denominator == 10.25 and batch.trained_turns == 2 and batch.trained_tokens == 3


def test_pack_of_nothing_is_refused():
    with pytest.raises(ValueError, match="rows: found none"):
        pack([])


def test_idle_batch_weighs_nothing():
    batch = idle_batch(1)
    assert batch.segment_lengths == [1] and batch.loss_weights_T.sum() == 0 and batch.trained_index_K.numel() == 0
    assert batch.denominator == 0.0 and batch.trained_tokens == 0 and batch.ids == []


# ---------------------------------------------------------------------------------------------------------------------
# Order


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order = epoch_order(50, 3, 0)
    torch.manual_seed(99)
    torch.rand(7)  # draws from the global generator move nothing
    state = torch.get_rng_state()
    assert epoch_order(50, 3, 0) == order and sorted(order) == list(range(50))
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize("n,size,steps", [(10, 4, 3), (8, 4, 2), (1, 4, 1), (1217, 4, 305)])
def test_steps_per_epoch(n, size, steps):
    assert steps_per_epoch(n, size) == steps


@pytest.mark.parametrize("n", [1, 7, 16, 23])
@pytest.mark.parametrize("global_batch_size", [1, 4, 8])
def test_every_rank_and_micro_batch_layout_trains_the_same_trajectories(n, global_batch_size):
    encoded = numbered_rows(n)
    per_epoch = steps_per_epoch(n, global_batch_size)
    reference = None
    for world_size in (1, 2, 4):
        for micro_batch_size in (1, 2, 3, 8):
            per_step = []
            for step in range(2 * per_epoch):
                ranks = [
                    step_batches(
                        encoded,
                        step,
                        seed=5,
                        global_batch_size=global_batch_size,
                        micro_batch_size=micro_batch_size,
                        rank=rank,
                        world_size=world_size,
                    )
                    for rank in range(world_size)
                ]
                assert len({len(batches) for batches in ranks}) == 1 and len(ranks[0]) >= 1  # same number of forwards
                assert all(len(batch.ids) <= micro_batch_size for batches in ranks for batch in batches)
                per_step.append(Counter(i for batches in ranks for batch in batches for i in batch.ids))
            assert all(counts.total() <= global_batch_size for counts in per_step)
            for epoch in range(2):  # each trajectory once per epoch, no step mixes epochs
                once = sum(per_step[epoch * per_epoch : (epoch + 1) * per_epoch], Counter())
                assert once == Counter(f"t{i}" for i in range(n))
            reference = reference or per_step
            assert per_step == reference


def test_a_rank_without_rows_joins_with_an_idle_batch():
    encoded = numbered_rows(5)  # steps of 4 and 1
    last = [
        step_batches(encoded, 1, seed=0, global_batch_size=4, micro_batch_size=1, rank=rank, world_size=4)
        for rank in range(4)
    ]
    assert [len(batches) for batches in last] == [1, 1, 1, 1]
    assert [batches[0].ids != [] for batches in last] == [True, False, False, False]
    assert sum(batches[0].denominator for batches in last) == 1.0


def test_sizes_and_untrained_rows_are_refused():
    good = {"seed": 0, "global_batch_size": 2, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    for bad in ({"rank": 1}, {"rank": -1}, {"micro_batch_size": 0}, {"global_batch_size": 0}, {"world_size": 0}):
        with pytest.raises(ValueError, match="expected sizes >= 1"):
            step_batches(numbered_rows(3), 0, **{**good, **bad})
    with pytest.raises(ValueError, match="encoded: found none"):
        step_batches([], 0, **good)
    with pytest.raises(DataError, match="trajectory zero: found no trained token"):
        step_batches([row("zero", [1, 5], [5, 2], [0.0, 0.0])], 0, **good)


# ---------------------------------------------------------------------------------------------------------------------
# Dropping


def test_drop_unusable_names_what_it_drops_and_cuts_nothing():
    fits, long = row("fits", [1, 5, 6], [5, 6, 2], [0.0, 1.0, 1.0]), row("long", [1] * 5, [2] * 5, [1.0] * 5)
    empty, long_and_empty = row("empty", [1, 5], [5, 2], [0.0, 0.0]), row("both", [1] * 9, [2] * 9, [0.0] * 9)
    kept, notes = drop_unusable([fits, long, empty, long_and_empty], 3)
    assert kept == [fits] and list(kept[0].input_ids) == [1, 5, 6]
    assert notes == [
        "dropped 2 of 4 trajectories, longer than 3 tokens: long (5), both (9)",
        "dropped 1 of 4 trajectories, without a trained turn: empty",
    ]
    assert drop_unusable([fits, long], 5) == ([fits, long], [])


def test_drop_unusable_shows_the_first_few_and_nothing_that_acts_on_a_terminal():
    """10,000 dropped trajectories were one line of 100,000 characters."""
    rows = [row(f"t{i}", [1] * 5, [2] * 5, [1.0] * 5) for i in range(10_000)]
    rows.append(row("a\x1b[2J\u202e\n" + "b" * 500, [1, 5], [5, 2], [0.0, 0.0]))
    _, (long, empty) = drop_unusable([row("fits", [1, 5], [5, 2], [0.0, 1.0]), *rows], 3)
    assert long.endswith("tokens: t0 (5), t1 (5), t2 (5), t3 (5), t4 (5) and 9995 more, all in data_report.json")
    assert (
        r"without a trained turn: a\x1b[2J\u202e\nbbb" in empty
        and empty.endswith("b... (516 characters)")
        and len(empty) < 150
    )


def test_nothing_left_is_an_error():
    with pytest.raises(DataError, match="found 2 trajectories, 1 longer than 3 tokens and 1 without a trained turn"):
        drop_unusable([row("long", [1] * 5, [2] * 5, [1.0] * 5), row("empty", [1], [2], [0.0])], 3)


# ---------------------------------------------------------------------------------------------------------------------
# Ahead of the step


def test_on_the_cpu_batches_are_made_when_they_are_asked_for():
    made = []
    batches = prepared_batches(lambda step: made.append(step) or [step], range(3, 6), torch.device("cpu"))
    assert (next(batches), made) == ([3], [3])
    assert (list(batches), made) == ([[4], [5]], [3, 4, 5])


@pytest.fixture
def pinning(monkeypatch):
    """Stands in for CUDA: (threads that chose a device, tensors that were pinned)."""
    chosen, pinned = [], []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), str(device))))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(threading.get_ident()) or tensor)
    return chosen, pinned


def test_for_cuda_the_next_batches_are_pinned_in_a_thread_on_the_device_of_the_rank(pinning):
    chosen, pinned = pinning
    rows, is_made = numbered_rows(4), [threading.Event() for _ in range(4)]

    def make(step):
        is_made[step].set()
        return [pack(rows[: step + 1])]

    batches = prepared_batches(make, range(4), torch.device("cuda", 5))
    for step in range(4):
        (batch,) = next(batches)
        assert batch.input_ids_T.tolist() == pack(rows[: step + 1]).input_ids_T.tolist()
        assert step == 3 or is_made[step + 1].wait(20)  # while the caller still works on this step
        assert not any(event.is_set() for event in is_made[step + 2 :])
    assert next(batches, "end") == "end"
    ((thread, device),) = chosen
    assert device == "cuda:5" and thread != threading.get_ident()
    assert pinned == [thread] * 5 * 4  # the five tensors of each batch


def test_an_error_in_the_thread_arrives_at_its_step(pinning):
    def make(step):
        if step == 1:
            raise DataError("found a bad row")
        return [pack(numbered_rows(1))]

    batches = prepared_batches(make, range(3), torch.device("cuda", 0))
    assert len(next(batches)) == 1
    with pytest.raises(DataError, match="found a bad row"):
        next(batches)
    assert list(prepared_batches(make, range(0), torch.device("cuda", 0))) == []
