"""data/formats/tl.py: the text of Table 13 letter by letter, and ids that inference and training share."""

import io
import random
from pathlib import Path

import pytest
import sentencepiece

from data.formats.prompt_format import Segment
from data.formats.table import FORMATS, encode_prompt, encode_segments
from data.formats.tl import ASSISTANT_HEADER, dialogue_segments, render_tools
from data.tool_calls import ToolCall, parse_tool_call
from data.trajectories import Message
from model.tokenizer import load_tokenizer
from tests.support.hostile_dialogues import hostile_messages

LLAMA2 = Path(__file__).resolve().parents[2] / "../shared/fixtures/llama2-tokenizer/tokenizer.model"


def tool(name: str, description: str, properties: dict, required: list[str]) -> dict:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


ADVICE = tool("random_advice", "Returns a random advice slip as a slip object.", {}, [])
SEARCH = tool(
    "name",
    "description",
    {
        "q": {"type": "string", "description": "description of q"},
        "p": {"type": "string", "description": "description of p"},
    },
    ["p"],
)

# ---------------------------------------------------------------------------------------------------------------------
# Text

DOCUMENTS = '''Function:
def random_advice():
    """
    Returns a random advice slip as a slip object.

    Args:
    """

Function:
def name(p: string, q: string = None):
    """
    description

    Args:
    p (string): description of p
    q (string): description of q
    """'''


def test_documents_are_those_of_table_13():
    assert render_tools([ADVICE, SEARCH]) == DOCUMENTS
    assert render_tools([]) == ""


def test_required_parameters_stand_first_in_their_own_order():
    schema = {"type": "integer", "description": "d"}
    text = render_tools([tool("f", "x", {"a": schema, "b": schema, "c": schema, "d": schema}, ["d", "b", "d"])])
    assert "def f(d: integer, b: integer, a: integer = None, c: integer = None):" in text
    assert text.index("    d (integer): d\n    b (integer)") < text.index("    a (integer)")
    assert "def f(a: integer = None):" in render_tools([tool("f", "x", {"a": schema}, [])])


def test_documents_with_gaps_are_rendered_all_the_same():
    beside = {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"properties": {"a": {}, "b": {"type": ["string", "null"], "description": None}}},
            "required": ["b"],
        },
    }
    assert render_tools([beside]).split("\n")[1:] == [
        "def f(b: string|null, a: any = None):",
        '    """',
        "    ",
        "",
        "    Args:",
        "    b (string|null): ",
        "    a (any): ",
        '    """',
    ]
    assert "def g():" in render_tools([{"type": "function", "function": {"name": "g"}}])


MESSAGES = [
    Message("user", "query"),
    Message("assistant", "raw", ToolCall("name", {"p": "value", "q": 3})),
    Message("tool", "feedback"),
    Message("assistant", "raw", ToolCall("finish", {"answer": "..."})),
]


def test_a_trajectory_reads_as_in_the_paper():
    segments = dialogue_segments([ADVICE, SEARCH], MESSAGES)
    assert "".join(segment.text for segment in segments) == (
        "System: " + DOCUMENTS + "\nUser: query"
        '\nAssistant: name(p="value", q=3)\nOutput: feedback\nAssistant: finish(answer="...")'
    )
    assert segments[1:4] == [
        Segment("\nUser: query", 0, False),
        Segment("\nAssistant:", 1, False),
        Segment(' name(p="value", q=3)', 1, True, name_span=(1, 5)),
    ]
    assert [segment.message_index for segment in segments] == [None, 0, 1, 1, 2, 3, 3]
    assert [segment.is_target for segment in segments] == [False, False, False, True, False, False, True]


def test_text_turns_unparsable_calls_and_system_text_stand_as_they_are():
    messages = [
        Message("system", "Be kind."),
        Message("user", "q"),
        Message("assistant", "Hello"),
        Message("user", "r"),
        Message("assistant", "f\n{broken", None, "broken"),
    ]
    text = "".join(segment.text for segment in dialogue_segments([ADVICE], messages))
    assert text.startswith("System: Be kind.\n\nFunction:\ndef random_advice")
    assert text.endswith("\nUser: q\nAssistant: Hello\nUser: r\nAssistant: f\n{broken")


def test_unknown_roles_are_refused():
    with pytest.raises(ValueError, match="role 'function'"):
        dialogue_segments([], [Message("function", "x")])


# ---------------------------------------------------------------------------------------------------------------------
# Ids


def llama2():
    if not LLAMA2.exists():
        pytest.skip("the tokenizer of LLaMA-2 is not beside this checkout")
    return load_tokenizer(LLAMA2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A BPE model of 600 pieces that merges over newlines and colons if one lets it."""
    rng = random.Random(0)
    words = [
        "Assistant",
        "User",
        "Output",
        "System",
        "Function",
        "def",
        "get",
        "search",
        "string",
        "finish",
        "answer",
        "None",
    ]
    lines = [
        "".join(rng.choice(words) + rng.choice([": ", "(", ")", " ", "=", '"', ":"]) for _ in range(12))
        for _ in range(400)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", ":\u2581", "\nAssistant:\u2581"],
        split_by_unicode_script=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


@pytest.fixture(params=["llama2", "small"])
def tokenizer(request):
    return llama2() if request.param == "llama2" else request.getfixturevalue("small")


def test_decoded_targets_parse_to_the_call(tokenizer):
    rng = random.Random(12)
    for _ in range(40):
        messages = hostile_messages(rng)
        for segment, ids in encode_segments(dialogue_segments([SEARCH], messages), tokenizer, FORMATS["tl"]):
            call = messages[segment.message_index].call if segment.is_target else None
            # SentencePiece writes spaces as U+2581, so a U+2581 in the text comes back as a space.
            if call and "\u2581" not in repr(call):
                assert parse_tool_call(tokenizer.decode(ids)) == call


def test_ordinary_text_has_the_ids_of_the_whole_string():
    """With the LLaMA-2 tokenizer the cut changes nothing: a newline is a byte piece, and no piece holds `: `."""
    tokenizer = llama2()
    segments = dialogue_segments([ADVICE, SEARCH], MESSAGES)
    encoded = encode_segments(segments, tokenizer, FORMATS["tl"])
    joined = [token for _, ids in encoded for token in ids]
    assert joined == [tokenizer.bos_id, *tokenizer.encode("".join(segment.text for segment in segments))]
    _, call = encoded[3]
    assert tokenizer.piece(call[0]) == " name"  # the space is part of the call's first token, not of the header


def test_prompt_ends_with_the_header_and_no_space(tokenizer):
    prompt = encode_prompt([ADVICE], [Message("user", "q")], tokenizer)
    header = tokenizer.encode_continuation(ASSISTANT_HEADER)
    assert prompt[-len(header) :] == header and tokenizer.decode(prompt).endswith("\nUser: q\nAssistant:")


class WithoutBos:
    """A tokenizer as Qwen-2's: it has no BOS."""

    bos_id = None

    def encode(self, text: str) -> list[int]:
        return [1, *map(ord, text)]

    def encode_continuation(self, text: str) -> list[int]:
        return list(map(ord, text))


def test_tokenizer_without_bos_and_first_segment_only_as_a_start():
    prompt = encode_prompt([], [Message("user", "q")], WithoutBos())
    assert prompt == [1, *map(ord, "System: \nUser: q\nAssistant:")]
