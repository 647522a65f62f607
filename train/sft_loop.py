"""Supervised fine-tuning: the run's settings, one optimizer step, and the loop around it.

L = sum_i w_i * ce_i / denominator over the trained tokens of one GLOBAL batch (E1, E2, E5 with the weights of E4): both
sums run over all micro-batches and all ranks, and the division happens once (E6-E8). Splitting the same batch into
other micro-batches or over other ranks changes nothing but rounding.
"""

import math
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import torch
from tqdm import tqdm

from data.batches import PackedBatch, drop_unusable
from data.loss_weights import EncodedTrajectory, TextEncoder, encode_trajectory
from data.trajectories import read_trajectories
from train.checkpoint import CheckpointError, load_checkpoint, newest_good_checkpoint, remove_leftovers, save_checkpoint
from train.distributed import World, any_rank, clip_gradients, fsdp_modules, global_sum, set_gradient_sync, wait_for_all
from train.optimizer import SCHEDULES, schedule_factor, set_learning_rates, warmup_steps_of
from train.run_logging import (
    MetricsFile,
    RunFolderError,
    cut_metrics,
    describe_environment,
    fingerprint,
    log_line,
    open_run_folder,
    write_json_atomically,
)
from train.seeding import seed_everything, use_deterministic_kernels
from train.weighted_cross_entropy import linear_weighted_cross_entropy


class TrainingError(RuntimeError):
    """Training cannot go on (non-finite values, no trained tokens in a batch). One line; checkpoints are untouched."""


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def _setting(
    default: object, meaning: str, *, choices: tuple = (), low: float | None = None, high: float | None = None
):
    """A dataclass field with its help line, and the values it may have: one of `choices`, or low <= value <= high."""
    return field(default=default, metadata={"help": meaning, "choices": choices, "low": low, "high": high})


@dataclass(slots=True)
class SFTConfig:
    """All settings of one SFT run. Defaults: the bundled tiny run; configs/paper.json holds the paper's 7B values.
    Help lines give meaning, unit and source (paper section 4.1 where it names a value, else "ours")."""

    # files
    model: str = _setting("assets/tiny_model", "folder of the base model, Hugging Face layout (paper: CodeLLaMA-2-7B)")
    data: str = _setting(
        "assets/tiny_data/train.json", "training trajectories: the authors' JSON list or OpenAI-style JSONL"
    )
    output: str = _setting("runs/sft", "folder of this run: config, metrics, checkpoints, final model")
    resume: str = _setting(
        "auto", "auto continues from the newest good checkpoint in output; never starts anew", choices=("auto", "never")
    )
    # method
    error_filter: str = _setting(
        "structured",
        "which erroneous turns get no loss (MAE): documents and feedback patterns, the "
        "released substring test, or none",
        choices=("structured", "substring", "none"),
    )
    key_tokens: str = _setting("on", "weigh the tokens that decide between tools (PKT)", choices=("on", "off"))
    max_key_token_weight: float = _setting(9.0, "upper bound of a key token's weight, no unit (paper: 9)", low=1.0)
    loss_normalization: str = _setting(
        "turn_mean",
        "mean over turns (released code), over weighted tokens, or plain sum (paper's formula)",
        choices=("turn_mean", "token_mean", "sum"),
    )
    unparsable_calls: str = _setting(
        "error",
        "an assistant turn whose call does not parse: stop, or train without it (ours)",
        choices=("error", "mask"),
    )
    # optimisation
    learning_rate: float = _setting(4e-4, "peak learning rate (paper: 1e-6 for 7B)", low=0.0)
    schedule: str = _setting(
        "cosine", "learning rate after warm-up (paper: cosine; released code: constant)", choices=SCHEDULES
    )
    warmup_ratio: float = _setting(
        0.02, "share of all optimizer steps spent warming up (paper: 0.01)", low=0.0, high=1.0
    )
    adam_beta1: float = _setting(0.9, "AdamW decay of the gradient mean (released code: 0.9)", low=0.0, high=1.0)
    adam_beta2: float = _setting(
        0.95, "AdamW decay of the squared gradient's mean (released code: 0.95)", low=0.0, high=1.0
    )
    adam_epsilon: float = _setting(1e-8, "AdamW term that keeps the division finite (PyTorch's default)", low=0.0)
    weight_decay: float = _setting(
        0.01, "AdamW decay of matrices; norms and biases have none (released code: 0.01)", low=0.0
    )
    max_grad_norm: float = _setting(
        1.0, "clip the global L2 norm of the gradient to this; 0 = never (released code: 1.0)", low=0.0
    )
    global_batch_size: int = _setting(4, "trajectories per optimizer step over all ranks (paper: 4)", low=1)
    micro_batch_size: int = _setting(
        4, "trajectories packed into one forward pass of one rank; memory only (ours)", low=1
    )
    epochs: int = _setting(1, "passes over the data (paper: 1)", low=1)
    max_steps: int = _setting(
        0, "stop after this many optimizer steps, schedule unchanged; 0 = all epochs (ours)", low=0
    )
    max_tokens: int = _setting(
        8192, "longer trajectories are dropped and listed, never cut; tokens (released code: 8192)", low=2
    )
    seed: int = _setting(0, "seed of the batch order and of every random generator (ours)", low=0)
    # machine
    dtype: str = _setting(
        "float32",
        "compute type; master weights and reductions are float32 either way (paper: bfloat16)",
        choices=("float32", "bfloat16"),
    )
    device: str = _setting("auto", "auto takes CUDA where present", choices=("auto", "cpu", "cuda"))
    activation_checkpointing: str = _setting(
        "off", "recompute each block in backward: less memory, a third more time (ours)", choices=("on", "off")
    )
    gradient_sync: str = _setting(
        "last",
        "reduce gradients after the last micro-batch of a step (fast) or after every one "
        "(keeps only the shard: less memory) (ours)",
        choices=("last", "every"),
    )
    # run folder
    checkpoint_every: int = _setting(100, "optimizer steps between checkpoints; 0 = only at the end (ours)", low=0)
    keep_checkpoints: int = _setting(2, "newest checkpoints kept; 0 = all (ours)", low=0)
    final_dtype: str = _setting(
        "float32",
        "dtype of output/final; bfloat16 halves it and rounds the master weights (ours)",
        choices=("float32", "bfloat16"),
    )
    plot: str = _setting(
        "on", "draw output/plots/loss.png at the end, where matplotlib is installed (ours)", choices=("on", "off")
    )

    def validate(self) -> None:
        """Checks beyond choices and bounds; raises ValueError that begins with the field's name."""
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1.0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a value below 1")


