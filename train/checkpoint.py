"""Complete, atomic, verified checkpoints through torch.distributed.checkpoint. No pickle file is written or read.

OUTPUT/checkpoints/step_00000010/
    state/*.safetensors    every rank's shards of weights ("PART.NAME") and optimizer tensors
                           ("PART_optimizer.KEY.NAME"); each file's header holds the offsets, so another number of ranks
                           can read them. PART is "model" in SFT, "policy" and "critic" in PPO
    trainer_state.json     step (= data position and scheduler position), identity of the run, optimizer scalars, the
                           trainer's own scalars ("extra")
    random_rank00000.json  generators of each rank
    manifest.json          sha256 and size of every file above; written last

Save, in numbered steps: 1 write everything into .saving_step_N, each rank hashing what it writes; 2 write
manifest.json; 3 rename the folder; 4 remove older checkpoints. A kill at any moment leaves the older checkpoints whole
and at most one .saving_ folder, removed by the next start. CheckpointSaver can do all of it in a thread, from a copy of
the state. Load: a checkpoint counts only if every file has the size and sha256 of its manifest.
"""

import hashlib
import io
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from data.json_records import DataError, read_json_object
from printable import shown
from train.distributed import World, gather_objects, host_group, reshard_all
from train.run_logging import file_sha256, write_json_atomically
from train.seeding import random_state, restore_random_state

FORMAT = 2  # 1 held one model without a part's name
STATE_FOLDER = "state"
# bytes of tensors per state file: torch holds one file twice in host memory while writing it
STATE_FILE_BYTES = 512 * 2**20
HASHED_BYTES = 4 * 2**20  # written and hashed at a time: what was just written is still in the processor's cache
OTHER_BYTES = 2**16  # that a rank writes in addition to its tensors: headers, generators
SECONDS_AFTER_AN_ERROR = 30  # for a save under way to be finished before the run ends
_STATE_KINDS = {"step": int, "identity": str, "world_size": int, "tensors": list, "optimizers": dict, "extra": dict}


