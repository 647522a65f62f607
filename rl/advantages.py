"""From sampled responses to advantages: KL-shaped rewards, GAE, whitening, KL controller (docs/math.md, E24-E28).

Everything here is a constant of the PPO update: no function builds a graph. The arithmetic is fp32 (fp64 for fp64
inputs) whatever the model's dtype: in bf16 a reward of -1.8 would become -1.796875. A slot outside the response mask is
replaced by `torch.where` before it enters any arithmetic, so it may hold inf or nan (0 * nan would still be nan).

Shape legend: B responses, R response slots. Slot t of `logprobs_BR` is the log-probability of response token t, slot t
of `values_BR` the value of the state before that token. `response_mask_BR` (bool) is True on the tokens the policy
chose, through EOS inclusive. Masks need be neither left-aligned nor free of holes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WHITENING_EPSILON = 1e-8  # added to the variance; a batch whose advantages are all equal whitens to 0, not to nan
MAX_KL_ERROR = 0.2  # bound of the relative KL error in one step of the adaptive controller (Ziegler et al. 2019)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


@torch.no_grad()
def kl_shaped_rewards(
    scores_B: Tensor, logprobs_BR: Tensor, ref_logprobs_BR: Tensor, response_mask_BR: Tensor, kl_coef: float
) -> Tensor:
    """Reward of every token: minus kl_coef times the k1 estimate (nats), plus the score on the last token (E24).

    The score sits on the last slot inside the mask: on EOS if the response ended, on the last generated token if it was
    cut off at the limit. A row without any token gets no reward at all.
    Returns (B, R), 0 outside the mask. Raises ValueError for shapes that disagree or a mask that is not bool.
    """
    check_response_shapes(response_mask_BR, logprobs_BR, ref_logprobs_BR)
    if scores_B.shape != response_mask_BR.shape[:1]:
        raise ValueError(f"scores {tuple(scores_B.shape)}, expected ({response_mask_BR.shape[0]},)")
    dtype = arithmetic_dtype(logprobs_BR)
    kl_BR = inside(logprobs_BR, response_mask_BR, dtype) - inside(ref_logprobs_BR, response_mask_BR, dtype)
    tokens_from_here_BR = response_mask_BR.flip(1).cumsum(1).flip(1)
    is_last_BR = response_mask_BR & (tokens_from_here_BR == 1)
    score_BR = torch.where(is_last_BR, scores_B.to(dtype)[:, None], 0.0)
    return score_BR - kl_coef * kl_BR  # E24


@torch.no_grad()
def kl_estimates(logprobs_BR: Tensor, ref_logprobs_BR: Tensor, response_mask_BR: Tensor) -> dict[str, Tensor]:
    """Three per-token estimates of KL(policy || reference) from sampled tokens, {"k1", "k2", "k3"}, each (B, R) (E27).

    With d = logprob - ref_logprob: k1 = d (unbiased, can be negative), k2 = d^2 / 2 (biased, small variance),
    k3 = exp(-d) - 1 + d (unbiased, never negative): J. Schulman, "Approximating KL Divergence", 2020. Nats, 0 outside
    the mask. From the difference on in fp64: close to the reference k3 is the difference of two nearly equal numbers.
    Raises ValueError as `kl_shaped_rewards`.
    """
    check_response_shapes(response_mask_BR, logprobs_BR, ref_logprobs_BR)
    kl_BR = inside(logprobs_BR, response_mask_BR, torch.float64) - inside(
        ref_logprobs_BR, response_mask_BR, torch.float64
    )
    estimates = {"k1": kl_BR, "k2": kl_BR.square() / 2, "k3": torch.expm1(-kl_BR) + kl_BR}  # E27
    return {name: estimate_BR.to(arithmetic_dtype(logprobs_BR)) for name, estimate_BR in estimates.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


@torch.no_grad()
def compute_gae(
    rewards_BR: Tensor, values_BR: Tensor, response_mask_BR: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the tokens inside the mask (E25; Schulman et al. 2016, eq. 16).

        delta_t     = reward_t + gamma * V_(t+1) - V_t
        advantage_t = delta_t + gamma * gae_lambda * advantage_(t+1),        return_t = advantage_t + V_t

    t + 1 is the next slot inside the mask: a hole is skipped and costs no discount. After the last token the
    value is 0, for a response cut off at the limit too: its score is the whole of what it will ever get, as the paper's
    reward judges the text as it is.
    Returns (advantages_BR, returns_BR), both 0 outside the mask; advantages are not whitened.
    Raises ValueError for shapes that disagree or a mask that is not bool.
    """
    check_response_shapes(response_mask_BR, rewards_BR, values_BR)
    dtype = arithmetic_dtype(values_BR)
    rewards_BR = inside(rewards_BR, response_mask_BR, dtype)
    values_BR = inside(values_BR, response_mask_BR, dtype)
    advantages_BR = torch.zeros_like(values_BR)
    next_value_B = values_BR.new_zeros(values_BR.shape[0])
    next_advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(values_BR.shape[1])):
        is_token_B = response_mask_BR[:, t]
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]  # E25
        advantage_B = delta_B + gamma * gae_lambda * next_advantage_B  # E25
        advantages_BR[:, t] = torch.where(is_token_B, advantage_B, 0.0)
        next_value_B = torch.where(is_token_B, values_BR[:, t], next_value_B)
        next_advantage_B = torch.where(is_token_B, advantage_B, next_advantage_B)
    return advantages_BR, advantages_BR + values_BR


