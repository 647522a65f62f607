"""One row per trajectory against one row per turn (the released way), on real multi-turn data: tokens and seconds.

    python -m benchmarks.benchmark_single_pass --data ../shared/data/benchmarks/rotbench/Third_Turn/clean.json

The data is RoTBench's third turn (three assistant turns each); its ReAct text (`Action:`, `Action Input:`) is rendered
again as calls. The model is small and random; both ways run the same forward, backward and loss code on it, alternating
trajectory by trajectory in one process (A B A B ...). Tokens hold for any model, seconds for this one.

Shape suffixes: B batch (1: one packed row), T tokens, K trained tokens (weight above 0), D model dim.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from data.batches import PackedBatch, pack
from data.error_filter import ERROR_FILTERS
from data.json_records import DataError
from data.loss_weights import EncodedTrajectory, encode_trajectory
from data.tool_calls import ToolCall
from data.trajectories import Message, Trajectory, read_trajectories
from model.config import ModelConfig, ModelFolderError
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from tests.support.per_turn_rows import expand_per_turn
from train.weighted_cross_entropy import linear_weighted_cross_entropy

ROLES = {"user": "user", "function": "tool", "assistant": "assistant"}
DEFAULT_DATA = "../shared/data/benchmarks/rotbench/Third_Turn/clean.json"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_react_record(record: dict, source: str) -> Trajectory:
    """One RoTBench record as a trajectory; of several accepted last answers the first is taken. Raises DataError."""
    try:
        system, *rest = record["conversations"]
        listing = system["value"]
        tools, _ = json.JSONDecoder().raw_decode(listing[listing.index("\n[") + 1 :])
        messages = []
        for message in rest:
            role = ROLES[message["from"]]
            text = message["value"] if isinstance(message["value"], str) else message["value"][0]
            call = None
            if role == "assistant":
                head, arguments = text.split("Action Input:", 1)
                call = ToolCall(head.split("Action:", 1)[1].strip(), json.loads(arguments))
            messages.append(Message(role, "" if call else text.removesuffix("\nBegin!\n"), call))
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{source}: found {type(error).__name__} ({error}), expected a RoTBench record") from error
    return Trajectory(source, [{"type": "function", "function": tool} for tool in tools], messages, source)


def read_multi_turn(path: Path) -> list[Trajectory]:
    """RoTBench's file, or any file that data.trajectories reads."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}, expected RoTBench's Third_Turn/clean.json or a training file; give --data FILE"
        ) from error
    except ValueError:
        return read_trajectories(path)  # JSON lines
    if isinstance(records, list) and records and "from" in str(records[0].get("conversations", ""))[:200]:
        return [read_react_record(record, f"{path.name}#{index}") for index, record in enumerate(records)]
    return read_trajectories(path)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def random_model(vocab_size: int, dim: int, n_layers: int) -> Transformer:
    config = ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=n_layers,
        n_heads=dim // 32,
        n_kv_heads=dim // 32,
        head_dim=32,
        ffn_dim=8 * dim // 3,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        tie_embeddings=False,
        qkv_bias=False,
        max_positions=8192,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def forward_backward(model: Transformer, batches: Sequence[PackedBatch]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, weighted loss sum) of all batches; the gradients are discarded."""
    wall_start, cpu_start, loss_sum = time.perf_counter(), time.process_time(), 0.0
    for batch in batches:
        hidden_BTD = model(
            batch.input_ids_T[None],
            position_ids_BT=batch.position_ids_T[None],
            segment_lengths=batch.segment_lengths,
            return_hidden=True,
        )
        loss = linear_weighted_cross_entropy(
            hidden_BTD[0],
            model.head_weight(),
            batch.target_ids_T,
            batch.loss_weights_T,
            trained_index_K=batch.trained_index_K,
        )
        loss.backward()
        loss_sum += loss.item()
    wall_seconds, cpu_seconds = time.perf_counter() - wall_start, time.process_time() - cpu_start
    model.zero_grad(set_to_none=True)
    return wall_seconds, cpu_seconds, loss_sum


def count_tokens(rows: Sequence[EncodedTrajectory]) -> int:
    return sum(len(row) for row in rows)


def encode_both_ways(
    trajectories: Sequence[Trajectory], tokenizer: Tokenizer, error_filter: str
) -> list[tuple[EncodedTrajectory, list[EncodedTrajectory]]]:
    """(one row, rows per turn) of every trajectory that trains something."""
    settings = {
        "error_filter": error_filter,
        "key_tokens": True,
        "max_key_token_weight": 9.0,
        "loss_normalization": "turn_mean",
    }
    pairs = [
        (encode_trajectory(trajectory, tokenizer, **settings), expand_per_turn(trajectory, tokenizer, **settings))
        for trajectory in trajectories
    ]
    return [pair for pair in pairs if pair[0].trained_turns]


def print_token_counts(trajectories: Sequence[Trajectory], tokenizer: Tokenizer) -> None:
    for error_filter in ERROR_FILTERS:
        pairs = encode_both_ways(trajectories, tokenizer, error_filter)
        turns = [row for _, rows in pairs for row in rows]
        single, expanded = count_tokens([row for row, _ in pairs]), count_tokens(turns)
        print(
            f"error_filter {error_filter:<10}  {len(pairs)} trajectories, {len(turns)} trained turns: "
            f"{single} forward tokens in one pass, {expanded} per turn, ratio {expanded / single:.2f}"
        )


def print_seconds(
    pairs: Sequence[tuple[EncodedTrajectory, list[EncodedTrajectory]]], model: Transformer, repeats: int
) -> None:
    """Times both ways on the same trajectories, `repeats` times; ratios are formed inside a repeat."""
    one_pass = [[pack([row])] for row, _ in pairs]
    per_turn = [[pack([row]) for row in rows] for _, rows in pairs]
    forward_backward(model, one_pass[0])  # warm-up
    walls, cpus = [], []
    for _ in range(repeats):
        totals_a, totals_b = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        for batches_a, batches_b in zip(one_pass, per_turn, strict=True):  # A B A B: a drift of the machine hits both
            totals_a = [total + new for total, new in zip(totals_a, forward_backward(model, batches_a))]
            totals_b = [total + new for total, new in zip(totals_b, forward_backward(model, batches_b))]
        walls.append((totals_a[0], totals_b[0], totals_b[0] / totals_a[0]))
        cpus.append((totals_a[1], totals_b[1], totals_b[1] / totals_a[1]))
    tokens_a = count_tokens([row for row, _ in pairs])
    tokens_b = count_tokens([row for _, rows in pairs for row in rows])
    for kind, figures in (("wall", walls), ("CPU", cpus)):
        single, expanded, ratio = (median(column) for column in zip(*figures))
        print(
            f"  {kind:<4} one pass {single:.2f} s, per turn {expanded:.2f} s, ratio {ratio:.2f} "
            f"({min(f[2] for f in figures):.2f} to {max(f[2] for f in figures):.2f})"
        )
    print(
        f"  tokens {tokens_a} and {tokens_b}, ratio {tokens_b / tokens_a:.2f}; "
        f"summed losses {totals_a[2]:.6f} and {totals_b[2]:.6f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(DEFAULT_DATA), help="RoTBench's Third_Turn or training file")
    parser.add_argument("--tokenizer", default="assets/tiny_model", help="model folder or tokenizer file")
    parser.add_argument("--error_filter", choices=ERROR_FILTERS, default="structured", help="filter of the timed rows")
    parser.add_argument("--limit", type=int, default=8, help="trajectories that are timed")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each way")
    parser.add_argument("--dim", type=int, default=128, help="width of the random model, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4, help="depth of the random model")
    arguments = parser.parse_args()
    try:
        trajectories = read_multi_turn(arguments.data)
        tokenizer = load_tokenizer(arguments.tokenizer)
    except (DataError, ModelFolderError) as error:
        print(error, file=sys.stderr)
        return 2
    print_token_counts(trajectories, tokenizer)
    pairs = encode_both_ways(trajectories, tokenizer, arguments.error_filter)[: arguments.limit]
    print(
        f"forward + backward, error_filter {arguments.error_filter}, {len(pairs)} trajectories, dim {arguments.dim}, "
        f"{arguments.layers} layers, fp32, {torch.get_num_threads()} thread(s), median of {arguments.repeats}:"
    )
    print_seconds(pairs, random_model(tokenizer.vocab_size, arguments.dim, arguments.layers), arguments.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
