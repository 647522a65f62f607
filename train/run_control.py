"""What every run needs around its steps: a folder of its own, the newest good checkpoint, signals, a lock.

SFT and PPO share these, so that a run of either kind is opened, stopped and resumed by the same rules
(docs/checkpoints.md).
"""

import fcntl
import os
import secrets
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Self, TextIO

import torch

from command_line import ConfigError, changed_settings, error_line
from data.formats.prompt_format import PromptError
from data.json_records import DataError, check_same_file, open_lock
from model.config import ModelFolderError
from train.checkpoint import (
    CheckpointError,
    CheckpointSaver,
    TrainerState,
    load_checkpoint,
    newest_good_checkpoint,
    remove_leftovers,
)
from train.cuda.launch import LossBackendError
from train.distributed import DeviceError, World, any_rank, gather_objects, global_sum, reshard_all, wait_for_all
from train.run_config import RunConfig
from train.run_logging import (
    RunFolderError,
    cut_metrics,
    describe_environment,
    log_line,
    open_run_folder,
    write_json_atomically,
)

SECONDS_TO_SEE_A_FILE = 5.0  # NFS may show a new file late
BUSY = "{}: found another process at work on it, expected none; end it or wait for its end"


class TrainingError(RuntimeError):
    """Training cannot continue (non-finite values, no trained tokens in a batch). One line; checkpoints stay."""


# what run_sft.py and run_ppo.py end with one line on, and exit code 2
USER_ERRORS = (
    ConfigError,
    DataError,
    DeviceError,
    LossBackendError,
    ModelFolderError,
    PromptError,
    RunFolderError,
    CheckpointError,
    TrainingError,
    OSError,
)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a training loop ended. stopped_by: number of the signal that ended it early, or 0."""

    step: int
    last_step: int
    stopped_by: int


class StopSignal:
    """Remembers the first SIGTERM or SIGINT while active; a third one acts as usual (so Ctrl-C three times kills).

    The second only adds a line: under torchrun a signal often comes twice, from the shell and from torchrun itself.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        self._wakeup = signal.set_wakeup_fd(-1)  # command_line.polite_stop does not hear the signals meanwhile
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        if not self.number:
            self.number = number
            return
        for each, handler in self._previous.items():
            signal.signal(each, handler)
        if os.environ.get("RANK", "0") == "0":  # sys.stderr may be in the middle of a write
            name = signal.Signals(number).name
            os.write(2, f"a second {name}: still saving a checkpoint; a third ends the run at once\n".encode())


def make_saver(config: RunConfig, world: World, run_hash: str) -> CheckpointSaver:
    """What saves the checkpoints of a run, as its settings say; a collective."""
    saver = CheckpointSaver(
        Path(config.output) / "checkpoints",
        world,
        identity=run_hash,
        keep=config.keep_checkpoints,
        in_background=config.async_checkpoint == "on",
    )
    if saver.group is not None:
        saver.group.set_timeout(timedelta(seconds=config.collective_timeout))
    return saver


def must_stop(stop: StopSignal, saver: CheckpointSaver) -> bool:
    """Whether a signal has reached any rank; a collective, asked after every step.

    Raises CheckpointError, on every rank, once a save in the background has failed on any.
    """
    signals, failures = global_sum([float(stop.number != 0), float(saver.has_failed())])
    if failures:
        saver.wait()
        raise CheckpointError(f"{saver.folder}: a checkpoint could not be saved on another rank")
    return signals > 0


def open_output(output: Path, config: RunConfig, identity: dict, world: World, *, data_report: dict) -> None:
    """Rank 0 checks and makes the run folder and writes config.json, environment.json and data_report.json.

    config: the settings dataclass of the run; identity: what makes two runs the same run; data_report: what was read
    and chosen. Raises RunFolderError, on every rank.
    """

    def make_folder() -> None:
        open_run_folder(output, identity, resume=config.resume)
        (output / "checkpoints").mkdir(exist_ok=True)
        for name in remove_leftovers(output / "checkpoints"):
            log_line(f"{output / 'checkpoints' / name}: removed; its saving was cut short, and nothing else is lost")
        write_settings(output, config, world)
        write_json_atomically(output / "data_report.json", data_report)

    _run_on_main(make_folder, output, world)


def _run_on_main(action: Callable[[], None], output: Path, world: World) -> None:
    """Run `action` on rank 0; what it raises is a RunFolderError on every rank."""
    problem = ""
    if world.is_main:
        try:
            action()
        except (RunFolderError, DataError, OSError) as error:
            problem = error_line(error)
    if any_rank(problem != ""):
        raise RunFolderError(problem or f"{output}: refused by rank 0")


