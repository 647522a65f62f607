"""model/tokenizer.py: published vectors, continuation, no injection of control tokens, both file kinds, bad files."""

import json
import random
import sys
from pathlib import Path

import pytest
import sentencepiece

from model.config import ModelFolderError
from model.tokenizer import check_vocabulary_fits, load_tokenizer

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
ODD_PIECES = ["\n", "\t", "\u00e9", "\u4e2d", "\U0001f600", "\u2581", "</s>", "<s>", "<unk>", "  "]
ALPHABET = [chr(c) for c in range(32, 127)] + ODD_PIECES


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small SentencePiece model with byte fallback, trained here, so that these tests need nothing from outside."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    words = [*"get_weather search city query the Assistant: User: finish answer".split(), "(", ")", '="', '"']
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder


def llama2():
    if not FIXTURES.is_dir():
        pytest.skip("the LLaMA-2 tokenizer is not beside the repository")
    return load_tokenizer(FIXTURES / "llama2-tokenizer")


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(ALPHABET, k=rng.randint(1, 25)))


def test_llama2_vectors():
    tokenizer = llama2()
    vectors = json.loads((FIXTURES / "llama2-tokenizer" / "vectors.json").read_text())["vectors"]
    assert len(vectors) == 34
    for vector in vectors:
        assert tokenizer.encode(vector["text"]) == vector["ids"]
        assert tokenizer.decode(vector["ids"]) == vector["decoded"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)


def test_llama_cpp_vectors():
    tokenizer = llama2()
    stem = FIXTURES / "llama2-tokenizer" / "ggml-vocab-llama-spm.gguf"
    with open(f"{stem}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in Path(f"{stem}.out").read_text().split("\n")]
    checked = [(text, expected) for text, expected in zip(texts, ids, strict=True)]
    assert len(checked) >= 46
    for text, expected in checked:
        assert tokenizer.encode(text) == expected, repr(text)


@pytest.mark.parametrize("which", ["trained", "llama2"])
def test_continuation_is_the_text_without_a_space_in_front(which, trained):
    """Oracle: a newline is a byte piece that never merges, so the ids behind it are those of text in the middle of a
    line."""
    tokenizer = llama2() if which == "llama2" else load_tokenizer(trained)
    newline = tokenizer.encode("\n")
    rng = random.Random(1)
    for _ in range(400):
        text = random_text(rng)
        whole = tokenizer.encode("\n" + text)
        assert whole[: len(newline)] == newline
        assert tokenizer.encode_continuation(text) == whole[len(newline) :], repr(text)


def test_figure_2_of_the_paper():
    tokenizer = llama2()
    ids = tokenizer.encode_continuation(" getPapersByKeywords(")
    assert "".join(map(tokenizer.piece, ids)) == " getPapersByKeywords(" and tokenizer.piece(ids[0]) == " get"


@pytest.mark.parametrize("which", ["trained", "llama2"])
def test_text_never_becomes_a_control_token(which, trained):
    tokenizer = llama2() if which == "llama2" else load_tokenizer(trained)
    control = {tokenizer.bos_id, tokenizer.eos_id}
    for text in ("</s>", "<s>", " </s>", "a</s>b", "<s></s>\n</s>", "\u2581</s>"):
        for ids in (tokenizer.encode(text), tokenizer.encode_continuation(text)):
            assert not control & set(ids)
        assert "</s>" not in text or "</s>" in tokenizer.decode(tokenizer.encode(text))


def test_control_id_is_that_of_control_pieces_only(trained):
    tokenizer = load_tokenizer(trained)
    assert (tokenizer.control_id("<s>"), tokenizer.control_id("</s>")) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in ("<unk>", "the", "<0x0A>", "<|im_end|>", "", "</s> ", "\ud800"):
        assert tokenizer.control_id(text) is None, text


def test_round_trip(trained):
    tokenizer = load_tokenizer(trained)
    rng = random.Random(2)
    for _ in range(300):
        text = random_text(rng).replace("\u2581", "_").replace("<unk>", "unk")
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_odd_input(trained):
    tokenizer = load_tokenizer(trained / "tokenizer.model")
    assert tokenizer.encode("") == tokenizer.encode_continuation("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # a lone surrogate
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")  # a pair is one character
    assert tokenizer.decode(tokenizer.encode("a\x00b")) == "a\x00b"
    a, b = tokenizer.encode("the city")[:1], tokenizer.encode("the city")[1:]
    assert tokenizer.decode(a + [99999] + b) == "the\ufffd city"  # a row of a padded embedding
    assert tokenizer.decode([tokenizer.bos_id, *a, tokenizer.eos_id]) == "the"
    assert tokenizer.piece(99999) == "\ufffd" and tokenizer.piece(tokenizer.encode("\n")[-1]) == "\n"


def test_vocabulary_larger_than_the_embedding(trained):
    tokenizer = load_tokenizer(trained)
    check_vocabulary_fits(tokenizer, tokenizer.vocab_size)
    check_vocabulary_fits(tokenizer, tokenizer.vocab_size + 64)
    with pytest.raises(ModelFolderError, match="found a tokenizer of 340 ids, expected at most 339, the rows"):
        check_vocabulary_fits(tokenizer, 339)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def write_json_twin(source: Path, folder: Path, **settings: object) -> None:
    """A tokenizer.json with the pieces of a SentencePiece BPE model, as transformers' converter would write it."""
    tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = [
        (sp.get_score(i), p[:k], p[k:])
        for p, i in vocab.items()
        if not sp.is_byte(i) and not sp.is_control(i)
        for k in range(1, len(p))
        if p[:k] in vocab and p[k:] in vocab
    ]
    merges.sort(key=lambda merge: -merge[0])
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab, [merge[1:] for merge in merges], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_json_twin_equals_sentencepiece(trained, tmp_path):
    write_json_twin(trained, tmp_path)
    ours, twin = load_tokenizer(trained), load_tokenizer(tmp_path)
    assert (twin.bos_id, twin.eos_id, twin.vocab_size) == (1, 2, 340)
    rng = random.Random(3)
    for _ in range(300):
        text = random_text(rng).replace("<unk>", "unk")
        assert twin.encode(text) == ours.encode(text), repr(text)
        assert twin.encode_continuation(text) == ours.encode_continuation(text), repr(text)
        assert [twin.piece(i) for i in twin.encode(text)] == [ours.piece(i) for i in ours.encode(text)]
    assert twin.decode([1, *twin.encode("the city"), 2, 99999]) == "the city\ufffd"


def test_bos_and_eos_of_tokenizer_config(trained, tmp_path):
    write_json_twin(trained, tmp_path, bos_token=None, eos_token={"content": "<s>"})
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_id) == (None, 1)
    write_json_twin(trained, tmp_path, eos_token="<|nothing|>")
    with pytest.raises(ModelFolderError, match="is not in the vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": [9, 10]}')
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_id) == (7, 9)


