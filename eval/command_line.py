"""How the evaluators' command lines fail: one line on stderr, exit code 2, never a traceback or a usage page."""

import argparse
import sys
from collections.abc import Callable, Sequence

from data.json_records import DataError


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """`parser.parse_args(arguments)`, but wrong flags end with one line and code 2."""

    def fail(message: str) -> None:
        print(f"{parser.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)

    parser.error = fail
    return parser.parse_args(arguments)


def run_command(command: Callable[[], None]) -> int:
    """Run `command`; its exit code: 0, or 2 after one line about wrong input or a failing disk."""
    try:
        command()
    except (DataError, OSError) as error:
        print(" ".join(str(error).split("\n")), file=sys.stderr)
        return 2
    return 0
