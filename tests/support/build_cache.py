"""Folders that are made once and kept: what one test process builds, the next one and the next run find ready.

    folder = made_once("library", [source_text, flags], make)      # make(folder) fills a new folder

They lie in $XDG_CACHE_HOME/tl_training/tests (default ~/.cache/tl_training/tests), which may be deleted at any time.
`pytest --fresh` uses an empty folder instead, and so does a run that cannot write there (conftest.py).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    chosen = os.environ.get("TL_TRAINING_TEST_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(home) / "tl_training" / "tests"


@functools.cache
def machine() -> str:
    """What a compiled file depends on besides its text: compiler and processor (-march=native)."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=False).stdout
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in processor.splitlines() if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}\n{compiler}"


def digest_of(parts: Sequence[str]) -> str:
    """16 hexadecimal digits of the texts and their borders."""
    digest = hashlib.sha256()
    for part in (machine(), *parts):
        content = part.encode()
        digest.update(b"%d:" % len(content) + content)
    return digest.hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process or thread at a time; the lock of a killed process is free."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made_once(kind: str, parts: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The folder for these texts. It appears whole or not at all: `make` fills another one, which is renamed."""
    result = cache_folder() / f"{kind}_{digest_of(parts)}"
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        with locked(result.with_suffix(".lock")):
            if not result.exists():
                with tempfile.TemporaryDirectory(dir=result.parent, prefix="partial_") as parent:
                    (Path(parent) / kind).mkdir()
                    make(Path(parent) / kind)
                    (Path(parent) / kind).rename(result)
    return result