def write_settings(output: Path, config: object, world: World) -> None:
    """config.json with every setting; environment.json, with the default of each setting that has another value."""
    write_json_atomically(output / "config.json", asdict(config))
    environment = describe_environment(world.size, world.device)
    write_json_atomically(output / "environment.json", {**environment, "changed_from": changed_settings(config)})


@contextmanager
def lock_folder(folder: Path, world: World) -> Iterator[None]:
    """Keep other runs out of `folder`; the system frees it when the process ends, however it ends.

    Each rank holds a shared lock: one that is left alone must not write into the folder of the next start.
    Raises DataError, on all ranks, while any process of another run holds one, and at the end if the folder was deleted
    or replaced meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with open_lock(path) as lock:
        # alone in the folder? The other ranks ask for their lock only after this answer.
        is_taken = world.is_main and not _lock(lock, fcntl.LOCK_EX)
        if any_rank(is_taken):
            raise DataError(BUSY.format(folder))
        _lock(lock, fcntl.LOCK_SH)  # rank 0 passes from exclusive to shared, which lets the others in
        check_shared_folder(folder, world)
        yield
        check_same_file(lock.fileno(), path)


def check_shared_folder(folder: Path, world: World) -> None:
    """Raise DataError, on all ranks, unless every rank sees the file that rank 0 writes into `folder`.

    Checkpoints hold the shards of all ranks. On nodes with a folder each, no node would have a whole one.
    """
    path = folder / f".shared_{gather_objects(secrets.token_hex(8))[0]}"
    if world.is_main:
        for left in folder.glob(".shared_*"):  # by a start that was killed here
            left.unlink(missing_ok=True)
        path.touch()
    wait_for_all()
    end = time.monotonic() + SECONDS_TO_SEE_A_FILE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(gather_objects(path.exists())) if not sees]
    if world.is_main:
        path.unlink(missing_ok=True)
    if blind:
        raise DataError(
            f"{folder}: found that rank {blind[0]} does not see what rank 0 writes, expected a folder that all nodes "
            "share"
        )


def _lock(lock: TextIO, kind: int) -> bool:
    """Whether this process has the lock now; yes, with a warning, where the file system has no locks."""
    try:
        fcntl.flock(lock, kind | (fcntl.LOCK_NB if kind == fcntl.LOCK_EX else 0))
    except BlockingIOError:
        return False
    except OSError as error:
        if kind == fcntl.LOCK_EX:
            log_line(f"warning: {lock.name}: no lock ({error.strerror}); see that no other run writes into the folder")
    return True


def resume_newest(
    output: Path,
    parts: dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]],
    world: World,
    *,
    identity: str,
    earlier: Collection[str],
    journals: tuple[str, ...],
) -> TrainerState | None:
    """Load the newest good checkpoint of `output` into `parts`, or return None if there is none; a collective.

    earlier: see newest_good_checkpoint. journals: files of one JSON object per line with a "step"; lines after the
    checkpoint's step are cut off, so that each step is there once. Raises CheckpointError when there are checkpoints
    and none is good, RunFolderError when the journals cannot be cut.
    """
    folder = output / "checkpoints"
    path, refused = newest_good_checkpoint(folder, world, identity=identity, earlier=earlier)
    state = None
    if world.is_main:
        for line in refused:
            log_line(line)
    if path is not None:
        for model, _ in parts.values():
            reshard_all(model)
        state = load_checkpoint(path, parts, world)
        if world.is_main:
            ranks = f"{state.saved_world_size} rank{'s' * (state.saved_world_size != 1)}"
            log_line(f"resuming from {path} (step {state.step}, saved by {ranks})")
    elif refused:
        raise CheckpointError(
            f"{folder}: found no good checkpoint among {len(refused)}, expected one to resume from ({refused[0]})"
        )

    def cut_journals() -> None:
        for name in journals:
            cut_metrics(output / name, state.step if state else -1)  # -1: nothing, not even figures of step 0

    _run_on_main(cut_journals, output, world)
    return state


def report_stop(stopped_by: int, step: int, last_step: int, output: Path, world: World) -> TrainResult:
    """The result of a run that a signal ended, and a line that says how to continue."""
    stopped_by = stopped_by or signal.SIGTERM  # the signal may have reached another rank only
    if world.is_main:
        saved = f"checkpoint saved in {output}" if step > 0 else "nothing to save yet"
        log_line(
            f"stopped by {signal.Signals(stopped_by).name} after step {step} of {last_step}; {saved}; the same command "
            "with --resume auto continues"
        )
        if "TORCHELASTIC_RUN_ID" in os.environ:
            log_line("torchrun may print a traceback of its own now: it says no more than that")
    return TrainResult(step=step, last_step=last_step, stopped_by=int(stopped_by))
