"""Muon against the singular value decomposition, and one or two ranks alike."""

import torch
import torch.distributed as dist

from model.config import ModelConfig
from model.transformer import Transformer
from tests.support.processes import spawn
from toolbox.muon import MuonAdamW, orthogonalize
from train.distributed import apply_fsdp, close_world, init_world


def test_orthogonalize_is_near_the_polar_factor():
    """Oracle: U V^T of the SVD. The singular values end within 0.68..1.13: directions agree, lengths nearly."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 8), (6, 20), (20, 6)):
        matrix = torch.randn(shape, generator=generator)
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        result = orthogonalize(matrix, steps=5)
        values = torch.linalg.svdvals(result)
        assert result.shape == matrix.shape and 0.6 < values.min() and values.max() < 1.25
        cosine = (result * (u @ vt)).sum() / result.norm() / (u @ vt).norm()
        assert cosine > 0.97


def tiny_model() -> Transformer:
    model = Transformer(
        ModelConfig(
            vocab_size=20,
            dim=8,
            n_layers=1,
            n_heads=2,
            n_kv_heads=2,
            head_dim=4,
            ffn_dim=12,
            norm_eps=1e-5,
            rope_theta=1e4,
            rope_scaling=None,
            tie_embeddings=True,
            qkv_bias=False,
            max_positions=32,
        )
    )
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def three_steps(rank: int, world_size: int, address: str, result: str) -> None:
    """Three updates on the same tokens on every rank; rank 0 stores the weights."""
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world_size)
    world = init_world("cpu")
    model = tiny_model()
    apply_fsdp(model, world, dtype="float32")  # on one rank too, where shard_model does nothing
    optimizer = MuonAdamW(
        model, muon_learning_rate=0.02, adam_learning_rate=0.01, momentum=0.9, betas=(0.9, 0.95), epsilon=1e-8
    )
    for step in range(3):
        logits = model(torch.arange(10)[None] + step)
        (logits.float().logsumexp(-1).sum() / world_size).backward()  # ranks are summed
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(weights, result)
    close_world()


def test_two_ranks_update_like_one(tmp_path):
    three_steps(0, 1, "", str(tmp_path / "one.pt"))
    spawn(three_steps, (2, str(tmp_path / "store"), str(tmp_path / "two.pt")), ranks=2)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    start = dict(tiny_model().named_parameters())
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
        assert not torch.allclose(one[name], start[name], atol=1e-4), name
