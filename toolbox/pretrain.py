"""Pre-train the bundled tiny base with the project's own loop: `torchrun --nproc_per_node 2 -m toolbox.pretrain`.

Every token is trained, with a weight by its kind (toolbox/corpus.py). What is unusual: Muon on the matrices, the
embedding drawn with 5 times the usual deviation, two tools per document in the first tenth, and the weights by kind. It
resumes like SFT.

Shape suffixes: T tokens, K trained tokens (all of them).
"""

import argparse
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.batches import PackedBatch
from model.config import ModelConfig
from model.pretrained_weights import save_pretrained, save_pretrained_streamed
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from toolbox.corpus import encode_document
from toolbox.muon import MuonAdamW
from toolbox.world import held_out_pairs
from train.distributed import close_world, init_world, load_sharded_model
from train.run_logging import file_sha256
from train.sft_config import SFTConfig
from train.sft_loop import SFTData, train_sft

TOKENIZER_FILE = Path("assets/tiny_model/tokenizer.model")
OUTPUT = Path("runs/base")
SEED = 1
DOCUMENTS_PER_STEP = 16
TOTAL_STEPS = 2700
EASY_SHARE = 0.1  # of all steps: two tools per document
# 5 times the model's default; taken from one short trial that changed other things too
EMBEDDING_STD = 0.1
MUON_LEARNING_RATE, ADAM_LEARNING_RATE = 0.02, 3e-3


def base_config(vocab_size: int) -> ModelConfig:
    """The tiny plain LLaMA: about 2 million parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        dim=192,
        n_layers=4,
        n_heads=3,
        n_kv_heads=3,
        head_dim=64,
        ffn_dim=512,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_embeddings=True,
        qkv_bias=False,
        max_positions=1024,
    )


def fresh_model(vocab_size: int) -> Transformer:
    """The initial model: the usual init except for the embedding's deviation."""
    model = Transformer(base_config(vocab_size))
    generator = torch.Generator().manual_seed(SEED)
    model.init_weights(generator)
    torch.nn.init.normal_(model.tok_embeddings.weight, std=EMBEDDING_STD, generator=generator)
    return model


def document_batch(
    step: int,
    *,
    seed: int,
    rank: int,
    world_size: int,
    tokenizer: Tokenizer,
    held_out: set[tuple[str, str]],
    total_steps: int,
) -> PackedBatch:
    """This rank's documents of a step as one packed row; document k of step s is a pure function of (seed, s, k)."""
    most_tools = 2 if step < EASY_SHARE * total_steps else 5
    names = [f"{seed}:{step}:{k}" for k in range(rank, DOCUMENTS_PER_STEP, world_size)]
    encoded = [encode_document(random.Random(name), held_out, tokenizer, most_tools=most_tools) for name in names]
    weights = torch.tensor([w for _, _, row in encoded for w in row])
    lengths = [len(ids) for ids, _, _ in encoded]
    return PackedBatch(
        input_ids_T=torch.tensor([i for ids, _, _ in encoded for i in ids]),
        target_ids_T=torch.tensor([i for _, ids, _ in encoded for i in ids]),
        loss_weights_T=weights,
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        trained_index_K=torch.arange(len(weights)),
        segment_lengths=lengths,
        ids=names,
        denominator=float(weights.double().sum()),
        trained_turns=0,
        trained_tokens=len(weights),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the fresh model once, train it, export it to OUTPUT/final in bfloat16."""
    description = f"Pre-train the bundled base into {OUTPUT}. There are no flags: the constants of the file decide."
    argparse.ArgumentParser(prog="python -m toolbox.pretrain", description=description).parse_args(arguments)
    tokenizer = load_tokenizer(TOKENIZER_FILE)
    start = OUTPUT / "initial"
    if os.environ.get("RANK", "0") == "0" and not (start / "config.json").exists():
        save_pretrained(fresh_model(tokenizer.vocab_size), start)
    world = init_world("cpu")
    torch.distributed.barrier()  # rank 0 has written the start
    config = SFTConfig(
        model=str(start),
        output=str(OUTPUT),
        loss_normalization="token_mean",
        schedule="linear",
        warmup_ratio=40 / TOTAL_STEPS,
        checkpoint_every=100,
        error_filter="none",
        key_tokens="off",
        seed=SEED,
    )
    model = load_sharded_model(str(start), world, dtype="float32", tokenizer_size=tokenizer.vocab_size)
    optimizer = MuonAdamW(
        model,
        muon_learning_rate=MUON_LEARNING_RATE,
        adam_learning_rate=ADAM_LEARNING_RATE,
        momentum=0.95,
        betas=(0.9, 0.95),
        epsilon=1e-8,
    )
    held_out = held_out_pairs()

    def step_batches(step: int) -> list[PackedBatch]:
        return [
            document_batch(
                step,
                seed=config.seed,
                rank=world.rank,
                world_size=world.size,
                tokenizer=tokenizer,
                held_out=held_out,
                total_steps=TOTAL_STEPS,
            )
        ]

    data = SFTData(step_batches, TOTAL_STEPS, {"tokenizer_sha256": file_sha256(TOKENIZER_FILE)})
    result = train_sft(config, data, model, optimizer, world)
    if result.stopped_by:
        return 128 + result.stopped_by
    save_pretrained_streamed(model, OUTPUT / "final", dtype=torch.bfloat16, companions_from=TOKENIZER_FILE.parent)
    close_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())