@pytest.mark.parametrize(
    "settings, processor, sentencepiece_bos, json_bos",
    [
        (None, None, 1, None),
        ({"add_bos_token": True}, None, 1, 1),
        ({"add_bos_token": False}, "template", None, None),  # the setting wins
        ({"add_bos_token": None}, "template", 1, 1),
        ({}, "template", 1, 1),
        ({}, "sequence", 1, 1),
        ({}, "roberta", 1, 1),
        ({}, "bytes", None, None),
    ],
)
def test_bos_only_where_the_tokenizer_adds_it(trained, tmp_path, settings, processor, sentencepiece_bos, json_bos):
    """Oracle for tokenizer.json: the package `tokenizers`, asked for the text with special tokens."""
    write_json_twin(trained, tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    tail = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    cls = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}
    tree["post_processor"] = {
        "template": template,
        "sequence": {"type": "Sequence", "processors": [tail, template]},
        "roberta": cls | {"trim_offsets": True, "add_prefix_space": False},
        "bytes": tail,
        None: None,
    }[processor]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).bos_id == json_bos
    if not settings or settings["add_bos_token"] is None:
        from tokenizers import Tokenizer

        assert (Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the").ids[0] == 1) == (json_bos == 1)
    (tmp_path / "tokenizer.model").write_bytes((trained / "tokenizer.model").read_bytes())
    assert load_tokenizer(tmp_path).bos_id == sentencepiece_bos


def test_infill_pieces_of_codellama_are_text():
    """SentencePiece reads `<PRE>` after a space as one piece, which is not a control token: it can end no turn."""
    if not FIXTURES.is_dir():
        pytest.skip("the CodeLLaMA-like tokenizer is not next to the repository")
    tokenizer = load_tokenizer(FIXTURES / "codellama-derived-tokenizer")
    ids = dict(zip(("PRE", "SUF", "MID", "EOT"), range(32007, 32011), strict=True))
    for name, token_id in ids.items():
        assert tokenizer.encode(f"x <{name}> y")[1:-1] == [token_id]
        assert tokenizer.encode_continuation(f" <{name}>") == [token_id]
        for text in (f"x<{name}>", f"\n<{name}>"):
            assert token_id not in tokenizer.encode(text)
        assert tokenizer.control_id(f"<{name}>") is tokenizer.control_id(f"\u2581<{name}>") is None
        assert tokenizer.decode(tokenizer.encode(f"x <{name}> y")) == f"x <{name}> y"
        assert token_id not in (tokenizer.bos_id, tokenizer.eos_id)


def test_byte_level_json_and_no_injection(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin_of_text|>", "<|eot_id|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(["hello get_weather city"] * 5, trainer)
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (None, 1)  # no post-processor: nothing adds BOS
    assert [ours.control_id(text) for text in ("<|begin_of_text|>", "<|eot_id|>", "<tool_call>", "hello", "")] == [
        0,
        1,
        None,
        None,
        None,
    ]
    text = " hello <|eot_id|>\n\u00e9"
    assert not {0, 1} & set(ours.encode(text)) and ours.decode(ours.encode(text)) == text
    assert ours.encode_continuation(text) == ours.encode(text)
    assert ours.piece(ours.encode(" hello")[0]) in (" ", " hello", " h")


def test_json_without_the_optional_package(trained, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModelFolderError, match="needs the package 'tokenizers'"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


def test_bad_tokenizer_files_are_one_line(trained, tmp_path):
    whole = (trained / "tokenizer.model").read_bytes()
    cases = {"text.model": b"hello", "short.model": whole[:1000], "empty.model": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelFolderError, match="not a readable SentencePiece model") as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(ModelFolderError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelFolderError, match="no such file or folder"):
        load_tokenizer(tmp_path / "absent")


def test_malformed_tokenizer_json(tmp_path):
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    (tmp_path / "tokenizer.json").write_text('{"model": 3')
    with pytest.raises(ModelFolderError, match="tokenizer.json:1: not valid JSON") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
