"""A tokenizer for tests: splits text by one regular expression and numbers the pieces as they come. No files needed."""

import re

LETTERS = re.compile(r" ?[A-Za-z]{1,5}|\(\)|=\"|\"\)|\s|.", re.DOTALL)
BARE_SPACES = re.compile(r" |[A-Za-z]{1,5}|\(\)|=\"|\"\)|\s|.", re.DOTALL)


class PieceTokenizer:
    """Like LLaMA's: a word takes its leading space along, `()` is one piece. bare_spaces: a space is its own piece."""

    def __init__(self, vocab_size: int = 2000, *, bare_spaces: bool = False, bos_id: int | None = 1) -> None:
        self.bos_id, self.eos_id, self.vocab_size = bos_id, 2, vocab_size
        self.pattern = BARE_SPACES if bare_spaces else LETTERS
        self.pieces = ["<unk>", "<s>", "</s>"]
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return self.encode_continuation(" " + text)

    def encode_continuation(self, text: str) -> list[int]:
        ids = []
        for piece in self.pattern.findall(text):
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
                assert len(self.pieces) <= self.vocab_size, "more pieces than vocab_size"
            ids.append(self.ids[piece])
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.piece(token_id) for token_id in ids if token_id > 2)[1:]

    def control_id(self, text: str) -> int | None:
        return None

    def piece(self, token_id: int) -> str:
        return self.pieces[token_id]
