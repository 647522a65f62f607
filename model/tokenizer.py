"""Text to token ids and back: SentencePiece `tokenizer.model`, or `tokenizer.json` (optional package `tokenizers`).

Both classes offer the same plain methods. Text is always data: a user who writes "</s>" or "<|eot_id|>" gets the ids
of those characters, never the control token, so no text can end a turn or forge one.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from model.folder_json import ModelFolderError, first_line, read_json_object, read_text
from printable import shown

# ModelProto.normalizer_spec (field 3) holding only add_dummy_prefix (field 3) = false. Protobuf merges a message field
# that occurs twice, so appending this to a serialized model changes that one switch and nothing else.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

# Names tried for the BOS and EOS of a tokenizer.json whose folder does not say them.
_COMMON_BOS = ("<s>", "<|begin_of_text|>")
_COMMON_EOS = ("</s>", "<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")

# Encoded once when a tokenizer is loaded: a broken file often fails only at its first text.
_PROBE = 'get_weather(city="Oslo")\n  1234 it\'s \u00e9\u4e2d\U0001f600\t</s><|eot_id|>'


class SentencePieceTokenizer:
    """A `tokenizer.model`. `bos_id` starts every row, None if the tokenizer adds none; `vocab_size` counts pieces."""

    def __init__(self, path: Path) -> None:
        with _native_code(f"{path}: not a readable SentencePiece model"):
            self._start = sentencepiece.SentencePieceProcessor()
            self._start.LoadFromFile(str(path))
            serialized = self._start.serialized_model_proto()
            self._middle = sentencepiece.SentencePieceProcessor(model_proto=serialized + _NO_DUMMY_PREFIX)
            self.vocab_size: int = self._start.vocab_size()
            for token_id in range(self.vocab_size):
                self.piece(token_id)  # bytes that are not UTF-8 show here
            for tokenizer in (self._start, self._middle):
                tokenizer.decode(tokenizer.encode(_PROBE))
        if self._start.eos_id() < 0:
            raise ModelFolderError(f"{path}: the tokenizer defines no EOS piece, expected one to end responses with")
        self.path = path
        self.eos_id: int = self._start.eos_id()
        bos_id = self._start.bos_id()
        bos = self._start.id_to_piece(bos_id) if bos_id >= 0 else ""
        self.bos_id: int | None = bos_id if bos and adds_bos(path.parent, bos, default=True) else None

    def encode(self, text: str) -> list[int]:
        """Ids of text at the start of a sequence (SentencePiece puts a space before it); no BOS, no EOS."""
        return self._start.encode(_encodable(text))

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that follows other text: as encode, but without the space in front."""
        return self._middle.encode(_encodable(text))

    def decode(self, ids: list[int]) -> str:
        """Text of the ids: one leading space cut, control pieces (BOS, EOS) left out, unknown ids as U+FFFD."""
        parts, run = [], []
        for token_id in ids:
            if 0 <= token_id < self.vocab_size:
                run.append(token_id)
            else:  # rows of a padded embedding that no piece belongs to; a sampler can draw them
                parts += [self._decode_run(run, not parts), "\ufffd"]
                run = []
        return "".join(parts) + self._decode_run(run, not parts)

    def piece(self, token_id: int) -> str:
        """The text of one token for display: spaces as spaces, ASCII bytes as characters, other bytes as <0xE2>."""
        if not 0 <= token_id < self.vocab_size:
            return "\ufffd"
        piece = self._start.id_to_piece(token_id)
        if self._start.is_byte(token_id):
            value = int(piece[3:5], 16)
            return chr(value) if value < 128 else piece
        return piece.replace("\u2581", " ")

    def control_id(self, text: str) -> int | None:
        """The id of the control token written `text`, None if there is none: the only way from a text to such an id."""
        token_id = self._start.piece_to_id(_encodable(text))  # of an unknown text: the id of <unk>
        return token_id if self._start.is_control(token_id) else None

    def _decode_run(self, ids: list[int], at_start: bool) -> str:
        return (self._start if at_start else self._middle).decode(ids) if ids else ""


