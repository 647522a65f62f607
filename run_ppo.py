"""PPO with the paper's reward from an SFT model: `python run_ppo.py`, or `torchrun --nproc_per_node N run_ppo.py`.

Without flags: the model of `python run_sft.py` on the bundled data. Exit codes: 0 all steps done and final/ written; 2
bad input, with one line on stderr; 130 or 143 stopped by SIGINT or SIGTERM after saving: continue with the same
command.
"""

import sys

if __name__ == "__main__":  # before the imports that take seconds
    from start_up import prepare

    prepare()

from collections.abc import Sequence
from pathlib import Path

from charts import write_run_plot
from command_line import ConfigError, fail, polite_stop, read_config, run_identity
from data.json_records import DataError
from data.trained_format import choose_format, read_trained_format, training_record
from model.config import ModelFolderError
from model.pretrained_weights import check_folder, describe_eos_change, save_pretrained_streamed, save_value_model
from model.pretrained_weights import read_config as read_model_config
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import describe_attention
from rl.check_rewards import check_rewards, drop_unspellable
from rl.models import Models, load_models
from rl.plan import plan_ppo
from rl.ppo_config import PPOConfig
from rl.ppo_loop import describe_epoch, train_ppo
from rl.prompts import PPOPrompt, read_prompts
from train.compilation import check_compiler
from train.cuda.launch import agree_on_loss_backend
from train.distributed import (
    DTYPES,
    World,
    close_world,
    init_world,
    leave_if_a_rank_is_lost,
    ranks_that_hold_shards_only,
)
from train.plan import refuse_too_large, report_plan
from train.progress import command, log_on_main, unused_folder
from train.run_control import USER_ERRORS, lock_folder
from train.run_history import finished_step, mark_finished, without_overridden
from train.run_logging import check_run_folder, file_sha256, log_line, model_fingerprint
from train.seeding import use_deterministic_algorithms
from train.tensorboard import check_tensorboard


@polite_stop("checkpoints are kept; the same command continues")
def main(arguments: Sequence[str] | None = None) -> int:
    """One PPO run from the command line: prompts, models, training, export. Returns the exit code."""
    try:
        config = read_config(PPOConfig, "PPO with the paper's rule-based reward (IRM).", arguments, section="ppo")
        if not Path(config.model).is_dir():
            raise ModelFolderError(
                f"{config.model}: found no such folder, expected the model of an SFT run: make one "
                "with python run_sft.py, or name another with --model"
            )
        check_tensorboard(config.tensorboard)
        config.prompt_format, format_line = agree_on_format(config)
        tokenizer = load_tokenizer(config.model)
        if config.plan == "on":  # before anything asks for weights
            return report_plan(plan_ppo(config, make_prompts(config, config.data, tokenizer)[0]))
        shape = check_folder(config.model, tokenizer)
        sources = {
            "data_sha256": file_sha256(Path(config.data)),
            "model_sha256": model_fingerprint(config.model),
            "reference_sha256": model_fingerprint(config.reference_model or config.model),
            "critic_sha256": model_fingerprint(config.critic_model or config.model),
        }
        if is_finished(config, sources):
            return 0
        prompts, notes = make_prompts(config, config.data, tokenizer)
        prompts, more_notes = drop_unspellable(prompts, tokenizer, config.max_response_tokens)
        more_notes.append(describe_epoch(len(prompts), config))
        held_out = make_prompts(config, config.eval_data, tokenizer)[0] if config.eval_data else []
        use_deterministic_algorithms(config.deterministic)
        refuse_too_large(config, lambda: plan_ppo(config, prompts))
        world = init_world(config.device, shard_group_size=config.shard_group_size)
        check_compiler(config.compile, world.device)
        loss_backend, reason = agree_on_loss_backend(config.loss_backend, world, shape.vocab_size)
        if world.is_main:
            idle_line = ranks_that_hold_shards_only(world.size, config.minibatch_size)
            for note in (
                *filter(None, [format_line, idle_line]),
                *notes,
                *more_notes,
                f"loss backend: {loss_backend} ({reason})",
                f"attention: {describe_attention(shape, DTYPES[config.dtype], world.device)}",
            ):
                log_line(note)
        models = load_models(config, tokenizer, world, loss_backend)
        held_out = held_out[: config.eval_limit or None]
        notes += more_notes
        with lock_folder(Path(config.output), world):
            result = train_ppo(config, models, prompts, world, held_out=held_out, sources=sources, notes=notes)
            if result.stopped_by:
                close_world()
                return 128 + result.stopped_by
            export(config, models, world, step=result.step)
        close_world()
        return 0
    except USER_ERRORS as error:
        fail(error)
    except RuntimeError as error:
        leave_if_a_rank_is_lost(error)
        raise