# what is trained together, by part name: each model (sharded) with its optimizer
Parts = dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. One line: path, what was found, what was expected."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a checkpoint restores outside the tensors."""

    step: int  # optimizer steps done = next step to run, from 0
    saved_world_size: int
    extra: dict  # the trainer's own JSON scalars, as given to save_checkpoint


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after optimizer step `step`."""
    return f"step_{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Inverse of checkpoint_name."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, newest first; complete or not."""
    found = [path for path in folder.glob("step_*") if re.fullmatch("step_[0-9]{8,18}", path.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# State as a flat dict of tensors


def _named_trained_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """id of each parameter -> its name; raises when the optimizer holds a parameter that the model does not."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        if any(id(parameter) not in names for parameter in group["params"]):
            raise CheckpointError("optimizer: found a parameter that is not the model's; build it after shard_model")
    return names


def _optimizer_tensors(
    part: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict]:
    """Split the optimizer's state into parameter-shaped tensors and JSON-ready scalars {NAME: {KEY: description}}."""
    names = _named_trained_parameters(model, optimizer)
    tensors: dict[str, torch.Tensor] = {}
    layout: dict[str, dict] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        layout[name] = {}
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                layout[name][key] = {"kind": "number", "value": value}
            elif value.numel() == 1 and value.ndim == 0:
                dtype = str(value.dtype).removeprefix("torch.")
                on_cpu = value.device.type == "cpu" != parameter.device.type  # else it moves with its parameter
                layout[name][key] = {"kind": "scalar", "dtype": dtype, "on_cpu": on_cpu, "value": value.item()}
            elif value.shape == parameter.shape:
                layout[name][key] = {"kind": "tensor", "dtype": str(value.dtype).removeprefix("torch.")}
                tensors[f"{part}_optimizer.{key}.{name}"] = value
            else:
                shapes = f"found shape {tuple(value.shape)}, expected {tuple(parameter.shape)} or a scalar"
                raise CheckpointError(f"optimizer state {key} of {name}: {shapes}")
    return tensors, layout


def _make_optimizer_state(
    part: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, layout: dict
) -> dict[str, torch.Tensor]:
    """Give the optimizer the state that `layout` describes; returns its (still empty) tensors, to be read in place."""
    parameters = dict(model.named_parameters())
    _named_trained_parameters(model, optimizer)
    optimizer.state.clear()
    tensors = {}
    for name, entries in layout.items():
        if name not in parameters:
            raise CheckpointError(
                f"optimizer state of {part}.{name}: found in the checkpoint, expected only the model's parameters"
            )
        parameter, state = parameters[name], {}
        for key, entry in entries.items():
            if entry["kind"] == "number":
                state[key] = entry["value"]
            elif entry["kind"] == "scalar":
                device = "cpu" if entry["on_cpu"] else parameter.device
                state[key] = torch.tensor(entry["value"], dtype=getattr(torch, entry["dtype"]), device=device)
            else:
                state[key] = torch.zeros_like(parameter, dtype=getattr(torch, entry["dtype"]), requires_grad=False)
                tensors[f"{part}_optimizer.{key}.{name}"] = state[key]
        optimizer.state[parameter] = state
    return tensors


def _model_tensors(part: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, tied ones once. Buffers are all computed from the config and are not state."""
    reshard_all(model)  # gathered copies carry the parameters' names: saved or read into, they would miss the shards
    return {f"{part}.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def _file_numbers(tensors: dict[str, torch.Tensor], shards: int) -> dict[str, int]:
    """State file number (from 1) of every tensor, so that no rank's file exceeds STATE_FILE_BYTES by more than one."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        if filled > STATE_FILE_BYTES:
            number, filled = number + 1, 0
        filled += tensor.numel() * tensor.element_size() // shards
        numbers[name] = number
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Save


def _run_on_all(action: Callable[[], object], what: str, group: dist.ProcessGroup | None = None) -> None:
    """Run `action` on this rank; if it failed on any rank of the group, raise one CheckpointError on all of them."""
    problem = ""
    try:
        action()
    except CheckpointError as error:
        problem = str(error)
    except (OSError, RuntimeError, ValueError, DataError) as error:
        problem = f"{what}: {' '.join(str(error).split()) or type(error).__name__}"
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:  # values of another shape
        problem = f"{what}: found {error!r}, expected a state as this code saves it"
    except dcp.api.CheckpointException as error:
        # its own text is one traceback per rank; the failures inside carry the reason
        failures = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
        problem = f"{what}: {'; '.join(' '.join(str(failure).split()) for failure in failures)}"
    problems = [text for text in gather_objects(problem, group) if text]
    if problems:
        raise CheckpointError(problems[0][:500])


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """All that a checkpoint holds of this rank, after `step` optimizer steps."""

    step: int
    tensors: dict[str, torch.Tensor]
    trainer_state: dict  # trainer_state.json; rank 0's is written
    random: dict  # random_rankRRRRR.json

    def total_bytes(self) -> int:
        """Bytes of the tensors of all ranks; those of a sharded one count whole."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def _take_snapshot(step: int, parts: Parts, world: World, identity: str, extra: dict) -> _Snapshot:
    """The state as it is now; the tensors are those that train, not copies."""
    tensors, layouts = {}, {}
    for part, (model, optimizer) in parts.items():
        tensors.update(_model_tensors(part, model))
        optimizer_tensors, layouts[part] = _optimizer_tensors(part, model, optimizer)
        tensors.update(optimizer_tensors)
    state = {
        "format": FORMAT,
        "step": step,
        "identity": identity,
        "extra": extra,
        "world_size": world.size,
        "torch": torch.__version__,
        "tensors": sorted(tensors),
        "learning_rates": {
            part: [group["lr"] for group in optimizer.param_groups] for part, (_, optimizer) in parts.items()
        },
        "optimizers": layouts,
    }
    return _Snapshot(step, tensors, state, random_state())


def save_checkpoint(
    folder: Path, step: int, parts: Parts, world: World, *, identity: str, keep: int, extra: dict
) -> Path:
    """Save the state after `step` optimizer steps into folder/step_N; a collective. Returns the folder.

    identity: fingerprint of the run; keep: newest checkpoints left afterwards (0 = all); extra: JSON scalars that
    load_checkpoint gives back (rank 0's are written). Raises CheckpointError on every rank when any rank fails (full
    disk ...): the half-written folder is gone and older checkpoints are untouched.
    """
    return _write_snapshot(folder, _take_snapshot(step, parts, world, identity, extra), world, keep, None)


class CheckpointSaver:
    """Saves the checkpoints of one run: the loop waits, or, with `in_background`, it goes on while a thread writes.

    State: the thread that writes and what it failed with. The thread has a process group of its own, since collectives
    of two threads in one group would meet in any order. Leaving the context waits for it. All methods but has_failed
    are collectives.
    """

    def __init__(self, folder: Path, world: World, *, identity: str, keep: int, in_background: bool) -> None:
        self.folder, self.world, self.identity, self.keep = folder, world, identity, keep
        self.group = host_group() if in_background else None
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def save(self, step: int, parts: Parts, extra: dict) -> None:
        """save_checkpoint, or its beginning: the state is copied to the host, and the loop may change it.

        Waits for the save before. Raises CheckpointError.
        """
        self.wait()
        snapshot = _take_snapshot(step, parts, self.world, self.identity, extra)
        if self.group is None:
            _write_snapshot(self.folder, snapshot, self.world, self.keep, None)
            return
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in snapshot.tensors.items()}
        self.thread = threading.Thread(target=self._write, args=(replace(snapshot, tensors=copies),), daemon=True)
        self.thread.start()

    def _write(self, snapshot: _Snapshot) -> None:
        try:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)  # a thread begins on device 0
            _write_snapshot(self.folder, snapshot, self.world, self.keep, self.group)
        except BaseException as error:  # noqa: BLE001, raised again by wait()
            self.failure = error

    def has_failed(self) -> bool:
        """Whether the thread has failed, on this rank."""
        return self.failure is not None

    def wait(self) -> None:
        """Until the save under way is complete. Raises what the thread failed with: CheckpointError, or a lost rank."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self.thread is not None and issubclass(kind, Exception):  # a checkpoint more, unless peers are dead
            self.thread.join(SECONDS_AFTER_AN_ERROR)


def _write_snapshot(
    folder: Path, snapshot: _Snapshot, world: World, keep: int, group: dist.ProcessGroup | None
) -> Path:
    """Steps 1 to 4 of a save; a collective of `group`."""
    target = folder / checkpoint_name(snapshot.step)
    temporary, what, files = folder / f".saving_{target.name}", f"cannot save {target}", _HashingFileSystem()
    try:
        # 1.
        _run_on_all(lambda: world.is_main and _make_folder(temporary, snapshot, world), what, group)
        _run_on_all(lambda: _write_state(temporary, snapshot, world, group, files), what, group)
        # 2. and 3.
        entries = {name: entry for part in gather_objects(files.entries, group) for name, entry in part.items()}
        manifest = {"format": FORMAT, "step": snapshot.step, "files": entries}
        _run_on_all(lambda: world.is_main and _publish(temporary, target, manifest), what, group)
    except CheckpointError:
        if world.is_main:
            _remove(temporary)
        raise
    # 4.
    if world.is_main and keep > 0:
        older = [path for path in list_checkpoints(folder) if checkpoint_step(path) <= snapshot.step and path.is_dir()]
        for path in older[keep:]:
            _remove(path)
    return target


def _make_folder(temporary: Path, snapshot: _Snapshot, world: World) -> None:
    """Make the folder, on rank 0, if the disk has room for what goes into it; nothing is made in a deleted folder."""
    _remove(temporary)
    needed, disk = snapshot.total_bytes() + OTHER_BYTES * world.size, shutil.disk_usage(temporary.parent)
    if disk.free < needed and disk.total:  # some network file systems say nothing: 0 of 0
        raise OSError(f"found {disk.free / 1e6:,.1f} MB free, expected {needed / 1e6:,.1f} MB for the checkpoint")
    temporary.mkdir()
    (temporary / STATE_FOLDER).mkdir()


def _write_state(
    temporary: Path, snapshot: _Snapshot, world: World, group: dist.ProcessGroup | None, files: "_HashingFileSystem"
) -> None:
    """Step 1 of a save, on every rank; `files` then has the manifest's entries of the files of this rank."""
    writer = HuggingFaceStorageWriter(
        str(temporary / STATE_FOLDER),
        fqn_to_index_mapping=_file_numbers(snapshot.tensors, world.shards),
        save_distributed=True,
    )
    writer.fs = files
    dcp.save(snapshot.tensors, storage_writer=writer, process_group=group)
    own = {f"random_rank{world.rank:05d}.json": snapshot.random}
    if world.is_main:
        own["trainer_state.json"] = snapshot.trainer_state
    for name, content in own.items():
        with files.create_stream(temporary / name, "wb") as file:
            file.write((json.dumps(content, indent=2) + "\n").encode("ascii"))
            os.fsync(file.fileno())


class _HashedFile(io.FileIO):
    """A new file that hashes what it writes. Unbuffered: DCP calls fsync before it closes a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x")  # never through a link
        self.sha256, self.bytes = hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        """Write and hash all of `content`. Raises OSError if the disk takes only a part of it."""
        rest = memoryview(content)
        while rest:
            count = super().write(rest[:HASHED_BYTES])
            self.sha256.update(rest[:count])
            self.bytes, rest = self.bytes + count, rest[count:]
        return len(content)


class _HashingFileSystem(FileSystem):
    """DCP's file system with the manifest's entry of every file that was written through it, by name.

    The hash is of what was to be written: a fault on the way to the disk shows when the checkpoint is read.
    """

    def __init__(self) -> None:
        self.entries: dict[str, dict] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.FileIO]:
        """A file to be written from its beginning to its end; DCP asks for no other."""
        assert mode == "wb", mode
        with _HashedFile(Path(path)) as file:
            yield file
        name = "/".join(Path(path).parts[-2:]) if Path(path).parent.name == STATE_FOLDER else Path(path).name
        self.entries[name] = {"bytes": file.bytes, "sha256": file.sha256.hexdigest()}


def _publish(temporary: Path, target: Path, manifest: dict) -> None:
    """Steps 2 and 3 of a save, on rank 0: manifest, fsync of the folders, rename."""
    write_json_atomically(temporary / "manifest.json", manifest)
    for path in (temporary / STATE_FOLDER, temporary):
        _sync_folder(path)
    if os.path.lexists(target):
        # only a checkpoint that was refused on resume can be here; it goes when its successor is complete
        refused = target.with_name(f".refused_{target.name}")
        _remove(refused)
        os.rename(target, refused)
        os.rename(temporary, target)
        _remove(refused)
    else:
        os.rename(temporary, target)
    _sync_folder(target.parent)


def _sync_folder(path: Path) -> None:
    """Make a folder's entries durable: after a power cut a renamed file may otherwise be missing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there. What cannot be removed stays."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove folders of saves that were killed; returns their names. Rank 0 only."""
    leftovers = sorted([*folder.glob(".saving_*"), *folder.glob(".refused_*")])
    for path in leftovers:
        _remove(path)
    return [path.name for path in leftovers]


# ---------------------------------------------------------------------------------------------------------------------
# Verify and load


def _read_json(path: Path) -> dict:
    try:
        return read_json_object(path)
    except DataError as error:
        raise CheckpointError(str(error).removeprefix(f"{path.parent}/")) from None


def check_files(path: Path, share: int = 0, shares: int = 1) -> str:
    """Compare a checkpoint's files with its manifest; returns "" if all is well, else the first fault.

    share, shares: this rank hashes every `shares`-th file, beginning with number `share`.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            return "found a file or a link, expected a folder"
        manifest = _read_json(path / "manifest.json")
        if manifest.get("format") != FORMAT:
            found = f"manifest.json: found format {shown(manifest.get('format'))}, expected {FORMAT}"
            return f"{found}; it was saved by another version of this code"
        listed = sorted(manifest["files"].items())
        if not {"trainer_state.json", "random_rank00000.json"} <= set(manifest["files"]):
            return "manifest.json: found no entry for trainer_state.json or random_rank00000.json"
        # by no link, and of no other folder whatever the manifest says
        here = {f.relative_to(path).as_posix() for f in path.rglob("*") if stat.S_ISREG(f.lstat().st_mode)}
        for name in sorted(here - set(manifest["files"])):
            if name.endswith(".safetensors"):  # DCP would read it
                return f"{shown(name)}: found a file of tensors that manifest.json does not list"
        for name, entry in listed[share::shares]:
            file = path / name
            if name not in here:
                return f"{shown(name)}: found no such file"
            if file.stat().st_size != entry["bytes"]:
                return f"{name}: found {file.stat().st_size} bytes, expected {shown(entry['bytes'])}"
            if file_sha256(file) != entry["sha256"]:
                return f"{name}: found another sha256 than the manifest's"
    except CheckpointError as error:
        return str(error)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        return f"manifest.json: {error!r}"
    return ""


def _check_state(path: Path, identities: tuple[str, ...]) -> str:
    """Compare a checkpoint's trainer_state.json with the run; returns "" if all is well, else the first fault."""
    try:
        state = _read_json(path / "trainer_state.json")
    except CheckpointError as error:
        return str(error)
    for name, kind in _STATE_KINDS.items():
        if type(state.get(name)) is not kind:
            return f"trainer_state.json: found {name} = {shown(state.get(name))}, expected {kind.__name__}"
    if state["step"] != checkpoint_step(path):
        return f"trainer_state.json: found step {state['step']}, expected that of the folder's name"
    if state["identity"] not in identities:
        return "trainer_state.json: found the identity of another run"
    return ""


def newest_good_checkpoint(
    folder: Path, world: World, *, identity: str, earlier: Collection[str] = ()
) -> tuple[Path | None, list[str]]:
    """Newest checkpoint whose files all match their manifest and whose run is `identity`; a collective.

    earlier: identities that the same run had before its settings were overridden.
    Returns (its folder or None, one line per newer checkpoint that was refused, with the reason).
    """
    refused = []
    for path in gather_objects(list_checkpoints(folder))[0]:
        fault = check_files(path, world.rank, world.size) or _check_state(path, (identity, *earlier))
        faults = [fault for fault in gather_objects(fault) if fault]
        if not faults:
            return path, refused
        refused.append(f"{path}: refused: {faults[0]}")
    return None, refused


def load_weights(path: Path, model: torch.nn.Module, part: str = "model") -> int:
    """Read only one part's weights of a verified checkpoint into a sharded model; a collective.

    Returns the checkpoint's optimizer step. Raises CheckpointError when the part is not there or does not fit.
    """
    tensors = _model_tensors(part, model)
    saved = [name for name in _read_json(path / "trainer_state.json")["tensors"] if name.startswith(f"{part}.")]
    _compare_names(path, tensors, saved)
    reader = HuggingFaceStorageReader(str(path / STATE_FOLDER))
    _run_on_all(lambda: dcp.load(tensors, storage_reader=reader), f"cannot read {path}")
    return checkpoint_step(path)


def load_checkpoint(path: Path, parts: Parts, world: World) -> TrainerState:
    """Read a verified checkpoint into sharded models and their optimizers, in place; a collective.

    The number of ranks may differ from the saving run's: shards are cut again; a rank without saved generators keeps
    its own seed. Raises CheckpointError when parts, names or shapes do not fit.
    """
    state, tensors, what = _read_json(path / "trainer_state.json"), {}, f"cannot read {path}"

    def make_tensors() -> None:
        if set(state["optimizers"]) != set(parts):
            raise CheckpointError(f"{path}: found the parts {sorted(state['optimizers'])}, expected {sorted(parts)}")
        for part, (model, optimizer) in parts.items():
            tensors.update(_model_tensors(part, model))
            tensors.update(_make_optimizer_state(part, model, optimizer, state["optimizers"][part]))
        _compare_names(path, tensors, state["tensors"])

    def restore_generators() -> None:
        random_file = path / f"random_rank{world.rank:05d}.json"
        if random_file.exists():
            restore_random_state(_read_json(random_file))

    _run_on_all(make_tensors, what)
    reader = HuggingFaceStorageReader(str(path / STATE_FOLDER))
    _run_on_all(lambda: dcp.load(tensors, storage_reader=reader), what)
    _run_on_all(restore_generators, what)
    return TrainerState(step=state["step"], saved_world_size=state["world_size"], extra=state["extra"])


def _compare_names(path: Path, tensors: dict[str, torch.Tensor], saved: list[str]) -> None:
    missing, unexpected = sorted(set(tensors) - set(saved)), sorted(set(saved) - set(tensors))
    if missing or unexpected:
        raise CheckpointError(f"{path}: missing tensors {missing}, unexpected tensors {unexpected}")
