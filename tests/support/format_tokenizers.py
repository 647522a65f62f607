"""Tokenizers that have the control tokens of every format: SentencePiece, and byte-level BPE as two model families."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from model.tokenizer import Tokenizer, load_tokenizer
from tests.support.tiny_run import ROOT

CONTROLS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|python_tag|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>"),
    *("<|assistant|>", "<|observation|>", "<human_end>", "<bot_end>"),
)
# How the two families split text before they merge bytes: LLaMA-3.1 takes up to three digits together, Qwen-2.5 one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bundled_with_controls(folder: Path) -> Tokenizer:
    """The bundled tokenizer.model with CONTROLS as further pieces, written into `folder`."""
    model = (ROOT / "assets/tiny_model/tokenizer.model").read_bytes()
    for text in CONTROLS:  # protobuf: a repeated field grows by what is appended. 1 piece {1 text, 2 score, 3 type}
        piece = b"\x0a" + bytes([len(text)]) + text.encode() + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x03"
        model += b"\x0a" + bytes([len(piece)]) + piece
    (folder / "tokenizer.model").write_bytes(model)
    return load_tokenizer(folder / "tokenizer.model")


def byte_level_bpe(folder: Path, texts: Iterable[str], *, family: str, vocab_size: int = 700) -> Tokenizer:
    """A tokenizer.json as of "qwen25" or "llama31", trained on `texts` and written into `folder`."""
    import tokenizers  # optional package

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    is_qwen = family == "qwen25"
    if is_qwen:
        bpe.normalizer = tokenizers.normalizers.NFC()
    pattern = SPLIT.replace("DIGITS", "" if is_qwen else "{1,3}")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROLS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if is_qwen:  # tokens of the vocabulary that any text may hold
        bpe.add_tokens([tokenizers.AddedToken(text, special=False) for text in ("<tool_call>", "</tool_call>")])
    bpe.save(str(folder / "tokenizer.json"))
    bos, eos = (None, "<|endoftext|>") if is_qwen else ("<|begin_of_text|>", "<|end_of_text|>")  # as the base models
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    return load_tokenizer(folder / "tokenizer.json")
