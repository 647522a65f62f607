"""model/step_graphs.py, with a stand-in for CUDA's graphs: decoding with and without them gives the same bits."""

import pytest
import torch

from model.decode import DecodeWeights
from model.dialogue_decoding import DialogueDecoder
from model.sampling import RowDecoder, continue_prompts
from tests.model.test_sampling import random_prompts
from tests.model.test_transformer import tiny_model
from tests.support.graph_stand_in import install


@pytest.fixture
def recorded(monkeypatch):
    return install(monkeypatch)


def weights_of(model: torch.nn.Module, has_graphs: bool) -> DecodeWeights:
    weights = DecodeWeights(model, cuda_graphs=has_graphs)
    assert not weights.has_graphs  # on a CPU there are none
    weights.has_graphs = has_graphs
    return weights


def take_turns(weights: DecodeWeights, prompts: list[list[int]], temperature: float, steps_per_stop_test: int) -> tuple:
    """Responses to the prompts in ten rows, eight to a forward, and the tokens forwarded for them."""
    decoder = RowDecoder(
        weights,
        n_rows=10,
        max_tokens=210,
        max_new_tokens=60,
        stop_ids={0, 31},
        temperature=temperature,
        rows_per_forward=8,
    )
    decoder.steps_per_stop_test = steps_per_stop_test
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    return continue_prompts(decoder, prompts, generators), decoder.tokens_forwarded


def test_the_stand_in(recorded):
    source, target = torch.ones(3), torch.zeros(2, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=None, capture_error_mode="thread_local"):
        target[1] += (2 * source).flatten()
    assert target.sum() == 0  # recording runs nothing
    graph.replay()
    source += 1
    graph.replay()
    assert target.tolist() == [[0.0] * 3, [2.0 + 4.0] * 3] and recorded == [graph]
    with pytest.raises(RuntimeError, match="would wait for the device"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=None, capture_error_mode="thread_local"):
            source.sum().item()


@pytest.mark.parametrize(("temperature", "steps_per_stop_test"), [(0.0, 1), (1.3, 4)])
def test_graphs_change_nothing(recorded, temperature, steps_per_stop_test):
    """Nineteen prompts in the rows 0 to 9, eight to a forward; rows end early and wait; the cache grows under way."""
    model, prompts = tiny_model(n_kv_heads=2, qkv_bias=True), random_prompts(19, 61, 115)

    def sample(has_graphs: bool) -> tuple:
        return take_turns(weights_of(model, has_graphs), prompts, temperature, steps_per_stop_test)

    eager = sample(False)
    assert not recorded and len({len(ids) for ids, _ in eager[0]}) > 3
    assert max(len(prompt) + len(ids) for prompt, (ids, _) in zip(prompts, eager[0], strict=True)) > 128
    assert sample(True) == eager
    n_steps = sum(graph.n_replays for graph in recorded)
    assert len(recorded) < 20 < n_steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_graphs_change_nothing_on_a_gpu(temperature):
    """Bit for bit: with heads of 64 numbers in bf16, attention is the kernel that large models get."""
    model = tiny_model(dim=256, n_heads=4, n_kv_heads=2, head_dim=64).to("cuda", torch.bfloat16)
    weights, prompts = DecodeWeights(model, cuda_graphs=True), random_prompts(19, 61, 115)
    recorded = take_turns(weights, prompts, temperature, steps_per_stop_test=4)
    weights.has_graphs = False
    assert recorded == take_turns(weights, prompts, temperature, steps_per_stop_test=1)


def test_rows_between_two_turns_keep_their_keys(recorded):
    """Dialogue 1 answers alone, then all three, and so on: the others are idle in its steps."""
    model, prompts = tiny_model(), random_prompts(3, 61, 12)

    def play(has_graphs: bool) -> list:
        decoder = DialogueDecoder(
            weights_of(model, has_graphs), n_rows=3, max_tokens=120, max_new_tokens=9, stop_ids=frozenset({3})
        )
        answers, histories = [], [list(prompt) for prompt in prompts]
        for turn in range(4):
            for dialogue in (0, 1, 2) if turn % 2 else (1,):
                decoder.ask(dialogue, histories[dialogue])
            while not decoder.is_idle():
                for dialogue, ids, logprobs in decoder.step():
                    answers.append((dialogue, ids, logprobs))
                    histories[dialogue] += [*ids, 7, 8]
        return [answers, decoder.tokens_reused, decoder.decoder.cache.lengths]

    assert play(True) == play(False)
    assert sum(graph.n_replays for graph in recorded) > 10


def test_new_weights_get_new_graphs(recorded):
    """As in the next iteration of PPO: another policy is gathered, at other addresses."""
    prompts = random_prompts(2, 61, 12)

    def sample(seed: int, has_graphs: bool) -> list:
        torch.manual_seed(seed)
        model = tiny_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        decoder = RowDecoder(
            weights_of(model, has_graphs),
            n_rows=2,
            max_tokens=40,
            max_new_tokens=12,
            stop_ids=(),
            temperature=0.0,
            rows_per_forward=2,
        )
        return continue_prompts(decoder, prompts)

    first, second = (sample(seed, True) for seed in (0, 1))
    assert first != second and len(recorded) == 2
    assert [first, second] == [sample(seed, False) for seed in (0, 1)]
