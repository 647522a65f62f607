"""Generation with a key/value cache, greedy or by temperature, over any number of prompts of any lengths.

Shape suffixes: B prompts (B rows of a forward where numbers_4B has them), R rows, S rows that decode, T steps without
the host, V vocabulary, D inputs and O outputs of a matrix.

A prompt is prefilled in a row of the cache of its own, together with others that wait; one equal to the prompt before
it is copied from there. Then all rows decode together, one token each. generate() gives the row of a response that
ended to the next waiting prompt; model/dialogue_decoding.py keeps it for the dialogue's next turn.

Greedy output does not depend on batching. A matrix product sums in an order that depends on its shape, so logits of one
row differ in the last bits between a batch of 1 and a batch of 8, and a near-tie flips. Therefore attention has the
shape of the row's own length (model/decode.py); the products of a prefill have ROWS_PER_TILE rows and those of a decode
forward `rows_per_forward`, some of them idle, or a smaller number of rows for which the products of this machine were
seen to give the same bits (interchangeable_row_counts).
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from model.config import ModelConfig
from model.decode import (
    ROWS_PER_TILE,
    DecodeRun,
    DecodeWeights,
    KVCache,
    decode_runs,
    decode_step,
    pack_matrix,
    prefill,
    product,
    row_bytes,
    rows_that_fit,
    slots_after_step,
    step_numbers,
    to_device,
)
from model.step_graphs import StepGraphs
from model.transformer import Transformer

ROWS_PER_FORWARD = 16  # a multiple of 8, so that BLAS treats the rows alike at every place in the batch
ROW_COUNTS = 1, 2, 4, 8, 12, 16, 32, 48, 64, 96  # smaller forwards that are tried
PREFILL_TOKENS = 512  # waiting prompts are prefilled together up to this many tokens; a longer one alone
# On CUDA. Each look for ends leaves the device idle until the host has launched the next step; each step between two
# looks is one that an ended response may get for nothing, 1.5 on average.
STEPS_PER_STOP_TEST = 4


def generate(
    model: Transformer | DecodeWeights,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    eos_id: int | Collection[int] | None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    should_continue: Callable[[Tensor], bool] = lambda finished_B: True,
) -> list[tuple[list[int], list[float]]]:
    """Continues each prompt (token ids, at least one) and returns (response_ids, logprobs) per prompt, in order.

    A response ends with eos_id (or one of them), which is then its last id, or after max_new_tokens. temperature 0
    takes the most likely token (the lowest id of an exact tie); above 0 it draws from softmax(logits / temperature),
    one uniform number of `generator` per token. A list holds one generator per prompt: then a response depends on its
    own generator and prompt alone, not on what else is sampled, in which order or on which rank. logprobs are
    natural logs under the distribution drawn from, at temperature 1 when greedy (E19).

    should_continue(finished_B) is asked before every forward, on CUDA before every fourth; once it answers False the
    unfinished responses are returned as they are. The weights of a model are packed in every call (model/decode.py);
    DecodeWeights in its place save that. Raises ValueError for an empty prompt, a setting out of range, a list of
    generators of another length than prompts, or a sharded model.
    """
    decoder = decoder_for(model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, eos_id=eos_id)
    return continue_prompts(decoder, prompts, generator, should_continue)


def generate_as_ended(
    model: Transformer | DecodeWeights,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_id: int | Collection[int] | None,
) -> Iterator[tuple[int, list[int]]]:
    """The greedy responses of generate(), each as soon as it ends: (position of its prompt, response_ids)."""
    decoder = decoder_for(model, prompts, max_new_tokens=max_new_tokens, temperature=0.0, eos_id=eos_id)
    responses = [Response() for _ in prompts]
    for prompt in _ended_prompts(decoder, prompts, responses, lambda finished_B: True):
        yield prompt, responses[prompt].ids


def decoder_for(
    model: Transformer | DecodeWeights,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_id: int | Collection[int] | None,
    cache_bytes: int = 0,
) -> "RowDecoder":
    """The decoder of generate() for these prompts.

    cache_bytes bounds its key/value cache, and with it the prompts under way at a time, to at least one; 0: on CUDA by
    what is free, elsewhere not at all. Output does not depend on it.
    """
    weights = model if isinstance(model, DecodeWeights) else DecodeWeights(model)
    max_tokens = max(map(len, prompts), default=0) + max_new_tokens
    head = weights.model.head_weight()
    bytes_per_row = row_bytes(weights.model.config, max_tokens, head.itemsize)
    return RowDecoder(
        weights,
        n_rows=rows_that_fit(min(ROWS_PER_FORWARD, max(1, len(prompts))), bytes_per_row, cache_bytes, head.device),
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        rows_per_forward=ROWS_PER_FORWARD,
        stop_ids=() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id,
    )


def continue_prompts(
    decoder: "RowDecoder",
    prompts: list[list[int]],
    generator: torch.Generator | list[torch.Generator] | None = None,
    should_continue: Callable[[Tensor], bool] = lambda finished_B: True,
) -> list[tuple[list[int], list[float]]]:
    """generate() with a decoder of the caller's own, all rows of which are free.

    Output is the same, bit for bit, for every batching at one value of the decoder's rows_per_forward; across values
    it may differ where two tokens nearly tie. 1 suits a single long answer, on a CPU with weights made for_one_row.
    """
    if isinstance(generator, list) and len(generator) != len(prompts):
        raise ValueError(f"{len(generator)} generators for {len(prompts)} prompts, expected one each")
    responses = [Response(each) for each in (generator if isinstance(generator, list) else [generator] * len(prompts))]
    for _ in _ended_prompts(decoder, prompts, responses, should_continue):
        pass
    return [(response.ids, response.logprobs) for response in responses]


def _ended_prompts(
    decoder: "RowDecoder",
    prompts: list[list[int]],
    responses: list["Response"],
    should_continue: Callable[[Tensor], bool],
) -> Iterator[int]:
    """Fill `responses`, one per prompt; gives the position of each prompt when its response has ended."""
    empty = [index for index, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"prompts {empty} are empty, expected at least one token (BOS) each")
    finished_B = torch.zeros(len(prompts), dtype=torch.bool)
    prompt_of_row: list[int | None] = [None] * len(decoder.cache.lengths)
    # Longest first: neighbours of like length attend in one call.
    waiting = sorted(range(len(prompts)), key=lambda prompt: len(prompts[prompt]))
    while should_continue(finished_B) and not finished_B.all():
        while waiting and None in prompt_of_row:
            row = prompt_of_row.index(None)
            prompt_of_row[row] = waiting.pop()
            decoder.begin(row, 0, prompts[prompt_of_row[row]], responses[prompt_of_row[row]])
        for row in decoder.forward():
            finished_B[prompt_of_row[row]] = True
            yield prompt_of_row[row]
            prompt_of_row[row] = None


# ---------------------------------------------------------------------------------------------------------------------
# The loop's body: one forward


@dataclass(slots=True)
class Response:
    """What has been sampled after one prompt so far."""

    generator: torch.Generator | None = None  # None: PyTorch's global one; unused when greedy
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # natural logs, under the distribution drawn from
    state: Tensor | None = None  # of the generator, before numbers that may turn out not to be needed

    def draw(self, n: int) -> list[float]:
        """The generator's next n numbers: fp64, in [0, 1)."""
        generator = torch.default_generator if self.generator is None else self.generator
        if n > 1:
            self.state = generator.get_state()
        return torch.rand(n, dtype=torch.float64, generator=generator, device=generator.device).tolist()

    def give_back(self, n: int, n_used: int) -> None:
        """Of the last n numbers drawn, the generator is to give all but the first n_used again."""
        if n_used < n:
            (torch.default_generator if self.generator is None else self.generator).set_state(self.state)
            self.draw(n_used)


