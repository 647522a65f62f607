"""PPO with the paper's reward from an SFT model: `python run_ppo.py`, or `torchrun --nproc_per_node N run_ppo.py`.

Without flags: the model of `python run_sft.py` on the bundled data. Exit codes: 0 all steps done and final/ written; 2
bad input, with one line on stderr; 130 or 143 stopped by SIGINT or SIGTERM after saving: go on with the same command.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import ConfigError, fail, read_config
from data.json_records import DataError
from model.config import ModelFolderError
from model.pretrained_weights import check_same_shape, save_pretrained_streamed, save_value_model
from model.pretrained_weights import read_config as read_model_config
from model.tokenizer import Tokenizer, load_tokenizer
from rl.check_rewards import check_rewards
from rl.plots import plot_ppo
from rl.ppo_config import PPOConfig
from rl.ppo_loop import Models, train_ppo
from rl.prompts import PPOPrompt, read_prompts
from train.checkpoint import CheckpointError
from train.checksums import differing_tensors, folder_checksums, parameter_checksums
from train.cuda.launch import LossBackendError, agree_on_loss_backend
from train.distributed import (
    DTYPES,
    DeviceError,
    World,
    close_world,
    init_world,
    load_sharded_model,
    load_sharded_value_model,
)
from train.optimizer import make_adamw
from train.run_control import TrainingError
from train.run_logging import RunFolderError, file_sha256, log_line, model_fingerprint

USER_ERRORS = (
    ConfigError,
    DataError,
    DeviceError,
    LossBackendError,
    ModelFolderError,
    RunFolderError,
    CheckpointError,
    TrainingError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """One PPO run from the command line: prompts, models, training, export. Returns the exit code."""
    try:
        config = read_config(PPOConfig, "PPO with the paper's rule-based reward (IRM).", arguments, section="ppo")
        if not Path(config.model).is_dir():
            raise ModelFolderError(
                f"{config.model}: found no such folder, expected the model of an SFT run: make one "
                "with python run_sft.py, or name another with --model"
            )
        tokenizer = load_tokenizer(config.model)
        prompts, notes = make_prompts(config, config.data, tokenizer)
        held_out = make_prompts(config, config.eval_data, tokenizer)[0] if config.eval_data else []
        world = init_world(config.device)
        say = log_line if world.is_main else lambda line: None
        loss_backend, reason = agree_on_loss_backend(config.loss_backend, world)
        for note in (*notes, f"loss backend: {loss_backend} ({reason})"):
            say(note)
        models = load_models(config, tokenizer, world, loss_backend)
        result = train_ppo(
            config,
            models,
            tokenizer,
            prompts,
            world,
            held_out=held_out[: config.eval_limit or None],
            sources={
                "data_sha256": file_sha256(Path(config.data)),
                "model_sha256": model_fingerprint(config.model),
                "reference_sha256": model_fingerprint(config.reference_model or config.model),
                "critic_sha256": model_fingerprint(config.critic_model or config.model),
            },
        )
        if result.stopped_by:
            return 128 + result.stopped_by
        export(config, models, world)
        say(f"trained {result.step} steps; model: {Path(config.output) / 'final'}")
        say(f"next: python run_eval.py --model {shlex.quote(str(Path(config.output) / 'final'))}")
        return 0
    except USER_ERRORS as error:
        fail(error)
    finally:
        close_world()


def make_prompts(config: PPOConfig, path: str, tokenizer: Tokenizer) -> tuple[list[PPOPrompt], list[str]]:
    """The prompts of a file and lines about them.

    Raises DataError unless the reward gives every gold call +1 and every mutation of it its branch, ConfigError for
    prompts and responses that together are longer than the model's context.
    """
    context = read_model_config(config.model).max_positions
    max_prompt_tokens = config.max_prompt_tokens or context - config.max_response_tokens
    if max_prompt_tokens < 1 or max_prompt_tokens + config.max_response_tokens > context:
        raise ConfigError(
            f"--max_prompt_tokens: found {max_prompt_tokens} beside {config.max_response_tokens} "
            f"response tokens, expected at most {context} together, the context of {config.model}"
        )
    prompts, notes = read_prompts(
        path,
        tokenizer,
        error_filter=config.error_filter,
        prompt_turns=config.prompt_turns,
        max_prompt_tokens=max_prompt_tokens,
        unparsable_calls=config.unparsable_calls,
    )
    offenders = check_rewards(prompts)
    if offenders:
        raise DataError(
            f"{offenders[0]}; {len(offenders)} of {len(prompts)} prompts fail the check of the reward, expected none"
        )
    return prompts, notes


def load_models(config: PPOConfig, tokenizer: Tokenizer, world: World, loss_backend: str = "torch") -> Models:
    """Policy, frozen reference and critic, sharded, with their optimizers. A collective.

    Raises ModelFolderError for a folder that cannot be used, a reference or critic of another shape, and a critic whose
    weights are not its folder's.
    """
    reference_dir, critic_dir = config.reference_model or config.model, config.critic_model or config.model
    check_same_shape(config.model, reference_dir, "reference")
    check_same_shape(config.model, critic_dir, "critic")
    shared = {"dtype": config.dtype, "tokenizer_size": tokenizer.vocab_size}
    policy = load_sharded_model(config.model, world, **shared)
    reference = load_sharded_model(reference_dir, world, **shared, keep_on_cpu=config.reference_device == "cpu")
    critic = load_sharded_value_model(critic_dir, world, **shared)
    reference.requires_grad_(False).eval()
    # the released code's critic never loads: it trains a random one without a word
    wrong = differing_tensors(parameter_checksums(critic), folder_checksums(critic_dir))
    if wrong:
        raise ModelFolderError(
            f"{critic_dir}: found {len(wrong)} tensors of the loaded critic unlike the stored ones "
            f"({wrong[0]} ...), expected equal checksums"
        )
    settings = {
        "beta1": config.adam_beta1,
        "beta2": config.adam_beta2,
        "epsilon": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    return Models(
        policy,
        reference,
        critic,
        policy_optimizer=make_adamw(policy, learning_rate=config.policy_learning_rate, **settings),
        value_optimizer=make_adamw(critic, learning_rate=config.value_learning_rate, **settings),
        starts_at_reference=model_fingerprint(reference_dir) == model_fingerprint(config.model),
        loss_backend=loss_backend,
    )


def export(config: PPOConfig, models: Models, world: World) -> None:
    """Write output/final (the policy), output/critic if wanted, and the plot. A collective."""
    output = Path(config.output)
    save_pretrained_streamed(
        models.policy, output / "final", dtype=DTYPES[config.final_dtype], companions_from=config.model
    )
    if config.save_critic == "on":
        save_value_model(
            models.critic,
            output / "critic",
            dtype=DTYPES[config.final_dtype],
            companions_from=config.critic_model or config.model,
        )
    if world.is_main and config.plot == "on":
        log_line(plot_ppo(output))


if __name__ == "__main__":
    sys.exit(main())
