"""The clipped losses of PPO and the entropy of the policy, as functions of tensors (docs/math.md, E29-E31).

Losses are means over all response tokens of the batch they are given. For micro-batches and ranks multiply each loss by
its `stats["tokens"]` and divide by the global number of tokens once; a mean of means would favour short responses.
Slots outside the response mask are replaced by `torch.where` before any arithmetic: they may hold inf or nan, and their
gradient is exactly 0. Arithmetic in fp32 (fp64 for fp64 inputs), statistics in fp64 from the log-ratio on.

Shape legend: B responses, R response slots; M rows (tokens), C rows of one chunk, D model dim, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl.advantages import arithmetic_dtype, check_response_shapes, inside
from train.weighted_cross_entropy import MAX_LOGITS_BYTES

# ---------------------------------------------------------------------------------------------------------------------
# Losses


def policy_loss(
    logprobs_BR: Tensor, old_logprobs_BR: Tensor, advantages_BR: Tensor, response_mask_BR: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, mean over the tokens inside the mask (E29; Schulman et al. 2017, eq. 7, negated).

        ratio = exp(logprob - old_logprob),  loss_t = max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range))

    Args: log-probabilities (nats) of the sampled tokens now and at rollout time, under one temperature; advantages are
    constants. Differentiable in logprobs_BR only.
    Returns (loss, stats), stats being 0-dim fp64 tensors without graph: tokens, clipped (tokens on which the clipped
    term was larger, so that they give no gradient), approx_kl_sum (k3 of old against new policy, see E27), ratio_sum;
    these four add up over micro-batches and ranks; max_ratio_deviation is max |ratio - 1|.
    An empty mask gives a loss of 0 that is still connected to logprobs_BR. Raises ValueError for shapes that disagree,
    a mask that is not bool, or clip_range <= 0.
    """
    check_response_shapes(response_mask_BR, logprobs_BR, old_logprobs_BR, advantages_BR)
    check_clip_range("clip_range", clip_range)
    dtype = arithmetic_dtype(logprobs_BR)
    advantages_BR = inside(advantages_BR.detach(), response_mask_BR, dtype)
    log_ratio_BR = inside(logprobs_BR, response_mask_BR, dtype) - inside(
        old_logprobs_BR.detach(), response_mask_BR, dtype
    )
    ratio_BR = log_ratio_BR.exp()
    unclipped_BR = -advantages_BR * ratio_BR
    clipped_BR = -advantages_BR * ratio_BR.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = masked_mean(torch.maximum(unclipped_BR, clipped_BR), response_mask_BR)  # E29

    log_ratio_BR = log_ratio_BR.detach().double()
    deviation_BR = torch.expm1(log_ratio_BR)  # ratio - 1 without losing its digits near 1
    n_tokens = response_mask_BR.sum().double()
    return loss, {
        "tokens": n_tokens,
        "clipped": (clipped_BR > unclipped_BR).sum().double(),
        "approx_kl_sum": (deviation_BR - log_ratio_BR).sum(),  # outside the mask both are 0
        "ratio_sum": n_tokens + deviation_BR.sum(),
        "max_ratio_deviation": deviation_BR.abs().max() if deviation_BR.numel() else torch.zeros_like(n_tokens),
    }


