"""One row per trajectory trains exactly what one row per turn trains: losses, gradients, whatever is packed together.

The oracle is the released way (every prefix again, only the last turn trained), scored with torch's own cross-entropy.
"""

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.benchmark_single_pass import read_multi_turn
from data.batches import drop_unusable, pack, step_batches
from data.error_filter import decide_masked_turns
from data.loss_weights import LOSS_NORMALIZATIONS, encode_trajectory
from model.config import ModelConfig
from model.transformer import Transformer
from tests.support.per_turn_rows import expand_per_turn
from tests.support.piece_tokenizer import PieceTokenizer
from tests.support.random_trajectories import random_trajectory

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

VOCAB_SIZE = 300
CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE,
    dim=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    ffn_dim=24,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tie_embeddings=False,
    qkv_bias=False,
    max_positions=4096,
)
SETTINGS = {"error_filter": "structured", "key_tokens": True, "max_key_token_weight": 9.0}


def small_model(dtype):
    """Random weights, large enough that attention is far from uniform."""
    model = Transformer(CONFIG)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.to(dtype)


def token_losses(model, batch):
    """Cross-entropy of every position of a packed row, (T,)."""
    logits_TV = model(
        batch.input_ids_T[None], position_ids_BT=batch.position_ids_T[None], segment_lengths=batch.segment_lengths
    )[0]
    return nn.functional.cross_entropy(logits_TV, batch.target_ids_T, reduction="none")


def weighted_sum(losses_T, batch):
    return (losses_T * batch.loss_weights_T.to(losses_T.dtype)).sum()


def flat_gradient(loss, model, *, retain_graph=False):
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=retain_graph)
    return torch.cat([gradient.flatten() for gradient in gradients])


def encode_all(n, seed, **settings):
    generator, tokenizer = random.Random(seed), PieceTokenizer(VOCAB_SIZE)
    samples = [random_trajectory(generator, f"r{number}") for number in range(n)]
    return samples, tokenizer, [encode_trajectory(sample, tokenizer, **SETTINGS, **settings) for sample in samples]


def assert_same(found, expected, tolerance):
    scale = max(expected.detach().abs().max().item(), 1e-6)
    assert (found - expected).detach().abs().max().item() <= tolerance * scale


# ---------------------------------------------------------------------------------------------------------------------
# Per turn == one pass


@pytest.mark.parametrize(
    "dtype,tolerance,count",
    [
        (torch.float64, 1e-10, 15),
        (torch.float32, 1e-5, 5),
        pytest.param(torch.float64, 1e-10, 50, marks=pytest.mark.very_slow),
    ],
)
def test_single_pass_equals_per_turn_expansion_on_random_trajectories(dtype, tolerance, count):
    model, generator, tokenizer = small_model(dtype), random.Random(11), PieceTokenizer(VOCAB_SIZE)
    compared = 0
    while compared < count:
        sample = random_trajectory(generator, f"r{compared}")
        singles = [
            pack([encode_trajectory(sample, tokenizer, **SETTINGS, loss_normalization=name)])
            for name in LOSS_NORMALIZATIONS
        ]
        if singles[0].trained_turns == 0:
            continue
        expanded = [
            [pack([row]) for row in expand_per_turn(sample, tokenizer, **SETTINGS, loss_normalization=name)]
            for name in LOSS_NORMALIZATIONS
        ]
        single_losses_T = token_losses(model, singles[0])  # ids are the same under every normalisation
        turn_losses = [token_losses(model, row) for row in expanded[0]]
        for single, rows in zip(singles, expanded):
            assert sum(row.denominator for row in rows) == pytest.approx(single.denominator, rel=1e-12)
            assert sum(row.trained_tokens for row in rows) == single.trained_tokens
            divisor = single.denominator or 1.0
            single_loss = weighted_sum(single_losses_T, single) / divisor
            turns_loss = sum(weighted_sum(losses_T, row) for losses_T, row in zip(turn_losses, rows)) / divisor
            assert_same(single_loss, turns_loss, tolerance)
            assert_same(
                flat_gradient(single_loss, model, retain_graph=True),
                flat_gradient(turns_loss, model, retain_graph=True),
                tolerance,
            )
        compared += 1


