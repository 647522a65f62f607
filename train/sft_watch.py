"""Watching an SFT run: its journals, the bar, a line of figures now and then. Nothing here changes what is learned.

Journals are appended and flushed line by line, each line with its optimizer step, so that a resumed run can cut them
back to its checkpoint:
    metrics.jsonl      one line per optimizer step (docs/metrics.md)
    held_out.jsonl     one line per evaluation on --eval_data (train/held_out.py)
"""

from pathlib import Path
from typing import Self

import torch
from tqdm import tqdm

from data.json_records import JsonLinesFile
from train.distributed import World
from train.held_out import HeldOut, best_line, evaluate_held_out
from train.progress import is_due, sft_line
from train.run_logging import log_line, read_metrics, write_json_atomically
from train.sft_config import SFTConfig
from train.tensorboard import TensorBoard

JOURNALS = ("metrics.jsonl", "held_out.jsonl")


class SFTWatch:
    """The run's journals, its bar and its lines, on rank 0; on other ranks it only joins the collectives."""

    def __init__(self, config: SFTConfig, world: World, held_out: HeldOut | None, *, step: int, last_step: int) -> None:
        self.config, self.world, self.held_out, self.last_step = config, world, held_out, last_step
        self.output = Path(config.output)
        names = JOURNALS if held_out is not None else JOURNALS[:1]
        self.files = {name: JsonLinesFile(self.output / name) for name in names} if world.is_main else {}
        is_on = config.tensorboard == "on" and world.is_main
        self.tensorboard = TensorBoard(self.output, step) if is_on else None
        self.recent: list[dict] = []  # lines of metrics.jsonl since the last one on stdout
        # disable=None: no bar when stderr is not a terminal, so that logs and error lines stay clean
        self.bar = tqdm(total=last_step, initial=step, unit="step", disable=None if world.is_main else True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for file in (*self.files.values(), *filter(None, [self.tensorboard])):
            file.close()

    def sync(self) -> None:
        """Force the journals to disk: called before a checkpoint claims their steps."""
        for file in self.files.values():
            file.sync()

    def record(self, line: dict[str, float]) -> None:
        """Write one step's line of metrics.jsonl, move the bar, and print a line when `log_every` says so."""
        if not self.world.is_main:
            return
        self.files["metrics.jsonl"].write(line)
        if self.tensorboard is not None:
            self.tensorboard.write(line)
        self.bar.set_postfix(loss=f"{line['sft/loss']:.4f}", refresh=False)
        self.bar.update(1)
        self.recent.append(line)
        step, every = line["step"], self.config.log_every
        if is_due(step, step - 1, every) or every > 0 and step == self.last_step:
            log_line(sft_line(self.recent, self.last_step))
            self.recent.clear()

    def evaluate(self, model: torch.nn.Module, step: int) -> None:
        """Evaluate on the held-out data if due: at steps 0 and last_step, and every `eval_every`; a collective."""
        is_now = step in (0, self.last_step) or is_due(step, step - 1, self.config.eval_every)
        if self.held_out is None or not is_now:
            return
        line = {"step": step, **evaluate_held_out(self.config, model, self.held_out, self.world)}
        if not self.world.is_main:
            return
        self.files["held_out.jsonl"].write(line)
        if self.tensorboard is not None:
            self.tensorboard.write(line)
        best = best_line(read_metrics(self.output / "held_out.jsonl"))
        write_json_atomically(self.output / "held_out_best.json", best)
        is_best = "the best so far" if best["step"] == step else f"the best was step {best['step']}"
        log_line(
            f"step {step}: held-out loss {line['held_out/loss']:.4f}, {line['held_out/right_calls']} of "
            f"{line['held_out/calls']} calls right; {is_best}"
        )
