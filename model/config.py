"""The shape of a LLaMA-like model: one frozen dataclass, read from and written to Hugging Face's config.json.

LLaMA, CodeLLaMA, Llama-3.1 and Qwen-2/2.5 differ only in the fields below; the code that computes is the same.
"""

from dataclasses import dataclass, replace
from typing import Any

from model.folder_json import ModelFolderError
from printable import shown


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3.1's stretching of the slow RoPE frequencies (equation E16, second part)."""

    factor: float  # slow frequencies are divided by this; 8.0 in Llama-3.1
    low_freq_factor: float  # wavelengths above original_max_positions / this are divided fully; 1.0
    high_freq_factor: float  # wavelengths below original_max_positions / this stay as they are; 4.0
    original_max_positions: int  # tokens of context the base was trained with before stretching; 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that decides the shapes and the formula of a Transformer. Hashable, so it can key a cache."""

    vocab_size: int  # rows of the embedding; may exceed the tokenizer's pieces, never be fewer
    dim: int  # width of the residual stream
    n_layers: int  # blocks of attention + feed-forward
    n_heads: int  # query heads
    n_kv_heads: int  # key/value heads; n_heads = MHA, fewer = GQA; divides n_heads
    head_dim: int  # width of one head, even; usually dim / n_heads, but a field of its own
    ffn_dim: int  # inner width of SwiGLU
    norm_eps: float  # epsilon inside RMSNorm's root; 1e-5 LLaMA, 1e-6 Qwen-2
    rope_theta: float  # base of the RoPE wavelengths; 1e4 LLaMA-2, 1e6 CodeLLaMA, Qwen-2, 5e5 Llama-3
    rope_scaling: RopeScaling | None  # None, or Llama-3.1's stretching
    tie_embeddings: bool  # True: the output head is the embedding matrix
    qkv_bias: bool  # True for Qwen-2/2.5: biases on wq, wk, wv (never on wo)
    max_positions: int  # context length the weights were trained for; not enforced by the model

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelFolderError(f"model config: {name} is {shown(value)}, expected a positive whole number")
        if self.n_heads % self.n_kv_heads:
            raise ModelFolderError(
                f"model config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelFolderError(f"model config: head_dim is {self.head_dim}, expected an even number")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ModelFolderError(f"model config: {name} is {shown(value)}, expected a positive number")


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face config.json

# Every whole number of config.json that shapes the model, and the most that we take it for. The largest published
# models stay a factor of 5 or more below; above, a number is a slip or an attack, and building its model would hang.
MOST = {
    "vocab_size": 10**7,
    "hidden_size": 10**6,
    "num_hidden_layers": 1000,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "head_dim": 10**5,
    "intermediate_size": 10**7,
    "max_position_embeddings": 10**9,
    "original_max_position_embeddings": 10**9,
}


def config_from_hf(hf_config: dict[str, Any]) -> ModelConfig:
    """Reads the dict of a Hugging Face config.json (model_type llama or qwen2) into a ModelConfig.

    Accepts the older `rope_theta` + `rope_scaling` and the newer `rope_parameters` spelling. Raises ModelFolderError
    for a value of the wrong type or out of bounds, and for anything that this model does not compute (another
    activation, sliding windows in use, other RoPE scalings, biases on the output projection or the feed-forward),
    because ignoring such a field gives wrong logits without any sign of it.
    """
    if not isinstance(hf_config, dict):
        raise ModelFolderError(f"config.json: found {type(hf_config).__name__}, expected a JSON object")
    model_type = hf_config.get("model_type")
    if model_type not in ("llama", "qwen2"):
        raise ModelFolderError(f"config.json: model_type is {shown(model_type)}, expected 'llama' or 'qwen2'")
    dim = whole_number(hf_config, "hidden_size")
    n_heads = whole_number(hf_config, "num_attention_heads")
    head_dim = whole_number(hf_config, "head_dim", 0)
    if not head_dim and dim % n_heads:
        raise ModelFolderError(f"config.json: hidden_size {dim} is not a multiple of num_attention_heads {n_heads}")
    max_positions = whole_number(hf_config, "max_position_embeddings", 2048 if model_type == "llama" else 32768)
    rope_theta, rope_scaling = _rope_from_hf(hf_config, max_positions)
    config = ModelConfig(
        vocab_size=whole_number(hf_config, "vocab_size"),
        dim=dim,
        n_layers=whole_number(hf_config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=whole_number(hf_config, "num_key_value_heads", n_heads),
        head_dim=head_dim or dim // n_heads,
        ffn_dim=whole_number(hf_config, "intermediate_size"),
        norm_eps=number(hf_config, "rms_norm_eps", 1e-6, low=1e-30, high=1.0),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=switch(hf_config, "tie_word_embeddings"),
        qkv_bias=model_type == "qwen2",
        max_positions=max_positions,
    )
    _refuse_unsupported(hf_config, model_type, config.n_layers)
    check_token_ids(hf_config, config.vocab_size)
    return config


def whole_number(hf_config: dict[str, Any], key: str, default: int | None = None) -> int:
    """The whole number from 1 to MOST[key] under `key`; `default`, if there is one, where it is absent or null."""
    value = hf_config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value <= MOST[key]:  # exact: True is an int to isinstance
        raise ModelFolderError(
            f"config.json: {key} is {shown(value)}, expected a positive whole number of at most {MOST[key]}"
        )
    return value


def number(hf_config: dict[str, Any], key: str, default: float | None = None, *, low: float, high: float) -> float:
    """The number from `low` to `high` under `key`; `default` where it is absent. NaN is in no range."""
    value = hf_config.get(key, default)
    if type(value) not in (int, float) or not low <= value <= high:
        raise ModelFolderError(f"config.json: {key} is {shown(value)}, expected a number from {low:g} to {high:g}")
    return float(value)


def switch(hf_config: dict[str, Any], key: str) -> bool:
    """The true or false under `key`; false where it is absent or null."""
    value = hf_config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelFolderError(f"config.json: {key} is {shown(value)}, expected true or false")
    return bool(value)


def check_token_ids(hf_config: dict[str, Any], vocab_size: int) -> None:
    """Raise ModelFolderError unless the ids of BOS, EOS (one or a list) and padding are rows of the embedding, or null.

    Padding may be -1, as the first published LLaMA folders have it.
    """
    for key, lowest in (("bos_token_id", 0), ("eos_token_id", 0), ("pad_token_id", -1)):
        value = hf_config.get(key)
        ids = value if key == "eos_token_id" and isinstance(value, list) and value else [value]
        if value is not None and not all(type(each) is int and lowest <= each < vocab_size for each in ids):
            wanted = "a token id or a list of them" if key == "eos_token_id" else "a token id"
            raise ModelFolderError(
                f"config.json: {key} is {shown(value)}, expected {wanted}, from {lowest} to {vocab_size - 1}"
            )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json dict that transformers (old and new) and config_from_hf read back to the same model.

    Token ids (bos, eos) and the weights' dtype are added by save_pretrained, which knows the tokenizer and the tensors.
    """
    hf_config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if config.qkv_bias else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.rope_scaling is not None:
        hf_config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    if config.qkv_bias:
        hf_config["use_sliding_window"] = False
    else:
        hf_config["attention_bias"] = False
        hf_config["mlp_bias"] = False
    return hf_config


def _refuse_unsupported(hf_config: dict[str, Any], model_type: str, n_layers: int) -> None:
    activation = hf_config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelFolderError(f"config.json: hidden_act is {shown(activation)}, expected 'silu' (SwiGLU)")
    for key in ("attention_bias", "mlp_bias"):
        # Qwen-2 fixes its biases in code and ignores these keys; in LLaMA they also put a bias on wo / w2.
        if switch(hf_config, key) and model_type == "llama":
            raise ModelFolderError(f"config.json: {key} is true, which this model does not compute (expected false)")
    layer_types = hf_config.get("layer_types")
    if switch(hf_config, "use_sliding_window"):
        raise ModelFolderError("config.json: sliding-window attention is in use, expected full attention")
    if layer_types is not None and layer_types != ["full_attention"] * n_layers:
        raise ModelFolderError(
            f"config.json: layer_types is {shown(layer_types)}, expected 'full_attention' for each of {n_layers} layers"
        )
    if hf_config.get("quantization_config") not in (None, {}):
        raise ModelFolderError("config.json: quantization_config is set, expected plain floating-point weights")


def _rope_from_hf(hf_config: dict[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    merged = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = hf_config.get(key)
        if value is not None and not isinstance(value, dict):
            raise ModelFolderError(f"config.json: {key} is {shown(value)}, expected an object or null")
        merged |= value or {}
    for values in (hf_config, merged):
        factor = values.get("partial_rotary_factor")
        if factor is not None and (type(factor) not in (int, float) or factor != 1):
            raise ModelFolderError("config.json: partial_rotary_factor is set, expected RoPE over the whole head")
    rope_theta = number({"rope_theta": hf_config.get("rope_theta", 10000.0)} | merged, "rope_theta", low=1.0, high=1e12)
    rope_type = merged.get("rope_type", merged.get("type"))
    if rope_type in (None, "default"):
        return rope_theta, None
    if rope_type != "llama3":
        raise ModelFolderError(f"config.json: rope_scaling type is {shown(rope_type)}, expected none or 'llama3'")
    low_freq_factor = number(merged, "low_freq_factor", low=1e-6, high=1e6)
    high_freq_factor = number(merged, "high_freq_factor", low=1e-6, high=1e6)
    if high_freq_factor <= low_freq_factor:
        raise ModelFolderError("config.json: rope_scaling high_freq_factor must be above low_freq_factor")
    # The top level wins over the scaling's own, as in transformers; the context length is what is left.
    inner = whole_number(merged, "original_max_position_embeddings", max_positions)
    return rope_theta, RopeScaling(
        factor=number(merged, "factor", low=1e-6, high=1e6),
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        original_max_positions=whole_number(hf_config, "original_max_position_embeddings", inner),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def count_parameters(config: ModelConfig) -> int:
    """Number of trained numbers in Transformer(config); a tied head counts once."""
    query_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = 2 * config.dim * query_width + 2 * config.dim * kv_width
    bias = (query_width + 2 * kv_width) if config.qkv_bias else 0
    block = attention + bias + 3 * config.dim * config.ffn_dim + 2 * config.dim
    matrices = 1 if config.tie_embeddings else 2
    return matrices * config.vocab_size * config.dim + config.n_layers * block + config.dim


def _codellama(vocab_size: int, dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=128,
        ffn_dim=ffn_dim,
        norm_eps=1e-5,
        rope_theta=1e6,
        rope_scaling=None,
        tie_embeddings=False,
        qkv_bias=False,
        max_positions=16384,
    )


# As published. CodeLLaMA 7B and 13B know the infilling tokens (32,016 rows), 34B does not (32,000).
PRESETS: dict[str, ModelConfig] = {
    "codellama_7b": _codellama(32016, 4096, 32, 32, 32, 11008),  # 6,738,546,688 parameters
    "codellama_13b": _codellama(32016, 5120, 40, 40, 40, 13824),  # 13,016,028,160
    "codellama_34b": _codellama(32000, 8192, 48, 64, 8, 22016),  # 33,743,970,304
    "llama31_8b": replace(  # 8,030,261,248
        _codellama(128256, 4096, 32, 32, 8, 14336),
        rope_theta=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        max_positions=131072,
    ),
    "qwen25_7b": replace(  # 7,615,616,512
        _codellama(152064, 3584, 28, 28, 4, 18944), norm_eps=1e-6, qkv_bias=True, max_positions=131072
    ),
}