# fields that do not change what is learned: a run may be continued with other values
_FREE_FIELDS = {
    "model",
    "data",
    "output",
    "resume",
    "max_steps",
    "device",
    "activation_checkpointing",
    "gradient_sync",
    "checkpoint_every",
    "keep_checkpoints",
    "final_dtype",
    "plot",
    "micro_batch_size",
}


def run_identity(config: SFTConfig, sources: dict[str, str]) -> dict:
    """What makes two runs the same run: every field that changes the result, and fingerprints of model and data.

    Paths do not count, their content does (`sources`, e.g. {"data_sha256": ...}). micro_batch_size and the number of
    ranks change rounding only.
    """
    fields = {name: value for name, value in asdict(config).items() if name not in _FREE_FIELDS}
    return {**fields, **sources}


# ---------------------------------------------------------------------------------------------------------------------
# Data


def encode_data(config: SFTConfig, tokenizer: TextEncoder) -> tuple[list[EncodedTrajectory], list[str]]:
    """Read, filter, weigh and encode all trajectories; also lines on what was dropped, masked and is trained."""
    encoded, notes = drop_unusable(
        [
            encode_trajectory(
                trajectory,
                tokenizer,
                error_filter=config.error_filter,
                key_tokens=config.key_tokens == "on",
                max_key_token_weight=config.max_key_token_weight,
                loss_normalization=config.loss_normalization,
            )
            for trajectory in read_trajectories(config.data, unparsable_calls=config.unparsable_calls)
        ],
        config.max_tokens,
    )
    masked = Counter(turn.category for row in encoded for turn in row.turn_decisions if turn.masked)
    counts = ", ".join(f"{category} {count}" for category, count in sorted(masked.items())) or "none"
    notes.append(
        f"{len(encoded)} trajectories of {sum(map(len, encoded))} tokens; trained: "
        f"{sum(row.trained_turns for row in encoded)} turns, {sum(row.trained_tokens for row in encoded)} tokens"
    )
    notes.append(f"turns masked by error_filter={config.error_filter}: {counts}")
    return encoded, notes


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
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[PackedBatch],
    world: World,
    *,
    step: int,
    loss_normalization: str,
    max_grad_norm: float,
    gradient_sync: str,
) -> StepResult:
    """One optimizer step over this rank's micro-batches of the global batch; a collective. `step` counts from 1.

    1 denominators over all ranks, before any backward; 2 forward and backward of each micro-batch; 3 global loss;
    4 clip; 5 refuse non-finite values on all ranks alike; 6 update. Raises TrainingError before the update.
    """
    # 1. counts of the whole global batch
    local = [
        sum(batch.denominator for batch in batches),
        sum(batch.trained_tokens for batch in batches),
        sum(batch.trained_turns for batch in batches),
        sum(len(batch.input_ids_T) for batch in batches),
    ]
    weight_sum, trained_tokens, trained_turns, input_tokens = global_sum(local)
    denominator = 1.0 if loss_normalization == "sum" else weight_sum  # E6, E7, E8
    if trained_tokens == 0 or not denominator > 0:
        raise TrainingError(
            f"step {step}: found {trained_tokens:.0f} trained tokens and denominator {denominator}, expected at least "
            f"one; ids on this rank: {_ids_of(batches)}"
        )
    # 2. gradients add up over micro-batches, unreduced until the last one
    loss_sum = torch.zeros((), dtype=torch.float64)
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)
        set_gradient_sync(model, synchronize=is_last or gradient_sync == "every", is_last=is_last)
        weighted_sum = batch_loss(model, batch, world.device)
        (weighted_sum / denominator).backward()
        loss_sum += weighted_sum.detach().double().cpu()
    # 3. - 4.
    loss = global_sum([loss_sum.item()])[0] / denominator
    grad_norm = clip_gradients(model.parameters(), max_grad_norm)
    # 5. both values are global sums, so all ranks decide alike; no parameter has changed yet
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"step {step}: found loss {loss} and gradient norm {grad_norm}, expected finite values; stopped before the "
            f"update; ids on this rank: {_ids_of(batches)}"
        )
    # 6.
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, denominator, int(trained_tokens), int(trained_turns), int(input_tokens))


