"""Model folders made to break a reader: each ends run_sft.py in one printable line, code 2, fast, without memory.

Every case is one change of a good folder. Nearly all run in this process; a few run again as real commands.
"""

import json
import os
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelFolderError
from model.pretrained_weights import check_folder, load_pretrained
from model.tokenizer import load_tokenizer
from tests.support.tiny_run import command, copy_of_model, run_here, run_process

BIG, DEEP, LONG = "9" * 5000, 100000, "n" * 5000
SECONDS, MEGABYTES = 5.0, 200  # at most, for one case; above what the tests before it took


def values(**changes: object) -> Callable[[Path], None]:
    """config.json with other values."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def file(name: str, content: str | bytes | dict) -> Callable[[Path], None]:
    """One file with this content; an object is written as JSON."""

    def change(folder: Path) -> None:
        text = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def raw(key: str, text: str) -> Callable[[Path], None]:
    """config.json in which `key` has the value written `text`, which json.dumps would not write."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | {key: "HERE"}
        (folder / "config.json").write_text(json.dumps(config).replace('"HERE"', text))

    return change


def instead(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Something else in the place of a file: a folder, a pipe, a link."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def header(edit: Callable[[dict], object], *, length: int | None = None, tail: int = 0) -> Callable[[Path], None]:
    """model.safetensors whose header `edit` has changed (in place), or with another length field or more bytes."""

    def change(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + size])
        edited = edit(entries)
        encoded = edited if isinstance(edited, bytes) else json.dumps(entries).encode()
        data = content[8 + size :] + b"\0" * tail
        field = len(encoded) if length is None else length
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", field) + encoded + data)

    return change


