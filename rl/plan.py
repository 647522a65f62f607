"""Memory of a PPO run before it starts; what is counted and what is traced: train/plan.py.

Shape suffixes: T tokens of a packed micro-batch, K response tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.config import ModelConfig, count_parameters
from model.decode import row_bytes
from model.pretrained_weights import read_config
from model.sampling import ROWS_PER_FORWARD
from model.transformer import Transformer, shared_prefix_mask
from model.value_model import ValueModel
from rl.ppo_config import PPOConfig
from rl.ppo_loop import count_steps
from rl.prompts import PPOPrompt, even_sizes
from rl.rollout import ResponseBatch, response_logprobs, response_states, response_values
from train.distributed import DTYPES, ranks_that_hold_shards_only
from train.plan import (
    ADAM_BYTES,
    FP32_BYTES,
    GIB,
    OTHER_PART,
    RESERVED_BYTES,
    Phase,
    Plan,
    Setup,
    disk_facts,
    host_memory,
    logits_bytes,
    loss_rows,
    memory_limit,
    setup_of,
    trace_peak,
)


def plan_ppo(config: PPOConfig, prompts: Sequence[PPOPrompt]) -> Plan:
    """The plan of `python run_ppo.py` with these settings on these prompts.

    The largest micro-batch is taken to be micro_batch_size responses of full length to the longest prompt, which
    responses_per_prompt of them share. Reads config.json of the model folder only. Raises ModelFolderError.
    """
    setup, shape = setup_of(config, config.dtype), read_config(config.model)
    n_ranks, device_type = setup.n_ranks, setup.device_type
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    n_steps = config.epochs * sum(count_steps(len(prompts), config))
    n_parameters, n_critic = parameter_counts(shape)
    facts = [
        f"policy and reference {n_parameters:,} parameters each, critic {n_critic:,}; {n_ranks} "
        f"rank{'s' * (n_ranks > 1)}, {config.dtype} on {device_type}",
        f"{config.epochs} x {len(prompts):,} prompts, {n_steps} optimizer steps; longest prompt {longest:,} tokens, "
        f"responses of at most {config.max_response_tokens:,}",
        *disk_facts(
            (n_parameters + n_critic) * (FP32_BYTES + ADAM_BYTES),
            (n_parameters + n_critic * (config.save_critic == "on")) * FP32_BYTES,
            config.keep_checkpoints,
        ),
    ]
    if line := ranks_that_hold_shards_only(n_ranks, config.minibatch_size):
        facts.append(line)
    shard, critic_shard = setup.shard(n_parameters), setup.shard(n_critic)
    resident = {
        "parameters": (shard + critic_shard) * FP32_BYTES + shard * DTYPES[config.dtype].itemsize,  # last: reference
        "optimizer state": (shard + critic_shard) * ADAM_BYTES,
    }
    gradients = shard * FP32_BYTES  # of one model at a time
    host, host_limit = host_memory(config, setup, sum(resident.values()) + gradients)
    if setup.offload:
        resident = dict.fromkeys(resident, 0)
    phases = [
        Phase("rollout", resident | rollout_bytes(config, shape, longest, setup)),
        *update_phases(config, shape, longest, resident, setup),
    ]
    limit = memory_limit(config.gpu_memory_gib, device_type, n_ranks)
    return Plan(facts, phases, RESERVED_BYTES[device_type], limit, host, host_limit)


def rollout_bytes(config: PPOConfig, shape: ModelConfig, longest: int, setup: Setup) -> dict[str, int]:
    """What sampling needs beyond the models: a whole policy, unless it is one already, and the key/value cache."""
    itemsize = DTYPES[config.dtype].itemsize
    is_whole = setup.n_ranks == 1 and config.dtype == "float32" and not setup.offload
    n_rows = min(ROWS_PER_FORWARD, rows_of_rank(config.rollout_batch_size, config, setup))
    bytes_per_row = row_bytes(shape, longest + config.max_response_tokens, itemsize)
    if config.cache_gib:
        n_rows = max(1, min(n_rows, int(config.cache_gib * GIB) // bytes_per_row))
    return {
        "gathered parameters": 0 if is_whole else count_parameters(shape) * itemsize,
        "key/value cache": n_rows * bytes_per_row,
        OTHER_PART: logits_bytes(ROWS_PER_FORWARD, shape.vocab_size, "float32") * 4,  # log-softmax, fp64 sums
    }


def update_phases(
    config: PPOConfig, shape: ModelConfig, longest: int, resident: dict[str, int], setup: Setup
) -> list[Phase]:
    """Measuring and the update of policy and critic, traced on at most two micro-batches."""
    n_mine, n_shared = rows_of_rank(config.minibatch_size, config, setup), config.responses_per_prompt
    n_rows, n_calls = min(config.micro_batch_size, n_mine), min(2, -(-n_mine // config.micro_batch_size))
    n_logits = loss_rows(n_rows * config.max_response_tokens, shape.vocab_size, setup.device_type)

    def traced(build: Callable[[ModelConfig], torch.nn.Module], score: Callable, needs_grad: bool) -> dict[str, int]:
        def run(model: torch.nn.Module, mode: FakeTensorMode) -> None:
            with torch.set_grad_enabled(needs_grad):
                total = score(model, full_batch(n_rows, n_shared, longest, config.max_response_tokens)).sum()
            if needs_grad:
                total.backward()

        parts = trace_peak(build, shape, run, n_calls if needs_grad else 1, setup)
        parts.pop("parameters", None)  # all models' are in `resident`
        if build is Transformer:
            parts[OTHER_PART] += logits_bytes(n_logits, shape.vocab_size, config.dtype)
        return parts

    return [
        Phase("measure", resident | traced(Transformer, logprobs_of, False)),
        Phase("policy update", resident | traced(Transformer, logprobs_of, True)),
        Phase("critic update", resident | traced(ValueModel, response_values, True)),
    ]


def parameter_counts(shape: ModelConfig) -> tuple[int, int]:
    """Parameters of the policy and of the critic, which has a value head instead of an output head."""
    n_policy = count_parameters(shape)
    n_head = 0 if shape.tie_embeddings else shape.vocab_size * shape.dim
    return n_policy, n_policy - n_head + shape.dim + 1


def logprobs_of(policy: torch.nn.Module, batch: ResponseBatch) -> Tensor:
    """Log-probabilities of the responses, (K,), as the update computes them."""
    return response_logprobs(response_states(policy, batch), policy, batch, temperature=1.0)


def rows_of_rank(n_responses: int, config: PPOConfig, setup: Setup) -> int:
    """Responses of rank 0 among n_responses of all ranks: it has all responses to each of its prompts."""
    n_prompts = -(-n_responses // config.responses_per_prompt)
    return min(n_responses, -(-n_prompts // setup.n_ranks) * config.responses_per_prompt)


def full_batch(n_rows: int, n_shared: int, n_prompt: int, n_response: int) -> ResponseBatch:
    """A packed micro-batch of n_rows responses, n_shared to a prompt, of those lengths in tokens; its numbers mean
    nothing.

    A micro-batch whose border cuts through the responses to a prompt may hold one prompt more.
    """
    groups = even_sizes(n_rows, n_shared)
    lengths = [n_prompt + size * (n_response - 1) for size in groups]
    n_tokens, n_scored = sum(lengths), n_rows * n_response
    ids_T, index_K = torch.zeros(n_tokens, dtype=torch.int64), torch.zeros(n_scored, dtype=torch.int64)
    masks = [shared_prefix_mask(n_prompt, [n_response - 1] * size) if size > 1 else None for size in groups]
    return ResponseBatch(ids_T, ids_T, index_K, index_K, index_K, index_K, lengths, masks)
