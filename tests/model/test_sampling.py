"""model/sampling.py and model/decode.py: greedy ids, independence of batching, log-probs, stops."""

import json
import math
import random

import pytest
import torch

from model.decode import DecodeWeights, KVCache, decode_runs, decode_step, pack_matrix, prefill, product, step_numbers
from model.dialogue_decoding import DialogueDecoder
from model.pretrained_weights import load_pretrained
from model.sampling import (
    RowDecoder,
    choose_tokens,
    continue_prompts,
    decoder_for,
    generate,
    interchangeable_row_counts,
)
from tests.model.test_transformer import STORIES, tiny_model
from tests.train.test_host_waits import CountWaits


def random_prompts(n: int, vocab_size: int, longest: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def logits_of_step(
    model: torch.nn.Module, cache: KVCache, rows: list[int], token_ids: list[int], n_rows: int
) -> torch.Tensor:
    """The logits after one more token of each row."""
    weights = DecodeWeights(model)
    numbers_4B = step_numbers(weights, cache, rows, token_ids, n_rows)
    return decode_step(weights, cache, numbers_4B, decode_runs(cache, rows, numbers_4B.device))


def slow_greedy(
    model: torch.nn.Module, prompt: list[int], max_new_tokens: int, eos_id: int
) -> tuple[list[int], list[float]]:
    """The obviously right way: the whole sequence through the model for every token, no cache, no batch."""
    ids, logprobs = list(prompt), []
    while len(logprobs) < max_new_tokens and not (logprobs and ids[-1] == eos_id):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1].double()
        ids.append(int(logits.argmax()))
        logprobs.append((logits - logits.logsumexp(0))[ids[-1]].item())
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4, "tie_embeddings": True}, {"qkv_bias": True}], ids=str)
def test_greedy_equals_the_slow_way(changes):
    model = tiny_model(**changes)
    prompts = random_prompts(6, 61, 12)
    found = generate(model, prompts, max_new_tokens=8, eos_id=3)
    for prompt, (ids, logprobs) in zip(prompts, found, strict=True):
        expected_ids, expected_logprobs = slow_greedy(model, prompt, 8, 3)
        assert ids == expected_ids
        assert logprobs == pytest.approx(expected_logprobs, abs=2e-4)


def test_greedy_reference_ids_of_stories260K():
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES.name} is not beside the repository")
    cases = json.loads((STORIES / "reference.json").read_text())["cases"]
    found = generate(load_pretrained(STORIES), [c["input_ids"] for c in cases], max_new_tokens=40, eos_id=None)
    assert [ids for ids, _ in found] == [c["greedy40"] for c in cases]


def test_greedy_does_not_depend_on_batching():
    model = tiny_model()
    prompts = random_prompts(11, 61, 30)
    together = generate(model, prompts, max_new_tokens=12, eos_id=3)
    alone = [generate(model, [prompt], max_new_tokens=12, eos_id=3)[0] for prompt in prompts]
    eights = []
    for i in range(0, 11, 8):
        eights += generate(model, prompts[i : i + 8][::-1], max_new_tokens=12, eos_id=3)[::-1]
    assert together == alone == eights  # ids and log-probabilities, bit for bit


def test_greedy_does_not_depend_on_batching_with_two_threads():
    """Head dim and widths of the bundled model: with them two threads give a row other bits in another place."""
    model = tiny_model(dim=192, n_heads=3, n_kv_heads=3, head_dim=64, ffn_dim=512)
    prompts, n_threads = random_prompts(5, 61, 140), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = generate(model, prompts, max_new_tokens=4, eos_id=None)
        assert together == [generate(model, [prompt], max_new_tokens=4, eos_id=None)[0] for prompt in prompts]
    finally:
        torch.set_num_threads(n_threads)


def test_a_decoding_step_equals_the_whole_forward():
    """Rows with a gap between them (two runs), lengths of their own, and rows that only fill the shape."""
    model, rows = tiny_model(qkv_bias=True), [0, 1, 2, 4, 5]
    cache, prompts = KVCache(model.config, 8, 64), random_prompts(5, 61, 30)
    for row, prompt in zip(rows, prompts, strict=True):
        prefill(DecodeWeights(model), cache, [row], [prompt])
    found = logits_of_step(model, cache, rows, [5, 6, 7, 8, 9], n_rows=8)
    with torch.no_grad():
        whole = torch.stack([model(torch.tensor([prompt + [5 + i]]))[0, -1] for i, prompt in enumerate(prompts)])
    assert torch.allclose(found, whole, rtol=1e-5, atol=1e-4)


