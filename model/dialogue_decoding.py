"""Decoding of many dialogues in turns: between its turns a dialogue keeps its row of the key/value cache.

    ask    begins the next response of a dialogue; only what follows the prompt's longest common prefix with the
           ids of its row is forwarded
    step   one forward: the oldest waiting prompt alone, or one token for every dialogue that is answering
    drop   frees the row

A response depends on its own dialogue alone, bit for bit: on the prompts asked so far, the responses to them and its
generators; not on the other dialogues, the number of rows, or the order of calls (model/sampling.py says why).
It may differ from generate() on the whole prompt where two tokens nearly tie, because keys that were computed token by
token differ in the last bits from those of one long prefill.
"""

import torch

from model.decode import DecodeWeights
from model.sampling import ROWS_PER_FORWARD, Response, RowDecoder
from model.transformer import Transformer


class DialogueDecoder:
    """Up to n_rows dialogues, named by any numbers, with at most max_tokens ids each, prompt and response together.

    A response ends with one of stop_ids, which is then its last id, or after max_new_tokens. temperature as in
    generate(). Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        model: Transformer | DecodeWeights,
        *,
        n_rows: int,
        max_tokens: int,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        temperature: float = 0.0,
    ) -> None:
        if n_rows < 1:
            raise ValueError(f"n_rows is {n_rows}, expected at least 1")
        if max_tokens <= max_new_tokens:
            raise ValueError(f"max_tokens is {max_tokens}, expected more than max_new_tokens {max_new_tokens}")
        self.max_tokens, self.max_new_tokens = max_tokens, max_new_tokens
        self.decoder = RowDecoder(
            model,
            n_rows=n_rows,
            max_tokens=max_tokens,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            temperature=temperature,
            rows_per_forward=ROWS_PER_FORWARD,
        )
        self.dialogue_of_row: list[int | None] = [None] * n_rows
        self.ids_of_row: list[list[int]] = [[] for _ in range(n_rows)]  # whose keys and values the row holds, or will
        self.responses: dict[int, Response] = {}  # of the rows that are answering

    @property
    def tokens_forwarded(self) -> int:
        """Tokens of prompts and responses that went through the model so far."""
        return self.decoder.tokens_forwarded

    @property
    def tokens_reused(self) -> int:
        """Tokens of prompts that did not have to, because the dialogue's row held them."""
        return self.decoder.tokens_reused

    def is_idle(self) -> bool:
        """No dialogue is answering: step() would do nothing."""
        return not self.responses

    def fits(self, n_prompt_tokens: int) -> bool:
        """A prompt of this length leaves room for a whole response."""
        return n_prompt_tokens + self.max_new_tokens <= self.max_tokens

    def ask(self, dialogue: int, prompt_ids: list[int], generator: torch.Generator | None = None) -> None:
        """Begins the dialogue's next response. prompt_ids is the whole prompt, from its first token.

        A dialogue that holds no row takes a free one. Above temperature 0 the response is drawn with `generator`, the
        dialogue's own. Raises ValueError for an empty prompt, one that is too long, a missing generator, a dialogue
        that is still answering, and when all rows are held; the decoder is then as before.
        """
        if not prompt_ids:
            raise ValueError(f"dialogue {dialogue}: the prompt is empty, expected at least one token (BOS)")
        if not self.fits(len(prompt_ids)):
            raise ValueError(
                f"dialogue {dialogue}: a prompt of {len(prompt_ids)} tokens and a response of up to "
                f"{self.max_new_tokens} do not fit into {self.max_tokens}"
            )
        if generator is None and self.decoder.temperature > 0:
            raise ValueError(
                f"dialogue {dialogue}: found no generator, expected one at temperature {self.decoder.temperature}"
            )
        row = self._row_of(dialogue)
        # At least the last token is forwarded: the response begins with its logits.
        n_kept = min(common_prefix_length(self.ids_of_row[row], prompt_ids), len(prompt_ids) - 1)
        self.dialogue_of_row[row] = dialogue
        self.ids_of_row[row] = list(prompt_ids)
        self.responses[row] = Response(generator)
        self.decoder.begin(row, n_kept, prompt_ids[n_kept:], self.responses[row])

    def step(self) -> list[tuple[int, list[int], list[float]]]:
        """Runs one forward, if any dialogue is answering; (dialogue, response_ids, logprobs) of each response that it
        ended. These dialogues keep their rows."""
        if self.is_idle():
            return []
        finished = []
        for row in self.decoder.forward():
            response = self.responses.pop(row)
            self.ids_of_row[row] += response.ids[:-1]  # the last one was sampled, never fed
            finished.append((self.dialogue_of_row[row], response.ids, response.logprobs))
        return finished

    def drop(self, dialogue: int) -> None:
        """Frees the dialogue's row, also in the middle of a response; nothing happens if it holds none."""
        if dialogue not in self.dialogue_of_row:
            return
        row = self.dialogue_of_row.index(dialogue)
        self.decoder.cancel(row)
        self.responses.pop(row, None)
        self.dialogue_of_row[row] = None
        self.ids_of_row[row] = []

    def _row_of(self, dialogue: int) -> int:
        """The row that the dialogue holds, or a free one."""
        if dialogue in self.dialogue_of_row:
            row = self.dialogue_of_row.index(dialogue)
            if row in self.responses:
                raise ValueError(f"dialogue {dialogue} is still answering, expected step() until its response ends")
            return row
        if None not in self.dialogue_of_row:
            raise ValueError(
                f"dialogue {dialogue}: all {len(self.dialogue_of_row)} rows are held, expected drop() of "
                "a dialogue before"
            )
        return self.dialogue_of_row.index(None)


def common_prefix_length(one_ids: list[int], other_ids: list[int]) -> int:
    """Number of ids in front in which the two agree."""
    for position, (one, other) in enumerate(zip(one_ids, other_ids)):
        if one != other:
            return position
    return min(len(one_ids), len(other_ids))
