"""Proximal policy optimisation with the paper's reward (IRM): one iteration, and the loop around it.

One iteration, in the order of `run_iteration`. Each step takes the frozen record of the one before:
    1 sample      rollout_batch_size responses, responses_per_prompt to a prompt, from the policy as it is now
    2 judge       the paper's reward of each response's text, by rules (rl/reward.py; E22, E23)    -> Sampled
    3 measure     log-probabilities under policy and frozen reference, values of the critic        -> Measured
    4 credit      reward per token = -kl_coef * KL, plus the score on the last token (E24); GAE (E25) -> Credited
    5 update      ppo_epochs passes in minibatches: clipped policy loss (E29), clipped value loss (E30)
Steps 1 to 4 are in rl/rollout.py, the losses of step 5 in rl/ppo_loss.py.

Policy, reference and critic start from the same SFT weights. The critic is a model of its own; it shares nothing with
the policy.

Differences from the paper and its released code, each with its reason in docs/ppo_details.md:
    * responses are sampled at temperature 1; the released code decodes greedily, which explores nothing
    * the critic really starts from the SFT weights; the released one is random, because its checkpoint never loads
    * the reward parses calls; the released one sees single-quoted strings only
    * all means run over the response tokens of the global minibatch, not over means of micro-batches
    * kl_coef is a setting (the paper gives no value) and may be steered to a target

Shape suffixes: B responses of this rank, R longest response among them, K response tokens of a packed micro-batch,
D model dim.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from command_line import run_identity
from data.batches import epoch_order
from printable import shown
from rl.advantages import next_kl_coef
from rl.models import Models
from rl.ppo_config import PPOConfig
from rl.ppo_loss import policy_loss, token_entropies, value_loss
from rl.prompts import PPOPrompt, even_sizes, iteration_sizes, prompts_of_iteration, repeat_each
from rl.rollout import (
    Credited,
    Iteration,
    ResponseBatch,
    credit_responses,
    judge_responses,
    measure_responses,
    pack_minibatches,
    response_logprobs,
    response_states,
    response_values,
    responses_of_rank,
    sample_responses,
)
from rl.watch import JOURNALS, Watch, add_times, describe_rollout
from train.checkpoint import CheckpointError
from train.distributed import (
    World,
    any_rank,
    clip_gradients,
    gather_objects,
    global_sum,
    limit_waiting,
    set_gradient_sync,
)
from train.optimizer import schedule_factor, set_learning_rates, warmup_steps_of
from train.run_control import (
    StopSignal,
    TrainingError,
    TrainResult,
    make_saver,
    must_stop,
    open_output,
    report_stop,
    resume_newest,
)
from train.run_history import earlier_identities, is_overridden_since, override_settings
from train.run_logging import fingerprint
from train.seeding import seed_everything, use_deterministic_kernels

# The first update on a rollout starts from ratio 1: the same weights, tokens and kernels gave both log-probabilities. A
# larger deviation means that measuring and training see different prompts, positions or temperatures.
FIRST_UPDATE_TOLERANCE = 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train_ppo(
    config: PPOConfig,
    models: Models,
    prompts: Sequence[PPOPrompt],
    world: World,
    *,
    held_out: Sequence[PPOPrompt],
    sources: dict[str, object],
    notes: Sequence[str],
) -> TrainResult:
    """Train from the newest good checkpoint (or from the given weights) to the end; a collective.

    prompts: all of them, on every rank. held_out: prompts scored before, during and after training; may be empty.
    sources: fingerprints of what goes in, part of the run's identity. notes: lines on how the prompts were chosen.
    Files: docs/checkpoints.md, docs/metrics.md.
    Raises RunFolderError, CheckpointError, TrainingError, DataError.
    """
    seed_everything(config.seed, world.rank)
    use_deterministic_kernels()
    total_steps = config.epochs * sum(count_steps(len(prompts), config))
    last_step = min(total_steps, config.max_steps or total_steps)
    identity = run_identity(config, {**sources, "total_steps": total_steps})
    history = override_settings(Path(config.output), config.override, identity, world)
    open_output(Path(config.output), config, identity, world, data_report={"prompts": len(prompts), "notes": notes})
    run_hash = fingerprint(identity)
    step, number, kl_coef = resume_state(config, models, world, identity, history)
    limit_waiting(config.collective_timeout, world)
    saved_step, stopping = step, False
    watch = Watch(config, world, step=step, iteration=number, last_step=last_step)
    if step == 0:
        watch.evaluate(models, held_out, step=0)
    with StopSignal() as stop, watch, make_saver(config, world, run_hash) as saver:
        while step < last_step and not stopping:
            chosen = prompts_of_iteration(prompts, number, config.seed, config.prompts_per_iteration())
            iteration = Iteration(number, step, total_steps, kl_coef, repeat_each(chosen, config.responses_per_prompt))
            result = run_iteration(config, models, world, iteration, must_stop=lambda: stop.number != 0)
            if result is not None:
                credited, lines = result
                step, number = step + len(lines), number + 1
                kl_coef = kl_coef_after(config, iteration, lines[0]["ppo/kl_sequence"])
                watch.record(credited, lines, models.tokenizer)
                if step >= last_step or config.eval_every and number % config.eval_every == 0:
                    watch.evaluate(models, held_out, step=step)
            stopping = must_stop(stop, saver)
            is_due = config.checkpoint_every and step // config.checkpoint_every > saved_step // config.checkpoint_every
            if step > saved_step and (step >= last_step or stopping or is_due):
                watch.sync()
                saver.save(step, models.trained(), extra={"iteration": number, "kl_coef": kl_coef})
                saved_step = step
    if stopping and step < last_step:
        return report_stop(stop.number, step, last_step, Path(config.output), world)
    return TrainResult(step=step, last_step=last_step, stopped_by=0)


def resume_state(
    config: PPOConfig, models: Models, world: World, identity: dict, history: Sequence[dict]
) -> tuple[int, int, float]:
    """(optimizer steps done, iterations done, kl_coef) of the newest good checkpoint, whose weights are loaded into the
    models, or of the beginning; a collective. Raises CheckpointError."""
    state = resume_newest(
        Path(config.output),
        models.trained(),
        world,
        identity=fingerprint(identity),
        earlier=earlier_identities(identity, history),
        journals=JOURNALS,
    )
    if state is None:
        return 0, 0, config.kl_coef
    number, kl_coef = state.extra.get("iteration"), state.extra.get("kl_coef")
    if type(number) is not int or type(kl_coef) not in (int, float):
        raise CheckpointError(
            f"{config.output}: found iteration {shown(number)} and kl_coef {shown(kl_coef)} in the state of step "
            f"{state.step}, expected numbers"
        )
    is_new = is_overridden_since(history, "kl_coef", state.step)
    return state.step, number, config.kl_coef if is_new else kl_coef


def count_steps(n_prompts: int, config: PPOConfig) -> list[int]:
    """Optimizer steps of each iteration of one epoch; the last two iterations may have fewer responses."""
    return [config.ppo_epochs * len(even_sizes(n, config.minibatch_size)) for n in count_responses(n_prompts, config)]


def count_responses(n_prompts: int, config: PPOConfig) -> list[int]:
    """Responses of each iteration of one epoch."""
    sizes = iteration_sizes(n_prompts, config.prompts_per_iteration())
    return [size * config.responses_per_prompt for size in sizes]


def describe_epoch(n_prompts: int, config: PPOConfig) -> str:
    """A line for the log: how many iterations one epoch has, and of how many responses."""
    counts = Counter(count_responses(n_prompts, config))
    listing = ", ".join(f"{count} of {size}" for size, count in counts.items())
    return f"each epoch: {counts.total()} iteration{'s' * (counts.total() > 1)} ({listing} responses)"


def kl_coef_after(config: PPOConfig, iteration: Iteration, kl_sequence: float) -> float:
    """kl_coef of the next iteration, from the KL of this one's rollout (nats per response)."""
    if config.kl_controller == "fixed":
        return iteration.kl_coef
    return next_kl_coef(
        iteration.kl_coef,
        kl_sequence,
        kl_target=config.kl_target,
        kl_horizon=config.kl_horizon,
        n_responses=len(iteration.prompts),
    )


