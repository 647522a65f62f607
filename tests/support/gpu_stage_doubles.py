"""Stages for the runner of benchmarks/gpu_check.py that pass or misbehave; a module that imports in no time."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def passes():
    yield {"answer": 42, "rate": 1 / 3}
    yield {"not_run": "the rest"}


def raises():
    yield {"before": 1}
    raise ValueError("two\nlines")


def fails_a_check():
    yield {"difference": 2.0, "fault": "difference: found 2, expected at most 1"}
    yield {"after": 1}


def hangs(pid_file):
    yield {"before": 1}
    child = subprocess.Popen(["sleep", "600"])
    Path(pid_file).write_text(str(child.pid))
    time.sleep(600)


def prints_garbage():
    print("\x1b[31m{]", flush=True)
    os.write(1, b"\xff\xfe\n" * 3)
    yield {"figure": float("nan"), "other": Path("x")}


def yields_garbage():
    yield 7


def damages_its_record():
    yield {"before": 1}
    (Path(tempfile.gettempdir()) / "record.jsonl").write_bytes(b'{"before": 1}\n{"half\n{"after": 2}\n')
    os._exit(0)


def exits():
    yield {"before": 1}
    print("no memory left", flush=True)
    raise SystemExit(3)


def is_killed():
    yield {"before": 1}
    print("nearly done", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 9)


def is_skipped():
    yield {"skipped": "a package is not installed"}
