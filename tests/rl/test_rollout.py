"""Rollouts: which prompts, whose random numbers, which position, and what the models say there.

pytest tests/rl/test_rollout.py
"""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from data.tool_calls import ToolCall
from model.pretrained_weights import load_pretrained
from model.tokenizer import load_tokenizer
from model.value_model import ValueModel
from rl.models import Models
from rl.ppo_config import PPOConfig
from rl.prompts import PPOPrompt, even_sizes, iteration_sizes, prompts_of_iteration, read_prompts, repeat_each
from rl.rollout import (
    Iteration,
    Measured,
    credit_responses,
    judge_responses,
    measure_responses,
    pack_minibatches,
    pack_responses,
    response_generator,
    response_logprobs,
    response_states,
    response_text,
    response_values,
    responses_of_rank,
    sample_responses,
)
from rl.watch import describe_rollout
from tests.support.tiny_ppo import TOOLS, policy_folder, ppo_data
from tests.support.tiny_run import tiny_config, tiny_files
from train.distributed import World, close_world, init_world

CPU = torch.device("cpu")
EOS = 2
GOLD = ToolCall("search", {"city": "Oslo"})


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_files()[0])


@pytest.fixture(scope="module")
def policy():
    return load_pretrained(policy_folder()).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return read_prompts(
        ppo_data(),
        tokenizer,
        error_filter="structured",
        prompt_turns="tools",
        max_prompt_tokens=500,
        unparsable_calls="error",
    )[0]


def make_prompt(ids, index=0):
    return PPOPrompt(f"t{index}", 0, f"here:{index}", ids, (GOLD,), TOOLS)


def by_hand(tokenizer):
    """Three responses: ended after three tokens; one token, cut; one token that is EOS."""
    assert tokenizer.eos_id == EOS
    prompts = [make_prompt([1, 10, 11]), make_prompt([1, 12]), make_prompt([1, 13, 14, 15])]
    sampled = [([20, 21, EOS], [-0.5, -1.0, -1.5]), ([30], [-2.0]), ([EOS], [-2.5])]
    return judge_responses(prompts, sampled, tokenizer, CPU)


def models_of(policy, tokenizer, **others):
    """Models of which a test needs the policy and perhaps some others."""
    nothing = {"reference": None, "critic": None, "policy_optimizer": None, "value_optimizer": None}
    return Models(policy=policy, tokenizer=tokenizer, starts_at_reference=True, **{**nothing, **others})


def rank_of(rank, size):
    """Rank `rank` of `size`, without a process group: enough where nothing is reduced."""
    return World(rank=rank, size=size, device=CPU, mesh=None)


def sample(policy, prompts, tokenizer, *, rank=0, size=1, iteration=0, must_stop=lambda: False, **settings):
    """Responses of one rank's share of the prompts."""
    config = PPOConfig(seed=7, **{"max_response_tokens": 16, **settings})
    this = Iteration(number=iteration, step=0, total_steps=1, kl_coef=0.3, prompts=prompts)
    return sample_responses(config, models_of(policy, tokenizer), rank_of(rank, size), this, must_stop)


# ---------------------------------------------------------------------------------------------------------------------
# Positions, by hand


def test_every_response_token_is_read_off_the_state_before_it(tokenizer):
    batch = pack_responses(by_hand(tokenizer), [0, 1, 2])
    #                              row 0: P = 3, R = 3  row 1   row 2: P = 4, R = 1
    #                              0  1   2   3   4     5  6    7  8   9   10
    assert batch.input_ids_T.tolist() == [1, 10, 11, 20, 21, 1, 12, 1, 13, 14, 15]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]
    assert batch.segment_lengths == [5, 2, 4]
    assert batch.state_index_K.tolist() == [2, 3, 4, 6, 10]
    assert batch.target_ids_K.tolist() == [20, 21, EOS, 30, EOS]
    assert batch.row_K.tolist() == [0, 0, 0, 1, 2]
    assert batch.column_K.tolist() == [0, 1, 2, 0, 0]