# ---------------------------------------------------------------------------------------------------------------------
# One iteration


def run_iteration(
    config: PPOConfig, models: Models, world: World, iteration: Iteration, must_stop: Callable[[], bool]
) -> tuple[Credited, list[dict[str, float]]] | None:
    """Steps 1 to 5 of the module docstring; a collective.

    Returns the rollout and one line of metrics per optimizer step, or None if a signal ended the sampling: then nothing
    has changed. A signal after that waits for the end of the iteration. Raises TrainingError.
    """
    # 1 sample
    began = time.perf_counter()
    responses = sample_responses(config, models, world, iteration, must_stop)
    sampled_at = time.perf_counter()
    if any_rank(must_stop()):
        return None
    # 2 judge
    judging = time.perf_counter()
    mine = responses_of_rank(world, len(iteration.prompts), config.responses_per_prompt)
    my_prompts = [iteration.prompts[index] for index in mine]
    sampled = judge_responses(my_prompts, responses, models.tokenizer, world.device)
    seconds = {"rollout": sampled_at - began, "reward": time.perf_counter() - judging}
    # 3 measure
    minibatches = pack_minibatches(config, world, sampled, range(len(iteration.prompts)))
    measured = measure_responses(config, models, sampled, [batch for each in minibatches for batch in each])
    seconds |= measured.seconds
    # 4 credit
    credited = credit_responses(config, measured, iteration.kl_coef)
    rollout_metrics = describe_rollout(credited)
    if iteration.step == 0 and models.starts_at_reference:
        check_first_rollout(rollout_metrics)
    # 5 update
    lines = [line | rollout_metrics for line in update_models(config, models, world, iteration, credited, minibatches)]
    return credited, [
        add_times(line, seconds, n_steps=len(lines), n_responses=len(iteration.prompts)) for line in lines
    ]


