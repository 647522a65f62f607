"""The numbers of docs/critical_reading.md: what the paper's theorems, weights and rewards do, computed by the product.

    python examples/critical_numbers.py                               # bundled data and base model, under a minute
    python examples/critical_numbers.py --model runs/sft/final        # the gradients of another model

Each section prints the lines that the page quotes; tests/test_critical_reading.py computes the cheap ones again.

Shape suffixes: B batch (1: one packed row), T positions, M rows, K trained ones, V vocabulary.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder
from data.batches import PackedBatch, epoch_order, pack
from data.error_filter import decide_masked_turns
from data.key_tokens import weigh_key_tokens
from data.loss_weights import LOSS_NORMALIZATIONS, EncodedTrajectory, encode_trajectory, scale_turn
from data.trajectories import Trajectory, read_trajectories
from eval.confidence import Z_95, wilson_interval
from examples.draw_figures import TINY_MODEL, TRAIN_DATA
from model.pretrained_weights import load_pretrained
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from rl.reward import REWARDS, parameter_reward
from train.weighted_cross_entropy import linear_weighted_cross_entropy, weighted_cross_entropy

BATCHES, BATCH_SIZE, MAX_GRAD_NORM = 15, 4, 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Theorem 1


def fitted_shares(weights_M: torch.Tensor, targets_M: torch.Tensor) -> list[float]:
    """The distribution over the targets that minimises the weighted loss (E1) when all rows have one context."""
    logits_V = torch.zeros(int(targets_M.max()) + 1, dtype=torch.float64, requires_grad=True)
    for _ in range(100):  # a step of 2 is below 2 / (largest curvature), which is 1 / 2
        loss = weighted_cross_entropy(logits_V.expand(len(targets_M), -1), targets_M, weights_M) / weights_M.sum()
        (gradient_V,) = torch.autograd.grad(loss, logits_V)
        with torch.no_grad():
            logits_V -= 2 * gradient_V
    return logits_V.detach().softmax(0).tolist()


def choices_with_flaky_tool() -> tuple[float, float]:
    """(without, with MAE) probability of the right tool, which a teacher takes in 6 of 10 cases; half of them time out.

    The other tool is wrong, but always answers.
    """
    targets_M = torch.tensor([0] * 6 + [1] * 4)
    everything_M, masked_M = torch.ones(10), torch.tensor([1.0] * 3 + [0.0] * 3 + [1.0] * 4)
    return fitted_shares(everything_M, targets_M)[0], fitted_shares(masked_M, targets_M)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Theorem 2


def choices_between_lengths(short: int, long: int) -> dict[tuple[str, str], float]:
    """(normalisation, "plain" or "PKT") -> fitted probability of the long call where data has both equally often.

    short, long: tokens of the two calls, whose first tokens differ: one key token each. EOS is added.
    """
    found = {}
    for normalization, (name, w_max) in product(LOSS_NORMALIZATIONS, (("plain", 1.0), ("PKT", 9.0))):
        first_tokens = []
        for n_ids in (short, long):
            weights, _ = scale_turn([*weigh_key_tokens([0], n_ids, w_max), 1.0], normalization)
            first_tokens.append(weights[0])
        found[normalization, name] = fitted_shares(torch.tensor(first_tokens), torch.tensor([0, 1]))[1]
    return found


def encode(trajectories: Sequence[Trajectory], normalization: str, key_tokens: bool) -> list[EncodedTrajectory]:
    """Rows with MAE, and PKT where asked for."""
    tokenizer = load_tokenizer(TINY_MODEL)
    return [
        encode_trajectory(
            each,
            tokenizer,
            error_filter="structured",
            key_tokens=key_tokens,
            max_key_token_weight=9.0,
            loss_normalization=normalization,
        )
        for each in trajectories
    ]


def hidden_of_trained(model: Transformer, batch: PackedBatch) -> torch.Tensor:
    """Hidden states of the trained positions, (K, hidden size)."""
    hidden = model(
        batch.input_ids_T[None],
        position_ids_BT=batch.position_ids_T[None],
        segment_lengths=batch.segment_lengths,
        return_hidden=True,
    )
    return hidden[0][batch.trained_index_K]


@torch.no_grad()
def key_tokens_outweighed(model: Transformer, rows: Sequence[EncodedTrajectory]) -> tuple[int, int, float, float]:
    """(key tokens, those whose gradient is smaller, times w, than the largest of another token of their call times 1,
    mean loss of key tokens, of others), in nats; the gradient is that of the logits (E10). Rows have unscaled weights.
    """
    n_key, n_smaller, key_losses, other_losses = 0, 0, [], []
    for row in rows:
        batch = pack([row])
        logits_KV = hidden_of_trained(model, batch) @ model.head_weight().T
        targets_K = batch.target_ids_T[batch.trained_index_K]
        errors_KV = logits_KV.softmax(1) - torch.nn.functional.one_hot(targets_K, logits_KV.shape[1])
        norms_K = errors_KV.norm(dim=1) * batch.loss_weights_T[batch.trained_index_K]
        losses_K = torch.nn.functional.cross_entropy(logits_KV, targets_K, reduction="none")
        turns: dict[int, list[int]] = {}
        for k, position in enumerate(batch.trained_index_K.tolist()):
            turns.setdefault(row.message_indices[position], []).append(k)
        classes = [row.token_classes[position] for position in batch.trained_index_K.tolist()]
        for turn in turns.values():
            largest = max(norms_K[k] for k in turn if classes[k] != "key")
            for k in turn:
                is_key = classes[k] == "key"
                (key_losses if is_key else other_losses).append(losses_K[k].item())
                n_key += is_key
                n_smaller += is_key and bool(norms_K[k] < largest)
    return n_key, n_smaller, statistics.mean(key_losses), statistics.mean(other_losses)


# ---------------------------------------------------------------------------------------------------------------------
# Norms and clipping


def batch_gradient(model: Transformer, rows: Sequence[EncodedTrajectory]) -> torch.Tensor:
    """The gradient of one step for all parameters, as one vector, before clipping."""
    batch = pack(rows)
    loss = linear_weighted_cross_entropy(
        hidden_of_trained(model, batch),
        model.head_weight(),
        batch.target_ids_T[batch.trained_index_K],
        batch.loss_weights_T[batch.trained_index_K],
    )
    gradients = torch.autograd.grad(loss / (batch.denominator or 1.0), list(model.parameters()))
    return torch.cat([each.flatten() for each in gradients]).double()


def gradient_figures(model: Transformer, trajectories: Sequence[Trajectory]) -> dict[tuple[str, str], list[float]]:
    """Lists with one figure per batch: ("norm", normalisation), ("norm_plain", normalisation),
    ("cosine", normalisation) of the gradients with and without PKT, ("to_sum", normalisation) of it and `sum`."""
    order = epoch_order(len(trajectories), 0, 0)[: BATCHES * BATCH_SIZE]
    chosen = [trajectories[index] for index in order]
    weighted = {name: encode(chosen, name, True) for name in LOSS_NORMALIZATIONS}
    plain = {name: encode(chosen, name, False) for name in LOSS_NORMALIZATIONS}
    figures: dict[tuple[str, str], list[float]] = {}
    for start in range(0, len(chosen), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        with_pkt = {name: batch_gradient(model, rows[part]) for name, rows in weighted.items()}
        for name, rows in plain.items():
            without = batch_gradient(model, rows[part])
            for figure, value in (
                ("norm", with_pkt[name].norm()),
                ("norm_plain", without.norm()),
                ("cosine", torch.cosine_similarity(with_pkt[name], without, 0)),
                ("to_sum", torch.cosine_similarity(with_pkt[name], with_pkt["sum"], 0)),
            ):
                figures.setdefault((figure, name), []).append(value.item())
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Weights, filters, rewards, the paper's tables


def weights_of_calls(rows: Sequence[EncodedTrajectory]) -> Counter:
    """How many calls have the weight 1, one between, or 9; and how many have 1, 2, .. key tokens. Unscaled rows."""
    found = Counter()
    for row in rows:
        weights_of_turn: dict[int, list[float]] = {}
        for position, name in enumerate(row.token_classes):
            if name == "key":
                weights_of_turn.setdefault(row.message_indices[position], []).append(row.loss_weights[position])
        for weights in weights_of_turn.values():
            found["w = 1" if weights[0] == 1 else "w = 9" if weights[0] == 9 else "1 < w < 9"] += 1
            found[f"{len(weights)} key tokens"] += 1
    return found


def filter_agreement(trajectories: Sequence[Trajectory]) -> Counter:
    """Turns by (masked by the released substrings?, masked by ours?)."""
    found = Counter()
    for each in trajectories:
        for released, ours in zip(*(decide_masked_turns(each, name) for name in ("substring", "structured"))):
            found[released.masked, ours.masked] += 1
    return found


def below_wrong_tool() -> list[tuple[str, ...]]:
    """The sets of parameter faults of the right tool that score less than a wrong tool."""
    kinds = ("hallucinated", "redundant", "missing")
    found = []
    for present in product((False, True), repeat=3):
        names = [("x",) if each else () for each in present]
        if parameter_reward(*names) < REWARDS["wrong_tool"]:
            found.append(tuple(kind for kind, each in zip(kinds, present) if each))
    return found


def kl_gradients() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for the logits of one choice among three tokens, by enumeration: of the KL itself, of k1 as a constant
    in the reward (score function), and through k1 of the samples."""
    logits_V = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    reference_V = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    logprobs_V = logits_V.log_softmax(0)
    k1_V, chances_V = logprobs_V - reference_V, logprobs_V.exp()
    sums = (
        (chances_V * k1_V).sum(),
        (chances_V.detach() * logprobs_V * k1_V.detach()).sum(),
        (chances_V.detach() * k1_V).sum(),
    )
    return tuple(torch.autograd.grad(each, logits_V, retain_graph=True)[0] for each in sums)