class JsonTokenizer:
    """A `tokenizer.json` (byte-level BPE of Llama-3 and Qwen-2, or a converted SentencePiece model)."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ModelFolderError(
                f"{path}: reading tokenizer.json needs the package 'tokenizers' "
                "(pip install -r requirements-optional.txt)"
            ) from error
        tree = read_json_object(path)
        with _native_code(f"{path}: not a readable tokenizer.json"):
            self._start = Tokenizer.from_str(read_text(path))
            self._middle = Tokenizer.from_str(json.dumps(_without_prefix_space(tree)))
            for tokenizer in (self._start, self._middle):
                tokenizer.encode_special_tokens = True  # read "<|eot_id|>" in a text as its characters
                tokenizer.no_truncation()
                tokenizer.no_padding()
                tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False).ids)
        self.path = path
        self.vocab_size: int = max(self._start.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # Added tokens that are not special, such as Qwen's <tool_call>, are found in any text.
        self._control_ids = {
            token.content: token_id
            for token_id, token in self._start.get_added_tokens_decoder().items()
            if token.special
        }
        bos_id = self._special_id("bos", _COMMON_BOS)
        bos = None if bos_id is None else self._start.id_to_token(bos_id)
        self.bos_id = bos_id if bos and adds_bos(path.parent, bos, default=False) else None
        eos_id = self._special_id("eos", _COMMON_EOS)
        if eos_id is None:
            raise ModelFolderError(f"{path}: no EOS token, expected eos_token in tokenizer_config.json next to it")
        self.eos_id: int = eos_id

    def encode(self, text: str) -> list[int]:
        """Ids of text at the start of a sequence; no BOS, no EOS."""
        return self._ids(self._start, text)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that follows other text: no space is put in front."""
        return self._ids(self._middle, text)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens; ids beyond the vocabulary become U+FFFD."""
        parts, run = [], []
        for token_id in ids:
            if 0 <= token_id < self.vocab_size:
                run.append(token_id)
            else:
                parts += [self._start.decode(run, skip_special_tokens=True), "\ufffd"]
                run = []
        return "".join(parts) + self._start.decode(run, skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """The text of one token for display, spaces as spaces."""
        name = self._start.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if name is None:
            return "\ufffd"
        if name.startswith("<0x") and name.endswith(">") and len(name) == 6:
            value = int(name[3:5], 16)
            return chr(value) if value < 128 else name
        if "\u2581" in name:
            return name.replace("\u2581", " ")
        return self._start.decode([token_id], skip_special_tokens=False)

    def control_id(self, text: str) -> int | None:
        """The id of the special token written `text`, None if there is none: the only way from a text to such an id."""
        return self._control_ids.get(text)

    def _ids(self, tokenizer: Any, text: str) -> list[int]:
        try:
            return tokenizer.encode(_encodable(text), add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust, which a broken file can bring on at any text
            raise ModelFolderError(f"{self.path}: found a text it cannot encode ({first_line(error)})") from None

    def _special_id(self, kind: str, common_names: tuple[str, ...]) -> int | None:
        """The id of BOS or EOS: tokenizer_config.json's name, else config.json's number, else a well-known name."""
        settings = _read_if_there(self.path.with_name("tokenizer_config.json"))
        if f"{kind}_token" in settings:
            name = settings[f"{kind}_token"]
            name = name.get("content") if isinstance(name, dict) else name
            if name is None:
                return None  # said to have none, as Qwen-2's BOS
            token_id = self._start.token_to_id(_encodable(name)) if isinstance(name, str) else None
            if token_id is None:
                raise ModelFolderError(
                    f"{self.path}: {kind}_token {shown(name)} of tokenizer_config.json is not in the vocabulary"
                )
            return token_id
        number = _read_if_there(self.path.with_name("config.json")).get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if number is not None:
            if type(number) is not int or not 0 <= number < self.vocab_size:
                raise ModelFolderError(
                    f"{self.path.with_name('config.json')}: {kind}_token_id is {shown(number)}, expected a token id "
                    f"from 0 to {self.vocab_size - 1}"
                )
            return number
        return next((i for i in map(self._start.token_to_id, common_names) if i is not None), None)


Tokenizer = SentencePieceTokenizer | JsonTokenizer


def load_tokenizer(model_dir_or_file: str | Path) -> Tokenizer:
    """The tokenizer of a model folder (`tokenizer.model` before `tokenizer.json`) or of one such file.

    Raises ModelFolderError with one line when there is none, it cannot be read, or `tokenizers` is needed and not
    installed.
    """
    path = Path(model_dir_or_file)
    if path.is_dir():
        candidates = [path / "tokenizer.model", path / "tokenizer.json"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            hint = f"; the model of this run is {path / 'final'}" if (path / "final").is_dir() else ""
            raise ModelFolderError(f"{path}: found no tokenizer, expected tokenizer.model or tokenizer.json{hint}")
        path = found[0]
    elif not path.is_file():
        raise ModelFolderError(f"{path}: found no such file or folder, expected a tokenizer")
    return JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def check_vocabulary_fits(tokenizer: Tokenizer, embedding_rows: int) -> None:
    """Raises ModelFolderError when the tokenizer can produce ids that the embedding (V rows) does not have.

    The embedding may be larger (rows padded for speed); a smaller one would fail at the first rare token, deep inside
    a run.
    """
    if tokenizer.vocab_size > embedding_rows:
        raise ModelFolderError(
            f"{tokenizer.path}: found a tokenizer of {tokenizer.vocab_size} ids, expected at most {embedding_rows}, "
            "the rows of the model's embedding"
        )


def _encodable(text: str) -> str:
    """Text with lone surrogates (possible after JSON escapes) replaced by U+FFFD: they have no UTF-8 form."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _without_prefix_space(node: Any) -> Any:
    """A copy of a tokenizer.json tree in which no normalizer or pre-tokenizer puts a space before the text."""
    if isinstance(node, list):
        return [_without_prefix_space(item) for item in node]
    if not isinstance(node, dict):
        return node
    copy = {key: value if key == "vocab" else _without_prefix_space(value) for key, value in node.items()}
    for key in ("normalizers", "pretokenizers"):
        if isinstance(copy.get(key), list):
            copy[key] = [item for item in copy[key] if item.get("type") != "Prepend"]
    if isinstance(copy.get("normalizer"), dict) and copy["normalizer"].get("type") == "Prepend":
        copy["normalizer"] = None
    if copy.get("type") == "Metaspace" and "decoders" not in node:
        copy["prepend_scheme"] = "never"
        copy.pop("add_prefix_space", None)
    elif "add_prefix_space" in copy:
        copy["add_prefix_space"] = False
    return copy


