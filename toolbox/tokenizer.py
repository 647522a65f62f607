"""The SentencePiece model of the toolbox world: one piece per word, one per template string, characters and bytes for
the rest.

The space is its own piece (phrases contain theirs), so a value has the same ids in a request and in a call: copying it
is induction.
"""

import io
import string

import sentencepiece

from toolbox.words import (
    DOMAINS,
    MONTHS,
    QUALIFIER_PHRASES,
    REQUEST_PREFIXES,
    RESULT_WORDS,
    TITLE_FIRST,
    TITLE_SECOND,
    VALUE_KINDS,
    VERB_CUES,
)
from toolbox.world import special_tools

# Strings of the prompt template, of both call forms (`p="v"` and the base's `p: "v"`) and of the feedback.
TEMPLATE_PIECES = (
    "System: ",
    "Function:\ndef ",
    "\n\nFunction:\ndef ",
    "\nUser: ",
    "\nAssistant:",
    "\nOutput: ",
    ": string",
    ": integer",
    ": string = None",
    ": integer = None",
    '):\n    """\n    ',
    '():\n    """\n    ',
    "\n\n    Args:\n    ",
    '\n\n    Args:\n    """',
    '\n    """',
    " (string): ",
    " (integer): ",
    "\n    ",
    ", ",
    '", ',
    '="',
    '")',
    ': "',
    ": ",
    "()",
    ".",
    '{"result": "',
    '{"error": "',
    '"}',
    "Response error.",
    "connection error.",
    "name '",
    "' is not defined",
    "'",
    "The function cannot be executed successfully with the given parameters for the reason: ",
    "() got an unexpected keyword argument '",
    "() missing 1 required positional argument: '",
    " the ",
    " of the ",
    " : ",
    " . then ",
    " and ",
    " it",
    " km",
    " people",
    "about the ",
    "with ",
    " with ",
)


def vocabulary_strings() -> list[str]:
    """Every user-defined piece: template strings, phrases with their spaces, words; longest first, no duplicates."""
    texts = [domain_word for domain in DOMAINS for pair in domain.nouns.items() for domain_word in pair]
    texts += [cue for verb, cues in VERB_CUES.items() for cue in (verb, *cues)]
    texts += list(QUALIFIER_PHRASES) + RESULT_WORDS + TITLE_FIRST + TITLE_SECOND + MONTHS
    for kind in VALUE_KINDS.values():
        texts += [*kind.names, kind.description, *kind.values]  # a description is one piece, which names the kind
    for tool in special_tools():
        properties = tool["function"]["parameters"]["properties"]
        texts += [tool["function"]["description"], *tool["function"]["name"].split("_"), *properties]
        texts += [schema["description"] for schema in properties.values()]
    glue = list(TEMPLATE_PIECES) + [prefix for prefix in REQUEST_PREFIXES if prefix]
    for kind in VALUE_KINDS.values():
        for phrase in kind.phrases:
            before = phrase.partition("{}")[0]
            glue += [before, " " + before]
    # with the space before it: " of little size" must win over the glue " of "
    glue += [f" {phrase}" for _, phrase in QUALIFIER_PHRASES.values()]
    return sorted({text for text in texts + glue if len(text) > 1}, key=lambda text: (-len(text), text))


def train_tokenizer() -> bytes:
    """The serialised SentencePiece model; the same bytes in every call."""
    # SentencePiece writes the space so
    symbols = [text.replace(" ", "\u2581") for text in [" ", *vocabulary_strings()]]
    characters = string.ascii_letters + string.digits + string.punctuation
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(characters)] * 10),
        model_writer=model,
        model_type="bpe",
        normalization_rule_name="identity",
        user_defined_symbols=symbols,
        required_chars=characters,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=-1,
        # specials, bytes, pieces: no room for a merge
        vocab_size=3 + 256 + len(set(symbols) | set(characters)),
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()
