"""Which tokens of a call decide between the offered tools, and how much more they weigh (PKT).

Worked example, LLaMA-2 pieces (`.` = the leading space), call `search_advice(query="love")`, offered with
`search_movies`:

    .search   _   ad    vice   (   query   ="   lo   ve   ")
    key       -   key   -      -   -       -    -    -    -        |K| = 2, |NK| = 8, w = 8 / 2 = 4

`.search` opens the name; `ad` is the first token after `.search _`, which `search_movies` shares.
"""

from collections.abc import Sequence
from math import isfinite


def find_key_tokens(call_ids: Sequence[int], other_name_ids: Sequence[Sequence[int]]) -> list[int]:
    """Sorted positions in `call_ids` of the key tokens K (E3, paper section 3.2).

    call_ids: ids of `name(args)` as in the sample, without EOS and without leading whitespace-only tokens.
    other_name_ids: per other tool offered the ids of its name with the opening bracket, encoded in the same place (same
    leading space), because merges differ otherwise.

    K = the first token of the name, and for every other tool that shares a non-empty token prefix with the call, the
    first token after that prefix. A name that is itself a prefix of another one therefore gets its bracket as key
    token, also where the tokenizer merges brackets (`()`). A name equal to the called one decides nothing: skipped.
    """
    if not call_ids:
        return []
    key_positions = {0}
    for other_ids in other_name_ids:
        shared = 0
        while shared < min(len(call_ids), len(other_ids)) and call_ids[shared] == other_ids[shared]:
            shared += 1
        names_differ = shared < len(other_ids)  # shared == len: the same name up to and with its bracket
        if shared < len(call_ids) and names_differ:
            key_positions.add(shared)  # E3; nothing shared = 0, the first token, which is in K anyway
    return sorted(key_positions)


def key_token_weights(
    call_ids: Sequence[int], other_name_ids: Sequence[Sequence[int]], max_weight: float
) -> list[float]:
    """One weight per id of the call: `weigh_key_tokens` of `find_key_tokens`, which explain arguments and errors."""
    return weigh_key_tokens(find_key_tokens(call_ids, other_name_ids), len(call_ids), max_weight)


def weigh_key_tokens(key_positions: Sequence[int], n_ids: int, max_weight: float) -> list[float]:
    """One weight per id of a call of n_ids ids: `w = clip(|NK| / |K|, 1, max_weight)` for key tokens, else 1 (E4).

    |K| + |NK| = n_ids, so EOS is in neither set. max_weight: w_max, the paper takes 9.
    Raises ValueError when it is not a finite number >= 1.
    """
    if not (isfinite(max_weight) and max_weight >= 1):
        raise ValueError(f"max_weight: found {max_weight}, expected a finite number >= 1")
    if not key_positions:
        return [1.0] * n_ids
    n_normal = n_ids - len(key_positions)
    weight = min(max(n_normal / len(key_positions), 1.0), float(max_weight))  # E4
    weights = [1.0] * n_ids
    for position in key_positions:
        weights[position] = weight
    return weights