def adds_bos(folder: Path, bos: str, *, default: bool) -> bool:
    """Whether a tokenizer puts the token `bos` at the start of a text; training, prompts and evaluation follow it.

    `add_bos_token` of tokenizer_config.json decides; without it the post-processor of tokenizer.json, if it has one;
    else `default` (LLaMA's SentencePiece models add it, a tokenizer.json adds what it says). Raises ModelFolderError.
    """
    stated = _read_if_there(folder / "tokenizer_config.json").get("add_bos_token")
    if stated is not None:
        if not isinstance(stated, bool):
            raise ModelFolderError(
                f"{folder / 'tokenizer_config.json'}: add_bos_token is {shown(stated)}, expected true or false"
            )
        return stated
    processor = _read_if_there(folder / "tokenizer.json").get("post_processor")
    return default if processor is None else _starts_with(processor, bos)


def _starts_with(processor: Any, bos: str) -> bool:
    """Whether a post-processor of tokenizer.json puts the token `bos` before a text."""
    if not isinstance(processor, dict):
        return False
    if isinstance(processor.get("processors"), list):  # a Sequence
        return any(_starts_with(each, bos) for each in processor["processors"])
    if isinstance(processor.get("single"), list):  # a TemplateProcessing
        first = next(iter(processor["single"]), None)
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        return isinstance(special, dict) and special.get("id") == bos
    cls = processor.get("cls")  # of BertProcessing and RobertaProcessing: the token and its id
    return isinstance(cls, list) and cls[:1] == [bos]


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


@contextlib.contextmanager
def _native_code(problem: str) -> Iterator[None]:
    """Turn whatever C++ or Rust code raises into a ModelFolderError that begins with `problem`.

    A panic of Rust is no Exception (only a BaseException), and both libraries also write to file descriptor 2 on their
    own: what they say there is dropped, since the error says it once.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ModelFolderError):
        raise
    except BaseException as error:
        raise ModelFolderError(f"{problem} ({first_line(error)})") from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
