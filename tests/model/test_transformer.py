"""model/transformer.py and model/config.py: formulas against fp64 oracles, packing, cache, meta construction,
config.json."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import (
    PRESETS,
    ModelConfig,
    ModelFolderError,
    RopeScaling,
    config_from_hf,
    config_to_hf,
    count_parameters,
)
from model.decode import DecodeWeights, KVCache, decode_runs, decode_step, prefill, step_numbers
from model.pretrained_weights import load_pretrained
from model.transformer import FeedForward, RMSNorm, Transformer, apply_rope, rope_cos_sin, rope_inverse_frequencies

STORIES = Path(__file__).parents[3] / "shared" / "fixtures" / "stories260K-hf"
TINY = ModelConfig(
    vocab_size=61,
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=40,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_embeddings=False,
    qkv_bias=False,
    max_positions=64,
)
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)


def tiny_model(**changes: object) -> Transformer:
    model = Transformer(replace(TINY, **changes))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # larger weights than at the start of training: attention is then far from uniform
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
            else:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()))
    return model


def oracle_logits(model: Transformer, ids: list[int]) -> np.ndarray:
    """The whole model once more: numpy, fp64, explicit loops over tokens and heads; nothing shared with the product."""
    c = model.config
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return np.array([weight * row / np.sqrt(sum(v * v for v in row) / len(row) + c.norm_eps) for row in x])

    def turn(vector: np.ndarray, position: int) -> np.ndarray:
        out = vector.copy()
        for j in range(c.head_dim // 2):
            angle = position / c.rope_theta ** (2 * j / c.head_dim)
            z = complex(vector[j], vector[j + c.head_dim // 2]) * np.exp(1j * angle)
            out[j], out[j + c.head_dim // 2] = z.real, z.imag
        return out

    x = w["tok_embeddings.weight"][ids]
    for i in range(c.n_layers):
        p = f"layers.{i}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = (
            h @ w[f"{p}attention.{n}.weight"].T + w.get(f"{p}attention.{n}.bias", 0.0) for n in ("wq", "wk", "wv")
        )
        out = np.zeros_like(q)
        for n in range(c.n_heads):
            g = n // (c.n_heads // c.n_kv_heads)
            qs, ks = slice(n * c.head_dim, (n + 1) * c.head_dim), slice(g * c.head_dim, (g + 1) * c.head_dim)
            for t in range(len(ids)):
                scores = np.array([turn(q[t, qs], t) @ turn(k[s, ks], s) / c.head_dim**0.5 for s in range(t + 1)])
                weights = np.exp(scores - scores.max())
                out[t, qs] = (weights / weights.sum()) @ v[: t + 1, ks]
        x = x + out @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        gate = h @ w[p + "feed_forward.w1.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (h @ w[p + "feed_forward.w3.weight"].T)
        x = x + inner @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w.get("output.weight", w["tok_embeddings.weight"]).T


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))
    # mean of squares (1 + 6) / 2 = 3.5, plus 0.5 = 4, root 2
    out = norm(torch.tensor([[1.0, 6.0**0.5]], dtype=torch.float64))
    assert torch.allclose(out, torch.tensor([[0.5, 5.0 * 6.0**0.5]], dtype=torch.float64), rtol=1e-12, atol=0)


def test_rms_norm_takes_the_mean_in_fp32_for_bf16():
    x = (torch.arange(1, 2049).float() / 100).bfloat16()
    expected = x.double() / (x.double().square().mean() + 1e-5).sqrt()
    out = RMSNorm(2048, 1e-5).bfloat16()(x).double()
    assert ((out - expected).abs() / expected).max() < 2**-8  # one rounding to bf16; a bf16 mean is off by more


def test_rope_by_hand():
    config = replace(TINY, head_dim=4, rope_theta=100.0)
    omega = rope_inverse_frequencies(config)
    assert torch.allclose(omega, torch.tensor([1.0, 0.1]))
    cos, sin = rope_cos_sin(torch.tensor([[3]]), omega, torch.float32)
    turned = apply_rope(torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]]), cos, sin)[0, 0, 0]
    expected = [np.cos(3.0), np.cos(0.3), np.sin(3.0), np.sin(0.3)]  # pairs are (0, 2) and (1, 3)
    assert np.allclose(turned.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_angles_are_fp32_at_large_positions(dtype):
    positions = torch.tensor([[257, 1001, 16383]])  # bf16 would make them 256, 1000, 16384
    found, _ = rope_cos_sin(positions, torch.tensor([1.0, 0.1]), dtype)
    expected = np.cos(np.outer([257.0, 1001.0, 16383.0], [1.0, 0.1]))
    tolerance = 1e-3 if dtype == torch.float32 else 2**-8  # fp32 angles of 1.6e4 are rounded to 1e-3; bf16 at the end
    assert np.abs(found[0, :, 0, :2].double().numpy() - expected).max() < tolerance


def test_llama3_scaling_by_hand():
    # wavelengths 2 pi theta^(2j/H); original 32: above 32 stretched by 8, below 8 kept, between them blended
    omega = rope_inverse_frequencies(replace(TINY, head_dim=6, rope_theta=8.0, rope_scaling=LLAMA3)).tolist()
    assert omega[0] == pytest.approx(1.0)  # wavelength 6.28 < 8
    wavelength = 2 * np.pi * 2.0  # theta^(2/6) = 2: 12.57, between 8 and 32
    blend = (32 / wavelength - 1.0) / (4.0 - 1.0)
    assert omega[1] == pytest.approx((1 - blend) * 0.5 / 8 + blend * 0.5, rel=1e-5)
    assert rope_inverse_frequencies(replace(TINY, head_dim=4, rope_theta=1e4, rope_scaling=LLAMA3))[1] == pytest.approx(
        0.01 / 8
    )  # wavelength 628 > 32


def test_swiglu_by_hand():
    ffn = FeedForward(1, 1)
    with torch.no_grad():
        for linear, value in ((ffn.w1, 2.0), (ffn.w2, 3.0), (ffn.w3, 5.0)):
            linear.weight.fill_(value)
    # w2 * silu(2) * 5 with silu(2) = 2 / (1 + e^-2) = 1.7615942
    assert ffn(torch.ones(1, 1)).item() == pytest.approx(3 * 1.7615942 * 5, rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 4},
        {"n_kv_heads": 1},
        {"tie_embeddings": True},
        {"qkv_bias": True},
        {"rope_theta": 1e6},
        {"head_dim": 12},
    ],
    ids=str,
)
def test_logits_equal_the_fp64_oracle(changes):
    model = tiny_model(**changes)
    ids = [5, 60, 0, 7, 7, 31, 2, 18, 44]
    expected = oracle_logits(model, ids)
    with torch.no_grad():
        found = model(torch.tensor([ids]))[0].numpy()
    assert np.abs(found - expected).max() / np.abs(expected).max() < 2e-5


def test_greedy_reference_logits_of_stories260K():
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES.name} is not beside the repository")
    model = load_pretrained(STORIES)
    arrays = np.load(STORIES / "reference.npz")
    for case in json.loads((STORIES / "reference.json").read_text())["cases"]:
        with torch.no_grad():
            logits = model(torch.tensor([case["input_ids"]]))[0, -1].numpy()
        expected = arrays[case["logits_key"]]
        assert np.abs(logits - expected).max() / np.abs(expected).max() < 2e-5


# ---------------------------------------------------------------------------------------------------------------------
# Packing, cache, checkpointing, meta


def test_packed_equals_separate_in_logits_and_gradients():
    model = tiny_model(qkv_bias=True)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 61, (1, n), generator=generator) for n in (1, 7, 12, 2)]
    separate = torch.cat([model(row)[0] for row in rows])
    weights = torch.randn(separate.shape, generator=generator)
    (separate * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    packed = model(torch.cat(rows, dim=1), segment_lengths=[1, 7, 12, 2])[0]
    (packed * weights).sum().backward()
    assert torch.allclose(packed, separate, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max()), name


def test_no_token_sees_a_later_one_or_another_segment():
    model = tiny_model()
    ids = torch.randint(0, 61, (1, 10), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = model(ids, segment_lengths=[4, 6])
        ids[0, 6] = (ids[0, 6] + 1) % 61
        after = model(ids, segment_lengths=[4, 6])
    changed = (before != after).any(-1)[0].tolist()
    assert changed == [False] * 6 + [True] * 4


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 6], [3, 4, 5], [2, 8, 2], [9, 3]], ids=str)
def test_cache_equals_full_forward(chunks):
    """Three rows, fed in chunks: the logits after each chunk are those of the full forward at its last token."""
    model = tiny_model()
    ids_BT = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(3))
    cache, ends = KVCache(model.config, 3, 12), torch.tensor(chunks).cumsum(0) - 1
    found = [
        [prefill(DecodeWeights(model), cache, [row], [part.tolist()])[0] for part in ids_BT[row].split(chunks)]
        for row in range(3)
    ]
    with torch.no_grad():
        expected = model(ids_BT)[:, ends]
    assert torch.allclose(torch.stack([torch.stack(row) for row in found]), expected, rtol=1e-5, atol=2e-5)
    assert cache.lengths == [12, 12, 12]


def test_cache_of_rows_that_decode_together_equals_full_forward():
    model = tiny_model()
    ids_BT = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(3))
    weights, cache, rows, found = DecodeWeights(model), KVCache(model.config, 3, 12), [0, 1, 2], []
    for t in range(12):
        numbers_4B = step_numbers(weights, cache, rows, ids_BT[:, t].tolist(), n_rows=4)
        found.append(decode_step(weights, cache, numbers_4B, decode_runs(cache, rows, numbers_4B.device)))
        cache.lengths = [t + 1] * 3
    with torch.no_grad():
        assert torch.allclose(torch.stack(found, dim=1), model(ids_BT), rtol=1e-5, atol=2e-5)


def test_cache_grows_with_its_longest_row():
    model = tiny_model()
    ids = torch.randint(0, 61, (1, 520), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        full = model(ids)[0]
    cache, slots = KVCache(model.config, 2, 600), []
    for row, start, end in ((0, 0, 100), (1, 0, 128), (0, 100, 101), (1, 128, 129), (1, 129, 257), (0, 101, 520)):
        logits_V = prefill(DecodeWeights(model), cache, [row], [ids[0, start:end].tolist()])[0]
        assert torch.allclose(logits_V, full[end - 1], rtol=1e-5, atol=5e-5)
        slots.append(cache.keys_RLKH[1].shape[1])
    assert slots == [128, 128, 128, 256, 512, 640]  # steps of 128, at least twofold, at most 600 rounded up


@pytest.mark.parametrize("n_cached", [0, 127, 128])
def test_cache_overflow_is_an_error(n_cached):
    model = tiny_model()
    cache = KVCache(model.config, 1, 64)
    if n_cached:
        prefill(DecodeWeights(model), cache, [0], [[5] * n_cached])[0]
    with pytest.raises(ValueError, match="row 0 holds 128 tokens, 129 are needed"):
        prefill(DecodeWeights(model), cache, [0], [[5] * (129 - n_cached)])[0]


def test_hidden_states_times_the_head_are_the_logits():
    model = tiny_model()
    ids = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        full = model(ids, segment_lengths=[4, 5])
        hidden = model(ids, segment_lengths=[4, 5], return_hidden=True)
    assert torch.allclose(hidden @ model.head_weight().T, full, atol=1e-5)


def test_explicit_positions_equal_default_ones():
    model = tiny_model()
    ids = torch.randint(0, 61, (1, 5), generator=torch.Generator().manual_seed(5))
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    with torch.no_grad():
        explicit = model(ids, segment_lengths=[2, 3], position_ids_BT=positions)
        assert torch.equal(model(ids, segment_lengths=[2, 3]), explicit)
        # only differences of positions matter to RoPE
        assert torch.allclose(model(ids), model(ids, position_ids_BT=torch.arange(5)[None] + 9), rtol=1e-4, atol=1e-4)
        # stretched positions are another input
        stretched = model(ids, position_ids_BT=torch.arange(5)[None] * 3)
        assert not torch.allclose(model(ids), stretched, rtol=1e-2, atol=1e-2)


def test_activation_checkpointing_gives_the_same_gradients():
    model = tiny_model()
    ids = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(6))
    gradients = []
    for switch in (False, True):
        model.activation_checkpointing = switch
        model.zero_grad()
        model(ids, segment_lengths=[4, 5]).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_built_on_meta_keeps_rope():
    model = tiny_model(rope_scaling=LLAMA3)
    with torch.device("meta"):
        other = Transformer(model.config)
    other = other.to(torch.float32).to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), other(ids))


@pytest.mark.parametrize("lengths", [[3], [3, 3], [5, 0], [-1, 6], []], ids=str)
def test_wrong_segment_lengths_are_an_error(lengths):
    with pytest.raises(ValueError, match="segment_lengths"):
        tiny_model()(torch.zeros(1, 5, dtype=torch.long), segment_lengths=lengths)


def test_segments_need_one_row():
    with pytest.raises(ValueError, match="batch of 2"):
        tiny_model()(torch.zeros(2, 5, dtype=torch.long), segment_lengths=[5])


def test_init_weights_is_reproducible_and_scaled():
    one, two = (Transformer(replace(TINY, dim=64, ffn_dim=256, n_layers=8)) for _ in range(2))
    for model in (one, two):
        model.init_weights(torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.layers[0].feed_forward.w1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert one.layers[0].feed_forward.w2.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8) = 4
    assert torch.equal(one.norm.weight, torch.ones(64))


# ---------------------------------------------------------------------------------------------------------------------
# Config


@pytest.mark.parametrize(
    "name, expected",
    [
        ("codellama_7b", 6_738_546_688),
        ("codellama_13b", 13_016_028_160),
        ("codellama_34b", 33_743_970_304),
        ("llama31_8b", 8_030_261_248),
        ("qwen25_7b", 7_615_616_512),
    ],
)
def test_presets_have_the_published_size(name, expected):
    config = PRESETS[name]
    assert count_parameters(config) == expected
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == expected
    assert config.rope_theta == (5e5 if name == "llama31_8b" else 1e6)
    if name.startswith("codellama"):
        is_34b = name == "codellama_34b"
        assert (config.vocab_size, config.n_kv_heads) == ((32000, 8) if is_34b else (32016, config.n_heads))


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": True}, {"tie_embeddings": True}, {"n_kv_heads": 4, "head_dim": 10}], ids=str
)
def test_count_parameters_equals_the_module(changes):
    config = replace(TINY, **changes)
    assert count_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": True}, {"rope_scaling": LLAMA3}, {"tie_embeddings": True}, {"head_dim": 12}], ids=str
)
def test_config_round_trip(changes):
    config = replace(TINY, **changes)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_both_spellings_of_rope():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    base = config_to_hf(TINY)
    del base["rope_theta"]
    old = base | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    older = base | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = base | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **scaling}}
    assert config_from_hf(old) == config_from_hf(older) == config_from_hf(new)
    assert config_from_hf(new).rope_scaling == LLAMA3 and config_from_hf(new).rope_theta == 5e5
    assert config_from_hf(base | {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}).rope_theta == 7.0


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "sliding-window"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is ['full_attention', 'sliding_attention'], expected",
        ),
        ({"layer_types": 5}, "layer_types is 5"),
        ({"layer_types": ["full_attention"]}, "for each of 2 layers"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object or null"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"rms_norm_eps": "small"}, "norm_eps is 'small'"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ],
    ids=str,
)
def test_unsupported_config_is_one_clear_line(changes, words):
    with pytest.raises(ModelFolderError) as caught:
        config_from_hf(config_to_hf(TINY) | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_config_must_be_an_object():
    with pytest.raises(ModelFolderError, match="expected a JSON object"):
        config_from_hf(["llama"])
