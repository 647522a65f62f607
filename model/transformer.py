"""A LLaMA-like decoder in one file: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Shape suffixes: B batch, T tokens, D model dim, V vocabulary, N query heads, K key/value heads, H head dim, F
feed-forward dim, L tokens in the cache. Parameter names are Meta's (wq, w1, tok_embeddings, ...). No
torch.distributed, no loss and no sampling in here: sharding is applied from outside, block by block.

There is no padding anywhere. A batch of rows of different lengths is one packed row (B = 1) plus `segment_lengths`;
attention runs segment by segment, so no mask is ever built and no token sees another segment. Generation uses the same
mechanism: one segment per sequence, each with its own row of the key/value cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.decode import KVCache

# ---------------------------------------------------------------------------------------------------------------------
# Rotary position embedding, E16


def rope_inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angles per position, omega_j = theta^(-2j / H) for j < H/2 (E16), stretched when config.rope_scaling is set.

    Returns an fp32 CPU tensor (H/2,), radians per token. With Llama-3.1's scaling a wavelength 2 pi / omega longer than
    original / low_freq_factor is stretched by `factor`, one shorter than original / high_freq_factor stays, and between
    them the two are blended linearly in original / wavelength.
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
    """cos and signed sin of position * omega, each (B, T, 1, H), as apply_rope wants them: (cos, cos), (-sin, sin).

    The angles are fp32: in bf16 whole numbers above 256 are rounded, and with them the positions.
    """
    angles = position_ids_BT[:, :, None, None].float() * inverse_frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x_BTNH: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turns the pairs (x_j, x_{j + H/2}) of every head by the angle of their position (E16):

    x_j cos - x_{j + H/2} sin and x_{j + H/2} cos + x_j sin. The pairing by halves is Hugging Face's; Meta's own files
    pair neighbours and would need their wq/wk rows permuted.
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


class Attention(nn.Module):
    """Causal grouped-query attention: query head n reads key/value head n // (N / K) (E17)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.is_grouped = config.n_kv_heads != config.n_heads
        query_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, query_width, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.wo = nn.Linear(query_width, config.dim, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        signed_sin: Tensor,
        segment_lengths: list[int],
        kv_cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTNH = apply_rope(self.wq(x_BTD).view(B, T, -1, self.head_dim), cos, signed_sin)
        k_BTKH = apply_rope(self.wk(x_BTD).view(B, T, -1, self.head_dim), cos, signed_sin)
        v_BTKH = self.wv(x_BTD).view(B, T, -1, self.head_dim)
        if kv_cache is not None and len(segment_lengths) == T:
            return self.wo(self._attend_one_each(q_BTNH[0], k_BTKH[0], v_BTKH[0], kv_cache, layer).view(1, T, -1))
        # split, not slices: the backward of n slices writes and adds n tensors of the whole row's length.
        pieces = zip(*(x.split(segment_lengths, dim=1) for x in (q_BTNH, k_BTKH, v_BTKH)), strict=True)
        outputs = []
        for segment, piece in enumerate(pieces):
            q_BNTH, k_BKTH, v_BKTH = (x.transpose(1, 2) for x in piece)
            if kv_cache is not None:
                k_BKTH, v_BKTH = kv_cache.append(layer, segment, k_BKTH, v_BKTH)
            outputs.append(self._attend(q_BNTH, k_BKTH, v_BKTH).transpose(1, 2))
        out_BTNH = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.wo(out_BTNH.reshape(B, T, -1))

    def _attend_one_each(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, kv_cache: KVCache, layer: int) -> Tensor:
        """_attend where each segment is one token: its row's keys are the cached ones and its own. Returns (T, N, H).

        Segments beyond the cache's selected rows are there to fill the shape: their output is zero.
        """
        T, S = len(q_TNH), len(kv_cache.selected_rows)
        keys_RLKH, values_RLKH = kv_cache.append_one(layer, k_TKH[:S], v_TKH[:S])
        outputs = []
        for run in kv_cache.runs:
            rows = slice(run.first_row, run.first_row + run.n_rows)
            q_PNH = q_TNH[run.first_segment : run.first_segment + run.n_rows]
            outputs.append(
                F.scaled_dot_product_attention(  # E17
                    q_PNH[:, :, None],
                    keys_RLKH[rows, : run.n_slots].transpose(1, 2),
                    values_RLKH[rows, : run.n_slots].transpose(1, 2),
                    attn_mask=run.mask_P11L,
                    enable_gqa=self.is_grouped,
                )[:, :, 0]
            )
        if S < T:
            outputs.append(torch.zeros_like(q_TNH[S:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, q_BNTH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(H)) v over the keys at or before each query; L >= T, the last T keys are new."""
        T, L = q_BNTH.shape[2], k_BKLH.shape[2]
        mask = None
        if 1 < T < L:  # several new tokens behind a cache: is_causal would align the corner at the wrong end
            mask = torch.ones(T, L, dtype=torch.bool, device=q_BNTH.device).tril(L - T)
        return F.scaled_dot_product_attention(  # E17
            q_BNTH, k_BKLH, v_BKLH, attn_mask=mask, is_causal=T == L and T > 1, enable_gqa=self.is_grouped
        )


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (E18)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))  # E18


class TransformerBlock(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, signed_sin: Tensor, segment_lengths: list[int], kv_cache: KVCache | None
    ) -> Tensor:
        normed_BTD = self.attention_norm(x_BTD)
        x_BTD = x_BTD + self.attention(normed_BTD, cos, signed_sin, segment_lengths, kv_cache, self.layer)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


# ---------------------------------------------------------------------------------------------------------------------
# The model


def _project(x_TD: Tensor, linear: nn.Linear) -> Tensor:
    weight_DF = linear.weight.t()
    return torch.mm(x_TD, weight_DF) if linear.bias is None else torch.addmm(linear.bias, x_TD, weight_DF)


class Transformer(nn.Module):
    """Token ids to logits (or to the final normed hidden states).

    `activation_checkpointing = True` recomputes each block in backward instead of keeping its inner activations.
    Safe to build under torch.device("meta"): the only numbers that are not parameters (RoPE's frequencies) are kept as
    a plain fp32 tensor outside the buffers, so neither to_empty() nor a change of dtype can spoil them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.inverse_frequencies = rope_inverse_frequencies(config)

    def head_weight(self) -> nn.Parameter:
        """The output head (V, D); the embedding matrix itself when tied."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights for training from nothing: N(0, 0.02), the two matrices that write into the residual stream
        divided by sqrt(2 n_layers) so that its variance does not grow with depth; norms 1, biases 0. Call before
        sharding."""
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
        kv_cache: KVCache | None = None,
        return_hidden: bool = False,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or the final normed hidden states (B, T, D) with return_hidden.

        segment_lengths: the row (B must be 1) is several sequences end to end, of these lengths; each attends only to
        itself. position_ids_BT: default 0, 1, ... from each segment's start (from the cached length on, with a cache).
        kv_cache: new keys and values are appended to its selected rows, one row per segment, and attention reads the
        whole row; without segment_lengths each of the B rows is one segment. When every segment is one token there may
        be more segments than selected rows: they fill the shape, and their logits mean nothing.
        last_only: compute norm and head for the last token of each segment only; T becomes the number of segments.
        Raises ValueError when lengths and shapes disagree.
        """
        B, T = input_ids_BT.shape
        if kv_cache is not None and segment_lengths is None and B > 1:
            flat = self.forward(
                input_ids_BT.reshape(1, B * T),
                segment_lengths=[T] * B,
                kv_cache=kv_cache,
                position_ids_BT=None if position_ids_BT is None else position_ids_BT.reshape(1, B * T),
                return_hidden=return_hidden,
                last_only=last_only,
            )
            return flat.view(B, -1, flat.shape[-1])
        segment_lengths = self._checked_segments(B, T, segment_lengths, kv_cache)
        device = input_ids_BT.device
        if position_ids_BT is None:
            starts = [0] * len(segment_lengths) if kv_cache is None else kv_cache.selected_lengths()
            if kv_cache is not None and len(segment_lengths) == T:  # one token each: one tensor instead of T
                position_ids_BT = torch.tensor([starts + [0] * (T - len(starts))], device=device)
            else:
                pieces = [torch.arange(s, s + n, device=device) for s, n in zip(starts, segment_lengths, strict=True)]
                position_ids_BT = torch.cat(pieces)[None]
        if self.inverse_frequencies.device != device:
            self.inverse_frequencies = self.inverse_frequencies.to(device)
        x_BTD = self.tok_embeddings(input_ids_BT)
        cos, signed_sin = rope_cos_sin(position_ids_BT, self.inverse_frequencies, x_BTD.dtype)  # once, not per layer
        if kv_cache is not None and len(segment_lengths) == T:
            kv_cache.plan_decode(x_BTD.dtype, device)
            if not torch.is_grad_enabled() and self.is_plain():
                hidden_TD = self._decode_step(x_BTD[0], cos[0], signed_sin[0], kv_cache)
                kv_cache.advance(segment_lengths)
                return (hidden_TD if return_hidden else torch.mm(hidden_TD, self.head_weight().t()))[None]
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, cos, signed_sin, segment_lengths, kv_cache, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, cos, signed_sin, segment_lengths, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(segment_lengths)
        if last_only:
            x_BTD = x_BTD[:, torch.tensor(segment_lengths, device=device).cumsum(0) - 1]
        hidden_BTD = self.norm(x_BTD)
        return hidden_BTD if return_hidden else F.linear(hidden_BTD, self.head_weight())

    def is_plain(self) -> bool:
        """No block's parameters are sharded, so their matrices can be read without calling the block."""
        return type(self.layers[0].attention.wq.weight) is nn.Parameter

    def _decode_step(self, x_TD: Tensor, cos: Tensor, signed_sin: Tensor, kv_cache: KVCache) -> Tensor:
        """The blocks and the last norm for one token per segment, (T, D): the formulas of forward without its modules.

        With a few rows a small model's time goes into calls, not arithmetic. Here are fewer: matrices are multiplied
        directly, residuals are added inside the products, and queries and keys turn together.
        """
        T, D = x_TD.shape
        for layer, block in enumerate(self.layers):
            attention, feed_forward = block.attention, block.feed_forward
            normed_TD = F.rms_norm(x_TD, (D,), block.attention_norm.weight, block.attention_norm.eps)  # E15
            q, k, v = (_project(normed_TD, linear) for linear in (attention.wq, attention.wk, attention.wv))
            turned_TNH = apply_rope(torch.cat((q, k), dim=1).view(T, -1, attention.head_dim), cos, signed_sin)  # E16
            q_TNH, k_TKH = turned_TNH.split((self.config.n_heads, self.config.n_kv_heads), dim=1)
            out_TNH = attention._attend_one_each(q_TNH, k_TKH, v.view(T, -1, attention.head_dim), kv_cache, layer)
            x_TD = torch.addmm(x_TD, out_TNH.view(T, -1), attention.wo.weight.t())
            normed_TD = F.rms_norm(x_TD, (D,), block.ffn_norm.weight, block.ffn_norm.eps)
            gate_TF = F.silu(torch.mm(normed_TD, feed_forward.w1.weight.t()))
            gate_TF = gate_TF.mul_(torch.mm(normed_TD, feed_forward.w3.weight.t()))  # E18
            x_TD = torch.addmm(x_TD, gate_TF, feed_forward.w2.weight.t())
        return F.rms_norm(x_TD, (D,), self.norm.weight, self.norm.eps)

    @staticmethod
    def _checked_segments(B: int, T: int, segment_lengths: list[int] | None, kv_cache: KVCache | None) -> list[int]:
        if segment_lengths is None:
            segment_lengths = [T]
        elif B != 1:
            raise ValueError(f"segment_lengths needs one packed row, found a batch of {B}")
        if sum(segment_lengths) != T or min(segment_lengths, default=0) < 1:
            raise ValueError(f"segment_lengths {segment_lengths} must be positive and sum to the row's {T} tokens")
        if kv_cache is not None:
            n_rows, n_segments = len(kv_cache.selected_rows), len(segment_lengths)
            if n_rows > n_segments or n_rows < n_segments < T:
                raise ValueError(f"{n_segments} segments for {n_rows} cache rows")
        return segment_lengths
