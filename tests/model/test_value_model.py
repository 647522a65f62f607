"""model/value_model.py and its folder: values by hand, gradients everywhere, round trips, every kind of bad head."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelFolderError
from model.pretrained_weights import (
    INDEX_FILE,
    VALUE_HEAD_FILE,
    check_same_shape,
    load_pretrained,
    load_value_model,
    save_pretrained,
    save_value_model,
)
from model.value_model import ValueModel
from tests.support.tiny_run import VOCAB_SIZE, tiny_config, tiny_model


def tiny_value_model(seed: int = 0, **changes: object) -> ValueModel:
    """tiny_model with a value head of random numbers, so that no gradient is zero by accident."""
    model = ValueModel(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    model.backbone.init_weights(generator)
    with torch.no_grad():
        model.value_head.weight.normal_(generator=generator)
        model.value_head.bias.fill_(0.25)
    return model


def random_ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (1, n), generator=torch.Generator().manual_seed(seed))


def same(first: ValueModel, second: ValueModel) -> bool:
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    return all(name == other_name and torch.equal(p, q) for (name, p), (other_name, q) in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_an_untrained_critic_says_zero():
    model = ValueModel(tiny_config())
    model.backbone.init_weights(torch.Generator().manual_seed(0))
    assert not model(random_ids(7)).any()


def test_values_by_loop():
    """v_t = sum_d w_d h_td + b over the hidden states of the language model with the same blocks, in fp64."""
    model = tiny_value_model()
    language_model = tiny_model()
    ids_1T = random_ids(9)
    values_BT = model(ids_1T)
    assert values_BT.shape == (1, 9) and values_BT.dtype == torch.float32
    hidden_TD = language_model(ids_1T, return_hidden=True)[0].double()
    for t in range(9):
        value = model.value_head.bias.item()
        for d in range(32):
            value += model.value_head.weight[0, d].item() * hidden_TD[t, d].item()
        assert values_BT[0, t].item() == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_a_value_has_read_its_token_and_nothing_later():
    model = tiny_value_model().double()
    ids_1T = random_ids(8)
    values_T = model(ids_1T)[0]
    for t in range(8):
        assert model(ids_1T[:, : t + 1])[0, -1].item() == pytest.approx(values_T[t].item(), rel=1e-12)
        changed = ids_1T.clone()
        changed[0, t] += 1
        moved_T = model(changed)[0] != values_T
        assert not moved_T[:t].any() and moved_T[t]


def test_packed_rows_equal_rows_alone():
    model = tiny_value_model().double()
    rows = [random_ids(n, seed=n) for n in (5, 1, 11)]
    packed_T = model(torch.cat(rows, dim=1), segment_lengths=[5, 1, 11])[0]
    torch.testing.assert_close(packed_T, torch.cat([model(row)[0] for row in rows]), rtol=1e-12, atol=1e-12)
    positions_1T = torch.cat([torch.arange(n) for n in (5, 1, 11)])[None]
    given_T = model(torch.cat(rows, dim=1), segment_lengths=[5, 1, 11], position_ids_BT=positions_1T)[0]
    assert torch.equal(given_T, packed_T)


def test_bf16_weights_give_fp32_values():
    model = tiny_value_model().bfloat16()
    values_T = model(random_ids(50))[0]
    assert values_T.dtype == torch.float32
    assert (values_T != values_T.bfloat16()).any()  # not merely cast at the end


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient_and_it_is_right(tied, checkpointing):
    """A language model's head would get none: it must not exist, tied or not. Central differences in fp64."""
    model = tiny_value_model(tie_embeddings=tied).double()
    model.activation_checkpointing = checkpointing
    assert model.backbone.activation_checkpointing is checkpointing is model.activation_checkpointing
    assert not any("output" in name for name, _ in model.named_parameters())
    ids_1T = random_ids(6)
    weights_T = torch.linspace(-1, 2, 6, dtype=torch.float64)
    (model(ids_1T)[0] * weights_T).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        index = parameter.grad.abs().argmax()
        flat, step, sums = parameter.data.view(-1), 1e-5, []
        for sign in (1, -1):
            flat[index] += sign * step
            sums.append((model(ids_1T)[0] * weights_T).sum().item())
            flat[index] -= sign * step
        expected = (sums[0] - sums[1]) / (2 * step)
        assert parameter.grad.view(-1)[index].item() == pytest.approx(expected, rel=1e-5), name


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"qkv_bias": True}], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_round_trip(tmp_path, changes, max_shard_bytes):
    model = tiny_value_model(**changes)
    save_value_model(model, tmp_path / "critic", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "critic" / INDEX_FILE).exists() == (max_shard_bytes == 20_000)
    loaded = load_value_model(tmp_path / "critic")
    assert loaded.config == model.config and same(loaded, model)
    head = load_file(tmp_path / "critic" / VALUE_HEAD_FILE)
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        "value_head.weight": (1, 32),
        "value_head.bias": (1,),
    }
    stored = {name for path in (tmp_path / "critic").glob("model*.safetensors") for name in load_file(path)}
    assert not any("head" in name for name in stored)


