"""Thousands of damaged inputs, one table: python -m tests.fuzz.report --mutations 20000 --seed 1 --output fuzz.jsonl

Each case is drawn from its seed and its index, so `--case SEED:INDEX` replays it with the traceback. A case survives if
its reader takes the input or refuses it in one clean line, within SECONDS and MEBIBYTES, and writes only into the
case's folder. Cases run in worker processes: one that crashes or hangs is recorded and the next worker goes on. Rows
are appended to --output as they come; the same command continues a killed report. The last line is JSON.
"""

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from command_line import error_line, parse_arguments
from tests.fuzz.mutate import mutate
from tests.fuzz.targets import TARGETS, UNDAMAGED, USER_ERRORS, Target, refuse_unprintable
from tests.support.processes import PRELOADED

SECONDS, MEBIBYTES = 5.0, 300  # that one case may take
ADDRESS_SPACE = 4 << 30  # of a worker above what it has at its start
CASES_PER_WORKER = 400
SECONDS_OF_SILENCE = 30  # of a worker that hangs in native code, where no alarm reaches it
KINDS = {".json": "json", ".jsonl": "lines", ".safetensors": "tensors", ".txt": "text", ".csv": "text"}
WRITERS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


class Hang(BaseException):
    """A case took longer than SECONDS."""


class WroteOutside(BaseException):
    """A case wrote outside its folder."""


# ---------------------------------------------------------------------------------------------------------------------
# One case


@dataclass(frozen=True, slots=True)
class Case:
    """A good folder, and one of its files with what it is damaged to."""

    target: Target
    good: Path
    damaged: str  # path of the file inside the folder
    content: bytes
    rng: random.Random  # for the choices that the target itself makes


def make_good_folders(root: Path, journal: Path) -> dict[str, list[Path]]:
    """The folders of each target, by its name. Made in another process: this one must be forked without threads."""

    def make() -> None:
        for target in TARGETS:
            target.make(root / target.name)

    if problem := run_worker(make, journal, patience=600):  # runs of their own, which add no row
        raise RuntimeError(f"the good folders could not be made: {problem}")
    return {target.name: sorted((root / target.name).iterdir()) for target in TARGETS}


def draw_case(good_folders: dict[str, list[Path]], seed: int, index: int) -> Case:
    """The same case for the same numbers, whatever ran before."""
    rng = random.Random(f"{seed}:{index}")
    target = rng.choices(TARGETS, [each.share for each in TARGETS])[0]
    folders = good_folders[target.name]
    good = rng.choice(folders)
    path = rng.choice(sorted(each for each in good.rglob("*") if each.is_file() and each.name != UNDAMAGED))
    others = [each.read_bytes() for each in sorted(rng.choice(folders).rglob(f"*{path.suffix}")) if each.is_file()]
    content = mutate(path.read_bytes(), others, KINDS.get(path.suffix, "bytes"), rng)
    return Case(target, good, path.relative_to(good).as_posix(), content, rng)


def run_case(case: Case, folder: Path) -> tuple[str, str]:
    """("read" | "refused" | "found", the line or what was found and where). `folder` is new and stays."""
    copy = folder / case.good.name
    shutil.copytree(case.good, copy)
    (copy / case.damaged).write_bytes(case.content)
    try:
        case.target.read(copy, case.rng, case.damaged)
    except USER_ERRORS as error:
        try:
            if not isinstance(error, OSError):
                refuse_unprintable(error)
        except Exception as wrong:
            return "found", describe(wrong)
        return "refused", error_line(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also a panic of native code, Hang, WroteOutside
        return "found", describe(error)
    return "read", ""


def describe(error: BaseException) -> str:
    """The error, and the last line of the product that it went through."""
    root = Path(__file__).resolve().parents[2]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(root)]
    ours = [frame for frame in frames if "tests" not in Path(frame.filename).relative_to(root).parts] or frames
    place = f"{Path(ours[-1].filename).relative_to(root)}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {place}: {str(error)!a:.160}"


# ---------------------------------------------------------------------------------------------------------------------
# A worker


