"""Choices with a model of ours: log-probabilities of " A", " B", ... after each question. Nothing is generated.

Neighbouring questions begin with the same solved ones. Their keys and values are computed once and stay in the
cache; each question is then one forward over its own tokens. Every forward has the shape of its own text, so the
numbers depend neither on which questions are left after a kill nor on the number of ranks.

Shape suffixes: T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch

from eval.predict.choices import choice_prefix, choice_prompt, choose_letter, fitting_shots
from eval.predict.generate import encode_text
from eval.records import Record
from model.decode import DecodeWeights, KVCache, prefill
from model.tokenizer import Tokenizer
from model.transformer import Transformer


def letter_rows(
    model: Transformer, tokenizer: Tokenizer, queries: Sequence[Record], *, max_prompt_tokens: int = 0
) -> Iterator[dict]:
    """One predictions row per question: index, logprobs (natural, one per letter), output (the letter chosen), stop.

    Solved questions are left out, the last first, while the prompt is longer than the model's positions or than
    `max_prompt_tokens` (0: no such limit). A row says how many are left, `n_shots`, where some are not. A question that
    exceeds `max_prompt_tokens` by itself is asked all the same.
    """
    prefix = _Prefix(model, tokenizer)
    for query in queries:
        letters = [tokenizer.encode_continuation(f" {letter}") for letter in query.letters]
        longest = max(map(len, letters))
        room = model.config.max_positions - longest + 1
        n_shots = fitting_shots(
            query,
            max_tokens=min(room, max_prompt_tokens or room),
            count_tokens=lambda candidate: len(encode_text(candidate, tokenizer)),
        )
        ids = encode_text(choice_prompt(query, n_shots), tokenizer)
        if len(ids) + longest - 1 > model.config.max_positions:
            yield {"index": query.index, "output": "", "stop": "prompt_too_long"}
            continue
        logprobs = prefix.logprobs(choice_prefix(query, n_shots), ids, letters)
        yield {
            "index": query.index,
            "output": f" {choose_letter(logprobs, query.letters)}",
            "stop": "end",
            "logprobs": logprobs,
        } | ({"n_shots": n_shots} if n_shots < len(query.shots) else {})


class _Prefix:
    """A key/value cache that holds the text which the latest prompts began with."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.weights, self.tokenizer = DecodeWeights(model), tokenizer
        self.cache = KVCache(model.config, 1, model.config.max_positions)
        self.text = ""
        self.ids: list[int] = []

    def logprobs(self, prefix_text: str, prompt_ids: list[int], continuations: list[list[int]]) -> list[float]:
        """The log-probability of each continuation after the prompt, which begins with `prefix_text`.

        Only ids that the prefix has both by itself and inside the prompt are reused; the rest is computed again.
        """
        if self.text != prefix_text or not self.ids:
            self.text, self.ids = prefix_text, encode_text(prefix_text, self.tokenizer)
            self._forward(0, self.ids)
        n_shared = 0
        for own, other in zip(self.ids, prompt_ids[:-1]):  # at least one token is left for a forward
            if own != other:
                break
            n_shared += 1
        first_V = self._forward(n_shared, prompt_ids[n_shared:])
        if n_shared < len(self.ids):  # the question's tokens now lie over the end of the prefix
            self.ids = []
        result = []
        for ids in continuations:
            logprob = first_V[ids[0]].item()
            for offset in range(1, len(ids)):  # letters of several tokens: small vocabularies have them
                next_V = self._forward(len(prompt_ids) + offset - 1, [ids[offset - 1]])
                logprob += next_V[ids[offset]].item()
            result.append(logprob)
        return result

    @torch.inference_mode()
    def _forward(self, n_kept: int, ids: list[int]) -> torch.Tensor:
        """log softmax after `ids`, which follow the first `n_kept` cached tokens. (V,)"""
        self.cache.lengths[0] = n_kept
        return prefill(self.weights, self.cache, [0], [ids])[0].float().log_softmax(-1)
