"""A GGUF file (llama.cpp) as a model folder in Hugging Face's layout, so that `run_sft.py --model OUT` can train it.

    python -m model.import_gguf FILE OUT

For the architecture `llama` with a byte-level BPE tokenizer. OUT gets config.json, model.safetensors in float32,
tokenizer.json and tokenizer_config.json. The header is read by this file, since its counts may be hostile; quantised
blocks are turned into numbers by the optional package `gguf`. One tensor is in memory at a time.
"""

import argparse
import json
import math
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch
from torch import Tensor

from command_line import parse_arguments, polite_stop, run_command
from model.config import ModelConfig, config_from_hf, count_parameters
from model.folder_json import ModelFolderError
from model.pretrained_weights import WEIGHTS_FILE, check_folder, hf_name, write_safetensors
from model.tokenizer import check_vocabulary_fits, load_tokenizer
from model.transformer import Transformer
from printable import shown, terminal_text

MAX_HEADER_BYTES = 64 << 20  # a vocabulary of 256,000 tokens with its merges takes about 12 MB
MAX_ITEMS = 4_000_000  # of all lists together: tokens, their types, merges
ALIGNMENT = 32  # bytes, of the data of a tensor, unless the file says another

# Scalars of the metadata by their number in the file; 8 is a string, 9 a list.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PLAIN_TYPES = {0: numpy.dtype("<f4"), 1: numpy.dtype("<f2"), 30: numpy.dtype("<u2")}  # F32, F16, the bits of BF16
_OUTER = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
_BLOCK = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
# tokenizer.ggml.pre -> how a text is split before BPE, as tokenizer.json says it
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
            {**_BYTE_LEVEL, "use_regex": False},
        ],
    },
}
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where and how the file holds a tensor."""

    shape: tuple[int, ...]  # rows first, as in PyTorch
    kind: int  # number of its type in the file
    start: int  # bytes from the start of the file
    n_bytes: int


# ---------------------------------------------------------------------------------------------------------------------
# The header


class _Header:
    """The first bytes of a file, read from front to back; never beyond what the file has."""

    def __init__(self, path: Path) -> None:
        self.path, self.position, self.size = path, 0, path.stat().st_size
        self.n_items = 0  # of the lists read so far
        with path.open("rb") as file:
            self.content = file.read(MAX_HEADER_BYTES)

    def fail(self, found: str, expected: str) -> NoReturn:
        raise ModelFolderError(f"{self.path}: found {found} at byte {self.position}, expected {expected}")

    def take(self, n_bytes: int) -> bytes:
        part = self.content[self.position : self.position + n_bytes]
        if len(part) < n_bytes:
            self.fail(f"the end of the {'file' if len(self.content) == self.size else 'longest header read'}", "more")
        self.position += n_bytes
        return part

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str) -> int:
        """A count of things that take a byte or more each."""
        count = self.scalar("Q")
        if count > min(MAX_ITEMS, len(self.content) - self.position):
            self.fail(f"a count of {count} {what}", "at most what the file can hold")
        return count

    def text(self) -> str:
        try:
            return self.take(self.count("bytes of text")).decode("utf-8")
        except UnicodeDecodeError:
            self.fail("bytes that are not UTF-8", "text")

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind != 9:
            return self._value_of(kind)
        kind = self.scalar("I")
        count = self.count("items")
        self.n_items += count
        if self.n_items > MAX_ITEMS:
            self.fail(f"lists of more than {MAX_ITEMS} items", "fewer")
        if kind in _SCALARS:
            code = f"{count}{_SCALARS[kind]}"
            return list(struct.unpack("<" + code, self.take(struct.calcsize("<" + code))))
        return [self._value_of(kind) for _ in range(count)]

    def _value_of(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind not in _SCALARS:
            self.fail(f"a value of type {kind}", "a number, a text or a list of these")
        return self.scalar(_SCALARS[kind])


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """(metadata, tensors by name) of a GGUF file. Raises ModelFolderError in one line and OSError."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ModelFolderError(f"{path}: found no regular file, expected a GGUF file")
    header = _Header(path)
    if header.content[:4] != b"GGUF":
        header.fail(shown(header.content[:4]), "b'GGUF'")
    header.position = 4
    version = header.scalar("I")
    if version not in (2, 3):
        header.fail(f"version {version}", "2 or 3, little-endian")
    n_tensors, n_values = header.count("tensors"), header.count("values")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        name = header.text()
        if name in metadata:
            header.fail(f"the key {shown(name)} again", "it once")
        metadata[name] = header.value()
    places = {}
    for _ in range(n_tensors):
        name, n_dimensions = header.text(), header.scalar("I")
        if name in places or not 1 <= n_dimensions <= 2:
            header.fail(f"a tensor {shown(name)} of {n_dimensions} dimensions", "each name once, 1 or 2 dimensions")
        shape = tuple(header.scalar("Q") for _ in range(n_dimensions))[::-1]
        places[name] = (shape, header.scalar("I"), header.scalar("Q"))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        header.fail(f"general.alignment {shown(alignment)}", "a number of bytes")
    start = -(-header.position // alignment) * alignment
    return metadata, {name: _stored(header, name, *place, start) for name, place in places.items()}


def _stored(header: _Header, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> StoredTensor:
    block, block_bytes = _block_size(header.path, name, kind)
    n_numbers = math.prod(shape)
    where = f"{header.path}: tensor {shown(name)}"
    if shape[-1] % block:
        raise ModelFolderError(f"{where}: found rows of {shape[-1]}, expected blocks of {block}")
    stored = StoredTensor(shape, kind, start + offset, n_numbers // block * block_bytes)
    if stored.start + stored.n_bytes > header.size:
        raise ModelFolderError(
            f"{where}: found the end of the file at byte {header.size}, expected {stored.n_bytes} bytes from "
            f"{stored.start}"
        )
    return stored


def _block_size(path: Path, name: str, kind: int) -> tuple[int, int]:
    """(numbers, bytes) of a block of a tensor's type. Raises ModelFolderError for a type that cannot be read."""
    if kind in _PLAIN_TYPES:
        return 1, _PLAIN_TYPES[kind].itemsize
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise ModelFolderError(
            f"{path}: tensor {shown(name)} is quantised, which needs the package 'gguf' "
            "(pip install -r requirements-optional.txt)"
        ) from None
    try:
        block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        dequantize(numpy.zeros((1, n_bytes), numpy.uint8), GGMLQuantizationType(kind))
    except (KeyError, ValueError, RuntimeError):  # the last one: a type that it cannot dequantise
        raise ModelFolderError(
            f"{path}: tensor {shown(name)}: found type {kind}, expected F32, F16, BF16 or a quantised type that the "
            "package gguf reads"
        ) from None
    return block, n_bytes


# ---------------------------------------------------------------------------------------------------------------------
# Config and tokenizer


def hf_config_of(path: Path, metadata: dict[str, Any], tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """config.json of the file. Raises ModelFolderError for another architecture and what our model does not compute."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelFolderError(f"{path}: found the architecture {shown(architecture)}, expected 'llama'")
    said = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    scaling = said.get("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors or said.get("expert_count"):
        raise ModelFolderError(f"{path}: found scaled RoPE ({shown(scaling)}) or experts, expected a plain LLaMA")
    embedding = tensors.get("token_embd.weight")
    dim, n_heads = said.get("embedding_length"), said.get("attention.head_count")
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0] if embedding else None,
        "hidden_size": dim,
        "intermediate_size": said.get("feed_forward_length"),
        "num_hidden_layers": said.get("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": said.get("attention.head_count_kv", n_heads),
        "head_dim": said.get("attention.key_length", said.get("rope.dimension_count")),
        "hidden_act": "silu",
        "max_position_embeddings": said.get("context_length"),
        "rms_norm_eps": _rounded(said.get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _rounded(said.get("rope.freq_base", 10000.0)),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "float32",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token_id := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            hf_config[f"{name}_token_id"] = token_id
    try:
        config = config_from_hf(hf_config)
    except ModelFolderError as error:
        raise ModelFolderError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    for key in ("rope.dimension_count", "attention.value_length"):
        if (width := said.get(key, config.head_dim)) != config.head_dim:
            raise ModelFolderError(f"{path}: found {key} {shown(width)}, expected {config.head_dim}, a head's width")
    return hf_config


def _rounded(value: Any) -> Any:
    """A float32 as the decimal number that it was written from."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def tokenizer_of(path: Path, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) of a byte-level BPE tokenizer. Raises ModelFolderError for any other."""
    said = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    kind, splitting = said.get("model"), said.get("pre")
    if kind != "gpt2" or not isinstance(splitting, str) or splitting not in _PRE_TOKENIZERS:
        raise ModelFolderError(
            f"{path}: found a tokenizer {shown(kind)} with the splitting {shown(splitting)}, expected byte-level BPE, "
            f"'gpt2', with one of {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens, merges, kinds = (said.get(name) for name in ("tokens", "merges", "token_type"))
    lists = [each if isinstance(each, list) else [] for each in (tokens, merges, kinds)]
    if not all(isinstance(each, str) for each in (*lists[0], *lists[1])) or len(lists[0]) != len(lists[2]):
        raise ModelFolderError(f"{path}: found no lists of tokens, their types and merges, expected them")
    tokens, merges, kinds = lists
    if not tokens or len(set(tokens)) < len(tokens):
        raise ModelFolderError(f"{path}: found {len(tokens)} tokens, not all different, expected each once")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **flags, "special": kind == _CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    bpe = {
        "type": "BPE",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": splitting == "llama-bpe",
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": merges,
    }
    tree = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[splitting],
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": bpe,
    }
    settings = {"add_bos_token": said.get("add_bos_token", False), "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = said.get(f"{key}_token_id")
        if type(token_id) is int and 0 <= token_id < len(tokens):
            settings[f"{name}_token"] = tokens[token_id]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    return tree, settings


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def gguf_name(our_name: str) -> str:
    """GGUF's name of a parameter: layers.3.attention.wq.weight -> blk.3.attn_q.weight."""
    if our_name in _OUTER:
        return _OUTER[our_name]
    _, layer, rest = our_name.split(".", 2)
    return f"blk.{layer}.{_BLOCK[rest.removesuffix('.weight')]}.weight"


def check_tensors(path: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """Our name -> parameter without data. Raises ModelFolderError unless the file has just these, of these shapes."""
    n_numbers = sum(math.prod(stored.shape) for stored in tensors.values())
    if n_numbers != count_parameters(config):  # before a model of hostile sizes is built, even without data
        raise ModelFolderError(
            f"{path}: found {n_numbers} weights in {len(tensors)} tensors, expected {count_parameters(config)} by the "
            "sizes in its header"
        )
    with torch.device("meta"):
        parameters = dict(Transformer(config).state_dict())
    wanted = {gguf_name(name): tuple(parameter.shape) for name, parameter in parameters.items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        found = tensors[name].shape if name in tensors else "none"
        if found != wanted.get(name):
            raise ModelFolderError(f"{path}: tensor {shown(name)}: found {found}, expected {wanted.get(name, 'none')}")
    return parameters


def read_tensors(
    path: Path, config: ModelConfig, names: Sequence[str], tensors: dict[str, StoredTensor]
) -> Iterator[Tensor]:
    """The tensors of our names, one after the other, in float32 on the CPU."""
    for name in names:
        stored = tensors[gguf_name(name)]
        raw = numpy.fromfile(path, numpy.uint8, stored.n_bytes, offset=stored.start)
        tensor = _as_float32(raw, stored).reshape(stored.shape)
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            tensor = unpermute(tensor, config.n_heads if "wq" in name else config.n_kv_heads)
        yield tensor.contiguous()


def _as_float32(raw: numpy.ndarray, stored: StoredTensor) -> Tensor:
    if stored.kind == 30:  # BF16: the upper half of a float32
        values = (raw.view("<u2").astype(numpy.uint32) << 16).view(numpy.float32)
    elif stored.kind in _PLAIN_TYPES:
        values = raw.view(_PLAIN_TYPES[stored.kind]).astype(numpy.float32)
    else:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = raw.reshape(math.prod(stored.shape[:-1]), -1)
        values = dequantize(rows, GGMLQuantizationType(stored.kind)).astype(numpy.float32, copy=False)
    return torch.from_numpy(values)


def unpermute(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of wq or wk as Hugging Face orders them: GGUF has the two halves of each head's rows interleaved.

    llama.cpp rotates neighbours (0, 1), (2, 3), ...; here as in Hugging Face row i turns with row i + head_dim / 2.
    """
    head_dim = rows.shape[0] // n_heads
    return rows.view(n_heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def import_gguf(path: Path, output: Path) -> str:
    """Write the model folder, whole or not at all; a line that says what it is. Raises ModelFolderError, OSError."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelFolderError(f"{output}: found a file or a folder with content, expected a new or empty folder")
    metadata, tensors = read_header(path)
    hf_config = hf_config_of(path, metadata, tensors)
    config = config_from_hf(hf_config)
    tokenizer_json, tokenizer_config = tokenizer_of(path, metadata)
    parameters = check_tensors(path, config, tensors)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".import_gguf_", dir=output.parent))
    try:
        for name, content in (
            ("config.json", hf_config),
            ("tokenizer.json", tokenizer_json),
            ("tokenizer_config.json", tokenizer_config),
        ):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        tokenizer = load_tokenizer(folder)
        check_vocabulary_fits(tokenizer, config.vocab_size)
        write_safetensors(
            folder / WEIGHTS_FILE,
            {hf_name(name): parameter for name, parameter in parameters.items()},
            torch.float32,
            read_tensors(path, config, list(parameters), tensors),
        )
        check_folder(folder, tokenizer)
        folder.chmod(0o755)
        folder.rename(output)  # over an empty folder, or to a new name
    except ModelFolderError as error:  # about a file of the folder, which is not there any more
        raise ModelFolderError(f"{path}: {str(error).replace(f'{folder}/', '')}") from None
    except OSError as error:  # a full disk names no file
        error.filename = error.filename or str(output)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return f"{count_parameters(config)} parameters, {tokenizer.vocab_size} tokens"


@polite_stop("nothing is written")
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(prog="python -m model.import_gguf", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="GGUF file of the architecture llama")
    parser.add_argument("output", type=Path, metavar="OUT", help="new folder of the model")
    flags = parse_arguments(parser, arguments)
    return run_command(
        lambda: print(f"{terminal_text(str(flags.output))}: {import_gguf(flags.file, flags.output)}"),
        (ModelFolderError, OSError),
    )


if __name__ == "__main__":
    sys.exit(main())
