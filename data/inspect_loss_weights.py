"""Which tokens of a trajectory are trained, with what weight, and why not: in the terminal or as a page.

    python -m data.inspect_loss_weights --data train.json --index 3
    python -m data.inspect_loss_weights --data train.json --id 17 --html sample.html

It calls the same functions as training (data.loss_weights, data.error_filter), so what is shown is what is trained.
`python -m eval.reports.error_statistics --data train.json` counts the categories of a whole file.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import parse_arguments, run_command
from data.error_filter import ERROR_FILTERS
from data.formats.table import DEFAULT_FORMAT, TRAINING_FORMATS
from data.json_records import DataError
from data.loss_weights import LOSS_NORMALIZATIONS, encode_trajectory
from data.loss_weights_page import render_page
from data.token_view import SampleView, TokenView, TurnView, view_sample
from data.trajectories import Trajectory, read_trajectories
from model.tokenizer import load_tokenizer
from printable import one_line, shown, terminal_text

# Colours repeat what the markers say; --no_color, NO_COLOR or a pipe leave the markers alone.
COLORS = {
    "context": "\x1b[2m",
    "masked": "\x1b[90;9m",
    "excluded": "\x1b[35m",
    "normal": "\x1b[32m",
    "key": "\x1b[30;43;1m",
    "eos": "\x1b[36m",
    "evidence": "\x1b[31;4m",
    "title": "\x1b[1m",
}
RESET = "\x1b[0m"
LEGEND = (
    ("key", "[ get*4.5]", "key token with its weight w"),
    ("normal", "|x|", "trained with w = 1"),
    ("eos", "|</s>|", "end of turn, trained with w = 1"),
    ("masked", "~x~", "masked turn, weight 0, stays context"),
    ("excluded", "{x}", "turn of weight 0 in the data, stays context"),
    ("context", "x", "context, not trained"),
    ("evidence", ">>x<<", "the text that caused the turn before it to be masked"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


def paint(text: str, kind: str, *, color: bool) -> str:
    return f"{COLORS[kind]}{text}{RESET}" if color and text else text


def format_number(value: float) -> str:
    """Up to four significant digits, without an exponent or a trailing .0: 4.5, 9, 0.2368."""
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.2e}"


def status_of(turn: TurnView) -> str:
    """Trained or masked and why, in one line; empty for turns that are never trained."""
    if turn.decision is None:
        return ""
    if turn.decision.masked:
        matched = f", matched {json.dumps(turn.decision.matched_text)}" if turn.decision.matched_text else ""
        return f"MASKED: {turn.decision.category} ({turn.decision.rule}{matched})"
    if turn.is_excluded:
        return "EXCLUDED: weight 0 in the data"
    trained = [token for token in turn.tokens if token.loss_weight]
    n_key = sum(token.kind == "key" for token in trained)
    w_sum = sum(token.key_weight for token in trained)
    return (
        f"TRAINED: {len(trained)} tokens, {n_key} key, sum of w {format_number(w_sum)}, "
        f"loss weights sum {format_number(turn.loss_weight_sum)}"
    )


def format_tokens(tokens: Sequence[TokenView], *, color: bool, max_context: int | None) -> str:
    """The turn's text with markers (LEGEND); context beyond `max_context` tokens is cut with a note."""
    parts, previous = [], None
    n_context = 0
    for index, token in enumerate(tokens):
        text = token.text if index else token.text.lstrip("\n")  # the newline before "Assistant:" is not shown
        kind = "evidence" if token.is_evidence else token.kind
        n_context += kind == "context"
        if kind == "context" and max_context is not None and n_context > max_context:
            continue
        if previous != kind:
            parts.append(_between(previous, kind))
        if kind == "key":
            parts.append(paint(f"[{text}*{format_number(token.key_weight)}]", kind, color=color))
        elif kind in ("normal", "eos"):
            parts.append(paint(text, kind, color=color) + "|")
        else:
            parts.append(paint(text, kind, color=color))
        previous = kind
    parts.append(_between(previous, None))
    if max_context is not None and n_context > max_context:
        note = f" ... {n_context - max_context} more context tokens (--full_context)"
        parts.append(paint(note, "context", color=color))
    return "".join(parts)


def _between(previous: str | None, kind: str | None) -> str:
    """The marker where a run of one class ends and one of another begins."""
    closing = {"masked": "~", "excluded": "}", "evidence": "<<"}.get(previous, "")
    opening = {
        "masked": "~",
        "excluded": "{",
        "evidence": ">>",
        "normal": "|" if previous != "eos" else "",
        "eos": "|",
    }.get(kind, "")
    return closing + ("" if previous == "normal" and kind == "eos" else opening)