def agree_on_format(config: PPOConfig) -> tuple[str, str]:
    """The prompt format of the run, and a line for the log or "".

    Raises ConfigError if policy, reference or critic says that it was trained in another one: its log-probabilities and
    values would mean nothing in these prompts. ModelFolderError as choose_format.
    """
    prompt_format, line = choose_format(config.prompt_format, config.model)
    for name in ("model", "reference_model", "critic_model"):
        folder = getattr(config, name)
        trained = read_trained_format(folder) if folder else None
        if trained not in (None, prompt_format):
            raise ConfigError(
                f"--prompt_format: found {prompt_format}, expected {trained}, in which --{name} {folder} was trained"
            )
    return prompt_format, line


def make_prompts(config: PPOConfig, path: str, tokenizer: Tokenizer) -> tuple[list[PPOPrompt], list[str]]:
    """The prompts of a file and lines about them.

    Raises ConfigError if prompt and response together are longer than the model's context, DataError unless the reward
    rule gives every gold call +1 and every mutation of it its category.
    """
    context = read_model_config(config.model).max_positions
    max_prompt_tokens = config.max_prompt_tokens or context - config.max_response_tokens
    if config.max_response_tokens >= context:
        raise ConfigError(
            f"--max_response_tokens: found {config.max_response_tokens}, expected fewer than {context}, the context of "
            f"{config.model}"
        )
    if max_prompt_tokens + config.max_response_tokens > context:
        raise ConfigError(
            f"--max_prompt_tokens: found {max_prompt_tokens} with {config.max_response_tokens} "
            f"response tokens, expected at most {context} together, the context of {config.model}"
        )
    prompts, notes = read_prompts(
        path,
        tokenizer,
        error_filter=config.error_filter,
        prompt_turns=config.prompt_turns,
        max_prompt_tokens=max_prompt_tokens,
        unparsable_calls=config.unparsable_calls,
        prompt_format=config.prompt_format,
    )
    offenders = check_rewards(prompts)
    if offenders:
        raise DataError(
            f"{offenders[0]}; {len(offenders)} of {len(prompts)} prompts fail the check of the reward, expected none"
        )
    return prompts, notes


def is_finished(config: PPOConfig, sources: dict[str, str]) -> bool:
    """Whether the folder holds this very run with all its steps done, which the log then says.

    Asked before making prompts, which takes minutes. Raises RunFolderError for the folder of another run.
    """
    output = Path(config.output)
    identity = without_overridden(run_identity(config, sources), config.override)
    check_run_folder(output, identity, resume=config.resume, is_whole=False)
    exports = ("final", "critic") if config.save_critic == "on" else ("final",)
    step = finished_step(output, config.max_steps, exports)
    if step is not None:
        log_on_main(f"already finished at step {step}; model: {output / 'final'}", *next_steps(config))
    return step is not None


def export(config: PPOConfig, models: Models, world: World, *, step: int) -> None:
    """Write output/final (the policy), output/critic if wanted, and the plot; say what to do next. A collective."""
    output = Path(config.output)
    training = training_record(models.tokenizer, config.prompt_format)
    eos_id = training["end_of_turn_id"]
    save_pretrained_streamed(
        models.policy, output / "final", companions_from=config.model, eos_id=eos_id, training=training
    )
    if config.save_critic == "on":
        companions = config.critic_model or config.model
        save_value_model(models.critic, output / "critic", companions_from=companions)
    if not world.is_main:
        return
    mark_finished(output, step)
    if change := describe_eos_change(config.model, eos_id):
        log_line(change)
    if config.plot == "on":
        log_line(write_run_plot(output, config.critic_only_iterations))
    log_on_main(f"trained {step} step{'s' * (step != 1)}; model: {output / 'final'}", *next_steps(config))


def next_steps(config: PPOConfig) -> list[str]:
    """Commands to copy: score the result and, once, the model that it started from, each into a folder of its own."""
    output, start = Path(config.output), Path(config.model)
    start_scores = output.parent / f"eval_{(start.parent if start.name == 'final' else start).name}"
    score_start = f"score its start:  {command('run_eval.py', model=start, output=start_scores)}"
    return [
        f"score it:         {command('run_eval.py', model=output / 'final', output=unused_folder(output, 'eval'))}",
        *([] if start_scores.exists() else [score_start]),
    ]


if __name__ == "__main__":
    sys.exit(main())
