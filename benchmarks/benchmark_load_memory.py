"""Peak host memory of loading a checkpoint: tensor by tensor (ours), whole files (naive), and into two FSDP2 ranks.

    python -m benchmarks.benchmark_load_memory [--megabytes 600]

Writes a random sharded checkpoint to a temporary folder, then loads it in fresh processes and reads the kernel's own
high-water mark of resident memory (VmHWM of /proc/self/status; it counts mapped file pages too). "above start" is that
mark minus the resident size just before loading. The bound that ours must keep: local shard + largest tensor.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from model.config import PRESETS, ModelConfig, count_parameters
from model.pretrained_weights import load_pretrained, load_weights_into, read_config, save_pretrained_streamed
from model.transformer import Transformer

MB = 1 << 20


def resident_mb(key: str) -> float:
    """VmRSS (now) or VmHWM (the most since the process began), in MB of 2^20 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")


def sized_config(megabytes: int) -> ModelConfig:
    """CodeLLaMA 7B made narrower and shallower, until its fp32 weights fill about the size asked for."""
    config = replace(PRESETS["codellama_7b"], dim=1024, n_heads=8, n_kv_heads=8, ffn_dim=2752, vocab_size=16000)
    base = count_parameters(replace(config, n_layers=1))
    per_layer = count_parameters(replace(config, n_layers=2)) - base
    return replace(config, n_layers=max(1, 1 + round((megabytes * MB / 4 - base) / per_layer)))


def measure(way: str, folder: Path) -> None:
    """Runs in a process of its own: loads in one way and prints one JSON line."""
    if way == "sharded":
        torch.distributed.init_process_group("gloo")
        with torch.device("meta"):
            model = Transformer(read_config(folder))
        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
    # The same code paths once on a tiny model, so that what libraries allocate on first use is not counted.
    load_pretrained(folder.parent / "warm_up")
    before = resident_mb("VmRSS")
    if way == "ours":
        model = load_pretrained(folder)
    elif way == "naive":
        model = Transformer(read_config(folder))
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= {name: tensor.clone() for name, tensor in load_file(path).items()}
        for parameter, tensor in zip(model.parameters(), tensors.values(), strict=True):
            parameter.data.view(-1)[:] = tensor.view(-1)[:1]  # in place of the name mapping; memory is the same
    else:
        load_weights_into(model, folder)
    above = resident_mb("VmHWM") - before
    local = sum(getattr(p, "_local_tensor", p).numel() * p.element_size() for p in model.state_dict().values()) / MB
    sys.stdout.write(json.dumps({"above_start_mb": above, "local_mb": local}) + "\n")
    if way == "sharded":
        torch.distributed.destroy_process_group()


def run_ranks(arguments: list[str], n_ranks: int, variables: dict[str, str]) -> dict[str, float]:
    """Runs a module of Python on n_ranks processes; the last line, JSON, of the one with the most `above_start_mb`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = variables | {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", *arguments]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | group | {"RANK": str(rank)})
        for rank in range(n_ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a process of {' '.join(arguments)} failed")
    return max((json.loads(output.splitlines()[-1]) for output in outputs), key=lambda r: r["above_start_mb"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak host memory of loading a checkpoint.")
    parser.add_argument("--megabytes", type=int, default=600, help="size of the checkpoint in fp32 (default 600)")
    parser.add_argument("--measure", choices=("ours", "naive", "sharded"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.folder)
        return
    config = sized_config(arguments.megabytes)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        save_pretrained_streamed(Transformer(config), folder, max_shard_bytes=arguments.megabytes * MB // 3)
        small = replace(config, n_layers=1, vocab_size=64, ffn_dim=64)
        save_pretrained_streamed(Transformer(small), Path(root) / "warm_up")
        largest = config.vocab_size * config.dim * 4 / MB
        print(f"checkpoint {count_parameters(config) * 4 / MB:.0f} MB in fp32, largest tensor {largest:.0f} MB")
        labels = {"ours": "ours, one process", "naive": "naive, one process", "sharded": "ours, each of 2 ranks"}
        for way, label in labels.items():
            arguments = ["benchmarks.benchmark_load_memory", "--measure", way, "--folder", str(folder)]
            result = run_ranks(arguments, 2 if way == "sharded" else 1, {})
            bound = result["local_mb"] + largest
            peak = result["above_start_mb"]
            print(
                f"{label:22s} local weights {result['local_mb']:6.0f} MB, peak above start {peak:6.0f} MB = "
                f"{peak / result['local_mb']:.2f} x local weights, "
                f"{peak / bound:.2f} x (local weights + largest tensor)"
            )


if __name__ == "__main__":
    main()