def test_a_sharded_model_is_refused():
    """A parameter of another type than nn.Parameter is what FSDP2 leaves; its matrices cannot be read here."""

    class Sharded(torch.nn.Parameter):
        pass

    model = tiny_model()
    for block in model.layers:
        block.attention.wq.weight = Sharded(block.attention.wq.weight.data)
    with pytest.raises(ValueError, match="the model is sharded, expected one with whole parameters"):
        generate(model, [[5]], max_new_tokens=2, eos_id=None)


@pytest.mark.parametrize("n_kept", [0, 2])
@pytest.mark.parametrize("n_behind", [1, 2, 3])
def test_nan_of_a_finished_response_does_not_reach_the_next_one(n_kept, n_behind):
    """The next sequence, or the next turn behind a shared prefix, prefilled by 1 or more tokens, then decoded."""
    model = tiny_model()
    cache = KVCache(model.config, 1, 64)
    ids = [5, 6, 7, 8, 9][: n_kept + n_behind]
    prefill(DecodeWeights(model), cache, [0], [ids[:n_kept] + [5] * (20 - n_kept)])
    with torch.inference_mode():
        for storage_RLKH in cache.keys_RLKH + cache.values_RLKH:
            storage_RLKH[:, n_kept:20] = float("nan")
    cache.lengths = [n_kept]
    prefill(DecodeWeights(model), cache, [0], [ids[n_kept:]])
    logits_V = logits_of_step(model, cache, [0], [7], n_rows=1)[0]
    with torch.no_grad():
        assert torch.allclose(logits_V, model(torch.tensor([[*ids, 7]]))[0, -1], rtol=1e-5, atol=1e-4)


def test_greedy_does_not_depend_on_batching_where_matrices_are_packed():
    """Widths of the 135 M model (K 576 and 1536), two layers; prompts together longer than a tile."""
    model = tiny_model(dim=576, n_layers=2, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536, vocab_size=512)
    assert DecodeWeights(model).blocks[0].qkv.is_packed == (torch.backends.mkldnn.is_available())
    prompts = random_prompts(7, 512, 60)
    together = generate(model, prompts, max_new_tokens=4, eos_id=None)
    assert together == [generate(model, [prompt], max_new_tokens=4, eos_id=None)[0] for prompt in prompts]


@pytest.mark.parametrize("for_one_row", [False, True])
def test_a_matrix_in_any_layout_gives_the_product_of_an_fp64_one(for_one_row):
    generator = torch.Generator().manual_seed(2)
    weight_OD, x_BD, added_BO = (
        torch.randn(*shape, generator=generator) for shape in ((600, 500), (150, 500), (9, 600))
    )
    matrix = pack_matrix(weight_OD, weight_OD[:, 0].clone(), for_one_row)
    exact_BO = x_BD.double() @ weight_OD.double().T
    assert torch.allclose(product(x_BD, matrix).double(), exact_BO + weight_OD[:, 0].double(), atol=2e-4)
    sums_BO = product(x_BD[:9], pack_matrix(weight_OD, None, for_one_row), added_BO)
    assert torch.allclose(sums_BO.double(), exact_BO[:9] + added_BO.double(), atol=2e-4)


def test_small_matrices_are_not_packed():
    """The bundled model's rollouts keep their last bits: fixed by size, not by a stopwatch."""
    assert not pack_matrix(torch.zeros(922, 192)).is_packed and not pack_matrix(torch.zeros(192, 512)).is_packed


@pytest.mark.parametrize(("shape", "contiguous_side"), [((3, 2), 0), ((2, 3), 1)])
def test_for_one_row_the_longer_side_is_contiguous(shape, contiguous_side):
    weight = pack_matrix(torch.arange(6.0).view(shape), None, True).weight.t()
    assert torch.equal(weight, torch.arange(6.0).view(shape)) and weight.stride(contiguous_side) == 1


