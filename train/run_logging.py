"""The run folder: config.json, run_identity.json, environment.json, metrics.jsonl. Rank 0 writes."""

import hashlib
import json
import os
import platform
import stat
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data.json_records import check_no_device, check_regular_file, read_json_object, write_bytes
from printable import log_text, shown

IDENTITY_FILE = "run_identity.json"


class RunFolderError(ValueError):
    """The output folder cannot be used for this run. One line: path, what was found, what was expected."""


def log_line(message: str) -> None:
    """One line or several for the user on stdout, above a running progress bar, whatever characters they hold."""
    tqdm.write(log_text(message), file=sys.stdout)
    sys.stdout.flush()


def write_json_atomically(path: Path, content: object) -> None:
    """Write JSON so that a reader sees the old or the new file, never half of one. The folder must be there."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode("ascii"))


# ---------------------------------------------------------------------------------------------------------------------
# Identity of a run


def fingerprint(content: object) -> str:
    """sha256 over the canonical JSON of `content`, as 64 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in blocks of 1 MiB. Raises DataError for a device."""
    check_no_device(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_fingerprint(model_dir: str) -> str:
    """sha256 over config, tokenizer and weight files of a model folder.

    Of files above 64 MiB only size, first and last 16 MiB count: another model differs there too, and hashing 13 GB
    would delay every start.
    """
    names = ("config.json", "tokenizer.model", "tokenizer.json")
    paths = [Path(model_dir) / name for name in names] + sorted(Path(model_dir).glob("*.safetensors"))
    parts = {}
    for path in paths:
        if not path.is_file():
            continue
        size = path.stat().st_size
        if size <= 64 * 2**20:
            parts[path.name] = file_sha256(path)
        else:
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read(16 * 2**20))
                file.seek(-16 * 2**20, os.SEEK_END)
                digest.update(file.read())
            parts[path.name] = f"{size} {digest.hexdigest()}"
    return fingerprint(parts)


def open_run_folder(output: Path, identity: dict, *, resume: str) -> None:
    """Make `output`, or check that it holds this very run (equal `identity`); writes run_identity.json.

    Raises RunFolderError as check_run_folder.
    """
    check_run_folder(output, identity, resume=resume)
    output.mkdir(parents=True, exist_ok=True)
    write_json_atomically(output / IDENTITY_FILE, identity)


def check_run_folder(output: Path, identity: dict, *, resume: str, is_whole: bool = True) -> None:
    """Raise RunFolderError for a folder that cannot be this run's; nothing is written.

    It is refused if another run got as far as a step, if files are in the way, and with resume = "never" if it has
    checkpoints: no step of an earlier run is ever overwritten. is_whole: False compares only the names in `identity`,
    before the rest is known.
    """
    for path in (output, *(output / name for name in ("checkpoints", "final", "critic", "plots"))):
        if os.path.lexists(path) and not path.is_dir():
            raise RunFolderError(f"{path}: found a file, expected a folder for the run's output")
    for name in (IDENTITY_FILE, "config.json", "metrics.jsonl"):
        if os.path.lexists(output / name) and not stat.S_ISREG((output / name).lstat().st_mode):
            raise RunFolderError(f"{output / name}: found no regular file, expected one that a run wrote")
    if (output / IDENTITY_FILE).exists():
        if _has_progress(output):
            _check_identity(output / IDENTITY_FILE, identity, is_whole=is_whole)
    elif any((output / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints", "final")):
        raise RunFolderError(
            f"{output}: found files but no run_identity.json, expected a new folder or one of this run"
        )
    checkpoints = sorted((output / "checkpoints").glob("step_*"))
    if resume == "never" and checkpoints:
        raise RunFolderError(
            f"{output}: found checkpoint {checkpoints[-1].name}, expected a folder without checkpoints for "
            "--resume never; choose another --output or --resume auto"
        )


def _has_progress(output: Path) -> bool:
    """True if a run got as far as one step. A start that failed before (out of memory ...) claims no folder."""
    metrics = output / "metrics.jsonl"
    started = metrics.exists() and metrics.stat().st_size > 0
    return started or (output / "final").exists() or any((output / "checkpoints").glob("step_*"))


def _check_identity(identity_path: Path, identity: dict, *, is_whole: bool) -> None:
    found = read_json_object(identity_path)
    for name in sorted(set(found) | set(identity) if is_whole else identity):
        if found.get(name) != identity.get(name):
            theirs, ours = (shown(each[name]) if name in each else "nothing" for each in (found, identity))
            raise RunFolderError(
                f"{identity_path}: found {name} = {theirs}, expected {ours}: "
                "the folder belongs to another run; choose another --output (or see --override)"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Environment


def describe_environment(world_size: int, device: torch.device) -> dict:
    """What the run ran on: versions, device, commit, command. No host name, user name or absolute path."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "device_type": device.type,
        "world_size": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "git_commit": commit or None,
        "command": [Path(sys.argv[0]).name, *map(without_absolute_path, sys.argv[1:])],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def without_absolute_path(argument: str) -> str:
    """A command-line argument whose path says nothing about this machine.

    An absolute path, also after `--flag=`, becomes relative where it lies in the working directory, else its last part.
    """
    flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    path = Path(value).expanduser()
    if not path.is_absolute():
        return argument
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)
    return f"{flag}{equals}{path}"


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def cut_metrics(path: Path, last_step: int) -> int:
    """Keep only the lines of steps <= last_step, so that each step is there once after a resume; returns lines removed.

    A torn last line (killed while writing) goes too, and so does any other line that no run wrote.
    """
    if not path.exists():
        return 0
    check_regular_file(path)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [line + "\n" for line in lines if (row := _row_of(line)) and row["step"] <= last_step]
    removed = sum(map(bool, lines)) - len(kept)
    if removed:
        write_bytes(path, "".join(kept).encode("utf-8"))
    return removed


def _row_of(line: str) -> dict | None:
    """The object that a line is, if it has a step."""
    try:
        row = json.loads(line)  # not the strict reader: a figure may be NaN
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def read_metrics(path: Path, *names: str) -> list[dict]:
    """The lines of a metrics.jsonl that are whole and have numbers under all `names`."""
    if not path.exists():
        return []
    check_regular_file(path)
    rows = map(_row_of, path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [row for row in rows if row and all(type(row.get(name)) in (int, float) for name in names)]
