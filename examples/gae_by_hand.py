"""One response of three tokens, from log-probabilities to advantages, by hand and by the code of the PPO loop.

    python examples/gae_by_hand.py

Shape suffixes: B responses, R response tokens.
docs/math.md has the same response ("Which number belongs to which token"). Output:

    token    logprob     ref      KL   reward    value    delta  advantage  compute_gae   return
    get       -0.500  -0.700   0.200   -0.020    0.300    0.180      0.674        0.674    0.974
    ()        -1.000  -0.600  -0.400    0.040    0.500    0.140      0.520        0.520    1.020
    </s>      -0.200  -0.200   0.000    1.000    0.600    0.400      0.400        0.400    1.000
    advantage of get by hand: 1 * 0.180 + 0.95 * 0.140 + 0.9025 * 0.400 = 0.674

    Where the score +1 goes (rewards with kl_coef 0; a dot is a slot outside the mask):
    ends at once             +1.0     .     .     .
    ends                     +0.0  +0.0  +1.0     .
    cut off at the limit     +0.0  +0.0  +0.0  +1.0
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder
from rl.advantages import compute_gae, kl_shaped_rewards

TOKENS = ["get", "()", "</s>"]
LOGPROBS, REF_LOGPROBS, VALUES = [-0.5, -1.0, -0.2], [-0.7, -0.6, -0.2], [0.3, 0.5, 0.6]
SCORE, KL_COEF, GAMMA, GAE_LAMBDA = 1.0, 0.1, 1.0, 0.95


def main() -> None:
    # By hand: E24 and E25 as docs/math.md writes them.
    kls = [logprob - ref for logprob, ref in zip(LOGPROBS, REF_LOGPROBS, strict=True)]
    rewards = [-KL_COEF * kl for kl in kls]
    rewards[-1] += SCORE  # on the last token, not after it
    next_values = [*VALUES[1:], 0.0]  # the value after the end is 0
    deltas = [reward + GAMMA * after - value for reward, after, value in zip(rewards, next_values, VALUES, strict=True)]
    factor = GAMMA * GAE_LAMBDA
    by_hand = [sum(factor ** (k - t) * deltas[k] for k in range(t, 3)) for t in range(3)]

    # By the code: (B, R) tensors, here one response that fills all slots.
    mask_BR = torch.ones(1, 3, dtype=torch.bool)
    rewards_BR = kl_shaped_rewards(
        torch.tensor([SCORE]), torch.tensor([LOGPROBS]), torch.tensor([REF_LOGPROBS]), mask_BR, KL_COEF
    )
    advantages_BR, returns_BR = compute_gae(rewards_BR, torch.tensor([VALUES]), mask_BR, GAMMA, GAE_LAMBDA)
    torch.testing.assert_close(rewards_BR, torch.tensor([rewards]))
    torch.testing.assert_close(advantages_BR, torch.tensor([by_hand]))

    print(
        f"{'token':<6}{'logprob':>10}{'ref':>8}{'KL':>8}{'reward':>9}{'value':>9}{'delta':>9}"
        f"{'advantage':>11}{'compute_gae':>13}{'return':>9}"
    )
    columns = zip(
        TOKENS,
        LOGPROBS,
        REF_LOGPROBS,
        kls,
        rewards,
        VALUES,
        deltas,
        by_hand,
        advantages_BR[0].tolist(),
        returns_BR[0].tolist(),
        strict=True,
    )
    for token, logprob, ref, kl, reward, value, delta, advantage, same, gae_return in columns:
        print(
            f"{token:<6}{logprob:>10.3f}{ref:>8.3f}{kl:>8.3f}{reward:>9.3f}{value:>9.3f}{delta:>9.3f}"
            f"{advantage:>11.3f}{same:>13.3f}{gae_return:>9.3f}"
        )
    terms = " + ".join(f"{factor**k:.4g} * {delta:.3f}" for k, delta in enumerate(deltas))
    print(f"advantage of {TOKENS[0]} by hand: {terms} = {by_hand[0]:.3f}")

    print("\nWhere the score +1 goes (rewards with kl_coef 0; a dot is a slot outside the mask):")
    zeros_BR = torch.zeros(1, 4)
    for name, length in (("ends at once", 1), ("ends", 3), ("cut off at the limit", 4)):
        mask_BR = torch.arange(4)[None] < length
        rewards_BR = kl_shaped_rewards(torch.tensor([SCORE]), zeros_BR, zeros_BR, mask_BR, 0.0)
        cells = (f"{reward:+.1f}" if t < length else "." for t, reward in enumerate(rewards_BR[0].tolist()))
        print(f"{name:<23}" + "".join(f"{cell:>6}" for cell in cells))


if __name__ == "__main__":
    main()