def format_sample(sample: SampleView, *, color: bool, max_context: int | None) -> str:
    """The whole sample for a terminal."""
    lines = [
        paint(f"sample {one_line(sample.id)} ({terminal_text(sample.source)})", "title", color=color),
        ", ".join(f"{name} {value}" for name, value in sample.settings.items()),
        f"{sample.n_positions} input positions, {sample.trained_turns} trained turns, "
        f"{sample.trained_tokens} trained tokens, loss weights sum {format_number(sample.loss_weight_sum)}, "
        f"denominator {format_number(sample.denominator)}",
        *(f"  {paint(mark, kind, color=color)}{' ' * (12 - len(mark))}{meaning}" for kind, mark, meaning in LEGEND),
        "",
    ]
    for turn in sample.turns:
        number = "" if turn.message_index < 0 else f"message {turn.message_index} "
        status = status_of(turn)
        title = f"-- {number}{turn.title}" + (f"  {terminal_text(status)}" if status else "")
        lines.append(paint(title, "title", color=color))
        lines.append(format_tokens(turn.tokens, color=color, max_context=max_context))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; a wrong one ends the process with one line and code 2."""
    parser = argparse.ArgumentParser(prog="python -m data.inspect_loss_weights", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="training file, the authors' JSON or OpenAI JSON lines")
    parser.add_argument("--model", default="assets/tiny_model", help="model folder or tokenizer file, for the tokens")
    parser.add_argument(
        "--prompt_format", choices=TRAINING_FORMATS, default=DEFAULT_FORMAT, help="form of prompts and calls"
    )
    parser.add_argument("--index", type=int, help="which trajectory of the file, from 0 (0 without --id)")
    parser.add_argument("--id", help="which trajectory, by its id")
    parser.add_argument("--error_filter", choices=ERROR_FILTERS, default="structured", help="which turns are masked")
    parser.add_argument("--key_tokens", choices=("on", "off"), default="on", help="weigh key tokens")
    parser.add_argument("--max_key_token_weight", type=float, default=9.0, help="w_max")
    parser.add_argument(
        "--loss_normalization", choices=LOSS_NORMALIZATIONS, default="turn_mean", help="how weights are scaled"
    )
    parser.add_argument(
        "--unparsable_calls",
        choices=("error", "mask"),
        default="error",
        help="a call that does not parse: stop, or keep it as a masked turn",
    )
    parser.add_argument("--html", type=Path, help="write the sample as a self-contained page")
    parser.add_argument("--full_context", action="store_true", help="print all context tokens, not 60 per turn")
    parser.add_argument("--no_color", action="store_true", help="markers only")
    return parse_arguments(parser, arguments)


def choose_trajectory(trajectories: Sequence[Trajectory], arguments: argparse.Namespace) -> Trajectory:
    """The trajectory of --id or --index. Raises DataError when there is none."""
    if arguments.id is not None:
        found = [trajectory for trajectory in trajectories if trajectory.id == arguments.id]
        if not found:
            raise DataError(
                f"{arguments.data}: found no trajectory with id {shown(arguments.id)}, expected one among "
                f"{len(trajectories)}"
            )
        return found[0]
    index = arguments.index or 0
    if not 0 <= index < len(trajectories):
        raise DataError(f"{arguments.data}: found --index {index}, expected 0 to {len(trajectories) - 1}")
    return trajectories[index]


def load_sample(trajectory: Trajectory, arguments: argparse.Namespace) -> SampleView:
    """The trajectory encoded as training would, as a view."""
    tokenizer = load_tokenizer(arguments.model)
    settings = {
        "error_filter": arguments.error_filter,
        "key_tokens": arguments.key_tokens == "on",
        "max_key_token_weight": arguments.max_key_token_weight,
        "prompt_format": arguments.prompt_format,
    }
    row = encode_trajectory(trajectory, tokenizer, **settings, loss_normalization=arguments.loss_normalization)
    raw_row = encode_trajectory(trajectory, tokenizer, **settings, loss_normalization="sum")
    figures = {
        "prompt_format": arguments.prompt_format,
        "error_filter": arguments.error_filter,
        "key_tokens": arguments.key_tokens,
        "max_key_token_weight": format_number(arguments.max_key_token_weight),
        "loss_normalization": arguments.loss_normalization,
    }
    return view_sample(trajectory, row, raw_row, tokenizer, settings=figures)


def run(arguments: argparse.Namespace) -> None:
    """Write the page or print the sample. Raises DataError, ModelFolderError and OSError."""
    trajectories = read_trajectories(arguments.data, unparsable_calls=arguments.unparsable_calls)
    sample = load_sample(choose_trajectory(trajectories, arguments), arguments)
    if arguments.html is not None:
        arguments.html.write_text(render_page(sample), encoding="utf-8")
        print(f"wrote {terminal_text(str(arguments.html))}")
        return
    color = not arguments.no_color and "NO_COLOR" not in os.environ and sys.stdout.isatty()
    print(format_sample(sample, color=color, max_context=None if arguments.full_context else 60))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr for bad input."""
    flags = read_flags(arguments)
    return run_command(lambda: run(flags), (ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
