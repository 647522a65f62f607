"""Generation's side of the transformer: the key/value cache and the forwards that read and fill it.

Shape suffixes: R rows of the cache (one sequence each), L slots of a row, K key/value heads, H head dim, N query heads,
D model dim, F feed-forward dim, V vocabulary, T new tokens of one row, B rows of a decoding forward, S the first of
them, which have a row in the cache, P rows of a run.

`prefill` feeds any number of tokens to one row, `decode_step` one token to each of many rows. Both use the modules and
functions of model/transformer.py on a model whose parameters are whole: a sharded one is gathered before
(train.distributed.gathered_model).

Slot index = position: rows have their own lengths and nothing is padded. `lengths` may be set back, to 0 for another
sequence or to a prefix that the next one shares. Slots beyond a row's length are overwritten or wiped before anything
reads them.

The result of a row does not depend, not in the last bit, on the other rows, because the shape of its attention follows
from its own length alone. Decoding attends once per run of neighbouring rows whose lengths round up to the same
multiple of SLOTS_PER_STEP, masked at each row's own length. On a CPU with several threads every row is a run of its
own: the kernel deals out the heads of a call to the threads, and the last bits of a row in fp32 were seen to change
with the number of rows in its call.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.transformer import Transformer, attend

SLOTS_PER_STEP = 128  # coarser: fewer calls, more masked slots read

# ---------------------------------------------------------------------------------------------------------------------
# The cache


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Neighbouring rows of the cache that attend together."""

    first: int  # index of the run's first row among the rows that decode
    first_row: int  # its number in the cache
    n_rows: int
    n_slots: int  # slots read per row
    mask_P11L: Tensor  # added to the scores: 0 up to the row's new token, -inf after it


