"""Run folders that no run left like that: the checkpoint before is used, or the run ends in one line."""

import hashlib
import json
import os
import shutil

import pytest

from tests.support.processes import start
from tests.support.tiny_run import arguments, digest_of_final, metrics_of, run_here, wait_for_step
from train.checkpoint import newest_good_checkpoint
from train.distributed import init_world
from train.run_logging import fingerprint

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

FLAGS = {"epochs": 1, "checkpoint_every": 2}
DEEP, DIGITS = "[" * 100_000, '{"step": ' + "1" * 5000 + "}"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run that was stopped after 4 of 11 steps, with the checkpoints of steps 2 and 4; and the undisturbed run."""
    folder = tmp_path_factory.mktemp("template")
    assert run_here(folder / "run", **FLAGS, max_steps=4)[0] == 0
    assert run_here(folder / "straight", **FLAGS)[0] == 0
    return folder


@pytest.fixture
def output(template, tmp_path):
    shutil.copytree(template / "run", tmp_path / "run")
    return tmp_path / "run"


def replace_listed(checkpoint, name, change):
    """Change a JSON file of a checkpoint and make the manifest agree: only the content can tell."""
    file, manifest_file = checkpoint / name, checkpoint / "manifest.json"
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))
    manifest = json.loads(manifest_file.read_text())
    content = file.read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest_file.write_text(json.dumps(manifest))


def in_state(**values):
    return lambda path: replace_listed(path, "trainer_state.json", lambda state: state.update(values))


def in_manifest(change):
    def damage(path):
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return damage


def as_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def as_file(path):
    shutil.rmtree(path)
    path.write_text("")


def file_as_link(path):
    file = next(path.glob("state/*.safetensors"))
    file.rename(path / "elsewhere")
    file.symlink_to(path / "elsewhere")


def file_as_folder(path):
    (path / "trainer_state.json").unlink()
    (path / "trainer_state.json").mkdir()


def unlisted_tensors(path):
    shutil.copy(next(path.glob("state/*.safetensors")), path / "state" / "shard-00002-model-00001-of-00001.safetensors")


DAMAGED = {
    "a file": (as_file, "found a file or a link, expected a folder"),
    "a link": (as_link, "found a file or a link, expected a folder"),
    "manifest deep": (lambda path: (path / "manifest.json").write_text(DEEP), "nested too deeply"),
    "manifest digits": (lambda path: (path / "manifest.json").write_text(DIGITS), "an integer of too many digits"),
    "manifest NUL": (lambda path: (path / "manifest.json").write_bytes(bytes(500)), "manifest.json:"),
    "manifest types": (
        in_manifest(lambda manifest: manifest["files"].update({"trainer_state.json": 7})),
        "manifest.json:",
    ),
    "manifest outside": (
        in_manifest(lambda manifest: manifest["files"].update({"../../config.json": {"bytes": 1, "sha256": ""}})),
        "'../../config.json': found no such file",
    ),
    "state file a folder": (file_as_folder, "trainer_state.json': found no such file"),
    "state file a link": (file_as_link, "found no such file"),
    "unlisted tensors": (unlisted_tensors, "found a file of tensors that manifest.json does not list"),
    "step a string": (in_state(step="4"), "found step = '4', expected int"),
    "step another": (in_state(step=3), "found step 3, expected that of the folder's name"),
    "identity a list": (in_state(identity=[]), "found identity = [], expected str"),
    "tensors an object": (in_state(tensors={}), "found tensors = {}, expected list"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(template, output, name):
    damage, words = DAMAGED[name]
    newest = output / "checkpoints" / "step_00000004"
    damage(newest)
    identity = fingerprint(json.loads((output / "run_identity.json").read_text()))
    path, [line] = newest_good_checkpoint(newest.parent, init_world("cpu"), identity=identity)
    assert path == newest.with_name("step_00000002")
    assert line.startswith(f"{newest}: refused: ") and words in line and line.isascii() and line.isprintable()
    if name in ("a link", "manifest deep"):  # and through the whole program
        code, out, err = run_here(output, **FLAGS)
        assert (code, err) == (0, "") and line in out and "(step 2, saved by 1 rank)" in out
        assert digest_of_final(output) == digest_of_final(template / "straight")
        assert [row["step"] for row in metrics_of(output)] == list(range(1, 12))


BEYOND = {
    "optimizers": lambda path: replace_listed(path, "trainer_state.json", lambda state: state.update(optimizers={})),
    "layout": lambda path: replace_listed(
        path, "trainer_state.json", lambda state: state.update(optimizers={"model": {"norm.weight": 3}})
    ),
    "kind": lambda path: replace_listed(
        path,
        "trainer_state.json",
        lambda state: state["optimizers"]["model"].update({"norm.weight": {"step": {"kind": "scalar"}}}),
    ),
    "dtype": lambda path: replace_listed(
        path,
        "trainer_state.json",
        lambda state: state["optimizers"]["model"]["norm.weight"]["exp_avg"].update(dtype="load"),
    ),
    "generators": lambda path: replace_listed(path, "random_rank00000.json", lambda state: state.clear()),
    "torch generator": lambda path: replace_listed(
        path, "random_rank00000.json", lambda state: [state.update({name: [1, "x"]}) for name in list(state)]
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_values_that_hashes_cannot_tell_from_good_ones_end_in_one_line(output, name):
    """Someone changed a file and its hash: the run ends and takes nothing for a good state."""
    BEYOND[name](output / "checkpoints" / "step_00000004")
    code, out, err = run_here(output, **FLAGS)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err + out and "step_00000004" in err


def make(name, content):
    def change(output):
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        if content is None:
            path.mkdir()
        elif content == "link":
            path.symlink_to("/dev/null")
        elif content == "endless":
            path.symlink_to("/dev/zero")
        elif content == "pipe":  # opening it would wait for the other end
            os.mkfifo(path)
        else:
            path.write_text(content)

    return change


REFUSED = {
    "metrics a folder": make("metrics.jsonl", None),
    "metrics a link": make("metrics.jsonl", "link"),
    "checkpoints a file": make("checkpoints", ""),
    "final a file": make("final", ""),
    "plots a file": make("plots", ""),
    "config a folder": make("config.json", None),
    "history a folder": make("history.jsonl", None),
    "history of nothing": make("history.jsonl", "{}\n"),
    "history deep": make("history.jsonl", DEEP + "\n"),
    "finished of nothing": make("finished.json", "[]"),
    "lock a link": make("lock", "link"),
    "lock a folder": make("lock", None),
    "lock a pipe": make("lock", "pipe"),
    "history a pipe": make("history.jsonl", "pipe"),
    "history endless": make("history.jsonl", "endless"),
    "identity deep": make("run_identity.json", DEEP),
    "identity digits": make("run_identity.json", DIGITS),
    "identity a list": make("run_identity.json", "[]"),
    "identity a folder": make("run_identity.json", None),
    "identity a link": make("run_identity.json", "link"),
    "identity NUL": make("run_identity.json", "\0" * 100),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_with_something_in_the_way_is_one_line(output, name):
    REFUSED[name](output)
    before = sorted(path.relative_to(output) for path in output.rglob("*"))
    code, out, err = run_here(output, **FLAGS)
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"{output}"), err
    assert "found" in err and "expected" in err and "Traceback" not in err + out
    assert {*before, (output / "lock").relative_to(output)} == {
        *(path.relative_to(output) for path in output.rglob("*")),
        (output / "lock").relative_to(output),
    }


@pytest.mark.parametrize("name", ["step_x", "step_\u00b2", "step_00000099.bak", "step_1"])
def test_other_names_are_no_checkpoints(output, name):
    (output / "checkpoints" / name).mkdir()
    code, out, err = run_here(output, **FLAGS)
    assert (code, err) == (0, "") and "(step 4, saved by 1 rank)" in out
    assert (output / "checkpoints" / name).is_dir()


def test_odd_lines_of_metrics_are_cut(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    odd = [DEEP, DIGITS, "\0" * 50, '{"step": "1"}', '{"step": true}', "[]", '{"step": 9}', '{"ste']
    (output / "metrics.jsonl").write_text("\n".join([*odd, *lines, *odd]))
    code, _, err = run_here(output, **FLAGS, plot="on")
    assert (code, err) == (0, "")
    assert [row["step"] for row in metrics_of(output)] == list(range(1, 12))


# ---------------------------------------------------------------------------------------------------------------------
# Owners


def test_a_second_start_ends_in_one_line_and_changes_nothing(tmp_path):
    output = tmp_path / "run"
    first = start("run_sft", arguments(output, epochs=40, checkpoint_every=0))
    assert wait_for_step(first, output, 2)
    settings, identity = ((output / name).read_bytes() for name in ("config.json", "run_identity.json"))
    second = start("run_sft", arguments(output, epochs=40, checkpoint_every=7), ranks=2)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2 and "found another process at work on it, expected none" in err
    assert err.count("\n") == 2 and "Traceback" not in err  # torchrun would end rank 1 before it says it again
    assert first.poll() is None
    assert (settings, identity) == tuple((output / name).read_bytes() for name in ("config.json", "run_identity.json"))
    first.kill()
    first.communicate()
    code, _, err = run_here(output, epochs=40, checkpoint_every=0, max_steps=3)  # the lock died with its owner
    assert (code, err) == (0, "")


def test_the_folder_of_another_run_is_refused_before_the_data_is_read(output, monkeypatch):
    monkeypatch.setattr("run_sft.encode_data", None)  # calling it would be a traceback
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    code, _, err = run_here(output, **FLAGS, seed=5)
    assert code == 2 and err.count("\n") == 1 and "found seed = 0, expected 5: the folder belongs to another run" in err
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