def test_responses_that_share_a_prompt_see_it_and_themselves(tokenizer):
    prompts = [make_prompt([1, 10, 11])] * 3 + [make_prompt([1, 12])] * 3
    sampled = [([20, 21, EOS], [-1.0] * 3), ([30], [-1.0]), ([40, EOS], [-1.0] * 2), *[([50, EOS], [-1.0] * 2)] * 3]
    rollout = judge_responses(prompts, sampled, tokenizer, CPU)
    batch = pack_responses(rollout, [0, 1, 2, 5], responses_per_prompt=3)
    assert batch.input_ids_T.tolist() == [1, 10, 11, 20, 21, 40, 1, 12, 50]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert batch.segment_lengths == [6, 3]
    assert batch.state_index_K.tolist() == [2, 3, 4, 2, 2, 5, 7, 8]
    assert batch.target_ids_K.tolist() == [20, 21, EOS, 30, 40, EOS, 50, EOS]
    assert batch.row_K.tolist() == [0, 0, 0, 1, 2, 2, 5, 5] and batch.column_K.tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    mask_TT, alone = batch.segment_masks
    assert alone is None and mask_TT.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


def test_a_shared_prompt_changes_states_values_and_gradients_by_rounding_only(prompts, tokenizer):
    """fp64. Responses of 1 to 6 tokens to each of 3 prompts; the sums give each state another weight."""
    torch.manual_seed(2)
    shared, n = repeat_each(prompts[:3], 4), 12
    responses = [([20 + index] * (1 + index % 6), [-1.0] * (1 + index % 6)) for index in range(n)]
    rollout = judge_responses(shared, responses, tokenizer, CPU)
    for model, score in (
        (load_pretrained(policy_folder()), response_states),
        (ValueModel(tiny_config()), response_values),
    ):
        model.double()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 1.0)
        found = []
        for responses_per_prompt in (1, 4):
            batch = pack_responses(rollout, range(n), responses_per_prompt)
            values = score(model, batch)
            model.zero_grad()
            (values * torch.linspace(-1, 1, values.numel(), dtype=torch.float64).view_as(values)).sum().backward()
            grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
            found.append((len(batch.input_ids_T), values.detach(), grads))
        (n_alone, values, grads), (n_shared, shared_values, shared_grads) = found
        assert n_shared == n_alone - 3 * sum(len(prompt.prompt_ids) for prompt in prompts[:3])
        torch.testing.assert_close(shared_values, values, rtol=1e-10, atol=1e-10)
        assert len(grads) > 10 and grads.keys() == shared_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(shared_grads[name], grad, rtol=1e-10, atol=1e-10, msg=name)


def test_rows_are_packed_in_the_order_asked_for(tokenizer):
    batch = pack_responses(by_hand(tokenizer), [2, 0])
    assert batch.input_ids_T.tolist() == [1, 13, 14, 15, 1, 10, 11, 20, 21]
    assert batch.state_index_K.tolist() == [3, 6, 7, 8]
    assert batch.row_K.tolist() == [2, 0, 0, 0]


def test_a_batch_without_rows_has_one_token_to_feed_and_none_to_score(tokenizer):
    batch = pack_responses(by_hand(tokenizer), [])
    assert (batch.input_ids_T.tolist(), batch.position_ids_T.tolist(), batch.segment_lengths) == ([0], [0], [1])
    assert batch.state_index_K.numel() == batch.target_ids_K.numel() == batch.row_K.numel() == 0


