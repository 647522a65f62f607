"""model/dialogue_decoding.py: turns behind a kept cache give what whole prompts give, whatever else is decoded beside
them; what is forwarded is counted by hand."""

import random

import pytest
import torch

from model.dialogue_decoding import DialogueDecoder, common_prefix_length
from model.pretrained_weights import load_pretrained
from model.sampling import generate
from model.transformer import Transformer
from tests.model.test_transformer import STORIES, tiny_model

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

STOPS = frozenset(range(3, 61, 6))  # so many that random responses meet one
MAX_TOKENS, MAX_NEW = 150, 9  # prompts may cross the 128 slots at which attention takes another shape

Turn = tuple[list[int], list[int], list[float]]  # prompt, response ids, logprobs


def next_prompt(rng: random.Random, turns: list[Turn], vocab_size: int) -> list[int]:
    """What the dialogue asks next: mostly its prompt, its response and feedback; sometimes history is changed."""

    def some(longest: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))]

    if not turns:
        return some(60 if rng.random() < 0.8 else 1)
    prompt, response, _ = turns[-1]
    kind = rng.choice(["grow", "grow", "grow", "reworded", "changed", "again", "shorter", "other"])
    ids = {
        "grow": prompt + response + some(20),
        "reworded": prompt + response[:-1] + some(2) + some(9),  # the response comes back in other words
        "changed": prompt + response + some(5),
        "again": prompt,
        "shorter": prompt[: rng.randint(1, len(prompt))],
        "other": some(30),
    }[kind]
    if kind == "changed":
        ids[rng.randrange(len(ids))] = rng.randrange(vocab_size)
    return ids[: MAX_TOKENS - MAX_NEW]


class Script:
    """One dialogue's side of the talk: it depends on its number and on the responses to it, on nothing else."""

    def __init__(self, number: int, n_turns: int, vocab_size: int) -> None:
        self.number, self.n_turns, self.vocab_size = number, n_turns, vocab_size
        self.rng = random.Random(number)
        self.turns: list[Turn] = []
        self.prompt: list[int] = []

    def ask(self, decoder: DialogueDecoder, temperature: float) -> None:
        self.prompt = next_prompt(self.rng, self.turns, self.vocab_size)
        seed = 1000 * self.number + len(self.turns)
        decoder.ask(self.number, self.prompt, torch.Generator().manual_seed(seed) if temperature else None)


def run_dialogues(
    model: Transformer,
    numbers: list[int],
    *,
    n_rows: int,
    order: random.Random,
    hurry: float = 0.5,
    n_turns: int = 4,
    temperature: float = 0.0,
) -> dict[int, list[Turn]]:
    """All turns of these dialogues; in which order they begin and ask, and how long they wait for tools, is random.
    hurry: probability that one of them begins or asks before a step."""
    decoder = DialogueDecoder(
        model, n_rows=n_rows, max_tokens=MAX_TOKENS, max_new_tokens=MAX_NEW, stop_ids=STOPS, temperature=temperature
    )
    unborn = [Script(number, n_turns, model.config.vocab_size) for number in numbers]
    order.shuffle(unborn)
    thinking: list[Script] = []  # hold a row, wait for their tool
    answering: dict[int, Script] = {}
    done: dict[int, list[Turn]] = {}
    while unborn or thinking or answering:
        n_held = len(thinking) + len(answering)
        if unborn and n_held < n_rows and order.random() < hurry:
            thinking.append(unborn.pop())
        elif thinking and order.random() < hurry:
            script = thinking.pop(order.randrange(len(thinking)))
            answering[script.number] = script
            script.ask(decoder, temperature)
        for number, ids, logprobs in decoder.step():
            script = answering.pop(number)
            script.turns.append((script.prompt, ids, logprobs))
            if len(script.turns) == n_turns:
                decoder.drop(number)
                done[number] = script.turns
            else:
                thinking.append(script)
    assert decoder.is_idle()
    return done


def alone(model: Transformer, numbers: list[int], **settings: float) -> dict[int, list[Turn]]:
    together: dict[int, list[Turn]] = {}
    for number in numbers:
        together |= run_dialogues(model, [number], n_rows=1, order=random.Random(0), **settings)
    return together


# ---------------------------------------------------------------------------------------------------------------------
# The same whatever is beside it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_turns_do_not_depend_on_batching_or_order(temperature, dtype):
    model, numbers = tiny_model().to(dtype), list(range(18))
    expected = alone(model, numbers, temperature=temperature)
    for n_rows, hurry in ((3, 0.5), (16, 0.5), (18, 1.0)):  # 18 that hurry: more rows than one forward takes
        assert (
            run_dialogues(
                model, numbers, n_rows=n_rows, order=random.Random(n_rows), hurry=hurry, temperature=temperature
            )
            == expected
        )  # ids and log-probabilities, bit for bit
    lengths = [len(ids) for turns in expected.values() for _, ids, _ in turns]
    assert min(lengths) == 1 and max(lengths) == MAX_NEW  # some were stopped, others cut


