"""Our CUDA kernels against their roof, and the loss against its peers on a CUDA device. NOT YET RUN BY US: no machine
of ours has such a device, so this repository has no figure from it.

    python -m benchmarks.benchmark_loss_cuda                      # needs a CUDA device
    python -m benchmarks.benchmark_loss_cuda --tokens 65536 --dtypes bfloat16,float32
    python -m benchmarks.benchmark_loss_cuda --device cpu --tokens 64 --dim 32 --vocab_size 500  # only tries the script

Part 1, the roof: a kernel reads and writes each logit once, so it can take no less time than a copy of the logits from
device to device, which is timed too. Printed: GB/s by that count (2 * size of a logit; 3 * for the streaming
kernel), and the share of the copy's rate.
Part 2, the loss: forward and backward to the gradients of hidden and head, sides as in benchmarks/benchmark_loss.py,
eager in fp32 too (what most code does), F.linear_cross_entropy with default and with fixed chunks, ours through both
backends. Ours gets the index of trained rows from the host, as from data/batches.py; a peer's row drop uses it too.
Each time is the median over --repeats of CUDA events around one call, after --warmup calls, the L2 cache flushed before
each; memory is the peak of torch's allocator above what was allocated before the call.

Shape suffixes: M tokens, K trained tokens (weight above 0), C rows of logits, D model dim, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

try:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy
except ImportError:  # an older torch: the sides `fused` are left out
    linear_cross_entropy = None

from train.cuda.launch import DTYPES, STREAM_THREADS, choose_kernel, choose_loss_backend, cuda_row_cross_entropy
from train.cuda.runtime import nvrtc_version
from train.weighted_cross_entropy import linear_weighted_cross_entropy

INCOMING_GRADIENT = 1 / 7  # as in benchmark_loss
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def median_seconds(call: Callable[[], object], args) -> float:
    """Of one call on the device (of the host on the CPU)."""
    flush = torch.empty(FLUSH_BYTES if args.device == "cuda" else 1, dtype=torch.int8, device=args.device)
    for _ in range(args.warmup):
        call()
    seconds = []
    for _ in range(args.repeats):
        flush.zero_()
        if args.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def extra_mib(call: Callable[[], object], args) -> float:
    """Peak of the allocator during one call, above what was allocated before."""
    if args.device != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Part 1: the roof


def roof_rates(args, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Name -> (seconds, bytes per second) of the copy of the logits, which is first, and of each kernel."""
    logits_CV = torch.randn(args.tokens, args.vocab_size, device=args.device).to(dtype)
    target_ids_C = torch.randint(0, args.vocab_size, (args.tokens,), device=args.device)
    loss_weights_C = torch.ones(args.tokens, device=args.device)
    copy_CV = torch.empty_like(logits_CV)
    seconds = median_seconds(lambda: copy_CV.copy_(logits_CV), args)
    rates = {"copy, device to device": (seconds, 2 * logits_CV.nbytes / seconds)}
    if args.device != "cuda":
        return rates
    for name, threads in (
        choose_kernel(dtype, args.vocab_size, logits_CV),
        (f"wce_stream_{DTYPES[dtype]}", STREAM_THREADS),
    ):

        def call(kernel=(name, threads)):  # in place again and again: values stay finite, the cost stays the same
            cuda_row_cross_entropy(logits_CV, target_ids_C, loss_weights_C, logits_CV, kernel=kernel)

        seconds = median_seconds(call, args)
        rates[name] = seconds, (3 if "stream" in name else 2) * logits_CV.nbytes / seconds
    return rates


