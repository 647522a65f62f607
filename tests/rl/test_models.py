"""rl/models.py: every model of a run holds the weights of its folder, and a folder that does not fit is refused.

pytest tests/rl/test_models.py
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.tokenizer import load_tokenizer
from rl.models import load_models
from rl.ppo_config import PPOConfig
from tests.support.tiny_ppo import policy_folder, run_ppo_here, save_with_tokenizer
from tests.support.tiny_run import tiny_model
from train.distributed import close_world, init_world


@pytest.fixture
def world():
    yield init_world("cpu")
    close_world()


def unlike_folder(model, stored: dict[str, torch.Tensor]) -> list[str]:
    """Names of parameters, value head aside, that hold no tensor of the folder bit for bit."""
    return [
        name
        for name, parameter in model.named_parameters()
        if not name.startswith("value_head.") and not any(torch.equal(parameter, each) for each in stored.values())
    ]


def test_all_three_models_hold_the_weights_of_their_folders(world, tmp_path):
    """Compared with what safetensors itself reads. A random critic, as in the released code, would be named here."""
    folders = {
        "policy": policy_folder(),
        "reference": save_with_tokenizer(tiny_model(seed=11), tmp_path / "reference"),
        "critic": save_with_tokenizer(tiny_model(seed=12), tmp_path / "critic"),
    }
    config = PPOConfig(
        model=str(folders["policy"]), reference_model=str(folders["reference"]), critic_model=str(folders["critic"])
    )
    models = load_models(config, load_tokenizer(folders["policy"]), world)
    stored = {role: load_file(folder / "model.safetensors") for role, folder in folders.items()}
    for role in folders:
        assert unlike_folder(getattr(models, role), stored[role]) == [], role
    assert not models.starts_at_reference
    assert not any(parameter.any() for parameter in models.critic.value_head.parameters())
    with torch.no_grad():
        for parameter in models.critic.parameters():
            parameter.normal_(std=0.02)
    n_backbone = len(list(models.critic.backbone.parameters()))
    assert len(unlike_folder(models.critic, stored["critic"])) == n_backbone > 10


def test_policy_and_critic_share_nothing(world):
    config = PPOConfig(model=str(policy_folder()))
    models = load_models(config, load_tokenizer(policy_folder()), world)
    assert models.starts_at_reference and models.reference.training is False
    pointers = [{each.data_ptr() for each in getattr(models, role).parameters()} for role in ("policy", "critic")]
    assert not pointers[0] & pointers[1]
    assert not any(parameter.requires_grad for parameter in models.reference.parameters())


def test_a_reference_in_the_compute_type_says_what_the_policy_says_to_the_bit(world):
    """The policy's weights are float32 and rounded at each use, the reference's have been rounded when they came in."""
    models = load_models(
        PPOConfig(model=str(policy_folder()), dtype="bfloat16"), load_tokenizer(policy_folder()), world
    )
    assert {parameter.dtype for parameter in models.policy.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in models.reference.parameters()} == {torch.bfloat16}
    input_ids_BT = torch.tensor([[1, 5, 9, 40, 7]])
    with torch.no_grad():
        ours_BTV, reference_BTV = models.policy(input_ids_BT), models.reference(input_ids_BT)
    assert ours_BTV.dtype == reference_BTV.dtype == torch.bfloat16 and torch.equal(ours_BTV, reference_BTV)


def test_a_critic_whose_names_do_not_match_is_refused(tmp_path):
    """The released fault: every name has a prefix that the model lacks, so nothing is loaded and training goes on."""
    folder = save_with_tokenizer(tiny_model(), tmp_path / "critic")
    stored = load_file(folder / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in stored.items()}, folder / "model.safetensors")
    code, _, err = run_ppo_here(tmp_path / "run", critic_model=folder)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    assert "missing: model.embed_tokens.weight" in err and "unexpected: module." in err
    assert not (tmp_path / "run").exists()