def test_take_and_put_are_inverse_and_leave_other_slots_alone(tokenizer):
    rollout = by_hand(tokenizer)
    grid_BR = torch.full((3, 3), -1.0)
    pack_responses(rollout, [0, 2]).put(grid_BR, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert grid_BR.tolist() == [[1.0, 2.0, 3.0], [-1.0, -1.0, -1.0], [4.0, -1.0, -1.0]]
    assert pack_responses(rollout, [2, 0]).take(grid_BR).tolist() == [[4.0, 1.0, 2.0, 3.0]]


def test_lengths_come_from_the_sampler(tokenizer):
    rollout = by_hand(tokenizer)
    assert rollout.ended == [True, False, True]
    assert rollout.response_mask_BR.tolist() == [[True, True, True], [True, False, False], [True, False, False]]
    assert rollout.sampler_logprobs_BR.tolist() == [[-0.5, -1.0, -1.5], [-2.0, 0.0, 0.0], [-2.5, 0.0, 0.0]]


def test_an_eos_inside_a_response_or_a_prompt_does_not_shorten_it(tokenizer):
    """Ids are not searched: a model whose padding is EOS, or a prompt with several turns, would be cut."""
    rollout = judge_responses([make_prompt([1, EOS, 11])], [([EOS, 21, 22], [-1.0] * 3)], tokenizer, CPU)
    assert rollout.ended == [False] and rollout.response_mask_BR.all()
    assert pack_responses(rollout, [0]).input_ids_T.tolist() == [1, EOS, 11, EOS, 21]


def test_the_reward_sees_the_text_without_eos(tokenizer):
    text = 'search(city="Oslo")'
    ids = tokenizer.encode_continuation(f" {text}")
    sampled = [([*ids, EOS], [-1.0] * (len(ids) + 1)), (ids, [-1.0] * len(ids)), (ids[:-1], [-1.0] * (len(ids) - 1))]
    rollout = judge_responses([make_prompt([1, 5])] * 3, sampled, tokenizer, CPU)
    assert response_text(sampled[0][0], tokenizer) == response_text(ids, tokenizer) == text
    # the second is cut just after its bracket: a whole call, but its turn never ends
    assert rollout.scores_B.tolist() == [1.0, -2.0, -2.0]
    assert [result.category for result in rollout.results] == ["correct", "unparsable", "unparsable"]
    assert rollout.ended == [True, False, False]


def test_a_rank_without_prompts_has_an_empty_rollout(tokenizer):
    rollout = judge_responses([], [], tokenizer, CPU)
    assert rollout.response_mask_BR.shape == (0, 0) and rollout.scores_B.shape == (0,)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and random numbers


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [
        (11, 4, [4, 4, 3]),
        (8, 8, [8]),
        (8, 3, [3, 3, 2]),
        (9, 4, [4, 3, 2]),
        (1, 5, [1]),
        (7, 1, [1] * 7),
        (9, 8, [5, 4]),
        (1217, 8, [8] * 151 + [5, 4]),
        (1217, 32, [32] * 37 + [17, 16]),
    ],
)
def test_an_epoch_is_a_permutation_of_the_prompts_and_ends_without_a_small_rest(n, size, expected):
    everything = list(range(n))
    count = len(expected)
    assert iteration_sizes(n, size) == expected
    orders = []
    for epoch in range(3):
        parts = [prompts_of_iteration(everything, epoch * count + number, 5, size) for number in range(count)]
        assert [len(part) for part in parts] == expected
        orders.append([index for part in parts for index in part])
        assert sorted(orders[-1]) == everything
    if n > 6:
        assert orders[0] != orders[1] != orders[2] != orders[0]
        other = prompts_of_iteration(everything, 0, 6, n)
        assert other != prompts_of_iteration(everything, 0, 5, n)


def test_parts_of_even_size():
    assert even_sizes(17, 8) == [6, 6, 5] and even_sizes(16, 8) == [8, 8] and even_sizes(5, 8) == [5]


