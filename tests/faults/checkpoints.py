"""Faults of checkpoints: killed inside a write, damaged files, a clock that was set back."""

import functools
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from tests.faults.runs import Trial, in_child, kill_child, start_child
from tests.support.small_training import digest_of_weights, make_parts, train_small
from train.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, newest_good_checkpoint
from train.distributed import close_world, init_world
from train.run_logging import fingerprint, read_metrics

STEPS, SAVED = 6, 3  # of the small run; of the folders that are damaged
SEVERAL_FILES = patch("train.checkpoint.STATE_FILE_BYTES", 20_000)  # the small model's state in about ten files


@functools.cache
def true_digests() -> list[str]:
    """Digests of the weights after 0, 1, .. STEPS steps, each of a run of its own that no checkpoint was read in."""

    def train_all() -> list[str]:
        with tempfile.TemporaryDirectory(prefix="faults_true_") as folder:
            runs = [train_small(Path(folder) / str(n), n, total_steps=STEPS) for n in range(1, STEPS + 1)]
        world = init_world("cpu")
        untrained = {name: each.detach() for name, each in make_parts(world)[0].named_parameters()}
        close_world()
        return [digest_of_weights(each) for each in (untrained, *runs)]

    return in_child(train_all)


@functools.cache
def saved_run() -> Path:
    """A run folder with SAVED checkpoints of several files each; to be copied."""
    folder = Path(tempfile.mkdtemp(prefix="faults_saved_"))

    def train() -> None:
        with SEVERAL_FILES:
            train_small(folder / "run", SAVED, total_steps=STEPS)

    in_child(train)
    return folder / "run"


def look_and_finish(output: Path) -> dict:
    """Load the newest good checkpoint by itself, then run to the end; what was found."""
    identity = fingerprint(json.loads((output / "run_identity.json").read_text()))
    world = init_world("cpu")
    model, optimizer = make_parts(world)
    step, loaded, end, problem, refused = 0, "", "", "", []
    try:
        path, refused = newest_good_checkpoint(output / "checkpoints", world, identity=identity)
        step = load_checkpoint(path, {"model": (model, optimizer)}, world).step if path else 0
        loaded = digest_of_weights({name: each.detach() for name, each in model.named_parameters()})
        close_world()
        end = digest_of_weights(train_small(output, STEPS, total_steps=STEPS))
    except CheckpointError as error:  # no good one among those that are there: it must not begin anew
        problem = str(error)
    steps = [row["step"] for row in read_metrics(output / "metrics.jsonl")]
    left = sorted(path.name for path in (output / "checkpoints").glob(".*"))
    return {
        "step": step,
        "loaded": loaded,
        "end": end,
        "problem": problem,
        "steps": steps,
        "left": left,
        "bad": refused,
    }


def judge(found: dict, steps_before: int, wanted_step: int | None = None) -> Trial:
    """wanted_step: the only right one to resume from, if that is known."""
    lost = max(0, steps_before - found["step"])
    if found["problem"]:
        return Trial(f"no good checkpoint: {found['problem']}", lost)
    if wanted_step is not None and found["step"] != wanted_step:
        return Trial(f"resumed from step {found['step']}, expected {wanted_step}: {found['bad']}", lost)
    if found["loaded"] != true_digests()[found["step"]]:
        return Trial(f"the weights of step {found['step']} are not those that were saved", lost)
    if found["end"] != true_digests()[STEPS] or found["steps"] != list(range(1, STEPS + 1)):
        return Trial(f"another end than undisturbed; metrics of the steps {found['steps']}", lost)
    return Trial(f"left behind: {found['left']}" if found["left"] else "", lost)


# ---------------------------------------------------------------------------------------------------------------------
# Scenarios


def killed_inside_a_save(number: int, rng: random.Random, folder: Path) -> Trial:
    """SIGKILL at a random moment after the folder of a save has appeared."""
    output = folder / "run"
    shutil.copytree(saved_run(), output)
    true_digests()
    in_background = ("off", "on")[number % 2]

    def train() -> None:
        with SEVERAL_FILES:
            train_small(output, STEPS, total_steps=STEPS, async_checkpoint=in_background)

    child = start_child(train)
    saves, end = rng.choice((1, 2)), time.monotonic() + 60
    seen: set[str] = set()
    while len(seen) < saves and time.monotonic() < end:
        seen |= {path.name for path in (output / "checkpoints").glob(".saving_*")}
    time.sleep(rng.random() * rng.choice((0.005, 0.05, 0.2)))
    steps_before = len(read_metrics(output / "metrics.jsonl"))
    kill_child(*child)
    return judge(in_child(lambda: look_and_finish(output)), steps_before)


def damaged_files(number: int, rng: random.Random, folder: Path) -> Trial:
    """One file of the newest checkpoint damaged, in every ninth trial of the two newest."""
    output = folder / "run"
    shutil.copytree(saved_run(), output)
    checkpoints = list_checkpoints(output / "checkpoints")
    way, wanted = number // 2 % 6, SAVED
    for path in checkpoints[: 2 if number % 9 == 8 else 1]:
        files = sorted(each for each in path.rglob("*") if each.is_file())
        # every second trial a file of JSON: there are few, and all decide
        file = rng.choice([each for each in files if each.suffix == ".json"] if number % 2 else files)
        damage(file, files, way, rng)
        wanted -= 1
        if way == 1 and file.name == "manifest.json":
            wanted = None  # the bit may be one of a blank or of the time, which decide nothing
            break
    return judge(in_child(lambda: look_and_finish(output)), SAVED, wanted)


def damage(file: Path, files: list[Path], way: int, rng: random.Random) -> None:
    """Truncate, flip a bit, remove, empty, put a folder in its place, or another file's content."""
    content = file.read_bytes()
    if way == 0:
        file.write_bytes(content[: rng.randrange(len(content))])
    elif way == 1:
        place = rng.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
    elif way == 2:
        file.unlink()
    elif way == 3:
        file.write_bytes(b"")
    elif way == 4:
        file.unlink()
        file.mkdir()
    else:
        others = [each for each in files if each.read_bytes() != content]
        shutil.copyfile(rng.choice(others), file)


def clock_set_back(number: int, rng: random.Random, folder: Path) -> Trial:
    """The clock of the second start is years back, and the files' times are in the wrong order."""
    output = folder / "run"
    shutil.copytree(saved_run(), output)
    for age, path in enumerate(list_checkpoints(output / "checkpoints")):  # the newest checkpoint looks oldest
        for each in (path, *path.rglob("*")):
            os.utime(each, (age * 1e8, age * 1e8))
    shift, real = rng.choice((1e9, 6e8, -1e9)), time.time

    def look() -> dict:
        with patch("time.time", lambda: real() - shift), patch("time.time_ns", lambda: int((real() - shift) * 1e9)):
            return look_and_finish(output)

    return judge(in_child(look), SAVED, SAVED)