def test_for_one_row_a_prompt_has_the_same_response_alone_and_prefilled_with_others():
    model = tiny_model(dim=576, n_layers=2, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536, vocab_size=512)
    weights, prompts = DecodeWeights(model, for_one_row=True), random_prompts(3, 512, 60)
    settings = {"max_tokens": 70, "max_new_tokens": 4, "stop_ids": (), "temperature": 0.0, "rows_per_forward": 1}
    together = continue_prompts(RowDecoder(weights, n_rows=3, **settings), prompts)
    alone = [continue_prompts(RowDecoder(weights, n_rows=1, **settings), [prompt])[0] for prompt in prompts]
    assert together == alone


def test_row_counts_give_equal_bits():
    counts = interchangeable_row_counts(tiny_model().config, torch.float32, torch.device("cpu"), 1, 16)
    assert counts[-1] == 16 and list(counts) == sorted(set(counts)) and counts[0] > 0
    assert interchangeable_row_counts(tiny_model().config, torch.float32, torch.device("cpu"), 1, 1) == (1,)


@pytest.mark.parametrize("rows_per_forward", [1, 3, 8])
def test_any_number_of_rows_gives_the_greedy_ids(rows_per_forward):
    model, prompts = tiny_model(), random_prompts(5, 61, 12)
    decoder = RowDecoder(
        model,
        n_rows=rows_per_forward,
        max_tokens=20,
        max_new_tokens=8,
        stop_ids={3},
        temperature=0.0,
        rows_per_forward=rows_per_forward,
    )
    found = continue_prompts(decoder, prompts)
    assert [ids for ids, _ in found] == [slow_greedy(model, prompt, 8, 3)[0] for prompt in prompts]


def test_stories_do_not_depend_on_batching():
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES.name} is not beside the repository")
    model = load_pretrained(STORIES)
    prompts = [[1] + prompt for prompt in random_prompts(5, 512, 40)]
    together = generate(model, prompts, max_new_tokens=12, eos_id=2)
    assert together == [generate(model, [prompt], max_new_tokens=12, eos_id=2)[0] for prompt in prompts]


def test_exact_ties_take_the_lowest_id():
    model = tiny_model()
    with torch.no_grad():
        model.output.weight.copy_(model.output.weight[:1].expand(61, -1))  # all logits equal
    assert generate(model, [[5, 6]], max_new_tokens=3, eos_id=None)[0][0] == [0, 0, 0]


def test_each_row_stops_on_its_own():
    model = tiny_model()
    prompts = random_prompts(12, 61, 10)
    free = generate(model, prompts, max_new_tokens=10, eos_id=None)
    eos_id = free[0][0][2]  # some rows meet it early, others never
    stopped = generate(model, prompts, max_new_tokens=10, eos_id=eos_id)
    lengths = set()
    for (free_ids, free_logprobs), (ids, logprobs) in zip(free, stopped, strict=True):
        length = free_ids.index(eos_id) + 1 if eos_id in free_ids else 10  # EOS is part of the response
        assert (ids, logprobs) == (free_ids[:length], free_logprobs[:length])
        lengths.add(length)
    assert len(lengths) > 1


def test_any_of_several_ids_stops_a_row():
    model = tiny_model()
    prompts = random_prompts(12, 61, 10)
    free = generate(model, prompts, max_new_tokens=10, eos_id=None)
    eos_id, *stop_ids = free[0][0][2], free[1][0][4], free[2][0][3]
    stopped = generate(model, prompts, max_new_tokens=10, eos_id=[eos_id, *stop_ids])
    seen = set()
    for (free_ids, free_logprobs), (ids, logprobs) in zip(free, stopped, strict=True):
        ends = [position for position, token in enumerate(free_ids) if token in (eos_id, *stop_ids)]
        length = ends[0] + 1 if ends else 10
        assert (ids, logprobs) == (free_ids[:length], free_logprobs[:length])
        seen.add(ids[-1] if ends else None)
    assert seen == {eos_id, *stop_ids, None}


def test_logprobs_are_those_of_the_sampling_temperature():
    model = tiny_model()
    prompts = random_prompts(5, 61, 10)
    generator = torch.Generator().manual_seed(0)
    found = generate(model, prompts, max_new_tokens=6, eos_id=3, temperature=0.7, generator=generator)
    for prompt, (ids, logprobs) in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].double() / 0.7
        for row, token, logprob in zip(logits, ids, logprobs, strict=True):
            probabilities = [2.718281828459045 ** float(x - row.max()) for x in row]
            expected = probabilities[token] / sum(probabilities)
            assert 2.718281828459045**logprob == pytest.approx(expected, rel=1e-3)