TABLE_5 = {  # records of RoTBench (105) and ToolAlpaca (114), the paper's percentages as counts
    "RoTBench TS": (105, {"standard SFT": 80, "PKT": 87, "all": 88}),
    "RoTBench PI": (105, {"standard SFT": 58, "PKT": 67, "all": 57}),
    "ToolAlpaca PI": (114, {"standard SFT": 80, "MAE": 74, "all": 89}),
    "ToolAlpaca CF": (114, {"standard SFT": 49, "IRM": 65, "all": 66}),
}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def report(model: Transformer, trajectories: Sequence[Trajectory]) -> list[str]:
    """The lines of all sections."""
    without, with_mae = choices_with_flaky_tool()
    lines = [f"flaky right tool: p = {without:.3f} without MAE, {with_mae:.3f} with MAE"]
    for (normalization, name), share in choices_between_lengths(4, 30).items():
        lines.append(f"equally frequent calls of 4 and 30 tokens, {normalization}, {name}: p(long) = {share:.3f}")
    unscaled = encode(trajectories, "sum", True)
    order = epoch_order(len(trajectories), 0, 0)[: BATCHES * BATCH_SIZE]
    n_key, n_smaller, key_loss, other_loss = key_tokens_outweighed(model, [unscaled[index] for index in order])
    lines.append(f"key tokens with a smaller weighted gradient than another token of the call: {n_smaller} of {n_key}")
    lines.append(f"mean loss: key tokens {key_loss:.3f}, other trained tokens {other_loss:.3f} nats")
    for (figure, name), values in gradient_figures(model, trajectories).items():
        spread = f"median {statistics.median(values):.3g}, from {min(values):.3g} to {max(values):.3g}"
        clipped = f", {sum(value > MAX_GRAD_NORM for value in values)} of {len(values)} clipped"
        lines.append(f"{figure} {name}: {spread}{clipped if figure.startswith('norm') else ''}")
    lines.append(f"calls: {dict(sorted(weights_of_calls(unscaled).items()))}")
    agreement = filter_agreement(trajectories)
    lines.append(
        f"turns masked by both filters {agreement[True, True]}, by the released one alone {agreement[True, False]}, "
        f"by ours alone {agreement[False, True]}, by neither {agreement[False, False]}"
    )
    lines.append(f"right tool below wrong tool: {below_wrong_tool()}")
    for name, gradient_V in zip(("of the KL", "k1 in the reward", "through k1"), kl_gradients()):
        lines.append(f"gradient {name}: " + " ".join(f"{value:+.4f}" for value in gradient_V))
    for name, (n, counts) in TABLE_5.items():
        for row, count in counts.items():
            low, high = wilson_interval(count, n, Z_95)
            lines.append(f"Table 5, {name}, {row}: {count} of {n} [{100 * low:.1f}, {100 * high:.1f}]")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compute the numbers of docs/critical_reading.md.")
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder of the model whose gradients are measured")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("\n".join(report(load_pretrained(flags.model), read_trajectories(TRAIN_DATA))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
