"""Download the published benchmarks into a folder, every file checked by sha256.

    python -m eval.fetch_benchmarks --benchmark_dir DIR [--only rotbench,toolalpaca] [--check]

benchmark_origins.json says for each file where it lies (GitHub repository, commit, path), its size and its sha256. A
file that is there with the right sha256 is not downloaded again, so the same command continues after an interruption. A
file appears whole or not at all. `--check` only compares the folder with the list, without network.
ToolAlpaca's gold answers were published with API keys; they are masked before the file is written.
"""

import argparse
import hashlib
import http.client
import json
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from command_line import parse_arguments, run_command
from data.json_records import DataError, write_bytes
from eval.benchmarks import Benchmark
from eval.evaluate_toolalpaca import MASKED_API_KEY
from printable import terminal_text

ORIGINS = Path(__file__).with_name("benchmark_origins.json")
HOST = "https://raw.githubusercontent.com"
CONNECTIONS = 8  # files at a time
TIMEOUT_SECONDS = 30  # without a byte from the server
ATTEMPTS = 4  # per file, for faults that may pass
BACKOFF_SECONDS = 1.0  # before the second attempt, doubled before each further one
# The key of a gold call comes first in its arguments; documents name the same parameters, but not as Action_Input.
_API_KEY = re.compile(rb'("Action_Input": "\{\\"(?:access_key|appid|api_key)\\": \\")[^\\"]+')


@dataclass(frozen=True, slots=True)
class OriginFile:
    """One file of a benchmark and where it comes from."""

    path: str  # below --benchmark_dir
    url_path: str  # below the host, not quoted
    size: int  # bytes on disk
    sha256: str  # of the file on disk
    source_sha256: str  # of the file at the origin; another one only where API keys are masked


def read_origins(path: Path) -> list[OriginFile]:
    """The files of benchmark_origins.json, in its order."""
    files = []
    for source in json.loads(path.read_text(encoding="ascii")):
        for local, remote, size, sha256, *source_sha256 in source["files"]:
            files.append(
                OriginFile(
                    path=local,
                    url_path=f"/{source['repository']}/{source['commit']}/{remote}",
                    size=size,
                    sha256=sha256,
                    source_sha256=(source_sha256 or [sha256])[0],
                )
            )
    return files


def files_of_benchmark(benchmark: Benchmark, files: Sequence[OriginFile]) -> list[OriginFile]:
    """The files that a benchmark is read from: its file, or all below its folder."""
    path = benchmark.folder or benchmark.path
    return [file for file in files if file.path == path or file.path.startswith(path + "/")]


def mask_api_keys(content: bytes) -> bytes:
    """ToolAlpaca's eval_real.json with every API key in its gold calls replaced by MASKED_API_KEY."""
    return _API_KEY.sub(rb"\g<1>" + MASKED_API_KEY.encode("ascii"), content)


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def find_faults(files: Sequence[OriginFile], benchmark_dir: Path) -> list[str]:
    """One line for every file that is missing, unreadable or altered."""
    return [fault for file in files if (fault := _fault_on_disk(file, benchmark_dir))]


def check_benchmark(benchmark: Benchmark, benchmark_dir: Path) -> None:
    """Raise DataError unless the files of a published benchmark are in `benchmark_dir` as they were published."""
    faults = find_faults(files_of_benchmark(benchmark, read_origins(ORIGINS)), benchmark_dir)
    if faults:
        raise DataError(faults[0] + (f" ({len(faults) - 1} more such files)" if len(faults) > 1 else ""))


def _fault_on_disk(file: OriginFile, benchmark_dir: Path) -> str:
    path = benchmark_dir / file.path
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return (
            f"{path}: found no such file, expected it (python -m eval.fetch_benchmarks --benchmark_dir {benchmark_dir})"
        )
    except OSError as error:
        return f"{path}: found {error.strerror or error}, expected a readable file"
    return "" if _sha256(content) == file.sha256 else f"{path}: found {_contents(content)}, expected {_expected(file)}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _contents(content: bytes) -> str:
    return f"{len(content)} bytes with sha256 {_sha256(content)[:16]}.."


