"""Complete, atomic, verified checkpoints through torch.distributed.checkpoint. No pickle file is written or read.

OUTPUT/checkpoints/step_00000010/
    state/*.safetensors    every rank's shards of weights ("PART.NAME") and optimizer tensors
                           ("PART_optimizer.KEY.NAME"); each file's header holds the offsets, so another number of ranks
                           can read them. PART is "model" in SFT, "policy" and "critic" in PPO
    trainer_state.json     step (= data position and scheduler position), identity of the run, optimizer scalars, the
                           trainer's own scalars ("extra")
    random_rank00000.json  generators of each rank
    manifest.json          sha256 and size of every file above; written last

Save, in numbered steps: 1 write everything into .saving_step_N; 2 hash the files, write manifest.json; 3 rename the
folder; 4 remove older checkpoints. A kill at any moment leaves the older checkpoints whole and at most one .saving_
folder, removed by the next start. Load: a checkpoint counts only if every file has the size and sha256 of its manifest.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from train.distributed import World, gather_objects, reshard_all
from train.run_logging import file_sha256, write_json_atomically
from train.seeding import random_state, restore_random_state

FORMAT = 2  # 1 held one model without a part's name
STATE_FOLDER = "state"
# bytes of tensors per state file: torch holds one file twice in host memory while writing it
STATE_FILE_BYTES = 512 * 2**20


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
    """Checkpoint folders, newest first; complete or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
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
                on_cpu = value.device.type == "cpu"
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


def _run_on_all(action: Callable[[], None], what: str) -> None:
    """Run `action` on this rank; if it failed on any rank, raise one CheckpointError on all of them."""
    try:
        action()
        problem = ""
    except (OSError, RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    except dcp.api.CheckpointException as error:
        # its own text is one traceback per rank; the failures inside carry the reason
        failures = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
        problem = "; ".join(" ".join(str(failure).split()) for failure in failures)
    problems = [text for text in gather_objects(problem) if text]
    if problems:
        raise CheckpointError(f"{what}: {problems[0][:500]}")


def save_checkpoint(
    folder: Path, step: int, parts: Parts, world: World, *, identity: str, keep: int, extra: dict
) -> Path:
    """Save the state after `step` optimizer steps into folder/step_N; a collective. Returns the folder.

    identity: fingerprint of the run; keep: newest checkpoints left afterwards (0 = all); extra: JSON scalars that
    load_checkpoint gives back (rank 0's are written). Raises CheckpointError on every rank when any rank fails (full
    disk ...): the half-written folder is gone and older checkpoints are untouched.
    """
    target = folder / checkpoint_name(step)
    temporary = folder / f".saving_{target.name}"
    try:
        state = {"step": step, "identity": identity, "extra": extra}
        _run_on_all(lambda: _write_state(temporary, state, parts, world), f"cannot save {target}")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        hashes: dict[str, dict] = {}

        def hash_share() -> None:
            for path in files[world.rank :: world.size]:
                entry = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                hashes[path.relative_to(temporary).as_posix()] = entry

        _run_on_all(hash_share, f"cannot save {target}")
        manifest = {"format": FORMAT, "step": step, "files": {}}
        for part in gather_objects(hashes):
            manifest["files"].update(part)
        _run_on_all(lambda: _publish(temporary, target, manifest) if world.is_main else None, f"cannot save {target}")
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if world.is_main and keep > 0:
        older = [path for path in list_checkpoints(folder) if checkpoint_step(path) <= step]
        for path in older[keep:]:
            shutil.rmtree(path, ignore_errors=True)
    return target


def _write_state(temporary: Path, state: dict, parts: Parts, world: World) -> None:
    """Step 1 of a save, on every rank. `state` becomes trainer_state.json with what the parts add."""

    def make_folder() -> None:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / STATE_FOLDER).mkdir(parents=True)

    _run_on_all(make_folder, "cannot make the folder")
    tensors, layouts = {}, {}
    for part, (model, optimizer) in parts.items():
        tensors.update(_model_tensors(part, model))
        optimizer_tensors, layouts[part] = _optimizer_tensors(part, model, optimizer)
        tensors.update(optimizer_tensors)
    writer = HuggingFaceStorageWriter(
        str(temporary / STATE_FOLDER), fqn_to_index_mapping=_file_numbers(tensors, world.shards), save_distributed=True
    )
    dcp.save(tensors, storage_writer=writer)
    write_json_atomically(temporary / f"random_rank{world.rank:05d}.json", random_state())
    if world.is_main:
        rates = {part: [group["lr"] for group in optimizer.param_groups] for part, (_, optimizer) in parts.items()}
        state = {
            "format": FORMAT,
            **state,
            "world_size": world.size,
            "torch": torch.__version__,
            "tensors": sorted(tensors),
            "learning_rates": rates,
            "optimizers": layouts,
        }
        write_json_atomically(temporary / "trainer_state.json", state)