def tensors(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """model.safetensors with other tensors, well-formed."""

    def change(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        edit(stored)
        save_file(stored, folder / "model.safetensors")

    return change


def index(weight_map: object, **more: object) -> Callable[[Path], None]:
    """An index in the place of the single file, which becomes one.safetensors."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        content = json.dumps({"weight_map": weight_map, **more})
        (folder / "model.safetensors.index.json").write_text(content)

    return change


NORM = "model.norm.weight"
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope(**changes: object) -> Callable[[Path], None]:
    return values(rope_scaling=ROPE | changes)


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)
WRONG = {
    "zero": 0,
    "negative": -4,
    "fraction": 2.5,
    "text": "4",
    "true": True,
    "list": [4],
    "object": {"a": 4},
    "1e15": 10**15,
    "300 digits": 10**300,
}
CASES: dict[str, Callable[[Path], None]] = {
    **{f"{key} {name}": values(**{key: value}) for key in SIZES for name, value in WRONG.items()},
    **{f"{key} of 5000 digits": raw(key, BIG) for key in SIZES},
    **{f"{key} 1e999": raw(key, "1e999") for key in ("rms_norm_eps", "rope_theta", "hidden_size")},
    **{f"{key} NaN": raw(key, "NaN") for key in ("rms_norm_eps", "rope_theta")},
    # each within its own bounds, terabytes together
    "10 million rows": values(vocab_size=10**7),
    "million wide": values(hidden_size=10**6, num_attention_heads=10, num_key_value_heads=1),
    "1000 layers": values(num_hidden_layers=1000),
    "a billion layers": values(num_hidden_layers=10**9),
    "terabytes": values(vocab_size=10**7, hidden_size=10**6, intermediate_size=10**7),
    "wide heads": values(head_dim=10**5, num_attention_heads=10**5, num_key_value_heads=10**5),
    "heads that do not divide": values(num_attention_heads=3, head_dim=None),
    "odd head_dim": values(head_dim=7),
    **{f"rope {key} {v}": rope(**{key: v}) for key in ("factor", "low_freq_factor") for v in (0, -1, "8", None, [8])},
    "rope NaN": raw("rope_scaling", '{"rope_type": "llama3", "factor": NaN}'),
    "rope inf": raw("rope_scaling", json.dumps(ROPE).replace("8.0", "1e999")),
    "rope original NaN": raw("original_max_position_embeddings", "NaN"),
    "rope original 0": rope(original_max_position_embeddings=0),
    "rope original 1e15": rope(original_max_position_embeddings=10**15),
    "rope original text at the top": lambda folder: (
        rope()(folder),
        values(original_max_position_embeddings="8192")(folder),
    ),
    "rope swapped": rope(low_freq_factor=5.0),
    "rope type list": values(rope_scaling={"rope_type": ["llama3"]}),
    "rope type long": values(rope_scaling={"type": LONG}),
    "rope text": values(rope_scaling="llama3"),
    "rope list": values(rope_parameters=[1]),
    "rope zero": values(rope_scaling=0),
    "theta in rope_parameters": values(rope_parameters={"rope_theta": "big"}),
    "theta 0": values(rope_theta=0),
    "theta true": values(rope_theta=True),
    "theta 1e300": values(rope_theta=1e300),
    "eps null": values(rms_norm_eps=None),
    "eps text": values(rms_norm_eps="1e-5"),
    "eps negative": values(rms_norm_eps=-1e-5),
    **{f"{key} {v!r}"[:40]: values(**{key: v}) for key in ("tie_word_embeddings", "mlp_bias") for v in ("no", 1, [])},
    "attention_bias object": values(attention_bias={}),
    "use_sliding_window text": values(use_sliding_window="false"),
    **{
        f"layer_types {str(v)[:20]}": values(layer_types=v)
        for v in (5, "full_attention", {}, [1, 2], [None], ["full_attention"], [[LONG]], ["full_attention"] * 100000)
    },
    "partial_rotary_factor true": values(partial_rotary_factor=True),
    "partial_rotary_factor list": values(partial_rotary_factor=[1]),
    "quantization_config": values(quantization_config=[LONG]),
    "model_type list": values(model_type=["llama"]),
    "model_type long": values(model_type=LONG),
    "model_type control": values(model_type="\x1b[2J\nllama\0"),
    "hidden_act number": values(hidden_act=3),
    "hidden_act surrogate": raw("hidden_act", '"\\udce9"'),
    **{
        f"eos {str(v)[:20]}": values(eos_token_id=v)
        for v in ("2", -1, 400, 2.0, True, {}, {"a": 2}, [], [2, "x"], [[2]], [10**30], [2] * 3 + [None], LONG)
    },
    "eos of 5000 digits": raw("eos_token_id", BIG),
    "bos list": values(bos_token_id=[1]),
    "pad -2": values(pad_token_id=-2),
    # config.json and its siblings as files
    **{
        f"{name}: {kind}": file(name, content)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")
        for kind, content in {
            "empty": "",
            "cut": '{"model_type": "lla',
            "list": "[]",
            "number": "7",
            "text": '"' + LONG + '"',
            "null": "null",
            "byte order mark": b"\xef\xbb\xbf{}",
            "bytes": b'{"a": "\xff\xfe"}',
            "zeros": b"\0" * 1000,
            "deep list": '{"a": ' + "[" * DEEP + "]" * DEEP + "}",
            "deep object": '{"a": ' * DEEP + "1" + "}" * DEEP,
            "5000 digits": '{"a": ' + BIG + "}",
            "infinity": '{"a": -Infinity}',
            "doubled key": '{"' + LONG + '": 1, "' + LONG + '": 1}',
            "two values": "{} {}",
        }.items()
    },
    **{
        f"{name} is a {kind}": instead(name, make)
        for name in ("config.json", "model.safetensors", "tokenizer.model", "generation_config.json")
        for kind, make in {"folder": Path.mkdir, "pipe": os.mkfifo}.items()
    },
    "config.json is a link to itself": instead("config.json", lambda path: path.symlink_to(path)),
    "config.json is endless": instead("config.json", lambda path: path.symlink_to("/dev/zero")),
    "config.json is 65 MiB": file("config.json", b"{}" + b" " * (65 << 20)),
    "model.safetensors is a broken link": instead("model.safetensors", lambda path: path.symlink_to("absent")),
    "generation eos text": file("generation_config.json", {"eos_token_id": "2"}),
    "generation eos 400": file("generation_config.json", {"eos_token_id": [2, 400]}),
    "generation eos object": file("generation_config.json", {"eos_token_id": {"a": [2]}}),
    "generation bos -1": file("generation_config.json", {"bos_token_id": -1}),
    **{f"add_bos_token {v}": file("tokenizer_config.json", {"add_bos_token": v}) for v in ("true", 1, 0, [], {}, 2.5)},
    # weights
    **{f"weights cut to {n}": lambda f, n=n: os.truncate(f / "model.safetensors", n) for n in (0, 4, 8, 200, 9000)},
    "weights text": file("model.safetensors", "x" * 10000),
    "header longer than the file": header(lambda h: None, length=10**6),
    "header of 2**63 bytes": header(lambda h: None, length=2**63),
    "header of 2**64 - 1 bytes": header(lambda h: None, length=2**64 - 1),
    "header of 90 MB": file("model.safetensors", struct.pack("<Q", 90 << 20) + b" " * (90 << 20)),
    "header deep": header(lambda h: b'{"a":' + b"[" * DEEP),
    "header not JSON": header(lambda h: b"{" * 500),
    "header list": header(lambda h: b"[]"),
    "header without tensors": header(lambda h: h.clear()),
    "bytes after the data": header(lambda h: None, tail=8),
    "offset negative": header(lambda h: h[NORM].update(data_offsets=[-8, 0])),
    "offset beyond the file": header(lambda h: h[NORM].update(data_offsets=[10**12, 10**12 + 128])),
    "offset of 2**64": header(lambda h: h[NORM].update(data_offsets=[0, 2**64])),
    "offsets swapped": header(lambda h: h[NORM].update(data_offsets=h[NORM]["data_offsets"][::-1])),
    "offsets overlap": header(lambda h: h[NORM].update(data_offsets=[0, 128])),
    "offsets text": header(lambda h: h[NORM].update(data_offsets="0")),
    "shape negative": header(lambda h: h[NORM].update(shape=[-32])),
    "shape huge": header(lambda h: h[NORM].update(shape=[2**63, 2**63])),
    "shape of other size": header(lambda h: h[NORM].update(shape=[31])),
    "shape of 100000 ones": header(lambda h: h[NORM].update(shape=[1] * 100000 + [32])),
    "dtype unknown": header(lambda h: h[NORM].update(dtype="Q7" * 2500)),
    "dtype number": header(lambda h: h[NORM].update(dtype=32)),
    "dtype integer": header(lambda h: h[NORM].update(dtype="I32")),
    "name long": header(lambda h: h.update({LONG: h.pop(NORM)})),
    "name control": header(lambda h: h.update({"\x1b[31m\nx\0": h.pop(NORM)})),
    "tensor missing": tensors(lambda t: t.pop(NORM)),
    "3000 tensors too many": tensors(lambda t: t.update({f"x{i}\u00e9": torch.zeros(1) for i in range(3000)})),
    "tensor empty": tensors(lambda t: t.update({NORM: torch.zeros(0)})),
    "tensor scalar": tensors(lambda t: t.update({NORM: torch.zeros(())})),
    # index
    "index outside": index({NORM: "../one.safetensors"}),
    "index absolute": index({NORM: "/etc/passwd"}),
    "index missing file": index({NORM: "two.safetensors"}),
    "index long name": index({NORM: LONG}),
    "index NUL": index({NORM: "a\0b"}),
    "index empty name": index({NORM: ""}),
    "index dot": index({NORM: "."}),
    "index dots": index({NORM: ".."}),
    "index control": index({NORM: "\x1b[31m\n"}),
    "index number": index({NORM: 1}),
    "index list": index([NORM]),
    "index empty": index({}),
    "index to config.json": index({NORM: "config.json"}),
    "index to a folder": lambda folder: (index({NORM: "sub"})(folder), (folder / "sub").mkdir()),
    "index 5000 files": index({f"t{i}": f"{LONG[:200]}{i}" for i in range(5000)}),
    "index outside next to a single file": file("model.safetensors.index.json", {"weight_map": {"a": "../b"}}),
    "value head broken": file("pytorch_model.bin", "x"),  # with no safetensors: see below
    # tokenizer
    "tokenizer missing": lambda folder: (folder / "tokenizer.model").unlink(),
    "tokenizer empty": file("tokenizer.model", ""),
    "tokenizer text": file("tokenizer.model", "x" * 10000),
    "tokenizer zeros": file("tokenizer.model", b"\0" * 10000),
    "tokenizer JSON": file("tokenizer.model", "{}"),
    **{f"tokenizer cut to {n}": lambda f, n=n: os.truncate(f / "tokenizer.model", n) for n in (1, 500, 1500, 3000)},
}
CASES["value head broken"] = lambda folder: (
    (folder / "model.safetensors").rename(folder / "value_head.safetensors"),
    file("pytorch_model.bin", "x")(folder),
)


def json_tokenizer(**changes: object) -> Callable[[Path], None]:
    """A small tokenizer.json in the place of tokenizer.model, with other values."""
    token = {"id": 0, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocab = {"</s>": 0, **{chr(32 + i): i for i in range(1, 95)}, "th": 95}
    tree = {
        "version": "1.0",
        "added_tokens": [token | {"special": True}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["t h"]},
    }
    model = {**tree["model"], **changes.pop("model", {})}

    def change(folder: Path) -> None:
        (folder / "tokenizer.model").unlink()
        (folder / "tokenizer.json").write_text(json.dumps(tree | changes | {"model": model}))

    return change


def and_then(first: Callable[[Path], None], second: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: (first(folder), second(folder))


PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "CAAAAAEAAAD/////AAAA"}
JSON_CASES: dict[str, Callable[[Path], None]] = {
    # these three make the Rust code panic, the first at the first text
    "panic in a normalizer": json_tokenizer(normalizer=PRECOMPILED),
    "panic in a pre-tokenizer": json_tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "panic in the model": json_tokenizer(model={"continuing_subword_prefix": "#" * 9}),
    "id of 2**32 - 1": json_tokenizer(model={"vocab": {"</s>": 0, "a": 2**32 - 1}, "merges": []}),
    "id negative": json_tokenizer(model={"vocab": {"</s>": -1}, "merges": []}),
    "id of 5000 digits": and_then(json_tokenizer(), file("tokenizer.json", '{"a": ' + BIG + "}")),
    "merge of unknown pieces": json_tokenizer(model={"merges": ["q zz"]}),
    "merges of numbers": json_tokenizer(model={"merges": [1]}),
    "model unknown": json_tokenizer(model={"type": LONG}),
    "model a list": and_then(json_tokenizer(), file("tokenizer.json", '{"model": []}')),
    "empty": and_then(json_tokenizer(), file("tokenizer.json", "")),
    "empty object": and_then(json_tokenizer(), file("tokenizer.json", "{}")),
    "deep": and_then(json_tokenizer(), file("tokenizer.json", '{"a": ' + "[" * DEEP)),
    "deep but whole": json_tokenizer(decoder=json.loads('{"decoders": ' * 200 + "[]" + "}" * 200)),
    "surrogate": json_tokenizer(model={"vocab": {"</s>": 0, "\udce9": 1}, "merges": []}),
    "expression that is wrong": json_tokenizer(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
    "no EOS": json_tokenizer(added_tokens=[], model={"vocab": {"a": 0}, "merges": []}),
    **{
        f"eos_token {str(v)[:12]}": and_then(json_tokenizer(), file("tokenizer_config.json", {"eos_token": v}))
        for v in (None, 2, [], {}, {"content": 2}, "absent", LONG, "\x1b[2J", "\udce9", True)
    },
    "bos_token list": and_then(json_tokenizer(), file("tokenizer_config.json", {"bos_token": ["<s>"]})),
    "config.json eos 300": and_then(json_tokenizer(), values(eos_token_id=300)),
    "config.json eos object": and_then(json_tokenizer(), values(eos_token_id={"a": 1})),
}


def check_line(text: str) -> None:
    """One line of printable ASCII and bounded length."""
    assert text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text, text[:500]
    assert all(" " <= each <= "~" for each in text[:-1]) and len(text) <= 2020, text[:500]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_all(cases: dict[str, Callable[[Path], None]], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Every case through run_sft.main, with its time and what it added to this process's peak memory."""
    report, before = [], peak_mib()
    for number, (name, change) in enumerate(cases.items()):
        folder = copy_of_model(tmp_path / str(number))
        change(folder)
        start = time.monotonic()
        code, out, error = run_here(tmp_path / "run", model=folder, max_steps=1)
        report.append((time.monotonic() - start, name))
        assert code == 2, f"{name}: code {code}, {out[-500:]}"
        assert capfd.readouterr().err == "", f"{name}: native code wrote to stderr"
        check_line(error)
        assert "final" not in out and not (tmp_path / "run" / "checkpoints").exists(), name
        shutil.rmtree(folder)
    slowest = max(report)
    print(f"{len(report)} folders, slowest {slowest[0]:.2f} s ({slowest[1]}), +{peak_mib() - before:.0f} MiB")
    assert slowest[0] < SECONDS and peak_mib() - before < MEGABYTES


def test_the_good_folder_is_good(tmp_path):
    code, _, error = run_here(tmp_path / "run", max_steps=1)
    assert (code, error) == (0, "")


@pytest.mark.slow
def test_hostile_folders(tmp_path, capfd):
    run_here(tmp_path / "good", max_steps=1)  # what a run needs anyhow is taken before the count
    run_all(CASES, tmp_path, capfd)


def test_hostile_tokenizer_json(tmp_path, capfd):
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    json_tokenizer()(folder := copy_of_model(tmp_path / "good"))
    assert check_folder(folder, load_tokenizer(folder)).vocab_size == 400  # the folder all cases start from
    run_all(JSON_CASES, tmp_path, capfd)


def test_a_panic_at_a_later_text_is_an_error_too(tmp_path):
    """The text that is tried on loading need not be the one that a broken file fails at."""
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    json_tokenizer(model={"continuing_subword_prefix": "", "vocab": {"</s>": 0, "a": 1}, "merges": []})(
        folder := copy_of_model(tmp_path / "model")
    )
    tokenizer = load_tokenizer(folder)

    class Panicking:
        def encode(self, *_: object, **__: object) -> None:
            raise type("PanicException", (BaseException,), {})("index out of bounds\nat line 3")

    tokenizer._start = Panicking()
    with pytest.raises(ModelFolderError, match="found a text it cannot encode .index out of bounds.$"):
        tokenizer.encode("a")


@pytest.mark.slow
def test_hostile_folders_in_processes(tmp_path):
    """Real commands: exit code, the whole of stderr, time, and peak memory next to that of a refused flag."""
    names = ["terabytes", "panic in a normalizer"]  # the other cases run in this process, above
    refused = run_process([sys.executable, "run_sft.py", "--sede", "1"])
    line = "--sede: found an unknown flag, expected one of those in --help\n"
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", line)
    bare = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    for name in names:
        folder = copy_of_model(tmp_path / name.replace(" ", "_"))
        {**CASES, **JSON_CASES}[name](folder)
        done = run_process(command(tmp_path / "run", model=folder, max_steps=1), seconds=120)
        assert (done.returncode, done.stdout) == (2, ""), (name, done)
        check_line(done.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"{len(names)} commands, peak {peak / 1024:.0f} MiB, {bare / 1024:.0f} MiB for a wrong flag")
    assert peak - bare < 100 * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are unusual and good


CASE_FOLDERS = Path(__file__).parents[3] / "shared" / "cases" / "models"


def test_a_single_file_wins_over_old_shards(tmp_path):
    """Other shards with an index next to model.safetensors; the logits are those of transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = CASE_FOLDERS / "single_plus_old_shards"
    if not folder.is_dir():
        pytest.skip("the folder with two sets of weights is not next to the repository")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        theirs, ours = peer(ids).logits, load_pretrained(folder)(ids)
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    with torch.no_grad():
        assert not torch.allclose(load_pretrained(tmp_path / "old")(ids), theirs, atol=1e-2)


def test_the_case_with_hostile_layer_types(tmp_path):
    folder = CASE_FOLDERS / "hostile_layer_types"
    if not folder.is_dir():
        pytest.skip("the folder with hostile layer types is not next to the repository")
    code, _, error = run_here(tmp_path / "run", model=folder, max_steps=1)
    assert code == 2 and "layer_types is 5" in error
    check_line(error)


def test_optional_values_may_be_absent_or_null(tmp_path):
    folder = copy_of_model(tmp_path / "model")
    nothing = ("attention_bias", "layer_types", "rope_scaling", "bos_token_id", "eos_token_id", "quantization_config")
    values(**dict.fromkeys(nothing), pad_token_id=-1, head_dim=None)(folder)
    assert check_folder(folder, load_tokenizer(folder)).head_dim == 8
    values(eos_token_id=[2, 5], layer_types=["full_attention"] * 2, use_sliding_window=False)(folder)
    file("generation_config.json", {"eos_token_id": [2], "temperature": 0.6})(folder)
    check_folder(folder, load_tokenizer(folder))
