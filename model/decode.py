"""Generation's side of the transformer: weights laid out for few rows, the key/value cache, and the forwards.

Shape suffixes: R rows of the cache (one sequence each), L slots of a row, K key/value heads, H head dim, N query heads,
D model dim and inputs of a matrix, O its outputs, F feed-forward dim, V vocabulary, T new tokens of all rows of a
prefill, B rows of a decoding forward, S the first of them, which have a row in the cache, P rows of a run,
X query heads of a key/value head.

`prefill` feeds any number of tokens to each of some rows, `decode_step` one token to each of many. The numbers that a
step reads are on the device (`step_numbers`), so that steps can follow each other without the host. Both read
DecodeWeights, which are made of a model whose parameters are whole: a sharded one is gathered before
(train.distributed.gathered_model).

Slot index = position: rows have their own lengths and nothing is padded. `lengths` may be set back, to 0 for another
sequence or to a prefix that the next one shares. Slots beyond a row's length are overwritten or wiped before anything
reads them.

The result of a row does not depend, not in the last bit, on the other rows. Matrix products have a number of rows out
of a few for which they were seen to give the same bits (model/sampling.py); the shape of a row's attention follows from
its own length alone. Prefill attends sequence by sequence. Decoding attends once per run of neighbouring rows whose
lengths round up to the same multiple of SLOTS_PER_STEP, masked at each row's own length. On a CPU with several threads
every row is a run of its own: the kernel deals out the heads of a call to the threads, and the last bits of a row in
fp32 were seen to change with the number of rows in its call.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.transformer import Transformer, apply_rope, attend

SLOTS_PER_STEP = 128  # coarser: fewer calls, more masked slots read
ROWS_PER_TILE = 128  # most rows of one matrix product
FREE_SHARE = 0.8  # of free CUDA memory that the cache may take; activations, logits and its growth need the rest
PACKED_NUMBERS = 2**18  # matrices of at least 1 MB in fp32 are packed; smaller ones stay in the processor's cache

# ---------------------------------------------------------------------------------------------------------------------
# Weights


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix (O, D), or several with the same input one below the other, as products with few rows want it."""

    weight: Tensor  # packed: in oneDNN's blocked layout for this processor; else transposed, (D, O)
    bias_O: Tensor | None
    is_packed: bool


@dataclass(frozen=True, slots=True)
class BlockWeights:
    attention_norm_D: Tensor
    qkv: Matrix
    wo: Matrix
    ffn_norm_D: Tensor
    gate_up: Matrix
    w2: Matrix


class DecodeWeights:
    """The weights of a model in matrices for decoding. After every change of the model they have to be made again.

    On a CPU they are a copy, except matrices that need neither packing nor joining. On other devices joined matrices
    take the place of the model's own, whose parameters become views of them: there is no second copy.
    cuda_graphs: on CUDA, a RowDecoder on these weights records its steps (model/step_graphs.py).
    for_one_row: on a CPU, products of one row take less time and those of several rows more. It goes with
    rows_per_forward 1 (model/sampling.py), for a single stream.
    Raises ValueError when the model's parameters are sharded: decoding reads them without a collective.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, *, cuda_graphs: bool = False, for_one_row: bool = False) -> None:
        if type(model.layers[0].attention.wq.weight) is not nn.Parameter:
            raise ValueError(
                "the model is sharded, expected one with whole parameters (train.distributed.gathered_model)"
            )
        self.model, self.for_one_row = model, for_one_row
        self.blocks = [
            BlockWeights(
                block.attention_norm.weight.detach(),
                join_matrices([block.attention.wq, block.attention.wk, block.attention.wv], for_one_row),
                pack_matrix(block.attention.wo.weight.detach(), None, for_one_row),
                block.ffn_norm.weight.detach(),
                join_matrices([block.feed_forward.w1, block.feed_forward.w3], for_one_row),
                pack_matrix(block.feed_forward.w2.weight.detach(), None, for_one_row),
            )
            for block in model.layers
        ]
        self.norm_D = model.norm.weight.detach()
        self.head = pack_matrix(model.head_weight().detach(), None, for_one_row)
        self.has_graphs = cuda_graphs and self.device().type == "cuda"

    def embed(self, ids_T: Tensor, positions_T: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Rows (T, D) of the embedding, and the cos and sin that turn queries and keys, (T, 1, H) each."""
        x_TD = self.model.tok_embeddings(ids_T)
        cos, signed_sin = self.model.rotation(positions_T[None], x_TD.dtype)
        return x_TD, (cos[0], signed_sin[0])

    def device(self) -> torch.device:
        return self.head.weight.device