def test_stories_do_not_depend_on_batching():
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES.name} is not beside the repository")
    model, numbers = load_pretrained(STORIES), list(range(6))
    assert run_dialogues(model, numbers, n_rows=6, order=random.Random(4), n_turns=3) == alone(
        model, numbers, n_turns=3
    )


def test_more_rows_than_a_forward_takes_advance_in_turn():
    model = tiny_model()
    decoder = DialogueDecoder(model, n_rows=20, max_tokens=40, max_new_tokens=6, stop_ids=frozenset())
    for dialogue in range(20):
        decoder.ask(dialogue, [5, dialogue])
    n_sampled = []
    for _ in range(5):
        decoder.step()
        n_sampled.append([len(decoder.responses[row].ids) for row in range(20)])
    assert n_sampled[0] == [1] * 20  # prefilled together
    assert n_sampled[1:] == [[2] * 16 + [1] * 4, [2] * 20, [3] * 16 + [2] * 4, [3] * 20]


def test_prompts_are_prefilled_together_in_the_order_of_asking():
    """Up to 512 tokens at once: 300 and 200, then 13 and 499, then 520 alone, then 1."""
    decoder = DialogueDecoder(
        tiny_model(max_positions=600), n_rows=6, max_tokens=530, max_new_tokens=6, stop_ids=frozenset()
    )
    for dialogue, n_tokens in enumerate((300, 200, 13, 499, 520, 1)):
        decoder.ask(dialogue, [5] * n_tokens)
    n_sampled = []
    for _ in range(4):
        decoder.step()
        n_sampled.append([len(decoder.responses[row].ids) for row in range(6)])
    assert n_sampled == [[1] * n + [0] * (6 - n) for n in (2, 4, 5, 6)]


# ---------------------------------------------------------------------------------------------------------------------
# The same as a whole prompt


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4, "tie_embeddings": True}, {"qkv_bias": True}], ids=str)
def test_turns_equal_generate_on_the_whole_prompt(changes):
    model = tiny_model(**changes)
    for turns in run_dialogues(model, list(range(12)), n_rows=8, order=random.Random(5)).values():
        whole = generate(model, [prompt for prompt, _, _ in turns], max_new_tokens=MAX_NEW, eos_id=STOPS)
        for (_, ids, logprobs), (whole_ids, whole_logprobs) in zip(turns, whole, strict=True):
            assert ids == whole_ids
            assert logprobs == pytest.approx(whole_logprobs, abs=2e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 0.4)], ids=str)
