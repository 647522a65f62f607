"""`--compile on`: the same losses and gradients, one compilation for all lengths, and no new names.

Compiling to machine code takes about 25 s of a CPU. The daily tests have PyTorch trace the blocks and then run what it
traced operator by operator, which must give the same bits.
"""

import pytest
import torch

from command_line import ConfigError
from model.value_model import ValueModel
from tests.support.processes import run
from tests.support.tiny_ppo import ppo_arguments
from tests.support.tiny_run import arguments, command, metrics_of, random_batch, run_process, tiny_config, tiny_model
from train import compilation
from train.compilation import check_compiler, compile_blocks
from train.distributed import apply_fsdp, close_world, init_world, local_part
from train.sft_config import SFTConfig
from train.sft_loop import train_step

LENGTHS = (40, 25, 61, 33, 90)


@pytest.fixture
def world():
    torch._dynamo.reset()
    yield init_world("cpu")
    close_world()


def steps_of(model, world):
    """Loss and gradient norm of a step at each length, and the weights after the last."""
    apply_fsdp(model, world, dtype="float32")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [random_batch(n, n_tokens=n) for n in LENGTHS]
    results = [train_step(SFTConfig(), model, optimizer, [batch], world, step=1) for batch in batches]
    figures = [(result.loss, result.grad_norm) for result in results]
    return figures, {name: local_part(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_compilation_serves_all_blocks_and_lengths(world, checkpointing):
    """Sharded, with another number of tokens in each step; a block has two parts."""
    expected, expected_weights = steps_of(tiny_model(), world)
    model, graphs = tiny_model(), []
    compile_blocks(model, lambda graph, _: graphs.append(graph) or graph.forward)
    model.activation_checkpointing = checkpointing
    found, weights = steps_of(model, world)
    assert len(graphs) == 2
    assert found == expected and list(weights) == list(expected_weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected_weights.items())


def test_a_critic_is_compiled_too(world):
    torch.manual_seed(0)
    model, ids_BT, graphs = ValueModel(tiny_config()), torch.arange(3, 12)[None], []
    model.value_head.weight.data.normal_()
    expected_BT = model(ids_BT)
    compile_blocks(model, lambda graph, _: graphs.append(graph) or graph.forward)
    assert torch.equal(model(ids_BT), expected_BT) and len(graphs) == 2


def test_a_compiler_is_tried_only_where_it_is_needed(monkeypatch):
    def refuse(_):
        error = RuntimeError("backend='inductor' raised:\nNoCompiler: none found\nand more")
        error.inner_exception = RuntimeError("NoCompiler: none found\nand more")
        raise error

    monkeypatch.setattr(compilation.torch, "compile", refuse)
    check_compiler("off", torch.device("cpu"))
    expected = r"--compile: found that PyTorch cannot compile \(NoCompiler: none found\), expected a C\+\+ compiler"
    with pytest.raises(ConfigError, match=expected + "$"):
        check_compiler("on", torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# To machine code


def assert_close_metrics(found, expected, **tolerance):
    assert len(found) == len(expected) > 0
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name in (name for name in row if not name.startswith("time/")):
            assert row[name] == pytest.approx(other[name], **tolerance), name


@pytest.mark.very_slow
@pytest.mark.parametrize(("ranks", "checkpointing"), [(1, "off"), (2, "on")])
def test_compiled_sft_has_the_losses_and_gradient_norms_of_eager(tmp_path, ranks, checkpointing):
    """The compiled run is resumed as an eager one after 4 steps."""
    flags = {"learning_rate": 1e-3, "activation_checkpointing": checkpointing}
    for name, steps, switch in (("eager", 5, "off"), ("compiled", 4, "on"), ("compiled", 5, "off")):
        line = arguments(tmp_path / name, max_steps=steps, compile=switch, **flags)
        code, _, err = run("run_sft", line, ranks)
        assert code == 0, err
    assert_close_metrics(metrics_of(tmp_path / "compiled"), metrics_of(tmp_path / "eager"), rel=1e-5)


@pytest.mark.very_slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_ppo_has_the_figures_of_eager(tmp_path, dtype):
    """Measuring without gradients and the update with them are two programs; the run checks that the first ratio is 1.

    In bf16 one value that is rounded the other way moves all later figures, so that only the checks of the run count.
    """
    for switch in ("off", "on"):
        line = ppo_arguments(tmp_path / switch, max_steps=2, responses_per_prompt=2, compile=switch, dtype=dtype)
        code, _, err = run("run_ppo", line)
        assert code == 0, err
    if dtype == "float32":  # the absolute bound is for differences of log-probabilities, which are only rounding
        assert_close_metrics(metrics_of(tmp_path / "on"), metrics_of(tmp_path / "off"), rel=1e-4, abs=1e-5)


@pytest.mark.very_slow
def test_without_a_compiler_a_run_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    ended = run_process(command(tmp_path / "run", max_steps=1, compile="on"))
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("--compile: found that PyTorch cannot compile (")
    assert ended.stderr.endswith("expected a C++ compiler\n")
