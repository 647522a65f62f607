"""Which token cost how much: the loss of one logged step, taken apart.

    python -m train.audit_loss --run runs/sft --step 101

recomputes the global batch of optimizer step 101 with the weights from before it (checkpoint step_00000100; for step 1
the base model) and writes one JSON line per trained token. The contributions add up to the step's `sft/loss` in
metrics.jsonl: sum_i w_i * ce_i / denominator = loss (E1, E6-E8). Exit codes: 0 the sum agrees, 1 it does not, 2 bad
input.

Shape suffixes: T tokens of a packed row, K trained ones.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from command_line import error_line, parse_arguments
from data.batches import PackedBatch, step_batches
from data.json_records import DataError, read_json_object
from data.loss_weights import EncodedTrajectory
from model.config import ModelFolderError
from model.tokenizer import load_tokenizer
from printable import shown, terminal_text
from train.checkpoint import (
    CheckpointError,
    check_files,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    load_weights,
)
from train.distributed import close_world, init_world, load_sharded_model
from train.held_out import trained_logprobs
from train.run_logging import file_sha256, model_fingerprint, read_metrics
from train.sft_config import SFTConfig
from train.sft_loop import encode_data

# relative difference of two ways to add up the same step: fp32 rounding, or bf16's 8 bits averaged over the tokens
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class AuditError(ValueError):
    """The run cannot be audited at this step. One line."""


# ---------------------------------------------------------------------------------------------------------------------
# The run


def read_run(run: Path) -> SFTConfig:
    """The settings of a run folder.

    Raises AuditError, DataError when it is none, or when its model or data changed since.
    """
    try:
        settings = read_json_object(run / "config.json")
        identity = read_json_object(run / "run_identity.json")
        config = SFTConfig(**{field.name: settings[field.name] for field in fields(SFTConfig)})
        now = {"data_sha256": file_sha256(Path(config.data)), "model_sha256": model_fingerprint(config.model)}
    except OSError as error:
        raise AuditError(f"{error.filename}: found no readable file ({error.strerror}), expected an SFT run") from None
    except KeyError as error:
        raise AuditError(f"{run}/config.json: found no setting {error}, expected those of an SFT run") from None
    except TypeError as error:
        raise AuditError(f"{run}: found settings that cannot be read ({error}), expected an SFT run") from None
    for name, path in (("data_sha256", config.data), ("model_sha256", config.model)):
        if identity.get(name) != now[name]:
            raise AuditError(
                f"{path}: found other content than the run was made with, expected {name} {shown(identity.get(name))}"
            )
    return config


def logged_loss(run: Path, step: int) -> float:
    """`sft/loss` of the step in metrics.jsonl. Raises AuditError when the run has no such step."""
    losses = {row["step"]: row["sft/loss"] for row in read_metrics(run / "metrics.jsonl", "sft/loss")}
    if step not in losses:
        raise AuditError(f"--step: found {step}, expected one of the {len(losses)} steps in {run / 'metrics.jsonl'}")
    return losses[step]


def weights_before(run: Path, step: int) -> Path | None:
    """The verified checkpoint saved right before `step`; None (the base model) for step 1. Raises AuditError."""
    if step == 1:
        return None
    path = run / "checkpoints" / checkpoint_name(step - 1)
    if not path.is_dir():
        logged = {row["step"] for row in read_metrics(run / "metrics.jsonl")}
        after = sorted(checkpoint_step(each) + 1 for each in list_checkpoints(run / "checkpoints"))
        possible = ", ".join(str(each) for each in [1, *after] if each in logged)
        raise AuditError(
            f"{path}: found no such checkpoint, expected one saved right before the step; --step may be {possible}"
        )
    if fault := check_files(path):
        raise AuditError(f"{path}: {fault}")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def token_rows(
    batch: PackedBatch, logprobs_K: list[float], rows: dict[str, EncodedTrajectory], denominator: float
) -> Iterator[dict]:
    """One dict per trained token of a packed row.

    `weight` is w of E4; `loss_weight` is what the loss multiplies with (w over the turn's sum of w, for turn_mean);
    `contribution` = -loss_weight * logprob / denominator.
    """
    starts = torch.tensor([0, *batch.segment_lengths]).cumsum(0).tolist()
    eos_weight = {name: eos_weights(rows[name]) for name in batch.ids}
    segment = 0
    for packed_position, logprob in zip(batch.trained_index_K.tolist(), logprobs_K, strict=True):
        while packed_position >= starts[segment + 1]:
            segment += 1
        row, position = rows[batch.ids[segment]], packed_position - starts[segment]
        loss_weight = batch.loss_weights_T[packed_position].item()
        yield {
            "id": row.id,
            "message_index": row.message_indices[position],
            "position": position,
            "target_id": row.target_ids[position],
            "class": row.token_classes[position],
            "weight": round(row.loss_weights[position] / eos_weight[row.id][row.message_indices[position]], 9),
            "loss_weight": loss_weight,
            "logprob": logprob,
            "contribution": -loss_weight * logprob / denominator,
        }


def eos_weights(row: EncodedTrajectory) -> dict[int, float]:
    """Loss weight of each trained turn's EOS. Its w is 1, so dividing a turn's loss weights by it gives w back."""
    return {
        row.message_indices[position]: row.loss_weights[position]
        for position, name in enumerate(row.token_classes)
        if name == "eos"
    }


def audit(run: Path, step: int, output: Path, device: str) -> tuple[float, float, dict[str, tuple[int, float]], str]:
    """Write the step's token lines to `output`.

    Returns (sum of contributions, the logged loss, {class: (tokens, sum)}, the run's dtype).
    """
    config = read_run(run)
    logged = logged_loss(run, step)
    checkpoint = weights_before(run, step)
    tokenizer = load_tokenizer(config.model)
    encoded, _ = encode_data(config, tokenizer)
    world = init_world(device)
    model = load_sharded_model(config.model, world, dtype=config.dtype, tokenizer_size=tokenizer.vocab_size)
    if checkpoint is not None:
        load_weights(checkpoint, model)
    batches = step_batches(
        encoded,
        step - 1,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=0,
        world_size=1,
    )
    denominator = 1.0 if config.loss_normalization == "sum" else sum(batch.denominator for batch in batches)
    rows = {row.id: row for row in encoded}
    by_class: dict[str, tuple[int, float]] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", encoding="utf-8") as file:
        for batch in batches:
            for line in token_rows(batch, trained_logprobs(model, batch, world.device), rows, denominator):
                count, total = by_class.get(line["class"], (0, 0.0))
                by_class[line["class"]] = (count + 1, total + line["contribution"])
                file.write(json.dumps({"step": step, "token": tokenizer.piece(line["target_id"]), **line}) + "\n")
    return sum(total for _, total in by_class.values()), logged, by_class, config.dtype


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.audit_loss", description="Per-token loss of one logged step."
    )
    parser.add_argument("--run", required=True, help="folder of an SFT run")
    parser.add_argument(
        "--step", type=int, required=True, help="optimizer step as in metrics.jsonl; needs the checkpoint before it"
    )
    parser.add_argument("--output", help="file of the token lines [RUN/audit/step_XXXXXXXX.jsonl]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute [auto]")
    given = parse_arguments(parser, arguments)
    run = Path(given.run)
    output = Path(given.output) if given.output else run / "audit" / f"{checkpoint_name(given.step)}.jsonl"
    try:
        total, logged, by_class, dtype = audit(run, given.step, output, given.device)
    except (AuditError, DataError, ModelFolderError, CheckpointError, OSError, ValueError) as error:
        sys.stderr.write(error_line(error) + "\n")
        return 2
    finally:
        close_world()
    n_tokens = sum(count for count, _ in by_class.values())
    print(f"{terminal_text(str(output))}: {n_tokens} trained tokens of step {given.step}")
    for name, (count, part) in sorted(by_class.items()):
        print(f"  {name:8} {count:6} tokens  {part:12.6f} nats  {100 * part / total if total else 0:5.1f} %")
    print(f"  sum of contributions {total:.8f}")
    difference = abs(total - logged) / max(abs(logged), 1e-12)
    agrees = difference <= TOLERANCE[dtype]
    print(
        f"  logged sft/loss      {logged:.8f}  {'agrees' if agrees else 'DIFFERS'}, relative difference "
        f"{difference:.1e}"
    )
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
