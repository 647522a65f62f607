"""Watching an SFT run: its journals, the bar, a line of figures now and then. Nothing here changes what is learned.

Journals are appended and flushed line by line, each line with its optimizer step, so that a resumed run can cut them
back to its checkpoint:
    metrics.jsonl      one line per optimizer step (docs/metrics.md)
    held_out.jsonl     one line per evaluation on --eval_data (train/held_out.py)
"""

from pathlib import Path

import torch

from train.distributed import World
from train.held_out import HeldOut, best_line, evaluate_held_out
from train.progress import is_due, sft_line
from train.run_logging import log_line, read_metrics, write_json_atomically
from train.run_watch import RunWatch
from train.sft_config import SFTConfig

JOURNALS = ("metrics.jsonl", "held_out.jsonl")


class SFTWatch(RunWatch):
    """The run's journals, its bar and its lines, on rank 0; on other ranks it only joins the collectives."""

    def __init__(self, config: SFTConfig, world: World, held_out: HeldOut | None, *, step: int, last_step: int) -> None:
        super().__init__(config, world, JOURNALS if held_out else JOURNALS[:1], step=step, last_step=last_step)
        self.config, self.held_out, self.output = config, held_out, Path(config.output)

    def record(self, line: dict[str, float]) -> None:
        """Write one step's line of metrics.jsonl, move the bar, and print a line when `log_every` says so."""
        if not self.world.is_main:
            return
        self.bar.set_postfix(loss=f"{line['sft/loss']:.4f}", refresh=False)
        self.write_steps([line])
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
