"""A training run of less than a second in this process: one layer, random batches, the loop of run_sft.py."""

import contextlib
import hashlib
import io
from pathlib import Path

import torch

from tests.support.tiny_run import random_batch, tiny_model
from train.distributed import World, close_world, init_world, shard_model
from train.optimizer import make_adamw
from train.sft_config import SFTConfig
from train.sft_loop import SFTData, train_sft


def make_parts(world: World) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The untrained model and its optimizer, sharded over `world`."""
    model = tiny_model(n_layers=1)
    shard_model(model, world, dtype="float32")
    return model, make_adamw(model, learning_rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.01)


def train_small(output: Path, max_steps: int, *, total_steps: int, **settings: object) -> dict[str, torch.Tensor]:
    """Train into `output`, or go on there, up to step `max_steps`; the weights."""
    data = SFTData(lambda step: [random_batch(step)], total_steps=total_steps, sources={"data_sha256": "0"})
    values = {"output": str(output), "max_steps": max_steps, "checkpoint_every": 1, "keep_checkpoints": 0, **settings}
    world = init_world("cpu")
    try:
        model, optimizer = make_parts(world)
        with contextlib.redirect_stdout(io.StringIO()):
            result = train_sft(SFTConfig(**values), data, model, optimizer, world)
    finally:
        close_world()
    assert result.step == max_steps
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def digest_of_weights(weights: dict[str, torch.Tensor]) -> str:
    """sha256 over names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