class RowDecoder:
    """Continues prompts in the rows of one key/value cache, forward by forward; which prompt has which row is up to
    the caller.

    A row keeps its keys and values when its response ends: those of the prompt and of the response but its last id,
    which was never fed. Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        model: Transformer | DecodeWeights,
        *,
        n_rows: int,
        max_tokens: int,
        max_new_tokens: int,
        stop_ids: Collection[int],
        temperature: float,
        rows_per_forward: int,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}, expected 0 (greedy) or a positive number")
        if rows_per_forward < 1:
            raise ValueError(f"rows_per_forward is {rows_per_forward}, expected at least 1 (above it, a multiple of 8)")
        self.weights = model if isinstance(model, DecodeWeights) else DecodeWeights(model)
        self.max_new_tokens, self.stop_ids, self.temperature = max_new_tokens, frozenset(stop_ids), temperature
        self.cache = KVCache(self.weights.model.config, n_rows, max_tokens)
        self.row_counts = _row_counts(self.weights, rows_per_forward, with_head=True)
        self.tile_counts = _row_counts(self.weights, ROWS_PER_TILE, with_head=False)
        self.steps_per_stop_test = STEPS_PER_STOP_TEST if self.weights.device().type == "cuda" else 1
        self.graphs = None
        if self.weights.has_graphs:
            self.graphs = StepGraphs(self.row_counts[-1], self.weights.device())
        self.waiting: deque[tuple[int, int, list[int]]] = deque()  # (row, slots kept, ids to prefill)
        self.responses: dict[int, Response] = {}  # of the rows under way, the waiting ones included
        self.last_row = -1  # the last one decoded
        self.last_prompt: tuple[int, list[int], Tensor | None] = (0, [], None)  # row, all its ids, logits after them
        self.tokens_forwarded = 0  # of prompts and responses; rows that only fill the shape do not count
        self.tokens_reused = 0  # of prompts: in the cache already

    def begin(self, row: int, n_kept: int, new_ids: list[int], response: Response) -> None:
        """Queues a prompt for the row: the ids of its first n_kept slots, then new_ids, at least one. What is
        sampled is appended to `response`."""
        self.waiting.append((row, n_kept, new_ids))
        self.responses[row] = response

    def cancel(self, row: int) -> None:
        """Ends the row's response as it is."""
        self.waiting = deque(each for each in self.waiting if each[0] != row)
        self.responses.pop(row, None)

    def forward(self) -> list[int]:
        """Runs one forward, or a few decoding steps, and returns the rows whose responses ended.

        It prefills the prompts that wait longest, or, when none waits, decodes for each row under way (for
        rows_per_forward of them at most, in turn): steps_per_stop_test tokens, or fewer where a response would grow
        too long. What a row got after its end is discarded. At least one row must be under way.
        """
        if self.waiting:
            rows, logits_RV = self._prefill_next()
            chosen = [choose_tokens(logits_RV, self.temperature, *self._draw_uniforms(rows, 1))]
        else:
            rows = self._next_rows()
            chosen = self._decode(rows)
        steps = torch.stack(chosen).tolist()  # the host waits for the device, once
        ended = []
        for place, row in enumerate(rows):
            if (response := self.responses.get(row)) is None:
                continue
            for n_used, (tokens, logprobs) in enumerate(steps, start=1):
                response.ids.append(int(tokens[place]))
                response.logprobs.append(logprobs[place])
                if response.ids[-1] in self.stop_ids or len(response.ids) == self.max_new_tokens:
                    del self.responses[row]
                    ended.append(row)
                    break
            if self.temperature > 0:
                response.give_back(len(steps), n_used)
            self.cache.lengths[row] -= len(steps) - n_used
            self.tokens_forwarded -= len(steps) - n_used
        return ended

    def _decode(self, rows: list[int]) -> list[Tensor]:
        """Decodes tokens for the rows; what was chosen in each step, (2, S), on the device."""
        answering = [row for row in rows if row in self.responses]
        n_steps = self._steps_without_host(answering)
        token_ids = [self.responses[row].ids[-1] if row in self.responses else None for row in rows]
        n_rows = _at_least(len(rows), self.row_counts)
        numbers_4B = step_numbers(self.weights, self.cache, rows, token_ids, n_rows, n_steps)
        if self.graphs is not None:
            self.graphs.load(numbers_4B, self.cache.n_slots)
        chosen = []
        for uniforms_S in self._draw_uniforms(rows, n_steps):
            if self.graphs is None:
                runs = decode_runs(self.cache, rows, numbers_4B.device)
                chosen.append(self._sample_step(numbers_4B, uniforms_S, runs))
            else:
                n_slots = max(slots_after_step(self.cache, row) for row in answering)
                run = DecodeRun(0, rows[0], len(rows), n_slots)
                chosen.append(self.graphs.step(self._sample_step, uniforms_S, run, n_rows))
            for row in answering:
                self.cache.lengths[row] += 1
        self.tokens_forwarded += n_steps * len(answering)
        return chosen

    @torch.inference_mode()
    def _sample_step(self, numbers_4B: Tensor, uniforms_S: Tensor | None, runs: list[DecodeRun]) -> Tensor:
        """One decoding step, without the host; what it chose. numbers_4B is then that of the next step."""
        chosen_2S = choose_tokens(decode_step(self.weights, self.cache, numbers_4B, runs), self.temperature, uniforms_S)
        numbers_4B[0, : chosen_2S.shape[1]] = chosen_2S[0]
        numbers_4B[1] += numbers_4B[3]
        return chosen_2S

    def _steps_without_host(self, rows: list[int]) -> int:
        """Steps before the host looks for ends: none beyond the longest response. One if responses draw from one
        generator: what the next one gets would depend on where this one ends."""
        n_generators = len({id(self.responses[row].generator) for row in rows})
        if self.temperature > 0 and n_generators < len(rows):
            return 1
        return min(self.steps_per_stop_test, *(self.max_new_tokens - len(self.responses[row].ids) for row in rows))

    def _draw_uniforms(self, rows: list[int], n_steps: int) -> Sequence[Tensor | None]:
        """For each step one number per row, fp64, all in one copy to the device; None when greedy."""
        if self.temperature == 0:
            return [None] * n_steps
        none = [0.0] * n_steps  # for idle rows
        numbers = [self.responses[row].draw(n_steps) if row in self.responses else none for row in rows]
        return to_device(numbers, torch.float64, self.weights.device()).unbind(1)

    def _prefill_next(self) -> tuple[list[int], Tensor]:
        """Prefills at least one waiting prompt; the rows and the logits (R, V) after each.

        A prompt equal to the one before it is copied from there: one more response to it costs no forward and gets the
        same bits.
        """
        last_row, last_ids, last_logits_1V = self.last_prompt
        rows, logit_rows, copies, fresh_rows, fresh_ids = [], [], [], [], []
        n_fresh = 0  # tokens
        while self.waiting and (not fresh_rows or n_fresh + len(self.waiting[0][2]) <= PREFILL_TOKENS):
            row, n_kept, new_ids = self.waiting.popleft()
            self.tokens_reused += n_kept
            if n_kept == 0 and new_ids == last_ids:
                self.tokens_reused += len(new_ids)
                if fresh_rows:
                    copies.append((last_row, row, len(new_ids)))
                else:  # now: the forward may give the row it is copied from to another prompt
                    self.cache.copy_row(last_row, row, len(new_ids))
            else:
                self.cache.lengths[row] = n_kept
                last_row, last_ids = row, [] if n_kept else new_ids
                fresh_rows.append(row)
                fresh_ids.append(new_ids)
                n_fresh += len(new_ids)
            rows.append(row)
            logit_rows.append(len(fresh_rows))
        logits_RV = last_logits_1V
        if fresh_rows:
            in_whole_tiles = n_fresh - n_fresh % ROWS_PER_TILE
            n_rows = in_whole_tiles + _at_least(n_fresh - in_whole_tiles, self.tile_counts)
            fresh_RV = prefill(self.weights, self.cache, fresh_rows, fresh_ids, n_rows)
            logits_RV = fresh_RV if logits_RV is None else torch.cat([logits_RV, fresh_RV])
            self.tokens_forwarded += n_fresh
        for copy in copies:
            self.cache.copy_row(*copy)
        # slots of the last prompt are overwritten by the next prefill at the earliest
        self.last_prompt = (last_row, last_ids, logits_RV[-1:])
        logit_rows = [len(logits_RV) - len(fresh_rows) - 1 + each for each in logit_rows]
        return rows, logits_RV[to_device(logit_rows, torch.long, logits_RV.device)]

    def _next_rows(self) -> list[int]:
        """The rows of the next decoding step, ascending. With graphs it has idle ones too: each place in the forward
        belongs to one row of the cache."""
        rows = sorted(self.responses)  # neighbours attend in one call
        most = self.row_counts[-1]
        if self.graphs is not None:
            later = [row for row in rows if row > self.last_row] or rows
            first = later[0] // most * most
            self.last_row = first + most - 1
            n_rows = _at_least(max(row for row in later if row <= self.last_row) - first + 1, self.row_counts)
            return list(range(first, min(first + n_rows, len(self.cache.lengths))))
        if len(rows) > most:
            rows = ([row for row in rows if row > self.last_row] or rows)[:most]
            self.last_row = rows[-1]
        return rows


