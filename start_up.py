"""What a script does before its other imports, which take seconds: it hears signals, ends with its torchrun and tells
PyTorch how to hold CUDA's memory."""

import ctypes
import os
import signal
import sys


def prepare() -> None:
    """Have SIGINT and SIGTERM end the process with one line, until `polite_stop` takes them; the other functions."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    end_with_torchrun()
    let_segments_grow()


def _end(number: int, _frame: object) -> None:
    """The line of rank 0, and exit code 130 or 143; nothing is open yet that would need an end of its own."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"stopped by {signal.Signals(number).name}; the same command continues\n".encode("ascii"))
    os._exit(128 + number)


def end_with_torchrun() -> None:
    """Have Linux end this process when the torchrun that started it dies; nothing without torchrun or Linux.

    Workers of a torchrun that is killed outright live on: without their peers they would hang, and keep the next start
    out of the run folder. SIGKILL rather than SIGTERM, because a rank that waits in a collective hears no signal
    that Python must handle; checkpoints are made for it. Call it first of all, from the main thread: a torchrun that
    died before is not noticed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGKILL)


def let_segments_grow() -> None:
    """Have PyTorch's allocator on CUDA extend its segments; nothing where the user has chosen settings for it.

    Rows of ever new lengths leave holes in segments of fixed size that no later row fits. PyTorch reads the variable
    when it is imported; its old name is checked too.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
