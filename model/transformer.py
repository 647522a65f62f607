"""A LLaMA-like decoder in one file: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Shape suffixes: B batch, T tokens, D model dim, V vocabulary, N query heads, K key/value heads, H head dim, F
feed-forward dim, L keys that a query may see, X queries of one key/value head. Parameter names are Meta's (wq, w1,
tok_embeddings, ...).

There is no padding. A batch of sequences of different lengths is one packed row (B = 1) plus `segment_lengths`.
Attention keeps to a segment without a mask: one call of PyTorch's varlen_attn for the whole row where that exists (CUDA
in half precision), one of scaled_dot_product_attention per segment elsewhere. We have not run varlen_attn on a GPU.

This file holds the training path only: no loss, no sampling, no torch.distributed. train/distributed.py shards the
model from outside, block by block; model/decode.py generates with a key/value cache, through the functions below.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig

# ---------------------------------------------------------------------------------------------------------------------
# Rotary position embedding, E16


def rope_inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angles per position, omega_j = theta^(-2j / H) for j < H/2 (E16), stretched when config.rope_scaling is set.

    Returns fp32 radians per token, (H/2,), on the CPU. Llama-3.1 stretches wavelengths 2 pi / omega longer than
    original / low_freq_factor, keeps those shorter than original / high_freq_factor, and blends linearly between.
    """
    # device="cpu" although the model may be built under torch.device("meta"): these numbers cannot be loaded later.
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    omega = 1.0 / (config.rope_theta**exponent)  # E16
    scaling = config.rope_scaling
    if scaling is None:
        return omega
    turns = scaling.original_max_positions * omega / (2 * torch.pi)  # full turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return blend * omega + (1.0 - blend) * omega / scaling.factor  # E16, llama3


def rope_cos_sin(position_ids_BT: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin of position * omega for apply_rope: (cos, cos) and (-sin, sin), each (B, T, 1, H).

    The angles are fp32: bf16 would round positions above 256.
    """
    angles = position_ids_BT[:, :, None, None].float() * inverse_frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x_BTNH: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turns the pairs (x_j, x_{j + H/2}) of every head by the angle of their position (E16).

    The pair becomes x_j cos - x_{j + H/2} sin and x_{j + H/2} cos + x_j sin. Pairing by halves is Hugging Face's way;
    Meta's own files pair neighbours, so the rows of their wq and wk have to be permuted first.
    """
    first, second = x_BTNH.chunk(2, dim=-1)
    return torch.addcmul(x_BTNH * cos, torch.cat((second, first), dim=-1), signed_sin)  # E16


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), the mean and the root in fp32 whatever the dtype of x (E15)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # E15; PyTorch's own takes the mean in fp32


class Segments(NamedTuple):
    """Sequences end to end in one row."""

    lengths: list[int]
    borders: Tensor | None  # int32, 0 and the end of each segment; None: attention goes segment by segment
    masks: list[Tensor | None]  # one each, as in attend