def test_no_two_responses_of_a_run_share_random_numbers():
    """seed + iteration + index would: (0, 1, 0) and (0, 0, 1) and (1, 0, 0)."""
    draws = {
        torch.rand(2, dtype=torch.float64, generator=response_generator(seed, iteration, index))[1].item()
        for seed in range(4)
        for iteration in range(12)
        for index in range(12)
    }
    assert len(draws) == 4 * 12 * 12
    first, again = (torch.rand(3, generator=response_generator(3, 1, 4)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_response_depends_on_no_other_rank(policy, prompts, tokenizer, world_size):
    alone = sample(policy, prompts, tokenizer)
    assert len({tuple(ids) for ids, _ in alone}) > 5  # not all the same: the test could not fail
    for rank in range(world_size):
        mine = sample(policy, prompts, tokenizer, rank=rank, size=world_size)
        for (ids, logprobs), (expected_ids, expected) in zip(mine, alone[rank::world_size], strict=True):
            assert ids == expected_ids
            assert logprobs == pytest.approx(expected, abs=1e-5)


def test_responses_to_one_prompt_have_random_numbers_of_their_own_on_any_rank(policy, prompts, tokenizer):
    chosen = repeat_each(prompts[:3], 4)
    alone = sample(policy, chosen, tokenizer, rollout_batch_size=12, responses_per_prompt=4)
    assert len({tuple(ids) for ids, _ in alone[:4]}) > 1
    assert alone == sample(policy, chosen, tokenizer)  # response i draws as it would after a prompt of its own
    for rank, own in ((0, [*range(4), *range(8, 12)]), (1, range(4, 8))):
        mine = sample(policy, chosen, tokenizer, rank=rank, size=2, rollout_batch_size=12, responses_per_prompt=4)
        assert [ids for ids, _ in mine] == [alone[index][0] for index in own]


def test_a_prompt_belongs_to_one_rank_with_all_its_responses():
    assert [responses_of_rank(rank_of(rank, 2), 8, 2) for rank in (0, 1)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [responses_of_rank(rank_of(rank, 3), 4, 1) for rank in (0, 1, 2)] == [[0, 3], [1], [2]]
    assert responses_of_rank(rank_of(1, 2), 4, 4) == []


def test_another_iteration_draws_other_responses(policy, prompts, tokenizer):
    assert sample(policy, prompts, tokenizer) != sample(policy, prompts, tokenizer, iteration=1)


def test_sampling_stops_when_told(policy, prompts, tokenizer):
    calls = iter([False] * 14)
    sampled = sample(policy, prompts, tokenizer, must_stop=lambda: next(calls, True))
    assert 11 < sum(len(ids) for ids, _ in sampled) < 14 * 16
    assert all(len(ids) == len(logprobs) for ids, logprobs in sampled)


@pytest.mark.parametrize("n_shared", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_minibatch_is_dealt_out_whole_and_with_equal_numbers_of_forwards(tokenizer, world_size, n_shared):
    """Each response on the rank of its prompt, in as many micro-batches on every rank: a forward is a collective."""
    for n_prompts in (1, 2, 5, 8):
        n_responses = n_prompts * n_shared
        prompts = repeat_each([make_prompt([1, 10], index) for index in range(n_prompts)], n_shared)
        sampled = [([100 + index], [-1.0]) for index in range(n_responses)]
        of_prompt = [list(range(start, start + n_shared)) for start in range(0, n_responses, n_shared)]
        owned = [sum(of_prompt[rank::world_size], []) for rank in range(world_size)]
        rollouts = [
            judge_responses([prompts[i] for i in mine], [sampled[i] for i in mine], tokenizer, CPU) for mine in owned
        ]
        order = torch.randperm(n_responses, generator=torch.Generator().manual_seed(n_responses)).tolist()
        for rows in (order, order[:3], order[-1:]):
            for micro_batch_size in (1, 2, 8):
                config = PPOConfig(
                    minibatch_size=len(rows), micro_batch_size=micro_batch_size, responses_per_prompt=n_shared
                )
                packed = [
                    pack_minibatches(config, rank_of(rank, world_size), rollout, rows)
                    for rank, rollout in enumerate(rollouts)
                ]
                assert [len(minibatches) for minibatches in packed] == [1] * world_size
                dealt = [minibatches[0] for minibatches in packed]
                assert len({len(batches) for batches in dealt}) == 1
                found = [token for batches in dealt for batch in batches for token in batch.target_ids_K.tolist()]
                assert sorted(found) == sorted(100 + row for row in rows)
                sizes = [len(batch.target_ids_K) for batches in dealt for batch in batches]
                assert max(sizes) <= micro_batch_size
                most = max(len(set(rows) & set(mine)) for mine in owned)
                assert len(dealt[0]) == -(-most // micro_batch_size)


# ---------------------------------------------------------------------------------------------------------------------
# What the models say


def logprobs_of(policy, rollout, rows, temperature):
    batch = pack_responses(rollout, rows)
    return response_logprobs(response_states(policy, batch), policy, batch, temperature)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_forward_one_by_one_and_sampler_agree(policy, prompts, tokenizer, temperature):
    sampled = sample(policy, prompts, tokenizer, temperature=temperature, max_response_tokens=12)
    rollout = judge_responses(prompts, sampled, tokenizer, CPU)
    assert len(set(map(len, rollout.response_ids))) > 1 and 0 < sum(rollout.ended) < len(prompts)
    packed_K = logprobs_of(policy, rollout, range(len(prompts)), temperature)
    singles = [logprobs_of(policy, rollout, [row], temperature) for row in range(len(prompts))]
    torch.testing.assert_close(torch.cat(singles), packed_K, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.sampler_logprobs_BR[rollout.response_mask_BR], packed_K, rtol=0, atol=1e-5)
    # from the definition, in fp64 and with the whole row of logits
    for row, single_R in enumerate(singles):
        prompt_ids, response_ids = prompts[row].prompt_ids, rollout.response_ids[row]
        logits_TV = policy(torch.tensor([prompt_ids + response_ids]))[0].double() / temperature
        expected = [logits_TV[len(prompt_ids) + t - 1].log_softmax(-1)[token] for t, token in enumerate(response_ids)]
        torch.testing.assert_close(single_R, torch.stack(expected).float(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_values_are_those_of_the_states_that_tokens_were_sampled_in(prompts, tokenizer):
    torch.manual_seed(1)
    critic = ValueModel(tiny_config())
    for parameter in critic.parameters():
        parameter.normal_(std=0.2)
    sampled = [([20 + index] * (1 + index % 4), [-1.0] * (1 + index % 4)) for index in range(len(prompts))]
    rollout = judge_responses(prompts, sampled, tokenizer, CPU)
    packed_K = response_values(critic, pack_responses(rollout, range(len(prompts))))
    expected = []
    for prompt, (ids, _) in zip(prompts, sampled, strict=True):  # V(state t): no token from t on has been read
        expected += [critic(torch.tensor([prompt.prompt_ids + ids[:t]]))[0, -1] for t in range(len(ids))]
    torch.testing.assert_close(packed_K, torch.stack(expected), rtol=0, atol=1e-5)
    assert packed_K.std() > 0.01


def test_minibatches_follow_the_order_and_are_of_nearly_one_size(tokenizer):
    """5 by 4 is 3 and 2, never 4 and 1."""
    prompts = [make_prompt([1, 10], index) for index in range(5)]
    sampled = judge_responses(prompts, [([100 + index], [-1.0]) for index in range(5)], tokenizer, CPU)
    config = PPOConfig(minibatch_size=4, micro_batch_size=8)
    minibatches = pack_minibatches(config, rank_of(0, 1), sampled, [4, 0, 3, 1, 2])
    found = [[batch.target_ids_K.tolist() for batch in minibatch] for minibatch in minibatches]
    assert found == [[[104, 100, 103]], [[101, 102]]]


@torch.no_grad()
def test_each_model_is_measured_into_its_own_grid(policy, prompts, tokenizer):
    """Three models that differ; the order of the micro-batches does not matter; slots outside the mask stay 0."""
    torch.manual_seed(1)
    reference, critic = load_pretrained(policy_folder()).eval(), ValueModel(tiny_config())
    reference.layers[0].attention.wq.weight.mul_(1.5)
    for parameter in critic.parameters():
        parameter.normal_(std=0.2)
    models = models_of(policy, tokenizer, reference=reference, critic=critic)
    sampled = judge_responses(prompts, sample(policy, prompts, tokenizer), tokenizer, CPU)
    batches = [pack_responses(sampled, rows) for rows in ([10, 0, 7], [1, 2, 3, 4], [5, 6, 8, 9])]
    measured = measure_responses(PPOConfig(), models, sampled, batches)
    everything = pack_responses(sampled, range(len(prompts)))
    for grid_BR, expected_K in (
        (measured.logprobs_BR, logprobs_of(policy, sampled, range(len(prompts)), 1.0)),
        (measured.ref_logprobs_BR, logprobs_of(reference, sampled, range(len(prompts)), 1.0)),
        (measured.values_BR, response_values(critic, everything)),
    ):
        torch.testing.assert_close(everything.take(grid_BR)[0], expected_K, rtol=0, atol=1e-5)
        assert not grid_BR[~sampled.response_mask_BR].any()
    # entropy from the definition, of the first token of the first response
    logits_V = policy(torch.tensor([prompts[0].prompt_ids]))[0, -1].double()
    entropy = -(logits_V.softmax(-1) * logits_V.log_softmax(-1)).sum()
    assert measured.entropies_BR[0, 0].item() == pytest.approx(entropy.item(), abs=1e-5)
    assert measured.seconds.keys() == {"policy_logprobs", "reference", "critic"}


def test_records_are_frozen(tokenizer):
    sampled = by_hand(tokenizer)
    measured = Measured(sampled, *[torch.zeros(3, 3)] * 4, seconds={})
    credited = credit_responses(PPOConfig(), measured, 0.3)
    for record, name in ((sampled, "scores_B"), (measured, "logprobs_BR"), (credited, "advantages_BR")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, torch.zeros(3))


# ---------------------------------------------------------------------------------------------------------------------
# Poison


def test_slots_outside_the_mask_reach_nothing(tokenizer):
    world = init_world("cpu")
    try:
        generator = torch.Generator().manual_seed(3)
        sampled = by_hand(tokenizer)
        mask_BR = sampled.response_mask_BR
        names = ("logprobs_BR", "ref_logprobs_BR", "entropies_BR", "values_BR")
        grids = {name: torch.where(mask_BR, torch.randn(mask_BR.shape, generator=generator), 0.0) for name in names}
        clean = Measured(sampled, **grids, seconds={})
        nan = torch.tensor(float("nan"))
        poison = {name: torch.where(mask_BR, grid_BR, nan) for name, grid_BR in grids.items()}
        poisoned = replace(
            clean,
            sampled=replace(sampled, sampler_logprobs_BR=torch.where(mask_BR, sampled.sampler_logprobs_BR, nan)),
            **poison,
        )
        config = PPOConfig(whiten_advantages="on", gamma=0.9)
        credited = [credit_responses(config, measured, 0.3) for measured in (clean, poisoned)]
        figures = [describe_rollout(each) for each in credited]
        for name in ("rewards_BR", "advantages_BR", "returns_BR"):
            of_clean, of_poisoned = (getattr(each, name) for each in credited)
            assert torch.equal(of_clean[mask_BR], of_poisoned[mask_BR]), name
            assert not of_poisoned[~mask_BR].any(), name
        assert figures[0] == figures[1]
        assert all(map(math.isfinite, figures[0].values())) and figures[0]["ppo/advantage_std"] > 0.9
        assert world.size == 1
    finally:
        close_world()
