"""final/ stops where it was trained to stop, whatever the folder before said: transformers.generate is the judge."""

import json
import os
from pathlib import Path

import pytest
import torch

from model.pretrained_weights import describe_eos_change, exported_eos, load_pretrained, save_pretrained
from model.sampling import generate
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from tests.support.tiny_ppo import policy_folder, run_ppo_here
from tests.support.tiny_run import copy_of_model, run_here, tiny_config, tiny_files

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def chain_model(chain: list[int], **changes: object) -> Transformer:
    """A model that follows chain[i] by chain[i + 1], and the last by the first again: it never ends on its own.

    Attention and feed-forward are zero. Token chain[i] is embedded as unit vector i, and the head scores its successor
    by that vector; every other token is embedded as the last unit vector, which scores chain[0].
    """
    model = Transformer(tiny_config(tie_embeddings=False, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.zero_()
        model.tok_embeddings.weight[:, -1] = 1.0
        model.output.weight[chain[0], -1] = 1.0
        for index, token_id in enumerate(chain):
            model.tok_embeddings.weight[token_id] = torch.eye(model.config.dim)[index]
            model.output.weight[chain[(index + 1) % len(chain)], index] = 1.0
    return model


def write_byte_level_bpe(folder: Path, *, eos_token: str) -> None:
    """A tokenizer.json as Qwen's: byte-level BPE with control tokens, trained here; no BOS."""
    tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = tiny_files()[1].read_text()
    tokenizer.train_from_iterator([text[start : start + 200] for start in range(0, len(text), 200)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token, "add_bos_token": False}))


def source_folder(kind: str, folder: Path) -> tuple[Path, list[int]]:
    """A model folder whose config.json names another EOS than the trained one, and the tokens that the model says in a
    circle, the trained end of turn last. That of "qwen25" is its format's, not the tokenizer's own EOS."""
    if kind == "sentencepiece":
        chain = [7, 8, 2]
        save_pretrained(chain_model(chain), folder)
        (folder / "tokenizer.model").write_bytes((tiny_files()[0] / "tokenizer.model").read_bytes())
    else:
        folder.mkdir()
        write_byte_level_bpe(folder, eos_token="<|endoftext|>" if kind == "qwen25" else "<|im_end|>")
        tokenizer = load_tokenizer(folder)
        chain = [100, 101, tokenizer.control_id("<|im_end|>")]
        model = chain_model(chain, vocab_size=tokenizer.vocab_size, qkv_bias=True)
        save_pretrained(model, folder.with_name("weights"))
        for path in folder.with_name("weights").iterdir():
            path.rename(folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 1, "eos_token_id": 5}))
    return folder, chain


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level BPE", "qwen25"])
@pytest.mark.parametrize("stated", [None, 5, [5, 6]], ids=str)
def test_generate_ends_at_the_trained_end_of_turn(kind, stated, tmp_path):
    """`stated`: the EOS of generation_config.json; None: there is no such file."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    source, chain = source_folder(kind, tmp_path / "source")
    if stated is not None:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": stated, "do_sample": False}))
    form = "qwen25" if kind == "qwen25" else "tl"
    code, out, err = run_here(tmp_path / "run", model=source, prompt_format=form, max_steps=1, learning_rate=0.0)
    assert code == 0, err
    said = [line for line in out.splitlines() if line.startswith("end of turn of the exported model")]
    assert len(said) == 1 and f"config.json said 5, is now {chain[-1]}" in said[0]
    assert (f"generation_config.json said {json.dumps(stated)}, is now" in said[0]) == (stated is not None)
    final = tmp_path / "run" / "final"
    assert json.loads((final / "config.json").read_text())["eos_token_id"] == chain[-1]
    assert (final / "generation_config.json").exists() == (stated is not None)
    if stated is not None:
        settings = json.loads((final / "generation_config.json").read_text())
        assert settings == {"eos_token_id": chain[-1], "do_sample": False}
    prompt_ids = torch.tensor([load_tokenizer(final).encode("weather of Oslo")])
    before = transformers.AutoModelForCausalLM.from_pretrained(source)
    after = transformers.AutoModelForCausalLM.from_pretrained(final)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    n_prompt = prompt_ids.shape[1]
    assert before.generate(prompt_ids, **settings)[0, n_prompt:].tolist() == chain * 4  # it ran on
    assert after.generate(prompt_ids, **settings)[0, n_prompt:].tolist() == chain
    ours = generate(load_pretrained(final), prompt_ids.tolist(), max_new_tokens=12, eos_id=chain[-1])
    assert ours[0][0] == chain


@pytest.mark.slow
def test_ppo_exports_the_trained_end_of_turn_too(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in policy_folder().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2], "temperature": 0.7}')
    code, out, err = run_ppo_here(tmp_path / "run", model=folder, max_steps=1)
    assert code == 0, err
    assert "config.json said null, is now 2; generation_config.json said [5, 2], is now [2, 5]" in out
    final = tmp_path / "run" / "final"
    assert json.loads((final / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((final / "generation_config.json").read_text()) == {"eos_token_id": [2, 5], "temperature": 0.7}


def test_the_exported_eos():
    assert exported_eos(None, 2) == exported_eos(2, 2) == exported_eos(7, 2) == exported_eos([7, 8], 2) == 2
    assert exported_eos([7, 2, 8], 2) == [2, 7, 8] and exported_eos([2], 2) == [2]


def test_nothing_is_said_where_nothing_changes(tmp_path):
    folder = copy_of_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    assert describe_eos_change(folder, 2) == ""
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert describe_eos_change(folder, 2) == ""
    assert describe_eos_change(folder, 5).endswith(
        "config.json said 2, is now 5; generation_config.json said [2, 5], is now [5, 2]"
    )