def attend(
    q_BTNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, mask: Tensor | None = None, *, segments: Segments | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(H)) v, (B, T, N, H) (E17). Query head n reads key/value head n // (N / K).

    Without a mask the queries belong to the keys (L = T), and each sees the keys up to its own, in its own segment. A
    mask broadcasts to (B, 1, T, L): True where a key is seen, or numbers that are added to the scores.
    """
    if segments is not None and segments.borders is not None:
        return _attend_to_whole_row(q_BTNH, k_BLKH, v_BLKH, segments)
    if segments is not None:
        # split, not slices: the backward of n slices writes and adds n tensors of the whole row's length.
        parts = (each.split(segments.lengths, dim=1) for each in (q_BTNH, k_BLKH, v_BLKH))
        outputs = [attend(*piece) for piece in zip(*parts, segments.masks, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    is_grouped = q_BTNH.shape[2] != k_BLKH.shape[2]
    if is_grouped and mask is not None:
        return _attend_by_groups(q_BTNH, k_BLKH, v_BLKH, mask)
    is_causal = mask is None and q_BTNH.shape[1] > 1
    q_BNTH, k_BKLH, v_BKLH = (each.transpose(1, 2) for each in (q_BTNH, k_BLKH, v_BLKH))
    out_BNTH = F.scaled_dot_product_attention(
        q_BNTH, k_BKLH, v_BKLH, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped
    )  # E17
    return out_BNTH.transpose(1, 2)


def _attend_by_groups(q_BTNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, mask: Tensor) -> Tensor:
    """attend where query heads share a key/value head: to it they are one head with N / K times as many queries.

    With enable_gqa and a mask, scaled_dot_product_attention on CUDA is left with its unfused formula, and on a CPU it
    took up to twice as long.
    """
    group = q_BTNH.shape[2] // k_BLKH.shape[2]
    q_BKXH = q_BTNH.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)  # X = T * group
    if q_BTNH.shape[1] > 1:
        mask = mask.repeat_interleave(group, dim=-2)
    out_BKXH = F.scaled_dot_product_attention(q_BKXH, k_BLKH.transpose(1, 2), v_BLKH.transpose(1, 2), attn_mask=mask)
    return out_BKXH.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)  # E17


def _attend_to_whole_row(q_1TNH: Tensor, k_1TKH: Tensor, v_1TKH: Tensor, segments: Segments) -> Tensor:
    """attend by one call for all segments."""
    q_TNH, k_TKH, v_TKH = q_1TNH[0], k_1TKH[0], v_1TKH[0]
    varlen_attn = _varlen_attn()
    keywords = _varlen_keywords(varlen_attn, q_TNH.shape[1] != k_TKH.shape[1])
    borders, longest = segments.borders, max(segments.lengths)
    return varlen_attn(q_TNH, k_TKH, v_TKH, borders, borders, longest, longest, **keywords)[None]  # E17, same scale


@functools.cache
def _varlen_attn() -> Callable | None:
    """PyTorch's varlen_attn; None before torch 2.10. Imported only where it may be called: that takes seconds."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@functools.cache
def _varlen_keywords(varlen_attn: Callable | None, is_grouped: bool) -> dict | None:
    """What asks varlen_attn for E17; None where its version cannot compute that."""
    if varlen_attn is None:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    # from torch 2.11 on causal attention is a window: any key before the query's own, none after it
    keywords = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if not is_grouped:
        return keywords
    return keywords | {"enable_gqa": True} if "enable_gqa" in parameters else None  # from torch 2.12 on


def _takes_whole_rows(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether varlen_attn can compute this model here: it is flash attention, in half precision, from Ampere on."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and config.head_dim in range(8, 257, 8)
        and _varlen_keywords(_varlen_attn(), config.n_heads != config.n_kv_heads) is not None
    )


