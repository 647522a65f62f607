"""The batches of the base's pre-training: a pure function of the step, the same documents for any number of ranks."""

from pathlib import Path

import pytest
import torch

from model.tokenizer import load_tokenizer
from toolbox.pretrain import DOCUMENTS_PER_STEP, base_config, document_batch, fresh_model
from toolbox.world import held_out_pairs

TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny_model" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def documents(batch):
    """{name: ids} of a packed row."""
    rows = torch.split(batch.input_ids_T, batch.segment_lengths)
    return {name: row.tolist() for name, row in zip(batch.ids, rows, strict=True)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_documents_of_one_process(tokenizer, world_size):
    settings = {"seed": 1, "tokenizer": tokenizer, "held_out": held_out_pairs(), "total_steps": 100}
    whole = document_batch(50, rank=0, world_size=1, **settings)
    parts = [document_batch(50, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    together = {name: ids for part in parts for name, ids in documents(part).items()}
    assert together == documents(whole) and len(together) == DOCUMENTS_PER_STEP
    assert sum(part.denominator for part in parts) == pytest.approx(whole.denominator)


def test_every_token_is_trained_and_positions_restart(tokenizer):
    batch = document_batch(
        3, seed=1, rank=0, world_size=1, tokenizer=tokenizer, held_out=held_out_pairs(), total_steps=100
    )
    assert (batch.loss_weights_T > 0).all() and batch.trained_tokens == len(batch.input_ids_T)
    starts = [sum(batch.segment_lengths[:k]) for k in range(len(batch.segment_lengths))]
    assert batch.position_ids_T[starts].eq(0).all()
    assert (batch.input_ids_T[starts] == tokenizer.bos_id).all()


def test_start_is_reproducible_and_small():
    first, second = fresh_model(100), fresh_model(100)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert abs(first.tok_embeddings.weight.std().item() - 0.1) < 0.005
    assert base_config(100).tie_embeddings