def print_roof(args, dtype: torch.dtype) -> None:
    rates = roof_rates(args, dtype)
    logit_bytes = args.tokens * args.vocab_size * dtype.itemsize
    print(f"\n{DTYPES[dtype]}, {args.tokens} x {args.vocab_size} logits, {logit_bytes / 2**20:.0f} MiB")
    print("kernel                    seconds      GB/s  of the copy's rate")
    _, roof = next(iter(rates.values()))
    for name, (seconds, rate) in rates.items():
        print(f"{name:24}  {seconds:.6f}  {rate * 1e-9:8.0f}  {rate / roof:.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# Part 2: the loss


def make_inputs(args, dtype: torch.dtype, percent: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden (M, D), head (V, D), targets (M,), weights (M,), index of the rows with weight (K,)."""
    generator = torch.Generator().manual_seed(args.seed)
    hidden_MD = torch.randn(args.tokens, args.dim, generator=generator)
    head_weight_VD = torch.randn(args.vocab_size, args.dim, generator=generator) * args.dim**-0.5
    target_ids_M = torch.randint(0, args.vocab_size, (args.tokens,), generator=generator)
    loss_weights_M = torch.zeros(args.tokens)
    index_K = torch.randperm(args.tokens, generator=generator)[: round(args.tokens * percent / 100)].sort().values
    loss_weights_M[index_K] = 1 + 8 * torch.rand(len(index_K), generator=generator)
    return (
        hidden_MD.to(args.device, dtype).requires_grad_(),
        head_weight_VD.to(args.device, dtype).requires_grad_(),
        target_ids_M.to(args.device),
        loss_weights_M.to(args.device),
        index_K.to(args.device),
    )


def eager(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, dtype):
    logits_MV = linear(hidden_MD, head_weight_VD).to(dtype)
    return (cross_entropy(logits_MV, target_ids_M, reduction="none") * loss_weights_M).sum()


def fused(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, options):
    rows_M = linear_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, reduction="none", options=options)
    return (rows_M * loss_weights_M).sum()


def make_sides(args, dtype: torch.dtype, backend: str) -> dict[str, Callable]:
    """Name -> (hidden, head, targets, weights, index) -> loss."""
    plain = {
        "eager": lambda *rows: eager(*rows, dtype),
        "eager, fp32 logits": lambda *rows: eager(*rows, torch.float32),
    }
    if linear_cross_entropy is not None:
        fixed = LinearCrossEntropyOptions(batch_chunk_size=args.peer_chunk, chunking_method=None)
        plain["fused, default"] = lambda *rows: fused(*rows, LinearCrossEntropyOptions())
        plain["fused, fixed"] = lambda *rows: fused(*rows, fixed)
    sides = {name: lambda *inputs, side=side: side(*inputs[:4]) for name, side in plain.items()}
    sides |= {
        f"{name}, drop": lambda hidden, head, targets, weights, index, side=side: side(
            hidden[index], head, targets[index], weights[index]
        )
        for name, side in plain.items()
        if name != "fused, default"
    }
    for each in ("torch", backend):
        sides[f"ours, {each}"] = lambda *inputs, each=each: linear_weighted_cross_entropy(
            *inputs[:4], trained_index_K=inputs[4], backend=each
        )
    return sides


def run_step(side: Callable, inputs: tuple[Tensor, ...]) -> Tensor:
    """Forward and backward; the loss."""
    inputs[0].grad = inputs[1].grad = None
    loss = side(*inputs)
    (loss * INCOMING_GRADIENT).backward()
    return loss


def print_losses(args, dtype: torch.dtype, backend: str) -> None:
    print(f"\n{dtype}, {args.tokens} tokens, V {args.vocab_size}, D {args.dim}: forward and backward")
    print("trained  side                      seconds  ours over it  extra MiB  loss rel. diff")
    for percent in map(float, args.percents.split(",")):
        inputs = make_inputs(args, dtype, percent)
        results = {}
        for name, side in make_sides(args, dtype, backend).items():
            step = partial(run_step, side, inputs)
            try:
                results[name] = (median_seconds(step, args), extra_mib(step, args), step().item())
            except torch.OutOfMemoryError:
                print(f"{percent:6g}%  {name:24}  out of memory")
        ours = results[f"ours, {backend}"]
        for name, (seconds, mib, loss) in results.items():
            print(
                f"{percent:6g}%  {name:24}  {seconds:.6f}  {ours[0] / seconds:11.3f}  {mib:9.0f}  "
                f"{abs(loss - ours[2]) / abs(ours[2]):14.1e}",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tries the script")
    parser.add_argument("--dtypes", default="bfloat16", help="of hidden, head and logits, with commas")
    parser.add_argument("--tokens", type=int, default=16384, help="rows of hidden states")
    parser.add_argument("--vocab_size", type=int, default=32016, help="rows of the head")
    parser.add_argument("--dim", type=int, default=4096, help="model dimension")
    parser.add_argument("--percents", default="5,10,20,100", help="shares of rows trained, with commas")
    parser.add_argument("--peer_chunk", type=int, default=1024, help="rows per chunk of F.linear_cross_entropy")
    parser.add_argument("--warmup", type=int, default=20, help="calls before the first timed one")
    parser.add_argument("--repeats", type=int, default=100, help="timed calls")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("found no CUDA device, expected one\n")
        return 2
    backend, reason = choose_loss_backend("auto", torch.device(args.device))
    print(f"torch {torch.__version__}, loss backend {backend} ({reason})")
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        print(
            f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.0f} GiB, NVRTC {'.'.join(map(str, nvrtc_version()))}"
        )
    for name in args.dtypes.split(","):
        print_roof(args, getattr(torch, name))
        print_losses(args, getattr(torch, name), backend)
    return 0


if __name__ == "__main__":
    sys.exit(main())