class KVCache:
    """Keys and values per layer, (R, L, K, H) each, and the number of filled slots per row.

    Storage is allocated by the first forward, in its dtype and on its device, and grows with the longest row, at least
    twofold each time: a limit of 16384 tokens costs nothing while no row comes near it. Raises ValueError when a row
    would overflow.
    """

    def __init__(self, config: ModelConfig, n_rows: int, max_tokens: int) -> None:
        self.max_tokens = -(-max_tokens // SLOTS_PER_STEP) * SLOTS_PER_STEP
        self.n_slots = 0  # per row, of storage in use from the next forward on
        self.keys_RLKH: list[Tensor | None] = [None] * config.n_layers
        self.values_RLKH: list[Tensor | None] = [None] * config.n_layers
        self.lengths = [0] * n_rows
        self.written = [0] * n_rows  # slots that may hold something; those beyond are zero

    def make_room(self, row: int, n_new: int) -> None:
        """Reserves slots for n_new more tokens of a row."""
        needed = self.lengths[row] + n_new
        if needed > self.max_tokens:
            raise ValueError(f"key/value cache row {row} holds {self.max_tokens} tokens, {needed} are needed")
        if needed > self.n_slots:
            n_slots = max(-(-needed // SLOTS_PER_STEP) * SLOTS_PER_STEP, 2 * self.n_slots)
            self.n_slots = min(n_slots, self.max_tokens)
        self.written[row] = max(self.written[row], needed)

    def wipe_beyond(self, row: int) -> None:
        """Zeros the slots beyond a row's length. Decoding reads them with weight zero, which would let a nan pass."""
        if self.written[row] > self.lengths[row]:
            for storage_RLKH in self.keys_RLKH + self.values_RLKH:
                if storage_RLKH is not None:
                    storage_RLKH[row, self.lengths[row] : self.written[row]] = 0.0
            self.written[row] = self.lengths[row]

    @torch.inference_mode()
    def copy_row(self, source: int, row: int, n: int) -> None:
        """Makes the first n slots of another row, which are filled, those of this one."""
        self.lengths[row] = 0
        self.make_room(row, n)
        for storage_RLKH in self.keys_RLKH + self.values_RLKH:
            storage_RLKH[row, :n] = storage_RLKH[source, :n]
        self.lengths[row] = n

    def append(self, layer: int, row: int, k_1TKH: Tensor, v_1TKH: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of T new tokens of a row; returns all of that row's, (1, L, K, H) each.

        The caller counts the tokens in `lengths` after the last layer, because every layer writes at the same slots.
        """
        start, end = self.lengths[row], self.lengths[row] + k_1TKH.shape[1]
        keys_RLKH, values_RLKH = self._storage(layer, k_1TKH)
        keys_RLKH[row, start:end], values_RLKH[row, start:end] = k_1TKH[0], v_1TKH[0]
        return keys_RLKH[row : row + 1, :end], values_RLKH[row : row + 1, :end]

    def append_one_each(self, layer: int, flat_slots_S: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one new key and value for each of S rows, at slots counted over all rows; returns the storage."""
        keys_RLKH, values_RLKH = self._storage(layer, k_SKH)
        keys_RLKH.flatten(0, 1).index_copy_(0, flat_slots_S, k_SKH)
        values_RLKH.flatten(0, 1).index_copy_(0, flat_slots_S, v_SKH)
        return keys_RLKH, values_RLKH

    def _storage(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, with room for n_slots; dtype, device, heads and head dim are those of `like`."""
        for layers in (self.keys_RLKH, self.values_RLKH):
            old_RLKH = layers[layer]
            if old_RLKH is None or old_RLKH.shape[1] < self.n_slots:
                # zeros, because slots beyond a row's length are read, with weight zero
                layers[layer] = like.new_zeros(len(self.lengths), self.n_slots, *like.shape[-2:])
                if old_RLKH is not None:
                    layers[layer][:, : old_RLKH.shape[1]] = old_RLKH
        return self.keys_RLKH[layer], self.values_RLKH[layer]


def decode_runs(cache: KVCache, rows: list[int], dtype: torch.dtype, device: torch.device) -> list[DecodeRun]:
    """The runs in which `rows` attend after one new token each."""
    lengths = [cache.lengths[row] for row in rows]
    n_slots_S = [(length // SLOTS_PER_STEP + 1) * SLOTS_PER_STEP for length in lengths]
    unseen_SL = torch.arange(max(n_slots_S, default=0), device=device) > torch.tensor(lengths, device=device)[:, None]
    mask_SL = torch.zeros(unseen_SL.shape, dtype=dtype, device=device).masked_fill_(unseen_SL, -torch.inf)
    is_joint = device.type != "cpu" or torch.get_num_threads() == 1
    runs, first = [], 0
    for end in range(1, len(rows) + 1):
        continues = end < len(rows) and n_slots_S[end] == n_slots_S[first] and rows[end] == rows[end - 1] + 1
        if not (is_joint and continues):
            n_slots = n_slots_S[first]
            runs.append(DecodeRun(first, rows[first], end - first, n_slots, mask_SL[first:end, None, None, :n_slots]))
            first = end
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# Forwards


def check_whole(model: Transformer) -> None:
    """Raises ValueError when the model's parameters are sharded: decoding reads them without a collective."""
    if type(model.layers[0].attention.wq.weight) is not nn.Parameter:
        raise ValueError("the model is sharded, expected one with whole parameters (train.distributed.gathered_model)")


@torch.inference_mode()
def prefill(model: Transformer, cache: KVCache, row: int, token_ids: list[int]) -> Tensor:
    """Feeds the next tokens of a row, at least one; returns the logits (V,) after the last of them."""
    if len(token_ids) == 1:
        return decode_step(model, cache, [row], token_ids, n_rows=1)[0]
    device, n_cached, T = model.head_weight().device, cache.lengths[row], len(token_ids)
    cache.make_room(row, T)
    mask_TL = torch.ones(T, n_cached + T, dtype=torch.bool, device=device).tril(n_cached) if n_cached else None
    x_1TD = model.tok_embeddings(torch.tensor([token_ids], device=device))
    rotation = model.rotation(torch.arange(n_cached, n_cached + T, device=device)[None], x_1TD.dtype)
    for layer, block in enumerate(model.layers):
        q_1TNH, k_1TKH, v_1TKH = block.attention.project(block.attention_norm(x_1TD), *rotation)
        out_1TNH = attend(q_1TNH, *cache.append(layer, row, k_1TKH, v_1TKH), mask_TL)
        x_1TD = x_1TD + block.attention.wo(out_1TNH.flatten(2))
        x_1TD = x_1TD + block.feed_forward(block.ffn_norm(x_1TD))
    cache.lengths[row] += T
    return F.linear(model.norm(x_1TD[:, -1]), model.head_weight())[0]


@torch.inference_mode()
def decode_step(model: Transformer, cache: KVCache, rows: list[int], token_ids: list[int], n_rows: int) -> Tensor:
    """Feeds one token to each of `rows`, which are ascending; returns the logits (S, V) after them.

    The forward has n_rows rows; those beyond the given ones only fill the shape.
    """
    device, S = model.head_weight().device, len(rows)
    for row in rows:
        cache.wipe_beyond(row)
        cache.make_room(row, 1)
    filler = [0] * (n_rows - S)
    x_BD = model.tok_embeddings(torch.tensor(token_ids + filler, device=device))
    positions = [cache.lengths[row] for row in rows]
    rotation = model.rotation(torch.tensor([positions + filler], device=device), x_BD.dtype)
    runs = decode_runs(cache, rows, x_BD.dtype, device)
    flat_slots = [row * cache.n_slots + position for row, position in zip(rows, positions, strict=True)]
    flat_slots_S = torch.tensor(flat_slots, dtype=torch.long, device=device)
    for layer, block in enumerate(model.layers):
        q_1BNH, k_1BKH, v_1BKH = block.attention.project(block.attention_norm(x_BD)[None], *rotation)
        keys_RLKH, values_RLKH = cache.append_one_each(layer, flat_slots_S, k_1BKH[0, :S], v_1BKH[0, :S])
        out_BNH = torch.zeros_like(q_1BNH[0]) if S < n_rows else torch.empty_like(q_1BNH[0])
        for run in runs:
            cached = slice(run.first_row, run.first_row + run.n_rows), slice(run.n_slots)
            own = slice(run.first, run.first + run.n_rows)
            out_BNH[own] = attend(q_1BNH[0, own, None], keys_RLKH[cached], values_RLKH[cached], run.mask_P11L)[:, 0]
        # Residuals are added inside the products: a small model's time goes into calls, not into arithmetic.
        x_BD = torch.addmm(x_BD, out_BNH.flatten(1), block.attention.wo.weight.t())
        gate_BF = block.feed_forward.gate(block.ffn_norm(x_BD))
        x_BD = torch.addmm(x_BD, gate_BF, block.feed_forward.w2.weight.t())
    for row in rows:
        cache.lengths[row] += 1
    return F.linear(model.norm(x_BD), model.head_weight())[:S]