def check_first_rollout(metrics: dict[str, float]) -> None:
    """Before the first update policy and reference are the same model: any KL between them is a fault of ours, such as
    weights that were not loaded. Raises TrainingError, on every rank alike."""
    kl = metrics["ppo/kl_k3"]
    if not kl <= FIRST_UPDATE_TOLERANCE:
        raise TrainingError(
            f"first rollout: found a KL of {kl:.3g} per token (k3) between policy and reference, expected 0 (at most "
            f"{FIRST_UPDATE_TOLERANCE}): both come from the same folder"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 5 update


def update_models(
    config: PPOConfig,
    models: Models,
    world: World,
    iteration: Iteration,
    credited: Credited,
    minibatches: list[list[ResponseBatch]],
) -> list[dict[str, float]]:
    """ppo_epochs passes over the rollout; returns one line of metrics per optimizer step. A collective.

    minibatches: of the first pass, which keeps the order in which the old log-probabilities were measured; later passes
    shuffle the prompts, and the responses to one stay together. Raises TrainingError.
    """
    lines, n_shared = [], config.responses_per_prompt
    warmup_steps = warmup_steps_of(config.warmup_ratio, iteration.total_steps)
    for ppo_epoch in range(config.ppo_epochs):
        if ppo_epoch > 0:
            order = epoch_order(
                len(iteration.prompts) // n_shared, config.seed + 1, iteration.number * config.ppo_epochs + ppo_epoch
            )
            order = [prompt * n_shared + k for prompt in order for k in range(n_shared)]
            minibatches = pack_minibatches(config, world, credited.measured.sampled, order)
        for minibatch in minibatches:
            began, step = time.perf_counter(), iteration.step + len(lines) + 1
            factor = schedule_factor(step, iteration.total_steps, warmup_steps, config.schedule)
            metrics = {
                "step": step,
                "iteration": iteration.number,
                "ppo/policy_learning_rate": set_learning_rates(models.policy_optimizer, factor),
                "ppo/value_learning_rate": set_learning_rates(models.value_optimizer, factor),
            }
            metrics |= update_minibatch(
                config,
                models,
                credited,
                minibatch,
                step=step,
                train_policy=iteration.number >= config.critic_only_iterations,
                is_first_of_rollout=not lines,
            )
            lines.append({**metrics, "time/update_seconds": time.perf_counter() - began})
    return lines


def update_minibatch(
    config: PPOConfig,
    models: Models,
    credited: Credited,
    batches: Sequence[ResponseBatch],
    *,
    step: int,
    train_policy: bool,
    is_first_of_rollout: bool,
) -> dict[str, float]:
    """One optimizer step of the policy (unless train_policy is False), then one of the critic; a collective.

    One model after the other, so that the gradients of only one take memory; neither reads the other's weights.
    batches: this rank's micro-batches of the minibatch; both losses are means over its response tokens on all ranks.
    step counts from 1. is_first_of_rollout: nothing has changed since the rollout, so the ratio must be 1.
    Raises TrainingError before the weights of the model at fault have changed.
    """
    n_tokens = global_sum([float(sum(len(batch.target_ids_K) for batch in batches))])[0]
    names = ("policy_loss", "clip_fraction", "approx_kl", "max_ratio_deviation", "policy_grad_norm")
    metrics = {f"ppo/{name}": 0.0 for name in names}
    if train_policy:
        turns = micro_batches(config, models.policy, batches)
        figures = [backward_policy(config, models, credited, batch, n_tokens) for batch in turns]
        metrics |= step_model(config, models, "policy", figures, step=step, must_be_one=is_first_of_rollout)
    turns = micro_batches(config, models.critic, batches)
    figures = [backward_value(config, models, credited, batch, n_tokens) for batch in turns]
    return metrics | step_model(config, models, "value", figures, step=step, must_be_one=False)


def micro_batches(
    config: PPOConfig, model: torch.nn.Module, batches: Sequence[ResponseBatch]
) -> Iterator[ResponseBatch]:
    """The batches in turn; before each, `model` learns whether the next backward reduces its gradients."""
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)
        set_gradient_sync(model, synchronize=is_last or config.reduce_gradients == "micro_batch", is_last=is_last)
        yield batch