def _expected(file: OriginFile) -> str:
    return f"{file.size} bytes with sha256 {file.sha256[:16]}.."


# ---------------------------------------------------------------------------------------------------------------------
# Download


def fetch_files(files: Sequence[OriginFile], benchmark_dir: Path, host: str) -> Iterator[str]:
    """Download what is missing below `benchmark_dir`; yields the path of every file once it is there.

    Raises DataError at the first file that cannot be had: altered on disk, no network, refused, wrong sha256. Files
    that came before stay.
    """
    missing = []
    for file in files:
        if not (benchmark_dir / file.path).exists():
            missing.append(file)
            continue
        fault = _fault_on_disk(file, benchmark_dir)
        if fault:
            raise DataError(f"{fault}; delete it to download it again")
        yield file.path
    with ThreadPoolExecutor(max_workers=CONNECTIONS) as pool:
        pending = {pool.submit(_fetch_file, file, benchmark_dir, host): file for file in missing}
        try:
            for future in as_completed(pending):
                future.result()
                yield pending[future].path
        finally:  # without this every remaining file would be tried in vain before the error shows
            pool.shutdown(wait=True, cancel_futures=True)


def _fetch_file(file: OriginFile, benchmark_dir: Path, host: str) -> None:
    url = host.rstrip("/") + urllib.parse.quote(file.url_path)
    content = _download(url, file.size)
    if _sha256(content) != file.source_sha256:
        raise DataError(
            f"{url}: found {_contents(content)}, expected sha256 {file.source_sha256[:16]}..; nothing was written"
        )
    if file.source_sha256 != file.sha256:
        content = mask_api_keys(content)
        if _sha256(content) != file.sha256:
            raise DataError(f"{url}: found {_contents(content)} after masking API keys, expected {_expected(file)}")
    path = benchmark_dir / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


def _download(url: str, size: int) -> bytes:
    """The body of `url`, at most twice `size`: an endless answer ends as a wrong sha256. Raises DataError."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
                return answer.read(2 * size + 1)
        except urllib.error.HTTPError as error:
            reason, may_pass = f"HTTP status {error.code}", error.code == 429 or error.code >= 500
            error.close()
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError, timeouts, resets; a wrong URL
            reason, may_pass = (
                str(getattr(error, "reason", error)) or type(error).__name__,
                isinstance(error, (OSError, http.client.HTTPException)),
            )
        if attempt == ATTEMPTS or not may_pass:
            break
        time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
    raise DataError(
        f"{url}: found {reason} (attempt {attempt}), expected the file; files that came before are kept, "
        "the same command continues"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0 if all files are there, or 2 after one line on stderr."""
    files = read_origins(ORIGINS)
    folders = list(dict.fromkeys(file.path.split("/")[0] for file in files))
    parser = argparse.ArgumentParser(
        prog="python -m eval.fetch_benchmarks", description="Download the benchmarks, checked by sha256."
    )
    parser.add_argument("--benchmark_dir", type=Path, required=True, help="folder that the files go into")
    parser.add_argument("--only", default=",".join(folders), help="comma-separated folders (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare the folder with the list, download nothing")
    parser.add_argument("--host", default=HOST, help="server or mirror (default: %(default)s)")
    flags = parse_arguments(parser, arguments)
    unknown = [folder for folder in flags.only.split(",") if folder not in folders]
    if unknown:
        parser.error(f"--only: found {unknown[0]!a}, expected some of {', '.join(folders)}")
    files = [file for file in files if file.path.split("/")[0] in flags.only.split(",")]

    def command() -> None:
        if flags.check:
            faults = find_faults(files, flags.benchmark_dir)
            if faults:
                raise DataError(f"{faults[0]} ({len(faults)} of {len(files)} files missing or altered)")
        else:
            for done, path in enumerate(fetch_files(files, flags.benchmark_dir, flags.host), start=1):
                print(f"{done}/{len(files)} {path}", flush=True)
        print(f"{terminal_text(str(flags.benchmark_dir))}: all {len(files)} files as published")

    return run_command(command, (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
