"""One rollout: sample, judge, measure, credit. These are steps 1 to 4 of an iteration; rl/ppo_loop.py updates on them.

    sample_responses     prompts    ->  ids and log-probabilities of the sampler
    judge_responses      those      ->  Sampled: response mask, reward of each response
    measure_responses    Sampled    ->  Measured: log-probabilities, entropies, values
    credit_responses     Measured   ->  Credited: rewards per token, advantages, returns

Every record is frozen and holds the one before it. Slots outside the response mask are 0.

A response token t is *sampled* in state t (prompt and the tokens before t), so its log-probability and its value come
from the hidden state one position to the left. Indices of a prompt of P tokens and a response of R:

    position of the row    0 ... P-2   P-1    P      ...  P+R-2   P+R-1
    token                  prompt      prompt resp 0 ...  resp R-2  resp R-1 (EOS, or the last one that fits)
    state t of                         t = 0  t = 1  ...  t = R-1   none: no token follows, so it is not fed

Shape suffixes: B responses of this rank, R longest response among them, T tokens of a packed micro-batch, K response
tokens in it, D model dim, V vocabulary.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from math import ceil

import torch
from torch import Tensor

from data.formats.prompt_format import find_stop_ids
from data.formats.table import FORMATS, end_of_turn_ids
from model.decode import DecodeWeights
from model.sampling import continue_prompts, decoder_for
from model.tokenizer import Tokenizer
from model.transformer import shared_prefix_mask
from rl.advantages import compute_gae, kl_shaped_rewards, masked_sums, whiten
from rl.models import Models
from rl.ppo_config import PPOConfig
from rl.ppo_loss import token_entropies
from rl.prompts import PPOPrompt, even_sizes
from rl.reward import RewardResult, judge_response
from train.distributed import World, gathered_model, global_sum, reshard_all
from train.run_control import TrainingError
from train.weighted_cross_entropy import linear_token_logprobs


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration of the run, as it begins."""

    number: int  # from 0, over all epochs
    step: int  # optimizer steps done before it
    total_steps: int  # optimizer steps of the whole schedule
    kl_coef: float
    prompts: list[PPOPrompt]  # one per response of all ranks; those with one prompt follow each other


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """This rank's responses of one iteration and the reward of each."""

    prompts: list[PPOPrompt]  # B
    response_ids: list[list[int]]  # B lists; ids and lengths are the sampler's, never inferred from ids
    ended: list[bool]  # B: closed by the format's end of turn; False: cut at max_response_tokens
    results: list[RewardResult]  # B
    scores_B: Tensor  # fp32, reward of the whole response, before KL
    response_mask_BR: Tensor  # bool, true through the last token inclusive
    sampler_logprobs_BR: Tensor  # fp32, nats, as the sampler computed them


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What the models say about the sampled responses, before any update."""

    sampled: Sampled
    logprobs_BR: Tensor  # fp32, nats, of the policy that sampled, by the trainer's forward: the "old" ones of the ratio
    ref_logprobs_BR: Tensor  # fp32, nats, of the frozen reference
    entropies_BR: Tensor  # fp32, nats, of the distribution that token t was drawn from
    values_BR: Tensor  # fp32, V(state t)
    seconds: dict[str, float]  # policy_logprobs, reference, critic: time of each model on this rank


@dataclass(frozen=True, slots=True, eq=False)
class Credited:
    """What each response token is to be credited with: all that the update needs."""

    measured: Measured
    kl_coef: float  # factor of the KL in the rewards
    rewards_BR: Tensor  # fp32, -kl_coef * KL per token, plus the score at the last one
    advantages_BR: Tensor  # fp32
    returns_BR: Tensor  # fp32, advantages + values, before any whitening


# ---------------------------------------------------------------------------------------------------------------------
# 1 sample


def sample_responses(
    config: PPOConfig, models: Models, world: World, iteration: Iteration, must_stop: Callable[[], bool]
) -> list[tuple[list[int], list[float]]]:
    """(response_ids, logprobs at the sampling temperature) of this rank's prompts, from the policy as it is now.

    The policy's parameters are gathered once for all tokens, a collective; the copy is freed on return. Decoding itself
    is local, so ranks need not decode equally many tokens. must_stop() is asked before every token, on CUDA before
    every fourth: once it is True, unfinished responses are returned short, to be discarded.
    Raises TrainingError, on every rank alike, for weights that are not finite.
    """
    gathered = gathered_model(models.policy, world, dtype=config.dtype)
    wrong = [name for name, parameter in gathered.named_parameters() if not parameter.isfinite().all()]
    if wrong:  # nothing can be drawn from logits of nan
        raise TrainingError(
            f"iteration {iteration.number}: found {len(wrong)} tensors of the policy with nan or inf "
            f"({wrong[0]} ...), expected finite weights"
        )
    mine = responses_of_rank(world, len(iteration.prompts), config.responses_per_prompt)
    prompts = [iteration.prompts[index].prompt_ids for index in mine]
    decoder = decoder_for(
        DecodeWeights(gathered, cuda_graphs=config.cuda_graphs == "on"),
        prompts,
        max_new_tokens=config.max_response_tokens,
        temperature=config.temperature,
        eos_id=stop_ids_of(iteration.prompts, models.tokenizer),
        cache_bytes=int(config.cache_gib * 2**30),
    )
    generators = [response_generator(config.seed, iteration.number, index) for index in mine]
    return continue_prompts(decoder, prompts, generators, lambda finished_B: not must_stop())


def responses_of_rank(world: World, n_responses: int, responses_per_prompt: int) -> list[int]:
    """Indices of this rank's responses among those of all ranks. Rank j % size has prompt j and all responses to it."""
    return [index for index in range(n_responses) if index // responses_per_prompt % world.size == world.rank]


def stop_ids_of(prompts: Sequence[PPOPrompt], tokenizer: Tokenizer) -> frozenset[int]:
    """Where responses to these prompts stop, as in evaluation: at EOS and at the control tokens that end a turn."""
    stop_texts = {text for prompt in prompts for text in FORMATS[prompt.prompt_format].stop_strings}
    return find_stop_ids(sorted(stop_texts), tokenizer)


def response_generator(seed: int, iteration: int, index: int) -> torch.Generator:
    """A private generator for response `index` (over all ranks) of an iteration: no state to save or to share."""
    # hashed: sums like seed + index would give two runs the same random numbers in other places
    digest = hashlib.sha256(f"{seed} {iteration} {index}".encode("ascii")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# 2 judge


def judge_responses(
    prompts: Sequence[PPOPrompt],
    responses: Sequence[tuple[list[int], list[float]]],
    tokenizer: Tokenizer,
    device: torch.device,
) -> Sampled:
    """The rule-based reward of each response (rl/reward.py), and the (B, R) grids of what was sampled."""
    response_ids = [ids for ids, _ in responses]
    ended = [has_ended(ids, tokenizer, prompt.prompt_format) for ids, prompt in zip(response_ids, prompts, strict=True)]
    results = [
        judge_response(response_text(ids, tokenizer), is_closed, prompt.gold_calls, prompt.tools, prompt.prompt_format)
        for ids, is_closed, prompt in zip(response_ids, ended, prompts, strict=True)
    ]
    shape_BR = (len(response_ids), max(map(len, response_ids), default=0))
    mask_BR, sampler_logprobs_BR = torch.zeros(shape_BR, dtype=torch.bool), torch.zeros(shape_BR)
    for row, (ids, logprobs) in enumerate(responses):
        mask_BR[row, : len(ids)] = True
        sampler_logprobs_BR[row, : len(ids)] = torch.tensor(logprobs)
    return Sampled(
        prompts=list(prompts),
        response_ids=response_ids,
        ended=ended,
        results=results,
        scores_B=torch.tensor([result.reward for result in results], dtype=torch.float32, device=device),
        response_mask_BR=mask_BR.to(device),
        sampler_logprobs_BR=sampler_logprobs_BR.to(device),
    )


def has_ended(response_ids: Sequence[int], tokenizer: Tokenizer, prompt_format: str) -> bool:
    """Whether the response is closed by an end of turn that a model of this format is trained to write."""
    return bool(response_ids) and response_ids[-1] in end_of_turn_ids(tokenizer, prompt_format)


def response_text(response_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The response as reward and reader see it: without control tokens such as EOS, and without surrounding blanks."""
    ids = list(response_ids)
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Micro-batches for steps 3 and 5: whole responses end to end, never padded


@dataclass(frozen=True, slots=True, eq=False)
class ResponseBatch:
    """Some responses with their prompts as one packed row; K response tokens over all of them."""

    input_ids_T: Tensor  # int64, prompt and responses except their last tokens, prompt after prompt
    position_ids_T: Tensor  # int64, from 0 in every prompt; each response goes on from its own
    state_index_K: Tensor  # int64, position in T of the state that token k was sampled in
    target_ids_K: Tensor  # int64, the response tokens
    row_K: Tensor  # int64, place of token k in the (B, R) grids of the rollout
    column_K: Tensor  # int64
    segment_lengths: list[int]  # tokens of each prompt with its responses
    segment_masks: list[Tensor | None]  # None for one response: its tokens see all before them

    def take(self, grid_BR: Tensor) -> Tensor:
        """The batch's K entries of a (B, R) grid, as (1, K)."""
        return grid_BR[self.row_K, self.column_K][None]

    def put(self, grid_BR: Tensor, values_K: Tensor) -> None:
        """Write the batch's K entries into a (B, R) grid."""
        grid_BR[self.row_K, self.column_K] = values_K.to(grid_BR.dtype)


def pack_responses(sampled: Sampled, rows: Sequence[int], responses_per_prompt: int = 1) -> ResponseBatch:
    """Rows of a rollout end to end. Without rows: one token and nothing to score, because every rank has to join every
    collective of a forward.

    Rows that follow each other with one prompt (the same row // responses_per_prompt) are one segment: the prompt once,
    then each response, which sees the prompt and itself.
    """
    inputs, positions, lengths, masks = [], [], [], []
    states, targets, rows_of_tokens, columns = [], [], [], []
    for _, group in groupby(rows, key=lambda row: row // responses_per_prompt):
        responses = [(row, sampled.response_ids[row]) for row in group]
        prompt_ids, start = sampled.prompts[responses[0][0]].prompt_ids, len(inputs)
        n_prompt = len(prompt_ids)
        inputs += prompt_ids
        positions += range(n_prompt)
        for row, response_ids in responses:
            fed = response_ids[:-1]
            # token 0 is sampled in the prompt's last state, token t in that of token t - 1
            states += [start + n_prompt - 1, *range(len(inputs), len(inputs) + len(fed))][: len(response_ids)]
            inputs += fed
            positions += range(n_prompt, n_prompt + len(fed))
            targets += response_ids
            rows_of_tokens += [row] * len(response_ids)
            columns += range(len(response_ids))
        lengths.append(len(inputs) - start)
        fed_lengths = [max(0, len(response_ids) - 1) for _, response_ids in responses]
        masks.append(shared_prefix_mask(n_prompt, fed_lengths) if len(responses) > 1 else None)
    if not rows:
        inputs, positions, lengths, masks = [0], [0], [1], [None]
    device = sampled.scores_B.device
    tensors = (
        torch.tensor(each, dtype=torch.int64, device=device)
        for each in (inputs, positions, states, targets, rows_of_tokens, columns)
    )
    return ResponseBatch(*tensors, lengths, [None if mask is None else mask.to(device) for mask in masks])


def pack_minibatches(
    config: PPOConfig, world: World, sampled: Sampled, order: Sequence[int]
) -> list[list[ResponseBatch]]:
    """This rank's micro-batches of every minibatch, equally many on every rank.

    order: indices of the responses of all ranks; consecutive ones are a minibatch, at most minibatch_size and nearly
    equally many in each. Which rank sampled a response: responses_of_rank.
    """
    minibatches, rest, n_shared = [], iter(order), config.responses_per_prompt
    for n_rows in even_sizes(len(order), config.minibatch_size):
        per_rank: list[list[int]] = [[] for _ in range(world.size)]
        for index in islice(rest, n_rows):
            prompt, k = divmod(index, n_shared)
            per_rank[prompt % world.size].append(prompt // world.size * n_shared + k)
        n_micro_batches = ceil(max(map(len, per_rank)) / config.micro_batch_size)
        mine, size = per_rank[world.rank], config.micro_batch_size
        parts = [mine[i * size : (i + 1) * size] for i in range(n_micro_batches)]
        minibatches.append([pack_responses(sampled, part, n_shared) for part in parts])
    return minibatches


def response_states(model: torch.nn.Module, batch: ResponseBatch) -> Tensor:
    """Hidden state (K, D) that each response token was sampled from."""
    hidden_BTD = model(
        batch.input_ids_T[None],
        position_ids_BT=batch.position_ids_T[None],
        segment_lengths=batch.segment_lengths,
        segment_masks=batch.segment_masks,
        return_hidden=True,
    )
    return hidden_BTD[0].index_select(0, batch.state_index_K)


def response_logprobs(
    hidden_KD: Tensor, model: torch.nn.Module, batch: ResponseBatch, temperature: float, loss_backend: str = "torch"
) -> Tensor:
    """Log-probability (K,) of each response token under softmax(logits / temperature), the distribution sampled from.

    The logits are linear in the hidden state, so the division is done there, on D numbers instead of V.
    """
    return linear_token_logprobs(hidden_KD / temperature, model.head_weight(), batch.target_ids_K, backend=loss_backend)


def response_values(critic: torch.nn.Module, batch: ResponseBatch) -> Tensor:
    """V(state t) for each response token t, (K,) fp32."""
    values_BT = critic(
        batch.input_ids_T[None],
        position_ids_BT=batch.position_ids_T[None],
        segment_lengths=batch.segment_lengths,
        segment_masks=batch.segment_masks,
    )
    return values_BT[0].index_select(0, batch.state_index_K)


# ---------------------------------------------------------------------------------------------------------------------
# 3 measure


@torch.no_grad()
def measure_responses(
    config: PPOConfig, models: Models, sampled: Sampled, batches: Sequence[ResponseBatch]
) -> Measured:
    """Log-probabilities of policy and reference, entropies of the policy, values of the critic; a collective.

    batches: the micro-batches of the first PPO epoch. The update runs the same forwards on the same packed rows, so the
    first ratio is 1 to the last bit. The sampler's own log-probabilities differ in the last bits and are only compared.
    """
    logprobs_BR, ref_logprobs_BR, entropies_BR, values_BR = (
        torch.zeros_like(sampled.sampler_logprobs_BR) for _ in range(4)
    )
    temperature, stamps = config.logprob_temperature(), [time.perf_counter()]
    for batch in batches:
        hidden_KD = response_states(models.policy, batch)
        batch.put(logprobs_BR, response_logprobs(hidden_KD, models.policy, batch, temperature, models.loss_backend))
        batch.put(entropies_BR, token_entropies(hidden_KD, models.policy.head_weight(), temperature))
    reshard_all(models.policy)
    stamps.append(time.perf_counter())
    for batch in batches:
        hidden_KD = response_states(models.reference, batch)
        ref_logprobs_K = response_logprobs(hidden_KD, models.reference, batch, temperature, models.loss_backend)
        batch.put(ref_logprobs_BR, ref_logprobs_K)
    reshard_all(models.reference)
    stamps.append(time.perf_counter())
    for batch in batches:
        batch.put(values_BR, response_values(models.critic, batch))
    reshard_all(models.critic)
    stamps.append(time.perf_counter())
    names = ("policy_logprobs", "reference", "critic")
    seconds = {name: end - start for name, start, end in zip(names, stamps, stamps[1:], strict=False)}
    return Measured(sampled, logprobs_BR, ref_logprobs_BR, entropies_BR, values_BR, seconds)


# ---------------------------------------------------------------------------------------------------------------------
# 4 credit


def credit_responses(config: PPOConfig, measured: Measured, kl_coef: float) -> Credited:
    """Rewards per token (E24), advantages and returns (E25), whitened (E26) if asked for: then it is a collective."""
    mask_BR = measured.sampled.response_mask_BR
    rewards_BR = kl_shaped_rewards(
        measured.sampled.scores_B, measured.logprobs_BR, measured.ref_logprobs_BR, mask_BR, kl_coef
    )
    advantages_BR, returns_BR = compute_gae(rewards_BR, measured.values_BR, mask_BR, config.gamma, config.gae_lambda)
    if config.whiten_advantages == "on":
        advantages_BR = whiten(advantages_BR, mask_BR, *global_moments(advantages_BR, mask_BR))
    return Credited(measured, kl_coef, rewards_BR, advantages_BR, returns_BR)


def global_moments(x_BR: Tensor, mask_BR: Tensor) -> tuple[float, float]:
    """Mean and variance of x inside the mask over all ranks, in two passes; (0, 0) for an empty mask."""
    count, total = global_sum(list(masked_sums(x_BR, mask_BR)))
    if count == 0:
        return 0.0, 0.0
    mean = total / count
    _, squares = global_sum(list(masked_sums((x_BR.double() - mean).square(), mask_BR)))
    return mean, squares / count
