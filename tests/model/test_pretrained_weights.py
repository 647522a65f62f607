"""model/pretrained_weights.py: round trips, shards, ties, every kind of bad folder, sharded parameters over two
processes."""

import json
import os
import resource
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

from model.config import ModelFolderError, config_to_hf
from model.pretrained_weights import (
    INDEX_FILE,
    WEIGHTS_FILE,
    hf_name,
    load_pretrained,
    load_weights_into,
    read_config,
    save_pretrained,
    save_pretrained_streamed,
)
from model.transformer import Transformer
from tests.model.test_transformer import LLAMA3, TINY, tiny_model
from tests.support.processes import free_port, spawn


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


def same(a: Transformer, b: Transformer) -> bool:
    return a.config == b.config and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True}, {"rope_scaling": LLAMA3}, {"head_dim": 12}], ids=str
)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 5000])
def test_round_trip(tmp_path, changes, max_shard_bytes):
    model = tiny_model(**changes)
    save_pretrained_streamed(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model" / INDEX_FILE).exists() == (max_shard_bytes == 5000)
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path).values()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= max_shard_bytes
    assert same(load_pretrained(tmp_path / "model"), model)
    assert os.listdir(tmp_path) == ["model"]


def test_files_are_what_the_safetensors_library_reads(tmp_path):
    model = tiny_model(qkv_bias=True)
    save_pretrained_streamed(model, tmp_path / "model", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model" / WEIGHTS_FILE)
    assert set(stored) == {hf_name(name) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[hf_name(name)], parameter.detach().bfloat16())
    assert stored["model.layers.1.self_attn.k_proj.bias"].shape == (16,)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_files_of_the_safetensors_library_are_read(tmp_path):
    model = tiny_model()
    tensors = {hf_name(name): p.detach().half().clone() for name, p in model.named_parameters()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # left over in old checkpoints
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(TINY)))
    loaded = load_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(p, q.half().double()) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_several_files_without_an_index(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    names = list(tensors)
    save_file({n: tensors[n] for n in names[:4]}, folder / "a.safetensors")
    save_file({n: tensors[n] for n in names[4:]}, folder / "b.safetensors")
    assert same(load_pretrained(folder), tiny_model())
    save_file({names[0]: tensors[names[0]]}, folder / "c.safetensors")
    with pytest.raises(ModelFolderError, match=f"tensor {names[0]} is also in a.safetensors"):
        load_pretrained(folder)


@pytest.mark.parametrize("extra", ["a tensor of the other shard", "a tensor that the index lacks", "all tensors"])
def test_a_shard_with_tensors_that_the_index_does_not_name_there(folder, extra):
    """An older file under a shard's name: the index could pick half a model from each."""
    tensors = load_file(folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    names, other = list(tensors), {name: tensor + 1 for name, tensor in tensors.items()}
    files = {name: "a.safetensors" if name in names[:4] else "b.safetensors" for name in names}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    second = {name: tensors[name] for name in names[4:]}
    save_file({name: tensors[name] for name in names[:4]}, folder / "a.safetensors")
    save_file(second, folder / "b.safetensors")
    assert same(load_pretrained(folder), tiny_model())
    added = {"all tensors": other, "a tensor that the index lacks": {"ghost": torch.ones(3)}}
    save_file(second | added.get(extra, {names[0]: other[names[0]]}), folder / "b.safetensors")
    message = load_error(folder)
    assert f"{INDEX_FILE}: tensors in a file for which the index does not name them: " in message
    assert f"{'ghost' if 'lacks' in extra else names[0]} (b.safetensors)" in message


@pytest.mark.parametrize("kind", ["broken link", "folder", "pipe"])
@pytest.mark.parametrize("has_index", [True, False])
def test_old_shards_do_not_replace_a_file_that_cannot_be_read(folder, kind, has_index):
    single, names = folder / WEIGHTS_FILE, list(load_file(folder / WEIGHTS_FILE))
    single.rename(folder / "old.safetensors")
    if has_index:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, "old.safetensors")}))
    assert same(load_pretrained(folder), tiny_model())
    {"broken link": lambda path: path.symlink_to("absent"), "folder": Path.mkdir, "pipe": os.mkfifo}[kind](single)
    assert "model.safetensors: found a broken link, a folder or a pipe, expected a file" in load_error(folder)


def test_a_broken_link_is_no_missing_index(folder):
    (folder / WEIGHTS_FILE).rename(folder / "one.safetensors")
    (folder / INDEX_FILE).symlink_to("absent")
    assert f"{INDEX_FILE}: no such file" in load_error(folder)


def test_export_replaces_an_older_export_and_nothing_else(folder):
    save_pretrained_streamed(tiny_model(qkv_bias=True), folder, max_shard_bytes=5000)
    assert same(load_pretrained(folder), tiny_model(qkv_bias=True))
    assert not (folder / WEIGHTS_FILE).exists()  # a stale file beside the new shards would be ambiguous
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ModelFolderError, match="holds thesis.tex"):
        save_pretrained(tiny_model(), folder)
    assert (folder / "thesis.tex").exists() and same(load_pretrained(folder), tiny_model(qkv_bias=True))


def test_companions_are_copied_and_token_ids_kept(folder, tmp_path):
    (folder / "tokenizer.model").write_bytes(b"pieces")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 5, "eos_token_id": [6, 7]}))
    save_pretrained_streamed(tiny_model(), tmp_path / "copy", companions_from=folder)
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == b"pieces"
    assert (written["bos_token_id"], written["eos_token_id"]) == (5, [6, 7])


