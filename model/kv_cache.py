"""Preallocated keys and values of the tokens already seen, for generation.

Shape suffixes: R rows (sequences), K key/value heads, L slots, H head dim, T new tokens. Slot index = position: rows
have their own lengths and nothing is padded, so a row's attention never depends on how long the other rows are.
"""
import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values per layer, (R, K, L, H) each, and the number of filled slots per row.

    Storage is allocated by the first forward, in the dtype and on the device it computes in (under mixed precision
    these are not the parameters'). `selected_rows` says which rows the segments of the next forward belong to, in
    order. Raises ValueError when a row would overflow.
    """

    def __init__(self, config: ModelConfig, n_rows: int, max_tokens: int) -> None:
        # Rounded up so that rows begin on cache lines: BLAS may sum in another order where they do not.
        self.max_tokens = -(-max_tokens // 64) * 64
        self.shape = (n_rows, config.n_kv_heads, self.max_tokens, config.head_dim)
        self.keys_RKLH: list[Tensor | None] = [None] * config.n_layers
        self.values_RKLH: list[Tensor | None] = [None] * config.n_layers
        self.lengths = [0] * n_rows
        self.selected_rows = list(range(n_rows))

    def selected_lengths(self) -> list[int]:
        """Filled slots of the selected rows, in their order: the positions at which their next tokens stand."""
        return [self.lengths[row] for row in self.selected_rows]

    def append(self, layer: int, segment: int, k_1KTH: Tensor, v_1KTH: Tensor) -> tuple[Tensor, Tensor]:
        """Writes T new keys and values into the segment's row; returns the row's filled part (1, K, L, H).

        Lengths move on only with advance(), after the last layer, because every layer writes at the same slots.
        """
        keys_RKLH, values_RKLH = self.keys_RKLH[layer], self.values_RKLH[layer]
        if keys_RKLH is None or values_RKLH is None:
            keys_RKLH = self.keys_RKLH[layer] = torch.empty(self.shape, dtype=k_1KTH.dtype, device=k_1KTH.device)
            values_RKLH = self.values_RKLH[layer] = torch.empty_like(keys_RKLH)
        row = self.selected_rows[segment]
        start, end = self.lengths[row], self.lengths[row] + k_1KTH.shape[2]
        if end > self.max_tokens:
            raise ValueError(f"key/value cache row {row} holds {self.max_tokens} tokens, {end} are needed")
        keys_RKLH[row, :, start:end] = k_1KTH[0]
        values_RKLH[row, :, start:end] = v_1KTH[0]
        return keys_RKLH[row:row + 1, :, :end], values_RKLH[row:row + 1, :, :end]

    def advance(self, segment_lengths: list[int]) -> None:
        """Counts the tokens of a finished forward as filled."""
        for row, length in zip(self.selected_rows, segment_lengths, strict=True):
            self.lengths[row] += length