def test_each_token_is_the_most_likely_one_of_an_fp64_forward(dtype, tolerance):
    """Up to ties within the tolerance; in bf16 logits of about 20 are themselves rounded to 1/8."""
    model = tiny_model().to(dtype)
    oracle = tiny_model()
    oracle.load_state_dict(model.state_dict())
    oracle.double()
    for turns in run_dialogues(model, list(range(8)), n_rows=5, order=random.Random(6)).values():
        for prompt, ids, logprobs in turns:
            with torch.no_grad():
                logits = oracle(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert (chosen > logits.amax(1) - tolerance).all()
            assert torch.allclose(torch.tensor(logprobs).double(), chosen - logits.logsumexp(1), rtol=0, atol=tolerance)


def test_sampled_turns_equal_generate_on_the_whole_prompt():
    model = tiny_model()
    dialogues = run_dialogues(model, list(range(8)), n_rows=4, order=random.Random(7), temperature=0.8)
    for number, turns in dialogues.items():
        whole = generate(
            model,
            [prompt for prompt, _, _ in turns],
            max_new_tokens=MAX_NEW,
            eos_id=STOPS,
            temperature=0.8,
            generator=[torch.Generator().manual_seed(1000 * number + turn) for turn in range(len(turns))],
        )
        for (_, ids, logprobs), (whole_ids, whole_logprobs) in zip(turns, whole, strict=True):
            assert ids == whole_ids
            assert logprobs == pytest.approx(whole_logprobs, abs=5e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What is forwarded


def answer(decoder: DialogueDecoder, dialogue: int, prompt: list[int]) -> list[int]:
    """Asks and steps until this dialogue's response has come, which must be the only one."""
    decoder.ask(dialogue, prompt)
    while not (finished := decoder.step()):
        pass
    ((number, ids, _),) = finished
    assert number == dialogue
    return ids


def test_only_what_lies_behind_the_common_prefix_is_forwarded():
    model = tiny_model()
    forwards = []
    model.tok_embeddings.register_forward_pre_hook(lambda module, args: forwards.append(args[0].flatten().tolist()))
    decoder = DialogueDecoder(model, n_rows=2, max_tokens=60, max_new_tokens=3, stop_ids=frozenset())

    def prefilled_by(prompt: list[int]) -> list[int]:
        forwards.clear()
        n_forwarded = decoder.tokens_forwarded
        answer(decoder, 4, prompt)
        assert len(forwards) == 3  # one prefill, and two of the three sampled ids are fed
        return forwards[0][: decoder.tokens_forwarded - n_forwarded - 2]  # the rest only fills the shape

    assert decoder.tokens_forwarded == decoder.tokens_reused == 0
    response = answer(decoder, 4, [1, 2, 3, 4, 5])
    assert (decoder.tokens_forwarded, decoder.tokens_reused) == (5 + 2, 0)
    # The row holds the prompt and the first two ids of the response; the third was never fed.
    grown = [1, 2, 3, 4, 5, *response, 9, 8]
    assert prefilled_by(grown) == [response[2], 9, 8]
    assert (decoder.tokens_forwarded, decoder.tokens_reused) == (7 + 3 + 2, 7)
    assert prefilled_by(grown) == [8]  # held completely, but its logits are needed
    assert (decoder.tokens_forwarded, decoder.tokens_reused) == (12 + 1 + 2, 7 + 9)
    changed = grown[:6] + [(grown[6] + 1) % 61] + grown[7:]
    assert prefilled_by(changed) == changed[6:]
    assert (decoder.tokens_forwarded, decoder.tokens_reused) == (15 + 4 + 2, 16 + 6)
    assert prefilled_by([1, 2, 3]) == [3]
    assert (decoder.tokens_forwarded, decoder.tokens_reused) == (21 + 1 + 2, 22 + 2)
    assert prefilled_by([9, 2, 3]) == [9, 2, 3]
    assert (decoder.tokens_forwarded, decoder.tokens_reused) == (24 + 3 + 2, 24)
    answer(decoder, 5, [9, 2, 4])  # another dialogue shares no part: its keys would depend on who asked first
    assert (decoder.tokens_forwarded, decoder.tokens_reused) == (29 + 3 + 2, 24)
    decoder.drop(4)
    answer(decoder, 4, [9, 2, 3])
    assert (decoder.tokens_forwarded, decoder.tokens_reused) == (34 + 3 + 2, 24)
    decoder.drop(5)
    answer(decoder, 6, [9, 2, 3])  # the whole prompt before it is copied: its keys are those of a forward of its own
    assert (decoder.tokens_forwarded, decoder.tokens_reused) == (39 + 2, 24 + 3)


def test_a_dialogue_that_waits_for_its_tool_is_kept_and_not_advanced():
    model = tiny_model()
    decoder = DialogueDecoder(model, n_rows=2, max_tokens=60, max_new_tokens=4, stop_ids=frozenset())
    answer(decoder, 0, [1, 2, 3])
    row = decoder.dialogue_of_row.index(0)
    cache = decoder.decoder.cache
    before = [storage_RLKH[row].clone() for storage_RLKH in cache.keys_RLKH + cache.values_RLKH]
    answer(decoder, 1, [4, 5, 6, 7])
    assert cache.lengths[row] == 6
    after = [storage_RLKH[row] for storage_RLKH in cache.keys_RLKH + cache.values_RLKH]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_nothing_runs_when_no_dialogue_is_answering():
    model = tiny_model()
    decoder = DialogueDecoder(model, n_rows=1, max_tokens=60, max_new_tokens=4, stop_ids=frozenset())
    forwards = []
    model.tok_embeddings.register_forward_pre_hook(lambda module, args: forwards.append(args))
    assert decoder.step() == [] and decoder.is_idle() and not forwards


def test_responses_end_with_any_stop_id():
    model = tiny_model()
    decoder = DialogueDecoder(model, n_rows=1, max_tokens=60, max_new_tokens=10, stop_ids=frozenset())
    free = answer(decoder, 0, [5, 6, 7])
    stops = {free[4], free[6]}
    end = min(free.index(stop) for stop in stops)
    decoder = DialogueDecoder(model, n_rows=1, max_tokens=60, max_new_tokens=10, stop_ids=frozenset(stops))
    assert answer(decoder, 0, [5, 6, 7]) == free[: end + 1]


# ---------------------------------------------------------------------------------------------------------------------
# Rows change hands


@pytest.mark.parametrize("n_steps", [0, 1, 3])
def test_a_dropped_dialogue_leaves_nothing_behind(n_steps):
    """Dropped while it waits, after its prefill, in the middle of its response; dialogue 1 is not disturbed."""
    model = tiny_model()
    decoder = DialogueDecoder(model, n_rows=2, max_tokens=60, max_new_tokens=8, stop_ids=frozenset())
    fresh = DialogueDecoder(model, n_rows=1, max_tokens=60, max_new_tokens=8, stop_ids=frozenset())
    expected = answer(fresh, 1, [8, 9])
    decoder.ask(0, [1, 2, 3, 4])
    for _ in range(n_steps):
        assert decoder.step() == []
    decoder.ask(1, [8, 9])
    decoder.drop(0)
    decoder.drop(0)  # holds no row any more
    finished = []
    while not decoder.is_idle():
        finished += decoder.step()
    assert [(number, ids) for number, ids, _ in finished] == [(1, expected)]
    fresh.drop(1)
    assert answer(decoder, 2, [1, 2, 3, 5, 6]) == answer(fresh, 2, [1, 2, 3, 5, 6])


def test_nan_of_an_earlier_turn_or_dialogue_does_not_reach_the_next_one():
    model = tiny_model()
    decoder = DialogueDecoder(model, n_rows=1, max_tokens=60, max_new_tokens=6, stop_ids=frozenset())
    cache = decoder.decoder.cache
    for dialogue, prompt, n_shared in (
        (0, [1, 2, 3, 4, 5, 6], 0),
        (0, [1, 2, 3], 2),
        (0, [1, 2, 3, 9], 3),
        (1, [7], 0),
        (2, [7, 8, 9], 0),
    ):
        if cache.keys_RLKH[0] is not None:
            for storage_RLKH in cache.keys_RLKH + cache.values_RLKH:
                with torch.inference_mode():
                    storage_RLKH[0, n_shared : len(decoder.ids_of_row[0])] = float("nan")
        if dialogue not in decoder.dialogue_of_row:
            decoder.drop(dialogue - 1)
        assert answer(decoder, dialogue, prompt) == generate(model, [prompt], max_new_tokens=6, eos_id=None)[0][0]


def test_common_prefix_length():
    assert common_prefix_length([], [1]) == common_prefix_length([1], []) == common_prefix_length([1], [2]) == 0
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 3]) == 2
    assert common_prefix_length([1, 2], [1, 2, 3]) == common_prefix_length([1, 2, 3], [1, 2]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_a_refused_prompt_changes_nothing():
    model = tiny_model()
    decoder = DialogueDecoder(model, n_rows=1, max_tokens=20, max_new_tokens=4, stop_ids=frozenset())
    assert decoder.fits(16) and not decoder.fits(17)
    with pytest.raises(ValueError, match="dialogue 3: the prompt is empty"):
        decoder.ask(3, [])
    with pytest.raises(ValueError, match="dialogue 3: a prompt of 17 tokens and a response of up to 4 .* 20"):
        decoder.ask(3, [1] * 17)
    assert decoder.is_idle()
    response = answer(decoder, 3, [1] * 16)  # the longest that fits
    with pytest.raises(ValueError, match="dialogue 3: a prompt of 22 tokens"):
        decoder.ask(3, [1] * 16 + response + [5, 5])
    with pytest.raises(ValueError, match="dialogue 4: all 1 rows are held"):
        decoder.ask(4, [1])
    forwarded = decoder.tokens_forwarded
    decoder.ask(3, [1] * 16)  # the row still holds what it held
    with pytest.raises(ValueError, match="dialogue 3 is still answering"):
        decoder.ask(3, [1] * 16)
    decoder.step()
    assert decoder.tokens_forwarded == forwarded + 1
    decoder.drop(3)
    answer(decoder, 4, [1])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_rows": 0}, "n_rows is 0"),
        ({"max_tokens": 4}, "max_tokens is 4"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
    ids=str,
)
def test_wrong_settings_are_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        DialogueDecoder(
            tiny_model(), **({"n_rows": 2, "max_tokens": 20, "max_new_tokens": 4, "stop_ids": frozenset()} | changes)
        )


def test_sampling_needs_a_generator_of_the_dialogue():
    decoder = DialogueDecoder(
        tiny_model(), n_rows=1, max_tokens=20, max_new_tokens=4, stop_ids=frozenset(), temperature=0.5
    )
    with pytest.raises(ValueError, match="dialogue 0: found no generator"):
        decoder.ask(0, [1])
