"""A whole SFT run in miniature for tests: random Transformer, SentencePiece model, trajectories, ways to start it."""

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch

from data.batches import PackedBatch
from model.config import ModelConfig
from model.pretrained_weights import save_pretrained
from model.transformer import Transformer

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 400
CITIES = ["Oslo", "Lima", "Bern", "Cairo", "Quito", "Hanoi"]


def tiny_config(**changes: object) -> ModelConfig:
    """Two layers, grouped attention, tied embedding; `changes` replace fields."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "ffn_dim": 64,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_embeddings": True,
        "qkv_bias": False,
        "max_positions": 2048,
    }
    return ModelConfig(**{**fields, **changes})


def tiny_model(seed: int = 0, **changes: object) -> Transformer:
    """A randomly initialised Transformer of tiny_config."""
    model = Transformer(tiny_config(**changes))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def random_batch(seed: int, *, n_tokens: int = 40, trained_share: float = 0.5) -> PackedBatch:
    """Two segments of random ids with random weights in 0.5..2 on about `trained_share` of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(3, VOCAB_SIZE, (n_tokens,), generator=generator)
    weights_T = 0.5 + 1.5 * torch.rand(n_tokens, generator=generator)
    weights_T[torch.rand(n_tokens, generator=generator) >= trained_share] = 0.0
    first = n_tokens // 3
    return PackedBatch(
        input_ids_T=ids_T,
        target_ids_T=torch.randint(0, VOCAB_SIZE, (n_tokens,), generator=generator),
        loss_weights_T=weights_T,
        position_ids_T=torch.cat([torch.arange(first), torch.arange(n_tokens - first)]),
        trained_index_K=weights_T.nonzero().flatten(),
        segment_lengths=[first, n_tokens - first],
        ids=[f"{seed}a", f"{seed}b"],
        denominator=float(weights_T.sum()),
        trained_turns=2,
        trained_tokens=int((weights_T != 0).sum()),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def make_records(n: int, seed: int = 0) -> list[dict]:
    """`n` trajectories in the authors' form; every third has a call that fails and is repeated."""
    generator = random.Random(seed)
    tools = []
    for name in ("get_weather", "get_weather_details", "search"):
        parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}}
        tools.append({"name": name, "description": f"{name} of a city", "parameters": parameters, "required": ["city"]})
    records = []
    for index in range(n):
        city, name = generator.choice(CITIES), generator.choice(tools)["name"]
        turns = [{"role": "system", "content": json.dumps(tools)}, {"role": "user", "content": f"{name} for {city}"}]
        if index % 3 == 0:
            turns.append({"role": "assistant", "content": f'{name}\n{{"town": "{city}"}}'})
            turns.append({"role": "function", "content": '{"error": "missing city"}'})
        turns.append({"role": "assistant", "content": f'{name}\n{{"city": "{city}"}}'})
        turns.append({"role": "function", "content": f"{generator.randrange(30)} degrees"})
        turns.append({"role": "assistant", "content": f'finish\n{{"answer": "{city} it is"}}'})
        records.append({"id": f"t{index}", "conversations": turns})
    return records


def make_tokenizer(folder: Path) -> None:
    """Train folder/tokenizer.model, VOCAB_SIZE pieces with bytes, on the text of make_records."""
    text = "\n".join(turn["content"] for record in make_records(60, seed=1) for turn in record["conversations"])
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_writer=writer,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "tokenizer.model").write_bytes(writer.getvalue())


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny_run_"))
    save_pretrained(tiny_model(), folder / "model")
    make_tokenizer(folder / "model")
    (folder / "data.json").write_text(json.dumps(make_records(22)), encoding="utf-8")
    return folder


def tiny_files() -> tuple[Path, Path]:
    """(model folder, data file of 22 trajectories), made once per process; do not change them, copy them."""
    return _folder() / "model", _folder() / "data.json"


def copy_of_model(target: Path) -> Path:
    """A private copy of the tiny model folder."""
    shutil.copytree(tiny_files()[0], target)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def arguments(output: Path, **flags: object) -> list[str]:
    """Flags of a short deterministic CPU run into `output`; `flags` are added or replace."""
    model, records = tiny_files()
    values = {
        "model": model,
        "data": records,
        "output": output,
        "device": "cpu",
        "plot": "off",
        "checkpoint_every": 3,
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "learning_rate": 1e-2,
        **flags,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def command(output: Path, *, ranks: int = 0, **flags: object) -> list[str]:
    """The command line of a run: ranks = 0 starts plain python, else torchrun with so many processes."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*start, "run_sft.py", *arguments(output, **flags)]


def run_process(line: list[str], *, seconds: float = 300) -> subprocess.CompletedProcess:
    """Run a command line from the repository root with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False)


def run_here(output: Path, **flags: object) -> tuple[int, str, str]:
    """run_sft.main in this process: (exit code, stdout, stderr). Saves the import of torch."""
    from run_sft import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        try:
            code = main(arguments(output, **flags))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def wait_for_step(process: subprocess.Popen, output: Path, step: int, seconds: float = 400) -> bool:
    """Until output/metrics.jsonl has `step` lines; False if the run ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if (output / "metrics.jsonl").exists() and (output / "metrics.jsonl").read_bytes().count(b"\n") >= step:
            return True
        time.sleep(0.002)
    return False


def metrics_of(output: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def digest_of_final(output: Path) -> str:
    """sha256 over the files of output/final."""
    digest = hashlib.sha256()
    for path in sorted((output / "final").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
