"""Time and extra memory of our linear weighted cross-entropy over eager PyTorch (linear, F.cross_entropy, times w).

    python -m benchmarks.benchmark_loss                 # fp32, 2048 tokens, V = 32016, D = 512
    python -m benchmarks.benchmark_loss --dtype bfloat16

Both sides run forward and backward to the gradients of hidden and head. Time: one process, the two sides alternating,
median seconds and median of the pairs' ratios. Memory: one fresh process per row and side; peak resident size of the
first step above the resident size before it (after a small warm-up of the math library), gradients included.
Goal at 10 % trained rows: time <= 0.25, extra memory <= 0.30 of eager. Exit code 1 if missed (fp32).
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
    chosen = torch.randperm(args.tokens, generator=generator)[:round(args.tokens * percent / 100)]
    loss_weights_M[chosen] = 1.0 + 8.0 * torch.rand(len(chosen), generator=generator)
    return hidden_MD, head_weight_VD, target_ids_M, loss_weights_M


def eager_loss(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M):
    logits_MV = linear(hidden_MD, head_weight_VD)
    return (cross_entropy(logits_MV, target_ids_M, reduction="none") * loss_weights_M).sum()


SIDES = {"eager": eager_loss, "ours": linear_weighted_cross_entropy}


def run_step(loss_function, inputs) -> tuple[float, float]:
    """One forward and backward; (seconds, loss)."""
    inputs[0].grad = inputs[1].grad = None
    start = time.perf_counter()
    loss = loss_function(*inputs)
    (loss * INCOMING_GRADIENT).backward()
    return time.perf_counter() - start, loss.item()


def resident_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def measure_memory(args) -> int:
    """Bytes of the first step's peak above the resident size before it. Run in a fresh process."""
    inputs = make_inputs(args, args.percent)
    small = [torch.randn(64, 32, dtype=inputs[0].dtype, requires_grad=True) for _ in range(2)]
    run_step(SIDES[args.memory_of], (*small, torch.zeros(64, dtype=torch.long), torch.ones(64)))
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as peak_reset:
            peak_reset.write("5")  # the peak starts again from the present size
        before = resident_bytes("VmRSS")
        run_step(SIDES[args.memory_of], inputs)
        return resident_bytes("VmHWM") - before
    except OSError:  # not Linux, or not allowed: the peak since the start of the process
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run_step(SIDES[args.memory_of], inputs)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def memory_in_new_process(args, side: str, percent: float) -> int:
    command = [sys.executable, "-m", "benchmarks.benchmark_loss", "--memory_of", side, "--percent", str(percent)]
    for name in ("dtype", "tokens", "vocab_size", "dim", "seed", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_row(args, percent: float) -> dict:
    inputs = make_inputs(args, percent)
    for side in SIDES.values():  # warm-up
        run_step(side, inputs)
    seconds = {"eager": [], "ours": []}
    losses = {}
    for _ in range(args.repeats):
        for name, side in SIDES.items():
            duration, losses[name] = run_step(side, inputs)
            seconds[name].append(duration)
    memory = {name: memory_in_new_process(args, name, percent) for name in SIDES}
    return {
        "percent_trained": percent, "eager_seconds": statistics.median(seconds["eager"]),
        "ours_seconds": statistics.median(seconds["ours"]),
        "time_ratio": statistics.median(ours / eager for ours, eager in zip(seconds["ours"], seconds["eager"])),
        "eager_extra_mib": memory["eager"] / 2**20, "ours_extra_mib": memory["ours"] / 2**20,
        "memory_ratio": memory["ours"] / memory["eager"],
        "loss_relative_difference": abs(losses["ours"] - losses["eager"]) / abs(losses["eager"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of hidden and head")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of hidden states")
    parser.add_argument("--vocab_size", type=int, default=32016, help="rows of the head")
    parser.add_argument("--dim", type=int, default=512, help="model dimension")
    parser.add_argument("--repeats", type=int, default=9, help="timed pairs per row")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--memory_of", choices=list(SIDES), help="internal: print one side's extra bytes and stop")
    parser.add_argument("--percent", type=float, default=GOAL_PERCENT, help="internal: rows trained for --memory_of")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args))
        return 0
    print(f"{args.dtype}, {args.tokens} tokens, V {args.vocab_size}, D {args.dim}, {args.threads} threads, "
          f"torch {torch.__version__}, {args.repeats} alternating pairs")
    print("trained  eager s   ours s  time ratio  eager MiB  ours MiB  memory ratio  loss rel. diff")
    rows = []
    for percent in (5, 10, 20, 100):
        row = measure_row(args, percent)
        rows.append(row)
        print(f"{percent:6d}%  {row['eager_seconds']:7.3f}  {row['ours_seconds']:7.3f}  {row['time_ratio']:10.3f}  "
              f"{row['eager_extra_mib']:9.0f}  {row['ours_extra_mib']:8.0f}  {row['memory_ratio']:12.3f}  "
              f"{row['loss_relative_difference']:14.1e}", flush=True)
    goal_row = next(row for row in rows if row["percent_trained"] == GOAL_PERCENT)
    met = goal_row["time_ratio"] <= GOAL_TIME and goal_row["memory_ratio"] <= GOAL_MEMORY
    print(json.dumps({"benchmark": "loss", "dtype": args.dtype, "rows": rows, "goal_met": met}))
    return 0 if met or args.dtype != "float32" else 1


if __name__ == "__main__":
    sys.exit(main())
