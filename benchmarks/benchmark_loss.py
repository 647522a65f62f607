"""Time and extra memory of our linear weighted cross-entropy over eager PyTorch and torch's F.linear_cross_entropy.

    python -m benchmarks.benchmark_loss                 # fp32, 2048 tokens, V = 32016, D = 512
    python -m benchmarks.benchmark_loss --dtype bfloat16 --tokens 512

Sides, each forward and backward to the gradients of hidden and head:
    eager        linear, F.cross_entropy(reduction="none"), times w
    eager_drop   the same on the rows with weight != 0 only
    fused        F.linear_cross_entropy(reduction="none") in chunks of --peer_chunk rows, times w (it knows no weight
                 per token, and its default chunks get tiny when few rows are left)
    fused_drop   the same on the rows with weight != 0 only
    ours         train/weighted_cross_entropy.py
Time: one process, the sides in turn, median seconds and median of the rounds' ratios. Memory: one fresh process per row
and side; peak resident size of the first step above the resident size before it (after a small warm-up of the math
library), gradients included. On a machine with other work use `--clock cpu --threads 1`: seconds of processor time.
Goal at 10 % trained rows: time <= 0.25, extra memory <= 0.30 of eager. Exit code 1 if missed (fp32).

Shape suffixes: M tokens, K trained tokens (weight above 0), D model dim, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.functional import cross_entropy, linear

try:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy
except ImportError:  # an older torch: the sides `fused` are left out
    linear_cross_entropy = None

from train.weighted_cross_entropy import linear_weighted_cross_entropy

GOAL_PERCENT, GOAL_TIME, GOAL_MEMORY = 10, 0.25, 0.30
INCOMING_GRADIENT = 1 / 7  # the training loop divides by a global denominator, so the factor is never 1


def make_inputs(args, percent: float):
    """Random hidden (M, D), head (V, D), targets (M,), weights (M,) with `percent` of the rows trained."""
    generator = torch.Generator().manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    hidden_MD = torch.randn(args.tokens, args.dim, generator=generator).to(dtype).requires_grad_()
    head_weight_VD = (torch.randn(args.vocab_size, args.dim, generator=generator) * 0.02).to(dtype).requires_grad_()
    target_ids_M = torch.randint(0, args.vocab_size, (args.tokens,), generator=generator)
    loss_weights_M = torch.zeros(args.tokens)
    chosen = torch.randperm(args.tokens, generator=generator)[: round(args.tokens * percent / 100)]
    loss_weights_M[chosen] = 1.0 + 8.0 * torch.rand(len(chosen), generator=generator)
    return hidden_MD, head_weight_VD, target_ids_M, loss_weights_M


def eager_loss(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, _):
    logits_MV = linear(hidden_MD, head_weight_VD)
    return (cross_entropy(logits_MV, target_ids_M, reduction="none") * loss_weights_M).sum()


def fused_loss(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, peer_chunk):
    options = LinearCrossEntropyOptions(batch_chunk_size=peer_chunk, chunking_method=None)
    rows_M = linear_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, reduction="none", options=options)
    return (rows_M * loss_weights_M).sum()


def dropped(loss_function):
    def on_trained_rows(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, peer_chunk):
        index_K = loss_weights_M.nonzero().squeeze(1)
        return loss_function(
            hidden_MD[index_K], head_weight_VD, target_ids_M[index_K], loss_weights_M[index_K], peer_chunk
        )

    return on_trained_rows


def our_loss(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, _):
    return linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M)


SIDES = {"eager": eager_loss, "eager_drop": dropped(eager_loss)}
if linear_cross_entropy is not None:
    SIDES |= {"fused": fused_loss, "fused_drop": dropped(fused_loss)}
SIDES["ours"] = our_loss
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def run_step(loss_function, inputs, args) -> tuple[float, float]:
    """One forward and backward; (seconds, loss)."""
    inputs[0].grad = inputs[1].grad = None
    clock = CLOCKS[args.clock]
    start = clock()
    loss = loss_function(*inputs, args.peer_chunk)
    (loss * INCOMING_GRADIENT).backward()
    return clock() - start, loss.item()


def resident_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def measure_memory(args) -> int:
    """Bytes of the first step's peak above the resident size before it. Run in a fresh process."""
    inputs = make_inputs(args, args.percent)
    small = [torch.randn(64, 32, dtype=inputs[0].dtype, requires_grad=True) for _ in range(2)]
    run_step(SIDES[args.memory_of], (*small, torch.zeros(64, dtype=torch.long), torch.ones(64)), args)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as peak_reset:
            peak_reset.write("5")  # the peak starts again from the present size
        before = resident_bytes("VmRSS")
        run_step(SIDES[args.memory_of], inputs, args)
        return resident_bytes("VmHWM") - before
    except OSError:  # not Linux, or not allowed: the peak since the start of the process
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run_step(SIDES[args.memory_of], inputs, args)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def memory_in_new_process(args, side: str, percent: float) -> int:
    command = [sys.executable, "-m", "benchmarks.benchmark_loss", "--memory_of", side, "--percent", str(percent)]
    for name in ("dtype", "tokens", "vocab_size", "dim", "seed", "threads", "peer_chunk"):
        command += [f"--{name}", str(getattr(args, name))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_row(args, percent: float) -> dict:
    """Per side: median seconds, extra MiB, and medians of ours over it; losses relative to eager's."""
    inputs = make_inputs(args, percent)
    sides = {name: SIDES[name] for name in args.sides.split(",")}
    for side in sides.values():  # warm-up
        run_step(side, inputs, args)
    seconds, losses = {name: [] for name in sides}, {}
    for _ in range(args.repeats):
        for name, side in sides.items():
            duration, losses[name] = run_step(side, inputs, args)
            seconds[name].append(duration)
    memory = {name: memory_in_new_process(args, name, percent) for name in sides}
    return {
        "percent_trained": percent,
        "sides": {
            name: {
                "seconds": statistics.median(seconds[name]),
                "extra_mib": memory[name] / 2**20,
                "time_ratio": statistics.median(
                    ours / its for ours, its in zip(seconds["ours"], seconds[name], strict=True)
                ),
                "memory_ratio": memory["ours"] / memory[name],
                "loss_relative_difference": abs(losses[name] - losses["eager"]) / abs(losses["eager"]),
            }
            for name in sides
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of hidden and head")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of hidden states")
    parser.add_argument("--vocab_size", type=int, default=32016, help="rows of the head")
    parser.add_argument("--dim", type=int, default=512, help="model dimension")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds per row")
    parser.add_argument("--percents", default="5,10,20,100", help="shares of rows trained, with commas")
    parser.add_argument("--sides", default=",".join(SIDES), help="with commas; eager and ours are always needed")
    parser.add_argument("--peer_chunk", type=int, default=256, help="rows per chunk of F.linear_cross_entropy")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: seconds of processor time")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--memory_of", choices=list(SIDES), help="internal: print one side's extra bytes and stop")
    parser.add_argument("--percent", type=float, default=GOAL_PERCENT, help="internal: rows trained for --memory_of")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args))
        return 0
    print(
        f"{args.dtype}, {args.tokens} tokens, V {args.vocab_size}, D {args.dim}, {args.threads} threads, "
        f"{args.clock} clock, torch {torch.__version__}, {args.repeats} rounds"
    )
    print("trained  side        seconds  ours over it  extra MiB  ours over it  loss rel. diff")
    rows = []
    for percent in map(float, args.percents.split(",")):
        rows.append(measure_row(args, percent))
        for name, side in rows[-1]["sides"].items():
            print(
                f"{percent:6g}%  {name:10}  {side['seconds']:7.3f}  {side['time_ratio']:12.3f}  "
                f"{side['extra_mib']:9.0f}  {side['memory_ratio']:12.3f}  {side['loss_relative_difference']:14.1e}",
                flush=True,
            )
    goal = next((row["sides"]["eager"] for row in rows if row["percent_trained"] == GOAL_PERCENT), None)
    met = goal is None or (goal["time_ratio"] <= GOAL_TIME and goal["memory_ratio"] <= GOAL_MEMORY)
    print(json.dumps({"benchmark": "loss", "dtype": args.dtype, "rows": rows, "goal_met": met}))
    return 0 if met or args.dtype != "float32" else 1


if __name__ == "__main__":
    sys.exit(main())
