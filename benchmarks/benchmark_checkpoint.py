"""What a checkpoint costs the training loop: seconds lost per save, before, waiting, and with a thread that writes.

    python -m benchmarks.benchmark_checkpoint                                  # a model of 2 M parameters, a minute
    python -m benchmarks.benchmark_checkpoint --size 300m --rounds 3           # 3.9 GB per save, 12 GB of memory

A stretch is one save and then some training steps, enough of them to write a checkpoint meanwhile. Each round has one
stretch per side, in an order that changes. Two figures, medians over rounds, with their ratio to the first side:
    stopped   seconds that the loop waits: in the save, and at the end of the stretch until the save is complete
    lost      seconds of the stretch less those of the same steps without a save in the same round; a thread that takes
              a core from the steps shows here, and so does every other load of the machine
Sides:
    before    DCP's own files, written while the loop waits, and each read again for its sha256
    waiting   save_checkpoint: hashed while written
    thread    CheckpointSaver in the background, as with --async_checkpoint on
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from benchmarks.benchmark_train_step import ADAMW, make_batch
from model.config import ModelConfig
from model.transformer import Transformer
from train.checkpoint import STATE_FILE_BYTES, CheckpointSaver
from train.distributed import close_world, init_world
from train.optimizer import make_adamw
from train.run_logging import file_sha256
from train.sft_config import SFTConfig
from train.sft_loop import train_step

SIZES = {"tiny": (2048, 128, 4), "300m": (32_016, 1024, 20)}  # vocabulary, model dim, layers


def make_model(size: str) -> Transformer:
    """A random model of about that many parameters."""
    vocab_size, dim, n_layers = SIZES[size]
    config = ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=n_layers,
        n_heads=dim // 64,
        n_kv_heads=dim // 64,
        head_dim=64,
        ffn_dim=dim * 8 // 3 // 32 * 32,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        tie_embeddings=False,
        qkv_bias=False,
        max_positions=4096,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def save_as_before(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Write the same tensors with DCP's own files, then read every file for its sha256."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for number, state in enumerate(optimizer.state.values()):
        tensors |= {f"optimizer.{key}.{number}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    numbers, filled = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + filled // STATE_FILE_BYTES
        filled += tensor.nbytes
    numbers = {name: sorted({*numbers.values()}).index(number) + 1 for name, number in numbers.items()}
    folder.mkdir()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
    dcp.save(tensors, storage_writer=writer)
    for path in sorted(folder.iterdir()):
        file_sha256(path)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """(seconds, seconds that the loop waited) of each side's stretches, by round; "none" has steps alone."""
    world, model = init_world("cpu"), make_model(args.size)
    optimizer = make_adamw(model, **ADAMW)
    batch, config = make_batch(args, 100), SFTConfig(loss_normalization="token_mean")
    waiting, thread = (
        CheckpointSaver(folder, world, identity="", keep=1, in_background=in_background)
        for in_background in (False, True)
    )
    parts = {"model": (model, optimizer)}

    def stretch(save: Callable[[], None]) -> tuple[float, float]:
        began = time.perf_counter()
        save()
        saved = time.perf_counter()
        for step in range(args.steps):
            train_step(config, model, optimizer, [batch], world, step=step + 1)
        stepped = time.perf_counter()
        thread.wait()
        ended = time.perf_counter()
        return ended - began, ended - stepped + saved - began

    def before() -> None:
        save_as_before(folder / "before", model, optimizer)

    sides = {
        "none": lambda: None,
        "before": before,
        "waiting": lambda: waiting.save(1, parts, extra={}),
        "thread": lambda: thread.save(1, parts, extra={}),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    stretch(sides["none"])  # warms up, and gives the optimizer its state
    for number in range(args.rounds):
        names = list(sides)
        for name in names[number % 4 :] + names[: number % 4]:
            seconds[name].append(stretch(sides[name]))
            for path in folder.iterdir():
                shutil.rmtree(path)
            whole, stopped = seconds[name][-1]
            print(f"round {number + 1}: {name:8} {whole:8.2f} s, {stopped:6.2f} s of it stopped", file=sys.stderr)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model [tiny]")
    parser.add_argument("--rounds", type=int, default=9, help="stretches of each side [9]")
    parser.add_argument("--steps", type=int, default=0, help="training steps per stretch [tiny: 20, 300m: 6]")
    parser.add_argument("--tokens", type=int, default=256, help="of each step's batch [256]")
    parser.add_argument("--folder", help="where to write checkpoints [the system's folder for temporary files]")
    args = parser.parse_args()
    args.steps, args.seed, args.vocab_size = args.steps or {"tiny": 20, "300m": 6}[args.size], 0, SIZES[args.size][0]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds = measure(args, Path(folder))
    close_world()
    alone = [whole for whole, _ in seconds.pop("none")]
    print(f"a step: {statistics.median(alone) / args.steps:.2f} s; {args.steps} steps after each save")
    figures = {}
    for name, values in seconds.items():
        stopped = [each for _, each in values]
        lost = [whole - steps for (whole, _), steps in zip(values, alone, strict=True)]
        figures[name] = statistics.median(stopped), statistics.median(lost)
        ratio = figures[name][0] / figures["before"][0]
        print(
            f"{name:8} stopped {figures[name][0]:6.2f} s ({min(stopped):.2f} to {max(stopped):.2f}), {ratio:.2f} of "
            f"before; lost {figures[name][1]:6.2f} s ({min(lost):.2f} to {max(lost):.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
