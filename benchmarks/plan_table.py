"""What `--plan` says of three 7B models on 8, 4 and 1 GPUs of 80 GB: a row of docs/cluster.md for each plan.

    python -m benchmarks.plan_table [--models codellama_7b,llama31_8b,qwen25_7b]

Each plan is a process of run_sft.py or run_ppo.py with --plan, on a model folder of config.json and the bundled
tokenizer, and on 8 trajectories of nearly 8,192 tokens, half of them trained. Responses have 512 tokens. It prints GiB
per GPU at the peak of each phase, without the 2 GiB that are reserved, the exit code, and the seconds of the process.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from model.config import PRESETS, config_to_hf

ROOT = Path(__file__).resolve().parents[1]
TINY_MODEL = ROOT / "assets" / "tiny_model"
MODELS = ("codellama_7b", "llama31_8b", "qwen25_7b")
N_TOKENS, OTHER_TOKENS = 8192, 64  # of a trajectory, and what its form may take of them
GPUS = {8: "paper.json", 4: "paper.json", 1: "paper_one_gpu.json"}
TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}


def write_data(path: Path, asked: int, answered: int) -> Path:
    """8 trajectories of a question and an answer of so many tokens: the bundled tokenizer gives each 0 its own."""
    turns = [{"role": "system", "content": json.dumps([TOOL])}, {"role": "user", "content": "0" * asked}]
    turns.append({"role": "assistant", "content": "finish\n" + json.dumps({"answer": "0" * answered})})
    path.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(8)]), encoding="utf-8")
    return path


def plan(program: str, model: Path, data: Path, n_gpus: int) -> tuple[dict[str, float], int, float]:
    """GiB of each phase, the exit code, and the processor seconds that the plan took."""
    command = [sys.executable, f"{program}.py", "--plan", "--config", f"configs/{GPUS[n_gpus]}", "--model", str(model)]
    command += ["--data", str(data), "--device", "cuda", "--gpu_memory_gib", "80", "--plan_ranks", str(n_gpus)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = done.stdout.splitlines()
    if not any(line.startswith("total ") for line in lines):
        raise RuntimeError(done.stderr)
    names = next(line for line in lines if line.startswith("GiB per rank"))[len("GiB per rank") :].strip().split("  ")
    totals = next(line for line in lines if line.startswith("total ")).split()[1:]
    phases = dict(zip(filter(None, map(str.strip, names)), map(float, totals), strict=True))
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return phases, done.returncode, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"with commas, of {', '.join(PRESETS)}")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        half = (N_TOKENS - OTHER_TOKENS) // 2
        sft_data = write_data(Path(folder) / "sft.json", half, half)
        ppo_data = write_data(Path(folder) / "ppo.json", 2 * half, 1)
        for name in flags.models.split(","):
            model = Path(folder) / name
            model.mkdir()
            (model / "config.json").write_text(json.dumps(config_to_hf(PRESETS[name])), encoding="utf-8")
            shutil.copy(TINY_MODEL / "tokenizer.model", model)
            for n_gpus in GPUS:
                for program, data in (("run_sft", sft_data), ("run_ppo", ppo_data)):
                    phases, code, seconds = plan(program, model, data, n_gpus)
                    cells = ", ".join(f"{phase} {gib:.1f}" for phase, gib in phases.items())
                    print(f"| {name} | {n_gpus} | {program} | {cells} | code {code} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
