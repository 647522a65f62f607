"""`--plan`: counted bytes by hand, traced bytes against deeper traces and against a process's own memory."""

import contextlib
import ctypes
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import run_ppo
import run_sft
from benchmarks.benchmark_plan import make_batch, measure, shape_of
from model.sampling import RowDecoder, continue_prompts, decoder_for, generate
from rl.plan import full_batch, rows_of_rank
from rl.ppo_config import PPOConfig
from tests.support.processes import free_port, spawn
from tests.support.tiny_run import run_here
from train import plan as train_plan
from train.distributed import close_world
from train.plan import (
    GIB,
    OTHER_PART,
    Phase,
    Plan,
    Setup,
    host_memory,
    memory_limit,
    plan_lines,
    plan_step,
    planned_ranks,
    setup_of,
)
from train.sft_config import SFTConfig

MB = 2**20
TINY_MODEL = Path("assets/tiny_model")


@pytest.fixture(autouse=True)
def no_process_group() -> None:
    """A plan makes a group of its own. A run that failed in an earlier test of this process leaves one open."""
    close_world()


@pytest.fixture
def folder_without_weights(tmp_path: Path) -> Path:
    """The bundled model's config and tokenizer only."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(TINY_MODEL / name, folder)
    return folder


@pytest.fixture
def one_layer_without_weights(folder_without_weights: Path) -> Path:
    """As above, where the numbers do not matter: a layer costs half a second of tracing."""
    path = folder_without_weights / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    return folder_without_weights


def table_of(printed: str) -> dict[str, list[float]]:
    """The rows of numbers below "GiB per rank", by name."""
    lines = printed[printed.index("GiB per rank") :].splitlines()[1:-1]
    return {line[:24].strip(): [float(cell) for cell in line[24:].split()] for line in lines}


class TestCommand:
    def test_sft_prints_steps_memory_and_disk_without_weights(self, folder_without_weights, tmp_path, capsys):
        output = tmp_path / "run"
        code = run_sft.main(["--plan", "--model", str(folder_without_weights), "--output", str(output)])
        printed = capsys.readouterr().out
        assert code == 0 and not output.exists()
        assert "1 x 305 = 305 steps" in printed  # 1,217 trajectories by 4
        # 1,948,224 parameters of 4 bytes and two means of 4: 23,378,688 bytes = 0.022 GiB; final/ a third of that
        assert "1,948,224 parameters" in printed and "checkpoint 0.022 GiB, final model 0.007 GiB" in printed
        assert "disk needed: 0.073 GiB" in printed  # 3 x 23,378,688 + 7,792,896 = 77,928,960
        table = table_of(printed)
        assert table["optimizer state"] == [0.015, 0.015] and table["parameters"] == [0.007, 0.007]

    def test_ppo_prints_its_phases_without_weights(self, folder_without_weights, tmp_path, capsys):
        arguments = ["--plan", "--model", str(folder_without_weights), "--output", str(tmp_path / "run")]
        assert run_ppo.main([*arguments, "--plan_ranks", "2"]) == 0
        printed = capsys.readouterr().out
        # three models of 0.00726 GiB on two ranks; two of them with two means each
        table = table_of(printed)
        assert table["parameters"] == [0.011] * 4 and table["optimizer state"] == [0.015] * 4
        # a whole policy for sampling: 7,792,896 bytes
        assert table["gathered parameters"][0] == 0.007
        assert not (tmp_path / "run").exists()

    def test_what_is_offloaded_is_the_hosts(self, one_layer_without_weights, capsys):
        arguments = ["--plan", "--model", str(one_layer_without_weights), "--device", "cuda", "--offload", "on"]
        assert run_sft.main(arguments) == 0
        printed = capsys.readouterr().out
        # (922 + 4 x 192 + 3 x 512 + 2) x 192 + 192 = 619,968 parameters x (weight 4 + gradient 4 + means 8) bytes
        assert "host memory of all ranks here: 0.01 GiB before rounding; limit" in printed
        table = table_of(printed)
        assert table["optimizer state"] == table["parameters"] == table["gradients"] == [0.0, 0.0]
        assert table["gathered parameters"][0] >= 0.002  # all of them, for one rank keeps what it gathered
        assert not setup_of(SFTConfig(offload="on", device="cpu"), "float32").offload  # host memory is all there is

    def test_a_host_without_room_for_what_is_offloaded_is_refused(self, tmp_path, monkeypatch, capsys):
        """1,948,224 parameters x 16 bytes."""
        monkeypatch.setattr(train_plan, "machine_memory", lambda: 31_000_000)
        flags = ["--device", "cuda", "--offload", "on", "--gpu_memory_gib", "80", "--output", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as ended:
            run_sft.main(flags)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "run").exists()
        assert error.startswith("--offload: found a plan of 0.03 GiB of host memory, expected at most 0.03, this")

    def test_the_reference_of_a_bf16_run_takes_half(self, folder_without_weights, capsys):
        arguments = ["--plan", "--model", str(folder_without_weights), "--dtype", "bfloat16"]
        assert run_ppo.main(arguments) == 0
        # 1,948,224 x (4 + 4 + 2) bytes
        assert table_of(capsys.readouterr().out)["parameters"] == [0.018] * 4

    @pytest.mark.parametrize("program", [run_sft, run_ppo])
    def test_a_plan_that_does_not_fit_ends_with_code_2(self, program, one_layer_without_weights, capsys):
        arguments = ["--plan", "--model", str(one_layer_without_weights), "--gpu_memory_gib", "0.01"]
        assert program.main(arguments) == 2
        assert capsys.readouterr().out.rstrip().endswith("limit 0.010 GiB: does not fit")

    def test_a_run_that_does_not_fit_is_refused_before_it_begins(self, tmp_path):
        code, _, error = run_here(tmp_path / "run", gpu_memory_gib=0.001)
        assert code == 2 and error.count("\n") == 1 and not (tmp_path / "run").exists()
        assert error.startswith("--gpu_memory_gib: found a plan of 0.00") and "expected at most 0.001" in error

    def test_a_run_that_fits_goes_on(self, tmp_path):
        code, _, error = run_here(tmp_path / "run", gpu_memory_gib=4, max_steps=1)
        assert code == 0, error
        assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1

    def test_ranks_without_work_are_counted(self, one_layer_without_weights, capsys):
        run_sft.main(["--plan", "--model", str(one_layer_without_weights), "--plan_ranks", "6"])
        assert "2 of 6 ranks will only hold shards" in capsys.readouterr().out  # 4 trajectories per step

    def test_a_damaged_config_is_one_line(self, folder_without_weights, capsys):
        hostile = json.loads((TINY_MODEL / "config.json").read_text()) | {"num_hidden_layers": 10**9}
        (folder_without_weights / "config.json").write_text(json.dumps(hostile))
        with pytest.raises(SystemExit) as ended:
            run_sft.main(["--plan", "--model", str(folder_without_weights)])
        assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def measure_rank(rank: int, n_ranks: int, port: int, folder: str) -> None:
    """One rank of benchmarks/benchmark_plan.py, forked; what it prints goes to `folder`."""
    group = {"RANK": str(rank), "WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(group)
    allocator = ctypes.CDLL(None)  # malloc.h: freed blocks leave the process at once, one arena
    M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
    assert allocator.mallopt(M_MMAP_THRESHOLD, 65536) and allocator.mallopt(M_ARENA_MAX, 1)
    with open(Path(folder) / f"{rank}.json", "w") as printed, contextlib.redirect_stdout(printed):
        measure("small", 256, 1)


class TestTrace:
    @pytest.mark.slow
    @pytest.mark.parametrize(("n_ranks", "n_micro_batches"), [(1, 1), (2, 2)])
    def test_few_layers_tell_what_all_layers_need(self, monkeypatch, n_ranks, n_micro_batches):
        shape = replace(shape_of("small"), n_layers=9, vocab_size=500)
        arguments = shape, make_batch(96), n_micro_batches, Setup(n_ranks)
        from_few = plan_step(*arguments)
        monkeypatch.setattr(train_plan, "FEW_LAYERS", 9)  # traces all of them
        whole = plan_step(*arguments)
        assert [phase.total for phase in from_few] == pytest.approx([phase.total for phase in whole], rel=0.01)

    @pytest.mark.slow
    def test_checkpointing_keeps_fewer_activations(self):
        shape = shape_of("small")
        plain, checkpointed = (
            plan_step(shape, make_batch(512), 1, Setup(2, checkpointing=active))[0].bytes_by_part[OTHER_PART]
            for active in (False, True)
        )
        # one block's inner activations instead of eight
        assert 0.1 < checkpointed / plain < 0.5

    @pytest.mark.slow
    def test_unreduced_gradients_of_several_micro_batches_are_whole(self):
        shape = shape_of("small")
        one, two = (plan_step(shape, make_batch(64), n, Setup(4))[0].bytes_by_part["gradients"] for n in (1, 2))
        n_bytes = 4 * 33_300_000  # about: all parameters in fp32
        assert one < 0.7 * n_bytes < two
        often = plan_step(shape, make_batch(64), 2, Setup(4, reduces_often=True))[0].bytes_by_part["gradients"]
        assert often < 0.7 * n_bytes

    @pytest.mark.slow
    @pytest.mark.parametrize("n_ranks", [1, 2])
    def test_plan_is_within_15_percent_of_a_process(self, n_ranks, tmp_path):
        planned = max(phase.total for phase in plan_step(shape_of("small"), make_batch(256), 1, Setup(n_ranks))) / MB
        spawn(measure_rank, (n_ranks, free_port(), str(tmp_path)), n_ranks)
        measured = max(json.loads(path.read_text())["above_start_mb"] for path in tmp_path.iterdir())
        assert planned == pytest.approx(measured, rel=0.15)


class TestSharedPrompts:
    def test_a_prompt_is_planned_once_for_its_responses(self):
        """7 responses of 5 tokens, 3 to a prompt of 10: groups of 3, 2 and 2 of 4 tokens that are fed each."""
        batch = full_batch(7, 3, 10, 5)
        assert batch.segment_lengths == [10 + 12, 10 + 8, 10 + 8] and len(batch.input_ids_T) == 58
        assert len(batch.target_ids_K) == 35 and [mask.shape[0] for mask in batch.segment_masks] == [22, 18, 18]
        alone = full_batch(2, 1, 10, 5)
        assert alone.segment_lengths == [14, 14] and alone.segment_masks == [None, None]

    @pytest.mark.parametrize(
        ("n_ranks", "n_shared", "expected"), [(1, 1, 8), (4, 1, 2), (4, 4, 4), (3, 2, 4), (2, 8, 8)]
    )
    def test_a_rank_has_all_responses_to_a_prompt(self, n_ranks, n_shared, expected):
        """Of 8."""
        config = PPOConfig(responses_per_prompt=n_shared)
        assert rows_of_rank(8, config, Setup(n_ranks)) == expected


class TestLimit:
    def test_the_host_holds_what_the_ranks_of_a_machine_offload(self, monkeypatch):
        monkeypatch.setattr(train_plan, "machine_memory", lambda: 9)
        offloading = Setup(2, device_type="cuda", offload=True)
        assert host_memory(SFTConfig(), offloading, 5) == (10, 9) and host_memory(SFTConfig(), Setup(2), 5) == (0, 9)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert host_memory(SFTConfig(gpu_memory_gib=80.0), offloading, 5) == (5, 9)
        assert host_memory(SFTConfig(gpu_memory_gib=80.0, plan="on"), offloading, 5) == (5, 0)  # for another machine
        plan = Plan([], [Phase("step", {"parameters": 1})], reserved=0, limit=1, host=10, host_limit=9)
        assert not plan.fits and plan_lines(plan)[0].endswith("limit 0.00 GiB: does not fit")
        for fitting in (replace(plan, host_limit=10), replace(plan, host_limit=0)):
            assert fitting.fits and "does not fit" not in "".join(plan_lines(fitting))

    def test_setting_then_device_then_share_of_the_machine(self, monkeypatch):
        assert memory_limit(2.5, "cuda", 8) == 2.5 * GIB
        assert memory_limit(0.0, "cuda", 8) >= 8 * GIB  # this machine's, or 80 GiB where there is none
        assert memory_limit(0.0, "cpu", 4) == pytest.approx(memory_limit(0.0, "cpu", 1) / 4, abs=1)

    def test_ranks_are_the_settings_then_torchruns(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert planned_ranks(8) == 8 and planned_ranks(0) == 4
        monkeypatch.delenv("WORLD_SIZE")
        assert planned_ranks(0) == 1


def test_the_cache_of_one_prompt_has_one_row(monkeypatch):
    from model.pretrained_weights import load_pretrained

    caches = []
    begin = RowDecoder.begin
    monkeypatch.setattr(RowDecoder, "begin", lambda self, *rest: caches.append(self.cache) or begin(self, *rest))
    model = load_pretrained(TINY_MODEL)
    generate(model, [[1, 5, 9]], max_new_tokens=4, eos_id=None)
    generate(model, [[1, 5, 9]] * 20, max_new_tokens=4, eos_id=None)
    rows = [len(cache.lengths) for cache in caches]
    assert rows[0] == 1 and set(rows[1:]) == {16}


def test_the_byte_budget_of_the_cache_bounds_its_rows_and_changes_nothing_else():
    """4 layers of 3 heads of 64 numbers, keys and values, fp32: 6,144 bytes a slot, 786,432 a row of 128 slots."""
    from model.pretrained_weights import load_pretrained

    model, prompts = load_pretrained(TINY_MODEL), [[1, 5 + number] for number in range(20)]
    results, rows, sizes = [], [], []
    for cache_bytes in (0, 1, 786_431, 2 * 786_432, 3 * 786_432 - 1, 10**9):
        decoder = decoder_for(model, prompts, max_new_tokens=5, temperature=0.0, eos_id=None, cache_bytes=cache_bytes)
        results.append(continue_prompts(decoder, prompts))
        rows.append(len(decoder.cache.lengths))
        sizes.append(sum(each.nbytes for each in decoder.cache.keys_RLKH + decoder.cache.values_RLKH))
    assert rows == [16, 1, 1, 2, 2, 16] and sizes == [786_432 * n for n in rows]
    assert all(result == results[0] for result in results)  # ids and log-probabilities, bit for bit
