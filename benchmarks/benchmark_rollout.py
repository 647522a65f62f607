"""Generated tokens per second: model.sampling.generate over transformers' generate, and one rollout phase.

    OMP_NUM_THREADS=1 python -m benchmarks.benchmark_rollout --clock cpu
    python -m benchmarks.benchmark_rollout --models tiny --repeats 9

All sides hold the same fp32 weights (saved by save_pretrained, loaded by transformers), continue the same random
prompts greedily by the same number of tokens (no end token), and take turns in one process; the figure is the median
of the rounds' ratios. Prefill is included on all sides; ours read DecodeWeights, packed once per model beforehand, as
PPO and run_eval do (the time is printed). On a machine with other work use `--clock cpu` with
OMP_NUM_THREADS=1: seconds of processor time, which waiting for the processor does not lengthen. Sides:
    hf       LlamaForCausalLM.generate (sdpa, inference mode, dynamic cache)
    default  generate with its default arguments, whose output does not depend on the batch
    fitted   rows_per_forward = batch size (output then belongs to that batch size); at batch 1 with weights for one row
Models: tiny (the bundled one) and 135m (random, 30 layers, D 576, 9 query and 3 key/value heads, V 49152, tied).
Goal, default over hf: tiny >= 2.0, 135m >= 1.6, at batch 1 and 8. Exit code 1 if missed.

Bandwidth share at batch 1: bytes of all parameters (each is read once per token), times tokens per second, over the
rate at which a sum reads a large tensor, measured in the same process. Prefill counts as time, so the share is a lower
bound.

Rollout: 64 prompts of 32 to 256 tokens; ours in one call, hf in batches of 8 padded on the left, in the given order.

Shape suffixes: B prompts of a batch, T tokens of the longest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from model.config import ModelConfig
from model.decode import DecodeWeights
from model.pretrained_weights import load_pretrained, save_pretrained
from model.sampling import RowDecoder, continue_prompts, generate
from model.transformer import Transformer

TINY_MODEL = Path(__file__).parents[1] / "assets" / "tiny_model"
CONFIG_135M = ModelConfig(
    vocab_size=49152,
    dim=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    ffn_dim=1536,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tie_embeddings=True,
    qkv_bias=False,
    max_positions=2048,
)
GOALS = {"tiny": 2.0, "135m": 1.6}
N_ROLLOUT, ROLLOUT_BATCH = 64, 8


# ---------------------------------------------------------------------------------------------------------------------
# Models and prompts


def make_model(name: str, seed: int) -> Transformer:
    if name == "tiny":
        return load_pretrained(TINY_MODEL).eval()
    model = Transformer(CONFIG_135M)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def make_models(name: str, seed: int) -> tuple[Transformer, torch.nn.Module]:
    """Ours and transformers' with the same weights."""
    from transformers import AutoModelForCausalLM

    model = make_model(name, seed)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model, peer.eval()


