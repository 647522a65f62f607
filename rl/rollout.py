"""One rollout: prompts to sampled responses, their rewards, log-probabilities, values and advantages.

Everything in a Rollout is frozen at sampling time; the update only reads it.

A response token t is *sampled* in state t (prompt and the tokens before t), so its log-probability and its value come
from the hidden state one position to the left. Indices of a prompt of P tokens and a response of R:

    position of the row    0 ... P-2   P-1    P      ...  P+R-2   P+R-1
    token                  prompt      prompt resp 0 ...  resp R-2  resp R-1 (EOS, or the last one that fits)
    state t of                         t = 0  t = 1  ...  t = R-1   none: nothing is sampled behind it, it is not fed

Shape suffixes: B responses of this rank, R longest response among them, T tokens of a packed micro-batch, K response
tokens in it, D model dim, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import ceil

import torch
from torch import Tensor

from data.batches import epoch_order
from model.sampling import generate
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from rl.prompts import PPOPrompt
from rl.reward import RewardResult, tool_call_reward
from train.weighted_cross_entropy import linear_token_logprobs


@dataclass(slots=True)
class Rollout:
    """This rank's responses of one iteration, with everything that was fixed when they were sampled."""

    prompts: list[PPOPrompt]  # B
    response_ids: list[list[int]]  # B lists; the sampler's own ids and lengths, nothing is read off the ids later
    ended: list[bool]  # B: closed by EOS; False: cut at max_response_tokens
    results: list[RewardResult]  # B
    scores_B: Tensor  # fp32, the reward of the whole response, before KL
    response_mask_BR: Tensor  # bool, true through the last token inclusive
    sampler_logprobs_BR: Tensor  # fp32, as the sampler saw them; 0 outside the mask, like all that follow
    logprobs_BR: Tensor  # fp32, of the policy that sampled, by the trainer's own forward: the "old" ones of the ratio
    ref_logprobs_BR: Tensor  # fp32, of the frozen reference
    values_BR: Tensor  # fp32, V(state t)
    entropies_BR: Tensor  # fp32, nats, of the distribution that token t was drawn from
    rewards_BR: Tensor  # fp32, -kl_coef * KL per token, plus the score at the last one
    advantages_BR: Tensor  # fp32
    returns_BR: Tensor  # fp32, advantages + values, before any whitening


def empty_grid(mask_BR: Tensor) -> Tensor:
    """Zeros (B, R) in fp32 on the mask's device, to be filled slot by slot."""
    return torch.zeros(mask_BR.shape, dtype=torch.float32, device=mask_BR.device)


# ---------------------------------------------------------------------------------------------------------------------
# Which prompts: pure functions of the iteration, so that a resumed run and another number of ranks draw the same


def iterations_per_epoch(n_prompts: int, rollout_batch_size: int) -> int:
    """Iterations of one pass over the prompts; the last one takes what is left."""
    return ceil(n_prompts / rollout_batch_size)


def prompts_of_iteration(
    prompts: Sequence[PPOPrompt], iteration: int, *, seed: int, rollout_batch_size: int
) -> list[PPOPrompt]:
    """The prompts of iteration `iteration`, counted from 0 over all epochs, on all ranks together; each epoch has its
    own order."""
    epoch, number = divmod(iteration, iterations_per_epoch(len(prompts), rollout_batch_size))
    order = epoch_order(len(prompts), seed, epoch)
    return [prompts[i] for i in order[number * rollout_batch_size : (number + 1) * rollout_batch_size]]