def test_samples_follow_the_distribution():
    n, logits = 20000, torch.tensor([1.0, -2.0, 0.0, 2.5, 0.3])
    uniforms = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = choose_tokens(logits.expand(n, -1), 1.5, uniforms).tolist()
    expected = (logits.double() / 1.5).softmax(-1)
    counts = torch.tensor([tokens.count(i) for i in range(5)])
    assert ((counts / n - expected).abs() < 4.5 * (expected * (1 - expected) / n).sqrt()).all()
    assert logprobs[0] == pytest.approx(expected[int(tokens[0])].log().item(), abs=1e-6)


def test_sampling_inverts_the_cumulative_distribution():
    """Probabilities 0, 1/4, 1/2, 0, 1/4, 0: cumulative 0, 1/4, 3/4, 3/4, 1, 1. Tokens of probability 0 never come."""
    logits = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25, 0.0]).log()
    uniforms = [0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-53]
    tokens, logprobs = choose_tokens(logits.expand(6, -1), 1.0, torch.tensor(uniforms, dtype=torch.float64)).tolist()
    assert tokens == [1, 1, 2, 2, 4, 4]
    assert logprobs == pytest.approx([math.log(p) for p in (0.25, 0.25, 0.5, 0.5, 0.25, 0.25)], abs=1e-6)


def test_a_long_tail_is_sampled():
    """Half the mass on token 0, half spread evenly over 2^20 - 1 others: u = 0.75 lands in their middle."""
    logits = torch.zeros(1, 2**20)
    logits[0, 0] = math.log(2**20 - 1)
    tokens, _ = choose_tokens(logits, 1.0, torch.tensor([0.75], dtype=torch.float64))
    assert tokens[0] == pytest.approx(2**19, abs=2)


def test_seed_reproduces_samples():
    model, prompts = tiny_model(), random_prompts(5, 61, 10)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    runs = [generate(model, prompts, max_new_tokens=6, eos_id=3, temperature=1.0, generator=g) for g in generators]
    assert runs[0] == runs[1] != runs[2]


def test_with_a_generator_per_prompt_samples_do_not_depend_on_batching():
    model = tiny_model()
    prompts = random_prompts(11, 61, 30)

    def sample(chosen: list[int], **changes) -> list[tuple[list[int], list[float]]]:
        generators = [torch.Generator().manual_seed(index) for index in chosen]
        return generate(
            model,
            [prompts[index] for index in chosen],
            max_new_tokens=12,
            eos_id=3,
            temperature=1.3,
            generator=generators,
            **changes,
        )

    together = sample(list(range(11)))
    assert together == [sample([index])[0] for index in range(11)]
    assert together == sample(list(range(11))[::-1])[::-1]
    assert len({tuple(ids) for ids, _ in sample([4] * 3)}) == 1  # equal seeds, equal responses: nothing else is drawn


def test_a_prompt_given_several_times_in_a_row_is_forwarded_once():
    """And its responses are, bit for bit, those after a forward each. 24 prompts take turns in 16 rows."""
    model = tiny_model()
    first, second, third = random_prompts(3, 61, 30)
    prompts = [prompt for prompt in (first, second, third) for _ in range(8)]

    def sample(chosen: list[int]) -> tuple[list[tuple[list[int], list[float]]], int]:
        """The responses, and how many tokens of prompts were forwarded for them."""
        decoder = RowDecoder(
            model, n_rows=16, max_tokens=42, max_new_tokens=12, stop_ids={3}, temperature=1.3, rows_per_forward=16
        )
        generators = [torch.Generator().manual_seed(index) for index in chosen]
        responses = continue_prompts(decoder, [prompts[index] for index in chosen], generators)
        return responses, decoder.tokens_forwarded - sum(len(ids) - 1 for ids, _ in responses)

    alone = [sample([index])[0][0] for index in range(24)]
    together, n_forwarded = sample(list(range(24)))
    assert together == alone and len({tuple(ids) for ids, _ in alone}) > 20
    assert n_forwarded == len(first) + len(second) + len(third)