def test_turn_mean_is_the_mean_over_turns_of_each_turns_weighted_mean():
    """The definition of E6 from raw weights, turn by turn, against the pre-scaled weights of the row."""
    model = small_model(torch.float64)
    samples, tokenizer, encoded = encode_all(6, 3, loss_normalization="turn_mean")
    for sample, row in zip(samples, encoded):
        raw_rows = expand_per_turn(sample, tokenizer, **SETTINGS, loss_normalization="sum")
        means = []
        for raw in raw_rows:
            batch = pack([raw])
            means.append(weighted_sum(token_losses(model, batch), batch) / sum(raw.loss_weights))
        if means:
            batch = pack([row])
            # fp32 weights: 1/sum(w) is rounded once per token
            found = weighted_sum(token_losses(model, batch), batch) / batch.denominator
            assert_same(found, sum(means) / len(means), 1e-6)


def test_forgetting_eos_behind_a_call_would_show():
    """The comparison has teeth: with plain shifted targets the loss is another one."""
    model = small_model(torch.float64)
    samples, tokenizer, encoded = encode_all(8, 5, loss_normalization="sum")
    row = next(row for row in encoded if row.trained_turns >= 2)
    batch = pack([row])
    shifted_T = torch.cat([batch.input_ids_T[1:], batch.target_ids_T[-1:]])
    assert (shifted_T != batch.target_ids_T).sum() >= row.trained_turns - 1
    logits_TV = model(batch.input_ids_T[None])[0]
    wrong = weighted_sum(nn.functional.cross_entropy(logits_TV, shifted_T, reduction="none"), batch)
    assert abs(wrong - weighted_sum(token_losses(model, batch), batch)) > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Packing and ranks


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_packed_rows_equal_separate_rows(dtype, tolerance):
    model = small_model(dtype)
    _, _, encoded = encode_all(9, 21, loss_normalization="turn_mean")
    encoded, _ = drop_unusable(encoded, 10_000)
    packed, separate = pack(encoded), [pack([row]) for row in encoded]
    packed_losses_T = token_losses(model, packed)
    separate_losses = [token_losses(model, row) for row in separate]
    assert_same(packed_losses_T, torch.cat(separate_losses), tolerance)
    loss = weighted_sum(packed_losses_T, packed) / packed.denominator
    parts = sum(weighted_sum(losses_T, row) for losses_T, row in zip(separate_losses, separate))
    parts = parts / sum(row.denominator for row in separate)
    assert_same(flat_gradient(loss, model), flat_gradient(parts, model), tolerance)


@pytest.mark.parametrize("normalization", LOSS_NORMALIZATIONS)
def test_gradient_of_a_step_depends_on_neither_micro_batches_nor_ranks(normalization):
    model = small_model(torch.float64)
    _, _, encoded = encode_all(12, 31, loss_normalization=normalization)
    encoded, _ = drop_unusable(encoded, 10_000)
    reference = None
    for world_size, micro_batch_size in [(1, 8), (1, 1), (2, 1), (2, 3), (4, 1), (4, 2)]:
        losses = []
        for step in range(2):
            batches = [
                batch
                for rank in range(world_size)
                for batch in step_batches(
                    encoded,
                    step,
                    seed=1,
                    global_batch_size=7,
                    micro_batch_size=micro_batch_size,
                    rank=rank,
                    world_size=world_size,
                )
            ]
            divisor = sum(batch.denominator for batch in batches) or 1.0  # global, known before backward
            gradient = sum(
                flat_gradient(weighted_sum(token_losses(model, batch), batch) / divisor, model) for batch in batches
            )
            losses.append(gradient)
        reference = reference or losses
        for found, expected in zip(losses, reference):
            assert_same(found, expected, 1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark's data


def test_rotbench_third_turn_is_read_as_calls():
    path = Path(__file__).parents[3] / "shared" / "data" / "benchmarks" / "rotbench" / "Third_Turn" / "clean.json"
    if not path.exists():
        pytest.skip("the benchmark files are not beside this checkout")
    trajectories = read_multi_turn(path)
    assert len(trajectories) == 70
    turns = [message for t in trajectories for message in t.messages if message.role == "assistant"]
    assert len(turns) == 210 and all(message.call is not None for message in turns)
    first = trajectories[0]
    assert [message.role for message in first.messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert first.messages[1].call.name == "get_translation_nllb"
    assert first.messages[1].call.arguments == {"input_text": "See you later", "tgt_lang": "ja", "src_lang": "en"}
    assert [tool["function"]["name"] for tool in first.tools][-2:] == ["ask_to_user", "finish"]
    assert decide_masked_turns(first, "structured")[0].category == "parameter_missing"  # `max_length` was left out