def value_loss(
    values_BR: Tensor, old_values_BR: Tensor, returns_BR: Tensor, response_mask_BR: Tensor, value_clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the critic, clipped around its old values, mean over the tokens inside the mask (E30).

        loss_t = 0.5 * max((V - return)^2, (clip(V, V_old - value_clip_range, V_old + value_clip_range) - return)^2)

    Args: old_values_BR and returns_BR are constants of the rollout, in units of reward. Differentiable in values_BR.
    Returns (loss, stats), stats being 0-dim fp64 tensors that add up: tokens, clipped (tokens on which the clipped term
    was larger, so that they give no gradient), error_square_sum (of the unclipped error, without the 0.5).
    Empty mask and errors as in `policy_loss`; value_clip_range may be inf (no clipping).
    """
    check_response_shapes(response_mask_BR, values_BR, old_values_BR, returns_BR)
    check_clip_range("value_clip_range", value_clip_range)
    dtype = arithmetic_dtype(values_BR)
    values_BR = inside(values_BR, response_mask_BR, dtype)
    old_values_BR = inside(old_values_BR.detach(), response_mask_BR, dtype)
    returns_BR = inside(returns_BR.detach(), response_mask_BR, dtype)
    # Not old + clip(V - old): its rounding would differ from V inside the range and count tokens as clipped.
    clipped_values_BR = torch.clamp(values_BR, old_values_BR - value_clip_range, old_values_BR + value_clip_range)
    unclipped_BR = (values_BR - returns_BR).square()
    clipped_BR = (clipped_values_BR - returns_BR).square()
    loss = masked_mean(0.5 * torch.maximum(unclipped_BR, clipped_BR), response_mask_BR)  # E30
    return loss, {
        "tokens": response_mask_BR.sum().double(),
        "clipped": (clipped_BR > unclipped_BR).sum().double(),
        "error_square_sum": unclipped_BR.detach().double().sum(),
    }


def masked_mean(x_BR: Tensor, response_mask_BR: Tensor) -> Tensor:
    """Mean of x over the mask, one division for the whole batch; 0 (connected to x) for an empty mask."""
    return torch.where(response_mask_BR, x_BR, 0.0).sum() / response_mask_BR.sum().clamp(min=1)


def check_clip_range(name: str, clip_range: float) -> None:
    """Raise ValueError unless clip_range > 0."""
    if not clip_range > 0:
        raise ValueError(f"{name} is {clip_range}, expected a number > 0")


# ---------------------------------------------------------------------------------------------------------------------
# Entropy


def token_entropies(
    hidden_MD: Tensor, head_weight_VD: Tensor, temperature: float, chunk_rows: int | None = None
) -> Tensor:
    """Entropy of softmax(hidden @ head.T / temperature) in each row, (M,), nats, between 0 and ln V (E31).

    Logits are made in the dtype of hidden, `chunk_rows` rows at a time (default: as many as MAX_LOGITS_BYTES allows),
    and again in the backward pass; (M, V) never exists. Softmax, entropy and the head's gradient in fp32 (fp64 for fp64
    inputs). Differentiable once in hidden and head.
    Raises ValueError for shapes or dtypes that disagree, temperature <= 0 (greedy has no entropy), chunk_rows < 1.
    """
    if hidden_MD.dim() != 2 or head_weight_VD.dim() != 2 or hidden_MD.shape[1] != head_weight_VD.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden_MD.shape)}, head weight {tuple(head_weight_VD.shape)}: expected (M, D), (V, D)"
        )
    if hidden_MD.dtype != head_weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_MD.dtype}, head weight {head_weight_VD.dtype}: expected one dtype")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number > 0")
    if chunk_rows is None:
        row_bytes = head_weight_VD.shape[0] * arithmetic_dtype(hidden_MD).itemsize
        chunk_rows = max(1, MAX_LOGITS_BYTES.get(hidden_MD.device.type, MAX_LOGITS_BYTES["cpu"]) // row_bytes)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected at least 1")
    return _TokenEntropies.apply(hidden_MD, head_weight_VD, temperature, chunk_rows)


def _chunk_probabilities(hidden_CD: Tensor, head_weight_VD: Tensor, temperature: float) -> Tensor:
    logits_CV = (hidden_CD @ head_weight_VD.T).to(arithmetic_dtype(hidden_CD))
    return logits_CV.div_(temperature).softmax(dim=1)


class _TokenEntropies(torch.autograd.Function):
    """The backward pass makes a chunk's logits again: the gradient of H for logit v is -p_v (ln p_v + H)."""

    @staticmethod
    def forward(ctx, hidden_MD, head_weight_VD, temperature, chunk_rows):
        entropy_M = hidden_MD.new_empty(hidden_MD.shape[0], dtype=arithmetic_dtype(hidden_MD))
        for start in range(0, hidden_MD.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            probabilities_CV = _chunk_probabilities(hidden_MD[rows], head_weight_VD, temperature)
            entropy_M[rows] = torch.special.entr(probabilities_CV).sum(dim=1)  # E31: entr(p) = -p ln p, 0 at p = 0
        ctx.save_for_backward(hidden_MD, head_weight_VD, entropy_M)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        return entropy_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_entropy_M):
        hidden_MD, head_weight_VD, entropy_M = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden_MD = torch.empty_like(hidden_MD) if need_hidden else None
        grad_head_VD = torch.zeros_like(head_weight_VD, dtype=entropy_M.dtype) if need_head else None
        for start in range(0, hidden_MD.shape[0], ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            probabilities_CV = _chunk_probabilities(hidden_MD[rows], head_weight_VD, ctx.temperature)
            grad_logits_CV = torch.special.entr(probabilities_CV) - probabilities_CV * entropy_M[rows, None]  # E31
            grad_logits_CV *= (grad_entropy_M[rows] / ctx.temperature)[:, None]
            if need_hidden:
                grad_hidden_MD[rows] = grad_logits_CV.to(hidden_MD.dtype) @ head_weight_VD
            if need_head:
                grad_head_VD.addmm_(grad_logits_CV.T, hidden_MD[rows].to(entropy_M.dtype))
        return grad_hidden_MD, None if grad_head_VD is None else grad_head_VD.to(head_weight_VD.dtype), None, None
