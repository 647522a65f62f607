"""What a run prints besides the bar, which only a terminal shows: lines of figures, and what to do next."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from train.run_logging import log_line


def log_on_main(*lines: str) -> None:
    """log_line of each on rank 0, also before the ranks have met."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            log_line(line)


def is_due(step: int, previous_step: int, every: int) -> bool:
    """Whether a multiple of `every` steps lies above previous_step and at most at step; `every` 0 is never."""
    return every > 0 and step // every > previous_step // every


def mean_of(rows: Sequence[dict], key: str) -> float:
    """Mean of one key of metrics.jsonl over some of its lines."""
    return sum(row[key] for row in rows) / len(rows)


def time_left(rows: Sequence[dict], last_step: int) -> str:
    """The time of the remaining steps at the pace of `rows`, lines of metrics.jsonl of which the last is the newest."""
    seconds = round(mean_of(rows, "time/step_seconds") * (last_step - rows[-1]["step"]))
    minutes, hours = seconds // 60, seconds // 3600
    text = (
        f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
    )
    return f"{text} left"


def window_of(rows: Sequence[dict]) -> str:
    """Over how many steps a line's figures are means."""
    return f"mean of {len(rows)} step{'s' * (len(rows) != 1)}"


def sft_line(rows: Sequence[dict], last_step: int) -> str:
    """The line about the newest steps of an SFT run; rows: their lines of metrics.jsonl, at least one."""
    seconds = sum(row["time/step_seconds"] for row in rows)
    return (
        f"step {rows[-1]['step']}/{last_step}  loss {mean_of(rows, 'sft/loss'):.4f} ({window_of(rows)})  "
        f"learning rate {rows[-1]['sft/learning_rate']:.2e}  gradient norm {mean_of(rows, 'sft/grad_norm'):.2f}  "
        f"{sum(row['sft/input_tokens'] for row in rows) / seconds:.0f} tokens/s  {time_left(rows, last_step)}"
    )


def unused_folder(output: Path, stage: str) -> Path:
    """A folder for the next stage, next to that of a run, that does not exist: runs/sft gives runs/eval_sft, runs/ppo.

    stage: "eval" goes before the run's name, any other one takes the place of "sft" in it or comes after it.
    """
    name = output.resolve().name
    if stage == "eval":
        name = f"eval_{name}"
    else:
        name = name.replace("sft", stage) if "sft" in name else f"{name}_{stage}"
    candidates = [output.parent / name, *(output.parent / f"{name}_{number}" for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def command(script: str, **flags: object) -> str:
    """A command line to copy."""
    return shlex.join(
        ["python", script, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
    )
