"""The turns of ChatML, which `qwen2` and `qwen25` share."""

from data.formats.prompt_format import Segment, control

# In addition to the tokenizer's EOS.
CHATML_ENDS = ("<|im_end|>", "<|endoftext|>")


def chatml_turn(role: str, content: str, index: int | None = None) -> list[Segment]:
    """A whole turn of context, with the line break after its end."""
    return [control("<|im_start|>"), Segment(f"{role}\n{content}", index), *chatml_end()]


def chatml_header() -> list[Segment]:
    """The beginning of the assistant's turn, up to its words."""
    return [control("<|im_start|>"), Segment("assistant\n")]


def chatml_end() -> list[Segment]:
    """The end of a turn."""
    return [control("<|im_end|>"), Segment("\n")]
