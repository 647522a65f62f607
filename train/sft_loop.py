"""Supervised fine-tuning: encoded data, one optimizer step, and the loop around it.

L = sum_i w_i * ce_i / denominator over the trained tokens of one GLOBAL batch (E1, E2, E5 with the weights of E4): both
sums run over all micro-batches and all ranks, and the division happens once (E6-E8). Splitting the same batch into
other micro-batches or over other ranks changes nothing but rounding.

Shape suffixes: B batch (1: one packed row), T tokens, K trained tokens (weight above 0), D model dim.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from command_line import run_identity
from data.batches import PackedBatch, drop_unusable, prepared_batches
from data.data_report import data_report, describe_data
from data.json_records import DataError
from data.loss_weights import EncodedTrajectory, TextEncoder, encode_trajectory
from data.trajectories import read_trajectories
from printable import one_line
from train.compilation import compile_blocks
from train.distributed import World, gradient_square, limit_waiting, scale_gradients, set_gradient_sync, sum_over_ranks
from train.held_out import HeldOut
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
from train.run_history import earlier_identities, override_settings
from train.run_logging import fingerprint
from train.seeding import seed_everything, use_deterministic_kernels
from train.sft_config import SFTConfig
from train.sft_watch import JOURNALS, SFTWatch
from train.weighted_cross_entropy import linear_weighted_cross_entropy

# ---------------------------------------------------------------------------------------------------------------------
# Data


def encode_data(config: SFTConfig, tokenizer: TextEncoder) -> tuple[list[EncodedTrajectory], dict]:
    """Read, filter, weigh and encode all trajectories; also what data_report.json says about them.

    Its "notes" are the lines of the log on what was dropped, masked and is trained.

    Raises DataError; PromptError for a tokenizer without the control tokens of the format.
    """
    trajectories = read_trajectories(config.data, unparsable_calls=config.unparsable_calls)
    encoded = [
        encode_trajectory(
            trajectory,
            tokenizer,
            error_filter=config.error_filter,
            key_tokens=config.key_tokens == "on",
            max_key_token_weight=config.max_key_token_weight,
            loss_normalization=config.loss_normalization,
            prompt_format=config.prompt_format,
        )
        for trajectory in trajectories
    ]
    try:
        kept, notes = drop_unusable(encoded, config.max_tokens)
    except DataError as error:
        raise DataError(f"{config.data}: {error}") from None
    notes += describe_data(trajectories, encoded, kept, config.error_filter)
    return kept, data_report(trajectories, encoded, kept, notes, max_tokens=config.max_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step


@dataclass(frozen=True, slots=True)
class StepResult:
    """Global figures of one optimizer step, equal on every rank."""

    loss: float  # nats; weighted as loss_normalization says
    grad_norm: float  # L2 norm before clipping
    denominator: float  # what the weighted sum was divided by
    trained_tokens: int  # tokens with weight != 0
    trained_turns: int
    input_tokens: int  # tokens that went through the model


def train_step(
    config: SFTConfig,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[PackedBatch],
    world: World,
    *,
    step: int,
    loss_backend: str = "torch",
) -> StepResult:
    """One optimizer step over this rank's micro-batches of the global batch; a collective. `step` counts from 1.

    1 denominators over all ranks; 2 forward and backward of each micro-batch; 3 global loss and gradient norm; 4 refuse
    a step without trained tokens and non-finite values, on all ranks alike; 5 clip; 6 update. Raises TrainingError
    before the update. The host waits for the device once, in 3. It reads only loss_normalization, max_grad_norm and
    reduce_gradients of `config`.
    """
    # 1.
    counts = _global_counts(batches, world)
    denominator = torch.ones_like(counts[0]) if config.loss_normalization == "sum" else counts[0]  # E6, E7, E8
    # 2. gradients add up over micro-batches
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)
        set_gradient_sync(model, synchronize=is_last or config.reduce_gradients == "micro_batch", is_last=is_last)
        batch = batch.to(world.device)
        hidden_BTD = model(
            batch.input_ids_T[None],
            position_ids_BT=batch.position_ids_T[None],
            segment_lengths=batch.segment_lengths,
            return_hidden=True,
        )
        # after forward: the root's FSDP group is gathered now and stays so until its backward
        weighted_sum = linear_weighted_cross_entropy(
            hidden_BTD[0],
            model.head_weight(),
            batch.target_ids_T,
            batch.loss_weights_T,
            trained_index_K=batch.trained_index_K,
            backend=loss_backend,
        )
        (weighted_sum / denominator.to(weighted_sum.dtype)).backward()
        loss_sum += weighted_sum.detach()
    # 3.
    parameters = list(model.parameters())
    sums = sum_over_ranks(torch.stack([loss_sum, gradient_square(parameters)]))
    result = _step_result(torch.cat([sums, denominator[None], counts[1:]]).tolist())
    # 4. all values are global sums, so all ranks decide alike; no parameter has changed yet
    if fault := _fault_of(result):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(f"step {step}: {fault}; ids on this rank: {_ids_of(batches)}")
    # 5. - 6.
    scale_gradients(parameters, result.grad_norm, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def _global_counts(batches: list[PackedBatch], world: World) -> torch.Tensor:
    """Sum of loss weights, trained tokens, trained turns and input tokens of the whole global batch; fp64, (4,)."""
    local = [
        sum(batch.denominator for batch in batches),
        sum(batch.trained_tokens for batch in batches),
        sum(batch.trained_turns for batch in batches),
        sum(len(batch.input_ids_T) for batch in batches),
    ]
    counts = torch.tensor(local, dtype=torch.float64, pin_memory=world.device.type == "cuda")
    return sum_over_ranks(counts.to(world.device, non_blocking=True))


def _step_result(sums: list[float]) -> StepResult:
    """sums: of losses, of squared gradients, then denominator, trained tokens, trained turns and input tokens."""
    loss_sum, gradient_square, denominator, *counts = sums
    loss = loss_sum / denominator if denominator else math.nan
    return StepResult(loss, gradient_square**0.5, denominator, *map(int, counts))  # E14


def _fault_of(result: StepResult) -> str:
    """What forbids the update, or ""."""
    if result.trained_tokens == 0 or not result.denominator > 0:
        found = f"{result.trained_tokens} trained tokens and denominator {result.denominator}"
        return f"found {found}, expected at least one"
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        found = f"loss {result.loss} and gradient norm {result.grad_norm}"
        return f"found {found}, expected finite values; stopped before the update"
    return ""


def _ids_of(batches: list[PackedBatch]) -> str:
    return ", ".join(one_line(name) for batch in batches for name in batch.ids) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass(frozen=True, slots=True)
class SFTData:
    """What a run trains on, and for how long."""

    step_batches: Callable[[int], list[PackedBatch]]  # this rank's micro-batches of step s, from 0; a pure function
    total_steps: int  # length of the schedule; config.max_steps ends the run earlier, not the schedule
    sources: dict[str, str]  # fingerprints of what goes in, part of the run's identity
    report: dict = field(default_factory=dict)  # data_report.json
    held_out: HeldOut | None = None  # what the run is evaluated on while it trains


def train_sft(
    config: SFTConfig,
    data: SFTData,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    loss_backend: str = "torch",
) -> TrainResult:
    """Train from the newest good checkpoint (or from the given weights) to the end; a collective.

    model: sharded by train.distributed.shard_model; optimizer: built after that, one or more groups, each with its own
    peak `lr`, which the schedule scales. loss_backend: "cuda" or "torch", the answer to config.loss_backend.
    Files: docs/checkpoints.md, docs/metrics.md. Raises RunFolderError, CheckpointError, TrainingError, DataError.
    """
    seed_everything(config.seed, world.rank)
    use_deterministic_kernels()
    output = Path(config.output)
    identity = run_identity(config, {**data.sources, "total_steps": data.total_steps})
    run_hash = fingerprint(identity)
    history = override_settings(output, config.override, identity, world)
    open_output(output, config, identity, world, data_report=data.report)
    model.activation_checkpointing = config.activation_checkpointing == "on"
    if config.compile == "on":
        compile_blocks(model)
    model.train()
    parts = {"model": (model, optimizer)}
    earlier = earlier_identities(identity, history)
    state = resume_newest(output, parts, world, identity=run_hash, earlier=earlier, journals=JOURNALS)
    limit_waiting(config.collective_timeout, world)
    step = state.step if state else 0
    last_step = min(data.total_steps, config.max_steps or data.total_steps)
    warmup_steps = warmup_steps_of(config.warmup_ratio, data.total_steps)
    watch = SFTWatch(config, world, data.held_out, step=step, last_step=last_step)
    stopping = False
    ahead = closing(prepared_batches(data.step_batches, range(step, last_step), world.device))
    with StopSignal() as stop, watch, make_saver(config, world, run_hash) as saver, ahead as batches_of_steps:
        if step == 0:
            watch.evaluate(model, step=0)
        while step < last_step and not stopping:
            began = time.perf_counter()
            batches = next(batches_of_steps)
            step += 1
            factor = schedule_factor(step, data.total_steps, warmup_steps, config.schedule)
            learning_rate = set_learning_rates(optimizer, factor)
            result = train_step(config, model, optimizer, batches, world, step=step, loss_backend=loss_backend)
            watch.record(step_metrics(step, result, learning_rate, time.perf_counter() - began))
            watch.evaluate(model, step)
            stopping = must_stop(stop, saver)
            if step == last_step or stopping or (config.checkpoint_every and step % config.checkpoint_every == 0):
                watch.sync()
                saver.save(step, parts, extra={})
    if stopping and step < last_step:
        return report_stop(stop.number, step, last_step, output, world)
    return TrainResult(step=step, last_step=last_step, stopped_by=0)


def step_metrics(step: int, result: StepResult, learning_rate: float, seconds: float) -> dict[str, float]:
    """One line of metrics.jsonl; every key is defined in docs/metrics.md."""
    return {
        "step": step,
        "sft/loss": result.loss,
        "sft/learning_rate": learning_rate,
        "sft/grad_norm": result.grad_norm,
        "sft/denominator": result.denominator,
        "sft/trained_tokens": result.trained_tokens,
        "sft/trained_turns": result.trained_turns,
        "sft/input_tokens": result.input_tokens,
        "time/step_seconds": seconds,
        "time/tokens_per_second": result.input_tokens / seconds,
    }