@torch.no_grad()
def masked_sums(x_BR: Tensor, response_mask_BR: Tensor) -> tuple[float, float]:
    """(number of slots inside the mask, sum of x over them) in fp64, so that micro-batches and ranks add up.

    Mean and variance of the global batch: n, total = masked_sums(x), mean = total / n; then
    masked_sums((x - mean) ** 2), each pair summed over ranks before the division.
    Raises ValueError as `compute_gae`.
    """
    check_response_shapes(response_mask_BR, x_BR)
    return float(response_mask_BR.sum()), float(inside(x_BR, response_mask_BR, torch.float64).sum())


@torch.no_grad()
def whiten(advantages_BR: Tensor, response_mask_BR: Tensor, mean: float, variance: float) -> Tensor:
    """(advantage - mean) / sqrt(variance + 1e-8) inside the mask, 0 outside (E26).

    Mean and variance (sum of squared deviations / n) are those of the GLOBAL batch: the caller adds `masked_sums` over
    micro-batches and ranks. Statistics per rank would make the update depend on the number of ranks.
    Raises ValueError as `compute_gae`, and for a variance below 0 or nan.
    """
    check_response_shapes(response_mask_BR, advantages_BR)
    if not variance >= 0:
        raise ValueError(f"variance is {variance}, expected a number >= 0")
    advantages_BR = inside(advantages_BR, response_mask_BR, arithmetic_dtype(advantages_BR))
    whitened_BR = (advantages_BR - mean) / math.sqrt(variance + WHITENING_EPSILON)  # E26
    return torch.where(response_mask_BR, whitened_BR, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Figures of a batch


def explained_variance_sums(values_BR: Tensor, returns_BR: Tensor, response_mask_BR: Tensor) -> list[float]:
    """[n, sum(ret), sum(ret^2), sum(err), sum(err^2)] with ret = returns, err = returns - values, in fp64.

    Add them element by element over micro-batches and ranks, then call `explained_variance_from_sums`.
    Raises ValueError as `compute_gae`.
    """
    check_response_shapes(response_mask_BR, values_BR, returns_BR)
    returns_BR = inside(returns_BR.detach(), response_mask_BR, torch.float64)
    errors_BR = returns_BR - inside(values_BR.detach(), response_mask_BR, torch.float64)
    totals = [returns_BR.sum(), returns_BR.square().sum(), errors_BR.sum(), errors_BR.square().sum()]
    return [float(response_mask_BR.sum()), *(float(total) for total in totals)]


def explained_variance_from_sums(sums: list[float]) -> float:
    """1 - Var(returns - values) / Var(returns) over all tokens: 1 = perfect critic, 0 = no better than a constant.

    Negative where the critic is worse than a constant. If all returns are equal (or there is no token) nothing can be
    explained: 0.0.
    """
    n, return_sum, return_squares, error_sum, error_squares = sums
    if n == 0:
        return 0.0
    return_variance = return_squares / n - (return_sum / n) ** 2
    error_variance = error_squares / n - (error_sum / n) ** 2
    if return_variance <= 1e-12 * return_squares / n:  # what rounding leaves of equal numbers
        return 0.0
    return 1.0 - error_variance / return_variance


def next_kl_coef(
    kl_coef: float, mean_sequence_kl: float, *, kl_target: float, kl_horizon: float, n_responses: int
) -> float:
    """KL coefficient for the next rollout, from the KL of this one (E28; Ziegler et al. 2019, section 2.2).

    mean_sequence_kl: mean over the global batch of the sum of k1 over a response, nats; kl_target in the same unit;
    kl_horizon: number of responses over which the coefficient changes by the factor e^0.2 at most; n_responses: of this
    rollout, over all ranks. For a fixed coefficient do not call this.
    Raises ValueError for a KL that is not finite, and for a target, horizon or count out of range.
    """
    if not math.isfinite(mean_sequence_kl):
        raise ValueError(f"mean KL of the responses is {mean_sequence_kl}, expected a finite number")
    if not kl_target > 0:
        raise ValueError(f"kl_target is {kl_target}, expected a number > 0")
    if not 0 <= n_responses <= kl_horizon:  # beyond 5 horizons the factor below would be negative
        raise ValueError(f"kl_horizon is {kl_horizon}, expected at least the {n_responses} responses of one rollout")
    error = min(max(mean_sequence_kl / kl_target - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
    return kl_coef * (1.0 + error * n_responses / kl_horizon)  # E28


# ---------------------------------------------------------------------------------------------------------------------
# Shared with ppo_loss


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def inside(x_BR: Tensor, response_mask_BR: Tensor, dtype: torch.dtype) -> Tensor:
    """x where the mask is True and 0 elsewhere; no gradient reaches the slots outside."""
    return torch.where(response_mask_BR, x_BR.to(dtype), 0.0)


def check_response_shapes(response_mask_BR: Tensor, *tensors_BR: Tensor) -> None:
    """Raise ValueError unless the mask is bool (B, R) and all others have its shape.

    Without this check a (B,) or (B, 1) tensor would be broadcast over the tokens and train on nonsense.
    """
    if response_mask_BR.dtype != torch.bool or response_mask_BR.dim() != 2:
        raise ValueError(
            f"response mask is {response_mask_BR.dtype} {tuple(response_mask_BR.shape)}, expected torch.bool (B, R)"
        )
    for tensor in tensors_BR:
        if tensor.shape != response_mask_BR.shape:
            raise ValueError(
                f"found shapes {[tuple(each.shape) for each in tensors_BR]}, "
                f"expected that of the response mask, {tuple(response_mask_BR.shape)}"
            )
