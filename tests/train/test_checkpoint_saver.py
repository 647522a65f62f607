"""Checkpoints written beside the loop: the same bytes, nothing lost, a failure that ends the run."""

import hashlib
import os
import shutil
import signal
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import free_port, run, spawn, start
from tests.support.tiny_run import arguments, digest_of_final, metrics_of, run_here, wait_for_step
from tests.train.test_checkpoint import advance, assert_equal_bits, make_trained, weights
from train import checkpoint
from train.checkpoint import (
    CheckpointError,
    CheckpointSaver,
    check_files,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from train.distributed import init_world


@pytest.fixture
def world():
    return init_world("cpu")


def saver_of(folder, world, *, keep=0, in_background=True):
    return CheckpointSaver(folder, world, identity="run", keep=keep, in_background=in_background)


def hashes_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Equal names and JSON to the byte, equal tensors to the bit; safetensors puts its metadata into any order."""
    names = set(hashes_of(first))
    assert names == set(hashes_of(second))
    for name in names - {"manifest.json"}:
        if name.endswith(".json"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
        else:
            assert_equal_bits(load_file(first / name), load_file(second / name))


class Held:
    """dcp.save that waits until it is told to go on."""

    def __init__(self, monkeypatch, error=None):
        self.go, self.original, self.error = threading.Event(), checkpoint.dcp.save, error
        monkeypatch.setattr(checkpoint.dcp, "save", self)

    def __call__(self, *arguments, **settings):
        assert self.go.wait(60)
        if self.error:
            raise self.error
        return self.original(*arguments, **settings)


def test_the_loop_goes_on_and_the_checkpoint_is_that_of_its_step(world, tmp_path, monkeypatch):
    """Both ways give the same bits, although the weights change while the thread writes."""
    (tmp_path / "waiting").mkdir()
    (tmp_path / "beside").mkdir()
    model, optimizer = make_trained(world, steps=2)
    parts = {"model": (model, optimizer)}
    with saver_of(tmp_path / "waiting", world, in_background=False) as saver:
        saver.save(2, parts, extra={})
    before = weights(model)
    held = Held(monkeypatch)
    with saver_of(tmp_path / "beside", world) as saver:
        saver.save(2, parts, extra={})
        advance(model, optimizer, world, range(2, 4))
        assert not torch.equal(before["norm.weight"], weights(model)["norm.weight"])
        assert list_checkpoints(tmp_path / "beside") == []
        held.go.set()
    assert_same_checkpoint(*(tmp_path / name / "step_00000002" for name in ("waiting", "beside")))
    other, other_optimizer = make_trained(world, steps=0, seed=7)
    load_checkpoint(tmp_path / "beside" / "step_00000002", {"model": (other, other_optimizer)}, world)
    assert_equal_bits(weights(other), before)


def test_the_manifest_has_the_hashes_of_what_is_on_disk(world, tmp_path):
    """sha256 of the files as read back, by another implementation of the comparison than check_files."""
    path = save_checkpoint(
        tmp_path, 1, {"model": make_trained(world, steps=1)}, world, identity="run", keep=0, extra={}
    )
    entries = checkpoint._read_json(path / "manifest.json")["files"]
    found = hashes_of(path)
    found.pop("manifest.json")
    assert {name: entry["sha256"] for name, entry in entries.items()} == found
    assert {name: entry["bytes"] for name, entry in entries.items()} == {
        name: (path / name).stat().st_size for name in found
    }


def test_no_file_is_read_while_saving(world, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "file_sha256", None)
    with saver_of(tmp_path, world) as saver:
        saver.save(1, {"model": make_trained(world, steps=1)}, extra={})
    monkeypatch.undo()
    assert check_files(tmp_path / "step_00000001") == ""


def test_the_next_save_waits_for_the_one_before(world, tmp_path, monkeypatch):
    parts = {"model": make_trained(world, steps=1)}
    held = Held(monkeypatch)
    with saver_of(tmp_path, world) as saver:
        saver.save(1, parts, extra={})
        threading.Timer(0.3, held.go.set).start()
        began = time.monotonic()
        saver.save(2, parts, extra={})
        assert time.monotonic() - began >= 0.25 and (tmp_path / "step_00000001").is_dir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000001"]


def test_a_failure_in_the_thread_is_raised_by_the_next_call_and_leaves_the_older_checkpoint(
    world, tmp_path, monkeypatch
):
    parts = {"model": make_trained(world, steps=1)}
    with saver_of(tmp_path, world) as saver:
        saver.save(1, parts, extra={})
        saver.wait()
        Held(monkeypatch, error=OSError(28, "No space left on device")).go.set()
        saver.save(2, parts, extra={})
        saver.thread.join()
        assert saver.has_failed()
        with pytest.raises(CheckpointError, match="cannot save .*step_00000002: .* No space left on device"):
            saver.save(3, parts, extra={})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert check_files(tmp_path / "step_00000001") == ""


def test_a_disk_without_room_is_refused_before_anything_is_written(world, tmp_path, monkeypatch):
    model, optimizer = make_trained(world, steps=1)
    needed = 3 * sum(parameter.numel() * 4 for parameter in model.parameters())  # weights and two moments in fp32
    usage, made = namedtuple("usage", "total used free"), []
    monkeypatch.setattr(Path, "mkdir", lambda self, *_, **__: made.append(self))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 1))
    with pytest.raises(CheckpointError) as caught, saver_of(tmp_path, world) as saver:
        saver.save(1, {"model": (model, optimizer)}, extra={})
    assert f"found {(needed - 1) / 1e6:,.1f} MB free, expected " in str(caught.value)
    assert made == [] and list(tmp_path.iterdir()) == []


def test_nothing_is_saved_in_a_deleted_folder(world, tmp_path):
    with pytest.raises(CheckpointError, match="cannot save .*step_00000001: .*No such file or directory"):
        save_checkpoint(
            tmp_path / "gone", 1, {"model": make_trained(world, steps=1)}, world, identity="run", keep=0, extra={}
        )
    assert not (tmp_path / "gone").exists()


def test_a_link_with_the_name_of_an_unfinished_checkpoint_is_not_followed(world, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("")
    (tmp_path / ".saving_step_00000001").symlink_to(victim)
    save_checkpoint(tmp_path, 1, {"model": make_trained(world, steps=1)}, world, identity="run", keep=0, extra={})
    assert [path.name for path in victim.iterdir()] == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "victim"]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def _save_on_two_ranks(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    world = init_world("cpu")
    model, optimizer = make_trained(world, steps=1)
    parts, folder = {"model": (model, optimizer)}, Path(folder)
    with saver_of(folder / "waiting", world, in_background=False) as saver:
        saver.save(1, parts, extra={})
    with saver_of(folder / "beside", world, keep=2) as saver:
        for step in range(1, 5):  # collectives of the loop run beside those of the thread
            saver.save(step, parts, extra={})
            advance(model, optimizer, world, [step])
    with pytest.raises(CheckpointError, match="cannot save .*: .*rank 1 has no room"), saver_of(folder, world) as saver:
        if rank == 1:

            def fail(*_: object) -> None:
                raise OSError(28, "rank 1 has no room")

            checkpoint._HashedFile.write = fail
        saver.save(9, parts, extra={})


@pytest.mark.slow
def test_two_ranks_save_beside_their_loop_and_fail_together(tmp_path):
    for name in ("waiting", "beside"):
        (tmp_path / name).mkdir()
    spawn(_save_on_two_ranks, (free_port(), str(tmp_path)), 2)
    assert [path.name for path in list_checkpoints(tmp_path / "beside")] == ["step_00000004", "step_00000003"]
    for path in list_checkpoints(tmp_path / "beside"):
        assert check_files(path) == "" and len(list((path / "state").iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "waiting"]


LONG = {"epochs": 3, "checkpoint_every": 2, "async_checkpoint": "on"}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_run_has_the_same_bits_with_and_without(tmp_path, ranks):
    for name, flags in (("off", {**LONG, "async_checkpoint": "off"}), ("on", LONG)):
        code, _, err = run("run_sft", arguments(tmp_path / name, **flags, max_steps=9), ranks=ranks)
        assert (code, err) == (0, "")
    rows, others = metrics_of(tmp_path / "off"), metrics_of(tmp_path / "on")
    assert [(row["sft/loss"], row["sft/grad_norm"]) for row in rows] == [
        (row["sft/loss"], row["sft/grad_norm"]) for row in others
    ]
    assert digest_of_final(tmp_path / "off") == digest_of_final(tmp_path / "on")
    for number in (8, 9):
        assert_same_checkpoint(*(tmp_path / name / "checkpoints" / f"step_{number:08d}" for name in ("off", "on")))


@pytest.mark.slow
def test_a_kill_during_the_write_leaves_the_checkpoint_before(tmp_path):
    """Killed when a .saving_ folder is there; the same command then reaches the end of an undisturbed run."""
    straight, output = tmp_path / "straight", tmp_path / "run"
    assert run_here(straight, **LONG)[0] == 0
    for _ in range(3):
        process = start("run_sft", arguments(output, **LONG))
        done = max([int(path.name[5:]) for path in (output / "checkpoints").glob("step_*")], default=0)
        wait_for_step(process, output, done + 3)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if list((output / "checkpoints").glob(".saving_*/state/*")):
                break
        process.kill()
        process.communicate()
        for path in list_checkpoints(output / "checkpoints"):
            assert check_files(path) == ""
    assert run_here(output, **LONG)[0] == 0
    assert digest_of_final(output) == digest_of_final(straight)
    assert not list((output / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "on"])
def test_output_deleted_during_training_ends_the_run(tmp_path, mode):
    output = tmp_path / "run"
    process = start("run_sft", arguments(output, epochs=40, checkpoint_every=5, async_checkpoint=mode))
    assert wait_for_step(process, output, 2)
    shutil.rmtree(output, ignore_errors=True)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("\n") == 1 and "\ntrained " not in out
    assert "found it deleted or replaced during the run" in err or "cannot save" in err or "No such file" in err


@pytest.mark.slow
def test_a_failed_save_in_the_background_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    Held(monkeypatch, error=OSError(28, "No space left on device")).go.set()
    code, out, err = run_here(tmp_path / "run", epochs=40, checkpoint_every=2, async_checkpoint="on")
    assert code == 2 and err.count("\n") == 1 and "cannot save" in err and "No space left on device" in err
    assert "\ntrained " not in out and not (tmp_path / "run" / "final").exists()
    assert len(metrics_of(tmp_path / "run")) < 20


@pytest.mark.slow
def test_two_signals_during_the_save_still_save(tmp_path, monkeypatch):
    """The second comes while the checkpoint of the first is being written."""
    original = checkpoint.dcp.save

    def save(*arguments, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **settings)

    def first(*_: object) -> list:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(checkpoint.dcp, "save", save)
        return reset()

    from train import sft_loop

    reset = sft_loop.use_deterministic_kernels
    original_step = sft_loop.train_step

    def step_with_signal(*arguments, **settings):
        if settings["step"] == 3:
            first()
        return original_step(*arguments, **settings)

    monkeypatch.setattr(sft_loop, "train_step", step_with_signal)
    for mode in ("off", "on"):
        monkeypatch.setattr(checkpoint.dcp, "save", original)
        code, out, err = run_here(tmp_path / mode, epochs=40, checkpoint_every=0, async_checkpoint=mode)
        assert (code, err) == (143, "") and "stopped by SIGTERM after step 3" in out
        assert check_files(tmp_path / mode / "checkpoints" / "step_00000003") == ""