def guard_writes(root: Path) -> None:
    """From now on, opening a file for writing outside `root` raises WroteOutside."""

    def check(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in WRITERS and arguments[-1] in (-1, None):  # else relative to a folder that rmtree has opened
            path = arguments[0]
        else:
            return
        if isinstance(path, int) or path in (os.devnull, "/proc/self/clear_refs"):
            return
        found = os.path.realpath(os.path.join(os.getcwd(), os.fsdecode(path)))
        if not found.startswith(str(root)):
            raise WroteOutside(f"{event} {found}")

    sys.addaudithook(check)


def memory_of(name: str) -> int:
    """A line of /proc/self/status, in KiB: VmRSS, VmHWM (the most since the last reset), VmSize."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0])


def work(root: Path, good_folders: dict[str, list[Path]], seed: int, indices: Sequence[int], journal: Path) -> None:
    """Run these cases in `root`; a row of the journal for each."""
    size = (memory_of("VmSize") << 10) + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True
    os.environ["TMPDIR"] = tempfile.tempdir = str(root)
    rows = open(journal, "a", buffering=1)  # noqa: SIM115, closed by the end of the process
    guard_writes(root)
    signal.signal(signal.SIGALRM, _stop_hang)
    for index in indices:
        case = draw_case(good_folders, seed, index)
        folder = root / str(index)
        folder.mkdir()
        Path("/proc/self/clear_refs").write_text("5")
        before, began = memory_of("VmRSS"), time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome, what = run_case(case, folder)
        except Hang as error:  # the alarm came while an error was described
            outcome, what = "found", describe(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds, mebibytes = time.perf_counter() - began, (memory_of("VmHWM") - before) / 1024
        if outcome != "found" and mebibytes > MEBIBYTES:
            outcome, what = "found", f"{mebibytes:.0f} MiB of memory"
        shutil.rmtree(folder)
        rows.write(json.dumps([index, case.target.name, outcome, round(seconds, 3), round(mebibytes, 1), what]) + "\n")


def _stop_hang(*_: object) -> None:
    raise Hang(f"more than {SECONDS:g} s")


def run_worker(job: Callable[[], None], journal: Path, patience: float) -> str:
    """`job` in a forked process; "" or how it ended. One that adds no row for `patience` seconds is killed."""
    child = os.fork()
    if not child:
        code = 1
        try:
            job()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    size, last = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code > 0:
                raise RuntimeError("a worker failed outside its cases: see the traceback above")
            return "" if code == 0 else f"crashed: {signal.Signals(-code).name}"
        if journal.stat().st_size != size:
            size, last = journal.stat().st_size, time.monotonic()
        elif time.monotonic() - last > patience:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"hung for {patience:g} s in native code"
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def read_rows(journal: Path) -> dict[int, list]:
    """The journal's rows by index; a partial last line is left out."""
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return {row[0]: row for row in map(json.loads, lines)}


def fuzz(mutations: int, seed: int, journal: Path) -> dict[int, list]:
    """Run the cases 0 .. mutations - 1 that the journal lacks; all its rows."""
    torch.set_num_threads(1)
    for name in PRELOADED:  # else the first case of every worker pays for them
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        root = Path(folder).resolve()
        (root / "cases").mkdir()
        journal.touch()
        journal.write_bytes(
            journal.read_bytes()[: journal.read_bytes().rfind(b"\n") + 1]
        )  # of a report that was killed
        good_folders = make_good_folders(root / "good", journal)
        while left := sorted({*range(mutations)} - {*read_rows(journal)}):
            batch = left[:CASES_PER_WORKER]
            job = partial(work, root / "cases", good_folders, seed, batch, journal)
            problem = run_worker(job, journal, SECONDS_OF_SILENCE)
            if problem:
                index = min({*batch} - {*read_rows(journal)})
                name = draw_case(good_folders, seed, index).target.name
                with open(journal, "a") as file:
                    file.write(json.dumps([index, name, "found", 0.0, 0.0, problem]) + "\n")
    return {index: row for index, row in read_rows(journal).items() if index < mutations}


def print_report(rows: dict[int, list], seed: int) -> int:
    """The table, what was found with a case of each kind, and one line of JSON. Exit code 0 if all survived."""
    print(f"{'damaged input':<20}{'tried':>8}{'survived':>10}{'read':>8}{'refused':>9}{'worst s':>9}{'worst MiB':>11}")
    summary = {}
    for name in (*(target.name for target in TARGETS), "all"):
        of_target = [row for row in rows.values() if name in (row[1], "all")]
        counts = [sum(row[2] == outcome for row in of_target) for outcome in ("read", "refused")]
        worst = [max((row[column] for row in of_target), default=0.0) for column in (3, 4)]
        print(
            f"{name:<20}{len(of_target):>8}{sum(counts):>10}{counts[0]:>8}{counts[1]:>9}{worst[0]:>9.2f}{worst[1]:>11.0f}"
        )
        summary[name] = {"tried": len(of_target), "read": counts[0], "refused": counts[1]} | {
            "survived": sum(counts),
            "worst_seconds": worst[0],
            "worst_mebibytes": worst[1],
        }
    found: dict[str, list[int]] = {}
    for index, row in sorted(rows.items()):
        if row[2] == "found":
            found.setdefault(f"{row[1]}: {row[5]}", []).append(index)
    for what, indices in found.items():
        print(f"found {len(indices)} x {what}; replay: python -m tests.fuzz.report --case {seed}:{indices[0]}")
    print(json.dumps({"seed": seed, "targets": summary, "found": {what: len(each) for what, each in found.items()}}))
    return 1 if found else 0


def replay(seed: int, index: int) -> int:
    """One case in this process. The damaged folder stays, to be looked at."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz_{seed}_{index}_"))
    with tempfile.TemporaryDirectory(prefix="fuzz_good_") as good:
        case = draw_case(make_good_folders(Path(good), folder), seed, index)
        copy = folder / case.good.name
        shutil.copytree(case.good, copy)
        (copy / case.damaged).write_bytes(case.content)
        print(f"{case.target.name}: {copy / case.damaged}")
        signal.signal(signal.SIGALRM, _stop_hang)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        case.target.read(copy, case.rng, case.damaged)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.report", description=__doc__.split("\n")[0])
    parser.add_argument("--mutations", type=int, default=20_000, help="number of cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of all cases (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="journal of rows; one that exists is continued")
    parser.add_argument("--case", metavar="SEED:INDEX", help="run only this case, here, with its traceback")
    flags = parse_arguments(parser, arguments)
    if flags.case:
        return replay(*map(int, flags.case.split(":")))
    with tempfile.TemporaryDirectory(prefix="fuzz_journal_") as folder:
        journal = flags.output or Path(folder) / "fuzz.jsonl"
        return print_report(fuzz(flags.mutations, flags.seed, journal), flags.seed)


if __name__ == "__main__":
    sys.exit(main())