def describe_attention(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """What computes the attention of packed rows, for the log."""
    if _takes_whole_rows(config, dtype, device):
        return "varlen_attn, one call per packed row"
    return "scaled_dot_product_attention, one call per sequence"


class Attention(nn.Module):
    """Causal grouped-query attention (E17)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, query_width, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.wo = nn.Linear(query_width, config.dim, bias=False)

    def project(self, x_BTD: Tensor, cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, N, H), keys and values (B, T, K, H); queries and keys are turned by their positions."""
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = (linear(x_BTD).view(B, T, -1, self.head_dim) for linear in (self.wq, self.wk, self.wv))
        return apply_rope(q_BTNH, cos, signed_sin), apply_rope(k_BTKH, cos, signed_sin), v_BTKH


def shared_prefix_mask(n_prefix: int, branch_lengths: list[int]) -> Tensor:
    """Mask of a segment that is a prefix and then several branches, all of which continue the prefix: (T, T) bool.

    Each branch sees the prefix and itself; its positions count from n_prefix.
    """
    n_tokens, start = n_prefix + sum(branch_lengths), n_prefix
    mask_TT = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    for length in branch_lengths:
        mask_TT[start + length :, start : start + length] = False
        start += length
    return mask_TT


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (E18)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.w2(self.gate(x_BTD))

    def gate(self, x_BTD: Tensor) -> Tensor:
        """What w2 takes in, (B, T, F)."""
        return F.silu(self.w1(x_BTD)) * self.w3(x_BTD)  # E18


class TransformerBlock(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, cos: Tensor, signed_sin: Tensor, segments: Segments) -> Tensor:
        out_BTNH = attend(*self.before_attention(x_BTD, cos, signed_sin), segments=segments)
        return self.after_attention(x_BTD, out_BTNH)

    def before_attention(self, x_BTD: Tensor, cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attend takes in: queries (B, T, N, H), keys and values (B, T, K, H)."""
        return self.attention.project(self.attention_norm(x_BTD), cos, signed_sin)

    def after_attention(self, x_BTD: Tensor, out_BTNH: Tensor) -> Tensor:
        """The block's output from its input and what attend returned."""
        x_BTD = x_BTD + self.attention.wo(out_BTNH.flatten(2))
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Transformer(nn.Module):
    """Token ids to logits (or to the final normed hidden states).

    `activation_checkpointing = True` recomputes each block in backward instead of keeping its inner activations.
    Safe to build under torch.device("meta"): RoPE's frequencies, the only numbers that are not parameters, are a plain
    fp32 tensor and no buffer, so neither to_empty() nor a change of dtype can spoil them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.inverse_frequencies = rope_inverse_frequencies(config)

    def head_weight(self) -> nn.Parameter:
        """The output head (V, D); the embedding matrix itself when tied."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights for pretraining; call before sharding.

        Matrices are drawn from N(0, 0.02); wo and w2, which write into the residual stream, are divided by
        sqrt(2 n_layers) so that its variance does not grow with depth. Norms are 1, biases 0.
        """
        residual_std = 0.02 / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                std = residual_std if name.endswith((".wo.weight", ".w2.weight")) else 0.02
                parameter.normal_(0.0, std, generator=generator)

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        position_ids_BT: Tensor | None = None,
        segment_lengths: list[int] | None = None,
        segment_masks: list[Tensor | None] | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or the final normed hidden states (B, T, D) with return_hidden.

        segment_lengths: the row (B must be 1) is several sequences end to end, of these lengths; each attends only to
        itself. segment_masks: for each segment None (a token sees those before it) or a mask as in attend, such as
        shared_prefix_mask. position_ids_BT: by default 0, 1, ... from the start of each segment.
        Raises ValueError when lengths and shapes disagree.
        """
        B, T = input_ids_BT.shape
        if segment_lengths is None:
            segment_lengths = [T]
        elif B != 1:
            raise ValueError(f"segment_lengths needs one packed row, found a batch of {B}")
        if sum(segment_lengths) != T or min(segment_lengths, default=0) < 1:
            raise ValueError(f"segment_lengths {segment_lengths} must be positive and sum to the row's {T} tokens")
        if position_ids_BT is None:
            position_ids_BT = torch.cat([torch.arange(n, device=input_ids_BT.device) for n in segment_lengths])[None]
        x_BTD = self.tok_embeddings(input_ids_BT)
        cos, signed_sin = self.rotation(position_ids_BT, x_BTD.dtype)  # once, not per layer
        segments = self.segments(segment_lengths, segment_masks or [None] * len(segment_lengths), x_BTD)
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, cos, signed_sin, segments, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, cos, signed_sin, segments)
        hidden_BTD = self.norm(x_BTD)
        return hidden_BTD if return_hidden else F.linear(hidden_BTD, self.head_weight())

    def rotation(self, position_ids_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """rope_cos_sin of these positions, on their device."""
        self.inverse_frequencies = self.inverse_frequencies.to(position_ids_BT.device)  # moves once
        return rope_cos_sin(position_ids_BT, self.inverse_frequencies, dtype)

    def segments(self, segment_lengths: list[int], masks: list[Tensor | None], x_BTD: Tensor) -> Segments:
        """The row's segments, with their borders on its device where varlen_attn will read them."""
        borders, is_causal = None, all(mask is None for mask in masks)
        if is_causal and x_BTD.shape[0] == 1 and _takes_whole_rows(self.config, x_BTD.dtype, x_BTD.device):
            ends = [0, *itertools.accumulate(segment_lengths)]
            # from pinned memory, so that the host does not wait for the copy
            borders = torch.tensor(ends, dtype=torch.int32, pin_memory=x_BTD.is_cuda)
            borders = borders.to(x_BTD.device, non_blocking=True)
        return Segments(segment_lengths, borders, masks)