def random_prompts(lengths: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


# ---------------------------------------------------------------------------------------------------------------------
# Sides


@torch.inference_mode()
def transformers_generate(peer: torch.nn.Module, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy ids, padded on the left to the longest prompt."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out_BT = peer.generate(
        ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out_BT[:, longest:].tolist()


def our_generate(weights: DecodeWeights, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    return [ids for ids, _ in generate(weights, prompts, max_new_tokens=new_tokens, eos_id=None)]


def our_generate_fitted(weights: DecodeWeights, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """With as many rows per forward as there are prompts."""
    decoder = RowDecoder(
        weights,
        n_rows=len(prompts),
        max_tokens=max(map(len, prompts)) + new_tokens,
        max_new_tokens=new_tokens,
        stop_ids=(),
        temperature=0.0,
        rows_per_forward=len(prompts),
    )
    return [ids for ids, _ in continue_prompts(decoder, prompts)]


def read_rate(clock) -> float:
    """Bytes per second of a sum over 256 MB, best of 3."""
    numbers = torch.ones(64 * 2**20)
    best = float("inf")
    for _ in range(3):
        start = clock()
        numbers.sum()
        best = min(best, clock() - start)
    return 4 * len(numbers) / best


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def timed_rounds(sides: dict, repeats: int, clock) -> tuple[dict, dict]:
    """(seconds per side, list over rounds; ids of the warm-up)."""
    ids = {name: side() for name, side in sides.items()}
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            start = clock()
            side()
            seconds[name].append(clock() - start)
    return seconds, ids


def ratio(seconds: dict, name: str) -> float:
    return statistics.median(hf / own for hf, own in zip(seconds["hf"], seconds[name], strict=True))


def measure(args, name: str, models: tuple, batch: int, clock) -> dict:
    (model, peer), weights = models, DecodeWeights(models[0])
    fitted_weights = DecodeWeights(model, for_one_row=True) if batch == 1 else weights
    new_tokens = args.new_tokens if name == "tiny" else args.new_tokens_135m
    prompts = random_prompts([args.prompt_tokens] * batch, model.config.vocab_size, args.seed)
    seconds, ids = timed_rounds(
        {
            "hf": lambda: transformers_generate(peer, prompts, new_tokens),
            "default": lambda: our_generate(weights, prompts, new_tokens),
            "fitted": lambda: our_generate_fitted(fitted_weights, prompts, new_tokens),
        },
        args.repeats,
        clock,
    )
    speed = {side: batch * new_tokens / statistics.median(values) for side, values in seconds.items()}
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    limit = read_rate(clock) / n_bytes if batch == 1 else float("nan")  # tokens per second
    return {
        "model": name,
        "batch": batch,
        "tokens_per_second": speed,
        "ratio_over_hf": {side: ratio(seconds, side) for side in ("default", "fitted")},
        "bandwidth_share": {side: value / limit for side, value in speed.items()} if batch == 1 else None,
        "equal_rows": {
            side: sum(a == b for a, b in zip(ids[side], ids["hf"], strict=True)) for side in ("default", "fitted")
        },
    }


def measure_rollout(args, models: tuple, clock) -> dict:
    (model, peer), weights = models, DecodeWeights(models[0])
    generator = torch.Generator().manual_seed(args.seed)
    lengths = torch.randint(32, 257, (N_ROLLOUT,), generator=generator).tolist()
    prompts = random_prompts(lengths, model.config.vocab_size, args.seed)
    chunks = [prompts[i : i + ROLLOUT_BATCH] for i in range(0, N_ROLLOUT, ROLLOUT_BATCH)]
    seconds, _ = timed_rounds(
        {
            "hf": lambda: [transformers_generate(peer, chunk, args.new_tokens) for chunk in chunks],
            "default": lambda: our_generate(weights, prompts, args.new_tokens),
        },
        max(3, args.repeats // 2),
        clock,
    )
    return {
        "seconds": {side: statistics.median(values) for side, values in seconds.items()},
        "ratio_over_hf": ratio(seconds, "default"),
    }


def print_row(row: dict) -> None:
    speed, ratios = row["tokens_per_second"], row["ratio_over_hf"]
    share = row["bandwidth_share"] or {}
    print(
        f"{row['model']:6s} {row['batch']:5d}  {speed['hf']:8.1f}  {speed['default']:12.1f}  "
        f"{speed['fitted']:11.1f}  {ratios['default']:10.2f}  {ratios['fitted']:9.2f}  "
        f"{share.get('hf', float('nan')):8.2f}  {share.get('default', float('nan')):13.2f}  "
        f"{share.get('fitted', float('nan')):12.2f}  "
        f"{row['equal_rows']['default']}+{row['equal_rows']['fitted']} of {row['batch']}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,135m", help="comma-separated: tiny, 135m")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="generated tokens per prompt, tiny model")
    parser.add_argument("--new_tokens_135m", type=int, default=32, help="generated tokens per prompt, 135m")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds over the sides")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and prompts")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="wall time, or processor time")
    parser.add_argument("--rollout", choices=["on", "off"], default="on", help=f"time {N_ROLLOUT} prompts, tiny model")
    args = parser.parse_args()
    unknown = set(args.models.split(",")) - set(GOALS)
    if unknown:
        parser.error(f"--models: found {sorted(unknown)}, expected tiny or 135m")
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    print(
        f"{args.prompt_tokens} prompt tokens, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{args.repeats} alternating rounds, {args.clock} time; memory reads at {read_rate(clock) / 1e9:.1f} GB/s"
    )
    print(
        "model  batch  hf tok/s  default tok/s  fitted tok/s  default/hf  fitted/hf  hf share  default share  "
        "fitted share  equal rows"
    )
    rows, rollout = [], None
    for name in args.models.split(","):
        models = make_models(name, args.seed)
        start = clock()
        DecodeWeights(models[0])
        print(f"{name}: packed in {clock() - start:.2f} s")
        for batch in (1, 8):
            rows.append(measure(args, name, models, batch, clock))
            print_row(rows[-1])
        if name == "tiny" and args.rollout == "on":
            rollout = measure_rollout(args, models, clock)
            print(
                f"rollout of {N_ROLLOUT} prompts, {args.new_tokens} tokens each: hf {rollout['seconds']['hf']:.2f} s"
                f", default {rollout['seconds']['default']:.2f} s, default/hf {rollout['ratio_over_hf']:.2f}"
            )
    met = all(row["ratio_over_hf"]["default"] >= GOALS[row["model"]] for row in rows)
    print(json.dumps({"benchmark": "rollout", "rows": rows, "rollout": rollout, "goal_met": met}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