def step_model(
    config: PPOConfig, models: Models, name: str, figures: list[dict[str, float]], *, step: int, must_be_one: bool
) -> dict[str, float]:
    """Clip the gradient of the minibatch, update one model, and free its gradients; returns metrics. A collective.

    name: "policy" or "value". figures: of each micro-batch of this rank. must_be_one: so must the ratio be.
    Raises TrainingError instead of an update on figures that are not finite, or on another ratio.
    """
    model, optimizer = models.policy, models.policy_optimizer
    if name == "value":
        model, optimizer = models.critic, models.value_optimizer
    metrics = figures_of_minibatch(figures)
    metrics[f"ppo/{name}_grad_norm"] = clip_gradients(model.parameters(), config.max_grad_norm)
    faults = faults_of_update(metrics, must_be_one=must_be_one)
    if faults:
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"step {step}: found {', '.join(faults)}, expected finite values, and max |ratio - 1| <= "
            f"{FIRST_UPDATE_TOLERANCE} without clipping in the first update of a rollout (computed in {config.dtype}, "
            f"loss backend {models.loss_backend}, compile {config.compile}); stopped before the update of the {name} "
            "model"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def figures_of_minibatch(figures: list[dict[str, float]]) -> dict[str, float]:
    """A minibatch's metrics from what backward_policy or backward_value returned for each micro-batch of this rank:
    sums over micro-batches and ranks, but of max_ratio_deviation the largest. A collective."""
    deviations = [each.pop("max_ratio_deviation", None) for each in figures]
    sums = dict.fromkeys(figures[0], 0.0)
    for each in figures:
        for name, value in each.items():
            sums[name] += value
    metrics = {f"ppo/{name}": value for name, value in zip(sums, global_sum(list(sums.values())), strict=True)}
    if None not in deviations:
        metrics["ppo/max_ratio_deviation"] = max(gather_objects(max(deviations)))
    return metrics


def backward_policy(
    config: PPOConfig, models: Models, credited: Credited, batch: ResponseBatch, n_tokens: float
) -> dict[str, float]:
    """Add one micro-batch's share of the policy gradient; returns its share of the minibatch's figures.

    n_tokens: response tokens of the whole minibatch. The micro-batch's mean is scaled by its share of them, so that
    gradients and figures add up over micro-batches and ranks.
    """
    temperature, n_batch = config.logprob_temperature(), len(batch.target_ids_K)
    hidden_KD = response_states(models.policy, batch)
    logprobs_1K = response_logprobs(hidden_KD, models.policy, batch, temperature, models.loss_backend)[None]
    loss, stats = policy_loss(
        logprobs_1K,
        batch.take(credited.measured.logprobs_BR),
        batch.take(credited.advantages_BR),
        all_true(logprobs_1K),
        config.clip_range,
    )
    objective = loss * (n_batch / n_tokens)
    if config.entropy_coef > 0:
        entropies_K = token_entropies(hidden_KD, models.policy.head_weight(), temperature)
        objective = objective - config.entropy_coef * entropies_K.sum() / n_tokens
    objective.backward()
    deviation = stats["max_ratio_deviation"].item()
    return {
        "policy_loss": loss.item() * n_batch / n_tokens,
        "clip_fraction": stats["clipped"].item() / n_tokens,
        "approx_kl": stats["approx_kl_sum"].item() / n_tokens,
        # max() would silently drop a nan
        "max_ratio_deviation": deviation if math.isfinite(deviation) else math.inf,
    }


def backward_value(
    config: PPOConfig, models: Models, credited: Credited, batch: ResponseBatch, n_tokens: float
) -> dict[str, float]:
    """backward_policy for the critic."""
    values_1K = response_values(models.critic, batch)[None]
    loss, stats = value_loss(
        values_1K,
        batch.take(credited.measured.values_BR),
        batch.take(credited.returns_BR),
        all_true(values_1K),
        config.value_clip_range,
    )
    share = len(batch.target_ids_K) / n_tokens
    (loss * share).backward()
    return {"value_loss": loss.item() * share, "value_clip_fraction": stats["clipped"].item() / n_tokens}


def all_true(like_1K: Tensor) -> Tensor:
    """The response mask of a packed micro-batch: every entry is a response token."""
    return torch.ones_like(like_1K, dtype=torch.bool)


def faults_of_update(metrics: dict[str, float], *, must_be_one: bool) -> list[str]:
    """Why the optimizer must not step: figures that are not finite, or a ratio that must be 1 and is not."""
    faults = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if not faults and must_be_one:
        deviation, clipped = metrics["ppo/max_ratio_deviation"], metrics["ppo/clip_fraction"]
        if deviation > FIRST_UPDATE_TOLERANCE or clipped > 0:
            return [f"max |ratio - 1| {deviation:.3g}, clip fraction {clipped:.3g} in the first update of a rollout"]
    return faults