def test_tied_head_may_be_stored_if_it_is_equal(tmp_path):
    save_pretrained(tiny_model(tie_embeddings=True), tmp_path / "model")
    path = tmp_path / "model" / WEIGHTS_FILE
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    assert same(load_pretrained(tmp_path / "model"), tiny_model(tie_embeddings=True))
    tensors["lm_head.weight"][60, 3] += 1
    save_file(tensors, path)
    with pytest.raises(ModelFolderError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_pretrained(tmp_path / "model")


# ---------------------------------------------------------------------------------------------------------------------
# Bad folders


def load_error(folder: Path) -> str:
    with pytest.raises(ModelFolderError) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_differences_are_named_at_once(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    tensors["model.norm.weight"] = torch.zeros(25)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 24, dtype=torch.int8)
    save_file(tensors, folder / WEIGHTS_FILE)
    message = load_error(folder)
    for words in (
        "2 missing: ",
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
        "1 unexpected: model.layers.0.self_attn.q_proj.bias",
        "1 mis-shaped: model.norm.weight (found [25], expected [24])",
        "1 not floating-point: model.layers.0.mlp.up_proj.weight (I8)",
    ):
        assert words in message


def test_parameters_are_untouched_after_an_error(folder):
    model = tiny_model(tie_embeddings=True)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ModelFolderError, match="unexpected"):
        save_file({"x": torch.ones(1)}, folder / "extra.safetensors")
        (folder / WEIGHTS_FILE).rename(folder / "weights.safetensors")
        load_weights_into(model, folder)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 3000, -1])
def test_truncated_weights(folder, keep):
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:keep])
    message = load_error(folder)
    assert WEIGHTS_FILE in message and "truncated" in message


def test_corrupt_header(folder):
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
    assert "not a readable safetensors file" in load_error(folder)


def test_no_weights(folder):
    (folder / WEIGHTS_FILE).unlink()
    assert "no weights, found none" in load_error(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "found pytorch_model.bin" in load_error(folder)


def test_no_folder_and_no_config(folder, tmp_path):
    assert "no such file" in load_error(tmp_path / "absent")
    (folder / "config.json").unlink()
    assert "config.json: no such file" in load_error(folder)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"model_type": ', "config.json:1: not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"model_type": "gpt2"}', "model_type is 'gpt2'"),
        ("\ufeff{}", "config.json"),
    ],
)
def test_bad_config(folder, text, words):
    (folder / "config.json").write_text(text, encoding="utf-8")
    message = load_error(folder)
    assert words in message and str(folder) in message


@pytest.mark.parametrize(
    "index, words",
    [
        ("{", "not valid JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "expected names of files next to it"),
        ('{"weight_map": {"a": "model-00009-of-00009.safetensors"}}', "missing from the folder: model-00009"),
        ('{"weight_map": {"a": "one.safetensors"}}', "not in the file the index names: a (one.safetensors)"),
    ],
)
def test_bad_index(folder, index, words):
    (folder / WEIGHTS_FILE).rename(folder / "one.safetensors")
    (folder / INDEX_FILE).write_text(index)
    message = load_error(folder)
    assert words in message and INDEX_FILE in message


def test_config_of_another_size(folder):
    (folder / "config.json").write_text(json.dumps(config_to_hf(replace(TINY, vocab_size=64, n_layers=3))))
    message = load_error(folder)
    assert "9 missing" in message and "2 mis-shaped" in message


def test_full_disk_leaves_the_previous_export(folder):
    """A limit on file size stands for the full disk: write() fails with an OSError half way through."""
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            save_pretrained(tiny_model(qkv_bias=True), folder)
        except ModelFolderError as error:
            os._exit(0 if "could not be written" in str(error) and "\n" not in str(error) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert same(load_pretrained(folder), tiny_model()) and os.listdir(folder.parent) == ["model"]


# ---------------------------------------------------------------------------------------------------------------------
# Sharded parameters


def sharded_round_trip(rank: int, port: int, root: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.set_num_threads(1)
        source = Path(root) / "source"
        with torch.device("meta"):
            model = Transformer(read_config(source))
        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
        load_weights_into(model, source)
        expected = dict(tiny_model(vocab_size=63, ffn_dim=41).named_parameters())
        for name, parameter in model.state_dict().items():
            assert parameter.to_local().numel() < expected[name].numel()
            assert torch.equal(parameter.full_tensor(), expected[name]), name
        ids = torch.arange(12)[None]
        with torch.no_grad():
            model(ids)  # afterwards the root's parameters are unsharded; the export must not mind
        save_pretrained_streamed(model, Path(root) / "copy", max_shard_bytes=5000)
        blocker = Path(root) / "a_file"
        if rank == 0:
            blocker.write_text("in the way")
        try:
            save_pretrained_streamed(model, blocker)
        except ModelFolderError:
            dist.barrier()
        else:
            raise AssertionError(f"rank {rank} believes that the export exists")
    finally:
        dist.destroy_process_group()


def test_two_ranks_load_their_slices_and_export_the_whole(tmp_path):
    # 63 rows and 41 rows do not divide by 2: the ranks' slices differ in size
    model = tiny_model(vocab_size=63, ffn_dim=41)
    save_pretrained(model, tmp_path / "source")
    spawn(sharded_round_trip, (free_port(), str(tmp_path)), ranks=2)
    assert same(load_pretrained(tmp_path / "copy"), model)
