"""The index ledger: which number of a response belongs to which token, one row per position (`--print_ledger`).

    position  token       mask    logprob         KL     reward      value  advantage     return

Everything in a row belongs to the token of that row: its log-probability, the reward for choosing it, and the value
V(state before it), which the model computes one position further left. The score is in the reward of the last row.
"""

from collections.abc import Sequence

from model.tokenizer import Tokenizer

SHOWN_PROMPT_TOKENS = 2
TOKEN_WIDTH = 18
COLUMNS = ("logprob", "KL", "reward", "value", "advantage", "return")
# The rewards are fp32 and so is their sum over some hundred tokens; a wrong coefficient or index is off by far more.
TOLERANCE = 1e-4


def format_ledger(
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    tokenizer: Tokenizer,
    logprobs: Sequence[float],
    ref_logprobs: Sequence[float],
    rewards: Sequence[float],
    values: Sequence[float],
    advantages: Sequence[float],
    returns: Sequence[float],
    score: float,
    mask: Sequence[bool],
    kl_coef: float,
) -> str:
    """An ASCII table of one response and two lines that check it; `prompt_ids` is the whole prompt, its end is shown.

    All sequences but prompt_ids have one entry per response token. logprobs in nats at the sampling temperature, KL is
    k1 = logprob - ref_logprob of that token (E24), score the reward before KL. The checks are: the rewards add up to
    score - kl_coef * KL, and the score sits at the last token of the mask. Raises ValueError for other lengths.
    """
    columns = {
        "mask": mask,
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "rewards": rewards,
        "values": values,
        "advantages": advantages,
        "returns": returns,
    }
    for name, column in columns.items():
        if len(column) != len(response_ids):
            raise ValueError(f"{name}: found {len(column)} entries, expected {len(response_ids)}, one per token")
    lines = [f"{'position':>8}  {'token':<{TOKEN_WIDTH}}{'mask':>4}" + "".join(f"{name:>11}" for name in COLUMNS)]
    first_shown = max(0, len(prompt_ids) - SHOWN_PROMPT_TOKENS)
    for position in range(first_shown, len(prompt_ids)):
        lines.append(_row(position, prompt_ids[position], tokenizer, False, ()))
    kls = [logprob - ref_logprob for logprob, ref_logprob in zip(logprobs, ref_logprobs, strict=True)]
    numbers = zip(logprobs, kls, rewards, values, advantages, returns, strict=True)
    for index, row_numbers in enumerate(numbers):
        lines.append(_row(len(prompt_ids) + index, response_ids[index], tokenizer, bool(mask[index]), row_numbers))
    valid = [index for index in range(len(response_ids)) if mask[index]]
    if not valid:
        return "\n".join([*lines, "no response token: no score, no reward"])
    return "\n".join([*lines, *_checks(valid, len(prompt_ids), response_ids, tokenizer, kls, rewards, score, kl_coef)])


def _row(position: int, token_id: int, tokenizer: Tokenizer, is_valid: bool, numbers: Sequence[float]) -> str:
    cells = "".join(f"{number:>11.4f}" for number in numbers) if is_valid else f"{'-':>11}" * len(COLUMNS)
    return f"{position:>8}  {_shown_piece(token_id, tokenizer):<{TOKEN_WIDTH}}{int(is_valid):>4}{cells}"


def _shown_piece(token_id: int, tokenizer: Tokenizer) -> str:
    """The token's text, quoted, in ASCII, cut to the width of its column."""
    piece = tokenizer.piece(token_id)
    room = TOKEN_WIDTH - 1
    for length in range(len(piece), -1, -1):
        shown = ascii(piece[:length] + ("" if length == len(piece) else "..."))
        if len(shown) <= room:
            return shown
    raise AssertionError("an empty piece fits")


def _checks(
    valid: Sequence[int],
    n_prompt: int,
    response_ids: Sequence[int],
    tokenizer: Tokenizer,
    kls: Sequence[float],
    rewards: Sequence[float],
    score: float,
    kl_coef: float,
) -> list[str]:
    """Where the score sits, and whether it and the KL explain the rewards: of the last token alone, and of all."""
    last = valid[-1]
    kind = "EOS" if response_ids[last] == tokenizer.eos_id else "the last generated token, no EOS"
    found_score = rewards[last] + kl_coef * kls[last]
    total, kl = sum(rewards[index] for index in valid), sum(kls[index] for index in valid)
    return [
        f"score {score:+.4f} sits at position {n_prompt + last} ({kind}): {_verdict(found_score - score)}",
        f"sum of rewards {total:+.4f} = score {score:+.4f} - kl_coef {kl_coef:g} * KL {kl:+.4f}: "
        + _verdict(total - (score - kl_coef * kl)),
    ]


def _verdict(difference: float) -> str:
    return "checked" if abs(difference) <= TOLERANCE else f"WRONG, off by {difference:+.4f}"