def batch_loss(model: torch.nn.Module, batch: PackedBatch, device: torch.device) -> torch.Tensor:
    """sum_i w_i * ce_i of one packed micro-batch, an fp32 scalar, not yet divided (E9)."""
    hidden_BTD = model(
        batch.input_ids_T[None].to(device),
        position_ids_BT=batch.position_ids_T[None].to(device),
        segment_lengths=batch.segment_lengths,
        return_hidden=True,
    )
    # after forward: the root's FSDP group is gathered now and stays so until its backward
    return linear_weighted_cross_entropy(
        hidden_BTD[0],
        model.head_weight(),
        batch.target_ids_T.to(device),
        batch.loss_weights_T.to(device),
        trained_index_K=batch.trained_index_K.to(device),
    )


def _ids_of(batches: list[PackedBatch]) -> str:
    return ", ".join(name for batch in batches for name in batch.ids) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How train_sft ended. stopped_by: number of the signal that ended it early, or 0."""

    step: int
    last_step: int
    stopped_by: int


class StopSignal:
    """Remembers the first SIGTERM or SIGINT while active; a second one acts as usual (so Ctrl-C twice kills)."""

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        self.number = number
        for each, handler in self._previous.items():
            signal.signal(each, handler)


def train_sft(
    config: SFTConfig,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    step_batches: Callable[[int], list[PackedBatch]],
    total_steps: int,
    sources: dict[str, str],
) -> TrainResult:
    """Train from the newest good checkpoint (or from the given weights) to the end; a collective.

    model: sharded by train.distributed.shard_model; optimizer: built after that, one or more groups, each with its own
    peak `lr`, which the schedule scales. step_batches(s): this rank's micro-batches of optimizer step s, from 0 on,
    a pure function of s. total_steps: length of the schedule; config.max_steps ends the run earlier, not the schedule.
    sources: fingerprints of what goes in, part of the run's identity. Files: docs/checkpoints.md, docs/metrics.md.
    Raises RunFolderError, CheckpointError, TrainingError.
    """
    output = Path(config.output)
    seed_everything(config.seed, world.rank)
    use_deterministic_kernels()
    identity = run_identity(config, {**sources, "total_steps": total_steps})
    last_step = min(total_steps, config.max_steps) if config.max_steps else total_steps
    _open_folder(config, identity, world)
    model.activation_checkpointing = config.activation_checkpointing == "on"
    first_step = _resume(config, model, optimizer, world, identity=fingerprint(identity))
    warmup_steps = warmup_steps_of(config.warmup_ratio, total_steps)
    metrics_file = MetricsFile(output / "metrics.jsonl") if world.is_main else None
    saved_step = first_step
    step, stopped_by = first_step, 0

    def save(at_step: int) -> None:
        if metrics_file is not None:
            metrics_file.sync()
        save_checkpoint(
            output / "checkpoints",
            at_step,
            model,
            optimizer,
            world,
            identity=fingerprint(identity),
            keep=config.keep_checkpoints,
        )

    # disable=None: no bar when stderr is not a terminal, so that logs and error lines stay clean
    bar = tqdm(total=last_step, initial=first_step, unit="step", disable=None if world.is_main else True)
    model.train()
    with StopSignal() as stop, bar:
        while step < last_step and not stopped_by:
            began = time.perf_counter()
            factor = schedule_factor(step + 1, total_steps, warmup_steps, config.schedule)
            learning_rate = set_learning_rates(optimizer, factor)
            result = train_step(
                model,
                optimizer,
                step_batches(step),
                world,
                step=step + 1,
                loss_normalization=config.loss_normalization,
                max_grad_norm=config.max_grad_norm,
                gradient_sync=config.gradient_sync,
            )
            step += 1
            seconds = time.perf_counter() - began
            if metrics_file is not None:
                metrics_file.write(step_metrics(step, result, learning_rate, seconds))
            bar.update(1)
            bar.set_postfix(
                loss=f"{result.loss:.4f}", lr=f"{learning_rate:.2e}", tok_s=f"{result.input_tokens / seconds:.0f}"
            )
            if any_rank(stop.number != 0):
                stopped_by = stop.number or signal.SIGTERM
            if step == last_step or stopped_by or (config.checkpoint_every and step % config.checkpoint_every == 0):
                save(step)
                saved_step = step
    if metrics_file is not None:
        metrics_file.close()
    if stopped_by and world.is_main:
        log_line(
            f"stopped by {signal.Signals(stopped_by).name} after step {saved_step} of {last_step}; checkpoint "
            f"{output / 'checkpoints'}; the same command with --resume auto continues"
        )
    return TrainResult(step=step, last_step=last_step, stopped_by=int(stopped_by) if step < last_step else 0)


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


def _open_folder(config: SFTConfig, identity: dict, world: World) -> None:
    """Rank 0 checks and makes the run folder; a refusal is raised on every rank."""
    problem = ""
    if world.is_main:
        try:
            output = Path(config.output)
            open_run_folder(output, identity, resume=config.resume)
            (output / "checkpoints").mkdir(exist_ok=True)
            remove_leftovers(output / "checkpoints")
            write_json_atomically(output / "config.json", asdict(config))
            write_json_atomically(output / "environment.json", describe_environment(world.size, world.device))
        except (RunFolderError, OSError) as error:
            problem = str(error)
    if any_rank(problem != ""):
        raise RunFolderError(problem or f"{config.output}: refused by rank 0")


def _resume(
    config: SFTConfig, model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World, *, identity: str
) -> int:
    """Load the newest good checkpoint, if any; returns the number of optimizer steps already done."""
    folder = Path(config.output) / "checkpoints"
    path, refused = newest_good_checkpoint(folder, world, identity=identity)
    step = 0
    if world.is_main:
        for line in refused:
            log_line(line)
    if path is not None:
        for module in fsdp_modules(model):
            module.reshard()
        state = load_checkpoint(path, model, optimizer, world)
        step = state.step
        if world.is_main:
            log_line(f"resuming from {path} (step {step}, saved by {state.saved_world_size} ranks)")
    elif refused:
        raise CheckpointError(
            f"{folder}: found no good checkpoint among {len(refused)}, expected one to resume from ({refused[0]})"
        )
    if world.is_main:
        cut_metrics(Path(config.output) / "metrics.jsonl", step)
    wait_for_all()
    return step
