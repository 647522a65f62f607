"""What became of a run over its starts: settings changed on request (`--override`), and where it ended.

Files of the run folder:
    history.jsonl    one line per changed setting: {"step", "setting", "old", "new"}; step: of the newest checkpoint
    finished.json    {"step"}: the step that final/ was exported at
"""

from collections.abc import Sequence
from pathlib import Path

from data.json_records import DataError, JsonLinesFile, read_json_lines, read_json_object
from model.config import ModelFolderError
from model.pretrained_weights import check_folder
from model.tokenizer import load_tokenizer
from printable import shown
from train.checkpoint import checkpoint_step, list_checkpoints
from train.distributed import World, gather_objects
from train.run_logging import IDENTITY_FILE, fingerprint, log_line, write_json_atomically

HISTORY_FILE, FINISHED_FILE = "history.jsonl", "finished.json"


# ---------------------------------------------------------------------------------------------------------------------
# Overrides


def override_names(override: str) -> list[str]:
    """The settings that `--override` names, separated by commas."""
    return [name.strip() for name in override.split(",") if name.strip()]


def check_override(override: str, allowed: Sequence[str]) -> None:
    """Raise ValueError, beginning with the field's name, for a setting that no run may change on its way."""
    for name in override_names(override):
        if name not in allowed:
            raise ValueError(f"override: found {shown(name)}, expected settings among {', '.join(allowed)}")


def without_overridden(identity: dict, override: str) -> dict:
    """`identity` without the settings that may differ from those in the folder."""
    return {name: value for name, value in identity.items() if name not in override_names(override)}


def override_settings(output: Path, override: str, identity: dict, world: World) -> list[dict]:
    """Let the named settings differ from those of the run in `output`; returns its whole history; a collective.

    Only if nothing else differs: else the folder is left as it is, for check_run_folder to refuse. Each change is said
    in the log and appended to history.jsonl before run_identity.json has it, so that a kill between the two loses none.
    Raises DataError, on every rank, for files that cannot be read or written.
    """
    history, fault = [], ""
    if world.is_main:
        try:
            history = _override_settings(output, override_names(override), identity)
        except (DataError, OSError) as error:
            fault = str(error)
    history, fault = gather_objects((history, fault))[0]
    if fault:
        raise DataError(fault)
    return history


def _override_settings(output: Path, names: Sequence[str], identity: dict) -> list[dict]:
    path = output / HISTORY_FILE
    rows = read_json_lines(path, drop_partial_last_line=True)[0] if path.exists() else []
    for line, row in rows:
        if type(row.get("step")) is not int or type(row.get("setting")) is not str or not {"old", "new"} <= set(row):
            raise DataError(f"{path}:{line}: found {shown(row)}, expected step, setting, old and new")
    history = [row for _, row in rows]
    found = read_json_object(output / IDENTITY_FILE) if names and (output / IDENTITY_FILE).exists() else identity
    differing = {name for name in {*found, *identity} if found.get(name) != identity.get(name)}
    if not differing or not differing <= {*names}:
        return history
    step = max(map(checkpoint_step, list_checkpoints(output / "checkpoints")), default=0)
    changes = [
        {"step": step, "setting": name, "old": found.get(name), "new": identity[name]} for name in sorted(differing)
    ]
    with JsonLinesFile(path) as file:
        for row in changes:
            file.write(row)
        file.sync()
    write_json_atomically(output / IDENTITY_FILE, identity)
    for row in changes:
        log_line(f"override: {row['setting']} = {shown(row['new'])} after step {step}, before {shown(row['old'])}")
    return history + changes


def earlier_identities(identity: dict, history: Sequence[dict]) -> tuple[str, ...]:
    """Fingerprints that checkpoints of this run may have from before its overrides, newest first."""
    fingerprints = []
    for row in reversed(history):
        identity = {**identity, row["setting"]: row["old"]}
        fingerprints.append(fingerprint(identity))
    return tuple(fingerprints)


def is_overridden_since(history: Sequence[dict], setting: str, step: int) -> bool:
    """Whether the setting was changed after the state of `step` was saved, so that this state has an older value."""
    return any(row["setting"] == setting and row["step"] >= step for row in history)


# ---------------------------------------------------------------------------------------------------------------------
# The end


def mark_finished(output: Path, step: int) -> None:
    """Say that final/ holds the weights after `step`."""
    write_json_atomically(output / FINISHED_FILE, {"step": step})


def finished_step(output: Path, max_steps: int, exports: Sequence[str]) -> int | None:
    """The step that the run in `output` ended at, if all steps asked for are done and all exports are there, else None.

    max_steps: the setting; exports: names of folders in `output`. The folder must be known to be this run's. An export
    that is damaged, as far as that shows without reading a weight, is not there: the run makes it again.
    """
    if not (output / FINISHED_FILE).exists() or not all(_is_whole(output / name) for name in exports):
        return None
    step = read_json_object(output / FINISHED_FILE).get("step")
    total_steps = read_json_object(output / IDENTITY_FILE).get("total_steps")
    if type(step) is not int or type(total_steps) is not int:
        return None
    return step if step >= min(total_steps, max_steps or total_steps) else None


def _is_whole(model_dir: Path) -> bool:
    try:
        check_folder(model_dir, load_tokenizer(model_dir))
    except (ModelFolderError, OSError):
        return False
    return True