def response_generator(seed: int, iteration: int, index: int) -> torch.Generator:
    """The private generator of response `index` (over all ranks) of an iteration: no state to save, none to share."""
    # hashed: sums like seed + index would give two runs the same random numbers in other places
    digest = hashlib.sha256(f"{seed} {iteration} {index}".encode("ascii")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and reward


def sample_responses(
    policy: Transformer,
    prompts: Sequence[PPOPrompt],
    generators: Sequence[torch.Generator],
    *,
    max_response_tokens: int,
    temperature: float,
    eos_id: int,
    must_stop: Callable[[], bool],
) -> list[tuple[list[int], list[float]]]:
    """(response_ids, logprobs at the sampling temperature) of every prompt, by a policy whose parameters are gathered.

    No collective runs in here, so ranks need not decode equally many tokens. must_stop() is asked before every token;
    once it answers True the unfinished responses come back short and the caller throws them away.
    """
    return generate(
        policy,
        [prompt.prompt_ids for prompt in prompts],
        max_new_tokens=max_response_tokens,
        temperature=temperature,
        eos_id=eos_id,
        generator=list(generators),
        should_continue=lambda finished_B: not must_stop(),
    )


def start_rollout(
    prompts: Sequence[PPOPrompt],
    sampled: Sequence[tuple[list[int], list[float]]],
    tokenizer: Tokenizer,
    device: torch.device,
) -> Rollout:
    """Rewards of the sampled responses, and empty grids for what the models have to add."""
    response_ids = [ids for ids, _ in sampled]
    ended = [bool(ids) and ids[-1] == tokenizer.eos_id for ids in response_ids]
    results = [
        tool_call_reward(response_text(ids, tokenizer), prompt.gold_calls, prompt.tools)
        for ids, prompt in zip(response_ids, prompts, strict=True)
    ]
    longest = max(map(len, response_ids), default=0)
    mask_BR = torch.zeros((len(response_ids), longest), dtype=torch.bool)
    sampler_logprobs_BR = torch.zeros((len(response_ids), longest))
    for row, (ids, logprobs) in enumerate(sampled):
        mask_BR[row, : len(ids)] = True
        sampler_logprobs_BR[row, : len(ids)] = torch.tensor(logprobs)
    mask_BR = mask_BR.to(device)
    grids = {each.name: empty_grid(mask_BR) for each in fields(Rollout) if each.name.endswith("_BR")}
    grids["response_mask_BR"] = mask_BR
    grids["sampler_logprobs_BR"] = sampler_logprobs_BR.to(device)
    scores_B = torch.tensor([result.reward for result in results], dtype=torch.float32, device=device)
    return Rollout(list(prompts), response_ids, ended, results, scores_B, **grids)


def response_text(response_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The response as the reward and a reader see it: without the closing EOS and surrounding blanks."""
    ids = list(response_ids)
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Micro-batches: whole rows, end to end, never padded


@dataclass(frozen=True, slots=True, eq=False)
class ResponseBatch:
    """Some rows of a rollout as one packed row; K response tokens over all of them."""

    input_ids_T: Tensor  # int64, prompt and response but its last token, row after row
    position_ids_T: Tensor  # int64, from 0 in every row
    segment_lengths: list[int]
    state_index_K: Tensor  # int64, position in T of the state that token k was sampled in
    target_ids_K: Tensor  # int64, the response tokens
    row_K: Tensor  # int64, where token k stands in the rollout's (B, R) grids
    column_K: Tensor  # int64

    def take(self, grid_BR: Tensor) -> Tensor:
        """The batch's K entries of a (B, R) grid, as (1, K)."""
        return grid_BR[self.row_K, self.column_K][None]

    def put(self, grid_BR: Tensor, values_K: Tensor) -> None:
        """Write the batch's K entries into a (B, R) grid."""
        grid_BR[self.row_K, self.column_K] = values_K.to(grid_BR.dtype)


def pack_responses(rollout: Rollout, rows: Sequence[int]) -> ResponseBatch:
    """Rows of a rollout end to end. Without rows: one token that nothing is computed for, because every rank has to
    join every collective of a forward."""
    device = rollout.scores_B.device
    inputs, positions, lengths, states, targets, rows_of_tokens, columns = [], [], [], [], [], [], []
    for row in rows:
        prompt_ids, response_ids = rollout.prompts[row].prompt_ids, rollout.response_ids[row]
        first_state = len(inputs) + len(prompt_ids) - 1
        ids = prompt_ids + response_ids[:-1]
        inputs += ids
        positions += range(len(ids))
        lengths.append(len(ids))
        states += range(first_state, first_state + len(response_ids))
        targets += response_ids
        rows_of_tokens += [row] * len(response_ids)
        columns += range(len(response_ids))
    if not rows:
        inputs, positions, lengths = [0], [0], [1]
    input_ids_T, position_ids_T, state_index_K, target_ids_K, row_K, column_K = (
        torch.tensor(each, dtype=torch.int64, device=device)
        for each in (inputs, positions, states, targets, rows_of_tokens, columns)
    )
    return ResponseBatch(input_ids_T, position_ids_T, lengths, state_index_K, target_ids_K, row_K, column_K)


def pack_minibatch(
    rollout: Rollout, rows: Sequence[int], *, micro_batch_size: int, rank: int, world_size: int
) -> list[ResponseBatch]:
    """This rank's micro-batches of a minibatch, equally many on every rank.

    rows: indices over all ranks; response g was sampled by rank g % world_size as its row g // world_size.
    """
    per_rank = [[row // world_size for row in rows if row % world_size == each] for each in range(world_size)]
    n_micro_batches = ceil(max(map(len, per_rank)) / micro_batch_size)
    mine = per_rank[rank]
    return [
        pack_responses(rollout, mine[i * micro_batch_size : (i + 1) * micro_batch_size]) for i in range(n_micro_batches)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The three models on a micro-batch


def response_states(model: torch.nn.Module, batch: ResponseBatch) -> Tensor:
    """Hidden state (K, D) that each response token was sampled from."""
    hidden_BTD = model(
        batch.input_ids_T[None],
        position_ids_BT=batch.position_ids_T[None],
        segment_lengths=batch.segment_lengths,
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
        batch.input_ids_T[None], position_ids_BT=batch.position_ids_T[None], segment_lengths=batch.segment_lengths
    )
    return values_BT[0].index_select(0, batch.state_index_K)
