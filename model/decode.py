"""Preallocated keys and values of the tokens already seen, for generation.

Shape suffixes: R rows (sequences), K key/value heads, L slots, H head dim, T new tokens, S selected rows, P rows of a
run. Slot index = position: rows have their own lengths and nothing is padded.

One new token per row (decoding) is the case that counts. Its attention is one call per run of neighbouring rows whose
lengths round up to the same multiple of SLOTS_PER_STEP, masked at each row's own length. The shape of a row's attention
thus follows from that row's own length alone, and its result does not depend, not in the last bit, on the other rows.
On a CPU with several threads every row is a call: there the last bits of a row, in fp32, were seen to change with the
number of rows in its call, whose heads the kernel deals out to the threads.

`lengths` may be set back, to 0 for another sequence or to a prefix that the next one shares: the slots behind are then
overwritten or wiped, before anything reads them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig

SLOTS_PER_STEP = 128  # coarser: fewer calls, more masked slots read


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Neighbouring rows of the cache that attend together."""

    first_segment: int
    n_rows: int
    first_row: int
    n_slots: int  # slots read per row
    mask_P11L: Tensor  # added to the scores: 0 up to the row's new token, -inf behind it


class KVCache:
    """Keys and values per layer, (R, L, K, H) each, and the number of filled slots per row.

    Storage is allocated by the first forward, in the dtype and on the device it computes in (under mixed precision
    these are not the parameters'), and grows with the longest row, at least twofold each time: a limit of 16384 tokens
    costs nothing while no row comes near it. `selected_rows` says which rows the segments of the next forward belong
    to, in order. Raises ValueError when a row would overflow.
    """

    def __init__(self, config: ModelConfig, n_rows: int, max_tokens: int) -> None:
        self.max_tokens = -(-max_tokens // SLOTS_PER_STEP) * SLOTS_PER_STEP
        self.n_slots = 0  # per row, of storage in use from the next forward on
        self.keys_RLKH: list[Tensor | None] = [None] * config.n_layers
        self.values_RLKH: list[Tensor | None] = [None] * config.n_layers
        self.lengths = [0] * n_rows
        self.written = [0] * n_rows  # slots that may hold something; those behind are zero
        self.selected_rows = list(range(n_rows))
        self.runs: list[DecodeRun] = []

    def selected_lengths(self) -> list[int]:
        """Filled slots of the selected rows, in their order: the positions at which their next tokens stand."""
        return [self.lengths[row] for row in self.selected_rows]

    def append(self, layer: int, segment: int, k_1KTH: Tensor, v_1KTH: Tensor) -> Iterator[Tensor]:
        """Writes T new keys and values into the segment's row; gives the row's filled parts, twice (1, K, L, H).

        Lengths move on only with advance(), after the last layer, because every layer writes at the same slots.
        """
        row = self.selected_rows[segment]
        start, end = self.lengths[row], self.lengths[row] + k_1KTH.shape[2]
        self._make_room(row, end)
        self.written[row] = max(self.written[row], end)
        keys_RLKH, values_RLKH = self._storage(layer, k_1KTH.transpose(1, 2))
        for storage_RLKH, new_1KTH in ((keys_RLKH, k_1KTH), (values_RLKH, v_1KTH)):
            storage_RLKH[row, start:end] = new_1KTH[0].transpose(0, 1)
        return (storage_RLKH[row : row + 1, :end].transpose(1, 2) for storage_RLKH in (keys_RLKH, values_RLKH))

    def plan_decode(self, dtype: torch.dtype, device: torch.device) -> None:
        """Prepares append_one and the runs for one new token per selected row; once per forward, not per layer."""
        lengths = self.selected_lengths()
        for row, length in zip(self.selected_rows, lengths, strict=True):
            self._make_room(row, length + 1)
            self._wipe_behind(row, length)
            self.written[row] = length + 1
        self.flat_slots_S = torch.tensor(
            [row * self.n_slots + length for row, length in zip(self.selected_rows, lengths, strict=True)],
            dtype=torch.long,
            device=device,
        )
        lengths_S1 = torch.tensor(lengths, device=device)[:, None]
        n_slots_S = [(length // SLOTS_PER_STEP + 1) * SLOTS_PER_STEP for length in lengths]
        unseen_SL = torch.arange(max(n_slots_S, default=0), device=device) > lengths_S1
        mask_SL = torch.zeros(unseen_SL.shape, dtype=dtype, device=device).masked_fill_(unseen_SL, -torch.inf)
        is_joint = device.type != "cpu" or torch.get_num_threads() == 1
        self.runs, first = [], 0
        for last in range(len(lengths)):
            if (
                is_joint
                and last + 1 < len(lengths)
                and n_slots_S[last + 1] == n_slots_S[first]
                and self.selected_rows[last + 1] == self.selected_rows[last] + 1
            ):
                continue
            self.runs.append(
                DecodeRun(
                    first,
                    last + 1 - first,
                    self.selected_rows[first],
                    n_slots_S[first],
                    mask_SL[first : last + 1, None, None, : n_slots_S[first]],
                )
            )
            first = last + 1

    def append_one(self, layer: int, k_SKH: Tensor, v_SKH: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one new key and value per selected row; returns the whole storage, twice (R, L, K, H)."""
        keys_RLKH, values_RLKH = self._storage(layer, k_SKH)
        keys_RLKH.view(-1, *k_SKH.shape[1:]).index_copy_(0, self.flat_slots_S, k_SKH)
        values_RLKH.view(-1, *v_SKH.shape[1:]).index_copy_(0, self.flat_slots_S, v_SKH)
        return keys_RLKH, values_RLKH

    def advance(self, segment_lengths: list[int]) -> None:
        """Counts the tokens of a finished forward as filled; segments beyond the selected rows have no row."""
        for row, length in zip(self.selected_rows, segment_lengths, strict=False):
            self.lengths[row] += length

    def _wipe_behind(self, row: int, length: int) -> None:
        """Decoding reads slots behind a row's end, with weight zero, which a nan left there would pass."""
        if self.written[row] > length:
            for storage_RLKH in self.keys_RLKH + self.values_RLKH:
                if storage_RLKH is not None:
                    storage_RLKH[row, length : self.written[row]] = 0.0

    def _storage(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, with room for n_slots; dtype, device, heads and head dim are those of `like`."""
        for layers in (self.keys_RLKH, self.values_RLKH):
            old_RLKH = layers[layer]
            if old_RLKH is None or old_RLKH.shape[1] < self.n_slots:
                # zeros, because slots behind a row's end are read, with weight zero
                layers[layer] = like.new_zeros(len(self.lengths), self.n_slots, *like.shape[-2:])
                if old_RLKH is not None:
                    layers[layer][:, : old_RLKH.shape[1]] = old_RLKH
        return self.keys_RLKH[layer], self.values_RLKH[layer]

    def _make_room(self, row: int, needed: int) -> None:
        if needed > self.max_tokens:
            raise ValueError(f"key/value cache row {row} holds {self.max_tokens} tokens, {needed} are needed")
        if needed > self.n_slots:
            n_slots = max(-(-needed // SLOTS_PER_STEP) * SLOTS_PER_STEP, 2 * self.n_slots)
            self.n_slots = min(n_slots, self.max_tokens)