def to_device(numbers: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor; to CUDA from pinned memory, so that the host does not wait for the copy."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def join_matrices(layers: list[nn.Linear], for_one_row: bool) -> Matrix:
    """Layers with the same input as one matrix."""
    weight_OD = torch.cat([layer.weight for layer in layers])
    bias_O = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    if weight_OD.device.type != "cpu":
        for layer, part_OD in zip(layers, weight_OD.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.data = part_OD
    return pack_matrix(weight_OD, bias_O, for_one_row)


def pack_matrix(weight_OD: Tensor, bias_O: Tensor | None = None, for_one_row: bool = False) -> Matrix:
    """Packed where that is faster: large fp32 matrices on a CPU. The rule is fixed, since packing changes last bits.

    for_one_row: not packed, but with the longer of its two sides contiguous, which the product of one row reads at the
    rate of memory.
    """
    if for_one_row and weight_OD.device.type == "cpu" and weight_OD.shape[0] > weight_OD.shape[1]:
        return Matrix(weight_OD.t().contiguous(), bias_O, is_packed=False)
    is_packed = (
        not for_one_row
        and weight_OD.device.type == "cpu"
        and weight_OD.dtype == torch.float32
        and weight_OD.numel() >= PACKED_NUMBERS
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    weight = torch.ops.mkldnn._reorder_linear_weight(weight_OD) if is_packed else weight_OD.t()
    return Matrix(weight, bias_O, is_packed)


def product(x_BD: Tensor, matrix: Matrix, added_BO: Tensor | None = None) -> Tensor:
    """x W^T + bias, (B, O), plus added_BO if given, for a matrix without bias; in tiles of at most ROWS_PER_TILE."""
    if len(x_BD) > ROWS_PER_TILE:
        return torch.cat([product(tile, matrix) for tile in x_BD.split(ROWS_PER_TILE)])
    if not matrix.is_packed:
        added = matrix.bias_O if added_BO is None else added_BO
        return x_BD.mm(matrix.weight) if added is None else torch.addmm(added, x_BD, matrix.weight)
    if added_BO is None:
        return torch.ops.mkldnn._linear_pointwise(x_BD, matrix.weight, matrix.bias_O, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x_BD, added_BO, matrix.weight, matrix.bias_O, "add")


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Neighbouring rows of the cache that attend together."""

    first: int  # index of the run's first row among the rows that decode
    first_row: int  # its number in the cache
    n_rows: int
    n_slots: int  # slots read per row


class KVCache:
    """Keys and values per layer, (R, L, K, H) each, and the number of filled slots per row. In memory the slots of a
    head lie one after the other, as attention reads them.

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

    def append(self, layer: int, row: int, k_TKH: Tensor, v_TKH: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of T new tokens of a row; returns all of that row's, (1, L, K, H) each.

        The caller counts the tokens in `lengths` after the last layer, because every layer writes at the same slots.
        """
        start, end = self.lengths[row], self.lengths[row] + len(k_TKH)
        keys_RLKH, values_RLKH = self._storage(layer, k_TKH)
        keys_RLKH[row, start:end], values_RLKH[row, start:end] = k_TKH, v_TKH
        return keys_RLKH[row : row + 1, :end], values_RLKH[row : row + 1, :end]

    def append_one_each(
        self, layer: int, slots: tuple[Tensor, Tensor], k_SKH: Tensor, v_SKH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes one new key and value for each of S rows, at (its row, its position), S each; returns the storage."""
        keys_RLKH, values_RLKH = self._storage(layer, k_SKH)
        keys_RLKH.index_put_(slots, k_SKH)
        values_RLKH.index_put_(slots, v_SKH)
        return keys_RLKH, values_RLKH

    def _storage(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, with room for n_slots; dtype, device, heads and head dim are those of `like`."""
        for layers in (self.keys_RLKH, self.values_RLKH):
            old_RLKH = layers[layer]
            if old_RLKH is None or old_RLKH.shape[1] < self.n_slots:
                n_kv_heads, head_dim = like.shape[-2:]
                # zeros, because slots beyond a row's length are read, with weight zero
                storage_RKLH = like.new_zeros(len(self.lengths), n_kv_heads, self.n_slots, head_dim)
                layers[layer] = storage_RKLH.transpose(1, 2)
                if old_RLKH is not None:
                    layers[layer][:, : old_RLKH.shape[1]] = old_RLKH
        return self.keys_RLKH[layer], self.values_RLKH[layer]


def row_bytes(config: ModelConfig, max_tokens: int, itemsize: int) -> int:
    """Bytes of a cache row at its full length; itemsize: bytes of one number."""
    n_slots = -(-max_tokens // SLOTS_PER_STEP) * SLOTS_PER_STEP
    return 2 * config.n_layers * n_slots * config.n_kv_heads * config.head_dim * itemsize


def rows_that_fit(n_rows: int, bytes_per_row: int, cache_bytes: int, device: torch.device) -> int:
    """At most n_rows, at least 1: as many as fit into cache_bytes; 0: on CUDA into what is free, elsewhere all."""
    if not cache_bytes and device.type == "cuda":
        n_free, _ = torch.cuda.mem_get_info(device)
        n_reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        cache_bytes = int(FREE_SHARE * (n_free + n_reusable))
    return max(1, min(n_rows, cache_bytes // bytes_per_row)) if cache_bytes else n_rows


def slots_after_step(cache: KVCache, row: int) -> int:
    """Slots that a row's attention reads after one new token."""
    return (cache.lengths[row] // SLOTS_PER_STEP + 1) * SLOTS_PER_STEP


def decode_runs(cache: KVCache, rows: list[int], device: torch.device) -> list[DecodeRun]:
    """The runs in which `rows` attend after one new token each."""
    n_slots_S = [slots_after_step(cache, row) for row in rows]
    is_joint = device.type != "cpu" or torch.get_num_threads() == 1
    runs, first = [], 0
    for end in range(1, len(rows) + 1):
        continues = end < len(rows) and n_slots_S[end] == n_slots_S[first] and rows[end] == rows[end - 1] + 1
        if not (is_joint and continues):
            runs.append(DecodeRun(first, rows[first], end - first, n_slots_S[first]))
            first = end
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# Forwards


def project(block: BlockWeights, x_BD: Tensor, rotation: tuple[Tensor, Tensor], config: ModelConfig) -> list[Tensor]:
    """Turned queries (B, N, H), turned keys and values (B, K, H) of rows whose positions made `rotation`."""
    n_turned = config.n_heads + config.n_kv_heads
    normed_BD = torch.rms_norm(x_BD, (config.dim,), block.attention_norm_D, config.norm_eps)  # E15
    qkv_BOH = product(normed_BD, block.qkv).view(len(x_BD), -1, config.head_dim)
    turned_BOH = apply_rope(qkv_BOH[:, :n_turned], *rotation)
    return [turned_BOH[:, : config.n_heads], turned_BOH[:, config.n_heads :], qkv_BOH[:, n_turned:]]


def gate(block: BlockWeights, x_BD: Tensor, config: ModelConfig) -> Tensor:
    """What w2 takes in, (B, F)."""
    normed_BD = torch.rms_norm(x_BD, (config.dim,), block.ffn_norm_D, config.norm_eps)  # E15
    gate_BF, up_BF = product(normed_BD, block.gate_up).chunk(2, dim=1)
    return F.silu(gate_BF).mul_(up_BF)  # E18


def logits_of(weights: DecodeWeights, x_BD: Tensor) -> Tensor:
    """Logits (B, V) of the last block's output."""
    config = weights.model.config
    return product(torch.rms_norm(x_BD, (config.dim,), weights.norm_D, config.norm_eps), weights.head)  # E15


def attend_one_each(
    q_SNH: Tensor, keys_RLKH: Tensor, values_RLKH: Tensor, mask_S11L: Tensor, runs: list[DecodeRun]
) -> list[Tensor]:
    """attend for one query of each row, (P, N * H) for each run.

    For SDPA the X query heads of a key/value head are X queries of one head. Against attend this saves transposes: with
    few rows, calls cost as much time as arithmetic.
    """
    n_kv_heads, outputs = keys_RLKH.shape[2], []
    for run in runs:
        own, cached = slice(run.first, run.first + run.n_rows), slice(run.first_row, run.first_row + run.n_rows)
        out_PKXH = F.scaled_dot_product_attention(
            q_SNH[own].unflatten(1, (n_kv_heads, -1)),
            keys_RLKH[cached, : run.n_slots].transpose(1, 2),
            values_RLKH[cached, : run.n_slots].transpose(1, 2),
            attn_mask=mask_S11L[own, ..., : run.n_slots],
        )  # E17
        outputs.append(out_PKXH.flatten(1))
    return outputs


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The new tokens of one row in a prefill."""

    row: int
    span: slice  # among the T new tokens of all rows
    mask_TL: Tensor | None  # True where a key is seen; None: the row was empty, attention is causal


def spans_of(cache: KVCache, rows: list[int], token_ids: list[list[int]], device: torch.device) -> list[NewTokens]:
    """Where the new tokens of each row lie, and what they see. Reserves their slots."""
    ends, spans = list(accumulate(map(len, token_ids))), []
    for row, n_new, end in zip(rows, map(len, token_ids), ends, strict=True):
        cache.make_room(row, n_new)
        n_cached, mask_TL = cache.lengths[row], None
        if n_cached:
            mask_TL = torch.ones(n_new, n_cached + n_new, dtype=torch.bool, device=device).tril(n_cached)
        spans.append(NewTokens(row, slice(end - n_new, end), mask_TL))
    return spans


@torch.inference_mode()
def prefill(
    weights: DecodeWeights, cache: KVCache, rows: list[int], token_ids: list[list[int]], n_rows: int = 0
) -> Tensor:
    """Feeds the next tokens, at least one, of each of S `rows`; returns the logits (S, V) after the last of each.

    The matrix products have n_rows rows, if that is more than there are tokens; those beyond only fill the shape.
    """
    T = sum(map(len, token_ids))
    filler = [0] * max(0, n_rows - T)
    flat_ids = [token_id for ids in token_ids for token_id in ids]
    starts = [cache.lengths[row] for row in rows]
    positions = [start + offset for start, ids in zip(starts, token_ids, strict=True) for offset in range(len(ids))]
    numbers = to_device([flat_ids + filler, positions + filler], torch.long, weights.device())
    x_TD, rotation = weights.embed(*numbers)
    spans, config = spans_of(cache, rows, token_ids, x_TD.device), weights.model.config
    for layer, block in enumerate(weights.blocks):
        q_TNH, k_TKH, v_TKH = project(block, x_TD, rotation, config)
        out_TNH = torch.zeros_like(q_TNH) if filler else torch.empty_like(q_TNH)
        for new in spans:
            keys_1LKH, values_1LKH = cache.append(layer, new.row, k_TKH[new.span], v_TKH[new.span])
            out_TNH[new.span] = attend(q_TNH[None, new.span], keys_1LKH, values_1LKH, new.mask_TL)[0]
        x_TD = x_TD + product(out_TNH.flatten(1), block.wo)
        x_TD = x_TD + product(gate(block, x_TD, config), block.w2)
    for row, ids in zip(rows, token_ids, strict=True):
        cache.lengths[row] += len(ids)
    # one row at a time: a shape that does not depend on what else is prefilled
    return torch.cat([logits_of(weights, x_TD[new.span.stop - 1 : new.span.stop]) for new in spans])


@torch.inference_mode()
def step_numbers(
    weights: DecodeWeights, cache: KVCache, rows: list[int], token_ids: list[int | None], n_rows: int, n_steps: int = 1
) -> Tensor:
    """What n_steps decoding steps of `rows`, which are ascending, begin with: (4, B) on the device, in one copy.

    Token, position, row of the cache, and what a step adds to the position. The forward has n_rows rows; those beyond
    the given ones only fill the shape. A row without a token takes part without effect: it writes one slot beyond its
    length. Reserves the slots; the caller counts the tokens in `lengths`.
    """
    moves = [int(token_id is not None) for token_id in token_ids]
    for row, move in zip(rows, moves, strict=True):
        if move:
            cache.wipe_beyond(row)
        cache.make_room(row, n_steps if move else 1)
    filler = [0] * (n_rows - len(rows))
    positions = [cache.lengths[row] for row in rows]
    numbers = [each + filler for each in ([token_id or 0 for token_id in token_ids], positions, rows, moves)]
    return to_device(numbers, torch.long, weights.device())


def attention_mask(positions_S: Tensor, n_slots: int, dtype: torch.dtype) -> Tensor:
    """Added to the scores, (S, 1, 1, L): 0 up to a row's new token, -inf after it."""
    unseen_SL = torch.arange(n_slots, device=positions_S.device) > positions_S[:, None]
    mask_SL = torch.zeros(unseen_SL.shape, dtype=dtype, device=unseen_SL.device).masked_fill_(unseen_SL, -torch.inf)
    return mask_SL[:, None, None]


@torch.inference_mode()
def decode_step(weights: DecodeWeights, cache: KVCache, numbers_4B: Tensor, runs: list[DecodeRun]) -> Tensor:
    """Feeds one token to each of S rows, the first of numbers_4B (step_numbers), which attend in `runs`; returns the
    logits (S, V) after them. Asks nothing of the host."""
    S, B = runs[-1].first + runs[-1].n_rows, numbers_4B.shape[1]
    ids_B, positions_B, rows_B, _ = numbers_4B
    config, slots = weights.model.config, (rows_B[:S], positions_B[:S])
    x_BD, rotation = weights.embed(ids_B, positions_B)
    mask_S11L = attention_mask(positions_B[:S], max(run.n_slots for run in runs), x_BD.dtype)
    for layer, block in enumerate(weights.blocks):
        q_BNH, k_BKH, v_BKH = project(block, x_BD, rotation, config)
        keys_RLKH, values_RLKH = cache.append_one_each(layer, slots, k_BKH[:S], v_BKH[:S])
        outputs = attend_one_each(q_BNH[:S], keys_RLKH, values_RLKH, mask_S11L, runs)
        if B > S:
            outputs.append(q_BNH[S:].flatten(1))  # fills the shape
        out_BD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        # Residuals are added inside the products: a small model's time goes into calls, not into arithmetic.
        x_BD = product(out_BD, block.wo, x_BD)
        x_BD = product(gate(block, x_BD, config), block.w2, x_BD)
    return logits_of(weights, x_BD)[:S]
