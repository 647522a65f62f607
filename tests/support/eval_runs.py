"""Short runs of run_eval.py in the test process."""

import contextlib
import io

import run_eval
from tests.support.tiny_run import tiny_files


def flags_of(folder, output, **flags):
    values = {
        "model": tiny_files()[0],
        "benchmark_dir": folder,
        "output": output,
        "device": "cpu",
        "max_new_tokens": 12,
        "batch_size": 8,
        "benchmarks": "tiny-seen",
        **flags,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def run_here(arguments):
    """run_eval.main in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_eval.main(arguments)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def predictions_of(output, name="tiny-seen"):
    return (output / "predictions" / f"{name}.jsonl").read_bytes()
