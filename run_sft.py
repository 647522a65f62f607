"""Supervised fine-tuning of a tool-calling model: `python run_sft.py`, or `torchrun --nproc_per_node N run_sft.py`.

Without flags: the bundled tiny model and data. Exit codes: 0 all steps done and final/ written; 2 bad input, with one
line on stderr; 130 or 143 stopped by SIGINT or SIGTERM after saving: continue with the same command.
"""

import sys

if __name__ == "__main__":  # before the imports that take seconds
    from start_up import prepare

    prepare()

from collections.abc import Sequence
from pathlib import Path

import torch

from charts import write_run_plot
from command_line import fail, polite_stop, read_config, run_identity
from data.batches import step_batches, steps_per_epoch
from data.trained_format import choose_format, training_record
from model.pretrained_weights import check_folder, describe_eos_change, save_pretrained_streamed
from model.tokenizer import load_tokenizer
from model.transformer import describe_attention
from train.compilation import check_compiler
from train.cuda.launch import agree_on_loss_backend
from train.distributed import (
    DTYPES,
    World,
    close_world,
    init_world,
    leave_if_a_rank_is_lost,
    load_sharded_model,
    ranks_that_hold_shards_only,
)
from train.held_out import read_held_out
from train.optimizer import make_adamw
from train.plan import plan_sft, refuse_too_large, report_plan
from train.progress import command, log_on_main, unused_folder
from train.run_control import USER_ERRORS, lock_folder
from train.run_history import finished_step, mark_finished, without_overridden
from train.run_logging import check_run_folder, file_sha256, log_line, model_fingerprint
from train.seeding import use_deterministic_algorithms
from train.sft_config import SFTConfig
from train.sft_loop import SFTData, encode_data, train_sft
from train.tensorboard import check_tensorboard


@polite_stop("checkpoints are kept; the same command continues")
def main(arguments: Sequence[str] | None = None) -> int:
    """One SFT run from the command line: data, model, optimizer, training, export. Returns the exit code."""
    try:
        config = read_config(SFTConfig, "Supervised fine-tuning with MAE and PKT.", arguments, section="sft")
        check_tensorboard(config.tensorboard)
        tokenizer = load_tokenizer(config.model)
        if config.plan == "on":  # before anything asks for weights
            return report_plan(plan_sft(config, encode_data(config, tokenizer)[0]))
        shape = check_folder(config.model, tokenizer)
        _, format_line = choose_format(config.prompt_format, config.model)
        training = training_record(tokenizer, config.prompt_format)
        sources = {"data_sha256": file_sha256(Path(config.data)), "model_sha256": model_fingerprint(config.model)}
        if is_finished(config, sources):
            return 0
        encoded, report = encode_data(config, tokenizer)
        held_out, held_out_notes = read_held_out(config, tokenizer)
        use_deterministic_algorithms(config.deterministic)
        refuse_too_large(config, lambda: plan_sft(config, encoded))
        world = init_world(config.device, shard_group_size=config.shard_group_size)
        check_compiler(config.compile, world.device)
        loss_backend, reason = agree_on_loss_backend(config.loss_backend, world, shape.vocab_size)
        if world.is_main:
            idle_line = ranks_that_hold_shards_only(world.size, min(config.global_batch_size, len(encoded)))
            for note in filter(None, [format_line, idle_line, *report["notes"], *held_out_notes]):
                log_line(note)
            log_line(f"loss backend: {loss_backend} ({reason})")
            log_line(f"attention: {describe_attention(shape, DTYPES[config.dtype], world.device)}")
        model = load_sharded_model(
            config.model, world, dtype=config.dtype, tokenizer_size=tokenizer.vocab_size, offload=config.offload == "on"
        )
        optimizer = make_optimizer(config, model)
        data = SFTData(
            step_batches=lambda step: step_batches(
                encoded,
                step,
                seed=config.seed,
                global_batch_size=config.global_batch_size,
                micro_batch_size=config.micro_batch_size,
                rank=world.rank,
                world_size=world.size,
            ),
            total_steps=config.epochs * steps_per_epoch(len(encoded), config.global_batch_size),
            sources=sources,
            report=report,
            held_out=held_out,
        )
        with lock_folder(Path(config.output), world):
            result = train_sft(config, data, model, optimizer, world, loss_backend=loss_backend)
            if result.stopped_by:
                close_world()
                return 128 + result.stopped_by
            export(config, model, training, world, step=result.step)
        close_world()
        return 0
    except USER_ERRORS as error:
        fail(error)
    except RuntimeError as error:
        leave_if_a_rank_is_lost(error)
        raise


def make_optimizer(config: SFTConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over a model that is sharded already."""
    return make_adamw(
        model,
        learning_rate=config.learning_rate,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def is_finished(config: SFTConfig, sources: dict[str, str]) -> bool:
    """Whether the folder holds this very run with all its steps done, which the log then says.

    Asked before encoding, which takes minutes. Raises RunFolderError for the folder of another run.
    """
    output = Path(config.output)
    identity = without_overridden(run_identity(config, sources), config.override)
    check_run_folder(output, identity, resume=config.resume, is_whole=False)
    step = finished_step(output, config.max_steps, ("final",))
    if step is not None:
        log_on_main(f"already finished at step {step}; model: {output / 'final'}", *next_steps(config))
    return step is not None


def export(config: SFTConfig, model: torch.nn.Module, training: dict, world: World, *, step: int) -> None:
    """Write output/final and the plot, and say what to do next. A collective."""
    output, eos_id = Path(config.output), training["end_of_turn_id"]
    save_pretrained_streamed(
        model, output / "final", dtype=torch.float32, companions_from=config.model, eos_id=eos_id, training=training
    )
    if not world.is_main:
        return
    mark_finished(output, step)
    if change := describe_eos_change(config.model, eos_id):
        log_line(change)
    if config.plot == "on":
        log_line(write_run_plot(output))
    log_on_main(f"trained {step} step{'s' * (step != 1)}; model: {output / 'final'}", *next_steps(config))


def next_steps(config: SFTConfig) -> list[str]:
    """Commands to copy: score the result and, once, its base, each into a folder of its own; train further."""
    output, defaults = Path(config.output), SFTConfig()
    final, base_scores = output / "final", output.parent / "eval_base"
    data = {} if config.data == defaults.data else {"data": config.data}
    form = {} if config.prompt_format == defaults.prompt_format else {"prompt_format": config.prompt_format}
    score_base = f"score its base:    {command('run_eval.py', model=config.model, **form, output=base_scores)}"
    return [
        f"score it:          {command('run_eval.py', model=final, output=unused_folder(output, 'eval'))}",
        *([] if base_scores.exists() else [score_base]),
        f"train it further:  {command('run_ppo.py', model=final, **data, output=unused_folder(output, 'ppo'))}",
    ]


if __name__ == "__main__":
    sys.exit(main())
