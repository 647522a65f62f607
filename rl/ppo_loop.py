"""Proximal policy optimisation with the paper's reward (IRM): one iteration, and the loop around it.

One iteration, in the order of the code:
    1 sample      a response to each of rollout_batch_size prompts, from the policy as it is now (rl/rollout.py)
    2 judge       the paper's reward of each response's text, by rules (rl/reward.py; E22, E23)
    3 measure     log-probabilities under the policy and the frozen reference, values of the critic
    4 credit      reward per token = -kl_coef * KL, plus the score on the last token (E24); GAE (E25)
    5 update      ppo_epochs passes in minibatches: clipped policy loss (E29), clipped value loss (E30)

Policy, reference and critic start from the same SFT weights. The critic is a model of its own; the two share nothing.

Differences from the paper and its released code, each with its reason in docs/ppo_details.md:
    * responses are sampled at temperature 1; the released code decodes greedily, which explores nothing
    * the critic really starts from the SFT weights; the released one is random, because its checkpoint never loads
    * the reward parses calls; the released one sees single-quoted strings only
    * all means run over the response tokens of the global minibatch, not over means of micro-batches
    * kl_coef is a setting (the paper gives no value) and may be steered to a target
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from command_line import run_identity
from data.batches import epoch_order
from model.tokenizer import Tokenizer
from rl.advantages import compute_gae, kl_shaped_rewards, masked_sums, next_kl_coef, whiten
from rl.ppo_config import PPOConfig
from rl.ppo_loss import policy_loss, token_entropies, value_loss
from rl.prompts import PPOPrompt
from rl.rollout import (
    ResponseBatch,
    Rollout,
    pack_minibatch,
    prompts_of_iteration,
    response_generator,
    response_logprobs,
    response_states,
    response_values,
    sample_responses,
    start_rollout,
)
from rl.watch import JOURNALS, Watch, add_times, describe_rollout
from train.checkpoint import save_checkpoint
from train.distributed import (
    World,
    any_rank,
    clip_gradients,
    gather_objects,
    gathered_model,
    global_sum,
    reshard_all,
    set_gradient_sync,
)
from train.optimizer import schedule_factor, set_learning_rates, warmup_steps_of
from train.run_control import StopSignal, TrainingError, TrainResult, open_output, report_stop, resume_newest
from train.run_logging import fingerprint
from train.seeding import seed_everything, use_deterministic_kernels

# The first update on a rollout starts from ratio 1: the same weights, tokens and kernels gave both log-probabilities. A
# larger deviation means that measuring and training see different prompts, positions or temperatures.
FIRST_UPDATE_TOLERANCE = 1e-4


@dataclass(slots=True)
class Models:
    """The models of a run, all sharded, and the two optimizers."""

    policy: torch.nn.Module  # Transformer
    reference: torch.nn.Module  # Transformer, frozen
    critic: torch.nn.Module  # ValueModel
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer
    starts_at_reference: bool  # policy and reference hold the same weights before the first update
    loss_backend: str = "torch"  # what computes log-probabilities, of all models alike; or "cuda"

    def trained(self) -> dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]:
        """What a checkpoint holds."""
        return {"policy": (self.policy, self.policy_optimizer), "critic": (self.critic, self.value_optimizer)}


# ---------------------------------------------------------------------------------------------------------------------
# 1 sample, 2 judge


def collect_responses(
    config: PPOConfig,
    models: Models,
    tokenizer: Tokenizer,
    prompts: Sequence[PPOPrompt],
    world: World,
    *,
    iteration: int,
    must_stop: Callable[[], bool],
) -> tuple[Rollout, dict[str, float]]:
    """This rank's share of the iteration's prompts, answered and judged; also seconds. A collective.

    The policy's parameters are gathered once for all tokens, and the gathered copy is gone when this returns. Raises
    TrainingError, on every rank alike, for weights that are not finite.
    """
    began = time.perf_counter()
    mine = list(range(world.rank, len(prompts), world.size))
    gathered = gathered_model(models.policy, world, dtype=config.dtype)
    wrong = [name for name, parameter in gathered.named_parameters() if not parameter.isfinite().all()]
    if wrong:  # nothing can be drawn from logits of nan
        raise TrainingError(
            f"iteration {iteration}: found {len(wrong)} tensors of the policy with nan or inf "
            f"({wrong[0]} ...), expected finite weights"
        )
    sampled = sample_responses(
        gathered,
        [prompts[index] for index in mine],
        [response_generator(config.seed, iteration, index) for index in mine],
        max_response_tokens=config.max_response_tokens,
        temperature=config.temperature,
        eos_id=tokenizer.eos_id,
        must_stop=must_stop,
    )
    del gathered
    sampled_at = time.perf_counter()
    rollout = start_rollout([prompts[index] for index in mine], sampled, tokenizer, world.device)
    seconds = {"rollout": sampled_at - began, "reward": time.perf_counter() - sampled_at}
    return rollout, seconds


# ---------------------------------------------------------------------------------------------------------------------
# 3 measure


@torch.no_grad()
def measure_rollout(
    config: PPOConfig, models: Models, rollout: Rollout, batches: Sequence[ResponseBatch]
) -> dict[str, float]:
    """Fill in log-probabilities of policy and reference, entropies and values; returns seconds. A collective.

    batches: the micro-batches of the first PPO epoch. The update runs the same forwards on the same packed rows, so the
    first ratio is 1 to the last bit. The sampler's own log-probabilities differ in the last bits and are only compared.
    """
    began, temperature = time.perf_counter(), config.logprob_temperature()
    for batch in batches:
        hidden_KD = response_states(models.policy, batch)
        logprobs_K = response_logprobs(hidden_KD, models.policy, batch, temperature, models.loss_backend)
        batch.put(rollout.logprobs_BR, logprobs_K)
        entropies_K = token_entropies(hidden_KD, models.policy.head_weight(), temperature)
        batch.put(rollout.entropies_BR, entropies_K)
    reshard_all(models.policy)
    policy_done = time.perf_counter()
    for batch in batches:
        hidden_KD = response_states(models.reference, batch)
        ref_logprobs_K = response_logprobs(hidden_KD, models.reference, batch, temperature, models.loss_backend)
        batch.put(rollout.ref_logprobs_BR, ref_logprobs_K)
    reshard_all(models.reference)
    reference_done = time.perf_counter()
    for batch in batches:
        batch.put(rollout.values_BR, response_values(models.critic, batch))
    reshard_all(models.critic)
    return {
        "policy_logprobs": policy_done - began,
        "reference": reference_done - policy_done,
        "critic": time.perf_counter() - reference_done,
    }


# ---------------------------------------------------------------------------------------------------------------------
# 4 credit


def estimate_advantages(config: PPOConfig, rollout: Rollout, kl_coef: float) -> None:
    """Fill in rewards per token, advantages and returns; a collective when advantages are whitened."""
    mask_BR = rollout.response_mask_BR
    rollout.rewards_BR = kl_shaped_rewards(
        rollout.scores_B, rollout.logprobs_BR, rollout.ref_logprobs_BR, mask_BR, kl_coef
    )
    rollout.advantages_BR, rollout.returns_BR = compute_gae(
        rollout.rewards_BR, rollout.values_BR, mask_BR, config.gamma, config.gae_lambda
    )
    if config.whiten_advantages == "on":
        mean, variance = global_moments(rollout.advantages_BR, mask_BR)
        rollout.advantages_BR = whiten(rollout.advantages_BR, mask_BR, mean, variance)


def global_moments(x_BR: Tensor, mask_BR: Tensor) -> tuple[float, float]:
    """Mean and variance of x inside the mask over all ranks, in two passes; (0, 0) for an empty mask."""
    count, total = global_sum(list(masked_sums(x_BR, mask_BR)))
    if count == 0:
        return 0.0, 0.0
    mean = total / count
    _, squares = global_sum(list(masked_sums((x_BR.double() - mean).square(), mask_BR)))
    return mean, squares / count


# ---------------------------------------------------------------------------------------------------------------------
# 5 update


def backward_policy(
    config: PPOConfig,
    policy: torch.nn.Module,
    rollout: Rollout,
    batch: ResponseBatch,
    n_tokens: float,
    loss_backend: str = "torch",
) -> dict[str, float]:
    """Add one micro-batch's share of the policy gradient; returns its parts of the minibatch's figures.

    n_tokens: response tokens of the whole minibatch. The micro-batch's mean is scaled by its share of them, so that
    gradients and figures add up over micro-batches and ranks.
    """
    temperature, n_batch = config.logprob_temperature(), len(batch.target_ids_K)
    hidden_KD = response_states(policy, batch)
    logprobs_1K = response_logprobs(hidden_KD, policy, batch, temperature, loss_backend)[None]
    loss, stats = policy_loss(
        logprobs_1K,
        batch.take(rollout.logprobs_BR),
        batch.take(rollout.advantages_BR),
        all_true(logprobs_1K),
        config.clip_range,
    )
    objective = loss * (n_batch / n_tokens)
    if config.entropy_coef > 0:
        entropies_K = token_entropies(hidden_KD, policy.head_weight(), temperature)
        objective = objective - config.entropy_coef * entropies_K.sum() / n_tokens
    objective.backward()
    deviation = stats["max_ratio_deviation"].item()
    return {
        "policy_loss": loss.item() * n_batch / n_tokens,
        "clip_fraction": stats["clipped"].item() / n_tokens,
        "approx_kl": stats["approx_kl_sum"].item() / n_tokens,
        # max() would drop a nan without a word
        "max_ratio_deviation": deviation if math.isfinite(deviation) else math.inf,
    }


def backward_value(
    config: PPOConfig, critic: torch.nn.Module, rollout: Rollout, batch: ResponseBatch, n_tokens: float
) -> dict[str, float]:
    """backward_policy for the critic."""
    values_1K = response_values(critic, batch)[None]
    loss, stats = value_loss(
        values_1K,
        batch.take(rollout.values_BR),
        batch.take(rollout.returns_BR),
        all_true(values_1K),
        config.value_clip_range,
    )
    share = len(batch.target_ids_K) / n_tokens
    (loss * share).backward()
    return {"value_loss": loss.item() * share, "value_clip_fraction": stats["clipped"].item() / n_tokens}


def all_true(like_1K: Tensor) -> Tensor:
    """The response mask of a packed micro-batch: every entry is a response token."""
    return torch.ones_like(like_1K, dtype=torch.bool)


def update_minibatch(
    config: PPOConfig,
    models: Models,
    rollout: Rollout,
    batches: Sequence[ResponseBatch],
    *,
    step: int,
    train_policy: bool,
    is_first_of_rollout: bool,
) -> dict[str, float]:
    """One optimizer step of the critic and (unless train_policy is False) of the policy; a collective.

    batches: this rank's micro-batches of the minibatch; both losses are means over its response tokens on all ranks.
    step counts from 1. is_first_of_rollout: nothing has changed since the rollout, so the ratio must be 1.
    Raises TrainingError before any weight has changed.
    """
    n_tokens = global_sum([float(sum(len(batch.target_ids_K) for batch in batches))])[0]
    figures = dict.fromkeys(("policy_loss", "clip_fraction", "approx_kl", "value_loss", "value_clip_fraction"), 0.0)
    max_ratio_deviation = 0.0
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)
        parts = {}
        if train_policy:
            set_gradient_sync(models.policy, synchronize=is_last, is_last=is_last)
            parts |= backward_policy(config, models.policy, rollout, batch, n_tokens, models.loss_backend)
        set_gradient_sync(models.critic, synchronize=is_last, is_last=is_last)
        parts |= backward_value(config, models.critic, rollout, batch, n_tokens)
        max_ratio_deviation = max(max_ratio_deviation, parts.pop("max_ratio_deviation", 0.0))
        for name, value in parts.items():
            figures[name] += value
    metrics = {f"ppo/{name}": value for name, value in zip(figures, global_sum(list(figures.values())), strict=True)}
    metrics |= {
        "ppo/max_ratio_deviation": max(gather_objects(max_ratio_deviation)),
        "ppo/policy_grad_norm": clip_gradients(models.policy.parameters(), config.max_grad_norm),
        "ppo/value_grad_norm": clip_gradients(models.critic.parameters(), config.max_grad_norm),
    }
    _check_update(metrics, models, step=step, must_be_one=is_first_of_rollout and train_policy)
    if train_policy:
        models.policy_optimizer.step()
    models.value_optimizer.step()
    models.policy_optimizer.zero_grad(set_to_none=True)
    models.value_optimizer.zero_grad(set_to_none=True)
    return metrics


def check_first_rollout(metrics: dict[str, float]) -> None:
    """Before the first update policy and reference are the same model: any KL between them is a fault of ours, such as
    weights that were not loaded. Raises TrainingError, on every rank alike."""
    kl = metrics["ppo/kl_k3"]
    if not kl <= FIRST_UPDATE_TOLERANCE:
        raise TrainingError(
            f"first rollout: found a KL of {kl:.3g} per token (k3) between policy and reference, expected 0 (at most "
            f"{FIRST_UPDATE_TOLERANCE}): both come from the same folder"
        )


def _check_update(metrics: dict[str, float], models: Models, *, step: int, must_be_one: bool) -> None:
    """Refuse to step on non-finite figures, and on a first update of a rollout whose ratio is not 1; the same on every
    rank."""
    wrong = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if not wrong and must_be_one:
        deviation, clipped = metrics["ppo/max_ratio_deviation"], metrics["ppo/clip_fraction"]
        if deviation > FIRST_UPDATE_TOLERANCE or clipped > 0:
            wrong = [f"max |ratio - 1| {deviation:.3g}, clip fraction {clipped:.3g} in the first update of a rollout"]
    if wrong:
        models.policy_optimizer.zero_grad(set_to_none=True)
        models.value_optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"step {step}: found {', '.join(wrong)}, expected finite values, and max |ratio - 1| <= "
            f"{FIRST_UPDATE_TOLERANCE} without clipping in the first update of a rollout; stopped before the update"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def count_steps(n_prompts: int, config: PPOConfig) -> list[int]:
    """Optimizer steps of each iteration of one epoch; the last iteration has fewer responses."""
    full, rest = divmod(n_prompts, config.rollout_batch_size)
    sizes = [config.rollout_batch_size] * full + [rest] * (rest > 0)
    return [config.ppo_epochs * math.ceil(size / config.minibatch_size) for size in sizes]


def run_iteration(
    config: PPOConfig,
    models: Models,
    tokenizer: Tokenizer,
    prompts: Sequence[PPOPrompt],
    world: World,
    *,
    iteration: int,
    step: int,
    total_steps: int,
    kl_coef: float,
    must_stop: Callable[[], bool],
) -> tuple[Rollout, list[dict[str, float]]] | None:
    """Iteration `iteration` (from 0), which begins after `step` optimizer steps, on its prompts of all ranks.

    Returns the rollout and one line of metrics per optimizer step, or None if a signal ended the sampling: then nothing
    has changed. A signal after that waits for the end of the iteration. Raises TrainingError.
    """
    rollout, seconds = collect_responses(
        config, models, tokenizer, prompts, world, iteration=iteration, must_stop=must_stop
    )
    if any_rank(must_stop()):
        return None

    def pack(rows: list[int]) -> list[ResponseBatch]:
        return pack_minibatch(
            rollout, rows, micro_batch_size=config.micro_batch_size, rank=world.rank, world_size=world.size
        )

    minibatches = [pack(rows) for rows in cut_minibatches(range(len(prompts)), config.minibatch_size)]
    seconds |= measure_rollout(config, models, rollout, [batch for minibatch in minibatches for batch in minibatch])
    estimate_advantages(config, rollout, kl_coef)
    rollout_metrics = describe_rollout(rollout, kl_coef)
    if step == 0 and models.starts_at_reference:
        check_first_rollout(rollout_metrics)
    lines = []
    for ppo_epoch in range(config.ppo_epochs):
        if ppo_epoch > 0:  # the first pass keeps the order in which the old log-probabilities were measured
            order = epoch_order(len(prompts), config.seed + 1, iteration * config.ppo_epochs + ppo_epoch)
            minibatches = [pack(rows) for rows in cut_minibatches(order, config.minibatch_size)]
        for number, minibatch in enumerate(minibatches):
            began = time.perf_counter()
            factor = schedule_factor(
                step + 1, total_steps, warmup_steps_of(config.warmup_ratio, total_steps), config.schedule
            )
            rates = [set_learning_rates(each, factor) for each in (models.policy_optimizer, models.value_optimizer)]
            update_metrics = update_minibatch(
                config,
                models,
                rollout,
                minibatch,
                step=step + 1,
                train_policy=iteration >= config.critic_only_iterations,
                is_first_of_rollout=ppo_epoch == 0 and number == 0,
            )
            step += 1
            lines.append(
                {
                    "step": step,
                    "iteration": iteration,
                    **rollout_metrics,
                    **update_metrics,
                    "ppo/policy_learning_rate": rates[0],
                    "ppo/value_learning_rate": rates[1],
                    "time/update_seconds": time.perf_counter() - began,
                }
            )
    return rollout, [add_times(line, seconds, n_steps=len(lines), n_responses=len(prompts)) for line in lines]


def train_ppo(
    config: PPOConfig,
    models: Models,
    tokenizer: Tokenizer,
    prompts: Sequence[PPOPrompt],
    world: World,
    *,
    held_out: Sequence[PPOPrompt],
    sources: dict[str, object],
) -> TrainResult:
    """Train from the newest good checkpoint (or from the given weights) to the end; a collective.

    models: sharded, the optimizers built after that. prompts: all of them, on every rank. held_out: prompts to be
    scored before, during and after, may be empty. sources: fingerprints of what goes in, part of the run's identity.
    Files: docs/checkpoints.md, docs/metrics.md. Raises RunFolderError, CheckpointError, TrainingError.
    """
    seed_everything(config.seed, world.rank)
    use_deterministic_kernels()
    output = Path(config.output)
    steps_of_epoch = count_steps(len(prompts), config)
    total_steps = config.epochs * sum(steps_of_epoch)
    last_step = min(total_steps, config.max_steps or total_steps)
    identity = run_identity(config, {**sources, "total_steps": total_steps})
    run_hash = fingerprint(identity)
    open_output(output, asdict(config), identity, world, resume=config.resume)
    for model in (models.policy, models.critic):
        model.activation_checkpointing = config.activation_checkpointing == "on"
        model.train()
    state = resume_newest(output, models.trained(), world, identity=run_hash, journals=JOURNALS)
    step, iteration, kl_coef = 0, 0, config.kl_coef
    if state is not None:
        step, iteration, kl_coef = state.step, state.extra["iteration"], state.extra["kl_coef"]
    saved_step = step
    watch = Watch(output, config, world, step=step, last_step=last_step)
    if step == 0:
        watch.evaluate(models.policy, tokenizer, held_out, step=0)
    stopping = False
    with StopSignal() as stop, watch:
        while step < last_step and not stopping:
            chosen = prompts_of_iteration(
                prompts, iteration, seed=config.seed, rollout_batch_size=config.rollout_batch_size
            )
            result = run_iteration(
                config,
                models,
                tokenizer,
                chosen,
                world,
                iteration=iteration,
                step=step,
                total_steps=total_steps,
                kl_coef=kl_coef,
                must_stop=lambda: stop.number != 0,
            )
            if result is not None:
                rollout, lines = result
                step, iteration = step + len(lines), iteration + 1
                kl_coef = _next_kl_coef(config, kl_coef, lines[0], len(chosen))
                watch.record(rollout, lines, tokenizer)
                if step < last_step and config.eval_every and iteration % config.eval_every == 0:
                    watch.evaluate(models.policy, tokenizer, held_out, step=step)
            stopping = any_rank(stop.number != 0)
            is_due = config.checkpoint_every and step // config.checkpoint_every > saved_step // config.checkpoint_every
            if step > saved_step and (step >= last_step or stopping or is_due):
                if step >= last_step:
                    watch.evaluate(models.policy, tokenizer, held_out, step=step)
                watch.sync()
                save_checkpoint(
                    output / "checkpoints",
                    step,
                    models.trained(),
                    world,
                    identity=run_hash,
                    keep=config.keep_checkpoints,
                    extra={"iteration": iteration, "kl_coef": kl_coef},
                )
                saved_step = step
    if stopping and step < last_step:
        return report_stop(stop.number, step, last_step, output, world)
    return TrainResult(step=step, last_step=last_step, stopped_by=0)


def cut_minibatches(order: Sequence[int], minibatch_size: int) -> list[list[int]]:
    """Responses of all ranks, in `order`, as minibatches; the last one may be smaller."""
    return [list(order[start : start + minibatch_size]) for start in range(0, len(order), minibatch_size)]


def _next_kl_coef(config: PPOConfig, kl_coef: float, line: dict[str, float], n_responses: int) -> float:
    """kl_coef of the next iteration, from the KL that this one's rollout was found at."""
    if config.kl_controller == "fixed":
        return kl_coef
    return next_kl_coef(
        kl_coef,
        line["ppo/kl_sequence"],
        kl_target=config.kl_target,
        kl_horizon=config.kl_horizon,
        n_responses=n_responses,
    )
