"""Choices: the prompt of a question with solved ones before it, and the letter that log-probabilities choose."""

import math
from collections.abc import Callable, Sequence

from eval.records import Record


def choice_prompt(record: Record, n_shots: int) -> str:
    """Instruction, the first `n_shots` solved questions, then the one to answer."""
    return choice_prefix(record, n_shots) + record.text


def choice_prefix(record: Record, n_shots: int) -> str:
    """The prompt up to the question itself: what the questions of a subject share."""
    return record.instruction + "".join(record.shots[:n_shots])


def fitting_shots(record: Record, *, count_tokens: Callable[[str], int], max_tokens: int) -> int:
    """How many of the solved questions fit into `max_tokens` with the prompt, the last ones left out first.

    0 also where the prompt is too long without any; the caller must count such a question as not answered.
    """
    for n_shots in range(len(record.shots), 0, -1):
        if count_tokens(choice_prompt(record, n_shots)) <= max_tokens:
            return n_shots
    return 0


def choose_letter(logprobs: Sequence[float], letters: str) -> str:
    """The letter of the largest log-probability, one per letter; the first of equal ones, as argmax does."""
    if len(logprobs) != len(letters) or any(math.isnan(value) for value in logprobs):
        raise ValueError(f"found log-probabilities {logprobs}, expected {len(letters)} numbers")
    return letters[max(range(len(letters)), key=lambda i: logprobs[i])]