def _at_least(n: int, counts: tuple[int, ...]) -> int:
    """The smallest of the counts that holds n rows; 0 for none."""
    return min(count for count in counts if count >= n) if n else 0


def _row_counts(weights: DecodeWeights, most: int, *, with_head: bool) -> tuple[int, ...]:
    head, config = weights.model.head_weight(), weights.model.config
    n_threads, for_one_row = torch.get_num_threads(), weights.for_one_row
    return interchangeable_row_counts(config, head.dtype, head.device, n_threads, most, with_head, for_one_row)


@lru_cache(maxsize=64)
@torch.no_grad()
def interchangeable_row_counts(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    n_threads: int,
    most: int,
    with_head: bool = True,
    for_one_row: bool = False,
) -> tuple[int, ...]:
    """Numbers of rows, up to `most`, whose matrix products equal those of `most` rows bit for bit; ends with `most`.

    Found by trial on random numbers, once per shape and number of threads (the key of the cache): the order of a sum
    follows from the shapes, never from the numbers, and another order shows in some of the many sums compared.
    """
    counts = [n for n in ROW_COUNTS if n < most]
    query_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {
        (query_width + 2 * kv_width, config.dim, config.qkv_bias),
        (config.dim, query_width, False),
        (2 * config.ffn_dim, config.dim, False),
        (config.dim, config.ffn_dim, False),
    }
    if with_head:
        shapes.add((config.vocab_size, config.dim, False))
    generator = torch.Generator().manual_seed(0)
    for n_outputs, n_inputs, has_bias in sorted(shapes):
        block_OD = torch.randn(min(n_outputs, 1024), n_inputs, generator=generator)
        weight_OD = block_OD.repeat(-(-n_outputs // 1024), 1)[:n_outputs].to(device, dtype)
        matrix = pack_matrix(weight_OD, weight_OD[:, 0].clone() if has_bias else None, for_one_row)
        x_RD = torch.randn(most, n_inputs, generator=generator).to(device, dtype)
        full_RO = product(x_RD, matrix)
        counts = [
            n
            for n in counts
            if all(
                torch.equal(product(x_RD[start : start + n].clone(), matrix), full_RO[start : start + n])
                for start in (0, most - n)
            )
        ]
    return (*counts, most)


def choose_tokens(logits_RV: Tensor, temperature: float, uniforms_R: Tensor | None) -> Tensor:
    """One token per row and its log-probability, log softmax(logits / temperature)[token] (E19): (2, R) fp64, which
    holds both exactly.

    Sampling inverts the cumulative distribution at the row's uniform number: the first token at which the sum of the
    probabilities exceeds it. The sum is fp64, because in fp32 the tail of a large vocabulary vanishes in its rounding.
    """
    logits_RV = logits_RV.float() if temperature == 0 else logits_RV.float() / temperature
    logprobs_RV = logits_RV.log_softmax(-1)  # E19
    if uniforms_R is None:
        tokens_R1 = logits_RV.argmax(-1, keepdim=True)
    else:
        cumulative_RV = logprobs_RV.double().exp().cumsum(-1)
        total_R1 = cumulative_RV[:, -1:]  # 1 up to rounding
        target_R1 = uniforms_R[:, None] * total_R1
        # Strictly below the total: otherwise no token exceeds it. A token of probability 0 never does first.
        target_R1 = target_R1.minimum(total_R1.nextafter(torch.zeros_like(total_R1)))
        tokens_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True)
    return torch.stack((tokens_R1[:, 0].double(), logprobs_RV.gather(-1, tokens_R1)[:, 0].double()))