def test_generation_stops_when_it_is_told_to():
    """One prefill of both and four decoding steps, then the answer False: the first five ids of each response."""
    model, prompts, seen = tiny_model(), [[5, 6, 7], [8, 9, 10]], []

    def should_continue(finished_B: torch.Tensor) -> bool:
        seen.append(finished_B.tolist())
        return len(seen) <= 5

    whole = generate(model, prompts, max_new_tokens=9, eos_id=None)
    short = generate(model, prompts, max_new_tokens=9, eos_id=None, should_continue=should_continue)
    assert short == [(ids[:5], logprobs[:5]) for ids, logprobs in whole]
    assert seen == [[False, False]] * 6


def test_no_prompts_is_no_work():
    assert generate(tiny_model(), [], max_new_tokens=4, eos_id=3) == []


@pytest.mark.parametrize(
    "prompts, changes, words",
    [
        ([[1], []], {}, r"prompts \[1\] are empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"generator": []}, "0 generators for 1 prompts"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
    ],
    ids=str,
)
def test_wrong_arguments_are_errors(prompts, changes, words):
    with pytest.raises(ValueError, match=words):
        generate(tiny_model(), prompts, **({"max_new_tokens": 2, "eos_id": 3} | changes))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_looking_for_ends_less_often_changes_nothing(temperature):
    """Eleven responses take turns in 8 rows, three turns each of a dialogue that draws on with its generator."""
    model, prompts = tiny_model(), random_prompts(11, 61, 30)
    eos_ids = set(range(0, 61, 6))  # so that most responses end early, in different steps

    def sample(steps_per_stop_test: int) -> tuple:
        decoder = RowDecoder(
            model,
            n_rows=8,
            max_tokens=44,
            max_new_tokens=13,
            stop_ids=eos_ids,
            temperature=temperature,
            rows_per_forward=8,
        )
        decoder.steps_per_stop_test = steps_per_stop_test
        generators = [torch.Generator().manual_seed(index) for index in range(11)]
        responses = [continue_prompts(decoder, prompts, generators) for _ in range(3)]
        shared = continue_prompts(decoder, prompts, torch.Generator().manual_seed(1))
        alone = continue_prompts(decoder, prompts[:1], generators[0])
        return responses, shared, alone, [each.get_state().tolist() for each in generators], decoder.tokens_forwarded

    every_step = sample(1)
    assert len({len(ids) for ids, _ in every_step[0][0]}) > 3
    assert sample(4) == every_step and sample(5) == every_step


def test_a_row_keeps_the_keys_of_its_response_only():
    """After an end that was seen late, the next turn goes on as if it had been seen at once."""
    model, ids = tiny_model(), random_prompts(1, 61, 12)[0]

    def two_turns(steps_per_stop_test: int) -> list[tuple]:
        stop_ids = frozenset(range(0, 61, 5))
        decoder = DialogueDecoder(model, n_rows=1, max_tokens=60, max_new_tokens=20, stop_ids=stop_ids)
        decoder.decoder.steps_per_stop_test = steps_per_stop_test
        turns, prompt = [], ids
        for _ in range(2):
            decoder.ask(0, prompt)
            answered = []
            while not answered:
                answered = decoder.step()
            turns.append((*answered[0], decoder.decoder.cache.lengths[0]))
            prompt = prompt + answered[0][1] + [5, 6]
        return [*turns, decoder.tokens_reused, decoder.tokens_forwarded]

    expected = two_turns(1)
    assert 1 < len(expected[0][1]) < 20 and len(expected[0][1]) % 4 != 1
    assert expected[0][3] == len(ids) + len(expected[0][1]) - 1  # the last id was never fed
    assert two_turns(4) == expected


@pytest.mark.parametrize(("steps_per_stop_test", "n_reads"), [(1, 9), (4, 3)])
def test_the_host_reads_once_per_stop_test_from_the_device(steps_per_stop_test, n_reads):
    """One prefill of both prompts and eight steps. At an earlier commit two reads each. Copies inside inference mode,
    which are to be without a wait, are out of the counter's sight."""
    model = tiny_model().to("meta")

    def sample() -> None:
        decoder = decoder_for(model, [[5, 6, 7], [8, 9]], max_new_tokens=9, temperature=1.0, eos_id=None)
        decoder.steps_per_stop_test = steps_per_stop_test
        continue_prompts(decoder, [[5, 6, 7], [8, 9]], [torch.Generator().manual_seed(seed) for seed in (0, 1)])

    with CountWaits():
        sample()  # the trial of row counts reads, once per shape
    with CountWaits() as waits:
        sample()
    assert waits.counts["read"] == n_reads and waits.counts["copy"] == 0
