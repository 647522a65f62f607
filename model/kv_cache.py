"""Preallocated keys and values of the tokens already seen, for generation.

Shape suffixes: R rows (sequences), K key/value heads, L slots, H head dim, T new tokens. Slot index = position: rows have
their own lengths and nothing is padded, so a row's attention never depends on how long the other rows are.
"""
import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values per layer, (R, K, L, H) each, and the number of filled slots per row.

    `selected_rows` says which rows the segments of the next forward belong to, in order; the sampler narrows it as sequences
    finish. Raises ValueError when a row would overflow.
    """

    def __init__(self, config: ModelConfig, n_rows: int, max_tokens: int, *, dtype: torch.dtype,
                 device: torch.device | str) -> None:
        shape = (n_rows, config.n_kv_heads, max_tokens, config.head_dim)
        self.keys_RKLH = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values_RKLH = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.max_tokens = max_tokens
        self.lengths = [0] * n_rows
        self.selected_rows = list(range(n_rows))

    def selected_lengths(self) -> list[int]:
        """Filled slots of the selected rows, in their order: the positions at which their next tokens stand."""
        return [self.lengths[row] for row in self.selected_rows]

    def append(self, layer: int, segment: int, k_1KTH: Tensor, v_1KTH: Tensor) -> tuple[Tensor, Tensor]:
        """Writes T new keys and values behind the filled slots of the segment's row; returns that row's filled part (1, K, L, H).

        Lengths move on only with advance(), after the last layer, because every layer writes at the same slots.
        """
        row = self.selected_rows[segment]
        start, end = self.lengths[row], self.lengths[row] + k_1KTH.shape[2]
        if end > self.max_tokens:
            raise ValueError(f"key/value cache row {row} holds {self.max_tokens} tokens, {end} are needed")
        self.keys_RKLH[layer][row, :, start:end] = k_1KTH[0]
        self.values_RKLH[layer][row, :, start:end] = v_1KTH[0]
        return self.keys_RKLH[layer][row:row + 1, :, :end], self.values_RKLH[layer][row:row + 1, :, :end]

    def advance(self, segment_lengths: list[int]) -> None:
        """Counts the tokens of a finished forward as filled."""
        for row, length in zip(self.selected_rows, segment_lengths, strict=True):
            self.lengths[row] += length
