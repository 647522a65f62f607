"""What `--plan` says against what a process takes: SFT steps of random models of three sizes on 1, 2 and 4 ranks.

    python -m benchmarks.benchmark_plan [--tokens 1024] [--sizes small,medium,large] [--ranks 1,2,4]

Each rank is a process on the CPU that computes in fp32. Measured is the kernel's high-water mark of resident memory
(VmHWM) during two optimizer steps, minus the resident size before the model was made; one step of a tiny model comes
first, so that what libraries allocate on first use is not counted. Printed per case: planned, measured, their ratio.

Shape suffixes: T tokens, K trained ones.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.benchmark_load_memory import MB, resident_mb, run_ranks
from data.batches import PackedBatch
from model.config import PRESETS, ModelConfig, count_parameters
from model.transformer import Transformer
from train.distributed import close_world, init_world, shard_model
from train.optimizer import make_adamw
from train.plan import Setup, plan_step
from train.sft_config import SFTConfig
from train.sft_loop import train_step

# (dim, layers, vocabulary): about 40, 130 and 350 million parameters
SHAPES = {"small": (512, 8, 8000), "medium": (768, 12, 32000), "large": (1024, 22, 32000)}


def shape_of(size: str) -> ModelConfig:
    """CodeLLaMA made narrower and shallower."""
    dim, n_layers, vocab_size = SHAPES[size]
    return replace(
        PRESETS["codellama_7b"],
        dim=dim,
        n_layers=n_layers,
        vocab_size=vocab_size,
        n_heads=dim // 64,
        n_kv_heads=dim // 64,
        head_dim=64,
        ffn_dim=dim * 43 // 16,
    )


def make_batch(n_tokens: int) -> PackedBatch:
    """One row of random ids, a quarter of which is trained."""
    weights_T = (torch.arange(n_tokens) % 4 == 3).float()
    ids_T = torch.randint(0, 64, (n_tokens,), generator=torch.Generator().manual_seed(0))
    return PackedBatch(
        input_ids_T=ids_T,
        target_ids_T=ids_T.roll(-1),
        loss_weights_T=weights_T,
        position_ids_T=torch.arange(n_tokens),
        trained_index_K=weights_T.nonzero().flatten(),
        segment_lengths=[n_tokens],
        ids=["random"],
        denominator=float(weights_T.sum()),
        trained_turns=1,
        trained_tokens=int(weights_T.sum()),
    )


def measure(size: str, n_tokens: int, n_micro_batches: int) -> None:
    """Runs in a process of its own: two steps, and one JSON line of the memory that they took."""
    world = init_world("cpu")

    def run(shape: ModelConfig, tokens: int) -> None:
        with torch.device("meta"):
            model = Transformer(shape)
        shard_model(model, world, dtype="float32")
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                getattr(parameter, "_local_tensor", parameter).normal_(0.0, 0.02)
        adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.01}
        optimizer = make_adamw(model, **adam)
        batches = [make_batch(tokens)] * n_micro_batches
        for step in (1, 2):
            train_step(SFTConfig(), model, optimizer, batches, world, step=step)

    run(replace(shape_of("small"), n_layers=1), 64)
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    run(shape_of(size), n_tokens)
    sys.stdout.write(json.dumps({"above_start_mb": resident_mb("VmHWM") - before}) + "\n")
    close_world()


def measured_mb(size: str, n_ranks: int, n_tokens: int, n_micro_batches: int) -> float:
    """The most that one of n_ranks processes took."""
    arguments = ["benchmarks.benchmark_plan", "--measure", size, "--tokens", str(n_tokens)]
    arguments += ["--micro_batches", str(n_micro_batches)]
    variables = {"OMP_NUM_THREADS": "1"}
    variables |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # freed blocks leave the process at once
    return run_ranks(arguments, n_ranks, variables)["above_start_mb"]


def main() -> None:
    parser = argparse.ArgumentParser(description="What --plan says against what a process takes.")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a micro-batch (default 1024)")
    parser.add_argument("--micro_batches", type=int, default=1, help="micro-batches of a step (default 1)")
    parser.add_argument("--sizes", default="small,medium,large", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--ranks", default="1,2,4", help="comma-separated numbers of ranks")
    parser.add_argument("--measure", choices=SHAPES, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        measure(flags.measure, flags.tokens, flags.micro_batches)
        return
    for size in flags.sizes.split(","):
        shape = shape_of(size)
        for n_ranks in map(int, flags.ranks.split(",")):
            phases = plan_step(shape, make_batch(flags.tokens), flags.micro_batches, Setup(n_ranks))
            planned = max(phase.total for phase in phases) / MB
            measured = measured_mb(size, n_ranks, flags.tokens, flags.micro_batches)
            print(
                f"{size:7s} {count_parameters(shape) / 1e6:5.0f} M parameters, {n_ranks} ranks: planned "
                f"{planned:6.0f} MB, measured {measured:6.0f} MB, planned / measured {planned / measured:.2f}"
            )


if __name__ == "__main__":
    main()
