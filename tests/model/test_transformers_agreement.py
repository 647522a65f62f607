"""Logits equal transformers' on random sharded checkpoints of all variants, in both directions."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from model.config import config_from_hf
from model.pretrained_weights import load_pretrained, save_pretrained_streamed
from model.transformer import rope_inverse_frequencies
from tests.model.test_transformer import tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "mha": ("Llama", {"num_key_value_heads": 6}),
    "gqa": ("Llama", {"num_key_value_heads": 2}),
    "tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2_bias": ("Qwen2", {"num_key_value_heads": 3}),
    "qwen2_tied": ("Qwen2", {"num_key_value_heads": 3, "tie_word_embeddings": True}),
    "llama3_rope": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama3_rope_top_level": (
        "Llama",
        {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "original_max_position_embeddings": 16},
    ),
    "own_theta": ("Llama", {"num_key_value_heads": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "head_dim": ("Llama", {"num_key_value_heads": 2, "head_dim": 16}),
}


def peer_model(name: str) -> torch.nn.Module:
    """transformers' model of a variant with weights large enough that attention is not uniform, biases and norms not
    trivial."""
    import transformers  # takes seconds: not while tests are collected

    family, changes = VARIANTS[name]
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15) if parameter.ndim == 2 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", VARIANTS)
def test_our_logits_equal_theirs_on_a_sharded_checkpoint(name, tmp_path):
    peer = peer_model(name)
    peer.save_pretrained(tmp_path / "peer", max_shard_size="60KB")
    assert len(list((tmp_path / "peer").glob("*.safetensors"))) > 1
    ours = load_pretrained(tmp_path / "peer")
    ids = torch.randint(0, 131, (3, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_difference(ours(ids), peer(ids).logits) < 2e-5


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 60000])
def test_our_export_loads_there_with_equal_logits(name, max_shard_bytes, tmp_path):
    import transformers

    peer_model(name).save_pretrained(tmp_path / "peer")
    ours = load_pretrained(tmp_path / "peer")
    save_pretrained_streamed(ours, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(0, 131, (2, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert relative_difference(peer.eval()(ids).logits, ours(ids)) < 2e-5


def test_bf16_export_is_read_as_bf16(tmp_path):
    import transformers

    model = tiny_model()
    save_pretrained_streamed(model, tmp_path / "ours", dtype=torch.bfloat16)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert peer.dtype == torch.bfloat16
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert relative_difference(peer.float()(ids).logits, load_pretrained(tmp_path / "ours")(ids)) < 2e-5


@pytest.mark.parametrize("inner", [32, None])
@pytest.mark.parametrize("top", [16, None])
def test_original_context_at_the_top_level_wins(inner, top, tmp_path):
    import transformers

    rope = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    rope |= {} if inner is None else {"original_max_position_embeddings": inner}
    values = {"model_type": "llama", **SIZES, "rope_scaling": rope}
    values |= {} if top is None else {"original_max_position_embeddings": top}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path)).model.rotary_emb.inv_freq
    ours = config_from_hf(values)
    assert ours.rope_scaling.original_max_positions == (top or inner or SIZES["max_position_embeddings"])
    assert torch.allclose(rope_inverse_frequencies(ours), theirs, rtol=1e-6)


def test_configs_of_both_spellings_agree(tmp_path):
    for name in VARIANTS:
        config = peer_model(name).config
        ours = config_from_hf(config.to_dict())
        assert ours.rope_theta == config.rope_parameters["rope_theta"]
        assert replace(ours, rope_scaling=None).n_kv_heads == config.num_key_value_heads
        assert (ours.rope_scaling is not None) == name.startswith("llama3_rope")
        assert ours.qkv_bias == name.startswith("qwen2")
