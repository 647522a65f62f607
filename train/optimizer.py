"""AdamW parameter groups and the learning-rate schedule (E12, E13)."""

import math

import torch

SCHEDULES = ("cosine", "linear", "constant")


def schedule_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Factor of the learning rate in optimizer step `step`, counted 1..total_steps (E12).

    warm-up  f(s) = s / (W + 1)                          for s <= W: the first step already moves (HF starts with 0)
    cosine   f(s) = (1 + cos(pi * (s - 1 - W) / (S - W))) / 2    1 at s = W + 1, still above 0 at s = S
    linear   f(s) = 1 - (s - 1 - W) / (S - W)
    constant f(s) = 1
    with S = total_steps, W = warmup_steps. Steps outside 1..S raise ValueError.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step: found {step}, expected 1..{total_steps}")
    if step <= warmup_steps:
        return step / (warmup_steps + 1)  # E12
    progress = (step - 1 - warmup_steps) / (total_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))  # E12
    if schedule == "linear":
        return 1.0 - progress  # E12
    if schedule == "constant":
        return 1.0
    raise ValueError(f"schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}")


def warmup_steps_of(warmup_ratio: float, total_steps: int) -> int:
    """Number of warm-up steps W = ceil(ratio * total), at most total - 1 so that the full rate is reached."""
    # 0.02 * 50 is 1.0000000000000002 in binary: without the round() that would be two warm-up steps
    return min(math.ceil(round(warmup_ratio * total_steps, 9)), total_steps - 1)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's `lr` to its own base rate times `factor`; returns the first group's rate.

    The base rate is the `lr` the group was made with, kept as `initial_lr`; groups may differ (muP, frozen parts).
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: matrices (embeddings and head included) decay, everything with fewer than two dimensions
    (norm gains, biases) does not. Norm gains are scales around 1 and biases have no product to keep small, so pulling
    them to 0 only fights the loss; embeddings are rows of matrices and decay like the matrices they are tied to."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    kept = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_adamw(
    model: torch.nn.Module, *, learning_rate: float, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (E13) over the decay groups of an already sharded model."""
    groups = decay_groups(model, weight_decay)
    # fused: one pass over memory instead of about ten; on sharded parameters the default is a loop of single operations
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=epsilon, fused=True)
