"""Text to token ids and back: SentencePiece `tokenizer.model`, or `tokenizer.json` (optional package `tokenizers`).

Both classes offer the same plain methods. Text is always data: a user who writes "</s>" or "<|eot_id|>" gets the ids
of those characters, never the control token, so no text can end a turn or forge one.
"""

import json
from pathlib import Path
from typing import Any

import sentencepiece

from model.config import ModelFolderError

# ModelProto.normalizer_spec (field 3) holding only add_dummy_prefix (field 3) = false. Protobuf merges a message field
# that occurs twice, so appending this to a serialized model changes that one switch and nothing else.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

# Names tried for the BOS and EOS of a tokenizer.json whose folder does not say them.
_COMMON_BOS = ("<s>", "<|begin_of_text|>")
_COMMON_EOS = ("</s>", "<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")


class SentencePieceTokenizer:
    """A `tokenizer.model`. `bos_id` is None if the model defines none; `vocab_size` counts its pieces."""

    def __init__(self, path: Path) -> None:
        try:
            self._start = sentencepiece.SentencePieceProcessor()
            self._start.LoadFromFile(str(path))
            serialized = self._start.serialized_model_proto()
            self._middle = sentencepiece.SentencePieceProcessor(model_proto=serialized + _NO_DUMMY_PREFIX)
        except (RuntimeError, OSError) as error:
            raise ModelFolderError(f"{path}: not a readable SentencePiece model ({_first_line(error)})") from error
        if self._start.eos_id() < 0:
            raise ModelFolderError(f"{path}: the tokenizer defines no EOS piece, expected one to end responses with")
        self.path = path
        self.vocab_size: int = self._start.vocab_size()
        self.eos_id: int = self._start.eos_id()
        self.bos_id: int | None = self._start.bos_id() if self._start.bos_id() >= 0 else None

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
        try:
            text = path.read_text(encoding="utf-8")
            self._start = Tokenizer.from_str(text)
            self._middle = Tokenizer.from_str(json.dumps(_without_prefix_space(json.loads(text))))
        except Exception as error:  # the package raises bare Exception for a malformed file
            raise ModelFolderError(f"{path}: not a readable tokenizer.json ({_first_line(error)})") from error
        for tokenizer in (self._start, self._middle):
            tokenizer.encode_special_tokens = True  # read "<|eot_id|>" in a text as its characters
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self.path = path
        self.vocab_size: int = max(self._start.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # Added tokens that are not special, such as Qwen's <tool_call>, are found in any text.
        self._control_ids = {
            token.content: token_id
            for token_id, token in self._start.get_added_tokens_decoder().items()
            if token.special
        }
        self.bos_id = self._special_id("bos", _COMMON_BOS)
        eos_id = self._special_id("eos", _COMMON_EOS)
        if eos_id is None:
            raise ModelFolderError(f"{path}: no EOS token, expected eos_token in tokenizer_config.json next to it")
        self.eos_id: int = eos_id

    def encode(self, text: str) -> list[int]:
        """Ids of text at the start of a sequence; no BOS, no EOS."""
        return self._start.encode(_encodable(text), add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that follows other text: no space is put in front."""
        return self._middle.encode(_encodable(text), add_special_tokens=False).ids

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

    def _special_id(self, kind: str, common_names: tuple[str, ...]) -> int | None:
        """The id of BOS or EOS: tokenizer_config.json's name, else config.json's number, else a well-known name."""
        settings = _read_json_object(self.path.with_name("tokenizer_config.json"))
        if f"{kind}_token" in settings:
            name = settings[f"{kind}_token"]
            name = name.get("content") if isinstance(name, dict) else name
            if name is None:
                return None  # said to have none, as Qwen-2's BOS
            token_id = self._start.token_to_id(name)
            if token_id is None:
                raise ModelFolderError(
                    f"{self.path}: {kind}_token {name!r} of tokenizer_config.json is not in the vocabulary"
                )
            return token_id
        number = _read_json_object(self.path.with_name("config.json")).get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
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
            raise ModelFolderError(f"{path}: no tokenizer, expected tokenizer.model or tokenizer.json")
        path = found[0]
    elif not path.is_file():
        raise ModelFolderError(f"{path}: no such file or folder, expected a tokenizer")
    return JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def check_vocabulary_fits(tokenizer: Tokenizer, embedding_rows: int) -> None:
    """Raises ModelFolderError when the tokenizer can produce ids that the embedding (V rows) does not have.

    The embedding may be larger (rows padded for speed); a smaller one would fail at the first rare token, deep inside
    a run.
    """
    if tokenizer.vocab_size > embedding_rows:
        raise ModelFolderError(
            f"{tokenizer.path}: {tokenizer.vocab_size} tokens, but the model's embedding has only {embedding_rows} rows"
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


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
