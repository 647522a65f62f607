"""The three models of a PPO run and the optimizers of the two that learn."""

from dataclasses import dataclass

import torch

from model.pretrained_weights import check_same_shape
from model.tokenizer import Tokenizer
from rl.ppo_config import PPOConfig
from train.compilation import compile_blocks
from train.distributed import World, load_sharded_model, load_sharded_value_model
from train.optimizer import make_adamw
from train.run_logging import model_fingerprint


@dataclass(frozen=True, slots=True)
class Models:
    """Policy, reference and critic, all sharded, with the tokenizer that they share."""

    policy: torch.nn.Module  # Transformer
    reference: torch.nn.Module  # Transformer, frozen
    critic: torch.nn.Module  # ValueModel; shares no weight with the policy
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer
    tokenizer: Tokenizer
    starts_at_reference: bool  # policy and reference hold the same weights before the first update
    loss_backend: str = "torch"  # what computes log-probabilities, for all models alike; or "cuda"

    def trained(self) -> dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]:
        """What a checkpoint holds: name -> model and its optimizer."""
        return {"policy": (self.policy, self.policy_optimizer), "critic": (self.critic, self.value_optimizer)}


def load_models(config: PPOConfig, tokenizer: Tokenizer, world: World, loss_backend: str = "torch") -> Models:
    """All models of a run, from the folders that `config` names; a collective.

    Loading is strict: a tensor that is missing, unexpected or of another shape is an error. So the critic really starts
    from its folder's weights; in the released code no name matches, the error is never read, and the critic is random.
    Raises ModelFolderError for a folder that cannot be used and for models of different shapes.
    """
    reference_dir, critic_dir = config.reference_model or config.model, config.critic_model or config.model
    check_same_shape(config.model, reference_dir, "reference")
    check_same_shape(config.model, critic_dir, "critic")
    shared = {"dtype": config.dtype, "tokenizer_size": tokenizer.vocab_size, "offload": config.offload == "on"}
    policy = load_sharded_model(config.model, world, **shared)
    reference = load_sharded_model(reference_dir, world, **shared, frozen=True)
    critic = load_sharded_value_model(critic_dir, world, **shared)
    if config.compile == "on":  # the reference too: without updates it must give the policy's bits
        for model in (policy, reference, critic):
            compile_blocks(model)
    for model in (policy, critic):
        model.activation_checkpointing = config.activation_checkpointing == "on"
        model.train()
    adamw = {
        "beta1": config.adam_beta1,
        "beta2": config.adam_beta2,
        "epsilon": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    return Models(
        policy,
        reference,
        critic,
        policy_optimizer=make_adamw(policy, learning_rate=config.policy_learning_rate, **adamw),
        value_optimizer=make_adamw(critic, learning_rate=config.value_learning_rate, **adamw),
        tokenizer=tokenizer,
        starts_at_reference=model_fingerprint(reference_dir) == model_fingerprint(config.model),
        loss_backend=loss_backend,
    )