def test_several_files_without_an_index(tmp_path):
    model = tiny_value_model()
    save_value_model(model, tmp_path / "critic", max_shard_bytes=20_000)
    (tmp_path / "critic" / INDEX_FILE).unlink()
    assert same(load_value_model(tmp_path / "critic"), model)
    load_pretrained(tmp_path / "critic")  # a tied backbone is a language model; the value head is none of its files


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_becomes_a_critic_with_a_head_of_zeros(tmp_path, tied):
    language_model = tiny_model(tie_embeddings=tied)
    save_pretrained(language_model, tmp_path / "model")
    critic = load_value_model(tmp_path / "model")
    assert not critic.value_head.weight.any() and not critic.value_head.bias.any()
    expected = dict(language_model.named_parameters())
    for name, parameter in critic.backbone.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_tied_head_of_its_own_does_not_disturb_a_critic(tmp_path):
    """Some folders claim a tied head and store another one: a policy must refuse that, a critic has no head."""
    save_pretrained(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.ones(VOCAB_SIZE, 32)}, path)
    with pytest.raises(ModelFolderError, match="lm_head.weight differs"):
        load_pretrained(tmp_path / "model")
    load_value_model(tmp_path / "model")


def test_a_critic_is_no_policy_and_an_export_replaces_its_head(tmp_path):
    save_value_model(tiny_value_model(tie_embeddings=False), tmp_path / "model")
    with pytest.raises(ModelFolderError, match="1 missing: lm_head.weight"):
        load_pretrained(tmp_path / "model")
    save_pretrained(tiny_model(), tmp_path / "model")
    assert not (tmp_path / "model" / VALUE_HEAD_FILE).exists()


def test_companions_dtype_and_architecture(tmp_path):
    source = tmp_path / "source"
    save_pretrained(tiny_model(qkv_bias=True), source)
    (source / "tokenizer.model").write_bytes(b"pieces")
    model = tiny_value_model(qkv_bias=True)
    save_value_model(model, tmp_path / "critic", dtype=torch.bfloat16, companions_from=source)
    config = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert (config["architectures"], config["torch_dtype"]) == (["Qwen2Model"], "bfloat16")
    assert (tmp_path / "critic" / "tokenizer.model").read_bytes() == b"pieces"
    for name in ("model.safetensors", VALUE_HEAD_FILE):
        assert {tensor.dtype for tensor in load_file(tmp_path / "critic" / name).values()} == {torch.bfloat16}
    loaded = load_value_model(tmp_path / "critic", dtype=torch.float64)
    assert torch.equal(loaded.value_head.weight, model.value_head.weight.bfloat16().double())


def without_bias(head):
    del head["value_head.bias"]


def two_outputs(head):
    head["value_head.weight"] = torch.zeros(2, 32)


def whole_numbers(head):
    head["value_head.weight"] = torch.zeros(1, 32, dtype=torch.int32)


def another_name(head):
    head["score.weight"] = head.pop("value_head.weight")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_bias, "1 missing: value_head.bias"),
        (two_outputs, r"mis-shaped: value_head.weight \(found \[2, 32\], expected \[1, 32\]\)"),
        (whole_numbers, "not floating-point"),
        (another_name, "1 unexpected: score.weight"),
    ],
)
def test_a_bad_head_is_refused_by_name(tmp_path, damage, words):
    save_value_model(tiny_value_model(), tmp_path / "critic")
    path = tmp_path / "critic" / VALUE_HEAD_FILE
    head = load_file(path)
    damage(head)
    save_file(head, path)
    with pytest.raises(ModelFolderError, match=words):
        load_value_model(tmp_path / "critic")


def test_a_truncated_head_is_refused(tmp_path):
    save_value_model(tiny_value_model(), tmp_path / "critic")
    path = tmp_path / "critic" / VALUE_HEAD_FILE
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelFolderError, match=f"{VALUE_HEAD_FILE}: not a readable safetensors file"):
        load_value_model(tmp_path / "critic")


def test_transformers_reads_the_backbone(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs requirements-peers.txt")
    model = tiny_value_model(tie_embeddings=False)
    save_value_model(model, tmp_path / "critic")
    peer, report = transformers.AutoModel.from_pretrained(tmp_path / "critic", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids_1T = random_ids(9)
    with torch.no_grad():
        expected = peer(ids_1T).last_hidden_state
        torch.testing.assert_close(model.backbone(ids_1T, return_hidden=True), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes of what trains together


def test_another_shape_is_refused_with_its_fields(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "policy")
    save_pretrained(tiny_model(n_kv_heads=4, rope_theta=5e5), tmp_path / "other")
    with pytest.raises(ModelFolderError) as caught:
        check_same_shape(tmp_path / "policy", tmp_path / "other", "reference")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'other'}: found a reference of another shape than the policy")
    assert message.endswith("n_kv_heads 4 (expected 2), rope_theta 500000.0 (expected 10000.0)") and "\n" not in message


def test_what_a_critic_may_differ_in(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "policy")
    save_pretrained(tiny_model(tie_embeddings=False, max_positions=64), tmp_path / "other")
    check_same_shape(tmp_path / "policy", tmp_path / "other", "critic")
    with pytest.raises(ModelFolderError, match="tie_embeddings False"):
        check_same_shape(tmp_path / "policy", tmp_path / "other", "reference")
    check_same_shape(tmp_path / "policy", tmp_path / "policy", "reference")