def _publish(temporary: Path, target: Path, manifest: dict) -> None:
    """Steps 2 and 3 of a save, on rank 0: manifest, fsync of the folders, rename."""
    write_json_atomically(temporary / "manifest.json", manifest)
    for path in (temporary / STATE_FOLDER, temporary):
        _sync_folder(path)
    if target.exists():
        # only a checkpoint that was refused on resume can be here; it goes when its successor is complete
        refused = target.with_name(f".refused_{target.name}")
        shutil.rmtree(refused, ignore_errors=True)
        os.rename(target, refused)
        os.rename(temporary, target)
        shutil.rmtree(refused, ignore_errors=True)
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


def remove_leftovers(folder: Path) -> list[str]:
    """Remove folders of saves that were killed; returns their names. Rank 0 only."""
    removed = []
    if folder.is_dir():
        for path in sorted([*folder.glob(".saving_*"), *folder.glob(".refused_*")]):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
    return removed


# ---------------------------------------------------------------------------------------------------------------------
# Verify and load


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: found no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path.name}: found unreadable text ({error}), expected JSON") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name}: found {type(content).__name__}, expected a JSON object")
    return content


def check_files(path: Path, share: int = 0, shares: int = 1) -> str:
    """Compare a checkpoint's files with its manifest; returns "" if all is well, else the first fault.

    share, shares: this rank hashes every `shares`-th file, beginning with number `share`.
    """
    try:
        manifest = _read_json(path / "manifest.json")
        if manifest.get("format") != FORMAT:
            found = f"manifest.json: found format {manifest.get('format')!r}, expected {FORMAT}"
            return f"{found}; it was saved by another version of this code"
        listed = sorted(manifest["files"].items())
        if not {"trainer_state.json", "random_rank00000.json"} <= set(manifest["files"]):
            return "manifest.json: found no entry for trainer_state.json or random_rank00000.json"
        for name, entry in listed[share::shares]:
            file = path / name
            if not file.is_file():
                return f"{name}: found no such file"
            if file.stat().st_size != entry["bytes"]:
                return f"{name}: found {file.stat().st_size} bytes, expected {entry['bytes']}"
            if file_sha256(file) != entry["sha256"]:
                return f"{name}: found another sha256 than the manifest's"
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError) as error:
        return str(error) if isinstance(error, CheckpointError) else f"manifest.json: {error!r}"
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
        faults = [fault for fault in gather_objects(check_files(path, world.rank, world.size)) if fault]
        if not faults and _read_json(path / "trainer_state.json").get("identity") not in (identity, *earlier):
            faults = ["trainer_state.json: found the identity of another run"]
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
    state = _read_json(path / "trainer_state.json")
    if set(state["optimizers"]) != set(parts):
        raise CheckpointError(f"{path}: found the parts {sorted(state['optimizers'])}, expected {sorted(parts)}")
    tensors = {}
    for part, (model, optimizer) in parts.items():
        tensors.update(_model_tensors(part, model))
        tensors.update(_make_optimizer_state(part, model, optimizer, state["optimizers"][part]))
    _compare_names(path, tensors, state["tensors"])
    reader = HuggingFaceStorageReader(str(path / STATE_FOLDER))
    _run_on_all(lambda: dcp.load(tensors, storage_reader=reader), f"cannot read {path}")
    random_file = path / f"random_rank{world.rank:05d}.json"
    if random_file.exists():
        restore_random_state(_read_json(random_file))
    return TrainerState(step=state["step"], saved_world_size=state["world_size"], extra=state["extra"])


def _compare_names(path: Path, tensors: dict[str, torch.Tensor], saved: list[str]) -> None:
    missing, unexpected = sorted(set(tensors) - set(saved)), sorted(set(saved) - set(tensors))
    if missing or unexpected:
        raise CheckpointError(f"{path}: missing tensors {missing}, unexpected tensors {unexpected}")
